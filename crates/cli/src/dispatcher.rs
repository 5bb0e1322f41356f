//! The connection to the dispatcher, which is started when a command needs it.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use drover_config::Env;
use drover_dispatcher::Configured;
use drover_proto::dispatch::dispatch_service_client::DispatchServiceClient;
use drover_service::{MAX_MESSAGE_BYTES, StateDir, Target, address_book, process};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::app::App;
use crate::daemons::DISPATCHER;
use crate::fault::{Exit, Fault};
use crate::start::{self, Recipe};

/// The configuration of dispatching that is in force: drover's own, or the one that `drover setup` wrote.
pub(crate) fn configured(app: &App) -> Result<Configured, Fault> {
    Configured::of(&app.config, Some(Path::new(&app.config_source)), &Env::of_process()).map_err(|error| {
        Fault::new(Exit::BadConfig, error.to_string())
            .hint("correct the file, or write a new one: drover setup --force")
    })
}

/// The generated client, over a channel that finds a restarted dispatcher again.
pub(crate) type Rpc = DispatchServiceClient<Channel>;

/// How long a single answer is waited for.
const ANSWER: Duration = Duration::from_secs(30);
/// Which `--config` the running dispatcher was started with.
const STARTED_WITH: &str = "run/dispatcher-started-with";

/// The client of a state directory, not connected yet.
pub(crate) fn rpc(state: &StateDir) -> Rpc {
    let target = Target::Daemon { state: state.clone(), name: DISPATCHER.to_owned() };
    DispatchServiceClient::new(drover_service::connect(target))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Starts the dispatcher when it does not run, unless that is not wanted.
pub(crate) async fn connect(app: &App) -> Result<Rpc, Fault> {
    if app.global.router.is_some() {
        return Err(Fault::usage("the dispatcher is the one of this host's state directory, not that of a --router")
            .hint("leave out --router, or run the command on that host"));
    }
    let state = app.state()?;
    if let Some(entry) = address_book::read(&state, DISPATCHER) {
        if entry.host != process::hostname() {
            let message = format!("the dispatcher of {} runs on {}", state.path().display(), entry.host);
            return Err(Fault::new(Exit::Unreachable, message)
                .hint(format!("work on {}, or set another DROVER_STATE_DIR", entry.host)));
        }
        tell_other_config(app, &state);
    } else if app.may_start() {
        start(app, &state).await?;
    } else {
        return Err(Fault::new(Exit::Unreachable, "the dispatcher does not run")
            .hint("leave out --no-start, or start it: drover daemon llm-dispatcher"));
    }
    Ok(rpc(&state))
}

async fn start(app: &App, state: &StateDir) -> Result<(), Fault> {
    let deadline = Instant::now() + start::STARTING;
    let _lock = start::only_one(state).await?;
    if address_book::read(state, DISPATCHER).is_some() {
        return Ok(());
    }
    let no_start = |error: anyhow::Error| {
        Fault::failed(format!("cannot start the dispatcher: {error:#}")).hint("`drover doctor` says more")
    };
    app.screen.progress(&format!("starting {DISPATCHER} (logs: {})", state.path().join("logs").display()));
    let remembered = state.join("run").and_then(|_| std::fs::write(state.path().join(STARTED_WITH), my_config(app)));
    remembered.map_err(|error| Fault::cannot_write(state.path(), &error))?;
    let recipe = Recipe { state, config: app.config_path.as_deref(), detached: true, rotate: true };
    let mut child = recipe
        .command(DISPATCHER)
        .and_then(|mut command| command.spawn())
        .context("failed to start the process")
        .map_err(no_start)?;
    start::healthy(state, DISPATCHER, &mut child, deadline).await
}

fn my_config(app: &App) -> String {
    app.config_path.as_deref().map(Path::to_string_lossy).unwrap_or_default().into_owned()
}

/// A `--config` changes nothing for a dispatcher that runs already, which is better said than wondered about.
fn tell_other_config(app: &App, state: &StateDir) {
    let remembered = state.path().join(STARTED_WITH);
    start::tell_other_config(app, &remembered, &my_config(app), "the dispatcher already runs", "stop it first");
}

/// One answer to one question.
pub(crate) async fn unary<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(of_status(&status)),
        Err(_) => Err(unreachable(&format!("no answer within {} s", ANSWER.as_secs()))),
    }
}

/// A failed call, where the one who failed is the dispatcher.
pub(crate) fn of_status(status: &tonic::Status) -> Fault {
    if crate::fault::lost(status) {
        return unreachable(&crate::fault::deepest(status));
    }
    Fault::of_status(status)
}

fn unreachable(why: &str) -> Fault {
    Fault::new(Exit::Unreachable, format!("cannot reach the dispatcher: {why}"))
        .hint("repeat the command, which starts it again; `drover doctor` says what is wrong")
}

/// An amount as people and scripts read it.
pub(crate) fn usd(pico: u64) -> f64 {
    pico as f64 / 1e12
}
