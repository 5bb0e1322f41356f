//! The loopback side: HTTP as a model provider speaks it, for one agent.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use drover_dispatcher::pool::{Ask, Frame};
use drover_service::{Context, Listener};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Token;
use super::carriage::Carriage;
use super::exchange::{self, Event};

/// Requests at once; an agent with its helpers makes a few.
const AT_ONCE: usize = 32;
/// Largest request: what the front takes.
const MOST: usize = 16 << 20;
/// Frames that may wait for the agent.
const FRAMES: usize = 64;
/// How long a request that was broken is remembered, so that the agent's next try gets the answer that was begun. The dispatcher
/// keeps answers a little longer.
const REMEMBERED: Duration = Duration::from_mins(9);
/// How many of them.
const MOST_REMEMBERED: usize = 64;
/// The paths of the pool.
const PATHS: &[&str] = &["/v1/responses", "/v1/chat/completions", "/v1/models"];
/// Headers that are carried.
const HEADERS: &[&str] = &["content-type", "accept", "x-drover-priority", "x-drover-within-ms"];
/// Official clients look at it before they try again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

type Digest = [u8; 32];

struct Shared {
    ctx: Context,
    carriage: Arc<Carriage>,
    token: Token,
    room: Arc<Semaphore>,
    /// Requests whose answer broke off, by what they ask.
    broken: Mutex<HashMap<Digest, (String, Instant)>>,
}

/// Serves the door until it is closed.
pub(super) fn start(
    ctx: &Context,
    listener: Listener,
    carriage: Arc<Carriage>,
    token: Token,
    closing: CancellationToken,
) {
    let shared = Arc::new(Shared {
        ctx: ctx.clone(),
        carriage,
        token,
        room: Arc::new(Semaphore::new(AT_ONCE)),
        broken: Mutex::default(),
    });
    let app = Router::new().fallback(answer).with_state(shared);
    let ctx = ctx.clone();
    ctx.clone().spawn("door", async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = closing.cancelled() => return,
                () = ctx.shutdown().cancelled() => return,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (app, closing, stopping) = (app.clone(), closing.clone(), ctx.shutdown().clone());
            ctx.spawn("door connection", async move {
                let http = Builder::new(TokioExecutor::new());
                let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
                tokio::select! {
                    ended = connection => if let Err(error) = ended {
                        debug!(%error, "a connection of the agent ended");
                    },
                    () = closing.cancelled() => {}
                    () = stopping.cancelled() => {}
                }
            });
        }
    });
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if let Some(refused) = refused(&shared, request.headers()) {
        return refused;
    }
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let fits = if path == "/v1/models" { head.method == Method::GET } else { head.method == Method::POST };
    if !PATHS.contains(&path) || !fits {
        return refusal(StatusCode::NOT_FOUND, "not_found", &format!("the pool has {}", PATHS.join(", ")), false);
    }
    let Ok(permit) = Arc::clone(&shared.room).try_acquire_owned() else {
        let message = format!("{AT_ONCE} requests of this node are under way");
        return refusal(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", &message, true);
    };
    let Ok(body) = axum::body::to_bytes(body, MOST).await else {
        return refusal(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", "the request is too large", false);
    };
    let Ok(body) = String::from_utf8(body.into()) else {
        return refusal(StatusCode::BAD_REQUEST, "invalid_request", "the request is no text", false);
    };
    let digest = digest_of(path, &body);
    let id = shared.remembered(&digest).unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let ask = Ask {
        v: Ask::VERSION,
        id: id.clone(),
        node: shared.carriage.node_id.clone(),
        method: head.method.to_string(),
        path: path.to_owned(),
        headers: carried(&head.headers),
        body,
    };
    let by_tls = Arc::new(AtomicBool::new(false));
    let (events_in, events) = mpsc::channel(FRAMES);
    let ticket = Ticket { shared: Arc::clone(&shared), id, digest, by_tls: Arc::clone(&by_tls), fate: Fate::Wanted };
    let carriage = Arc::clone(&shared.carriage);
    shared.ctx.spawn("pool request", exchange::run(carriage, ask, by_tls, events_in));
    respond(events, ticket, permit).await
}

/// Only the agent, and no web page that a browser has open here.
fn refused(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    let forbidden = |what| Some(refusal(StatusCode::FORBIDDEN, "forbidden", what, false));
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    let host = text(header::HOST);
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if name != "localhost" && name != "127.0.0.1" {
        return forbidden("the pool is not called by this name");
    }
    if headers.contains_key(header::ORIGIN) {
        return forbidden("web pages may not use the pool");
    }
    let given = text(header::AUTHORIZATION);
    let given = given.strip_prefix("Bearer ").or_else(|| given.strip_prefix("bearer ")).unwrap_or_default();
    if shared.token.is(given.trim()) {
        return None;
    }
    let what = "the pool of this node is for its agent, which has the token";
    Some(refusal(StatusCode::UNAUTHORIZED, "invalid_api_key", what, false))
}

fn carried(headers: &HeaderMap) -> Vec<(String, String)> {
    let there = |name: &&str| Some(((*name).to_owned(), headers.get(*name)?.to_str().ok()?.to_owned()));
    HEADERS.iter().filter_map(there).collect()
}

/// What is asked, so that the same question is known again.
fn digest_of(path: &str, body: &str) -> Digest {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(path.as_bytes());
    context.update(b"\0");
    context.update(body.as_bytes());
    let mut digest = Digest::default();
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// In the shape that clients of this interface read.
fn refusal(status: StatusCode, code: &str, message: &str, later: bool) -> Response {
    let kind = match status.as_u16() {
        401 | 403 => "authentication_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    };
    let body = json!({"error": {"message": message, "type": kind, "param": null, "code": code}});
    let retry = HeaderValue::from_static(if later { "true" } else { "false" });
    let mut response = (status, [(SHOULD_RETRY, retry)], Json(body)).into_response();
    if later {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// The answer, from its head on.
async fn respond(mut events: mpsc::Receiver<Event>, mut ticket: Ticket, permit: OwnedSemaphorePermit) -> Response {
    let (status, headers) = match events.recv().await {
        Some(Event::Frame(Frame::Head { status, headers })) => (status, headers),
        Some(Event::Failed { why, again }) => {
            ticket.failed(again);
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "pool_unreachable", &why, true);
        }
        Some(Event::Frame(_)) | None => {
            return refusal(StatusCode::BAD_GATEWAY, "no_answer", "what came from the pool is no answer", true);
        }
    };
    let rest =
        futures::stream::unfold((events, ticket, permit, false), |(mut events, mut ticket, permit, over)| async move {
            if over {
                return None;
            }
            match events.recv().await {
                Some(Event::Frame(Frame::Body(bytes))) => {
                    Some((Ok::<Bytes, std::io::Error>(bytes), (events, ticket, permit, false)))
                }
                Some(Event::Frame(_)) => None,
                event => {
                    let (why, again) = match event {
                        Some(Event::Failed { why, again }) => (why, again),
                        _ => ("the answer broke off".to_owned(), true),
                    };
                    ticket.failed(again);
                    // Without an end, so that nobody takes the beginning for the whole.
                    Some((Err(std::io::Error::other(why)), (events, ticket, permit, true)))
                }
            }
        });
    let mut response = Response::new(Body::from_stream(rest));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

/// What is to become of an exchange when the agent's side of it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It ended in order, or the agent went away: either way nobody needs it any more.
    Wanted,
    /// The agent may ask for it again.
    Kept,
}

/// The agent's side of an exchange.
struct Ticket {
    shared: Arc<Shared>,
    id: String,
    digest: Digest,
    by_tls: Arc<AtomicBool>,
    fate: Fate,
}

impl Ticket {
    fn failed(&mut self, again: bool) {
        if again {
            self.fate = Fate::Kept;
            self.shared.remember(self.digest, &self.id);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.fate == Fate::Wanted {
            let (carriage, id, by_tls) =
                (Arc::clone(&self.shared.carriage), std::mem::take(&mut self.id), Arc::clone(&self.by_tls));
            self.shared.ctx.spawn("pool release", async move { carriage.release(&id, &by_tls).await });
        }
    }
}

impl Shared {
    fn broken(&self) -> MutexGuard<'_, HashMap<Digest, (String, Instant)>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exchange that this very request began and that broke, if there is one.
    fn remembered(&self, digest: &Digest) -> Option<String> {
        let mut broken = self.broken();
        broken.retain(|_, (_, since)| since.elapsed() < REMEMBERED);
        broken.remove(digest).map(|(id, _)| id)
    }

    fn remember(&self, digest: Digest, id: &str) {
        let mut broken = self.broken();
        if broken.len() >= MOST_REMEMBERED
            && let Some(oldest) = broken.iter().min_by_key(|(_, (_, since))| *since).map(|(digest, _)| *digest)
        {
            broken.remove(&oldest);
        }
        broken.insert(digest, (id.to_owned(), Instant::now()));
    }
}
