//! `drover up`: all daemons in the foreground, kept alive until Ctrl-C.

use std::time::Duration;

use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_service::{StateDir, address_book};
use serde_json::json;

use super::{launch, terminate};
use crate::app::App;
use crate::args::Up;
use crate::client::{Client, unary};
use crate::daemons::{self, LOGIN_SIDE};
use crate::fault::{Exit, Fault};
use crate::files::{self, Lock};
use crate::render::table::Table;
use crate::render::words;
use crate::start;
use crate::supervise::{Notice, Supervisor};

/// How long the end of the launched swarm is waited for.
const SWARM_END: Duration = Duration::from_secs(30);

pub(super) async fn run(app: &App, args: Up) -> anyhow::Result<Exit> {
    if app.global.router.is_some() {
        return Err(Fault::usage("`up` runs a router of its own; it cannot be given --router")
            .hint("leave out --router; DROVER_STATE_DIR says which instance is meant")
            .into());
    }
    let state = app.state()?;
    let mut lock = alone(&state)?;
    let starting = tokio::select! {
        starting = start::only_one(&state) => starting?,
        () = app.stop.cancelled() => return Ok(Exit::Done),
    };
    start::settle_config(app, &state)?;
    let names = daemons::standing(&app.config);
    let mut daemons = Supervisor::start(&state, app.config_path.as_deref(), &names);
    let healthy = tokio::select! {
        healthy = daemons.healthy(&names) => healthy,
        () = app.stop.cancelled() => Ok(()),
    };
    drop(starting);
    let result = match healthy {
        Ok(()) => serve(app, &state, &mut lock, &mut daemons, args).await,
        Err(fault) => Err(fault.into()),
    };
    app.screen.note("stopping the daemons");
    for daemon in daemons.stop().await {
        app.screen.note(&format!("{daemon} did not end in time and was killed"));
    }
    result
}

/// One `up` per state directory.
fn alone(state: &StateDir) -> Result<Lock, Fault> {
    let cannot = |error: std::io::Error| Fault::cannot_write(state.path(), &error);
    files::try_writing(state.path()).map_err(cannot)?;
    let Some(mut lock) = Lock::take(state, start::UP_LOCK).map_err(cannot)? else {
        let pid = files::holder(state, start::UP_LOCK).unwrap_or(0);
        return Err(Fault::failed(format!(
            "`drover up` already runs with state directory {} (pid {pid})",
            state.path().display()
        ))
        .hint("stop it (`drover down`), or choose another state directory with DROVER_STATE_DIR"));
    };
    lock.sign("").map_err(cannot)?;
    Ok(lock)
}

async fn serve(
    app: &App,
    state: &StateDir,
    lock: &mut Lock,
    daemons: &mut Supervisor,
    args: Up,
) -> anyhow::Result<Exit> {
    if app.stop.is_cancelled() {
        return Ok(Exit::Done);
    }
    let mut client = Client::connect(app).await?;
    wait_for_peers(app, &mut client).await;
    let launched = match args.nodes {
        Some(nodes) => {
            let spec = LaunchSpec {
                node_count: nodes,
                agent: args.agent.unwrap_or_default(),
                system_prompt: args.prompt.unwrap_or_default(),
                provider: local_provider(&mut client).await?,
                ..Default::default()
            };
            launch::launch(app, &mut client, spec).await?
        }
        None => None,
    };
    if let Some(swarm) = &launched {
        // Only for the words of `down`; without them nothing is wrong.
        let _ = lock.sign(&swarm.swarm_id);
    }
    show(app, state, launched.as_ref())?;
    let result = watch_over(app, daemons).await;
    if let Some(swarm) = launched {
        app.screen.note(&format!("terminating swarm {}, which this command launched", swarm.swarm_id));
        let ending = terminate::terminate(app, &client, &swarm.swarm_id, false);
        match tokio::time::timeout(SWARM_END, ending).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => app.screen.note(&format!("swarm {} was not terminated: {error:#}", swarm.swarm_id)),
            Err(_) => app.screen.note(&format!("swarm {} takes too long to end; it goes on ending", swarm.swarm_id)),
        }
    }
    result
}

/// The router is of use when it has found the other two.
async fn wait_for_peers(app: &App, client: &mut Client) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        let missing = match unary(client.rpc.get_info(pb::GetInfoRequest {})).await {
            Ok(info) => {
                [info.allocator_error, info.follower_error, info.store_error].into_iter().find(|why| !why.is_empty())
            }
            Err(fault) => Some(fault.message),
        };
        let Some(why) = missing else { return };
        if tokio::time::Instant::now() >= deadline || app.stop.is_cancelled() {
            app.screen.note(&format!("not everything is well yet: {why} (`drover doctor` says more)"));
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `--nodes` means nodes on this machine, whatever stands first in the catalogue.
async fn local_provider(client: &mut Client) -> Result<String, Fault> {
    let catalogue = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await?.providers;
    catalogue.into_iter().find(|provider| provider.backend == "local").map(|provider| provider.id).ok_or_else(|| {
        Fault::failed("the catalogue has no local provider for --nodes")
            .hint("leave out --nodes, or add a provider with backend `local` to the configuration")
    })
}

fn show(app: &App, state: &StateDir, swarm: Option<&pb::Swarm>) -> anyhow::Result<()> {
    let entries: Vec<_> = LOGIN_SIDE.iter().filter_map(|name| address_book::read(state, name)).collect();
    if app.global.json {
        let daemons: Vec<_> = entries
            .iter()
            .map(|entry| {
                let log = files::log_path(state, &entry.name);
                json!({"name": entry.name, "pid": entry.pid, "listen": entry.listen, "control": entry.control, "log": log})
            })
            .collect();
        let swarm_id = swarm.map(|swarm| swarm.swarm_id.as_str());
        app.screen.out(&json!({"state_dir": state.path(), "daemons": daemons, "swarm_id": swarm_id}).to_string())?;
        return Ok(());
    }
    let mut table = Table::new(&["DAEMON", ">PID", "ADDRESS", ""]);
    for entry in &entries {
        table.row(vec![
            entry.name.clone().into(),
            entry.pid.to_string().into(),
            entry.listen.clone().into(),
            "".into(),
        ]);
        if let Some(control) = &entry.control {
            table.row(vec!["".into(), "".into(), control.clone().into(), "JSON lines".into()]);
        }
    }
    app.screen.table(&table)?;
    app.screen.out(&format!("logs: {}", state.path().join("logs").display()))?;
    if let Some(swarm) = swarm {
        let nodes = words::count(swarm.node_count as usize, "node");
        app.screen
            .out(&format!("swarm {} is {} with {nodes}; it ends with this command", swarm.swarm_id, swarm.status))?;
    }
    let others = if swarm.is_some() { "other swarms" } else { "swarms" };
    app.screen.note(&format!("everything runs; Ctrl-C stops the daemons, {others} go on without them"));
    Ok(())
}

/// Says what happens to the daemons until the person stops them.
async fn watch_over(app: &App, daemons: &mut Supervisor) -> anyhow::Result<Exit> {
    loop {
        let notice = tokio::select! {
            () = app.stop.cancelled() => return Ok(Exit::Done),
            notice = daemons.notice() => notice,
        };
        match notice {
            Some(Notice::TakenOver { daemon, pid }) => {
                app.screen.note(&format!("{daemon} runs already (pid {pid}); taking it over"));
            }
            Some(Notice::Died { daemon, how, again_in }) => {
                let again = words::took(again_in.as_micros() as u64);
                app.screen.note(&format!("{daemon} died ({how}); starting it again in {again}"));
            }
            Some(Notice::Restarted { daemon, pid }) => app.screen.note(&format!("{daemon} runs again (pid {pid})")),
            Some(Notice::Killed { daemon }) => app.screen.note(&format!("{daemon} was killed")),
            Some(Notice::GaveUp { fault }) => return Err(fault.into()),
            None => return Err(Fault::failed("no daemon is watched any more").into()),
        }
    }
}
