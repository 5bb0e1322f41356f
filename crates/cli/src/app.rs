//! From the arguments to an exit code: what all commands share.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use clap::Parser as _;
use drover_config::Config;
use drover_service::{StateDir, StateDirError};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::args::{Cli, Command, Global};
use crate::fault::{Exit, Fault};
use crate::render::screen::Screen;
use crate::{commands, daemons};

/// What a command is handed.
#[derive(Debug, Clone)]
pub(crate) struct App {
    /// Flags that every command takes.
    pub(crate) global: Global,
    /// The configuration in force.
    pub(crate) config: Config,
    /// Where it came from, in words.
    pub(crate) config_source: String,
    /// `--config`, made absolute: daemons may run in another directory.
    pub(crate) config_path: Option<PathBuf>,
    /// A state directory of this command's own, instead of the one that the environment names.
    pub(crate) own_state: Option<StateDir>,
    /// Where it prints.
    pub(crate) screen: Screen,
    /// Cancelled by the first Ctrl-C or SIGTERM.
    pub(crate) stop: CancellationToken,
    /// How many streams have lost the router: a person is told once.
    pub(crate) lost: Arc<AtomicU32>,
}

impl App {
    /// The state directory, made when it is missing.
    pub(crate) fn state(&self) -> Result<StateDir, Fault> {
        if let Some(state) = &self.own_state {
            return Ok(state.clone());
        }
        StateDir::from_env().map_err(|error| match error {
            StateDirError::Io { path, source } => {
                Fault::failed(format!("cannot use state directory {}: {source}", path.display())).hint(
                    "make it writable, or choose another with DROVER_STATE_DIR; `drover doctor` looks more closely",
                )
            }
            other => Fault::failed(other.to_string()).hint("`drover doctor` looks at it more closely"),
        })
    }

    /// Whether this command may start daemons that are not running.
    pub(crate) fn may_start(&self) -> bool {
        self.global.router.is_none() && !self.global.no_start
    }
}

/// Parses the command line and carries it out.
pub(crate) fn run(args: Vec<OsString>) -> ExitCode {
    let wants_json = args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) if wants_json && error.use_stderr() => {
            return ExitCode::from(report(&Screen::new(true), true, &misspelt(&error).into()) as u8);
        }
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    let screen = Screen::new(cli.global.json);
    let json = cli.global.json;
    let result = match cli.command {
        Command::Daemon(daemon) => match daemons::find(&daemon.name) {
            Some(linked) => {
                let config = cli.global.config.into_iter().flat_map(|path| ["--config".into(), path.into_os_string()]);
                return linked.run(config.chain(daemon.args).collect());
            }
            None => Err(unknown_daemon(&daemon.name).into()),
        },
        Command::Completions(completions) => screen
            .out(crate::completions::script(completions.shell).trim_end())
            .map(|()| Exit::Done)
            .map_err(Into::into),
        Command::Manual(manual) => crate::manual::write(&manual.dir)
            .map(|()| Exit::Done)
            .map_err(|error| Fault::failed(format!("cannot write to {}: {error}", manual.dir.display())).into()),
        Command::Connect(connect) => commands::connect::run(connect.addr).map_err(Into::into),
        command => on_runtime(cli.global, command, &screen),
    };
    let exit = result.unwrap_or_else(|error| report(&screen, json, &error));
    ExitCode::from(exit as u8)
}

/// A command line that makes no sense, as a script is told.
fn misspelt(error: &clap::Error) -> Fault {
    let text = error.to_string();
    let what = text.split("\n\n").next().unwrap_or_default().trim().trim_start_matches("error: ");
    let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
    Fault::usage(what).hint("look at the help: drover --help, drover help COMMAND")
}

fn unknown_daemon(name: &str) -> Fault {
    let names: Vec<&str> = daemons::ALL.iter().map(|daemon| daemon.name).collect();
    Fault::usage(format!("there is no daemon {name:?}")).hint(format!("the daemons are: {}", names.join(", ")))
}

fn on_runtime(global: Global, command: Command, screen: &Screen) -> anyhow::Result<Exit> {
    let loaded = load_config(&global, &command)?;
    let config_path = global.config.as_deref().map(std::path::absolute).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        let app = App {
            config: loaded.config,
            config_source: loaded.source,
            config_path,
            global,
            own_state: None,
            screen: screen.clone(),
            stop: CancellationToken::new(),
            lost: Arc::default(),
        };
        let tasks = TaskTracker::new();
        let told_twice = watch_signals(&tasks, &app.stop)?;
        let tidies_up = command.tidies_up();
        tokio::select! {
            result = commands::run(&app, command) => result,
            () = told_twice.cancelled() => Ok(Exit::Failed),
            () = app.stop.cancelled(), if !tidies_up => Ok(Exit::Failed),
        }
    });
    // A look-up on a dead network file system must not hold the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

/// The configuration in force, and where it came from.
struct InForce {
    config: Config,
    source: String,
}

fn load_config(global: &Global, command: &Command) -> Result<InForce, Fault> {
    // `doctor` reports a broken file as one of its findings. Another machine's router has its own configuration.
    let elsewhere = global.router.is_some() && global.config.is_none();
    // On a login host the files that lie about are not for what another host asks there.
    if elsewhere || matches!(command, Command::Doctor(_) | Command::Site(_)) {
        return Ok(InForce { config: Config::default(), source: "built in".to_owned() });
    }
    match drover_config::load(global.config.as_deref()) {
        Ok(loaded) => Ok(InForce { config: loaded.config, source: loaded.source.to_string() }),
        Err(error) => Err(Fault::new(Exit::BadConfig, error.to_string())
            .hint("`drover daemon router --check-config` checks a file, `--dump-config` prints what is in force")),
    }
}

/// The first signal asks for an orderly end, the second ends at once.
fn watch_signals(tasks: &TaskTracker, stop: &CancellationToken) -> io::Result<CancellationToken> {
    let at_once = CancellationToken::new();
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    if !ignores_hangup() {
        kinds.push(SignalKind::hangup());
    }
    for kind in kinds {
        let mut signals = signal(kind)?;
        let (stop, at_once) = (stop.clone(), at_once.clone());
        tasks.spawn(async move {
            while signals.recv().await.is_some() {
                if stop.is_cancelled() {
                    at_once.cancel();
                }
                stop.cancel();
            }
        });
    }
    Ok(at_once)
}

/// Started by `nohup`: a hang-up is to be survived.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// Says what went wrong, for people or for scripts, and chooses the exit code.
fn report(screen: &Screen, json: bool, error: &anyhow::Error) -> Exit {
    let of_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(of_pipe) {
        // Whoever read our output has seen enough.
        return Exit::Done;
    }
    let fault = match error.downcast_ref::<Fault>() {
        Some(fault) => fault.clone(),
        None => Fault::failed(format!("{error:#}")),
    };
    if json {
        let code = fault.code.map(drover_types::ErrorCode::as_str);
        let document = json!({"error": {"code": code, "message": fault.message, "hint": fault.hint}});
        screen.raw_error(&format!("{document}\n"));
    } else {
        screen.complain(&fault.message, &fault.hint);
    }
    fault.exit
}

/// This program's own file, for starting daemons from it.
pub(crate) fn own_file() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    // A file that was replaced while we run is shown with this mark; its successor is the one to start.
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map(PathBuf::from).filter(|fresh| Path::new(fresh).exists()).unwrap_or(path))
}
