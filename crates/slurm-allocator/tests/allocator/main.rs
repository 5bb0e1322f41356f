//! The allocator from outside: the real program over gRPC, with stand-ins for the workers.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail and talk as tests do")]

mod bench;
mod histories;
mod hostile;
mod local;
mod static_hosts;
