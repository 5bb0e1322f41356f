//! The gossip protocol in a simulated world: the production core, a seeded network, and a judge who only sees events.

pub mod chaos;
pub mod invariants;
pub mod lease_sim;
pub mod network;
pub mod nodes;
pub mod proof;
pub mod scenario;
pub mod world;
