//! What all daemons share, once: arguments, configuration, telemetry, one port for gRPC and HTTP, who may connect,
//! the address book, signals and shutdown.
//!
//! It knows nothing of what a daemon is for. A daemon implements [`Daemon`]; [`main`] does the rest:
//!
//! ```text
//! arguments -> configuration -> telemetry -> state directory + lock -> Daemon::run(config, args, context)
//!                                                                          bind, register, Server::serve
//! SIGTERM/SIGINT -> context.shutdown() -> streams end, stores flush -> every tracked task ends -> exit 0
//! ```

pub mod address_book;
mod caller;
mod calls;
mod channel;
mod context;
mod daemon;
mod express;
pub mod guard;
mod heap;
mod lifeline;
mod listener;
mod notify;
mod own_metrics;
mod own_routes;
pub mod peer;
pub mod pki;
pub mod process;
pub mod programs;
mod server;
mod state_dir;
mod telemetry;
mod tls;
mod token;
mod tracked;
pub mod web;

pub use caller::{Caller, Door};
pub use channel::{Target, connect};
pub use context::{Context, SharedRegistry};
pub use daemon::{Daemon, ExitWith, NoArgs, command, main, main_from};
pub use express::Express;
pub use lifeline::LIFELINE;
pub use listener::{Listener, who_listens};
pub use server::Server;
pub use state_dir::{StateDir, StateDirError};
pub use telemetry::{Telemetry, in_trace, init as init_telemetry, remote_parent, traceparent};
pub use tls::{NodePeer, connect_node, connect_node_stream, why};
pub use token::{Token, TokenError};

/// The largest gRPC message that daemons send each other. Above the largest prompt with its bundle.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Microseconds of Unix time.
pub fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |age| age.as_micros() as u64)
}
