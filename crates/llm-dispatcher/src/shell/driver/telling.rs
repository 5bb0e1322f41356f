//! What people are told: notes as they come up, and how things are when somebody looks.

use tokio::sync::broadcast;
use tracing::{debug, warn};

use super::Driver;
use crate::core::{BreakerState, LaneId};
use crate::shell::{LaneSnapshot, Note, Snapshot};

/// Notes that are kept for whoever looks later.
const NOTES: usize = 50;

impl Driver {
    pub(super) fn note(&mut self, note: Note) {
        if note.code == "hedging_off" {
            // Nobody has to do anything about it.
            debug!("{}", note.message);
            self.metrics.warning(note.code);
            return;
        }
        warn!(code = note.code, hint = note.hint, "{}", note.message);
        self.metrics.warning(note.code);
        if self.notes.len() == NOTES {
            self.notes.pop_front();
        }
        self.notes.push_back(note.clone());
        // Nobody listens most of the time.
        let _: Result<usize, broadcast::error::SendError<Note>> = self.queues.notes.send(note);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let lanes = self.lanes.all().into_iter().filter(|lane| lane.provider.is_some()).filter_map(|lane| {
            let view = self.engine.lane(lane.id)?;
            Some(LaneSnapshot {
                under_way: view.in_flight,
                width: view.width,
                breaker: match view.breaker {
                    BreakerState::Closed => "closed",
                    BreakerState::Open { .. } => "open",
                    BreakerState::HalfOpen { .. } => "half_open",
                },
                lane,
            })
        });
        let waiting = self.tasks.values().filter(|task| task.started_us.is_none()).count();
        Snapshot {
            queued: waiting as u64,
            under_way: self.attempts.len() as u64,
            calls: self.calls,
            lanes: lanes.collect(),
            notes: self.notes.iter().cloned().collect(),
        }
    }
}

pub(super) fn lane_of(warning: &crate::core::Warning) -> Option<LaneId> {
    use crate::core::Warning as W;
    match *warning {
        W::RateLimited { lane, .. }
        | W::BreakerOpen { lane, .. }
        | W::BreakerClosed { lane }
        | W::HedgingOff { lane } => Some(lane),
        W::SpendReached { .. } | W::BudgetExhausted { .. } => None,
    }
}
