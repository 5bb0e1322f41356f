//! Connections, and what becomes of each call.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use futures::Stream;
use http_body_util::{BodyExt as _, Either, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use rand::Rng as _;
use rand::rngs::SmallRng;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::io::Wire as Connection;
use super::reply::{self, Say};
use super::request::{self, Asked, Wire};
use super::settings::Settings;
use super::{Shared, State};

/// Largest request.
const MAX_BODY: usize = 64 << 20;

type Pieces = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, io::Error>> + Send>>;
type Body = Either<Full<Bytes>, StreamBody<Pieces>>;

/// What goes wrong with a call on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Status(u16),
    Reset,
    Hang,
    Garbage,
    Torn,
    Huge(usize),
}

/// Takes connections until it is dropped.
pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let connections = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let (stream, reset) = Connection::new(stream);
            let service = hyper::service::service_fn(|request| answer(request, &shared, &reset));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// A call under way. However it ends, it is counted as gone; and as aborted, unless somebody said otherwise.
struct UnderWay<'a> {
    shared: &'a Shared,
    ended: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.book.left();
        if !self.ended {
            state.book.ledger.aborted += 1;
        }
    }
}

fn full(status: u16, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert("x-mock", HeaderValue::from_static("drover mock-llm: no model is behind this answer"));
    response
}

fn json(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    full(status, "application/json", body)
}

fn add_headers(response: &mut Response<Body>, headers: Vec<(&'static str, String)>) {
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
}

async fn answer(request: Request<Incoming>, shared: &Shared, reset: &AtomicBool) -> Result<Response<Body>, io::Error> {
    let began_us = shared.now_us();
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Ok(json(413, reply::error(Wire::OpenAi, 413, &error.to_string()))),
    };
    if let Some(what) = path.strip_prefix("/__mock/") {
        return Ok(control(shared, &parts.method, what, &body));
    }
    if path == "/healthz" {
        return Ok(full(200, "text/plain", "ok, a mock\n"));
    }
    let read = request::read(path, parts.uri.query(), &body);
    let (asked, begun) = {
        let mut state = shared.lock();
        state.book.arrived(began_us);
        let asked = match read {
            Ok(asked) => asked,
            Err(why) => {
                state.book.ledger.refused += 1;
                let wire = if path.contains("/models/") { Wire::Gemini } else { Wire::OpenAi };
                return Ok(json(if why.contains("nothing at") { 404 } else { 400 }, reply::error(wire, 400, &why)));
            }
        };
        match begin(&mut state, shared, &asked, &parts.headers, began_us) {
            Ok(begun) => (asked, begun),
            Err(refusal) => return Ok(*refusal),
        }
    };
    carry_out(shared, reset, asked, begun, began_us).await
}

/// What was decided about a call when it came in.
struct Begun {
    settings: Arc<Settings>,
    fault: Fault,
    latency: Duration,
    say: Say,
    limits: Vec<(&'static str, String)>,
}

/// Takes a call or refuses it, and draws its fate.
fn begin(
    state: &mut State,
    shared: &Shared,
    asked: &Asked,
    headers: &HeaderMap,
    began_us: u64,
) -> Result<Begun, Box<Response<Body>>> {
    let settings = Arc::clone(&state.settings);
    let refuse = |status: u16, body: String| Box::new(json(status, body));
    if let Some(key) = &settings.api_key
        && !carries(headers, asked.wire, key)
    {
        state.book.ledger.refused += 1;
        // The key is repeated, as careless providers do: whoever shows this message must hide it.
        let given: Vec<&str> = headers.values().filter_map(|value| value.to_str().ok()).collect();
        let message = format!("Incorrect API key provided among: {}", given.join(", "));
        return Err(refuse(401, reply::error(asked.wire, 401, &message)));
    }
    if settings.outage {
        state.book.ledger.errors += 1;
        return Err(refuse(503, reply::error(asked.wire, 503, "the mock is out of order on purpose")));
    }
    let output = settings.output_tokens;
    let say = say(asked, &settings, state.book.ledger.calls);
    let (input_tokens, output_tokens) = (asked.input_tokens, counted(&say, asked, output));
    let now = shared.started.elapsed();
    if let Err(rejected) = state.buckets.take(&settings, now, input_tokens + output_tokens) {
        state.book.ledger.rejected_rate += 1;
        state.book.kept(began_us, began_us, 429);
        let (body, extra) = reply::rejected(asked.wire, Some(rejected), settings.retry_hints);
        let mut response = json(429, body);
        add_headers(&mut response, extra);
        if settings.limit_headers {
            add_headers(&mut response, reply::limit_headers(asked.wire, state.buckets.standing(&settings, now)));
        }
        return Err(Box::new(response));
    }
    if settings.max_in_flight.is_some_and(|most| state.book.ledger.in_flight >= u64::from(most)) {
        state.book.ledger.rejected_in_flight += 1;
        state.book.kept(began_us, began_us, 429);
        return Err(refuse(429, reply::rejected(asked.wire, None, false).0));
    }
    let fault = fault(asked, &settings, &mut state.rng);
    let usual = latency(&settings, &mut state.rng);
    let latency = asked.directive("ms").and_then(|ms| ms.parse().ok()).map_or(usual, milliseconds);
    state.book.accepted(asked.number());
    // Work that comes to nothing by the provider's own fault is not billed; all other work is, whoever still listens.
    if !matches!(fault, Fault::Status(_)) {
        state.book.charge(input_tokens, output_tokens, settings.input_price, settings.output_price);
    }
    let limits = if settings.limit_headers {
        reply::limit_headers(asked.wire, state.buckets.standing(&settings, now))
    } else {
        Vec::new()
    };
    let usage = (settings.usage && asked.directive("no-usage").is_none()).then_some((input_tokens, output_tokens));
    Ok(Begun { settings, fault, latency, say: Say { usage, ..say }, limits })
}

async fn carry_out(
    shared: &Shared,
    reset: &AtomicBool,
    asked: Asked,
    begun: Begun,
    began_us: u64,
) -> Result<Response<Body>, io::Error> {
    let mut under_way = UnderWay { shared, ended: false };
    let Begun { settings, fault, latency, say, limits } = begun;
    let streams = asked.stream && matches!(fault, Fault::None | Fault::Torn);
    let first = if streams { latency / 2 } else { latency };
    wait(first, settings.precise).await;
    let mut count = |change: fn(&mut super::Ledger)| {
        under_way.ended = true;
        let mut state = shared.lock();
        change(&mut state.book.ledger);
    };
    let whole = || reply::whole(&asked, &say);
    match fault {
        Fault::None => {}
        Fault::Status(status) => {
            count(|ledger| ledger.errors += 1);
            shared.lock().book.kept(began_us, shared.now_us(), status);
            return Ok(json(status, reply::error(asked.wire, status, "an error on purpose")));
        }
        Fault::Reset => {
            count(|ledger| ledger.resets += 1);
            reset.store(true, Ordering::Relaxed);
            return Err(io::Error::other("reset on purpose"));
        }
        Fault::Hang => {
            shared.lock().book.ledger.hangs += 1;
            return std::future::pending().await;
        }
        Fault::Garbage => {
            count(|ledger| ledger.garbage += 1);
            return Ok(json(200, "{\"this is\": [\"no answer of any provider\""));
        }
        Fault::Torn if !streams => {
            count(|ledger| ledger.torn += 1);
            let mut text = whole();
            text.truncate(text.len() / 2);
            return Ok(torn("application/json", vec![text]));
        }
        Fault::Torn => {
            count(|ledger| ledger.torn += 1);
            let mut events = reply::events(&asked, &say, settings.pieces);
            events.truncate(events.len() / 2);
            return Ok(torn("text/event-stream", events));
        }
        Fault::Huge(bytes) => {
            count(|ledger| ledger.garbage += 1);
            return Ok(json(200, format!("{{\"id\":\"{}\"}}", "x".repeat(bytes))));
        }
    }
    let mut response = if asked.stream {
        let events = reply::events(&asked, &say, settings.pieces);
        paced(events, latency.saturating_sub(first), settings.precise)
    } else {
        json(200, whole())
    };
    add_headers(&mut response, limits);
    under_way.ended = true;
    let ended_us = shared.now_us();
    shared.lock().book.answered(asked.number(), began_us, ended_us);
    Ok(response)
}

/// Sends pieces and then breaks off.
fn torn(kind: &'static str, pieces: Vec<String>) -> Response<Body> {
    let pieces = pieces.into_iter().map(|piece| Ok(Frame::data(Bytes::from(piece))));
    let end = Err(io::Error::other("torn on purpose"));
    let pieces: Vec<_> = pieces.chain([end]).collect();
    streamed(kind, Box::pin(futures::stream::iter(pieces)))
}

/// Sends pieces one by one over this time.
fn paced(pieces: Vec<String>, over: Duration, precise: bool) -> Response<Body> {
    let pause = over / pieces.len().max(1) as u32;
    let pieces: VecDeque<String> = pieces.into();
    let stream = futures::stream::unfold(pieces, move |mut pieces| async move {
        let piece = pieces.pop_front()?;
        wait(pause, precise).await;
        Some((Ok(Frame::data(Bytes::from(piece))), pieces))
    });
    streamed("text/event-stream", Box::pin(stream))
}

fn streamed(kind: &'static str, pieces: Pieces) -> Response<Body> {
    full(200, kind, Bytes::new()).map(|_| Either::Right(StreamBody::new(pieces)))
}

async fn wait(time: Duration, precise: bool) {
    if time.is_zero() {
        return;
    }
    if !precise {
        return tokio::time::sleep(time).await;
    }
    let until = Instant::now() + time;
    if let Some(coarse) = time.checked_sub(Duration::from_millis(2)).filter(|coarse| !coarse.is_zero()) {
        tokio::time::sleep(coarse).await;
    }
    while Instant::now() < until {
        tokio::task::yield_now().await;
    }
}

fn carries(headers: &HeaderMap, wire: Wire, key: &str) -> bool {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = header("authorization").and_then(|value| value.strip_prefix("Bearer "));
    match wire {
        Wire::OpenAi | Wire::Groq => bearer == Some(key),
        Wire::Anthropic => header("x-api-key") == Some(key) && header("anthropic-version").is_some(),
        Wire::Gemini => header("x-goog-api-key") == Some(key),
    }
}

fn latency(settings: &Settings, rng: &mut SmallRng) -> Duration {
    let slow = rng.random_bool(settings.slow_rate.clamp(0.0, 1.0));
    let middle = if slow { settings.slow_ms } else { settings.latency_ms };
    let jitter = settings.jitter.clamp(0.0, 1.0);
    let factor = if jitter > 0.0 { rng.random_range(1.0 - jitter..=1.0 + jitter) } else { 1.0 };
    milliseconds(middle * factor)
}

fn milliseconds(count: f64) -> Duration {
    Duration::try_from_secs_f64(count.max(0.0) / 1e3).unwrap_or_default()
}

fn fault(asked: &Asked, settings: &Settings, rng: &mut SmallRng) -> Fault {
    for (name, fault) in
        [("hang", Fault::Hang), ("reset", Fault::Reset), ("garbage", Fault::Garbage), ("torn", Fault::Torn)]
    {
        if asked.directive(name).is_some() {
            return fault;
        }
    }
    if let Some(bytes) = asked.directive("huge").and_then(|bytes| bytes.parse().ok()) {
        return Fault::Huge(bytes);
    }
    if let Some(status) = asked.directive("status").and_then(|status| status.parse().ok()) {
        return Fault::Status(status);
    }
    let rates = [
        (settings.error_rate, Fault::Status(settings.error_status)),
        (settings.reset_rate, Fault::Reset),
        (settings.hang_rate, Fault::Hang),
        (settings.garbage_rate, Fault::Garbage),
        (settings.torn_rate, Fault::Torn),
    ];
    if rates.iter().all(|(rate, _)| *rate <= 0.0) {
        return Fault::None;
    }
    let mut drawn: f64 = rng.random();
    for (rate, fault) in rates {
        if drawn < rate {
            return fault;
        }
        drawn -= rate;
    }
    Fault::None
}

/// What is answered to a request, cut to what it allows.
fn say(asked: &Asked, settings: &Settings, number: u64) -> Say {
    let mut say = Say {
        text: String::new(),
        call: None,
        cut: false,
        blocked: asked.directive("blocked").is_some(),
        prompt_blocked: asked.wire == Wire::Gemini && asked.directive("blocked-prompt").is_some(),
        usage: None,
        number,
    };
    if say.blocked || say.prompt_blocked {
        return say;
    }
    let text = asked.directive("say").or(settings.answer.as_deref());
    let tool = asked.directive("tool").filter(|_| asked.tools > 0);
    if let Some(tool) = tool {
        let (name, arguments) = tool.split_once(' ').unwrap_or((tool, "{}"));
        say.call = Some((name.to_owned(), arguments.to_owned()));
    } else if let Some(name) = &asked.must_call {
        say.call = Some((name.clone(), text.unwrap_or("{}").to_owned()));
    } else {
        say.text = text.map_or_else(
            || format!("mock answer to: {}", asked.prompt.chars().take(60).collect::<String>()),
            str::to_owned,
        );
    }
    let most = asked.max_tokens.map_or(usize::MAX, |most| (most as usize).saturating_mul(4));
    if say.text.len() > most {
        let end = (0..=most).rev().find(|&at| say.text.is_char_boundary(at)).unwrap_or(0);
        say.text.truncate(end);
        say.cut = true;
    }
    say
}

/// Tokens of output that an answer is counted as.
fn counted(say: &Say, asked: &Asked, fixed: Option<u64>) -> u64 {
    let bytes = say.text.len() + say.call.as_ref().map_or(0, |(name, arguments)| name.len() + arguments.len());
    let tokens = fixed.unwrap_or((bytes as u64).div_ceil(4));
    asked.max_tokens.map_or(tokens, |most| tokens.min(most))
}

fn control(shared: &Shared, method: &Method, what: &str, body: &[u8]) -> Response<Body> {
    let mut state = shared.lock();
    let shown = |value: Result<String, serde_json::Error>| match value {
        Ok(text) => json(200, text),
        Err(error) => json(500, error.to_string()),
    };
    match (method.as_str(), what) {
        ("GET", "ledger") => shown(serde_json::to_string(&state.book.ledger)),
        ("GET", "calls") => shown(serde_json::to_string(&state.book.calls)),
        ("GET", "settings") => shown(serde_json::to_string(&*state.settings)),
        ("PATCH" | "POST", "settings") => match patched(&state.settings, body) {
            Ok(settings) => {
                state.settings = Arc::new(settings);
                shown(serde_json::to_string(&*state.settings))
            }
            Err(error) => json(400, Value::from(error.to_string()).to_string()),
        },
        ("POST", "reset") => {
            let in_flight = state.book.ledger.in_flight;
            let settings = (*state.settings).clone();
            *state = State::new(settings);
            // Calls under way will still leave.
            state.book.ledger.in_flight = in_flight;
            shown(serde_json::to_string(&state.book.ledger))
        }
        _ => json(404, "\"the mock has ledger, calls, settings and reset\""),
    }
}

/// The settings with some of them replaced.
fn patched(settings: &Settings, patch: &[u8]) -> Result<Settings, serde_json::Error> {
    let mut value = serde_json::to_value(settings)?;
    let patch: serde_json::Map<String, Value> = serde_json::from_slice(patch)?;
    if let Some(map) = value.as_object_mut() {
        map.extend(patch);
    }
    serde_json::from_value(value)
}
