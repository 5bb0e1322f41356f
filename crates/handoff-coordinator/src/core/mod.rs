//! How sessions move and who may serve them. No I/O, no clock and no randomness of its own.
//!
//! ```text
//!   Input  ──►  Engine::handle(now, input, &mut effects)  ──►  Effect
//!   turns, messages of other nodes, results, time               messages, claims, records to keep, turns to run, replies
//! ```
//!
//! `now` is the time since some fixed start, and never goes back. The shell performs the effects in their order and calls again no
//! later than [`Engine::deadline`] with [`Input::Tick`]. The same seed and the same inputs at the same times give the same
//! effects, which is what the simulator in the tests stands on.
//!
//! Three rules carry everything; none of them needs a clock that is right or a network that is up.
//!
//! 1. **A claim decides.** The owners of a session are numbered by epochs. An epoch has one owner: the one whose record
//!    of it was made first. A node claims only for itself, and only when it can serve: at a handoff, when the whole session is on
//!    its disk. A node that has let another claim, and then does not hear of it, claims the epoch itself instead of guessing.
//! 2. **Written, then looked, then said.** Whatever an owner does that somebody could see (a turn accepted, begun or
//!    answered, a tool called) is in its journal first, and after that it has looked whether there is a later epoch. Whoever takes
//!    over claims first and reads the journals after. So what was said is found, and what is found too late was never said.
//! 3. **A process that starts claims anew.** What it did before it ended, and what an earlier process of its node still does, is of
//!    an earlier epoch.

mod api;
mod drain;
mod engine;
mod ids;
mod incoming;
mod interrupt;
mod journal;
mod message;
mod outgoing;
mod outline;
mod owning;
mod policy;
mod relief;
mod session;
mod settings;
mod turns;

pub use api::{
    Appended, Asked, Cause, ClaimOutcome, Effect, Event, Failure, Input, Installed, Looked, OwnerRecord, Reply,
    Reserved, Why,
};
pub use drain::{Assignment, DrainPlan, Share};
pub use engine::{Engine, SessionView};
pub use ids::{Call, Digest, HandoffId, NodeId, Owner, ReplyTo, Turn};
pub use message::{Held, Message, Needs, Refusal, Rejection};
pub use outline::{Outline, OutlineError};
pub use policy::{Candidate, LoadGate, Own, Peer, PeerState, choose_target};
pub use relief::{Burden, Rooms, plan_relief};
pub use session::State;
pub use settings::Settings;

#[cfg(test)]
mod tests;
