//! `drover-handoff-coordinator`.

use std::process::ExitCode;

use drover_handoff_coordinator::Coordinator;

fn main() -> ExitCode {
    drover_service::main::<Coordinator>()
}
