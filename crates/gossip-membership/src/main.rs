//! `drover-gossip-membership`.

use std::process::ExitCode;

use drover_gossip_membership::Membership;

fn main() -> ExitCode {
    drover_service::main::<Membership>()
}
