//! `drover dispatch`: many prompts at once, results as they finish.

mod input;
pub(super) mod progress;

use std::fmt::Write as _;

use drover_proto::dispatch::{self as pb, dispatch_request, dispatch_response};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::app::App;
use crate::args::Dispatch;
use crate::dispatcher::{self, usd};
use crate::fault::{Exit, Fault};
use crate::render::colour::Tone;
use crate::render::json as render;
use crate::render::table::{Cell, Table};

use progress::Progress;

/// Messages on their way to the dispatcher.
const SENDING: usize = 2;

pub(super) async fn run(app: &App, args: Dispatch) -> anyhow::Result<Exit> {
    if args.runs {
        return list(app).await;
    }
    // What cannot be read is said before a dispatcher is started for it.
    let given = match &args.file {
        Some(file) => {
            let source = input::name(file)?;
            Some((input::open(&source)?, source))
        }
        None => None,
    };
    let resumed = match (&given, &args.resume) {
        (None, None) => {
            return Err(Fault::usage("no file is given")
                .hint("drover dispatch prompts.txt, or - for standard input")
                .into());
        }
        (_, resumed) => resumed.as_deref().unwrap_or_default(),
    };
    let mut rpc = dispatcher::connect(app).await?;
    let (input, source) = if let Some(given) = given {
        given
    } else {
        let source = source_of(&mut rpc, resumed).await?;
        (input::open(&source)?, source)
    };
    let total = if app.screen.is_live() { input::count(&source) } else { None };

    let (send, sending) = mpsc::channel(SENDING);
    let open = pb::OpenRun {
        run_id: args.resume.clone().or(args.run.clone()).unwrap_or_default(),
        resume: args.resume.is_some(),
        concurrency: args.concurrency.unwrap_or(0),
        unordered: args.unordered,
        provider: args.provider.clone().unwrap_or_default(),
        model: args.model.clone().unwrap_or_default(),
        source: source.clone(),
        weight: 0,
        any_order: false,
    };
    let open = pb::DispatchRequest { request: Some(dispatch_request::Request::Open(open)) };
    // There is room: the queue is new.
    let _ = send.try_send(open);
    let answers = rpc.dispatch(ReceiverStream::new(sending)).await.map_err(|status| dispatcher::of_status(&status))?;
    let answers = answers.into_inner();
    let feeding = input::feed(input, send);
    let mut run =
        Run { app, source, name: String::new(), progress: Progress::new(app, total), failed: false, ended: false };
    let worked = async {
        // The dispatcher stops reading when it has enough on its hands, and then so do we.
        let listening = run.listen(answers, args.concurrency);
        tokio::pin!(listening);
        tokio::select! {
            // A run that ended early leaves its input alone, which may be a person who types.
            heard = &mut listening => return heard,
            fed = feeding => fed?,
        }
        listening.await
    };
    let result: anyhow::Result<()> = tokio::select! {
        result = worked => result,
        () = app.stop.cancelled() => Err(anyhow::anyhow!(Stopped)),
    };
    match result {
        Ok(()) if run.ended => Ok(if run.failed { Exit::Failed } else { Exit::Done }),
        Ok(()) => Err(run.broken(Fault::new(Exit::Unreachable, "the dispatcher went away")).into()),
        Err(error) if error.is::<Stopped>() => {
            // Dropping the stream breaks off what is under way.
            app.screen.note(&format!("stopped; {}", run.how_to_go_on()));
            Ok(Exit::Failed)
        }
        Err(error) => match error.downcast::<Fault>() {
            Ok(fault) => Err(run.broken(fault).into()),
            Err(other) => Err(other),
        },
    }
}

/// Ctrl-C.
#[derive(Debug, Clone, Copy)]
struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// The file that the run to resume began with.
async fn source_of(rpc: &mut dispatcher::Rpc, run: &str) -> Result<String, Fault> {
    let runs = dispatcher::unary(rpc.list_runs(pb::ListRunsRequest { most: u32::MAX })).await?.runs;
    let known = runs.into_iter().find(|known| known.run_id == run);
    match known.map(|known| known.source) {
        Some(source) if source.starts_with('/') => Ok(source),
        Some(_) => Err(Fault::usage(format!("run {run} read its tasks from standard input"))
            .hint(format!("give them again: drover dispatch - --resume {run}"))),
        None => Err(Fault::failed(format!("there is no run {run:?}")).hint("`drover dispatch --runs` lists them")),
    }
}

/// A run as this command follows it.
struct Run<'a> {
    app: &'a App,
    source: String,
    name: String,
    progress: Progress,
    failed: bool,
    ended: bool,
}

impl Run<'_> {
    async fn listen(&mut self, mut answers: Streaming<pb::DispatchResponse>, asked: Option<u32>) -> anyhow::Result<()> {
        loop {
            let response = match answers.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(()),
                Err(status) => return Err(dispatcher::of_status(&status).into()),
            };
            match response.response {
                Some(dispatch_response::Response::Opened(opened)) => self.opened(opened, asked),
                Some(dispatch_response::Response::Results(batch)) => {
                    for result in &batch.results {
                        self.failed |= result.status != "succeeded";
                        self.print(result)?;
                        self.progress.count(result);
                    }
                    self.progress.show(batch.open_tasks);
                }
                Some(dispatch_response::Response::Note(note)) => {
                    let hint = if note.hint.is_empty() { String::new() } else { format!(" ({})", note.hint) };
                    self.app.screen.note(&format!("{}{hint}", note.message));
                }
                Some(dispatch_response::Response::Summary(summary)) => {
                    self.ended = true;
                    self.sum_up(&summary)?;
                }
                None => {}
            }
        }
    }

    fn opened(&mut self, opened: pb::RunOpened, asked: Option<u32>) {
        let simulated = if opened.simulated { ", simulated" } else { "" };
        let mut said =
            format!("run {}: {}/{}{simulated}, {} at once", opened.run_id, opened.provider, opened.model, opened.width);
        if opened.answered > 0 {
            let _ = write!(said, ", {} answered before", opened.answered);
        }
        if let Some(asked) = asked.filter(|&asked| asked > opened.width) {
            let _ = write!(
                said,
                "; {asked} were asked for, node_scaling.limits (max_nodes, max_concurrent_api) allow no more"
            );
        }
        self.name = opened.run_id;
        self.app.screen.note(&said);
    }

    fn print(&self, result: &pb::TaskResult) -> std::io::Result<()> {
        if self.app.global.json {
            return self.app.screen.out(&result_json(result).to_string());
        }
        let paint = self.app.screen.paint();
        let id = paint.paint(Tone::Dim, &format!("{} |", result.id));
        if result.status == "succeeded" {
            let cut = if result.truncated { " [cut at max_tokens]" } else { "" };
            return self.app.screen.out(&format!("{id} {}{}", result.output, paint.paint(Tone::Dim, cut)));
        }
        let error = paint.paint(Tone::Bad, &format!("[{}: {}]", result.status, result.error));
        self.app.screen.out(&format!("{id} {error}"))
    }

    fn sum_up(&mut self, summary: &pb::RunSummary) -> std::io::Result<()> {
        self.progress.end();
        if self.app.global.json {
            return self.app.screen.out(&summary_json(&self.name, summary).to_string());
        }
        let mut said = format!("{} tasks: {} succeeded, {} failed", summary.tasks, summary.succeeded, summary.failed);
        if summary.resumed > 0 {
            let _ = write!(said, ", {} of them answered before and not paid again", summary.resumed);
        }
        if summary.cached > 0 {
            let _ = write!(said, ", {} of them from the cache", summary.cached);
        }
        let _ = write!(said, "; {:.2} s", summary.wall_ms as f64 / 1000.0);
        if summary.sequential_ms > 0 {
            let _ = write!(
                said,
                ", {:.1} times as fast as one after another ({:.2} s), {} at once at most",
                summary.speedup,
                summary.sequential_ms as f64 / 1000.0,
                summary.widest
            );
        }
        let _ = write!(said, "; {:.6} USD", usd(summary.cost_pico_usd));
        self.app.screen.note(&said);
        if summary.failed > 0 {
            self.app.screen.note(&format!("those that failed are tried again by: {}", self.resume_command()));
        }
        Ok(())
    }

    fn resume_command(&self) -> String {
        let file = if self.source.starts_with('/') { self.source.as_str() } else { "-" };
        format!("drover dispatch {file} --resume {}", self.name)
    }

    fn how_to_go_on(&self) -> String {
        if self.name.is_empty() {
            "nothing was begun".to_owned()
        } else {
            format!("what was answered is kept; go on with: {}", self.resume_command())
        }
    }

    /// The same fault with the way to go on, when something was begun.
    fn broken(&self, fault: Fault) -> Fault {
        if self.name.is_empty() || self.ended {
            return fault;
        }
        let hint = self.how_to_go_on();
        fault.hint(hint)
    }
}

/// A task's line for scripts.
fn result_json(result: &pb::TaskResult) -> Value {
    let given = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    let answered = matches!(result.status.as_str(), "succeeded" | "blocked");
    json!({
        "id": result.id,
        "status": result.status,
        "output": if answered { Value::from(result.output.as_str()) } else { Value::Null },
        "error": given(&result.error),
        "attempts": result.attempts,
        "provider": given(&result.provider),
        "model": given(&result.model),
        "cost_usd": usd(result.cost_pico_usd),
        "started_ms": result.started_ms,
        "ended_ms": result.ended_ms,
        "number": result.number,
        "resumed": result.resumed,
        "cached": result.cached,
        "truncated": result.truncated,
        "detail": serde_json::from_str::<Value>(&result.detail).unwrap_or_default(),
        "simulated": result.simulated,
        "input_tokens": result.input_tokens,
        "output_tokens": result.output_tokens,
    })
}

/// The last line for scripts.
fn summary_json(run: &str, summary: &pb::RunSummary) -> Value {
    json!({"summary": {
        "run_id": run,
        "tasks": summary.tasks,
        "succeeded": summary.succeeded,
        "failed": summary.failed,
        "resumed": summary.resumed,
        "wall_ms": summary.wall_ms,
        "sequential_ms": summary.sequential_ms,
        "speedup": summary.speedup,
        "widest": summary.widest,
        "calls": summary.calls,
        "cached": summary.cached,
        "cost_usd": usd(summary.cost_pico_usd),
    }})
}

/// Lists the runs.
async fn list(app: &App) -> anyhow::Result<Exit> {
    let mut rpc = dispatcher::connect(app).await?;
    let runs = dispatcher::unary(rpc.list_runs(pb::ListRunsRequest::default())).await?.runs;
    let began = |run: &pb::Run| render::timestamp(run.began_ms.saturating_mul(1000));
    if app.global.json {
        let runs: Vec<Value> = runs
            .iter()
            .map(|run| {
                json!({
                    "run_id": run.run_id, "source": run.source, "began": began(run), "ended": run.ended_ms.is_some(),
                    "answered": run.answered,
                })
            })
            .collect();
        app.screen.out(&json!({"runs": runs}).to_string())?;
        return Ok(Exit::Done);
    }
    if runs.is_empty() {
        app.screen.note("no runs yet: drover dispatch prompts.txt");
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["RUN", "BEGAN (UTC)", "STATE", "ANSWERED", "SOURCE"]);
    for run in &runs {
        let state = if run.ended_ms.is_some() { "ended" } else { "not ended" };
        let at = began(run).get(..19).unwrap_or_default().replace('T', " ");
        table.row(vec![
            Cell::from(run.run_id.as_str()),
            Cell::from(at.as_str()),
            Cell::from(state),
            Cell::from(run.answered.to_string().as_str()),
            Cell::from(run.source.as_str()),
        ]);
    }
    app.screen.table(&table)?;
    Ok(Exit::Done)
}
