//! What the core keeps in mind. Structs named `…Facts` are stored as they are; the rest is rebuilt from other rows.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure, InjectionId, InjectionState, NodeIndex, SwarmId, SwarmStatus};
use serde::{Deserialize, Serialize};

use super::effects::{InboxBody, Micros};
use super::members::{Glance, MemberFacts, MembersView};
use super::ring::{NoteWord, Ring, RingSaid};

/// Which follower reaches the files of a swarm: empty is the one beside the router, else it is a name in the address book. A
/// cluster that is reached over SSH has one of its own.
pub(crate) type Side = Arc<str>;

/// Key of a swarm in the database; grows with its age.
pub(crate) type SwarmKey = i64;

/// Knobs of the core, in microseconds where they are times.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) default_agent: String,
    pub(crate) soft_timeout: Micros,
    pub(crate) hard_timeout: Micros,
    pub(crate) graceful: Micros,
    pub(crate) keep_ended: Micros,
}

/// How far an outbox has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) seq: u64,
}

impl Default for Cursor {
    fn default() -> Self {
        Self { segment: 1, offset: 0, seq: 0 }
    }
}

impl Cursor {
    pub(crate) fn place(&self) -> (u32, u64) {
        (self.segment, self.offset)
    }
}

/// What was asked for, once; many injections may share it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) key: i64,
    pub(crate) id: Arc<str>,
    pub(crate) launch: bool,
    pub(crate) swarm: SwarmKey,
    pub(crate) content: Arc<str>,
    pub(crate) steer: bool,
    pub(crate) trace: String,
    pub(crate) created: Micros,
}

/// One prompt on its way to one node.
#[derive(Debug, Clone)]
pub(crate) struct Injection {
    pub(crate) swarm: SwarmKey,
    pub(crate) node: NodeIndex,
    pub(crate) request: Arc<Request>,
    pub(crate) state: InjectionState,
    /// Its place in the node's inbox.
    pub(crate) inbox_seq: u64,
    /// The latest generation that said anything of it; 0 before the first word.
    pub(crate) spoken: u32,
    pub(crate) ack_seq: u64,
    pub(crate) delivered_seq: u64,
    pub(crate) end_seq: u64,
    pub(crate) error: String,
    pub(crate) assistant_seen: bool,
    pub(crate) last_usage: Option<u64>,
    pub(crate) created: Micros,
    /// When it came into the state it is in.
    pub(crate) since: Micros,
    /// It has no row yet.
    pub(crate) fresh: bool,
}

/// A failure in a form that can be stored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Trouble {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) hint: String,
}

impl From<&Failure> for Trouble {
    fn from(failure: &Failure) -> Self {
        Self { code: failure.code.as_str().to_owned(), message: failure.message.clone(), hint: failure.hint.clone() }
    }
}

impl Trouble {
    pub(crate) fn failure(&self) -> Failure {
        let code = ErrorCode::from_name(&self.code).unwrap_or(ErrorCode::LaunchFailed);
        Failure { code, message: self.message.clone(), hint: self.hint.clone() }
    }
}

/// How far a termination has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EndStage {
    /// Turns may end.
    Waiting,
    /// The allocation is being released.
    Releasing,
}

/// A termination under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ending {
    pub(crate) since: Micros,
    pub(crate) stage: EndStage,
    pub(crate) force: bool,
    /// When it came into its stage.
    pub(crate) stage_since: Micros,
    /// Every request that waits for the end.
    pub(crate) requests: Vec<String>,
}

/// A swarm's row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SwarmFacts {
    pub(crate) status: SwarmStatus,
    pub(crate) reason: String,
    pub(crate) request_id: String,
    pub(crate) trace: String,
    pub(crate) backend_state: String,
    pub(crate) provider: String,
    pub(crate) provider_id: String,
    pub(crate) agent: String,
    /// The follower of its files, as the allocator names it.
    #[serde(default)]
    pub(crate) side: Side,
    pub(crate) created: Micros,
    pub(crate) ended: Micros,
    /// swarm_launched has been said.
    pub(crate) launched: bool,
    /// The sequence number of that, or of the word that it failed.
    pub(crate) launch_seq: u64,
    /// When the allocation was first seen to run; 0 before.
    pub(crate) running_since: Micros,
    /// When the allocator last said that it has the allocation; 0 when it has not.
    pub(crate) ensured_at: Micros,
    /// When the allocation was seen to be over; 0 before.
    pub(crate) over_since: Micros,
    /// Why the allocation is over.
    pub(crate) over_reason: String,
    /// A release that the allocator has not taken yet, and whether it is a forced one.
    pub(crate) owes_release: Option<bool>,
    pub(crate) ending: Option<Ending>,
    /// Why the launch failed.
    pub(crate) trouble: Option<Trouble>,
}

/// Something to be done again until it works.
#[derive(Debug, Clone, Default)]
pub(crate) struct Retry {
    pub(crate) under_way: bool,
    pub(crate) next_at: Micros,
    pub(crate) attempts: u32,
    pub(crate) error: String,
}

impl Retry {
    pub(crate) fn due(&self, now: Micros) -> bool {
        !self.under_way && now >= self.next_at
    }

    /// Doubles the pause, up to `most`.
    pub(crate) fn failed(&mut self, now: Micros, first: Micros, most: Micros, error: &str) {
        self.under_way = false;
        self.next_at = now + (first << self.attempts.min(12)).min(most);
        self.attempts += 1;
        error.clone_into(&mut self.error);
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// What names a swarm; apart, so that it can be read while its nodes change.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) key: SwarmKey,
    pub(crate) id: SwarmId,
    /// The backend's name of the allocation; empty before there is one.
    pub(crate) job: Arc<str>,
}

/// A swarm.
#[derive(Debug)]
pub(crate) struct Swarm {
    pub(crate) head: Head,
    pub(crate) spec: Arc<LaunchSpec>,
    pub(crate) request: Arc<Request>,
    pub(crate) facts: SwarmFacts,
    pub(crate) nodes: Vec<Node>,
    pub(crate) ensure: Retry,
    pub(crate) release: Retry,
    /// It has no row yet.
    pub(crate) fresh: bool,
}

impl Swarm {
    pub(crate) fn is_over(&self) -> bool {
        self.facts.status.is_over()
    }

    pub(crate) fn open_turns(&self) -> usize {
        self.nodes.iter().map(|node| node.open.len()).sum()
    }
}

/// A node's row.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct NodeFacts {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// The allocator's words: state, generation, restarts and why.
    pub(crate) state: i32,
    pub(crate) generation: u32,
    pub(crate) restarts: u32,
    pub(crate) reason: String,
    /// The latest generation that said hello.
    pub(crate) hello: u32,
    /// The latest generation that said goodbye.
    pub(crate) bye: u32,
    /// The latest generation that gave up, and why.
    pub(crate) gave_up: u32,
    pub(crate) trouble: Option<Trouble>,
    /// The last number given to an inbox record.
    pub(crate) inbox_seq: u64,
    /// When the allocator gave the node up; 0 while it lives.
    pub(crate) failed_since: Micros,
    /// The revision of the key ring that it was sent last, or was launched with.
    #[serde(default)]
    pub(crate) ring_sent: u64,
    /// Which keys it said that it has.
    #[serde(default)]
    pub(crate) ring_said: Option<RingSaid>,
    /// What is wrong with its membership daemon.
    #[serde(default)]
    pub(crate) notes: Vec<NoteWord>,
}

/// A node of a swarm.
#[derive(Debug, Default)]
pub(crate) struct Node {
    pub(crate) index: NodeIndex,
    pub(crate) facts: NodeFacts,
    pub(crate) streams: BTreeMap<u32, Stream>,
    /// Inbox records that are not known to be on disk, in order.
    pub(crate) queue: VecDeque<Pending>,
    /// How many of the front of the queue are on their way.
    pub(crate) in_flight: usize,
    pub(crate) delivery: Retry,
    /// Injections that have not ended, by inbox sequence number.
    pub(crate) open: BTreeMap<u64, InjectionId>,
    pub(crate) running: Option<InjectionId>,
    pub(crate) hot: bool,
    /// It as a member of the gossip.
    pub(crate) member: Option<Glance>,
}

/// One outbox being read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stream {
    pub(crate) cursor: Cursor,
    /// Nothing more is expected of it; it is followed no longer.
    pub(crate) closed: bool,
    /// When a later generation said hello; 0 before.
    pub(crate) superseded: Micros,
    /// When it was last asked for again after a gap; 0 when it never was.
    pub(crate) asked_again: Micros,
}

/// An inbox record that is not known to be on disk.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(crate) seq: u64,
    pub(crate) injection: Option<InjectionId>,
    pub(crate) body: InboxBody,
    /// It may be in the file all the same, so it must never be called failed.
    pub(crate) maybe_written: bool,
    /// When it was first refused for certain; 0 while it was not.
    pub(crate) refused_since: Micros,
}

/// A command or file change that waits, or waited, for a person's word.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Approval {
    /// Its name here, among all approvals.
    pub(crate) id: String,
    /// What its worker calls it; empty when it gave no name.
    #[serde(default)]
    pub(crate) asked_as: String,
    pub(crate) swarm: SwarmKey,
    pub(crate) node: u32,
    pub(crate) generation: u32,
    pub(crate) injection: Option<InjectionId>,
    pub(crate) call_id: String,
    pub(crate) status: ApprovalStatus,
    pub(crate) created: Micros,
    pub(crate) updated: Micros,
    /// Fields of the event that raised it, as JSON.
    pub(crate) data: String,
    /// The decision as JSON, once there is one.
    pub(crate) decision: String,
}

impl Approval {
    /// The name that its worker knows it by.
    pub(crate) fn asked_as(&self) -> &str {
        if self.asked_as.is_empty() { &self.id } else { &self.asked_as }
    }

    /// Whether this node means this question by this name.
    pub(crate) fn asks(&self, swarm: SwarmKey, node: u32, name: &str) -> bool {
        self.swarm == swarm && self.node == node && (self.asked_as() == name || self.id == name)
    }
}

/// Where an approval is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ApprovalStatus {
    Pending,
    ApprovedPendingAck,
    DeniedPendingAck,
    Resolved,
}

impl ApprovalStatus {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::ApprovedPendingAck => "approved_pending_ack",
            Self::DeniedPendingAck => "denied_pending_ack",
            Self::Resolved => "resolved",
        }
    }
}

/// Whether another daemon answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    /// Empty while it answers.
    pub(crate) error: String,
    /// When it came into this state.
    pub(crate) since: Micros,
}

impl Link {
    pub(crate) fn not_yet() -> Self {
        Self { error: "not reached yet".to_owned(), since: 0 }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.error.is_empty()
    }

    /// Whether that is news.
    pub(crate) fn set(&mut self, now: Micros, error: &str) -> bool {
        let news = self.error != error;
        if self.error.is_empty() != error.is_empty() || self.since == 0 {
            self.since = now;
        }
        error.clone_into(&mut self.error);
        news
    }
}

/// The followers, each with its own side of the files.
#[derive(Debug, Clone)]
pub(crate) struct Followers {
    /// The one beside the router.
    beside: Link,
    /// Those of clusters that have swarms whose files are read.
    elsewhere: BTreeMap<Side, Link>,
}

impl Followers {
    pub(crate) fn not_yet() -> Self {
        Self { beside: Link::not_yet(), elsewhere: BTreeMap::new() }
    }

    /// The one of a side. One that is not kept yet has not been reached yet.
    pub(crate) fn of(&self, side: &Side) -> Link {
        if side.is_empty() {
            return self.beside.clone();
        }
        self.elsewhere.get(side).cloned().unwrap_or_else(Link::not_yet)
    }

    pub(crate) fn is_up(&self, side: &Side) -> bool {
        if side.is_empty() { self.beside.is_up() } else { self.elsewhere.get(side).is_some_and(Link::is_up) }
    }

    /// Takes note of how it stands with one; whether that is news. Of one that nobody wants any more nothing is noted.
    pub(crate) fn set(&mut self, side: &Side, now: Micros, error: &str) -> bool {
        let link = if side.is_empty() { Some(&mut self.beside) } else { self.elsewhere.get_mut(side) };
        link.is_some_and(|link| link.set(now, error))
    }

    /// Begins to keep one; false when it is kept already.
    pub(crate) fn want(&mut self, side: &Side) -> bool {
        if side.is_empty() || self.elsewhere.contains_key(side) {
            return false;
        }
        self.elsewhere.insert(Arc::clone(side), Link::not_yet());
        true
    }

    /// Lets go of those that are not among these, and names them.
    pub(crate) fn keep_only(&mut self, wanted: &BTreeSet<Side>) -> Vec<Side> {
        let gone: Vec<Side> = self.elsewhere.keys().filter(|side| !wanted.contains(*side)).cloned().collect();
        self.elsewhere.retain(|side, _| wanted.contains(side));
        gone
    }

    /// Whether there are any beside the one that is always kept.
    pub(crate) fn any_elsewhere(&self) -> bool {
        !self.elsewhere.is_empty()
    }
}

/// What has to be written with the next commit, and shown after it.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    pub(crate) swarms: BTreeSet<SwarmKey>,
    pub(crate) nodes: BTreeSet<(SwarmKey, u32)>,
    pub(crate) streams: BTreeSet<(SwarmKey, u32, u32)>,
    pub(crate) requests: Vec<Arc<Request>>,
    pub(crate) injections: BTreeSet<InjectionId>,
    /// Inbox records other than prompts, which have no other row.
    pub(crate) controls: Vec<(SwarmKey, u32, u64)>,
    pub(crate) controls_done: Vec<(SwarmKey, u32, u64)>,
    pub(crate) approvals: BTreeSet<String>,
    pub(crate) approvals_gone: Vec<String>,
    pub(crate) swarms_gone: Vec<SwarmKey>,
    pub(crate) leftovers: Vec<(SwarmId, Side)>,
    pub(crate) leftovers_gone: Vec<SwarmId>,
    /// Members whose row is to be written, or removed when they are no longer there.
    pub(crate) members: BTreeSet<String>,
    /// Who reported last, and when.
    pub(crate) members_view: bool,
    /// Which keys nodes have is to be shown anew.
    pub(crate) rings_view: bool,
    /// The picture of the members has to be made anew.
    pub(crate) all_members: bool,
    /// Swarms whose picture for readers is out of date.
    pub(crate) views: BTreeSet<SwarmKey>,
    pub(crate) approvals_view: bool,
    pub(crate) links_view: bool,
}

impl Dirty {
    /// Whether there is anything to write.
    pub(crate) fn is_clean(&self) -> bool {
        self.swarms.is_empty()
            && self.nodes.is_empty()
            && self.streams.is_empty()
            && self.requests.is_empty()
            && self.injections.is_empty()
            && self.controls.is_empty()
            && self.controls_done.is_empty()
            && self.approvals.is_empty()
            && self.approvals_gone.is_empty()
            && self.swarms_gone.is_empty()
            && self.leftovers.is_empty()
            && self.leftovers_gone.is_empty()
            && self.members.is_empty()
            && !self.members_view
    }
}

/// The core's memory beside the swarms themselves.
#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) settings: Settings,
    /// The last number given to an event.
    pub(crate) seq: u64,
    pub(crate) next_key: i64,
    /// Injections that have not ended, and those that ended in this batch.
    pub(crate) injections: HashMap<InjectionId, Injection>,
    /// Ended in this batch; forgotten with its commit.
    pub(crate) ended: Vec<InjectionId>,
    /// Taken in this batch: the store cannot know them yet.
    pub(crate) requests: HashMap<Arc<str>, (Arc<Request>, Vec<InjectionId>)>,
    pub(crate) approvals: BTreeMap<String, Approval>,
    pub(crate) approvals_version: u64,
    /// Swarms that are forgotten but for their mailbox.
    pub(crate) leftovers: BTreeMap<SwarmId, Side>,
    /// The members of the gossip by their id there.
    pub(crate) members: BTreeMap<String, MemberFacts>,
    pub(crate) members_view: MembersView,
    /// The ring of gossip keys; `None` until it was read.
    pub(crate) ring: Option<Ring>,
    pub(crate) dirty: Dirty,
    pub(crate) allocator: Link,
    pub(crate) followers: Followers,
}

/// A swarm as readers see it.
#[derive(Debug, Clone)]
pub(crate) struct SwarmView {
    /// The whole swarm, its prompt cut.
    pub(crate) swarm: pb::Swarm,
    /// The whole prompt.
    pub(crate) prompt: Arc<str>,
    /// Which follower reaches its files.
    pub(crate) side: Side,
}
