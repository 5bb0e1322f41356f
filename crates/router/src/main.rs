//! `drover-router`.

use std::env;
use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    if args.iter().any(|arg| arg == "--daemon") {
        in_company(&args);
    }
    drover_service::main::<drover_router::Router>()
}

/// Whoever starts a router with `--daemon` knows of no other daemon and wants swarms all the same. `drover` beside this file
/// holds this same router and looks after allocator and follower too, so it takes over this very process, and with it the
/// pid that the caller knows. Returns when there is none.
fn in_company(args: &[OsString]) {
    let beside = env::current_exe().ok().and_then(|exe| program_beside(&exe));
    let why = match beside {
        Some(drover) => {
            let error = Command::new(&drover).args(["daemon", "router"]).args(args).exec();
            format!("{} cannot be started: {error}", drover.display())
        }
        None => "there is no drover program beside this one".to_owned(),
    };
    let _ = writeln!(
        std::io::stderr(),
        "allocator and follower are not looked after ({why}): start drover-slurm-allocator and drover-outbox-follower too"
    );
}

fn program_beside(exe: &Path) -> Option<PathBuf> {
    let drover = exe.with_file_name("drover");
    let meta = drover.metadata().ok()?;
    (meta.is_file() && meta.permissions().mode() & 0o111 != 0).then_some(drover)
}
