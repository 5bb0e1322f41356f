//! What state a swarm is in, from what its nodes and its allocation say; and when a swarm that is over has ended.

use std::sync::Arc;

use drover_types::{ErrorCode, Failure, SwarmStatus};
use serde_json::json;

use super::effects::{Effects, Micros, Out};
use super::model::{Swarm, SwarmKey};
use super::{Core, SECOND, of_swarm};

/// How long after the end of an allocation its last words may take to be read.
const SETTLE: Micros = 2 * SECOND;
/// The same when they were killed: no more is coming than what is on disk already.
const SETTLE_KILLED: Micros = SECOND;
/// The same while the follower does not answer.
const SETTLE_BLIND: Micros = 15 * SECOND;
/// The same for a follower behind a connection that takes its time to come back.
const SETTLE_FAR: Micros = 120 * SECOND;
/// How long outboxes of a swarm that has ended are still read, unless it is forgotten before.
const LINGER: Micros = 30 * SECOND;

impl Core {
    /// The swarm has to be written and shown again.
    pub(super) fn mark(&mut self, key: SwarmKey) {
        self.book.dirty.swarms.insert(key);
        self.book.dirty.views.insert(key);
    }

    /// Looks at a swarm again after one of its nodes or its allocation changed.
    pub(super) fn evaluate(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        match swarm.facts.status {
            SwarmStatus::Launching => self.evaluate_launch(key, fx),
            SwarmStatus::Running | SwarmStatus::Degraded => {
                let missing = swarm.nodes.iter().any(|node| !node.is_up());
                let (status, reason) = if missing {
                    (SwarmStatus::Degraded, missing_words(swarm))
                } else {
                    (SwarmStatus::Running, String::new())
                };
                self.set_status(key, status, reason, fx);
            }
            SwarmStatus::Terminating => self.advance_ending(key, fx),
            SwarmStatus::Terminated | SwarmStatus::Failed => {}
        }
    }

    fn set_status(&mut self, key: SwarmKey, status: SwarmStatus, reason: String, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let previous = swarm.facts.status;
        if previous == status && swarm.facts.reason == reason {
            return;
        }
        swarm.facts.status = status;
        swarm.facts.reason = reason;
        if previous != status {
            let data = json!({
                "swarm_id": swarm.head.id.as_str(), "status": status.as_str(), "previous": previous.as_str(),
                "reason": swarm.facts.reason,
            });
            self.book.say(fx, &swarm.head, of_swarm("swarm_state", &data));
        }
        self.mark(key);
    }

    fn evaluate_launch(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let facts = &swarm.facts;
        if facts.over_since != 0 {
            return self.finish_when_settled(key, fx);
        }
        let up = swarm.nodes.iter().filter(|node| node.is_up()).count();
        let hopeless = swarm.nodes.iter().filter(|node| node.is_hopeless()).count();
        let waited = if facts.running_since == 0 { 0 } else { fx.now.saturating_sub(facts.running_since) };
        let everyone = up + hopeless == swarm.nodes.len();
        if hopeless == swarm.nodes.len() {
            let failure = launch_trouble(swarm);
            self.launch_failed(key, failure, fx);
        } else if facts.running_since == 0 {
            // Waiting for resources has no time limit of ours.
        } else if up > 0 && (everyone || waited >= self.book.settings.soft_timeout) {
            self.launched(key, fx);
        } else if waited >= self.book.settings.hard_timeout {
            let mut failure = launch_trouble(swarm);
            if failure.code == ErrorCode::LaunchFailed {
                failure.message = format!(
                    "no node was up {} s after the allocation began to run: {}",
                    waited / SECOND,
                    failure.message
                );
            }
            self.launch_failed(key, failure, fx);
        }
    }

    /// Timeouts and repeats of every swarm.
    pub(super) fn tick_swarms(&mut self, fx: &mut Effects) {
        let keys: Vec<SwarmKey> = self.swarms.keys().copied().collect();
        for key in keys {
            let Some(swarm) = self.swarms.get(&key) else { continue };
            let facts = &swarm.facts;
            if swarm.is_over() {
                if facts.owes_release.is_some() && swarm.release.due(fx.now) {
                    self.release_owed(key, fx);
                }
                continue;
            }
            match facts.status {
                SwarmStatus::Launching if facts.ensured_at == 0 && swarm.ensure.due(fx.now) => {
                    self.ensure_allocation(key, fx);
                }
                SwarmStatus::Launching => self.evaluate_launch(key, fx),
                SwarmStatus::Terminating => self.advance_ending(key, fx),
                _ if facts.over_since != 0 => self.finish_when_settled(key, fx),
                _ => {}
            }
        }
    }

    /// Ends a swarm whose allocation is over, once its workers' last words are read.
    pub(super) fn finish_when_settled(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let facts = &swarm.facts;
        if swarm.is_over() || facts.over_since == 0 {
            return;
        }
        let waited = fx.now.saturating_sub(facts.over_since);
        let killed = facts.ending.as_ref().is_some_and(|ending| ending.force);
        let side = &facts.side;
        let patience = match (self.book.followers.is_up(side), killed) {
            (true, true) => SETTLE_KILLED,
            (true, false) => SETTLE,
            (false, _) if side.is_empty() => SETTLE_BLIND,
            (false, _) => SETTLE_FAR,
        };
        let said_all = swarm.nodes.iter().all(|node| node.facts.bye >= node.facts.generation);
        if facts.status == SwarmStatus::Launching {
            let explained = swarm.nodes.iter().any(|node| node.facts.trouble.is_some());
            if explained || waited >= patience {
                let failure = launch_trouble(swarm);
                self.launch_failed(key, failure, fx);
            }
        } else if said_all || swarm.open_turns() == 0 || waited >= patience {
            self.finish(key, fx);
        }
    }

    /// Swarms that ended long ago are forgotten, with their mailbox.
    pub(super) fn forget_old_swarms(&mut self, fx: &mut Effects) {
        let keep = self.book.settings.keep_ended;
        let old: Vec<SwarmKey> = self
            .swarms
            .iter()
            .filter(|(_, swarm)| {
                let over = swarm.is_over() && swarm.facts.owes_release.is_none();
                over && swarm.facts.ended.saturating_add(keep) <= fx.now
            })
            .map(|(&key, _)| key)
            .collect();
        for key in old {
            let Some(swarm) = self.swarms.remove(&key) else { continue };
            self.by_id.remove(&swarm.head.id);
            let data = json!({ "swarm_id": swarm.head.id.as_str(), "reason": "it ended long ago" });
            self.book.say(fx, &swarm.head, of_swarm("swarm_removed", &data));
            self.book.approvals.retain(|_, approval| approval.swarm != key);
            self.book.dirty.swarms_gone.push(key);
            self.book.dirty.swarms.remove(&key);
            self.book.dirty.views.insert(key);
            let side = swarm.facts.side;
            self.book.leftovers.insert(swarm.head.id.clone(), Arc::clone(&side));
            self.book.dirty.leftovers.push((swarm.head.id.clone(), Arc::clone(&side)));
            self.book.dirty.approvals_view = true;
            self.want_side(&side, fx);
            fx.out.push(Out::RemoveMailbox(side, swarm.head.id));
        }
    }

    /// Whether outboxes of this swarm are still read.
    pub(super) fn is_read(swarm: &Swarm, now: Micros) -> bool {
        !swarm.is_over() || now < swarm.facts.ended + LINGER
    }
}

/// Which nodes are not up, in words.
pub(super) fn missing_words(swarm: &Swarm) -> String {
    let missing: Vec<_> = swarm.nodes.iter().filter(|node| !node.is_up()).collect();
    let total = swarm.nodes.len();
    let names: Vec<String> =
        missing.iter().take(5).map(|node| format!("node {} is {}", node.index, node.state())).collect();
    let more = if missing.len() > 5 { format!(" and {} more", missing.len() - 5) } else { String::new() };
    format!("{} of {total} nodes up: {}{more}", total - missing.len(), names.join(", "))
}

/// The best explanation of a launch that does not come up: what a worker said, else what the backend said.
fn launch_trouble(swarm: &Swarm) -> Failure {
    if let Some(trouble) = swarm.nodes.iter().find_map(|node| node.facts.trouble.as_ref()) {
        return trouble.failure();
    }
    let node = swarm.nodes.iter().find(|node| node.is_hopeless() && !node.facts.reason.is_empty());
    let message = match node {
        Some(node) => format!("node {}: {}", node.index, node.facts.reason),
        None if !swarm.facts.over_reason.is_empty() => swarm.facts.over_reason.clone(),
        None if !swarm.facts.reason.is_empty() => swarm.facts.reason.clone(),
        None => "its workers did not report".to_owned(),
    };
    Failure::new(ErrorCode::LaunchFailed, message)
        .hint("the workers' standard error is kept below nodes/ of the state directory, or in the job's output")
}
