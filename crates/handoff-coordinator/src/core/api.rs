//! What goes into the core and what comes out.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drover_types::{Epoch, RequestId, SessionId};
use serde::{Deserialize, Serialize};

use super::ids::{Call, Digest, HandoffId, NodeId, Owner, ReplyTo, Turn};
use super::message::{Message, Refusal, Rejection};
use super::policy::{Own, Peer};
use super::relief::Rooms;
use crate::session::{LogSum, Opening, Outcome, Record};

/// Why a node claims an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Cause {
    /// The session is new.
    Opened,
    /// Its owner let this node.
    Moved {
        /// By this handoff.
        handoff: HandoffId,
    },
    /// It had let another node, and did not hear of it.
    Reclaimed {
        /// In this handoff.
        handoff: HandoffId,
    },
    /// An earlier process of the same node had it.
    Recovered,
    /// Its owner is gone.
    TakenOver,
    /// It is over, and nobody need look further.
    Closed,
}

/// Who owns a session in one epoch. Made once, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    /// Which session.
    pub session: SessionId,
    /// Which epoch.
    pub epoch: Epoch,
    /// Whose it is.
    pub owner: Owner,
    /// Why.
    pub cause: Cause,
}

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// The record of that epoch is the one that was to be made, and no later epoch exists.
    Won,
    /// It is another, or there is a later epoch: the newest.
    Lost(OwnerRecord),
    /// Nobody knows: the file system did not answer.
    Unknown,
}

/// What is known of a session's ownership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
    /// No such session ever was.
    Nobody,
    /// The record of the newest epoch.
    Owned(OwnerRecord),
    /// The file system did not answer.
    Unknown,
}

/// What became of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// All records are on disk, here and on the shared file system, and **after that** the epoch was still the newest.
    Done {
        /// Bytes of all records now.
        len: u64,
        /// Their digest.
        digest: Digest,
    },
    /// There is a later epoch; whether the records count is for its owner to say.
    Fenced(OwnerRecord),
    /// A file system did not answer.
    Unknown,
}

/// What became of a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// There is room; so many bytes are there from an earlier copy.
    Room(u64),
    /// There is none.
    NoSpace,
}

/// What became of an installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// Everything that the session needs is on this node's disk.
    Done(Box<LogSum>),
    /// What is there is not what was announced.
    Differs,
    /// The disk failed.
    Failed,
}

/// Why a session is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// A person said so.
    Operator,
    /// The node has too much to do.
    Load,
    /// The node is emptied.
    Drain,
}

/// A turn as a client asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Of which session.
    pub session: SessionId,
    /// What the asker calls it; asked again under the same name it is the same turn.
    pub request: RequestId,
    /// What is asked.
    pub prompt: String,
    /// Who is to be told.
    pub reply: ReplyTo,
    /// The newest epoch that the asker has heard of; 0 for none.
    pub known: Epoch,
    /// Opens the session when there is none.
    pub open: Option<Opening>,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
}

/// What goes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A turn is asked for.
    Turn(Box<Asked>),
    /// A turn is to end before it has its answer; without a name the one that runs.
    Interrupt { session: SessionId, request: Option<RequestId>, reply: ReplyTo },
    /// A session is to end once its turns are answered.
    Close { session: SessionId, reply: ReplyTo },
    /// A session is to move; without a node to the one that suits best.
    Move { session: SessionId, to: Option<NodeId>, why: Why },
    /// A session's owner may be gone, or was an earlier process of this node: look, and take it over when that is so.
    Recover { session: SessionId },
    /// Another node says something.
    Message { from: NodeId, message: Message },
    /// Answers [`Effect::Look`].
    Looked { session: SessionId, outcome: Looked },
    /// Answers [`Effect::Claim`].
    Claimed { session: SessionId, epoch: Epoch, outcome: ClaimOutcome },
    /// Answers [`Effect::Load`]; nothing when the journals could not be read.
    Loaded { session: SessionId, epoch: Epoch, log: Option<Box<LogSum>> },
    /// Answers [`Effect::Append`].
    Appended { session: SessionId, epoch: Epoch, first: u64, outcome: Appended },
    /// Answers [`Effect::Park`].
    Parked { session: SessionId, epoch: Epoch, handoff: HandoffId },
    /// Answers [`Effect::Reserve`].
    Reserved { handoff: HandoffId, outcome: Reserved },
    /// Answers [`Effect::Write`]: so many bytes are on disk; nothing when it failed.
    Written { handoff: HandoffId, len: Option<u64> },
    /// Answers [`Effect::Install`].
    Installed { handoff: HandoffId, outcome: Installed },
    /// The agent wants a tool.
    Called { session: SessionId, epoch: Epoch, call: Call, what: String },
    /// A tool has answered.
    Returned { session: SessionId, epoch: Epoch, call: Call, result: String },
    /// The agent has ended a turn. `notes` are what it leaves behind: context, files.
    Ended { session: SessionId, epoch: Epoch, turn: Turn, outcome: Outcome, notes: Vec<Record>, at_us: u64 },
    /// The leaseholder has planned where sessions of this node may go, which has too much to do.
    Relief(Rooms),
    /// The other nodes as they are now.
    Peers(Vec<Peer>),
    /// This node as it is now.
    Own(Own),
    /// Time has passed.
    Tick,
}

/// What is said to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The turn will be answered, exactly once.
    Accepted { turn: Turn, epoch: Epoch },
    /// The turn is over; its outcome is in its records.
    Answer { turn: Turn, epoch: Epoch },
    /// Ask that node.
    Redirect(OwnerRecord),
    /// Ask again a little later.
    Retry,
    /// Asking again does not help.
    Refused(Failure),
    /// The session is over.
    Closed,
    /// The turn is about to end.
    Interrupted { turn: Turn, request: RequestId },
}

/// Why something cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No such session, and nothing to open it with.
    UnknownSession,
    /// No turn of that name, or none that runs.
    UnknownTurn,
    /// It has ended.
    SessionClosed,
    /// It has as many turns or bytes as a session may have.
    SessionFull,
    /// The prompt is too long.
    TooLong,
    /// It lives elsewhere.
    NotHere,
    /// It is moving already.
    Moving,
    /// There is no node that could take it, or the one named cannot.
    NoTarget,
    /// No node took it; the last one's reason, when it gave one.
    NobodyTook(Option<Rejection>),
    /// The target stopped answering.
    Silent,
    /// The target would not go on.
    Refused(Refusal),
    /// A turn ran for longer than a handoff may take.
    Busy,
    /// Somebody else has taken the session over meanwhile.
    Lost,
}

/// What people and programs are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A session sets out.
    Started { handoff: HandoffId, session: SessionId, to: NodeId, epoch: Epoch, why: Why },
    /// It has arrived. `frozen`: how long no turn could be taken.
    Completed {
        handoff: HandoffId,
        session: SessionId,
        to: NodeId,
        epoch: Epoch,
        bytes: u64,
        attempts: u32,
        frozen: Duration,
        total: Duration,
    },
    /// It stays where it was, or somebody else has it. `to`: the node that was tried last.
    Failed { handoff: HandoffId, session: SessionId, to: NodeId, error: Failure, attempts: u32 },
    /// A move that was asked for cannot even begin.
    NotMoved { session: SessionId, error: Failure },
    /// This node serves a session from now on.
    Serving { session: SessionId, epoch: Epoch },
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Tell a client.
    Reply { to: ReplyTo, session: SessionId, reply: Reply },
    /// Tell a node.
    Send { to: NodeId, message: Message },
    /// Send a node that part of a session's records, as [`Message::Chunk`].
    SendChunk { to: NodeId, handoff: HandoffId, session: SessionId, offset: u64, len: u64 },
    /// Read who owns a session.
    Look { session: SessionId },
    /// Make an owner's record, unless there is one of that epoch or of a later one. Safe to repeat.
    Claim { record: OwnerRecord },
    /// Read the session from the journals on the shared file system, all epochs before this one, and keep it on this node.
    Load { session: SessionId, epoch: Epoch },
    /// Keep records on this node and on the shared file system, sync both, **then** look for a later epoch. Safe to repeat: `first` is the
    /// number of the first, and what is there already is not written again.
    Append { session: SessionId, epoch: Epoch, first: u64, records: Arc<Vec<Record>> },
    /// End the agent's process, then say so.
    Park { session: SessionId, epoch: Epoch, handoff: HandoffId },
    /// See that there is room for a session; keep what is there of an earlier copy unless it is to be fresh.
    Reserve { handoff: HandoffId, session: SessionId, len: u64, fresh: bool },
    /// Keep a piece of a session's records.
    Write { handoff: HandoffId, session: SessionId, offset: u64, bytes: Bytes },
    /// Check what came, fetch what belongs to it and sync it all. When it is what was announced, this record is claimed next.
    Install { handoff: HandoffId, len: u64, digest: Digest, record: Box<OwnerRecord> },
    /// The copy is of no use any more.
    Discard { handoff: HandoffId, session: SessionId },
    /// Give a turn to the agent; `again` when it may have seen it before.
    Run { session: SessionId, epoch: Epoch, turn: Turn, again: bool },
    /// Have the agent end a turn early, when it runs one of that number.
    Interrupt { session: SessionId, epoch: Epoch, turn: Turn },
    /// Call a tool under its key; the tool refuses earlier epochs than it has seen.
    Call { session: SessionId, epoch: Epoch, call: Call },
    /// Give the agent what a tool has answered.
    Resume { session: SessionId, epoch: Epoch, call: Call },
    /// This node serves the session no longer: end its agent.
    Stop { session: SessionId, epoch: Epoch },
    /// A node keeps failing.
    Suspect { node: NodeId },
    /// Something has happened.
    Event(Event),
}
