//! `drover`: the operator's command line, and every daemon in one file.
//!
//! It asks the router over gRPC, starts the daemons that are missing as processes of this same file, and prints what
//! people or scripts want to read. It owns no state: whatever it says comes from the router or from the address book.
//!
//! ```text
//! drover daemon NAME ──────────────> the daemon's own main (daemons.rs)
//! drover daemon router --daemon ───> beside.rs: what a router needs that another program started
//! drover COMMAND ── args/ ── commands/ ── client.rs, watch.rs ── gRPC ──> router
//!                                 │            └─ start.rs: what is missing is started, detached
//!                                 ├─ supervise.rs: `up` and `demo` keep daemons as children
//!                                 └─ render/: tables, lanes, JSON, colour
//! ```

use std::process::ExitCode;

mod app;
mod args;
mod beside;
mod bundle;
mod client;
mod codex;
mod commands;
mod completions;
mod daemons;
mod dispatcher;
mod fault;
mod files;
mod manual;
mod probe;
mod render;
mod start;
mod supervise;
mod watch;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    match daemons::asked_for(&args) {
        Some((daemon, rest)) => daemon.run(rest),
        None => app::run(args),
    }
}
