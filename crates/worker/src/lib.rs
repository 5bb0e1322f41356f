//! The worker: one per node, runs one agent and speaks to the rest of drover only through the mailbox.
//!
//! It knows its inbox, its outbox and its agent. It knows no other node, no router address and no scheduler: when every
//! login-side daemon is down it goes on, and what it wrote is found later.
//!
//! ```text
//! inbox/*.jsonl --inbox--> +-------+ --store--> journal/<gen>/  (what began, what ended; synced before it begins)
//! agent events ----------> | core  | --store--> outbox/<gen>/   (everything the router gets to see)
//! timers, SIGTERM, Drain -> +-------+ ---------> agent commands
//! ```
//!
//! An agent whose model is the dispatcher's asks it through a door of this process: see `door`.
//!
//! Beside it runs the membership daemon of its node, which it starts and ends: see `membership`.
//!
//! Who it is comes from whoever started it or, with `--static`, from the assignment of its host: see `static_host`.
//!
//! `core` decides and touches nothing; `shell` carries out what it decided, in order; `run` puts both together. An agent
//! is anything behind the [`agent::Agent`] trait.

pub mod agent;
mod bundle;
pub mod chat;
mod claim;
pub mod codex;
mod core;
pub mod door;
mod echo;
mod grpc;
mod handoff;
mod inbox;
mod journal;
mod make;
mod membership;
mod metrics;
mod node;
mod own_session;
mod run;
mod shell;
mod slurm;
mod spans;
mod static_host;
mod store;
mod tasks;

pub use claim::NodeError;
pub use echo::{EchoAgent, LEDGER};
pub use make::{PoolWay, codex_settings, lay_out_bundle};
pub use own_session::home_of;
pub use run::{Worker, WorkerArgs};
pub use static_host::HostError;
