//! Starts the daemons that a command needs and that are not running.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use drover_service::{StateDir, address_book};
use tokio::time::Instant;

use crate::app::{self, App};
use crate::fault::{Exit, Fault};
use crate::{daemons, files, probe};

/// Held by `up` and `demo` while they keep the daemons of a state directory alive.
pub(crate) const UP_LOCK: &str = "up";
/// Held while daemons are started, so that two commands at once do not start them twice.
pub(crate) const START_LOCK: &str = "start";
/// Which `--config` the running daemons were started with.
const STARTED_WITH: &str = "run/started-with";
/// How long a daemon may take from its start to its first answer.
pub(crate) const STARTING: Duration = Duration::from_secs(15);

/// What it takes to start a daemon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe<'a> {
    pub(crate) state: &'a StateDir,
    pub(crate) config: Option<&'a Path>,
    /// It is to outlive this command.
    pub(crate) detached: bool,
    /// Begin a new log.
    pub(crate) rotate: bool,
}

impl Recipe<'_> {
    /// The command that runs a daemon of this file as a process of its own.
    pub(crate) fn command(&self, daemon: &str) -> std::io::Result<Command> {
        let log = files::open_log(self.state, daemon, self.rotate)?;
        let mut command = Command::new(app::own_file()?);
        command.args(["daemon", daemon]);
        if self.detached {
            command.arg(daemons::DETACH);
        }
        if let Some(config) = self.config {
            command.arg("--config").arg(config);
        }
        command.env("DROVER_STATE_DIR", self.state.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }
}

/// Makes sure that every daemon of the login side runs. Says on standard error what it starts.
pub(crate) async fn ensure(app: &App, state: &StateDir) -> Result<(), Fault> {
    let missing = || {
        let wanted = daemons::standing(&app.config).into_iter();
        wanted.filter(|name| address_book::read(state, name).is_none()).collect::<Vec<_>>()
    };
    if missing().is_empty() || files::holder(state, UP_LOCK).is_some() {
        // Only words; a state directory that cannot be written shows elsewhere.
        let _ = settle_config(app, state);
        return Ok(());
    }
    let fault = |error: anyhow::Error| {
        Fault::failed(format!("cannot start daemons: {error:#}")).hint("`drover doctor` says more")
    };
    let deadline = Instant::now() + STARTING;
    let _lock = only_one(state).await?;
    let missing = missing();
    if missing.is_empty() || files::holder(state, UP_LOCK).is_some() {
        return Ok(());
    }
    // Their logs could not tell either.
    files::try_writing(state.path()).map_err(|error| Fault::cannot_write(state.path(), &error))?;
    let logs = state.path().join("logs");
    app.screen.note(&format!("starting {} (logs: {})", missing.join(", "), logs.display()));
    settle_config(app, state).map_err(|error| Fault::cannot_write(state.path(), &error))?;
    let recipe = Recipe { state, config: app.config_path.as_deref(), detached: true, rotate: true };
    let mut started = Vec::new();
    for daemon in missing {
        let child = recipe
            .command(daemon)
            .and_then(|mut command| command.spawn())
            .with_context(|| format!("failed to start {daemon}"))
            .map_err(fault)?;
        started.push((daemon, child));
    }
    for (daemon, child) in &mut started {
        healthy(state, daemon, child, deadline).await?;
    }
    Ok(())
}

/// Waits until no other command is starting daemons, and keeps others from it.
pub(crate) async fn only_one(state: &StateDir) -> Result<files::Lock, Fault> {
    let deadline = Instant::now() + STARTING + STARTING;
    loop {
        let taken = files::Lock::take(state, START_LOCK).map_err(|error| Fault::cannot_write(state.path(), &error))?;
        match taken {
            Some(lock) => return Ok(lock),
            None if Instant::now() >= deadline => {
                return Err(Fault::failed("another command has been starting the daemons for too long")
                    .hint(format!("look at {}", state.path().join("logs").display())));
            }
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Daemons of the login side that do not run.
pub(crate) fn missing(state: &StateDir) -> Vec<&'static str> {
    daemons::LOGIN_SIDE.iter().copied().filter(|name| address_book::read(state, name).is_none()).collect()
}

/// Waits until a daemon that was just started answers.
pub(crate) async fn healthy(state: &StateDir, daemon: &str, child: &mut Child, deadline: Instant) -> Result<(), Fault> {
    let mut why = "it does not listen yet".to_owned();
    loop {
        if let Some(entry) = address_book::read(state, daemon) {
            match probe::healthz(&entry.listen).await {
                Ok(()) => return Ok(()),
                Err(reason) => why = reason,
            }
        } else if let Ok(Some(status)) = child.try_wait() {
            return Err(did_not_start(state, daemon, status));
        }
        if Instant::now() >= deadline {
            let log = files::log_path(state, daemon);
            return Err(Fault::new(Exit::Unreachable, format!("{daemon} was started but does not answer: {why}"))
                .hint(format!("its log is {}", log.display())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A daemon ended instead of serving: its own words say why.
pub(crate) fn did_not_start(state: &StateDir, daemon: &str, status: std::process::ExitStatus) -> Fault {
    let log = files::log_path(state, daemon);
    let exit = if status.code() == Some(Exit::BadConfig as i32) { Exit::BadConfig } else { Exit::Unreachable };
    let said = last_words(&files::tail(&log, 20));
    let said = if said.is_empty() { status.to_string() } else { said };
    Fault::new(exit, format!("{daemon} did not start: {said}")).hint(format!("its log is {}", log.display()))
}

/// Remembers which configuration the daemons get. When some run already, a `--config` that they do not have changes
/// nothing for them, which is better said than wondered about.
pub(crate) fn settle_config(app: &App, state: &StateDir) -> std::io::Result<()> {
    let file = state.path().join(STARTED_WITH);
    let mine = app.config_path.as_deref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    if address_book::read(state, daemons::ROUTER).is_none() {
        state.join("run")?;
        return std::fs::write(file, mine);
    }
    tell_other_config(app, &file, &mine, "the daemons already run", "stop them first");
    Ok(())
}

/// What runs was started with another configuration, as this file remembers. Whoever started it otherwise knows why.
pub(crate) fn tell_other_config(app: &App, remembered: &Path, mine: &str, what: &str, advice: &str) {
    let Ok(theirs) = std::fs::read_to_string(remembered) else { return };
    if !mine.is_empty() && mine != theirs {
        let theirs = if theirs.is_empty() { "the default configuration" } else { &theirs };
        app.screen.note(&format!("{what} with {theirs}; to use {mine} {advice}: drover down"));
    }
}

/// What a daemon said when it gave up. Lines of its log begin with a time or, in JSON, with a brace.
fn last_words(log: &str) -> String {
    let is_log = |line: &str| line.starts_with(|first: char| first.is_ascii_digit() || first == '{');
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let words: Vec<&str> = lines.iter().copied().filter(|line| !is_log(line)).collect();
    if words.is_empty() { lines.last().copied().unwrap_or_default().to_owned() } else { words.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_daemon_are_not_its_log() {
        let log = "2026-11-21T07:21:08Z  INFO starting router\nrouter failed: port taken by python3 (pid 7)\n";
        assert_eq!(last_words(log), "router failed: port taken by python3 (pid 7)");
        assert_eq!(last_words("2026-11-21T07:21:08Z ERROR cannot go on\n"), "2026-11-21T07:21:08Z ERROR cannot go on");
        assert_eq!(last_words(""), "");
    }
}
