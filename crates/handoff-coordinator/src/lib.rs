//! Sessions and their handoff: a conversation lives on one node, moves to another when its node is overloaded or leaves, and
//! goes on where it was. It is never lost, and never has two owners who act.
//!
//! It is a daemon on every node. It finds no nodes and measures no load: the membership beside it does.
//!
//! ```text
//! shell      clock, disks, gRPC to people and nodes, membership, events: makes the core a daemon
//! agent      who runs a turn: the port, the built-in `echo`, and the task that each conversation has
//!   |  inputs            ^ effects
//!   v                    |
//! core       who may serve a session, how it moves, what is asked of it and answered (pure)
//!   |  effects           ^ results
//!   v                    |
//! ownership  one file for each owner that a session ever had, made by link(2): the only point of decision
//! session    what a conversation is: records, and the state that they add up to (pure)
//! store      its records on the node, and on the file system that all nodes share
//! bundle     its working directory, in pieces that are named by their content
//! ```

pub mod agent;
pub mod bundle;
pub mod core;
mod files;
mod metrics;
pub mod ownership;
mod run;
pub mod session;
mod settings;
mod shell;
pub mod store;

pub use run::Coordinator;
pub use settings::HandoffArgs;
pub use shell::understood;
