//! The long proofs and what they share. Each proof is one function with a size: CI runs the short one as a test, the
//! programs in `src/bin` run the one whose figures stand in `docs/benchmarks.md`.

pub mod bench;
pub mod chaos;
pub mod cli;
pub mod dispatch_chaos;
pub mod gossip;
pub mod handoff;
pub mod mounts;
pub mod packed;
pub mod rolling;
pub mod slurm;
pub mod soak;
pub mod stage;
pub mod subscriber;
pub mod sure;
pub mod task_nodes;
