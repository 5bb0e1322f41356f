//! What is kept of one member. Ten thousand nodes of ten thousand members each are simulated: it has to be small.

use std::sync::Arc;

use super::record::{Load, NodeKey, SignedRecord};
use super::suspicion::Suspicion;
use super::time::Time;

/// What this node believes of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Answers, or nobody has said otherwise.
    Alive = 0,
    /// Somebody could not reach it; it has time to answer.
    Suspect = 1,
    /// Given up.
    Dead = 2,
    /// Said good-bye.
    Left = 3,
}

impl State {
    /// Alive or suspect: still a member.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Alive | Self::Suspect)
    }
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) record: Arc<SignedRecord>,
    /// Only while suspect.
    pub(super) suspicion: Option<Box<Suspicion>>,
    /// Since when in this state.
    pub(super) since: Time,
    /// Last first-hand sign of life of this boot; `None` as long as it has not been heard at all.
    pub(super) heard: Option<Time>,
    pub(super) load: Load,
    pub(super) state: State,
}

impl Member {
    pub(super) fn new(now: Time, record: Arc<SignedRecord>, state: State) -> Self {
        Self { record, suspicion: None, since: now, heard: None, load: Load::default(), state }
    }

    pub(super) fn key(&self) -> NodeKey {
        self.record.key
    }

    pub(super) fn version(&self) -> (u64, u32) {
        self.record.record.version()
    }

    pub(super) fn is_up(&self) -> bool {
        self.state.is_up()
    }
}
