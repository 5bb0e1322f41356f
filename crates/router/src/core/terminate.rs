//! The end of a swarm: turns may end, then its allocation is released, then what is open is closed.

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure, SwarmId, SwarmStatus};
use serde_json::json;

use super::delivery::queue_control;
use super::effects::{Effects, Out, Step, Token, Topic};
use super::inject::gone;
use super::input::TerminateOrder;
use super::launch::check_request_id;
use super::model::{EndStage, Ending, Swarm, SwarmKey};
use super::{Core, SECOND, of_swarm};

impl Core {
    /// Asks for the end; every request that asks is answered when it has come.
    pub(super) fn terminate(&mut self, token: Token, order: TerminateOrder, fx: &mut Effects) {
        if let Err(failure) = self.begin_terminate(token, order, fx) {
            fx.out.push(Out::Refuse(token, failure));
        }
    }

    fn begin_terminate(&mut self, token: Token, order: TerminateOrder, fx: &mut Effects) -> Result<(), Failure> {
        check_request_id(&order.request_id)?;
        let key = self.find(&order.swarm)?;
        let request_id = if order.request_id.is_empty() { fx.id().to_string() } else { order.request_id };
        let swarm = self.swarms.get_mut(&key).ok_or_else(gone)?;
        if swarm.is_over() {
            let seq = self.say_terminated(key, Some(&request_id), fx);
            let backlog = self.swarms.get(&key).map(|swarm| terminated_step(swarm, seq)).into_iter().collect();
            fx.out.push(Out::Attach { token, topic: Topic::Terminate(key), backlog, expect: usize::MAX });
            return Ok(());
        }
        let again = swarm.facts.ending.is_some();
        let was_launching = swarm.facts.status == SwarmStatus::Launching;
        swarm.facts.status = SwarmStatus::Terminating;
        match &mut swarm.facts.ending {
            Some(ending) => {
                if !ending.requests.contains(&request_id) {
                    ending.requests.push(request_id.clone());
                }
            }
            none => {
                "its end was asked for".clone_into(&mut swarm.facts.reason);
                *none = Some(Ending {
                    since: fx.now,
                    stage: EndStage::Waiting,
                    force: order.force,
                    stage_since: fx.now,
                    requests: vec![request_id.clone()],
                });
            }
        }
        let data = json!({
            "request_id": request_id, "swarm_id": swarm.head.id.as_str(), "job_id": &*swarm.head.job,
            "node_count": swarm.nodes.len(), "status": "terminating",
        });
        let seq = self.book.say(fx, &swarm.head, of_swarm("swarm_status", &data));
        self.mark(key);
        if was_launching {
            let failure = Failure::new(ErrorCode::SwarmOver, "the swarm was terminated before it was up");
            fx.step(Topic::Launch(key), Step::Fail(failure));
        }
        // The caller waits from here on: the end may come within this very call.
        let backlog = vec![progress_step("graceful_wait", "its end is recorded", fx.now / 1000, seq)];
        fx.out.push(Out::Attach { token, topic: Topic::Terminate(key), backlog, expect: usize::MAX });
        if again {
            self.force_ending(key, "its end was asked for again", fx);
        } else {
            self.withdraw_undelivered(key, fx);
            if order.force {
                self.force_ending(key, "asked not to wait", fx);
            } else {
                let open = self.swarms.get(&key).map_or(0, Swarm::open_turns);
                if open > 0 {
                    let message = format!("waiting for {open} prompts to end");
                    self.say_ending(key, "graceful_wait", &message, fx);
                }
                self.warm_all(key, fx);
                self.advance_ending(key, fx);
            }
        }
        Ok(())
    }

    /// What never left the router need not begin.
    fn withdraw_undelivered(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let unsent: Vec<_> = swarm
            .nodes
            .iter()
            .flat_map(|node| node.queue.iter().skip(node.in_flight))
            .filter(|pending| !pending.maybe_written)
            .filter_map(|pending| pending.injection.clone())
            .filter(|id| self.book.injections.contains_key(id))
            .collect();
        for id in unsent {
            self.close_injection(&id, "swarm is terminating or terminated", ErrorCode::SwarmOver, fx);
        }
    }

    fn force_ending(&mut self, key: SwarmKey, why: &str, fx: &mut Effects) {
        let Some(ending) = self.swarms.get_mut(&key).and_then(|swarm| swarm.facts.ending.as_mut()) else { return };
        if ending.force && ending.stage == EndStage::Releasing {
            return;
        }
        ending.force = true;
        self.say_ending(key, "force_requested", why, fx);
        self.begin_release(key, fx);
    }

    /// Goes on with a termination as far as it can go.
    pub(super) fn advance_ending(&mut self, key: SwarmKey, fx: &mut Effects) {
        let graceful = self.book.settings.graceful;
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let open = swarm.open_turns();
        let over = swarm.facts.over_since != 0;
        let Some(ending) = &mut swarm.facts.ending else { return };
        let waited = fx.now.saturating_sub(ending.stage_since);
        if over {
            return self.finish_when_settled(key, fx);
        }
        match ending.stage {
            EndStage::Waiting if open == 0 => {
                self.say_ending(key, "quiescent", "no prompt is open", fx);
                self.begin_release(key, fx);
            }
            EndStage::Waiting if waited >= graceful => {
                ending.force = true;
                let message = format!("{open} prompts did not end within {} s", graceful / SECOND);
                self.say_ending(key, "graceful_timeout", &message, fx);
                self.begin_release(key, fx);
            }
            EndStage::Waiting => {}
            EndStage::Releasing => {
                if !ending.force && waited >= graceful {
                    ending.force = true;
                    ending.stage_since = fx.now;
                    swarm.facts.owes_release = Some(true);
                    self.say_ending(key, "graceful_timeout", "its workers did not end in time; killing them", fx);
                    self.mark(key);
                } else if swarm.facts.owes_release.is_none() && waited >= graceful.max(SECOND) {
                    // Asked and not yet over: ask again, it costs nothing.
                    ending.stage_since = fx.now;
                    swarm.facts.owes_release = Some(ending.force);
                }
                if self.swarms.get(&key).is_some_and(|swarm| swarm.release.due(fx.now)) {
                    self.release_owed(key, fx);
                }
            }
        }
    }

    fn begin_release(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(ending) = &mut swarm.facts.ending else { return };
        let first = ending.stage == EndStage::Waiting;
        ending.stage = EndStage::Releasing;
        ending.stage_since = fx.now;
        swarm.facts.owes_release = Some(ending.force);
        swarm.release.next_at = 0;
        self.mark(key);
        if first {
            self.say_ending(key, "provider_terminate", "releasing its allocation", fx);
            if let Some(swarm) = self.swarms.get_mut(&key) {
                let data = json!({ "reason": "the swarm is terminated" }).to_string();
                for index in 0..swarm.nodes.len() as u32 {
                    if swarm.nodes[index as usize].is_up() {
                        queue_control(&mut self.book, &mut swarm.nodes, key, index, None, "shutdown", &data);
                    }
                }
            }
            self.pump_swarm(key, fx);
        }
        self.release_owed(key, fx);
    }

    /// Gives back what the allocator still holds for a swarm.
    pub(super) fn release_owed(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(force) = swarm.facts.owes_release else { return };
        if swarm.release.due(fx.now) {
            swarm.release.under_way = true;
            fx.out.push(Out::Release(swarm.head.id.clone(), force));
        }
    }

    /// The allocator's answer to a release.
    pub(super) fn released(&mut self, id: &SwarmId, result: Result<bool, Failure>, fx: &mut Effects) {
        let Some(&key) = self.by_id.get(id) else { return };
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        match result {
            Ok(true) => {
                swarm.release.succeeded();
                swarm.facts.owes_release = None;
                self.mark(key);
            }
            Ok(false) if swarm.ensure.under_way => {
                // It may be in the making: asked again when that is known.
                swarm.release.failed(fx.now, SECOND / 2, 5 * SECOND, "the allocation is still being made");
            }
            Ok(false) => {
                swarm.release.succeeded();
                swarm.facts.owes_release = None;
                self.mark(key);
                if self.swarms.get(&key).is_some_and(Swarm::is_over) {
                    self.allocation_forgotten(key);
                } else {
                    self.allocation_over(key, "it had no allocation", fx);
                }
            }
            Err(failure) => {
                swarm.release.failed(fx.now, SECOND / 4, 10 * SECOND, &failure.message);
            }
        }
    }

    /// Says a step of a termination aloud, under every request that waits for it.
    fn say_ending(&mut self, key: SwarmKey, stage: &str, message: &str, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let requests = swarm.facts.ending.as_ref().map(|ending| ending.requests.clone()).unwrap_or_default();
        let mut seq = 0;
        for request_id in requests {
            let data = json!({
                "request_id": request_id, "swarm_id": swarm.head.id.as_str(), "job_id": &*swarm.head.job,
                "provider_backend": swarm.facts.provider, "stage": stage, "message": message,
                "timestamp": fx.now as f64 / SECOND as f64,
            });
            seq = self.book.say(fx, &swarm.head, of_swarm("swarm_terminate_progress", &data));
        }
        fx.step(Topic::Terminate(key), progress_step(stage, message, fx.now / 1000, seq));
    }

    /// The swarm has ended.
    pub(super) fn finish(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let asked = swarm.facts.ending.as_ref().map(|ending| ending.requests.clone()).unwrap_or_default();
        let reason = if asked.is_empty() { swarm.facts.over_reason.clone() } else { "terminated as asked".to_owned() };
        self.close_swarm_injections(key, "the swarm ended", ErrorCode::SwarmOver, fx);
        self.forget_members_of(key, fx);
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        swarm.facts.status = SwarmStatus::Terminated;
        swarm.facts.reason = reason;
        swarm.facts.ended = fx.now;
        swarm.facts.ending = None;
        for node in &mut swarm.nodes {
            for pending in node.queue.drain(..) {
                self.book.dirty.controls_done.push((key, node.index.0, pending.seq));
            }
            node.in_flight = 0;
            node.running = None;
        }
        let mut seq = 0;
        if asked.is_empty() {
            seq = self.say_terminated(key, None, fx);
        }
        for request_id in &asked {
            seq = self.say_terminated(key, Some(request_id), fx);
        }
        if let Some(swarm) = self.swarms.get(&key) {
            fx.step(Topic::Terminate(key), terminated_step(swarm, seq));
        }
        self.mark(key);
        self.warm_all(key, fx);
    }

    fn say_terminated(&mut self, key: SwarmKey, request_id: Option<&str>, fx: &mut Effects) -> u64 {
        let Some(swarm) = self.swarms.get(&key) else { return 0 };
        let mut data = json!({
            "swarm_id": swarm.head.id.as_str(), "job_id": &*swarm.head.job, "reason": swarm.facts.reason,
        });
        if let Some(request_id) = request_id {
            data["request_id"] = request_id.into();
        }
        self.book.say(fx, &swarm.head, of_swarm("swarm_terminated", &data))
    }
}

fn progress_step(stage: &str, message: &str, timestamp_ms: u64, seq: u64) -> Step {
    let progress = pb::TerminateProgress { stage: stage.to_owned(), message: message.to_owned(), timestamp_ms };
    Step::Terminate(pb::TerminateSwarmResponse {
        step: Some(pb::terminate_swarm_response::Step::Progress(progress)),
        seq,
    })
}

fn terminated_step(swarm: &Swarm, seq: u64) -> Step {
    Step::Terminate(pb::TerminateSwarmResponse {
        step: Some(pb::terminate_swarm_response::Step::Terminated(swarm.message())),
        seq,
    })
}
