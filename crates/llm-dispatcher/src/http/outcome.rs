//! What both of `OpenAI`'s interfaces have in common on the way out.

use std::pin::Pin;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream, StreamExt as _};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Front;
use super::error::Refusal;
use crate::call::{CallAnswer, Delta};
use crate::shell::{Client, Done, Job, Lane};

/// Pieces of an answer that may wait for a reader.
const PIECES: usize = 64;

pub(super) const SIMULATED: HeaderName = HeaderName::from_static("x-drover-simulated");

/// Configured models.
pub(super) async fn models(State(front): State<Arc<Front>>) -> Json<Value> {
    let lanes = front.pool.lanes().all();
    let models = lanes.iter().filter(|lane| lane.provider.is_some()).map(|lane| {
        json!({"id": format!("{}/{}", lane.name, lane.model), "object": "model", "created": 0, "owned_by": lane.name})
    });
    Json(json!({"object": "list", "data": models.collect::<Vec<_>>()}))
}

/// The answer of a job, or why there is none.
pub(super) fn answered(done: Done) -> Result<(Box<CallAnswer>, Facts), Refusal> {
    let facts = Facts::of(&done);
    match done.answer {
        Some(answer) if matches!(done.status, crate::core::Status::Answered | crate::core::Status::Blocked) => {
            Ok((Box::new(answer), facts))
        }
        _ => Err(Refusal::of(&done)),
    }
}

/// What is told about an answer beside the interface's own fields.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    lane: Option<Arc<Lane>>,
    attempts: u32,
    cost_usd: f64,
    ended_us: u64,
    cached: bool,
}

impl Facts {
    fn of(done: &Done) -> Self {
        Self {
            lane: done.lane.clone(),
            attempts: done.attempts,
            cost_usd: done.cost.usd(),
            ended_us: done.ended_us,
            cached: done.cached,
        }
    }

    pub(super) fn simulated(&self) -> bool {
        self.lane.as_ref().is_some_and(|lane| lane.simulated())
    }

    /// The model that answered: as the provider says, else as it was asked for.
    pub(super) fn model<'a>(&'a self, answer: &'a CallAnswer) -> &'a str {
        let asked = || self.lane.as_ref().map_or("", |lane| lane.model.as_str());
        answer.model.as_deref().unwrap_or_else(asked)
    }

    /// Seconds of Unix time.
    pub(super) fn created(&self) -> u64 {
        self.ended_us / 1_000_000
    }

    /// A field of our own, which clients of the interface ignore.
    pub(super) fn told(&self) -> Told<'_> {
        Told {
            provider: self.lane.as_ref().map_or("", |lane| lane.name.as_str()),
            attempts: self.attempts,
            cost_usd: self.cost_usd,
            simulated: self.simulated(),
            cached: self.cached,
        }
    }
}

/// What we say about an answer ourselves.
#[derive(Debug, Serialize)]
pub(super) struct Told<'a> {
    provider: &'a str,
    attempts: u32,
    cost_usd: f64,
    simulated: bool,
    cached: bool,
}

/// Marks what was made up.
pub(super) fn marked(mut response: Response, simulated: bool) -> Response {
    if simulated {
        response.headers_mut().insert(SIMULATED, HeaderValue::from_static("true"));
    }
    response
}

/// A job under way, piece by piece. Dropping it breaks the job off.
pub(super) struct Running {
    done: Option<BoxFuture<'static, Done>>,
    pieces: mpsc::Receiver<Delta>,
}

/// What comes next of a job.
pub(super) enum Next {
    Piece(Delta),
    Done(Box<Done>),
}

impl Running {
    /// Hands a job in.
    pub(super) fn start(client: Arc<Client>, mut job: Job) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES);
        job.stream = Some(sender);
        Self { done: Some(async move { client.run(job).await }.boxed()), pieces }
    }

    /// All pieces, then the end.
    pub(super) async fn next(&mut self) -> Option<Next> {
        let done = self.done.as_mut()?;
        tokio::select! {
            biased;
            Some(piece) = self.pieces.recv() => Some(Next::Piece(piece)),
            end = done => {
                self.done = None;
                // What was sent before the end is still there.
                match self.pieces.try_recv() {
                    Ok(piece) => {
                        self.done = Some(std::future::ready(end).boxed());
                        Some(Next::Piece(piece))
                    }
                    Err(_) => Some(Next::Done(Box::new(end))),
                }
            }
        }
    }
}

/// How an interface writes a job that is under way.
pub(super) trait Writer: Send + 'static {
    /// Before anything else.
    fn begin(&mut self, out: &mut String);
    /// A piece.
    fn piece(&mut self, piece: &Delta, out: &mut String);
    /// The end.
    fn end(&mut self, end: Result<(Box<CallAnswer>, Facts), Refusal>, out: &mut String);
}

/// Answers with a stream of events. A job that ends before its first piece without an answer is refused with a status, as one
/// that is not streamed.
pub(super) async fn stream(
    mut running: Running,
    mut writer: impl Writer,
    simulated: bool,
) -> Result<Response, Refusal> {
    let mut out = String::new();
    let first = match running.next().await {
        Some(Next::Done(done)) => {
            let end = answered(*done)?;
            writer.begin(&mut out);
            writer.end(Ok(end), &mut out);
            return Ok(events(futures::stream::iter([Ok(Bytes::from(out))]).boxed(), simulated));
        }
        Some(Next::Piece(piece)) => piece,
        None => {
            return Err(Refusal::new(
                axum::http::StatusCode::SERVICE_UNAVAILABLE,
                "cancelled",
                "the dispatcher is stopping",
            ));
        }
    };
    writer.begin(&mut out);
    writer.piece(&first, &mut out);
    let begun = futures::stream::iter([Ok(Bytes::from(out))]);
    let rest = futures::stream::unfold((running, writer), |(mut running, mut writer)| async move {
        let mut out = String::new();
        match running.next().await? {
            Next::Piece(piece) => writer.piece(&piece, &mut out),
            Next::Done(done) => writer.end(answered(*done), &mut out),
        }
        Some((Ok(Bytes::from(out)), (running, writer)))
    });
    Ok(events(begun.chain(rest).boxed(), simulated))
}

type Events = Pin<Box<dyn Stream<Item = Result<Bytes, std::convert::Infallible>> + Send>>;

fn events(events: Events, simulated: bool) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    marked((headers, Body::from_stream(events)).into_response(), simulated)
}
