//! What the core has to know of a session's records: which turns there are and how far each is. No texts, so that a long
//! conversation costs little memory here.

use std::collections::{BTreeMap, HashMap};

use drover_types::{Epoch, RequestId};
use thiserror::Error;

use super::ids::{Call, Turn};
use crate::session::{Opening, Record};

/// A record that does not follow from those before it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OutlineError {
    /// Epochs must rise, the first record begins one, and each names the one that it follows.
    #[error("epoch {found:?} after {last:?}")]
    Epoch {
        /// What stands there.
        found: Epoch,
        /// The one before.
        last: Epoch,
    },
    /// It is opened once, before anything else.
    #[error("opened twice, or something before it was opened")]
    Opening,
    /// Turns count up and are begun and ended in their order.
    #[error("turn {0:?} is out of order")]
    Turn(Turn),
    /// One request is one turn.
    #[error("request {0} is accepted a second time")]
    Request(RequestId),
    /// A call belongs to the turn that runs, is made once and answered once.
    #[error("call {0:?} is out of order")]
    Call(Call),
    /// Nothing comes after the end.
    #[error("a record after the session was closed")]
    Closed,
}

/// How far a turn is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) request: RequestId,
    /// Number of the record that accepted it, and of the one that ended it.
    pub(crate) accepted: u64,
    pub(crate) ended: Option<u64>,
}

/// The turns of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    seq: u64,
    epoch: Epoch,
    pub(crate) opening: Option<Opening>,
    pub(crate) turns: Vec<Mark>,
    index: HashMap<RequestId, u32>,
    /// Begun and not ended.
    pub(crate) open: Option<Turn>,
    begun: u32,
    /// Calls of the open turn: whether it was answered, and by which record it was made.
    pub(crate) calls: BTreeMap<Call, (bool, u64)>,
    pub(crate) closed: bool,
}

impl Outline {
    /// How many records it has taken.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Turns that there ever were.
    pub fn turns(&self) -> u32 {
        self.turns.len() as u32
    }

    /// What the session was opened with.
    pub fn opening(&self) -> Option<&Opening> {
        self.opening.as_ref()
    }

    /// The last epoch that a record begins.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The turn of a request.
    pub(crate) fn find(&self, request: &RequestId) -> Option<(Turn, &Mark)> {
        let turn = *self.index.get(request)?;
        Some((Turn(turn), &self.turns[turn as usize]))
    }

    /// The turn that is to be begun next.
    pub(crate) fn next(&self) -> Option<Turn> {
        (self.open.is_none() && (self.begun as usize) < self.turns.len()).then_some(Turn(self.begun))
    }

    /// Turns that are accepted and not ended.
    pub(crate) fn unanswered(&self) -> usize {
        self.turns.len() - self.begun as usize + usize::from(self.open.is_some())
    }

    /// A cut-off turn may run again.
    pub(crate) fn replayable(&self) -> bool {
        self.opening.as_ref().is_some_and(|opening| opening.replayable)
    }

    /// Takes the next record.
    pub fn apply(&mut self, record: &Record) -> Result<(), OutlineError> {
        if self.closed && !matches!(record, Record::Epoch { .. }) {
            return Err(OutlineError::Closed);
        }
        if self.opening.is_none() && !matches!(record, Record::Epoch { .. } | Record::Opened { .. })
            || self.epoch == Epoch(0) && !matches!(record, Record::Epoch { .. })
        {
            return Err(OutlineError::Opening);
        }
        let seq = self.seq + 1;
        match record {
            Record::Epoch { epoch, follows, .. } => {
                if *epoch <= self.epoch || follows.is_some_and(|followed| followed != self.epoch) {
                    return Err(OutlineError::Epoch { found: *epoch, last: self.epoch });
                }
                self.epoch = *epoch;
            }
            Record::Opened { opening } => {
                if self.opening.is_some() {
                    return Err(OutlineError::Opening);
                }
                self.opening = Some(opening.clone());
            }
            Record::Accepted { turn, request, .. } => {
                if turn.0 as usize != self.turns.len() {
                    return Err(OutlineError::Turn(*turn));
                }
                if self.index.contains_key(request) {
                    return Err(OutlineError::Request(request.clone()));
                }
                self.index.insert(request.clone(), turn.0);
                self.turns.push(Mark { request: request.clone(), accepted: seq, ended: None });
            }
            Record::Begun { turn } => {
                if self.next() != Some(*turn) {
                    return Err(OutlineError::Turn(*turn));
                }
                self.open = Some(*turn);
                self.begun += 1;
            }
            Record::Called { call, .. } => {
                if self.open != Some(call.turn) || self.calls.contains_key(call) {
                    return Err(OutlineError::Call(*call));
                }
                self.calls.insert(*call, (false, seq));
            }
            Record::Returned { call, .. } => match self.calls.get_mut(call) {
                Some(state @ (false, _)) => *state = (true, seq),
                _ => return Err(OutlineError::Call(*call)),
            },
            Record::Ended { turn, .. } => {
                if self.open != Some(*turn) {
                    return Err(OutlineError::Turn(*turn));
                }
                self.open = None;
                self.calls.clear();
                self.turns[turn.0 as usize].ended = Some(seq);
            }
            Record::Context { .. } | Record::Files { .. } => {}
            Record::Closed => self.closed = true,
        }
        self.seq = seq;
        Ok(())
    }
}
