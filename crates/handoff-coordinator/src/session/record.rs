//! The records of a session.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::{AgentKind, Epoch, RequestId};
use serde::{Deserialize, Serialize};

use crate::core::{Call, Owner, Turn};

/// What a session is opened with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    /// Which agent talks in it.
    pub agent: AgentKind,
    /// A turn that was cut off by a crash may be run again, because all that it does outside is behind calls with idempotency keys.
    /// When not, it is ended as lost and never run a second time.
    pub replayable: bool,
    /// What a node must have for it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub capabilities: BTreeSet<String>,
    /// Who opened it and whatever else is to be known of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
}

/// Why a turn has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TurnFault {
    /// The process that ran it ended, and it may not be run twice.
    TurnLost,
    /// The agent failed.
    AgentFailed,
    /// Somebody broke it off.
    Interrupted,
}

/// How a turn ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With an answer.
    Answer(String),
    /// Without one.
    Failed {
        /// Why.
        fault: TurnFault,
        /// In words.
        message: String,
    },
}

/// One record. A session is its records in their order, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Record {
    /// An owner begins; the first record of every epoch.
    Epoch {
        /// Its number.
        epoch: Epoch,
        /// Whose it is.
        owner: Owner,
        /// The epoch whose records come before this one; unset when there are none, and by programs that did not say so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        follows: Option<Epoch>,
    },
    /// The session begins.
    Opened {
        /// What with.
        opening: Opening,
    },
    /// A turn will be answered exactly once from here on.
    Accepted {
        /// Its place.
        turn: Turn,
        /// What its asker calls it.
        request: RequestId,
        /// What is asked.
        prompt: String,
        /// When, in microseconds of Unix time.
        at_us: u64,
    },
    /// The agent is about to see it.
    Begun {
        /// Which.
        turn: Turn,
    },
    /// A tool is about to be called.
    Called {
        /// Its key.
        call: Call,
        /// The tool and what it is given.
        what: String,
    },
    /// A tool has answered.
    Returned {
        /// Its key.
        call: Call,
        /// What came of it.
        result: String,
    },
    /// A turn is over.
    Ended {
        /// Which.
        turn: Turn,
        /// How.
        outcome: Outcome,
        /// When, in microseconds of Unix time.
        at_us: u64,
    },
    /// Something that the turns share has changed.
    Context {
        /// Its name.
        key: String,
        /// Its value as JSON; nothing: it is gone.
        value: Option<serde_json::Value>,
    },
    /// The working directory as it was after the last turn.
    Files {
        /// Name of the manifest in the store of pieces.
        manifest: String,
    },
    /// The session is over.
    Closed,
}
