//! `drover-telegram-gateway`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    drover_service::main::<drover_telegram_gateway::TelegramGateway>()
}
