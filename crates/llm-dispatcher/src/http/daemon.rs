//! The routes of the older daemon: `/parallel` answers in JSON lines as results come, `/status` and `/health` at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Front;
use super::error::Refusal;
use super::inbound;
use crate::call::CallRequest;
use crate::core::{Money, Status};
use crate::shell::{Chain, Client, Done, Job, Tagged};

/// Most prompts of one request; a run of more is what `drover dispatch` is for.
const MOST_PROMPTS: usize = 100_000;
/// Prompts of one request that are handed in at a time.
const AHEAD: usize = 256;
/// Characters of a prompt that name it in progress lines, as the older daemon did.
const LABEL: usize = 40;

/// How long a look at the dispatcher may take before it counts as busy.
const LOOK: Duration = Duration::from_secs(2);

/// Whether the dispatcher is there and at work.
pub(super) async fn health(State(front): State<Arc<Front>>) -> Response {
    let uptime = front.started.elapsed().as_millis() as u64;
    match tokio::time::timeout(LOOK, front.pool.snapshot()).await {
        Ok(Some(seen)) => {
            Json(json!({"status": "ok", "uptime": uptime, "workers": seen.under_way, "requests": seen.calls}))
                .into_response()
        }
        Ok(None) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "stopping", "uptime": uptime}))).into_response()
        }
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "busy", "uptime": uptime}))).into_response(),
    }
}

/// How it is.
pub(super) async fn status(State(front): State<Arc<Front>>) -> Result<Json<Value>, Refusal> {
    let stopping = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "cancelled", "the dispatcher is stopping");
    let seen = front.pool.snapshot().await.ok_or_else(stopping)?;
    let lanes: Vec<Value> = seen
        .lanes
        .iter()
        .map(|lane| {
            json!({"provider": lane.lane.name, "model": lane.lane.model, "under_way": lane.under_way, "width": lane.width,
                "breaker": lane.breaker, "simulated": lane.lane.simulated()})
        })
        .collect();
    let notes: Vec<Value> =
        seen.notes.iter().map(|note| json!({"code": note.code, "message": note.message, "hint": note.hint})).collect();
    Ok(Json(json!({
        "uptime": front.started.elapsed().as_millis() as u64,
        "queued": seen.queued, "under_way": seen.under_way, "requests": seen.calls, "providers": lanes, "notes": notes,
    })))
}

#[derive(Debug, Deserialize)]
pub(super) struct ParallelRequest {
    prompts: Vec<String>,
    #[serde(default)]
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Options {
    #[serde(default)]
    web_search: bool,
    model: Option<String>,
    max_tokens: Option<u64>,
}

/// Answers many prompts at once: a line when it begins, one for each answer as it comes, and one with all of them in order.
pub(super) async fn parallel(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    body: Result<Json<ParallelRequest>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(body) = body?;
    if body.prompts.len() > MOST_PROMPTS {
        return Err(Refusal::bad(format!("at most {MOST_PROMPTS} prompts at once: use drover dispatch for more")));
    }
    let chain = inbound::chain(&front, body.options.model.as_deref().unwrap_or_default())?;
    let max_tokens = inbound::max_tokens(&chain, body.options.max_tokens)?;
    // A client of its own: another request's prompts neither wait behind these nor show up in its lines.
    let client = front.pool.client(1);
    let priority = super::clients::priority(&headers);
    let cache = inbound::may_be_kept(&headers);
    let batch = Batch { prompts: body.prompts, grounded: body.options.web_search, chain, max_tokens, priority, cache };
    let (to, written) = mpsc::channel(AHEAD);
    let work = batch.work(client, to);
    Ok(lines(work, written))
}

/// Answers with JSON lines. Their reader carries the work: when it goes away, so does all that the work waits for.
pub(super) fn lines(work: impl Future<Output = ()> + Send + 'static, written: mpsc::Receiver<Bytes>) -> Response {
    let stream =
        futures::stream::unfold((Box::pin(work), written, false), |(mut work, mut written, over)| async move {
            if over {
                let line: Bytes = written.recv().await?;
                return Some((Ok::<_, std::convert::Infallible>(line), (work, written, true)));
            }
            tokio::select! {
                biased;
                Some(line) = written.recv() => Some((Ok(line), (work, written, false))),
                () = &mut work => {
                    let line = written.recv().await?;
                    Some((Ok(line), (work, written, true)))
                }
            }
        });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::from_stream(stream)).into_response()
}

struct Batch {
    prompts: Vec<String>,
    grounded: bool,
    chain: Chain,
    max_tokens: u32,
    priority: crate::core::Priority,
    cache: bool,
}

pub(super) fn line(value: &Value) -> Bytes {
    let mut text = value.to_string();
    text.push('\n');
    text.into()
}

impl Batch {
    async fn work(self, client: Client, lines: mpsc::Sender<Bytes>) {
        let began = Instant::now();
        let total = self.prompts.len();
        let start = json!({"event": "start", "timestamp": drover_service::now_us() / 1000, "tasks": total});
        let _ = lines.send(line(&start)).await;
        let (tell, mut told) = mpsc::channel::<Tagged>(AHEAD);
        let mut results: Vec<Value> = vec![Value::Null; total];
        let (mut next, mut ended, mut successful, mut cost) = (0, 0, 0, Money::ZERO);
        while ended < total {
            while next < total && next - ended < AHEAD {
                if client.submit(self.job(next), next as u64, &tell).await.is_none() {
                    let _ = lines.send(line(&json!({"event": "error", "error": "the dispatcher is stopping"}))).await;
                    return;
                }
                next += 1;
            }
            let Some(Tagged { tag, done }) = told.recv().await else { return };
            ended += 1;
            cost += done.cost;
            let succeeded = done.status == Status::Answered;
            successful += usize::from(succeeded);
            let index = tag as usize;
            let _ = lines.send(line(&self.progress(index, &done, succeeded, ended))).await;
            if let (true, Some(answer), Some(slot)) = (succeeded, done.answer, results.get_mut(index)) {
                *slot = answer.text.into();
            }
        }
        let simulated = self.chain.first().is_some_and(|lane| lane.simulated());
        let complete = json!({
            "event": "complete", "duration": began.elapsed().as_millis() as u64, "results": results,
            "stats": {"successful": successful, "failed": total - successful},
            "cost": {"usd": cost.usd()}, "simulated": simulated,
        });
        let _ = lines.send(line(&complete)).await;
    }

    fn job(&self, index: usize) -> Job {
        let request = CallRequest {
            grounded: self.grounded,
            ..CallRequest::prompt(self.prompts[index].as_str(), self.max_tokens)
        };
        let mut job = Job::call(request, self.chain.clone());
        job.priority = self.priority;
        job.cache = self.cache;
        job
    }

    fn progress(&self, index: usize, done: &Done, success: bool, ended: usize) -> Value {
        let label: String = self.prompts[index].chars().take(LABEL).collect();
        json!({"event": "progress", "index": index, "label": label, "success": success, "completed": ended,
            "total": self.prompts.len(), "durationMs": done.busy.as_millis() as u64,
            "error": (!success).then_some(done.error.as_str())})
    }
}
