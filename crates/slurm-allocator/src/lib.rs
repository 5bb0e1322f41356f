//! The allocator: turns launch specs into running workers and says how they fare.
//!
//! It knows processes, hosts and restarts. It does not know prompts, events or agents; what a worker says it says through
//! the mailbox, to the router.
//!
//! ```text
//! gRPC ──> grpc.rs ──> allocator.rs ── one launch per swarm at a time ──> Backend
//!   ^                                                                      ├─ local/         core/ + real processes
//!   │ snapshot, then changes                                               ├─ static_hosts/  assignment files
//!   │                                                                      └─ slurm/         one job per swarm
//! board.rs <───────────── every change of every allocation ────────────────┘
//! ```
//!
//! `cluster/` is the far side of a cluster that is reached over SSH: our program there, its follower, and the way to it.
//!
//! A further backend is one more implementation of [`Backend`]; nothing above it changes.

mod allocation;
mod allocator;
mod backend;
mod board;
mod catalogue;
pub mod cluster;
mod core;
mod files;
mod grpc;
mod local;
mod membership;
mod metrics;
mod run;
mod slurm;
mod spec;
mod static_hosts;
mod store;
mod walltime;

pub use allocation::{AllocatedNode, Allocation, AllocationState, LaunchProgress, WorkerState};
pub use allocator::Allocator;
pub use backend::{Backend, Request};
pub use board::{Board, Update};
pub use catalogue::{BackendKind, providers};
pub use run::SlurmAllocator;
pub use slurm::{Claim, Order, Rehearsal, TOOLS, WorkerEnd, ground, rehearse};
pub use spec::{Bundle, Skill, Spec};
