//! Membership: every node of an instance finds the others over UDP and knows who is alive, how loaded each is and what
//! it can do.
//!
//! It moves no sessions and runs no tasks; those who do read its view.
//!
//! ```text
//! UDP 7946 <--> shell: one task that owns   core   who is a member and who is alive (pure)
//!                                           seal   who may speak, and proof of it (pure)
//!               |        ^                  wire   bytes of what is said (pure)
//!               v        | jobs, changes
//!            events     grpc: membership.v1 for people and daemons of this node, gossip.v1 for other nodes
//!            load: how busy this node is (pure, but for reading the machine)
//! ```

pub mod core;
pub mod events;
mod grpc;
pub mod load;
mod metrics;
mod run;
pub mod seal;
mod settings;
mod shell;
pub mod wire;

pub use run::Membership;
pub use settings::MembershipArgs;
