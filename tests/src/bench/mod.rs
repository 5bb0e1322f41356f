//! Benchmarks. Each runs the ideal beside ours in the same run and prints the ratio; none is a timed test.

pub mod control;
pub mod dispatch;
pub mod events;
pub mod figures;
pub mod gossip;
pub mod ideal;
pub mod idle;
pub mod inject;
pub mod slurm;
pub mod waits;
