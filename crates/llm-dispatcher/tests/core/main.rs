//! The core in virtual time against simulated providers, which judge it. `DROVER_SIM=whole` asks for the long sizes,
//! `DROVER_SEED` for a seed that failed.
#![expect(clippy::unwrap_used, reason = "a broken run must fail loudly")]

mod budget;
mod engine;
mod fair;
mod faults;
mod graph;
mod limits;
mod provider;
mod sim;
mod width;
