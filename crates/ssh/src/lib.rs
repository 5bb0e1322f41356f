//! One way to run commands, place files and open tunnels on the login host of a cluster.
//!
//! [`Remote`] is the port. Three adapters stand behind it, and whoever holds a `dyn Remote` need not know which:
//!
//! ```text
//!              run, open, upload, tunnel, state
//!                            |
//!        +-------------------+--------------------+
//!     Local               Russh                System
//!  this host is the    one connection,      the system's ssh, for sites with
//!  login host          many channels        one-time passwords or Kerberos
//! ```
//!
//! What all of them promise:
//! - a command is a program and its arguments, never a line for a shell; they arrive as they are, whatever the login
//!   shell of the account is (the module `bootstrap` says how);
//! - every command has a deadline and a bound on its output;
//! - a command that may have run is never sent a second time: the error says that the outcome is unknown. One that surely
//!   never started is tried again until its deadline;
//! - the key of a host is never accepted silently.
//!
//! This is not a general SSH client: there are no terminals, no agent or X11 forwarding, no listening on the far side.

mod bootstrap;
mod client;
mod command;
mod config;
mod content;
mod error;
mod known_hosts;
mod local;
mod pipe;
mod process;
mod prompt;
mod remote;
mod settings;
mod system;

pub use client::Russh;
pub use command::{Command, Exit, Output};
pub use config::{Hop, HostConfig, Proxy, resolve};
pub use content::{RemotePath, Source, Upload, Uploaded};
pub use error::{Outcome, SshError};
pub use known_hosts::Verdict;
pub use local::Local;
pub use pipe::{Ended, Pipe, PipeWatch};
pub use prompt::{Askpass, Batch, Prompt, Terminal};
pub use remote::{Remote, State};
pub use settings::{Retry, Settings};
pub use system::System;
