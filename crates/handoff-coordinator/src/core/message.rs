//! What nodes say to each other about a handoff. Every message may be lost, repeated, late and out of order.

use std::collections::BTreeSet;

use bytes::Bytes;
use drover_types::{Epoch, RequestId, SessionId};

use super::ids::{Digest, HandoffId};

/// What a session asks of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needs {
    /// Capabilities, such as the agent and its tools; the node must have every one.
    pub capabilities: BTreeSet<String>,
}

/// A turn that was not accepted where it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its name.
    pub request: RequestId,
    /// What is asked.
    pub prompt: String,
}

/// Why a node does not take a session. Another node may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rejection {
    /// It has enough to do itself.
    Overloaded,
    /// It has as many sessions as it may.
    Full,
    /// It lacks a capability.
    NoCapability,
    /// It leaves.
    Leaving,
    /// It owns the session already, or is taking it.
    Duplicate,
    /// There is no room on its disk.
    NoSpace,
    /// The session is larger than it takes.
    TooLarge,
}

impl Rejection {
    /// The one spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overloaded => "overloaded",
            Self::Full => "full",
            Self::NoCapability => "no_capability",
            Self::Leaving => "leaving",
            Self::Duplicate => "duplicate",
            Self::NoSpace => "no_space",
            Self::TooLarge => "too_large",
        }
    }
}

/// Why a node that had accepted will not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// It knows no such handoff: it was started anew, or had waited too long.
    Unknown,
    /// What it has is not what the source says it sent.
    Digest,
    /// Its disk failed.
    Disk,
    /// Somebody else had claimed before.
    Lost,
}

/// One message. The sender is known by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Source: would you take this session?
    Request {
        handoff: HandoffId,
        session: SessionId,
        /// The source's epoch.
        epoch: Epoch,
        /// Counts the source's attempts with this session, so that a late request is known as such.
        attempt: u32,
        /// Bytes of its records now.
        len: u64,
        needs: Needs,
        /// Do not go on from an earlier copy: it was not the same.
        fresh: bool,
    },
    /// Target: yes, and I have so many bytes of it already. Also answers a repeated request; `taken` are those with what waits for its disk,
    /// unset by programs that did not say so.
    Accept { handoff: HandoffId, have: u64, taken: Option<u64> },
    /// Target: no.
    Reject { handoff: HandoffId, why: Rejection },
    /// Source: records, from an offset.
    Chunk { handoff: HandoffId, offset: u64, bytes: Bytes },
    /// Target: so much is on my disk. `again` when something was missing or damaged: send from there.
    Received { handoff: HandoffId, len: u64, again: bool },
    /// Source: this is all of it, and I serve no longer. You may claim the next epoch.
    Offer { handoff: HandoffId, epoch: Epoch, len: u64, digest: Digest },
    /// Target: I have claimed; the session is mine.
    Committed { handoff: HandoffId, epoch: Epoch },
    /// Target: I will not go on.
    Refused { handoff: HandoffId, why: Refusal },
    /// Source: forget it.
    Abort { handoff: HandoffId },
    /// Source: these turns came to me while I did not serve, in this order.
    Flush { handoff: HandoffId, session: SessionId, turns: Vec<Held> },
}

impl Message {
    /// The handoff that it is about.
    pub fn handoff(&self) -> HandoffId {
        match self {
            Self::Request { handoff, .. }
            | Self::Accept { handoff, .. }
            | Self::Reject { handoff, .. }
            | Self::Chunk { handoff, .. }
            | Self::Received { handoff, .. }
            | Self::Offer { handoff, .. }
            | Self::Committed { handoff, .. }
            | Self::Refused { handoff, .. }
            | Self::Abort { handoff }
            | Self::Flush { handoff, .. } => *handoff,
        }
    }
}
