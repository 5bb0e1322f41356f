//! What the core is told, and what it wants done.

use std::time::Duration;

use super::money::Money;
use super::slots::WorkerId;
use super::task::{AttemptId, ClientId, LaneId, LeaseId, TaskId, TaskSpec};
use crate::call::{FailureKind, LimitHints, Usage};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Somebody wants a task done. Answered by exactly one [`Effect::Done`], at once when it is refused.
    Submit {
        /// Who.
        client: ClientId,
        /// What.
        task: TaskSpec,
    },
    /// Nobody wants that task any more. Its tries are broken off; [`Status::Cancelled`] follows unless it was done already.
    Cancel {
        /// Which.
        task: TaskId,
    },
    /// Nobody wants anything of that client any more.
    CancelClient {
        /// Who.
        client: ClientId,
    },
    /// A try has ended; exactly once for each [`Effect::Start`].
    Finished {
        /// Which.
        attempt: AttemptId,
        /// How.
        outcome: Outcome,
    },
    /// The first piece of an answer has come (and, when the task is streaming, has gone out to the client).
    FirstByte {
        /// Of which try.
        attempt: AttemptId,
    },
    /// What a provider said about its limits in the head of an answer that is still under way.
    Headers {
        /// Of which try.
        attempt: AttemptId,
        /// What it said.
        hints: LimitHints,
    },
    /// A day of the budget has begun; also told once at the start. Until the first of these no money is spent where there is
    /// a cap. Calls under way still belong to the day that they began on.
    Day {
        /// Number of the day, growing.
        day: u32,
        /// What the ledger says was spent or set aside on it already, for the warning.
        spent: Money,
    },
    /// The ledger has set that money aside, and it is on disk.
    LeaseGranted {
        /// From [`Effect::WantLease`].
        id: LeaseId,
    },
    /// The ledger cannot set so much aside.
    LeaseRefused {
        /// From [`Effect::WantLease`].
        id: LeaseId,
        /// What is left of the day; a smaller lease may be asked for.
        available: Money,
    },
    /// Settings that may change while running; limits that are lowered act on what starts from now on.
    Reconfigure {
        /// See [`super::Settings::max_nodes`].
        max_nodes: u32,
        /// See [`super::Settings::max_concurrent_api`].
        max_concurrent_api: u32,
    },
    /// Time has passed. Calling too early is harmless.
    Tick,
}

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With a whole answer.
    Answered {
        /// What the provider counted, if it said.
        usage: Option<Usage>,
        /// What it said about its limits.
        hints: LimitHints,
    },
    /// The provider withholds the answer: a result, not a failure.
    Blocked {
        /// What the provider counted, if it said.
        usage: Option<Usage>,
    },
    /// Without one.
    Failed {
        /// Why.
        kind: FailureKind,
        /// What it may have cost.
        charge: Charge,
        /// What the provider said about its limits.
        hints: LimitHints,
    },
    /// It was broken off by [`Effect::Abort`].
    Aborted {
        /// What it may have cost.
        charge: Charge,
    },
}

/// What a try that came to nothing costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charge {
    /// The provider surely never worked on it: no connection, or refused with a status.
    Nothing,
    /// The provider said.
    Reported(Usage),
    /// Nobody knows, so all that was reserved.
    Unknown,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make one call.
    Start {
        /// Its name from now on.
        attempt: AttemptId,
        /// For which task.
        task: TaskId,
        /// Where.
        lane: LaneId,
        /// The worker that does it. Workers are used again and again, whatever the phase.
        worker: WorkerId,
        /// Why it is made.
        kind: StartKind,
        /// When the core will break it off at the latest; the provider may be told so.
        deadline: Duration,
    },
    /// Break that call off and close its connection, then tell of its end.
    Abort {
        /// Which.
        attempt: AttemptId,
    },
    /// Set money aside, durably, and tell when it is on disk.
    WantLease {
        /// Its name from now on.
        id: LeaseId,
        /// Of which day.
        day: u32,
        /// How much.
        amount: Money,
    },
    /// That much of what was set aside is not needed: the ledger may give it to others. It need not be durable at once.
    ReturnLease {
        /// Of which day.
        day: u32,
        /// How much.
        amount: Money,
    },
    /// What one try cost; one for each try, in the order in which they ended.
    Charged {
        /// Which try.
        attempt: AttemptId,
        /// For which task.
        task: TaskId,
        /// Where.
        lane: LaneId,
        /// The day that it began on, and belongs to.
        day: u32,
        /// How much.
        amount: Money,
        /// The provider did not say, so this is what was reserved.
        estimated: bool,
    },
    /// A task is over. What the winning try answered is the result.
    Done {
        /// Which.
        task: TaskId,
        /// How.
        verdict: Verdict,
    },
    /// Tell a person.
    Warn(Warning),
}

/// Why a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartKind {
    /// The first try of a task.
    First,
    /// One before it failed.
    Retry,
    /// One before it is slow, and goes on beside it.
    Hedge,
}

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether and how.
    pub status: Status,
    /// The try whose answer is the result: set for [`Status::Answered`] and [`Status::Blocked`].
    pub winner: Option<AttemptId>,
    /// Where the winner or the last try ran.
    pub lane: Option<LaneId>,
    /// Tries that were started, hedges included.
    pub attempts: u32,
    /// How many of them were hedges.
    pub hedges: u32,
    /// What the task cost, tries that are being broken off counted as reserved.
    pub cost: Money,
    /// How long it waited before its first try.
    pub waited: Duration,
}

/// Whether and how a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// With an answer.
    Answered,
    /// The provider withholds the answer.
    Blocked,
    /// It was tried and cannot be done.
    Failed(Reason),
    /// It was not begun.
    Refused(Refusal),
    /// Nobody wanted it any more.
    Cancelled,
}

/// Why a task failed after it was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The call cannot succeed, or failed too often; this is how the last one did.
    Call(FailureKind),
    /// The deadline came first.
    Deadline,
    /// The day's money is used up.
    Budget {
        /// What the next try could cost.
        needed: Money,
        /// What is left.
        left: Money,
    },
}

/// Why a task was not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its chain of lanes is empty or names one that does not exist.
    NoLane,
    /// That id is in use.
    Duplicate,
    /// Too many tasks wait already.
    QueueFull {
        /// How many may wait.
        limit: usize,
    },
    /// The answer cannot be there in time.
    Deadline {
        /// When it probably would be there, from now.
        expected: Duration,
        /// How long it may take, from now.
        allowed: Duration,
    },
    /// The day's money is used up.
    Budget {
        /// What it could cost.
        needed: Money,
        /// What is left.
        left: Money,
    },
    /// Nobody knows what it costs and a cap is set; name a price or allow unknown ones.
    UnknownPrice,
}

/// Something that a person should hear about; each is said when it begins, not again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warning {
    /// The provider refuses calls for their number; the core goes on more slowly.
    RateLimited {
        /// Where.
        lane: LaneId,
        /// Calls at once from now on, when that is what was lowered.
        width: Option<u32>,
        /// Calls a minute from now on, when that is what was lowered.
        per_minute: Option<u32>,
    },
    /// The lane fails and is left alone for a while.
    BreakerOpen {
        /// Where.
        lane: LaneId,
        /// Until when.
        until: Duration,
    },
    /// The lane works again.
    BreakerClosed {
        /// Where.
        lane: LaneId,
    },
    /// Hedging is off: the whole provider is slow.
    HedgingOff {
        /// Where.
        lane: LaneId,
    },
    /// The day's spending has reached the mark that was set for a warning.
    SpendReached {
        /// Of which day.
        day: u32,
        /// How much was spent.
        spent: Money,
    },
    /// The day's money is used up.
    BudgetExhausted {
        /// Of which day.
        day: u32,
    },
}
