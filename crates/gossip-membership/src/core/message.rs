//! What nodes say to each other: datagrams, and requests over a stream.

use std::sync::Arc;

use super::member::State;
use super::record::{Load, NodeKey, SignedRecord};
use super::table::BUCKETS;

/// Most rumours in one datagram; a receiver refuses more.
pub const MAX_RUMORS: usize = 64;

/// A datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Are you there?
    Ping {
        /// Comes back in the ack.
        seq: u32,
        /// XOR of the sender's view, see [`super::Engine::digest`].
        digest: u64,
        /// The sender's load.
        load: Load,
        /// News.
        rumors: Vec<Rumor>,
    },
    /// I am.
    Ack {
        /// From the ping.
        seq: u32,
        /// XOR of the sender's view.
        digest: u64,
        /// The sender's load.
        load: Load,
        /// News.
        rumors: Vec<Rumor>,
    },
    /// Please ping this node for me.
    Relay {
        /// Comes back in the answer.
        seq: u32,
        /// Who is to be pinged.
        target: NodeKey,
    },
    /// The node you asked about answered me.
    RelayAck {
        /// From the request.
        seq: u32,
        /// Who answered.
        target: NodeKey,
    },
    /// The node you asked about did not answer me, but I do answer you: the fault is not yours.
    Nack {
        /// From the request.
        seq: u32,
        /// Who did not answer.
        target: NodeKey,
    },
    /// News alone.
    Gossip {
        /// News.
        rumors: Vec<Rumor>,
    },
    /// The sender's load has changed.
    Load {
        /// The sender's load.
        load: Load,
    },
}

/// A piece of news that is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rumor {
    /// A node's claim about itself, its leave included.
    Alive {
        /// The claim.
        record: Arc<SignedRecord>,
        /// Sent without the certificate, because whoever knows the node has it.
        bare: bool,
    },
    /// Somebody could not reach a node.
    Suspect(Accusation),
    /// Somebody has given a node up.
    Dead(Accusation),
}

/// What is said against a node. Only certified members are heard, and only the accused node itself can answer it, with a
/// higher incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Accusation {
    /// Who is accused.
    pub key: NodeKey,
    /// Which boot of it.
    pub boot: u64,
    /// Which incarnation of it.
    pub incarnation: u32,
    /// Who says so.
    pub accuser: NodeKey,
    /// The host refused a connection: it is up and nobody listens. Stronger than silence.
    pub refused: bool,
}

impl Rumor {
    /// Who it is about.
    pub fn subject(&self) -> NodeKey {
        match self {
            Self::Alive { record, .. } => record.key,
            Self::Suspect(accusation) | Self::Dead(accusation) => accusation.key,
        }
    }

    /// Upper bound of the encoded size, by which datagrams are filled. The codec must not need more.
    pub fn size(&self) -> usize {
        match self {
            Self::Alive { record, bare } => Self::size_of(record, *bare),
            // Tag with the flag, key, boot, incarnation, accuser.
            Self::Suspect(_) | Self::Dead(_) => 1 + 8 + 8 + 5 + 8,
        }
    }

    /// Tag, two lengths, signature, record, certificate.
    pub(super) fn size_of(record: &SignedRecord, bare: bool) -> usize {
        1 + 2 + 2 + 64 + record.record.encoded_len() + if bare { 0 } else { record.cert.len() }
    }
}

/// A request over the stream. The asking node is known from its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Send me what differs.
    Pull(PullRequest),
    /// This is what you lack.
    Push(Vec<Entry>),
    /// Are you there? Asked when datagrams get no answer.
    Ping,
}

/// Asks for what the other node knows differently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullRequest {
    /// Who asks: this is also how a joining node introduces itself.
    pub record: Arc<SignedRecord>,
    /// XOR of its view, by bucket.
    pub buckets: Box<[u64; BUCKETS]>,
}

/// Answers a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullAnswer {
    /// Who answers.
    pub record: Arc<SignedRecord>,
    /// Which buckets differ, one bit each: in these the asker knows what the answerer lacks.
    pub differing: u64,
    /// All members of the buckets that differ.
    pub entries: Vec<Entry>,
}

/// One member, as the sender sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Newest record.
    pub record: Arc<SignedRecord>,
    /// What the sender believes of it.
    pub state: State,
    /// For how long it has been in that state, in milliseconds: old verdicts count less than fresh ones.
    pub age_ms: u32,
    /// Last load heard.
    pub load: Load,
}

/// Answer to a request over the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Pull`].
    Pulled(PullAnswer),
    /// To [`Request::Push`].
    Pushed,
    /// To [`Request::Ping`].
    Pong,
}
