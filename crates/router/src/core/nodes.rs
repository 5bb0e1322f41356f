//! One node: what the allocator says of it, what its worker says of itself, and how often its outbox is looked at.

use std::collections::BTreeSet;
use std::sync::Arc;

use drover_proto::allocator::WorkerState;
use drover_types::{ErrorCode, Generation, NodeState, OutboxId};
use serde_json::json;

use super::effects::{Effects, Micros, Out};
use super::input::AllocatedNode;
use super::model::{Node, Side, Stream, Swarm, SwarmKey};
use super::{Core, SECOND, of_node};

/// How long after a node was given up its last words may take to be read.
const SETTLE: Micros = 2 * SECOND;
/// The same while the follower does not answer.
const SETTLE_BLIND: Micros = 15 * SECOND;
/// How long the outbox of a worker that was replaced is still read.
const SUPERSEDED: Micros = 60 * SECOND;
/// How often an outbox with a gap is asked for again.
pub(super) const ASK_AGAIN: Micros = SECOND;

impl Node {
    fn worker_state(&self) -> WorkerState {
        WorkerState::try_from(self.facts.state).unwrap_or(WorkerState::Unspecified)
    }

    /// Its worker said hello and nothing has been heard of its end.
    pub(crate) fn is_up(&self) -> bool {
        let facts = &self.facts;
        let alive = !matches!(self.worker_state(), WorkerState::Failed | WorkerState::Exited | WorkerState::Restarting);
        alive && facts.hello > 0 && facts.hello >= facts.generation && facts.bye < facts.hello
    }

    /// It will not come up by itself.
    pub(crate) fn is_hopeless(&self) -> bool {
        if self.worker_state() == WorkerState::Failed {
            return true;
        }
        // Starting the worker again would not change these.
        let code = self.facts.trouble.as_ref().and_then(|trouble| ErrorCode::from_name(&trouble.code));
        let lasting = matches!(
            code,
            Some(
                ErrorCode::CodexMissing
                    | ErrorCode::CodexNotLoggedIn
                    | ErrorCode::InvalidRequest
                    | ErrorCode::NotAllowed
            )
        );
        lasting && self.facts.gave_up >= self.facts.generation
    }

    /// What it is doing, in a word.
    pub(crate) fn state(&self) -> NodeState {
        match self.worker_state() {
            WorkerState::Failed => NodeState::Failed,
            WorkerState::Exited => NodeState::Exited,
            WorkerState::Restarting => NodeState::Restarting,
            _ if self.is_up() && self.running.is_some() => NodeState::Busy,
            _ if self.is_up() => NodeState::Idle,
            _ if self.facts.bye > 0 && self.facts.bye >= self.facts.generation => NodeState::Exited,
            WorkerState::Running => NodeState::Starting,
            WorkerState::Pending | WorkerState::Unspecified => NodeState::Pending,
        }
    }

    /// Why it is not up, when somebody said so.
    pub(crate) fn reason(&self) -> &str {
        match &self.facts.trouble {
            Some(trouble) if !self.is_up() && self.facts.gave_up >= self.facts.generation => &trouble.message,
            _ => &self.facts.reason,
        }
    }
}

impl Core {
    /// Takes in what the allocator says of a node.
    pub(super) fn apply_node(&mut self, key: SwarmKey, told: &AllocatedNode, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(node) = swarm.nodes.get_mut(told.index.0 as usize) else { return };
        let facts = &mut node.facts;
        if told.generation < facts.generation {
            return; // An old word.
        }
        let restarted = told.generation > facts.generation && facts.generation > 0;
        let was = facts.state;
        let same = !restarted
            && facts.generation == told.generation
            && was == told.state as i32
            && facts.pid == told.pid
            && facts.host == told.host
            && facts.reason == told.reason
            && facts.restarts == told.restarts;
        if same {
            return;
        }
        let cause = if told.reason.is_empty() { facts.reason.clone() } else { told.reason.clone() };
        facts.generation = told.generation;
        facts.state = told.state as i32;
        facts.pid = told.pid;
        facts.restarts = told.restarts;
        told.reason.clone_into(&mut facts.reason);
        if !told.host.is_empty() {
            told.host.clone_into(&mut facts.host);
        }
        self.book.dirty.nodes.insert((key, told.index.0));
        self.book.dirty.views.insert(key);
        if restarted {
            node.running = None;
            let data = json!({ "generation": told.generation, "reason": cause, "restarts": told.restarts });
            self.book.say(fx, &swarm.head, of_node("node_restarted", told.index.0, None, &data));
        }
        let gave_up = told.state == WorkerState::Failed && was != WorkerState::Failed as i32;
        if gave_up {
            node.facts.failed_since = fx.now;
            node.running = None;
            let data = json!({ "reason": told.reason, "restarts": told.restarts });
            self.book.say(fx, &swarm.head, of_node("node_failed", told.index.0, None, &data));
        } else if told.state != WorkerState::Failed {
            node.facts.failed_since = 0;
        }
        let side = &swarm.facts.side;
        let reachable = self.book.followers.is_up(side);
        for generation in 1..=told.generation {
            if node.streams.contains_key(&generation) {
                continue;
            }
            node.streams.insert(generation, Stream::default());
            self.book.dirty.streams.insert((key, told.index.0, generation));
            if reachable {
                let outbox =
                    OutboxId { swarm: swarm.head.id.clone(), node: told.index, generation: Generation(generation) };
                fx.out.push(Out::Follow(Arc::clone(side), outbox, Stream::default().cursor));
            }
        }
        self.warm(key, told.index.0, fx);
    }

    /// A Follow stream was opened: it has to be told everything of its side.
    pub(super) fn follower_up(&mut self, side: &Side, fx: &mut Effects) {
        if self.book.followers.set(side, fx.now, "") {
            self.book.dirty.links_view = true;
        }
        if !self.book.followers.is_up(side) {
            return; // Nobody wants that side any more.
        }
        let on_side = |(&key, swarm): (&SwarmKey, &Swarm)| (swarm.facts.side == *side).then_some(key);
        let keys: Vec<SwarmKey> = self.swarms.iter().filter_map(on_side).collect();
        for key in keys {
            let Some(swarm) = self.swarms.get_mut(&key) else { continue };
            if !Self::is_read(swarm, fx.now) {
                continue;
            }
            for node in &mut swarm.nodes {
                for (&generation, stream) in &mut node.streams {
                    if stream.closed {
                        continue;
                    }
                    stream.asked_again = 0;
                    let outbox =
                        OutboxId { swarm: swarm.head.id.clone(), node: node.index, generation: Generation(generation) };
                    fx.out.push(Out::Follow(Arc::clone(side), outbox, stream.cursor));
                }
                node.hot = false;
                if !node.delivery.under_way {
                    node.delivery.next_at = 0;
                }
            }
            self.warm_all(key, fx);
            self.pump_swarm(key, fx);
        }
    }

    /// The follower does not answer.
    pub(super) fn follower_down(&mut self, side: &Side, error: &str, fx: &mut Effects) {
        if self.book.followers.set(side, fx.now, error) {
            self.book.dirty.links_view = true;
        }
    }

    /// Sees to it that the follower of a side is talked to.
    pub(super) fn want_side(&mut self, side: &Side, fx: &mut Effects) {
        if self.book.followers.want(side) {
            fx.out.push(Out::Reach(Arc::clone(side), true));
        }
    }

    /// Lets go of the followers of clusters that nothing is to be read from any more: they end when nobody uses them.
    pub(super) fn leave_unwanted_sides(&mut self, fx: &mut Effects) {
        if !self.book.followers.any_elsewhere() {
            return;
        }
        let read = self.swarms.values().filter(|swarm| Self::is_read(swarm, fx.now)).map(|swarm| &swarm.facts.side);
        let wanted: BTreeSet<Side> = read.chain(self.book.leftovers.values()).cloned().collect();
        for side in self.book.followers.keep_only(&wanted) {
            fx.out.push(Out::Reach(side, false));
        }
    }

    pub(super) fn warm_all(&mut self, key: SwarmKey, fx: &mut Effects) {
        let count = self.swarms.get(&key).map_or(0, |swarm| swarm.nodes.len());
        for index in 0..count {
            self.warm(key, index as u32, fx);
        }
    }

    /// Says how often the node's outbox is to be looked at: often while something is expected of it.
    pub(super) fn warm(&mut self, key: SwarmKey, index: u32, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let over = swarm.is_over();
        let ending = swarm.facts.ending.is_some() || swarm.facts.over_since != 0;
        let Some(node) = swarm.nodes.get_mut(index as usize) else { return };
        let awaited = node.facts.generation > node.facts.hello;
        let hot = !over && (ending || awaited || !node.open.is_empty());
        if hot != node.hot {
            node.hot = hot;
            let side = &swarm.facts.side;
            if self.book.followers.is_up(side) {
                fx.out.push(Out::Hot(Arc::clone(side), swarm.head.id.clone(), node.index, hot));
            }
        }
    }

    /// What nodes put off: deliveries to try again, outboxes nobody writes any more, prompts of nodes that were given up.
    pub(super) fn tick_nodes(&mut self, fx: &mut Effects) {
        let mut given_up = Vec::new();
        for (&key, swarm) in &mut self.swarms {
            let side = &swarm.facts.side;
            let follower = self.book.followers.of(side);
            let ended_long_ago = !Self::is_read(swarm, fx.now);
            for node in &mut swarm.nodes {
                for (&generation, stream) in &mut node.streams {
                    // What was asked for after a gap has not come, or with a gap again; nothing else may ever come.
                    let waited = fx.now.saturating_sub(stream.asked_again);
                    if stream.asked_again != 0 && waited >= ASK_AGAIN && !stream.closed && follower.is_up() {
                        stream.asked_again = fx.now;
                        let outbox = OutboxId {
                            swarm: swarm.head.id.clone(),
                            node: node.index,
                            generation: Generation(generation),
                        };
                        fx.out.push(Out::Follow(Arc::clone(side), outbox, stream.cursor));
                    }
                    let replaced = stream.superseded != 0
                        && follower.is_up()
                        && fx.now.saturating_sub(stream.superseded.max(follower.since)) > SUPERSEDED;
                    if !stream.closed && (replaced || ended_long_ago) {
                        stream.closed = true;
                        self.book.dirty.streams.insert((key, node.index.0, generation));
                        let outbox = OutboxId {
                            swarm: swarm.head.id.clone(),
                            node: node.index,
                            generation: Generation(generation),
                        };
                        fx.out.push(Out::Unfollow(Arc::clone(side), outbox));
                    }
                }
                let failed_for = fx.now.saturating_sub(node.facts.failed_since);
                let patience = if follower.is_up() { SETTLE } else { SETTLE_BLIND };
                if node.facts.failed_since != 0 && !node.open.is_empty() && failed_for >= patience {
                    given_up.push((key, node.index.0));
                }
            }
        }
        for (key, index) in given_up {
            self.close_node_injections(key, index, "its node was given up", ErrorCode::TurnLost, fx);
        }
        let keys: Vec<SwarmKey> = self.swarms.keys().copied().collect();
        for key in keys {
            self.pump_swarm(key, fx);
        }
    }
}
