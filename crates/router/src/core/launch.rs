//! From the wish for a swarm to a swarm that is up, and how its allocation fares afterwards.

use std::str::FromStr as _;
use std::sync::Arc;

use drover_proto::allocator::AllocationState;
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_types::{AgentKind, ErrorCode, Failure, NodeIndex, SwarmId, SwarmStatus};
use serde_json::json;

use super::effects::{Effects, Micros, Out, Step, Token, Topic};
use super::input::{Allocation, LaunchOrder};
use super::model::{Head, Node, NodeFacts, Request, Retry, Side, Swarm, SwarmFacts, SwarmKey, Trouble};
use super::{Core, SECOND, of_swarm};

/// More nodes than any allocation we could follow.
const MOST_NODES: u32 = 10_000;
/// Longest request id that is kept.
pub(crate) const MOST_REQUEST_ID: usize = 256;

impl Core {
    /// Records the wish before anything is done about it.
    pub(super) fn launch(&mut self, token: Token, order: LaunchOrder, fx: &mut Effects) {
        match self.begin_launch(order, fx) {
            Ok(key) => self.attach_launch(token, key, fx),
            Err(failure) => fx.out.push(Out::Refuse(token, failure)),
        }
    }

    fn begin_launch(&mut self, order: LaunchOrder, fx: &mut Effects) -> Result<SwarmKey, Failure> {
        let LaunchOrder { request_id, mut spec, trace, place, prior } = order;
        check_spec(&mut spec, &self.book.settings.default_agent)?;
        check_request_id(&request_id)?;
        let earlier = self.book.requests.get(request_id.as_str()).map(|(request, _)| Arc::clone(request));
        if let Some(request) = earlier.or(prior.map(|prior| prior.request)) {
            return match self.swarms.get(&request.swarm) {
                Some(swarm) if request.launch && *swarm.spec == spec => Ok(request.swarm),
                _ => Err(reused(&request_id)),
            };
        }
        let key = self.book.key();
        let request_id = if request_id.is_empty() { fx.id().to_string() } else { request_id };
        let request = Arc::new(Request {
            key: self.book.key(),
            id: request_id.as_str().into(),
            launch: true,
            swarm: key,
            content: spec.system_prompt.as_str().into(),
            steer: false,
            trace: trace.clone(),
            created: fx.now,
        });
        let id = SwarmId::from(fx.id());
        let facts = SwarmFacts {
            status: SwarmStatus::Launching,
            reason: String::new(),
            request_id,
            trace,
            backend_state: String::new(),
            provider: place.as_ref().map_or_else(String::new, |place| place.backend.clone()),
            provider_id: place.map_or_else(|| spec.provider.clone(), |place| place.provider),
            agent: spec.agent.clone(),
            side: Side::default(),
            created: fx.now,
            ended: 0,
            launched: false,
            launch_seq: 0,
            running_since: 0,
            ensured_at: 0,
            over_since: 0,
            over_reason: String::new(),
            owes_release: None,
            ending: None,
            trouble: None,
        };
        // The allocator gives new nodes the ring as it is by then, which is this one or a newer one.
        let ring_sent = self.book.ring.as_ref().map_or(0, |ring| ring.revision);
        let node = |index| Node {
            index: NodeIndex(index),
            facts: NodeFacts { ring_sent, ..NodeFacts::default() },
            ..Node::default()
        };
        let nodes = (0..spec.node_count).map(node).collect();
        let swarm = Swarm {
            head: Head { key, id: id.clone(), job: "".into() },
            spec: Arc::new(spec),
            request: Arc::clone(&request),
            facts,
            nodes,
            ensure: Retry::default(),
            release: Retry::default(),
            fresh: true,
        };
        self.book.requests.insert(Arc::clone(&request.id), (Arc::clone(&request), Vec::new()));
        self.book.dirty.requests.push(request);
        self.book.dirty.nodes.extend((0..swarm.nodes.len() as u32).map(|index| (key, index)));
        self.by_id.insert(id, key);
        self.swarms.insert(key, swarm);
        self.say_progress(key, "queued", "the launch is recorded", fx);
        self.ensure_allocation(key, fx);
        self.mark(key);
        Ok(key)
    }

    /// Tells the caller what has been said so far, and lets it wait for the rest.
    fn attach_launch(&mut self, token: Token, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let backlog = if swarm.facts.launched {
            vec![launched_step(swarm)]
        } else if let Some(trouble) = &swarm.facts.trouble {
            vec![Step::Fail(trouble.failure())]
        } else if !swarm.facts.status.takes_prompts() {
            vec![Step::Fail(Failure::new(ErrorCode::SwarmOver, "the swarm was terminated before it was up"))]
        } else if swarm.fresh {
            // The progress that was said in this very batch reaches the caller as the first step.
            vec![progress_step(swarm, "queued", "the launch is recorded", self.book.seq, fx.now)]
        } else {
            vec![progress_step(swarm, "starting", "the launch is under way", 0, fx.now)]
        };
        fx.out.push(Out::Attach { token, topic: Topic::Launch(key), backlog, expect: usize::MAX });
    }

    /// Says a step of a launch aloud.
    fn say_progress(&mut self, key: SwarmKey, stage: &str, message: &str, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let data = json!({
            "request_id": swarm.facts.request_id, "swarm_id": swarm.head.id.as_str(), "stage": stage, "message": message,
            "provider": swarm.facts.provider, "provider_id": swarm.facts.provider_id,
            "timestamp": fx.now as f64 / SECOND as f64,
        });
        let seq = self.book.say(fx, &swarm.head, of_swarm("swarm_launch_progress", &data));
        fx.step(Topic::Launch(key), progress_step(swarm, stage, message, seq, fx.now));
    }

    /// A line of progress from the allocator.
    pub(super) fn launch_progress(&mut self, id: &SwarmId, stage: &str, message: &str, fx: &mut Effects) {
        let Some(&key) = self.by_id.get(id) else { return };
        if self.swarms.get(&key).is_some_and(|swarm| swarm.facts.status == SwarmStatus::Launching) {
            self.say_progress(key, stage, message, fx);
        }
    }

    /// Asks the allocator for the swarm's allocation; it keeps the one it has.
    pub(super) fn ensure_allocation(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        swarm.ensure.under_way = true;
        fx.out.push(Out::Ensure(swarm.head.id.clone(), Arc::clone(&swarm.spec), swarm.facts.trace.clone()));
    }

    /// The allocator's answer.
    pub(super) fn ensured(&mut self, id: &SwarmId, result: Result<Allocation, Failure>, fx: &mut Effects) {
        let Some(&key) = self.by_id.get(id) else { return };
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        match result {
            Ok(allocation) => {
                swarm.ensure.succeeded();
                swarm.facts.ensured_at = fx.now;
                // It may be up by now: its workers and the watch may have been faster than this answer.
                if swarm.facts.status.takes_prompts() {
                    self.apply_allocation(key, &allocation, fx);
                } else {
                    // Its end was asked for while it was being made.
                    swarm.facts.owes_release = Some(true);
                    self.release_owed(key, fx);
                }
                self.mark(key);
            }
            Err(failure) if matches!(failure.code, ErrorCode::BackendUnavailable | ErrorCode::ShuttingDown) => {
                swarm.ensure.failed(fx.now, SECOND / 4, 10 * SECOND, &failure.message);
            }
            Err(failure) => {
                swarm.ensure.failed(fx.now, SECOND, 30 * SECOND, &failure.message);
                if swarm.facts.status == SwarmStatus::Launching {
                    self.launch_failed(key, failure, fx);
                } else {
                    swarm.ensure.succeeded();
                }
            }
        }
    }

    /// Everything the allocator knows; what is missing does not exist.
    pub(super) fn snapshot(&mut self, begun_at: Micros, allocations: Vec<Allocation>, fx: &mut Effects) {
        if self.book.allocator.set(fx.now, "") {
            self.book.dirty.links_view = true;
        }
        let mut missing: std::collections::BTreeSet<SwarmKey> =
            self.swarms.iter().filter(|(_, swarm)| !swarm.is_over()).map(|(&key, _)| key).collect();
        let mut unseen: std::collections::BTreeSet<SwarmKey> =
            self.swarms.iter().filter(|(_, swarm)| swarm.is_over()).map(|(&key, _)| key).collect();
        for allocation in allocations {
            if let Some(&key) = self.by_id.get(&allocation.swarm) {
                missing.remove(&key);
                unseen.remove(&key);
                self.apply_allocation(key, &allocation, fx);
            }
        }
        for key in unseen {
            self.allocation_forgotten(key);
        }
        for key in missing {
            let Some(swarm) = self.swarms.get_mut(&key) else { continue };
            if swarm.ensure.under_way || swarm.facts.over_since != 0 {
                continue; // On its way, or known to be gone.
            }
            let had_one = swarm.facts.ensured_at != 0 && swarm.facts.ensured_at < begun_at;
            match swarm.facts.status {
                SwarmStatus::Launching if had_one || swarm.facts.ensured_at == 0 => self.ensure_allocation(key, fx),
                SwarmStatus::Launching => {}
                _ if had_one || !swarm.facts.launched => {
                    self.allocation_over(key, "the backend no longer knows its allocation", fx);
                }
                _ => {}
            }
        }
    }

    /// The backend no longer has the allocation of a swarm that is over: whatever it last said of it holds no longer.
    pub(super) fn allocation_forgotten(&mut self, key: SwarmKey) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        if matches!(swarm.facts.backend_state.as_str(), "PENDING" | "RUNNING" | "COMPLETING") {
            "COMPLETED".clone_into(&mut swarm.facts.backend_state);
            self.mark(key);
        }
    }

    /// One allocation changed.
    pub(super) fn allocation_changed(&mut self, allocation: &Allocation, fx: &mut Effects) {
        if let Some(&key) = self.by_id.get(&allocation.swarm) {
            self.apply_allocation(key, allocation, fx);
        }
    }

    fn apply_allocation(&mut self, key: SwarmKey, allocation: &Allocation, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        if swarm.is_over() {
            // Nothing of the swarm changes any more, but what became of its allocation is still to be seen.
            if swarm.facts.backend_state != allocation.backend_state {
                allocation.backend_state.clone_into(&mut swarm.facts.backend_state);
                self.mark(key);
            }
            return;
        }
        let facts = &mut swarm.facts;
        if facts.ensured_at == 0 {
            facts.ensured_at = fx.now;
        }
        if !allocation.job.is_empty() && *swarm.head.job != *allocation.job {
            swarm.head.job = allocation.job.as_str().into();
        }
        allocation.backend_state.clone_into(&mut facts.backend_state);
        if !allocation.backend.is_empty() {
            allocation.backend.clone_into(&mut facts.provider);
        }
        if !allocation.provider.is_empty() {
            allocation.provider.clone_into(&mut facts.provider_id);
        }
        // An allocator that says nothing of it does not move the files of a swarm.
        if !allocation.follower.is_empty() && *facts.side != *allocation.follower {
            facts.side = allocation.follower.as_str().into();
        }
        if facts.status == SwarmStatus::Launching {
            allocation.reason.clone_into(&mut facts.reason);
        }
        if allocation.state == AllocationState::Running && facts.running_since == 0 {
            facts.running_since = fx.now;
        }
        let side = Side::clone(&facts.side);
        self.want_side(&side, fx);
        for node in &allocation.nodes {
            self.apply_node(key, node, fx);
        }
        self.pump_swarm(key, fx);
        if allocation.is_over() {
            let reason = if allocation.reason.is_empty() {
                format!("its allocation ended ({})", allocation.backend_state)
            } else {
                allocation.reason.clone()
            };
            self.allocation_over(key, &reason, fx);
        }
        self.mark(key);
        self.evaluate(key, fx);
    }

    /// Nothing runs any more. What the workers wrote last may still be unread, so the swarm ends a little later.
    pub(super) fn allocation_over(&mut self, key: SwarmKey, reason: &str, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        if swarm.facts.over_since == 0 {
            swarm.facts.over_since = fx.now;
            reason.clone_into(&mut swarm.facts.over_reason);
            swarm.facts.owes_release = None;
            self.mark(key);
        }
        self.finish_when_settled(key, fx);
    }

    /// Every node is up, or as many as will be.
    pub(super) fn launched(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        swarm.facts.launched = true;
        swarm.facts.reason.clear();
        let missing = swarm.nodes.iter().filter(|node| !node.is_up()).count();
        swarm.facts.status = if missing == 0 { SwarmStatus::Running } else { SwarmStatus::Degraded };
        if missing > 0 {
            swarm.facts.reason = super::status::missing_words(swarm);
        }
        let data = json!({
            "request_id": swarm.facts.request_id, "swarm_id": swarm.head.id.as_str(), "job_id": &*swarm.head.job,
            "node_count": swarm.nodes.len(), "status": swarm.facts.status.as_str(),
            "partition": swarm.spec.partition, "time": swarm.spec.time,
            "provider": swarm.facts.provider, "provider_id": swarm.facts.provider_id,
            "agent_runtime": swarm.facts.agent, "agent_model": null, "pricing_model": null,
        });
        swarm.facts.launch_seq = self.book.say(fx, &swarm.head, of_swarm("swarm_launched", &data));
        fx.step(Topic::Launch(key), launched_step(swarm));
        self.mark(key);
        self.inject_system_prompt(key, fx);
        self.warm_all(key, fx);
    }

    /// It will not come up: says so, and gives back what it had.
    pub(super) fn launch_failed(&mut self, key: SwarmKey, mut failure: Failure, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        if failure.code == ErrorCode::CodexMissing && !failure.hint.contains("--agent echo") {
            let more = "or launch with `--agent echo`, which needs nothing";
            failure.hint = if failure.hint.is_empty() { more.to_owned() } else { format!("{}; {more}", failure.hint) };
        }
        swarm.facts.trouble = Some(Trouble::from(&failure));
        swarm.facts.status = SwarmStatus::Failed;
        swarm.facts.reason.clone_from(&failure.message);
        swarm.facts.ended = fx.now;
        if swarm.facts.over_since == 0 {
            swarm.facts.owes_release = Some(true);
        }
        // Not `request_id`: to a client that waits for its launch that would be an answer of a kind it does not know.
        let data = json!({
            "launch_request_id": swarm.facts.request_id, "swarm_id": swarm.head.id.as_str(),
            "reason": failure.message, "code": failure.code.as_str(), "hint": failure.hint,
        });
        swarm.facts.launch_seq = self.book.say(fx, &swarm.head, of_swarm("swarm_launch_failed", &data));
        fx.step(Topic::Launch(key), Step::Fail(failure));
        self.mark(key);
        self.close_swarm_injections(key, "the swarm did not come up", ErrorCode::LaunchFailed, fx);
        self.forget_members_of(key, fx);
        self.release_owed(key, fx);
    }

    /// The allocator does not answer. That says nothing about the swarms.
    pub(super) fn allocator_down(&mut self, error: &str, fx: &mut Effects) {
        if self.book.allocator.set(fx.now, error) {
            self.book.dirty.links_view = true;
        }
    }
}

pub(super) fn progress_step(swarm: &Swarm, stage: &str, message: &str, seq: u64, now: Micros) -> Step {
    let progress = pb::LaunchProgress {
        swarm_id: swarm.head.id.to_string(),
        stage: stage.to_owned(),
        message: message.to_owned(),
        provider: swarm.facts.provider.clone(),
        provider_id: swarm.facts.provider_id.clone(),
        timestamp_ms: now / 1000,
    };
    Step::Launch(pb::LaunchSwarmResponse { step: Some(pb::launch_swarm_response::Step::Progress(progress)), seq })
}

fn launched_step(swarm: &Swarm) -> Step {
    Step::Launch(pb::LaunchSwarmResponse {
        step: Some(pb::launch_swarm_response::Step::Launched(swarm.message())),
        seq: swarm.facts.launch_seq,
    })
}

/// Refuses what no backend could launch, and settles which agent is meant.
fn check_spec(spec: &mut LaunchSpec, default_agent: &str) -> Result<(), Failure> {
    let invalid = |message: String| Failure::new(ErrorCode::InvalidRequest, message);
    if spec.node_count == 0 || spec.node_count > MOST_NODES {
        return Err(invalid(format!("a swarm has 1 to {MOST_NODES} nodes, not {}", spec.node_count)));
    }
    if spec.agent.is_empty() {
        default_agent.clone_into(&mut spec.agent);
    }
    AgentKind::from_str(&spec.agent).map_err(|error| invalid(error.to_string()))?;
    for skill in &spec.skills {
        let harmless = !skill.path.is_empty()
            && !skill.path.contains(['\\', '\0'])
            && skill.path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !harmless {
            return Err(invalid(format!("skill path {:?} is not a relative path without . or .. parts", skill.path)));
        }
    }
    Ok(())
}

pub(super) fn check_request_id(id: &str) -> Result<(), Failure> {
    if id.len() > MOST_REQUEST_ID {
        return Err(Failure::new(
            ErrorCode::InvalidRequest,
            format!("the request id is longer than {MOST_REQUEST_ID} bytes"),
        ));
    }
    Ok(())
}

pub(super) fn reused(request_id: &str) -> Failure {
    Failure::new(ErrorCode::RequestReused, format!("request id {request_id} was used before for something else"))
        .hint("choose a new request id, or repeat the earlier request unchanged")
}
