//! The program from outside: what it prints, what it asks of the router, and how it exits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broken;
mod commands;
mod connect;
mod fake;
mod real;
mod usage;
mod web;
