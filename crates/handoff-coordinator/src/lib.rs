//! Sessions and their handoff: a conversation lives on one node, moves to another when its node is overloaded or leaves, and
//! goes on where it was. It is never lost, and never has two owners who act.
//!
//! This crate runs no agents and sends no messages: it decides ([`core`]), keeps ([`store`], [`bundle`]) and settles who owns
//! what ([`ownership`]).
//!
//! ```text
//! core       who may serve a session, how it moves, what is asked of it and answered (pure)
//!   |  effects          ^ results
//!   v                   |
//! ownership  one file for each owner that a session ever had, made by link(2): the only point of decision
//! session    what a conversation is: records, and the state that they add up to (pure)
//! store      its records on the node, and on the file system that all nodes share
//! bundle     its working directory, in pieces that are named by their content
//! ```

pub mod bundle;
pub mod core;
mod files;
pub mod ownership;
pub mod session;
pub mod store;
