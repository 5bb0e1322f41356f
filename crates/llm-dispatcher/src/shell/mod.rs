//! Drives the core: performs its effects, feeds it what came of them, and keeps the words that the core never sees.
//!
//! ```text
//! Client::run, Client::submit ──> Driver, one task that owns the core ──> one task per call: Provider::call, Errand::run
//!        ^                            |                    ^                         |
//!        └────────── Done ────────────┘                    └────── outcomes ─────────┘
//!                                     └──> ledger: leases, charges
//! ```
//!
//! Everything that makes calls goes through here: runs, the HTTP front, research and its coordinator. Queues between the parts
//! are bounded; a caller whose queue is full waits.

mod attempt;
mod charges;
mod client;
mod driver;
mod lanes;
mod spans;
mod words;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::call::{CallAnswer, CallError, CallRequest, Delta, Sink};
use crate::core::{Kind, Money, Priority, Status};

pub use client::{Client, LaneSnapshot, Note, Pool, Snapshot, Tagged};
pub(crate) use driver::{Driver, Start, status_name};
pub use lanes::{Chain, Lane, Lanes, NewLane};

/// Something to do once, at the speed that limits and money allow.
#[derive(Debug, Clone)]
pub struct Job {
    /// What is to be done.
    pub work: Work,
    /// Where, best first. From [`Pool::chain`].
    pub chain: Chain,
    /// What kind of worker does it.
    pub kind: Kind,
    /// What goes first among the client's own.
    pub priority: Priority,
    /// Longest time until the answer. A job that cannot make it is refused at once.
    pub within: Option<Duration>,
    /// Doing it twice at once does no harm.
    pub hedge: bool,
    /// Where the answer goes piece by piece. With it nothing is tried again once a piece has gone out.
    pub stream: Option<mpsc::Sender<Delta>>,
    /// An answer that was kept for the same question will do.
    pub cache: bool,
}

impl Job {
    /// A model call with the usual settings.
    pub fn call(request: CallRequest, chain: Chain) -> Self {
        Self::new(Work::Call(Arc::new(request)), chain, Kind::Analyze)
    }

    /// Something other than a model call, such as fetching a page.
    pub fn errand(errand: Arc<dyn Errand>, kind: Kind) -> Self {
        Self::new(Work::Errand(errand), Chain::errands(), kind)
    }

    fn new(work: Work, chain: Chain, kind: Kind) -> Self {
        Self { work, chain, kind, priority: Priority::default(), within: None, hedge: true, stream: None, cache: true }
    }
}

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Work {
    /// Ask a model.
    Call(Arc<CallRequest>),
    /// Something else.
    Errand(Arc<dyn Errand>),
}

/// Work that is no model call: a search, a page. It takes a worker, and is tried again as calls are.
#[async_trait]
pub trait Errand: Send + Sync + std::fmt::Debug {
    /// The most that doing it once costs; `None` when nobody knows. What it did cost it then tells as input tokens, of which
    /// each is a pico-dollar.
    fn worst_case(&self) -> Option<Money> {
        Some(Money::ZERO)
    }

    /// Does it once. What it found goes into the text or, as JSON, into `structured`.
    async fn run(&self, sink: &mut dyn Sink) -> Result<CallAnswer, CallError>;
}

/// What came of a job.
#[derive(Debug, Clone)]
pub struct Done {
    /// How it ended.
    pub status: Status,
    /// The answer, when there is one; also of a blocked call, with what there is of it.
    pub answer: Option<CallAnswer>,
    /// In words, why there is no answer and what to do; empty when there is one.
    pub error: String,
    /// Calls that were made.
    pub attempts: u32,
    /// What they cost, broken off ones at their worst case.
    pub cost: Money,
    /// Where the answer comes from, or who was asked last.
    pub lane: Option<Arc<Lane>>,
    /// When the first call began, in microseconds of Unix time; when it was over, if none was made.
    pub started_us: u64,
    /// When it was over.
    pub ended_us: u64,
    /// How long the call took that gave the answer, or the last one.
    pub busy: Duration,
    /// Calls of the same client that were under way when it began, itself included.
    pub beside: u32,
    /// Nothing was called: the answer was there, or somebody was asking the same at that moment.
    pub cached: bool,
}
