//! Carries out what the core decides: one task owns core, seal and socket; everybody else sends it small jobs.
//!
//! ```text
//! UDP socket --datagrams--> link (opens) --> wire --> core --effects--> wire --> link (seals) --> UDP socket
//! gRPC pulls, timer, jobs -------------------^          \--> streams (tasks), events, snapshot (blocking pool)
//! ```

mod clock;
mod election;
mod handle;
mod keys;
mod link;
mod node;
mod notes;
mod seeds;
mod serve;
mod snapshot;
mod socket;
mod streams;
mod view;

pub(crate) use handle::{Change, Handle, MetadataChange, Phase};
pub(crate) use node::{Credentials, Start, run, without_node};
pub(crate) use notes::{Note, Notes};
pub(crate) use serve::NodeDoor;
pub(crate) use streams::Dial;
