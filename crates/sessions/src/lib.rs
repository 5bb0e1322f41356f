//! Says something in a session, through any of several doors, and hears the answer once, wherever the session goes meanwhile.
//!
//! ```text
//! Ask ──> Sending ──┬─> door: the router      every door takes what is said to any session,
//!            ▲      ├─> door: a node          and passes it on to the node that has it
//!            └─ Ear └─> door: another node
//! ```
//!
//! A turn has a name that its asker chooses, and asked again under that name it is the same turn. So a door that does not answer, or
//! breaks off, is simply left for another one, and the same is asked there: the turn runs once all the same. [`Ear`] puts what is heard
//! through several doors together, so that no part of the answer is missing or heard twice.
//!
//! Not here: what a session is and where it lives (`drover-handoff`), and how doors are found, which differs for each who asks.

mod door;
mod ear;
mod sending;

pub use door::{Client, DOOR, Door, Doors, Fixed, Opens, Way, local};
pub use ear::{Ear, Heard};
pub use sending::{Ask, SendError, Sending, interrupt};
