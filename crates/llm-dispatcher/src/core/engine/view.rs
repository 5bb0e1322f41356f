//! What people and metrics may see of the engine.

use std::time::Duration;

use super::Engine;
use crate::core::breaker::BreakerState;
use crate::core::money::Money;
use crate::core::task::LaneId;

/// The whole at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Tasks that are not over.
    pub tasks: usize,
    /// Tasks whose next try waits in a queue; those that wait before a retry are not among them.
    pub queued: usize,
    /// Calls under way, those being broken off included.
    pub calls: usize,
    /// Workers that there are.
    pub workers: u32,
    /// Workers that do something.
    pub busy: u32,
    /// Times that a worker went on with the same kind of work.
    pub reused: u64,
    /// Times that a worker went on with another kind of work.
    pub recycled: u64,
    /// What was spent today, by this run of the core.
    pub spent: Money,
    /// What the calls under way may cost in all.
    pub reserved: Money,
    /// What is set aside on disk and free.
    pub free: Money,
}

/// One lane at a glance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LaneView {
    /// Which.
    pub lane: LaneId,
    /// Calls under way.
    pub in_flight: u32,
    /// How many may be at present, by all limits that bound them.
    pub width: u32,
    /// Calls a minute that are let through at present.
    pub per_minute: Option<f64>,
    /// No call goes before that, when it lies ahead.
    pub paused_until: Duration,
    /// Whether it is left alone.
    pub breaker: BreakerState,
    /// Calls that were started.
    pub starts: u64,
    /// Those that were retries.
    pub retries: u64,
    /// Those that were hedges.
    pub hedges: u64,
    /// Those that were answered, or whose answer was withheld.
    pub answered: u64,
    /// Those that were refused for the number of calls.
    pub refused: u64,
    /// Those that failed in any other way.
    pub failed: u64,
}

impl Engine {
    /// The whole at a glance.
    pub fn stats(&self) -> Stats {
        Stats {
            tasks: self.tasks.len(),
            queued: self.routes.busy.iter().map(|&route| self.routes.get(route).queue.len()).sum(),
            calls: self.attempts.len(),
            workers: self.workers.living(),
            busy: self.workers.busy(),
            reused: self.workers.reused,
            recycled: self.workers.recycled,
            spent: self.purse.spent(),
            reserved: self.purse.reserved(),
            free: self.purse.free(),
        }
    }

    /// One lane at a glance.
    pub fn lane(&self, id: LaneId) -> Option<LaneView> {
        let lane = self.lanes.get(usize::from(id.0))?;
        let api = if lane.settings.api { self.settings.max_concurrent_api.max(1) } else { u32::MAX };
        Some(LaneView {
            lane: id,
            in_flight: lane.in_flight,
            width: lane.width.current().min(self.settings.max_nodes).min(api),
            per_minute: lane.limiter.rate(),
            paused_until: lane.limiter.paused_until(),
            breaker: lane.breaker.state(),
            starts: lane.counts.starts,
            retries: lane.counts.retries,
            hedges: lane.counts.hedges,
            answered: lane.counts.answered,
            refused: lane.counts.refused,
            failed: lane.counts.failed,
        })
    }
}
