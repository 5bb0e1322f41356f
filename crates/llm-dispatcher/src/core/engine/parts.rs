//! What the engine keeps of tasks, tries, lanes and chains of lanes.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use crate::call::FailureKind;
use crate::core::breaker::Breaker;
use crate::core::hedge::{HedgeBudget, Tail};
use crate::core::limits::Limiter;
use crate::core::money::Money;
use crate::core::queue::FairQueue;
use crate::core::settings::{LaneSettings, Settings};
use crate::core::slots::WorkerId;
use crate::core::task::{AttemptId, ClientId, Kind, LaneId, TaskId};
use crate::core::width::Width;

/// Names a timer: when it is due, and a number that keeps equal times apart.
pub(super) type TimerKey = (Duration, u64);

/// What is due at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timer {
    /// The task must be over.
    Deadline(TaskId),
    /// The task may be tried again.
    Retry(TaskId),
}

/// A place in a queue. A task that left its place, whatever for, has another stamp by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) task: TaskId,
    pub(super) stamp: u32,
}

/// Where the next try of a task waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pending {
    /// No further try is wanted at present.
    Nothing,
    /// In the queue of its chain.
    Queued,
    /// Before that queue, as the hedge of a slow try.
    Hedge,
    /// Until that timer.
    Backoff(TimerKey),
}

/// A task that is not over.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) client: ClientId,
    pub(super) weight: u32,
    pub(super) kind: Kind,
    pub(super) deadline: Option<TimerKey>,
    pub(super) input_upper: u64,
    /// Tokens that a try takes of a limit per minute.
    pub(super) tokens: u64,
    pub(super) max_tokens: u64,
    pub(super) route: u32,
    pub(super) hedge: bool,
    pub(super) streaming: bool,
    pub(super) submitted: Duration,
    pub(super) first_start: Option<Duration>,
    pub(super) pending: Pending,
    pub(super) stamp: u32,
    /// Tries under way that were not broken off.
    pub(super) live: Vec<AttemptId>,
    pub(super) starts: u32,
    pub(super) hedges: u32,
    pub(super) failures: u32,
    pub(super) bad_answers: u32,
    /// Failures on the lane that is tried at present.
    pub(super) lane_failures: u32,
    pub(super) rejections: u32,
    /// The try whose words have gone out to the client.
    pub(super) committed: Option<AttemptId>,
    pub(super) lane: Option<LaneId>,
    pub(super) cost: Money,
}

/// One call under way.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) task: TaskId,
    pub(super) lane: LaneId,
    pub(super) kind: Kind,
    pub(super) worker: WorkerId,
    pub(super) started: Duration,
    pub(super) reserved: Money,
    pub(super) day: u32,
    pub(super) tokens: u64,
    pub(super) aborting: bool,
    /// It takes longer than is usual.
    pub(super) slow: bool,
    /// A second try was made because of it.
    pub(super) hedged: bool,
    pub(super) first_byte: bool,
}

/// Calls under way of one kind of work on one lane.
#[derive(Debug, Default)]
pub(super) struct Running {
    /// Those that were not broken off. Their numbers grow with the times at which they started.
    pub(super) attempts: BTreeSet<AttemptId>,
    /// Calls before this one are slow, or over.
    pub(super) judged: u64,
    /// How many are slow, and from when on a call was when that was counted.
    pub(super) slow: u32,
    pub(super) threshold: Option<Duration>,
    /// Slow calls that are given up when they stall, oldest first; those that are over are still among them.
    pub(super) stalling: VecDeque<AttemptId>,
    /// Slow calls beside which a second try may stand, likewise.
    pub(super) unhedged: VecDeque<AttemptId>,
    pub(super) tail: Tail,
}

/// What was done on a lane since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) starts: u64,
    pub(super) retries: u64,
    pub(super) hedges: u64,
    pub(super) answered: u64,
    pub(super) refused: u64,
    pub(super) failed: u64,
}

/// One provider, key and model.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) settings: LaneSettings,
    pub(super) limiter: Limiter,
    pub(super) width: Width,
    pub(super) breaker: Breaker,
    /// All calls whose end was not told yet, broken off or not.
    pub(super) in_flight: u32,
    pub(super) running: [Option<Box<Running>>; Kind::ALL.len()],
    /// Hedges that wait for room.
    pub(super) hedges: VecDeque<Ticket>,
    pub(super) hedge_budget: HedgeBudget,
    /// Refusals since the last answer.
    pub(super) refusals: u32,
    pub(super) warned_at: Option<Duration>,
    pub(super) answered_at: Option<Duration>,
    pub(super) counts: Counts,
}

impl Lane {
    pub(super) fn new(settings: LaneSettings, all: &Settings) -> Self {
        let max = settings.max_in_flight.unwrap_or(u32::MAX);
        Self {
            limiter: Limiter::new(
                settings.requests_per_minute,
                settings.burst,
                settings.tokens_per_minute,
                settings.token_burst,
            ),
            width: Width::new(all.width, settings.start_width.unwrap_or(max), max),
            breaker: Breaker::default(),
            in_flight: 0,
            running: Default::default(),
            hedges: VecDeque::new(),
            hedge_budget: HedgeBudget::new(&all.hedge),
            refusals: 0,
            warned_at: None,
            answered_at: None,
            counts: Counts::default(),
            settings,
        }
    }

    pub(super) fn running(&mut self, kind: Kind) -> &mut Running {
        self.running[kind.index()].get_or_insert_default()
    }

    /// A call is not under way any more, as far as others are to be compared with it.
    pub(super) fn forget(&mut self, id: AttemptId, call: &Attempt) {
        let running = self.running(call.kind);
        if running.attempts.remove(&id) && call.slow {
            running.slow -= 1;
        }
    }

    pub(super) fn tail(&self, kind: Kind) -> Option<&Tail> {
        self.running[kind.index()].as_ref().map(|running| &running.tail)
    }

    /// The worst case of a call of that size; nothing when nobody knows the price.
    pub(super) fn worst(&self, task: &Task) -> Money {
        self.settings.price.map_or(Money::ZERO, |price| price.worst(task.input_upper, task.max_tokens))
    }
}

/// A chain of lanes and those who wait for it.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) lanes: Box<[LaneId]>,
    pub(super) queue: FairQueue<Ticket>,
    /// Number of the last turn that it had.
    pub(super) served: u64,
}

/// All chains that were ever asked for.
#[derive(Debug, Default)]
pub(super) struct Routes {
    pub(super) all: Vec<Route>,
    by_lanes: HashMap<Box<[LaneId]>, u32>,
    /// Those in which somebody may wait.
    pub(super) busy: BTreeSet<u32>,
}

impl Routes {
    pub(super) fn intern(&mut self, lanes: &[LaneId]) -> u32 {
        if let Some(&route) = self.by_lanes.get(lanes) {
            return route;
        }
        let route = self.all.len() as u32;
        self.all.push(Route { lanes: lanes.into(), queue: FairQueue::default(), served: 0 });
        self.by_lanes.insert(lanes.into(), route);
        route
    }

    pub(super) fn get(&self, route: u32) -> &Route {
        &self.all[route as usize]
    }

    pub(super) fn get_mut(&mut self, route: u32) -> &mut Route {
        &mut self.all[route as usize]
    }

    /// The rest of a chain behind that lane.
    pub(super) fn after(&mut self, route: u32, lane: LaneId) -> Option<u32> {
        let lanes = &self.get(route).lanes;
        let position = lanes.iter().position(|&other| other == lane)?;
        let rest: Vec<LaneId> = lanes[position + 1..].to_vec();
        (!rest.is_empty()).then(|| self.intern(&rest))
    }
}

/// Somebody who asks.
#[derive(Debug, Default)]
pub(super) struct Client {
    /// When its next turn is, between chains that share the limits of the whole.
    pub(super) tag: u64,
    pub(super) tasks: BTreeSet<TaskId>,
}

/// What a failure says, and about whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blame {
    /// Too many calls: nobody failed.
    Number,
    /// The lane is in trouble; the same may work later.
    Trouble,
    /// The lane cannot work until somebody does something about it.
    Lane,
    /// The lane does not fit this task; another may.
    Fit,
    /// The model's answer is not what was asked for; it may be the next time.
    Answer,
    /// The task itself.
    Task,
}

impl Blame {
    pub(super) fn of(kind: FailureKind) -> Self {
        match kind {
            FailureKind::RateLimited => Self::Number,
            FailureKind::Connect
            | FailureKind::Broken
            | FailureKind::Timeout
            | FailureKind::Overloaded
            | FailureKind::Server
            | FailureKind::Malformed => Self::Trouble,
            FailureKind::Schema => Self::Answer,
            FailureKind::QuotaExhausted | FailureKind::Auth | FailureKind::NotFound => Self::Lane,
            FailureKind::TooLarge | FailureKind::Unsupported => Self::Fit,
            FailureKind::BadRequest => Self::Task,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_waits_is_small() {
        // Its entry twice, because a hash table may be half empty; and its place in the queue and among its client's tasks.
        let entry = size_of::<TaskId>() + size_of::<Box<Task>>();
        let bytes = size_of::<Task>() + 2 * entry + 4 * size_of::<Ticket>() + 4 * size_of::<TaskId>();
        assert!(bytes <= 512, "{bytes} bytes");
    }
}
