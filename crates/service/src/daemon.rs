//! From `main` to a running daemon and back.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::future::Future;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _};
use drover_config::Config;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::address_book;
use crate::context::Context;
use crate::heap;
use crate::lifeline;
use crate::notify;
use crate::state_dir::StateDir;
use crate::telemetry;

/// Exit codes, the same in every program of drover.
const FAILED: u8 = 1;
const BAD_CONFIG: u8 = 78;

/// A long-running program. The library does the work; `main` only calls [`main`].
pub trait Daemon: 'static {
    /// Its name: `router` is `drover-router` and `drover daemon router`.
    const NAME: &'static str;
    /// One line for `--help`.
    const ABOUT: &'static str;
    /// Flags beside those that every daemon has.
    type Args: clap::Args + Send + 'static;
    /// One thread runs everything: for a daemon that stands on every node and is to be small.
    const ONE_THREAD: bool = false;
    /// Heaps of the system's allocator. Threads come and go and free what others allocated: with a heap for each, memory grows for hours
    /// without being used.
    const HEAPS: i32 = 2;

    /// Name in the address book; more than one instance per state directory needs more than one name.
    fn instance(_args: &Self::Args) -> String {
        Self::NAME.to_owned()
    }

    /// How long an orderly end may take before the process exits all the same.
    fn grace(_config: &Config) -> Duration {
        Duration::from_secs(10)
    }

    /// Binds, then serves until the context says stop. Returning early with `Ok` ends the daemon in order.
    fn run(config: Arc<Config>, args: Self::Args, ctx: Context) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// For daemons without flags of their own.
#[derive(Debug, clap::Args)]
pub struct NoArgs {}

/// What every daemon takes.
#[derive(Debug, clap::Parser)]
#[command(version = drover_types::VERSION, after_help = "\
Environment:
  DROVER_STATE_DIR   state directory [default: $XDG_STATE_HOME/drover]
  DROVER_LOG         what to log, such as info or debug,h2=info
  DROVER_LOG_FORMAT  text or json")]
struct CommonArgs<A: clap::Args> {
    /// Configuration file (YAML or JSON). Without it: ./drover.yaml, the user's, the system's, the built-in one
    #[arg(long, value_name = "FILE", env = "DROVER_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Address for gRPC, /healthz and /metrics; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Read the configuration, say what is wrong with it, and exit: 0, or 78
    #[arg(long)]
    check_config: bool,
    /// Print the configuration in force, secrets masked, and exit
    #[arg(long)]
    dump_config: bool,
    #[command(flatten)]
    own: A,
}

/// The `main` of a daemon's own binary.
pub fn main<D: Daemon>() -> ExitCode {
    main_from::<D>(std::env::args_os().collect())
}

/// The `main` of a daemon inside another program; the first argument is the program's name.
pub fn main_from<D: Daemon>(args: Vec<OsString>) -> ExitCode {
    drover_memory::few_heaps(D::HEAPS);
    install_crypto();
    let parsed = command::<D>().try_get_matches_from(args).and_then(|matches| CommonArgs::from_arg_matches(&matches));
    let args: CommonArgs<D::Args> = match parsed {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let loaded = match drover_config::load(args.config.as_deref()) {
        Ok(loaded) => loaded,
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::from(BAD_CONFIG);
        }
    };
    if args.dump_config {
        return say(&loaded.config.dump());
    }
    if args.check_config {
        for warning in &loaded.warnings {
            complain(warning);
        }
        return say(&format!("{}: ok\n", loaded.source));
    }
    let mut builder = if D::ONE_THREAD {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    let code = runtime.block_on(start::<D>(loaded, args.listen, args.own));
    // Blocking calls that hang (a dead network file system) must not hold the exit.
    runtime.shutdown_timeout(Duration::from_millis(200));
    ExitCode::from(code)
}

/// The command line of a daemon.
pub fn command<D: Daemon>() -> clap::Command {
    CommonArgs::<D::Args>::command()
        .bin_name(format!("drover-{}", D::NAME))
        .display_name(format!("drover-{}", D::NAME))
        .about(D::ABOUT)
}

/// One crypto provider for the whole program.
pub(crate) fn install_crypto() {
    // A second call finds the provider installed, which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

async fn start<D: Daemon>(loaded: drover_config::Loaded, listen: Option<SocketAddr>, own: D::Args) -> u8 {
    let config = Arc::new(loaded.config);
    let _telemetry = match telemetry::init(D::NAME, &config.telemetry, "info") {
        Ok(telemetry) => telemetry,
        Err(error) => {
            complain(&format!("{error:#}"));
            return BAD_CONFIG;
        }
    };
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    let state = match StateDir::from_env() {
        Ok(state) => state,
        Err(error) => {
            complain(&with_causes(&error));
            return FAILED;
        }
    };
    let instance = D::instance(&own);
    let _lock = match state.lock(&instance) {
        Ok(Some(lock)) => lock,
        Ok(None) => {
            let holder = address_book::read(&state, &instance).map_or_else(String::new, |entry| {
                format!(": pid {} on {}, listening on {}", entry.pid, entry.host, entry.listen)
            });
            complain(&format!("{} already runs with state directory {}{holder}", instance, state.path().display()));
            return FAILED;
        }
        Err(error) => {
            complain(&format!("cannot lock state directory {}: {error}", state.path().display()));
            return FAILED;
        }
    };
    let ctx = Context::new(instance, state, &config.security, listen);
    if let Some(path) = loaded.source.path() {
        ctx.set_config_file(path);
    }
    info!(version = drover_types::VERSION, config = %loaded.source, pid = std::process::id(), "starting {}", D::NAME);
    let code = supervise::<D>(config, own, &ctx).await;
    ctx.unpublish();
    code
}

/// Runs the daemon until it ends, a signal asks it to, or one of its parts gives up.
async fn supervise<D: Daemon>(config: Arc<Config>, own: D::Args, ctx: &Context) -> u8 {
    let (mut term, mut int) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(term), Ok(int)) => (term, int),
        (Err(error), _) | (_, Err(error)) => {
            complain(&format!("cannot listen for signals: {error}"));
            return FAILED;
        }
    };
    let grace = D::grace(&config);
    heap::keep_small(ctx);
    let running = D::run(config, own, ctx.clone());
    tokio::pin!(running);
    let mut result = None;
    // Slurm and terminals signal a starter and what it started at the same time, and the end of the starter may be seen first:
    // the signal that follows is then still the first one.
    let mut signalled = false;
    tokio::select! {
        ended = &mut running => result = Some(ended),
        _ = term.recv() => { info!("SIGTERM: draining"); signalled = true; }
        _ = int.recv() => { info!("SIGINT: draining"); signalled = true; }
        () = lifeline::cut() => info!("whoever started this is gone: draining"),
        () = ctx.shutdown().cancelled() => {}
    }
    ctx.shutdown().cancel();
    notify::tell("STOPPING=1\nSTATUS=draining");
    let drain = async {
        if result.is_none() {
            result = Some(running.await);
        }
        ctx.tasks().wait().await;
    };
    let impatient = async {
        while tokio::select! { again = term.recv() => again, again = int.recv() => again }.is_some() {
            if std::mem::replace(&mut signalled, true) {
                break;
            }
        }
    };
    tokio::select! {
        () = drain => {}
        () = tokio::time::sleep(grace) => {
            error!(still_running = ctx.tasks().running(), "did not end within {}s", grace.as_secs());
            return FAILED;
        }
        () = impatient => { warn!("second signal: exiting at once"); return FAILED; }
    }
    match ctx.take_failure().map_or(result.unwrap_or(Ok(())), Err) {
        Ok(()) => {
            info!("stopped");
            0
        }
        Err(error) => {
            complain(&format!("{} failed: {error:#}", D::NAME));
            error.downcast_ref::<ExitWith>().map_or(FAILED, |exit| exit.code)
        }
    }
}

/// An error that chooses the exit code.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ExitWith {
    /// The exit code.
    pub code: u8,
    /// What went wrong.
    pub message: String,
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

fn say(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILED),
    }
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
