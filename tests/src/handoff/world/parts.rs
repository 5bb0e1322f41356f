//! What the world is made of: nodes, what lies on their disks, and what is about to happen.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use drover_handoff::core::{Call, Engine, Input, Message, NodeId, OwnerRecord, Reply, Turn};
use drover_handoff::session::{LogSum, Outcome, Record};
use drover_types::{Epoch, RequestId, SessionId};

use super::super::shared::Whole;

/// Something asked of the shared file system.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Look(SessionId),
    Claim(OwnerRecord),
    Load(SessionId, Epoch),
    /// The write of an append, then the look.
    Append {
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: Arc<Vec<Record>>,
        offset: usize,
        looked: bool,
        unknown: bool,
    },
    /// Everything so far under one name, and then earlier journals are removed.
    Checkpoint {
        session: SessionId,
        epoch: Epoch,
        log: Arc<Vec<u8>>,
        written: bool,
    },
    Tool {
        session: SessionId,
        epoch: Epoch,
        call: Call,
    },
}

#[derive(Debug)]
pub(super) enum Happening {
    Input {
        node: usize,
        start: u32,
        input: Input,
    },
    Said {
        from: usize,
        to: usize,
        message: Message,
    },
    Asked {
        client: usize,
        request: RequestId,
        node: usize,
    },
    Heard {
        client: usize,
        request: RequestId,
        reply: Reply,
    },
    Again {
        client: usize,
        request: RequestId,
        try_number: u64,
    },
    Next {
        client: usize,
    },
    Op {
        node: usize,
        start: u32,
        op: Op,
    },
    /// The outcome of an append comes back.
    Kept {
        node: usize,
        start: u32,
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: Arc<Vec<Record>>,
        outcome: Option<OwnerRecord>,
        unknown: bool,
    },
    Agent {
        node: usize,
        start: u32,
        session: SessionId,
        life: u64,
    },
    Timer {
        node: usize,
        start: u32,
    },
    Wake {
        node: usize,
        start: u32,
    },
    Start {
        node: usize,
    },
    Joined {
        a: usize,
        b: usize,
    },
    Reached {
        node: usize,
    },
    Believed {
        node: usize,
    },
}

pub(super) struct Scheduled {
    pub(super) at: Duration,
    pub(super) order: u64,
    pub(super) what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What a node's disk has of a session.
#[derive(Debug, Clone, Default)]
pub(super) struct Local {
    pub(super) bytes: Vec<u8>,
    pub(super) sum: LogSum,
    pub(super) prompts: BTreeMap<Turn, String>,
    pub(super) outcomes: BTreeMap<Turn, Outcome>,
    pub(super) results: BTreeMap<Call, String>,
    /// Bytes of this epoch's journal that are known to be written.
    pub(super) journal: (Epoch, usize),
}

impl Local {
    pub(super) fn of(sum: LogSum, bytes: Vec<u8>, records: &[Record]) -> Self {
        let mut local = Self { bytes, sum, ..Self::default() };
        local.read(records);
        local
    }

    pub(super) fn read(&mut self, records: &[Record]) {
        for record in records {
            match record {
                Record::Accepted { turn, prompt, .. } => {
                    self.prompts.insert(*turn, prompt.clone());
                }
                Record::Ended { turn, outcome, .. } => {
                    self.outcomes.insert(*turn, outcome.clone());
                }
                Record::Returned { call, result } => {
                    self.results.insert(*call, result.clone());
                }
                _ => {}
            }
        }
    }
}

/// The process of an agent.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) life: u64,
    pub(super) epoch: Epoch,
    pub(super) turn: Turn,
    pub(super) step: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Process {
    Running,
    Stopped,
    Killed,
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) engine: Engine,
    pub(super) process: Process,
    pub(super) start: u32,
    pub(super) timer: Duration,
    pub(super) waiting: VecDeque<Happening>,
    pub(super) local: BTreeMap<SessionId, Local>,
    pub(super) copies: BTreeMap<SessionId, Vec<u8>>,
    /// Copies that were found whole, until the claim is decided.
    pub(super) whole: BTreeMap<SessionId, Local>,
    pub(super) agents: BTreeMap<SessionId, Agent>,
    /// What somebody who reads before it claims would have found.
    pub(super) early: BTreeMap<SessionId, Result<Whole, String>>,
    pub(super) believed_gone: bool,
    pub(super) killed_at: Duration,
    pub(super) load: f64,
}
