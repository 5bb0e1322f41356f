//! What a node does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::message::{Message, Reply, Request};
use super::record::{Load, NodeKey, RecordError, SignedRecord, Untrusted};

/// Something for the shell to do.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Send a datagram to a node whose record has been told by [`Effect::Learn`].
    Send {
        /// To whom.
        to: NodeKey,
        /// What.
        message: Message,
    },
    /// Exchange a hello with whoever is at that address; a success is [`super::Input::Contact`]. It may get lost: the core
    /// repeats it.
    Hello {
        /// Where.
        addr: SocketAddr,
    },
    /// Ask a node over the stream; ends with [`super::Input::StreamEnded`].
    Stream {
        /// Comes back with the outcome.
        id: u32,
        /// Whom to ask.
        to: NodeKey,
        /// What.
        request: Request,
    },
    /// Answer a request over the stream.
    Reply {
        /// From [`super::Input::StreamAsked`].
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// A node's newest record: needed to reach it, and to open what it sends.
    Learn(Arc<SignedRecord>),
    /// A node is forgotten for good: nothing will be sent to it, and nothing is expected from it.
    Forget(NodeKey),
    /// This node's own record has changed; hellos carry the new one.
    Local(Arc<SignedRecord>),
    /// Something for whoever watches the members.
    Event(Event),
    /// The snapshot is worth writing: see [`super::Engine::snapshot`].
    Persist,
    /// The good-bye has been said often enough; the process may end.
    LeaveDone,
    /// Something for log and metrics.
    Note(Note),
}

/// A change of the membership, in the order in which this node came to believe it.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is a member now. After a restart of a node first [`Event::Left`] of the old boot, then this.
    Joined(Arc<SignedRecord>),
    /// A node is no member any more.
    Left {
        /// Who: its last record.
        record: Arc<SignedRecord>,
        /// Why.
        cause: Cause,
    },
    /// A node does not answer.
    Suspect(Arc<SignedRecord>),
    /// A suspect node has answered.
    Alive(Arc<SignedRecord>),
    /// A node has other capabilities, labels or addresses.
    Updated(Arc<SignedRecord>),
    /// A node's load, first-hand.
    Load {
        /// Whose.
        key: NodeKey,
        /// The load.
        load: Load,
    },
}

/// Why a node is no member any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It did not answer.
    Dead,
    /// It said good-bye.
    Left,
    /// It has been started again.
    Restarted,
    /// Its certificate is not believed any more.
    Distrusted,
}

/// Something that a person or a counter may want to know.
#[derive(Debug, Clone)]
pub enum Note {
    /// No answer from a seed.
    SeedSilent {
        /// Where.
        addr: SocketAddr,
        /// How often it was tried since its last answer.
        attempts: u32,
    },
    /// This node did not run for a while.
    OwnPause(Duration),
    /// Somebody suspected this node, and it has answered.
    Refuted {
        /// The incarnation that answers.
        incarnation: u32,
        /// Who said so.
        accuser: NodeKey,
    },
    /// Another process runs under this node's name, or did under a clock that was ahead.
    Rival {
        /// Where it takes datagrams.
        addr: SocketAddr,
    },
    /// A record that is not believed.
    Untrusted {
        /// About whom.
        key: NodeKey,
        /// Why.
        reason: Untrusted,
    },
    /// An accusation by somebody who is no member.
    StrangerAccused {
        /// Who spoke.
        accuser: NodeKey,
    },
    /// An update of this node's own metadata was not made.
    UpdateRefused(RecordError),
    /// A pull has been made.
    Exchanged {
        /// With whom.
        with: NodeKey,
        /// How many entries were news.
        news: usize,
    },
    /// A probe ended without an answer by datagram.
    ProbeFailed {
        /// Who was probed.
        target: NodeKey,
        /// The host refused the connection.
        refused: bool,
    },
    /// How unwell this node believes itself to be, from 0 to 8.
    Health(u8),
}
