//! The router: registry of swarms, life cycle of prompts, the event log and everybody who follows it.
//!
//! It knows nothing of ssh, sbatch, file layout or the agents' protocols: allocations are the allocator's business, files
//! the follower's. What it has acknowledged is on disk.
//!
//! ```text
//! callers --doors--> grpc --calls--> writer (one thread)                 core: decides, does nothing
//!    ^               |                 |  batch -> core -> one transaction -> SQLite
//!    |               | reads           |  after the commit only:
//!    |               v                 +--> registry (a picture for readers), log (recent events), replies
//!    +---------- registry, log         +--> plans --> shell --> slurm-allocator, outbox-follower
//!                                                      |  what they answer
//!                                      writer <--------+
//! ```

mod core;
mod doors;
mod gauges;
mod grpc;
mod log;
mod metrics;
mod owner;
mod registry;
mod run;
mod sessions;
mod shell;
mod store;

pub use crate::run::{Router, RouterArgs};
