//! `drover demo`: the quick start on this machine, played for real in a state directory of its own, and checked.

mod analyses;
mod leftovers;
mod session;
mod tour;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use drover_config::HumanDuration;
use drover_service::StateDir;
use drover_types::AgentKind;
use serde_json::json;

use crate::app::App;
use crate::args::Demo;
use crate::codex;
use crate::fault::{Exit, Fault};
use crate::render::colour::Tone;
use crate::render::table::{Cell, Table};
use crate::render::words;
use tour::Tour;

/// The demo takes 30 seconds at most, whatever agent it shows; this leaves time for tidying up.
const LIMIT: Duration = Duration::from_secs(26);
/// Of which codex has so much, when nobody asked for it by name: the rest is enough for the built-in agent.
const CODEX_SHARE: Duration = Duration::from_secs(16);
/// Who asks for codex by name may have a model that thinks for long; at some point it is not coming any more.
const LIMIT_BY_NAME: Duration = Duration::from_mins(3);

/// What one step of the tour showed.
#[derive(Debug)]
struct Row {
    step: &'static str,
    seen: String,
    micros: u64,
    ok: bool,
}

pub(super) async fn run(app: &App, args: Demo) -> anyhow::Result<Exit> {
    if app.global.router.is_some() {
        return Err(Fault::usage("`demo` runs a router of its own; it cannot be given --router")
            .hint("leave out --router; the demo needs nothing that runs already")
            .into());
    }
    let began = Instant::now();
    let agent = choose(app, args.agent.as_deref()).await;
    let place =
        tempfile::Builder::new().prefix("drover-demo-").tempdir().context("cannot make a directory for the demo")?;
    let state = StateDir::open(place.path())?;
    let asked = args.limit.map(|HumanDuration(limit)| limit);
    let limit = asked.unwrap_or(LIMIT);
    let slack = limit.div_duration_f64(LIMIT).max(1.0);
    let mut tour = Tour::new(app, state.clone(), args.nodes, &agent, began, slack)?;
    let first_limit = match (agent.name, agent.may_fall_back) {
        (_, true) => CODEX_SHARE.mul_f64(slack).min(limit),
        (name, _) if name == AgentKind::Codex.as_str() => asked.unwrap_or(LIMIT_BY_NAME),
        _ => limit,
    };
    let mut outcome = play(app, &mut tour, began + first_limit).await;
    if let (Err(error), true, false) = (&outcome, agent.may_fall_back, app.stop.is_cancelled()) {
        app.screen.note(&format!("codex is there, but {error:#}; showing the built-in echo agent instead"));
        tour.use_echo().await;
        outcome = play(app, &mut tour, began + limit).await;
    }
    // What follows happens also after a failure and after Ctrl-C: nothing of the demo stays behind.
    tour.clean_up().await;
    let rows = tour.into_rows();
    let stubborn = leftovers::end_all(state.path(), leftovers::PATIENCE.mul_f64(slack)).await;
    if let Err(error) = place.close() {
        app.screen.note(&format!("could not remove {}: {error}", state.path().display()));
    }
    let ok = outcome.is_ok() && stubborn == 0 && rows.iter().all(|row| row.ok);
    show(app, &rows, ok)?;
    if stubborn > 0 {
        app.screen.note(&format!("{} had to be killed", words::count(stubborn, "process that stayed behind")));
    }
    outcome?;
    if ok {
        return Ok(Exit::Done);
    }
    Err(Fault::failed("not everything was as expected; see the table")
        .hint("`drover doctor` looks at this machine")
        .into())
}

/// Which agent is shown.
struct Chosen {
    name: &'static str,
    /// Nobody asked for it by name, so another may take its place.
    may_fall_back: bool,
}

async fn choose(app: &App, asked: Option<&str>) -> Chosen {
    if let Some(agent) = AgentKind::ALL.iter().find(|agent| Some(agent.as_str()) == asked) {
        return Chosen { name: agent.as_str(), may_fall_back: false };
    }
    let ready = match codex::find(&app.config.worker) {
        Ok(bin) => codex::usable(&app.config.worker, &bin).await,
        Err(failure) => Err(failure),
    };
    match ready {
        Ok(()) => Chosen { name: AgentKind::Codex.as_str(), may_fall_back: true },
        Err(failure) => {
            app.screen.note(&format!("codex is not ready here ({}); showing the built-in echo agent", failure.message));
            Chosen { name: AgentKind::Echo.as_str(), may_fall_back: false }
        }
    }
}

async fn play(app: &App, tour: &mut Tour, deadline: Instant) -> anyhow::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    tokio::select! {
        played = tokio::time::timeout(left, tour.play()) => match played {
            Ok(result) => result,
            Err(_) => Err(Fault::failed(format!("the tour was not over after {} s", left.as_secs())).into()),
        },
        () = app.stop.cancelled() => Err(Fault::failed("stopped before its end; everything it started is gone").into()),
    }
}

fn show(app: &App, rows: &[Row], ok: bool) -> anyhow::Result<()> {
    if app.global.json {
        let steps: Vec<_> = rows
            .iter()
            .map(|row| json!({"step": row.step, "ok": row.ok, "seen": row.seen, "seconds": row.micros as f64 / 1e6}))
            .collect();
        app.screen.out(&json!({"ok": ok, "steps": steps}).to_string())?;
        return Ok(());
    }
    app.screen.out("")?;
    let mut table = Table::new(&["", "STEP", ">TIME", "SEEN"]);
    for row in rows {
        let mark = if row.ok { Cell::toned("ok", Tone::Good) } else { Cell::toned("FAIL", Tone::Bad) };
        table.row(vec![mark, row.step.into(), words::took(row.micros).into(), row.seen.clone().into()]);
    }
    app.screen.table(&table)?;
    Ok(())
}
