//! Who goes next, when, where and for how much money. No I/O, no clock and no randomness of its own.
//!
//! ```text
//!   Input  ──►  Engine::handle(now, input, &mut effects)  ──►  Effect
//!   tasks, answers, limits told, money granted, time            calls to start and to break off, verdicts, money wanted
//! ```
//!
//! `now` is the time since some fixed start, and never goes back. The shell performs the effects in their order and calls again
//! no later than [`Engine::next_wake`] with [`Input::Tick`]. Every [`Effect::Start`] is answered by exactly one
//! [`Input::Finished`], also when it was broken off. The same seed and the same inputs at the same times give the same effects,
//! which is what the simulator in the tests stands on.
//!
//! Prompts and answers never come here: a task is its sizes, its client, its deadline and its chain of lanes. A lane is one
//! provider, key and model, with the limits and prices that belong to the three together.

mod api;
mod breaker;
mod budget;
mod engine;
mod graph;
mod hedge;
mod ids;
mod limits;
mod money;
mod queue;
mod retry;
mod settings;
mod slots;
mod task;
mod width;

pub use api::{Charge, Effect, Input, Outcome, Reason, Refusal, StartKind, Status, Verdict, Warning};
pub use breaker::{Breaker, BreakerState};
pub use engine::{Engine, LaneView, Stats};
pub use graph::{
    Graph, GraphError, Missing, NodeId, NodeSpec, NodeState, PhaseSpec, Provenance, Source, Yield, pipeline,
};
pub(crate) use ids::IdMap;
pub use limits::{Gcra, Limiter};
pub use money::{Money, Price};
pub use queue::FairQueue;
pub use settings::{HedgeSettings, LaneSettings, RetrySettings, Settings, WidthSettings};
pub use slots::WorkerId;
pub use task::{AttemptId, ClientId, Kind, LaneId, LeaseId, Priority, TaskId, TaskSpec};
pub use width::Width;
