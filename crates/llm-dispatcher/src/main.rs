//! `drover-llm-dispatcher`.

use std::process::ExitCode;

use drover_llm_dispatcher::Dispatcher;

fn main() -> ExitCode {
    drover_service::main::<Dispatcher>()
}
