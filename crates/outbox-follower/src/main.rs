//! `drover-outbox-follower`.

use std::process::ExitCode;

use drover_outbox_follower::Follower;

fn main() -> ExitCode {
    drover_service::main::<Follower>()
}
