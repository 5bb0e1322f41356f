//! The protocol: who is a member, who is alive, and what to tell whom. No sockets, no clock, no randomness of its own.
//!
//! ```text
//!   Input  ──►  Engine::handle(now, input, &mut effects)  ──►  Effect
//!   datagrams, stream results, timer, commands                 sends, streams, events
//! ```
//!
//! The shell performs the effects and calls again no later than [`Engine::deadline`]. The same seed and the same inputs at
//! the same times give the same effects, which is what the simulator stands on.

mod claims;
mod dissemination;
mod effect;
mod encoding;
mod engine;
mod exchange;
mod health;
mod input;
mod join;
pub mod lease;
mod member;
mod message;
pub mod placement;
mod probe;
mod record;
pub mod regions;
mod settings;
mod suspicion;
mod table;
mod time;

pub use effect::{Cause, Effect, Event, Note};
pub use engine::{Core, Engine, MemberView, Snapshot};
pub use input::{Command, Input, Outcome};
pub use member::State;
pub use message::{Accusation, Entry, MAX_RUMORS, Message, PullAnswer, PullRequest, Reply, Request, Rumor};
pub use record::{
    BOUNDS, Bounds, ClusterId, Load, NodeKey, Record, RecordError, SignedRecord, Signer, Untrusted, Verifier,
};
#[doc(hidden)]
pub use settings::Guards;
pub use settings::Settings;
pub use table::BUCKETS;
pub use time::Time;
