//! The daemons that are linked into this file: `drover daemon NAME …` is `drover-NAME …`.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use drover_config::Config;
use drover_service::Daemon;

use crate::beside::Beside;

/// One daemon of this file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linked {
    /// Its name: in the address book, in `drover daemon NAME`, in `drover-NAME`.
    pub(crate) name: &'static str,
    /// What it is for.
    pub(crate) about: &'static str,
    main: fn(Vec<OsString>) -> ExitCode,
    /// Its command line.
    pub(crate) command: fn() -> clap::Command,
}

const fn linked<D: Daemon>() -> Linked {
    Linked {
        name: D::NAME,
        about: D::ABOUT,
        main: drover_service::main_from::<D>,
        command: drover_service::command::<D>,
    }
}

/// Every daemon.
pub(crate) const ALL: &[Linked] = &[
    linked::<drover_router::Router>(),
    linked::<drover_allocator::SlurmAllocator>(),
    linked::<drover_follower::Follower>(),
    linked::<drover_worker::Worker>(),
    linked::<drover_membership::Membership>(),
    linked::<drover_handoff::Coordinator>(),
    linked::<drover_dispatcher::Dispatcher>(),
    linked::<drover_telegram::TelegramGateway>(),
];

/// The daemons of the login side, in the order in which they are started: the router last, so that it finds the others.
pub(crate) const LOGIN_SIDE: &[&str] = &["outbox-follower", "slurm-allocator", ROUTER];

/// The daemons that stand beside swarms: those of the login side and, when nodes come to it, the dispatcher, which is started
/// first so that it is there when they come.
pub(crate) fn standing(config: &Config) -> Vec<&'static str> {
    let dispatcher = config.worker.nodes_use_dispatcher().then_some(DISPATCHER);
    dispatcher.into_iter().chain(LOGIN_SIDE.iter().copied()).collect()
}

/// Name of the dispatcher in the address book. It runs only once a command has needed it, or when nodes come to it.
pub(crate) const DISPATCHER: &str = "llm-dispatcher";

/// Name of the router in the address book.
pub(crate) const ROUTER: &str = "router";

impl Linked {
    /// Runs the daemon to its end. `args` are its own arguments, without a program name.
    pub(crate) fn run(&self, args: Vec<OsString>) -> ExitCode {
        let mut all = vec![OsString::from(format!("drover-{}", self.name))];
        let (own, rest): (Vec<_>, Vec<_>) = args.into_iter().partition(|arg| arg == DETACH);
        if !own.is_empty() {
            // Started by a command that goes away: no terminal of its own, so no hang-up and no Ctrl-C reaches it.
            // It fails only for a leader of a process group, which has what it needs already.
            let _ = rustix::process::setsid();
        }
        all.extend(rest);
        let beside = if self.name == ROUTER { Beside::of_router(&all[1..]) } else { None };
        let exit = (self.main)(all);
        if let Some(beside) = beside {
            beside.end();
        }
        exit
    }
}

/// Argument that our own commands add when they start a daemon that is to outlive them.
pub(crate) const DETACH: &str = "--detach-from-terminal";

/// The daemon of this name; the short names `allocator`, `follower` and `dispatcher` are understood too.
pub(crate) fn find(name: &str) -> Option<&'static Linked> {
    let name = match name {
        "allocator" => "slurm-allocator",
        "follower" => "outbox-follower",
        "dispatcher" => DISPATCHER,
        other => other,
    };
    ALL.iter().find(|daemon| daemon.name == name)
}

/// Whether this process was started as a daemon: by `drover daemon NAME …`, or through a link named `drover-NAME`.
/// This is looked at before the command line is parsed, because what follows is the daemon's, `--help` included.
pub(crate) fn asked_for(args: &[OsString]) -> Option<(&'static Linked, Vec<OsString>)> {
    let program = args.first().map(Path::new).and_then(Path::file_name).and_then(OsStr::to_str).unwrap_or_default();
    if let Some(daemon) = program.strip_prefix("drover-").and_then(find) {
        return Some((daemon, args[1..].to_vec()));
    }
    let (word, name) = (args.get(1)?, args.get(2)?);
    let daemon = find(name.to_str().filter(|_| word == "daemon")?)?;
    Some((daemon, args[3..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> Option<(&'static str, Vec<OsString>)> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        asked_for(&args).map(|(daemon, rest)| (daemon.name, rest))
    }

    #[test]
    fn a_daemon_gets_all_that_stands_behind_its_name() {
        let (name, rest) = split("drover daemon router --config x --help").unwrap();
        assert_eq!((name, rest.len()), ("router", 3));
        assert_eq!(split("/usr/bin/drover-outbox-follower --listen y").unwrap().0, "outbox-follower");
        assert_eq!(split("drover daemon allocator").unwrap().0, "slurm-allocator");
        for other in ["drover list", "drover daemon", "drover daemon nosuch", "drover-cli list"] {
            assert!(split(other).is_none(), "{other}");
        }
    }
}
