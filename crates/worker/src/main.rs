//! The worker daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    drover_service::main::<drover_worker::Worker>()
}
