//! `drover down`: ends the daemons of the state directory. Swarms go on.

use std::time::{Duration, Instant};

use drover_proto::router as pb;
use drover_service::process::{self, ProcessId};
use drover_service::{StateDir, Target, address_book};
use rustix::process::Signal;
use serde_json::json;

use crate::app::App;
use crate::client;
use crate::daemons::{DISPATCHER, LOGIN_SIDE, ROUTER};
use crate::fault::{Exit, Fault};
use crate::render::words;
use crate::supervise::signal;
use crate::{files, start};

/// How long they may take to end in order; the daemons give themselves less.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long an `up` may take: it ends the swarm that it launched first.
const PATIENCE_WITH_UP: Duration = Duration::from_mins(1);
/// How long the router is asked for its swarms. It may hang, which can be why it is to end.
const ASKING: Duration = Duration::from_secs(2);

/// A process that is to end.
#[derive(Debug, Clone, Copy)]
struct Doomed {
    name: &'static str,
    id: ProcessId,
}

pub(super) async fn run(app: &App) -> anyhow::Result<Exit> {
    if app.global.router.is_some() {
        return Err(Fault::usage(
            "`down` ends the daemons of this host's state directory; it cannot be given --router",
        )
        .hint("run it on the host where that router runs")
        .into());
    }
    let state = app.state()?;
    if let Some(entry) = elsewhere(&state) {
        return Err(Fault::failed(format!(
            "{} runs on {} (pid {}), not on this host",
            entry.name, entry.host, entry.pid
        ))
        .hint(format!("run `drover down` on {}", entry.host))
        .into());
    }
    let up = files::holder(&state, start::UP_LOCK).and_then(process::of).map(|id| Doomed { name: "up", id });
    // Without an `up`, nobody else may start what is being ended.
    let _lock = if up.is_none() { Some(start::only_one(&state).await?) } else { None };
    let daemons = running(&state);
    let ends_too = up.and_then(|_| files::swarm_of_holder(&state, start::UP_LOCK));
    let going_on = swarms(app, &state, ends_too.as_deref()).await;

    // An `up` ends its daemons itself; it would start again what is ended behind its back.
    let told = up.map_or_else(|| daemons.clone(), |up| vec![up]);
    for doomed in &told {
        signal(doomed.id, Signal::TERM);
    }
    let patience = if up.is_some() { PATIENCE_WITH_UP } else { PATIENCE };
    let all: Vec<Doomed> = up.into_iter().chain(daemons.iter().copied()).collect();
    let stubborn = wait(&all, patience).await;
    for doomed in &stubborn {
        signal(doomed.id, Signal::KILL);
    }
    report(app, &all, &stubborn, going_on)?;
    Ok(Exit::Done)
}

fn elsewhere(state: &StateDir) -> Option<address_book::Entry> {
    let here = process::hostname();
    LOGIN_SIDE.iter().filter_map(|name| address_book::read(state, name)).find(|entry| entry.host != here)
}

/// What runs, the router first: it tells its clients, and needs the others to the end.
fn running(state: &StateDir) -> Vec<Doomed> {
    let entry = |name: &&'static str| {
        let entry = address_book::read(state, name)?;
        Some(Doomed { name, id: ProcessId { pid: entry.pid, start_time: entry.start_time } })
    };
    LOGIN_SIDE.iter().rev().chain(&[DISPATCHER]).filter_map(entry).collect()
}

/// How many swarms go on beside the one that ends too; `None` when the router does not say.
async fn swarms(app: &App, state: &StateDir, ends_too: Option<&str>) -> Option<usize> {
    let mut rpc =
        client::rpc(Target::Daemon { state: state.clone(), name: ROUTER.to_owned() }, client::token(&app.config).ok()?);
    let asked = tokio::time::timeout(ASKING, rpc.list_swarms(pb::ListSwarmsRequest {})).await;
    let swarms = asked.ok()?.ok()?.into_inner().swarms;
    let goes_on = |swarm: &&pb::Swarm| {
        !matches!(swarm.status.as_str(), "terminated" | "failed") && Some(swarm.swarm_id.as_str()) != ends_too
    };
    Some(swarms.iter().filter(goes_on).count())
}

/// Waits for the end of all of them; those that stay are returned.
async fn wait(doomed: &[Doomed], patience: Duration) -> Vec<Doomed> {
    let deadline = Instant::now() + patience;
    loop {
        let left: Vec<Doomed> = doomed.iter().filter(|doomed| process::is_alive(&doomed.id)).copied().collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn report(app: &App, all: &[Doomed], killed: &[Doomed], going_on: Option<usize>) -> anyhow::Result<()> {
    let was_killed = |one: &Doomed| killed.iter().any(|other| other.id == one.id);
    if app.global.json {
        let stopped: Vec<_> =
            all.iter().map(|one| json!({"name": one.name, "pid": one.id.pid, "killed": was_killed(one)})).collect();
        app.screen.out(&json!({"stopped": stopped, "swarms": going_on}).to_string())?;
        return Ok(());
    }
    if all.is_empty() {
        app.screen.note("no daemon runs here");
        return Ok(());
    }
    for one in all {
        let how = if was_killed(one) { "did not end in time and was killed" } else { "stopped" };
        app.screen.out(&format!("{} (pid {}) {how}", one.name, one.id.pid))?;
    }
    let swarms = match going_on {
        Some(0) => return Ok(()),
        Some(1) => "1 swarm goes on without them".to_owned(),
        Some(count) => format!("{} go on without them", words::count(count, "swarm")),
        None => "swarms go on without them".to_owned(),
    };
    app.screen.note(&format!("{swarms}; the next command starts them again"));
    Ok(())
}
