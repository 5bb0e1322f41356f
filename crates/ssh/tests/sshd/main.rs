//! The adapters against a real sshd, which each test starts for itself on loopback.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a test that fails shows the log of its server")]

mod commands;
mod connection;
mod files;
mod login;
mod support;
mod trust;
mod tunnels;
mod ways;
