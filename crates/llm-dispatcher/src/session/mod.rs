//! One run: tasks come in, results go out, and what was answered is kept.
//!
//! ```text
//! requests ─> read as there is room ─> known already? ──────────────────────────┐
//!                                      else hand in ─> pool ─> keep in ledger ─> in order ─> results
//! ```
//!
//! A result goes out only when it is kept, so whoever saw it never pays for it again. The room bounds what was read and has not
//! gone out: a caller that does not read its results, or a first task that takes for ever, stops the reading.

mod outgoing;
mod tally;
mod task;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use drover_proto::dispatch::{self as pb, dispatch_request, dispatch_response};
use drover_proto::status_of;
use drover_service::guard::{Guard, put};
use drover_service::{Caller, now_us};
use drover_types::{ErrorCode, Failure};
use prost::Message as _;
use serde_json::{Map, Value};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::grpc::Service;
use crate::ledger::{Answered, LedgerError, Run, RunKey};
use crate::shell::{Chain, Client, Note, Tagged};

use outgoing::Outgoing;
use tally::Tally;
use task::{Asked, digest_of};

/// Tasks that may have been read and not gone out, for each that can be under way at once; and the bounds of that.
const ROOM_FOR_EACH: u32 = 4;
const LEAST_ROOM: u32 = 256;
const MOST_ROOM: u32 = 8192;
/// Bytes of prompts and answers that may.
const ROOM_BYTES: usize = 32 << 20;
/// Results that are looked at together.
const TOGETHER: usize = 256;
/// The longest name of a run.
const LONGEST_NAME: usize = 64;

/// What to do where nothing is configured.
const NOT_CONFIGURED: &str = "`drover setup` sets a provider up; or add a node_scaling section with provider, model and \
                              api_key_env to drover.yaml, then `drover down`; or ask for simulated answers: --provider sim";

type Answers = mpsc::Sender<Result<pb::DispatchResponse, Status>>;

/// Who began a run, and where that is written down.
pub(crate) struct Scribe {
    pub(crate) guard: Arc<Guard>,
    pub(crate) caller: Caller,
}

/// Serves one run from its first request to its summary.
pub(crate) async fn serve(
    service: Arc<Service>,
    scribe: Scribe,
    mut requests: Streaming<pb::DispatchRequest>,
    answers: Answers,
) {
    let stop = CancellationToken::new();
    let done = async {
        let open = opening(&mut requests).await?;
        service.may_dispatch()?;
        let mut asked = Map::new();
        for (name, value) in
            [("run_id", &open.run_id), ("source", &open.source), ("provider", &open.provider), ("model", &open.model)]
        {
            put(&mut asked, name, value);
        }
        asked.insert("resume".to_owned(), open.resume.into());
        let taken = scribe.guard.take(&scribe.caller, "dispatch", &asked).await?;
        taken.on_disk().await;
        let mut told = Map::new();
        let ended = run(&service, open, requests, &answers, &stop, &mut told).await;
        taken.answered(ended.as_ref().err().map(|failure| failure.code), told).await;
        ended
    };
    if let Err(failure) = done.await {
        // Nobody may be there to hear it.
        let _ = answers.send(Err(status_of(&failure))).await;
    }
}

async fn run(
    service: &Arc<Service>,
    open: pb::OpenRun,
    requests: Streaming<pb::DispatchRequest>,
    answers: &Answers,
    stop: &CancellationToken,
    told: &mut Map<String, Value>,
) -> Result<(), Failure> {
    let named = |text: &String| Some(text.as_str()).filter(|text| !text.is_empty()).map(str::to_owned);
    let chain = service.pool.chain(named(&open.provider).as_deref(), named(&open.model).as_deref())?;
    let opened = begin(service, &open, stop).await?;
    put(told, "run_id", &opened.name);
    let limit = service.settings.scaling.limits.max_concurrent_api.min(service.settings.scaling.limits.max_nodes);
    let width = if open.concurrency == 0 { limit } else { open.concurrency.min(limit) };
    let first = chain.first();
    let hello = pb::RunOpened {
        run_id: opened.name.clone(),
        provider: first.map(|lane| lane.name.clone()).unwrap_or_default(),
        model: first.map(|lane| lane.model.clone()).unwrap_or_default(),
        simulated: first.is_some_and(|lane| lane.simulated()),
        width,
        answered: opened.answered,
    };
    let room = width.saturating_mul(ROOM_FOR_EACH).clamp(LEAST_ROOM, MOST_ROOM) as usize;
    let (tell, results) = mpsc::channel(room + TOGETHER);
    let mut session = Session {
        service: Arc::clone(service),
        client: service.pool.client(open.weight),
        chain,
        run: opened.key,
        began: Instant::now(),
        began_us: now_us(),
        asked_for: format!("{}\0{}", open.provider, open.model),
        resumed_run: open.resume && opened.answered > 0,
        moved: open.any_order,
        at_once: if open.concurrency == 0 { room } else { open.concurrency as usize },
        room,
        read: 0,
        waiting: VecDeque::new(),
        handed_in: 0,
        bytes: 0,
        tell,
        out: Outgoing::new(answers.clone(), open.unordered),
        tally: Tally::default(),
    };
    session.out.send(dispatch_response::Response::Opened(hello)).await;
    if service.settings.source.is_none() && open.provider.is_empty() {
        let note = pb::Note {
            code: "not_configured".to_owned(),
            message: "No configuration found: answers are simulated".to_owned(),
            hint: NOT_CONFIGURED.to_owned(),
            at_us: now_us(),
        };
        session.out.send(dispatch_response::Response::Note(note)).await;
    }
    let worked = session.work(requests, results, stop).await;
    let summary = session.tally.summary(session.began.elapsed());
    told.insert("tasks".to_owned(), summary.tasks.into());
    told.insert("cost_usd".to_owned(), (summary.cost_pico_usd as f64 / 1e12).into());
    worked?;
    service.ledger.end(session.run, now_us() / 1000).await.map_err(|error| failure_of(&error))?;
    session.out.send(dispatch_response::Response::Summary(summary)).await;
    Ok(())
}

/// The first request must open the run.
async fn opening(requests: &mut Streaming<pb::DispatchRequest>) -> Result<pb::OpenRun, Failure> {
    let first = requests.message().await.map_err(|status| drover_proto::failure_of(&status))?;
    match first.and_then(|request| request.request) {
        Some(dispatch_request::Request::Open(open)) => {
            let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if open.run_id.len() > LONGEST_NAME || !open.run_id.chars().all(fine) {
                return Err(invalid(format!(
                    "a run is named with up to {LONGEST_NAME} letters, digits, '-', '_' and '.', not {:?}",
                    open.run_id
                )));
            }
            Ok(open)
        }
        _ => Err(invalid("the first request must open a run")),
    }
}

/// A run that is under way, until it is dropped.
struct Opened {
    key: RunKey,
    name: String,
    answered: u64,
    service: Arc<Service>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.service.runs().remove(&self.name);
        self.service.metrics.runs.dec();
    }
}

async fn begin(service: &Arc<Service>, open: &pb::OpenRun, stop: &CancellationToken) -> Result<Opened, Failure> {
    let name = if open.run_id.is_empty() {
        if open.resume {
            return Err(invalid("which run is to be resumed?"));
        }
        let fresh = uuid::Uuid::new_v4().simple().to_string();
        fresh[..8].to_owned()
    } else {
        open.run_id.clone()
    };
    {
        let mut runs = service.runs();
        if runs.contains_key(&name) {
            return Err(invalid(format!("run {name:?} is under way"))
                .hint("wait for its end, or stop the command that runs it"));
        }
        runs.insert(name.clone(), stop.clone());
    }
    service.metrics.runs.inc();
    // From here on it is taken off the list again whatever happens.
    let mut opened = Opened { key: RunKey::NONE, name, answered: 0, service: Arc::clone(service) };
    if open.resume {
        let (key, run) = service.ledger.find(opened.name.clone()).await.map_err(|error| failure_of(&error))?;
        (opened.key, opened.answered) = (key, run.answered);
    } else {
        let run = Run {
            name: opened.name.clone(),
            source: open.source.clone(),
            began_ms: now_us() / 1000,
            ended_ms: None,
            answered: 0,
        };
        opened.key = service.ledger.begin(run).await.map_err(|error| failure_of(&error))?;
    }
    Ok(opened)
}

struct Session {
    service: Arc<Service>,
    client: Client,
    chain: Chain,
    run: RunKey,
    began: Instant,
    began_us: u64,
    /// What of the opening decides what a task asks for.
    asked_for: String,
    /// There are answers of an earlier part.
    resumed_run: bool,
    /// A task was found changed: others may have moved.
    moved: bool,
    /// Tasks that may be handed in and not over.
    at_once: usize,
    room: usize,
    /// Tasks read so far.
    read: u32,
    waiting: VecDeque<Asked>,
    handed_in: usize,
    /// Of prompts that were read and answers that have not gone out.
    bytes: usize,
    tell: mpsc::Sender<Tagged>,
    out: Outgoing,
    tally: Tally,
}

impl Session {
    async fn work(
        &mut self,
        mut requests: Streaming<pb::DispatchRequest>,
        mut told: mpsc::Receiver<Tagged>,
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        let stopping = self.service.ctx.shutdown().clone();
        let mut notes = self.client.pool().notes();
        let mut more = true;
        let mut done = Vec::new();
        while more || !self.waiting.is_empty() || self.handed_in > 0 {
            self.hand_in().await?;
            // What was read is handed in first: there is always room for that.
            let may_read = more && self.waiting.is_empty() && self.open() < self.room && self.bytes < ROOM_BYTES;
            tokio::select! {
                request = requests.message(), if may_read => match request {
                    Ok(Some(pb::DispatchRequest { request: Some(dispatch_request::Request::Tasks(batch)) })) => {
                        self.take(batch.tasks).await?;
                    }
                    Ok(Some(_)) => return Err(invalid("a run is opened once, and then has only tasks")),
                    Ok(None) => more = false,
                    // The caller is gone, and so is its interest: dropping the client breaks everything off.
                    Err(_) => return Ok(()),
                },
                _ = told.recv_many(&mut done, TOGETHER), if self.handed_in > 0 => self.over(&mut done).await?,
                note = notes.recv() => self.note(note).await,
                () = self.out.closed() => return Ok(()),
                () = stop.cancelled() => {
                    return Err(Failure::new(ErrorCode::TurnLost, "the run was cancelled")
                        .hint("what was answered is kept; go on with --resume"));
                }
                () = stopping.cancelled() => {
                    return Err(Failure::new(ErrorCode::ShuttingDown, "the dispatcher is stopping")
                        .hint("what was answered is kept; go on with --resume"));
                }
            }
        }
        Ok(())
    }

    /// Tasks that were read and whose result has not gone out.
    fn open(&self) -> usize {
        self.read as usize - self.out.gone()
    }

    /// Takes tasks in; those with an answer of an earlier part of the run get that.
    async fn take(&mut self, tasks: Vec<pb::Task>) -> Result<(), Failure> {
        let first = self.read;
        let count = u32::try_from(tasks.len()).unwrap_or(u32::MAX);
        let Some(read) = first.checked_add(count) else { return Err(invalid("a run has at most 4 billion tasks")) };
        self.read = read;
        self.tally.tasks += u64::from(count);
        let mut kept = Vec::new();
        if self.resumed_run {
            kept = self.service.ledger.kept(self.run, first, count).await.map_err(|error| failure_of(&error))?;
        }
        let mut kept = kept.into_iter().peekable();
        for (index, task) in tasks.into_iter().enumerate() {
            let position = first + index as u32;
            let digest = digest_of(&task, &self.asked_for);
            let there = kept.next_if(|answer| answer.position == position);
            let mut body = None;
            match there {
                Some(answer) if answer.digest == digest => body = Some(answer.body),
                Some(_) => self.moved = true,
                None => {}
            }
            if body.is_none() && self.moved {
                body = self.service.ledger.kept_for(self.run, digest).await.map_err(|error| failure_of(&error))?;
            }
            if let Some(mut result) = body.and_then(|body: Bytes| pb::TaskResult::decode(body).ok()) {
                result.number = u64::from(position) + 1;
                result.resumed = true;
                if task.id.is_empty() {
                    result.id = result.number.to_string();
                }
                self.tally.resumed(&result);
                self.bytes += result.output.len();
                self.give(position, result).await;
            } else {
                let asked = Asked::new(position, digest, task);
                self.bytes += asked.bytes;
                self.waiting.push_back(asked);
            }
        }
        self.out.flush(self.still_open()).await;
        Ok(())
    }

    fn still_open(&self) -> u32 {
        (self.waiting.len() + self.handed_in) as u32
    }

    /// Hands in as many as may be.
    async fn hand_in(&mut self) -> Result<(), Failure> {
        while self.handed_in < self.at_once {
            let Some(mut asked) = self.waiting.pop_front() else { break };
            match asked.job(&self.chain, &self.service.errands) {
                Ok(job) => {
                    let tag = self.out.expect(asked);
                    if self.client.submit(job, tag, &self.tell).await.is_none() {
                        return Err(Failure::new(ErrorCode::ShuttingDown, "the dispatcher is stopping"));
                    }
                    self.handed_in += 1;
                }
                Err(why) => {
                    let result = asked.refused(why, self.began.elapsed());
                    self.bytes = self.bytes.saturating_sub(asked.bytes);
                    self.bytes += result.output.len();
                    self.tally.over(&result, None);
                    self.give(asked.position, result).await;
                    self.out.flush(self.still_open()).await;
                }
            }
        }
        Ok(())
    }

    /// Keeps what was answered, then lets it go out.
    async fn over(&mut self, done: &mut Vec<Tagged>) -> Result<(), Failure> {
        let mut keep = Vec::new();
        let mut results = Vec::with_capacity(done.len());
        let mut next = Vec::new();
        for Tagged { tag, mut done } in done.drain(..) {
            let Some(mut asked) = self.out.expected(tag) else { continue };
            let bytes = asked.bytes;
            if let Some(job) = asked.next(&mut done, &self.chain) {
                self.bytes += asked.bytes - bytes;
                next.push((asked, job));
                continue;
            }
            self.handed_in -= 1;
            asked.count_in(&mut done);
            self.bytes = self.bytes.saturating_sub(asked.bytes);
            let result = asked.result(&done, self.began_us);
            self.tally.over(&result, Some(&done));
            if matches!(result.status.as_str(), "succeeded" | "blocked") {
                let body = Bytes::from(result.encode_to_vec());
                keep.push(Answered { position: asked.position, digest: asked.digest, body });
            }
            self.bytes += result.output.len();
            results.push((asked.position, result));
        }
        let kept = if keep.is_empty() { Ok(()) } else { self.service.ledger.keep(self.run, keep).await };
        // Even when they cannot be kept they are paid for, so they go out.
        for (position, result) in results {
            self.give(position, result).await;
        }
        for (asked, job) in next {
            let tag = self.out.expect(asked);
            if self.client.submit(job, tag, &self.tell).await.is_none() {
                return Err(Failure::new(ErrorCode::ShuttingDown, "the dispatcher is stopping"));
            }
        }
        self.out.flush(self.still_open()).await;
        kept.map_err(|error| failure_of(&error))
    }

    async fn give(&mut self, position: u32, result: pb::TaskResult) {
        let gone = self.out.give(position, result).await;
        self.bytes = self.bytes.saturating_sub(gone);
    }

    async fn note(&mut self, note: Result<Note, broadcast::error::RecvError>) {
        // One that was missed stands in the status.
        let Ok(note) = note else { return };
        self.out.send(dispatch_response::Response::Note(note_of(note))).await;
    }
}

/// A note as it is sent.
pub(crate) fn note_of(note: Note) -> pb::Note {
    pb::Note { code: note.code.to_owned(), message: note.message, hint: note.hint, at_us: note.at_us }
}

/// A failure of the ledger as it is sent.
pub(crate) fn failure_of(error: &LedgerError) -> Failure {
    let code = match error {
        LedgerError::UnknownRun(_) | LedgerError::RunExists(_) => ErrorCode::InvalidRequest,
        LedgerError::Unusable { .. } | LedgerError::Newer { .. } => ErrorCode::StoreUnavailable,
        LedgerError::Closed => ErrorCode::ShuttingDown,
    };
    let hint = match error {
        LedgerError::UnknownRun(_) => "`drover spend --runs` lists them",
        LedgerError::Unusable { .. } => "nothing is spent while the ledger cannot be written; free or repair its disk",
        _ => "",
    };
    Failure::new(code, error.to_string()).hint(hint)
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::InvalidRequest, message)
}
