//! The core's memory from what is on disk, and what has to be taken up again with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drover_types::{InjectionId, InjectionState, SwarmId};

use super::Core;
use super::effects::{Effects, InboxBody, Micros, Out};
use super::members::{MemberFacts, MembersView};
use super::model::{
    Approval, Followers, Injection, Link, Node, NodeFacts, Pending, Retry, Settings, Side, Stream, Swarm, SwarmKey,
};

/// What the store read.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    /// The last number ever given to an event.
    pub(crate) seq: u64,
    /// The last key given to a row.
    pub(crate) next_key: i64,
    /// Swarms without their nodes.
    pub(crate) swarms: Vec<Swarm>,
    pub(crate) nodes: Vec<(SwarmKey, u32, NodeFacts)>,
    pub(crate) streams: Vec<(SwarmKey, u32, u32, Stream)>,
    /// Injections that have not ended.
    pub(crate) injections: Vec<(InjectionId, Injection)>,
    /// Inbox records other than prompts.
    pub(crate) controls: Vec<(SwarmKey, u32, StoredControl)>,
    pub(crate) approvals: Vec<Approval>,
    /// Swarms that are forgotten but for their mailbox.
    pub(crate) leftovers: Vec<(SwarmId, Side)>,
    pub(crate) members: Vec<MemberFacts>,
    pub(crate) members_view: MembersView,
}

/// An inbox record other than a prompt that is not known to be on disk.
#[derive(Debug)]
pub(crate) struct StoredControl {
    pub(crate) seq: u64,
    pub(crate) injection: Option<InjectionId>,
    pub(crate) kind: &'static str,
    pub(crate) data: Arc<str>,
}

impl Core {
    /// Builds the memory again. Nothing is known of other daemons until they are heard of.
    pub(crate) fn restore(settings: Settings, restored: Restored) -> Self {
        let mut core = Self::new(settings, restored.seq, restored.next_key);
        for swarm in restored.swarms {
            core.by_id.insert(swarm.head.id.clone(), swarm.head.key);
            core.swarms.insert(swarm.head.key, swarm);
        }
        for (key, index, facts) in restored.nodes {
            if let Some(node) = core.node_mut(key, index) {
                node.facts = facts;
            }
        }
        for (key, index, generation, stream) in restored.streams {
            if let Some(node) = core.node_mut(key, index) {
                node.streams.insert(generation, stream);
            }
        }
        let mut queues = BTreeMap::<(SwarmKey, u32), Vec<Pending>>::new();
        for (id, injection) in restored.injections {
            let (key, index, seq) = (injection.swarm, injection.node.0, injection.inbox_seq);
            let Some(node) = core.node_mut(key, index) else { continue };
            node.open.insert(seq, id.clone());
            if injection.state == InjectionState::Started && injection.spoken >= node.facts.generation {
                node.running = Some(id.clone());
            }
            if injection.state == InjectionState::Accepted {
                let body = InboxBody::Inject(Arc::clone(&injection.request));
                queues.entry((key, index)).or_default().push(undelivered(seq, Some(id.clone()), body));
            }
            core.book.injections.insert(id, injection);
        }
        for (key, index, control) in restored.controls {
            let body = InboxBody::Control { kind: control.kind, data: control.data };
            queues.entry((key, index)).or_default().push(undelivered(control.seq, control.injection, body));
        }
        for ((key, index), mut queue) in queues {
            queue.sort_by_key(|pending| pending.seq);
            if let Some(node) = core.node_mut(key, index) {
                node.queue = queue.into();
            }
        }
        for approval in restored.approvals {
            core.book.approvals.insert(approval.id.clone(), approval);
        }
        core.book.leftovers.extend(restored.leftovers);
        for facts in restored.members {
            core.show_member(&facts);
            core.book.members.insert(facts.word.node_id.clone(), facts);
        }
        core.book.members_view = restored.members_view;
        core.book.dirty.all_members = true;
        core.book.dirty.rings_view = true;
        core.book.dirty.views.extend(core.swarms.keys().copied());
        core.book.dirty.approvals_view = true;
        core.book.dirty.links_view = true;
        core
    }

    fn node_mut(&mut self, key: SwarmKey, index: u32) -> Option<&mut Node> {
        self.swarms.get_mut(&key)?.nodes.get_mut(index as usize)
    }

    /// Takes over what is known of the other daemons, when only the memory was lost and not the process.
    pub(crate) fn keep_links(&mut self, allocator: Link, followers: Followers) {
        self.book.allocator = allocator;
        self.book.followers = followers;
    }

    /// Goes on with everything that was under way. Deliveries and outboxes follow when the follower is heard of.
    pub(crate) fn resume(&mut self, now: Micros, fx: &mut Effects) {
        fx.now = fx.now.max(now);
        let keys: Vec<SwarmKey> = self.swarms.keys().copied().collect();
        for key in keys {
            let Some(swarm) = self.swarms.get_mut(&key) else { continue };
            swarm.ensure = Retry::default();
            swarm.release = Retry::default();
            if swarm.facts.status == drover_types::SwarmStatus::Launching && swarm.facts.over_since == 0 {
                self.ensure_allocation(key, fx);
            } else {
                self.release_owed(key, fx);
            }
        }
        let read = self.swarms.values().filter(|swarm| Self::is_read(swarm, fx.now)).map(|swarm| &swarm.facts.side);
        let sides: BTreeSet<Side> = read.chain(self.book.leftovers.values()).cloned().collect();
        for side in sides.iter().filter(|side| !side.is_empty()) {
            // Said also of one that was wanted before: the word for it may have been lost with a commit.
            self.book.followers.want(side);
            fx.out.push(Out::Reach(Arc::clone(side), true));
        }
        for (swarm, side) in &self.book.leftovers {
            fx.out.push(Out::RemoveMailbox(Arc::clone(side), swarm.clone()));
        }
        let beside = Side::default();
        for side in sides.iter().chain([&beside]) {
            if self.book.followers.is_up(side) {
                self.follower_up(side, fx);
            }
        }
    }
}

/// It may have been on its way when we stopped.
fn undelivered(seq: u64, injection: Option<InjectionId>, body: InboxBody) -> Pending {
    Pending { seq, injection, body, maybe_written: true, refused_since: 0 }
}
