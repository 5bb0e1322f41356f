//! `drover-router`.

use std::process::ExitCode;

fn main() -> ExitCode {
    drover_service::main::<drover_router::Router>()
}
