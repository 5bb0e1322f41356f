//! The dispatcher: many model calls at once, at the speed that limits and money allow and no faster, none lost and none paid
//! for twice.
//!
//! It is not an agent and keeps no conversations: a task is one prompt and its answer. What runs in swarms is the router's.
//!
//! ```text
//! grpc -> session: one run;  http: the pool for any SDK
//!                  |
//!                shell: one task that owns     core   who goes next, when, where and for how much (pure)
//!                  |          ^                ledger what was set aside and spent, and what came of every run (SQLite)
//!                  v          | outcomes
//!              provider: wire formats of gemini, openai, anthropic and theirs; sim, which only pretends
//!
//! pool                    the same front for agents on nodes that have no way to the internet
//! research, coordinator   plans of many tasks, carried out by the shell
//! nodes                   who reads pages when there are nodes to do it; extract: what of a page a model is asked about
//! search, fetch, errands  what a task may read of the network before a model sees it
//! ```

mod cache;
pub mod call;
mod configured;
pub mod coordinator;
pub mod core;
mod errands;
mod extract;
pub mod fetch;
mod grpc;
mod http;
pub mod ledger;
mod metrics;
pub mod nodes;
pub mod pool;
pub mod provider;
pub mod research;
mod run;
pub mod search;
mod session;
mod settings;
pub mod setup;
pub mod shell;

pub use configured::{Configured, key_dir, key_file, setup_file, user_dir};
pub use http::framed_request;
pub use run::Dispatcher;
