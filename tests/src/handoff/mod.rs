//! Handoffs in a simulated world: the production core, a seeded network, file systems that fail, and a judge who only sees effects.

pub mod clients;
pub mod faults;
pub mod figures;
pub mod judge;
pub mod nodes;
pub mod orders;
pub mod partition;
pub mod proof;
pub mod shared;
pub mod speed;
pub mod world;
