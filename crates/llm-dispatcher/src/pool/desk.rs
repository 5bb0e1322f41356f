//! Exchanges under way and those whose answer may still be asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, header};
use drover_service::Context;
use http_body_util::BodyExt as _;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::{Ask, Frame};

/// Exchanges of one node, and of all, that are under way or kept.
const MOST_OF_NODE: usize = 64;
const MOST: usize = 4096;
/// Bytes of one answer. No model says so much; what grows beyond it is broken.
const MOST_OF_ANSWER: usize = 16 << 20;
/// Bytes of all requests under way and all answers kept.
const MOST_BYTES: usize = 256 << 20;
/// How long a call goes on to which nobody listens: its node is dead, or will be back and want what is paid for.
const ALONE: Duration = Duration::from_mins(3);
/// How long an answer is kept that its node has not said it has.
const KEPT: Duration = Duration::from_mins(10);
/// How often the desk is cleared.
const CLEAR: Duration = Duration::from_secs(5);

/// Paths of the front that nodes may ask.
const PATHS: &[&str] = &["/v1/responses", "/v1/chat/completions", "/v1/models"];
/// Headers of theirs that mean something to the front.
const HEADERS: &[&str] = &["content-type", "accept", "x-drover-priority", "x-drover-within-ms"];

/// Why an exchange is not begun.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    /// Nothing that the front has.
    #[error("nodes ask {paths}, not {0}", paths = PATHS.join(" or "))]
    Path(String),
    /// The id is no name.
    #[error("an exchange is named with 1 to 64 letters and digits")]
    Name,
    /// Too much is under way.
    #[error("too many exchanges are under way; try again when some are over")]
    Busy,
    /// The answer that the node has a part of is not here any more.
    #[error("nothing is known of this exchange any more: the dispatcher was started anew, or it took too long")]
    Gone,
}

/// All exchanges. Clones are the same.
#[derive(Clone)]
pub(crate) struct Desk(Arc<Inner>);

struct Inner {
    routes: Router,
    ctx: Context,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    exchanges: HashMap<Key, Arc<Exchange>>,
    bytes: usize,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    node: String,
    id: String,
}

/// One request and what of its answer is there.
struct Exchange {
    key: Key,
    asked_bytes: usize,
    state: Mutex<State>,
    /// Frames that are there.
    grown: watch::Sender<usize>,
    /// Nobody wants it any more.
    over: CancellationToken,
}

struct State {
    frames: Vec<Frame>,
    bytes: usize,
    ended: bool,
    readers: u32,
    alone_since: Option<Instant>,
}

impl Desk {
    pub(super) fn new(ctx: &Context, routes: Router) -> Self {
        Self(Arc::new(Inner { routes, ctx: ctx.clone(), held: Mutex::default() }))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an exchange, or goes on with it behind the frames that the node has.
    pub(super) fn open(&self, ask: Ask, have: u64) -> Result<Reader, Refused> {
        if !PATHS.contains(&ask.path.as_str()) {
            return Err(Refused::Path(ask.path.chars().take(80).collect()));
        }
        if ask.id.is_empty() || ask.id.len() > 64 || !ask.id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Refused::Name);
        }
        let key = Key { node: ask.node.clone(), id: ask.id.clone() };
        let mut held = self.held();
        if let Some(exchange) = held.exchanges.get(&key) {
            debug!(node = key.node, exchange = key.id, have, "an exchange is taken up again");
            return Reader::of(exchange, have).ok_or(Refused::Gone);
        }
        if have > 0 {
            return Err(Refused::Gone);
        }
        let asked_bytes = ask.body.len();
        let of_node = held.exchanges.keys().filter(|held| held.node == key.node).count();
        if of_node >= MOST_OF_NODE || held.exchanges.len() >= MOST || held.bytes + asked_bytes > MOST_BYTES {
            held.forget_oldest(&key.node);
            let of_node = held.exchanges.keys().filter(|held| held.node == key.node).count();
            if of_node >= MOST_OF_NODE || held.exchanges.len() >= MOST || held.bytes + asked_bytes > MOST_BYTES {
                return Err(Refused::Busy);
            }
        }
        let exchange = Arc::new(Exchange {
            key: key.clone(),
            asked_bytes,
            state: Mutex::new(State { frames: Vec::new(), bytes: 0, ended: false, readers: 0, alone_since: None }),
            grown: watch::Sender::new(0),
            over: CancellationToken::new(),
        });
        held.bytes += asked_bytes;
        held.exchanges.insert(key, Arc::clone(&exchange));
        let reader = Reader::of(&exchange, 0).ok_or(Refused::Gone)?;
        drop(held);
        let desk = self.clone();
        self.0.ctx.spawn("pool exchange", async move { desk.answer(&exchange, ask).await });
        Ok(reader)
    }

    /// Forgets exchanges of a node; calls of theirs that are under way are broken off.
    pub(super) fn release(&self, node: &str, ids: &[String]) {
        let mut held = self.held();
        for id in ids {
            held.remove(&Key { node: node.to_owned(), id: id.clone() });
        }
    }

    /// Asks the front, and keeps what it answers.
    async fn answer(&self, exchange: &Arc<Exchange>, ask: Ask) {
        let stopping = self.0.ctx.shutdown();
        tokio::select! {
            () = self.ask(exchange, ask) => {}
            // The future of the call is dropped with this, and with it the call.
            () = exchange.over.cancelled() => {
                self.push(exchange, Frame::End { error: "it was given up".to_owned() });
            }
            () = stopping.cancelled() => {
                self.push(exchange, Frame::End { error: "the dispatcher is stopping".to_owned() });
            }
        }
    }

    async fn ask(&self, exchange: &Arc<Exchange>, ask: Ask) {
        let error = match request_of(ask) {
            Ok(request) => {
                let Ok(response) = self.0.routes.clone().oneshot(request).await;
                self.keep_answer(exchange, response).await
            }
            Err(error) => error,
        };
        self.push(exchange, Frame::End { error });
    }

    /// Keeps the frames of an answer. Why it is not whole; empty when it is.
    async fn keep_answer(&self, exchange: &Arc<Exchange>, response: axum::response::Response) -> String {
        let (head, mut body) = response.into_parts();
        let text = |value: &HeaderValue| value.to_str().ok().map(str::to_owned);
        let told = |name: &str| name != "content-length" && name != "transfer-encoding" && name != "connection";
        let headers = head.headers.iter().filter(|(name, _)| told(name.as_str()));
        let headers = headers.filter_map(|(name, value)| Some((name.as_str().to_owned(), text(value)?))).collect();
        self.push(exchange, Frame::Head { status: head.status.as_u16(), headers });
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return "the answer broke off".to_owned() };
            let Ok(bytes) = frame.into_data() else { continue };
            if bytes.is_empty() {
                continue;
            }
            if !self.push(exchange, Frame::Body(bytes)) {
                return "the answer is too large".to_owned();
            }
        }
        String::new()
    }

    /// Adds a frame. False when there is no room for it.
    fn push(&self, exchange: &Arc<Exchange>, frame: Frame) -> bool {
        let bytes = frame.bytes();
        let ends = matches!(frame, Frame::End { .. });
        let mut held = self.held();
        let mut state = exchange.state();
        if !ends && (state.bytes + bytes > MOST_OF_ANSWER || held.bytes + bytes > MOST_BYTES) {
            warn!(node = exchange.key.node, kept = held.bytes, "no room for the rest of an answer");
            return false;
        }
        if state.ended {
            return true;
        }
        state.frames.push(frame);
        state.bytes += bytes;
        state.ended = ends;
        if held.exchanges.get(&exchange.key).is_some_and(|known| Arc::ptr_eq(known, exchange)) {
            held.bytes += bytes;
        }
        let count = state.frames.len();
        drop(state);
        exchange.grown.send_replace(count);
        true
    }

    /// Clears away what nobody comes back for, until the daemon ends.
    pub(super) async fn keep(&self) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(CLEAR) => {}
                () = self.0.ctx.shutdown().cancelled() => return,
            }
            self.clear(Instant::now());
        }
    }

    fn clear(&self, now: Instant) {
        let mut held = self.held();
        let over = |exchange: &Exchange| {
            let state = exchange.state();
            let limit = if state.ended { KEPT } else { ALONE };
            state.alone_since.is_some_and(|since| now.duration_since(since) >= limit)
        };
        let keys: Vec<Key> =
            held.exchanges.values().filter(|exchange| over(exchange)).map(|exchange| exchange.key.clone()).collect();
        for key in keys {
            debug!(node = key.node, exchange = key.id, "nobody came back for an exchange");
            held.remove(&key);
        }
    }
}

impl Held {
    fn remove(&mut self, key: &Key) {
        let Some(exchange) = self.exchanges.remove(key) else { return };
        self.bytes = self.bytes.saturating_sub(exchange.asked_bytes + exchange.state().bytes);
        exchange.over.cancel();
    }

    /// Makes room by what is over and has lain here longest, of this node before others.
    fn forget_oldest(&mut self, node: &str) {
        let over = self.exchanges.values().filter_map(|exchange| {
            let state = exchange.state();
            let since = state.alone_since.filter(|_| state.ended)?;
            Some((exchange.key.node != node, since, exchange.key.clone()))
        });
        if let Some((_, _, key)) = over.min_by_key(|(other, since, _)| (*other, *since)) {
            self.remove(&key);
        }
    }
}

impl Exchange {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who takes the frames of an exchange. When the last one goes, the exchange is alone.
pub(super) struct Reader {
    exchange: Arc<Exchange>,
    next: usize,
    grown: watch::Receiver<usize>,
}

impl Reader {
    fn of(exchange: &Arc<Exchange>, have: u64) -> Option<Self> {
        let mut state = exchange.state();
        let next = usize::try_from(have).ok().filter(|have| *have <= state.frames.len())?;
        state.readers += 1;
        state.alone_since = None;
        drop(state);
        Some(Self { exchange: Arc::clone(exchange), next, grown: exchange.grown.subscribe() })
    }

    /// The next frame; none behind the end.
    pub(super) async fn next(&mut self) -> Option<Frame> {
        loop {
            self.grown.mark_unchanged();
            if let Some(frame) = self.ready() {
                return Some(frame);
            }
            if self.exchange.state().ended {
                return None;
            }
            // The sender lives in the exchange, which is held here.
            self.grown.changed().await.ok()?;
        }
    }

    /// The next frame, if it is there.
    pub(super) fn ready(&mut self) -> Option<Frame> {
        let frame = self.exchange.state().frames.get(self.next).cloned()?;
        self.next += 1;
        Some(frame)
    }

    /// Frames that were taken, those included that the node had before.
    pub(super) fn taken(&self) -> u64 {
        self.next as u64
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.exchange.state();
        state.readers -= 1;
        if state.readers == 0 {
            state.alone_since = Some(Instant::now());
        }
    }
}

/// A request of the front. Who it is from is what the carriage says, whatever the agent says.
fn request_of(ask: Ask) -> Result<Request<Body>, String> {
    let bad = |what: &str| format!("the request cannot be made: {what}");
    let method = match ask.method.as_str() {
        "POST" => Method::POST,
        "GET" => Method::GET,
        _ => return Err(bad("its method is neither POST nor GET")),
    };
    let mut request = Request::builder().method(method).uri(&ask.path).header(header::HOST, "localhost");
    for (name, value) in &ask.headers {
        if HEADERS.contains(&name.as_str()) {
            request = request.header(name.as_str(), value.as_str());
        }
    }
    request = request.header("x-drover-client", ask.node.as_str());
    request.body(Body::from(ask.body)).map_err(|error| bad(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use axum::routing::post;
    use bytes::Bytes;

    use super::*;

    struct World {
        desk: Desk,
        ctx: Context,
        calls: Arc<AtomicU32>,
        broken_off: Arc<AtomicU32>,
        more: tokio::sync::mpsc::Sender<Bytes>,
        _dir: tempfile::TempDir,
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.ctx.shutdown().cancel();
        }
    }

    struct Counted(Arc<AtomicU32>, bool);

    impl Drop for Counted {
        fn drop(&mut self) {
            if !self.1 {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// A front whose answer comes piece by piece as the test says; an empty piece ends it.
    fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        let ctx = Context::for_test("llm-dispatcher", dir.path());
        let (more, pieces) = tokio::sync::mpsc::channel::<Bytes>(16);
        let pieces = Arc::new(tokio::sync::Mutex::new(pieces));
        let (calls, broken_off) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (counting, breaking) = (Arc::clone(&calls), Arc::clone(&broken_off));
        let answer = move |headers: axum::http::HeaderMap| {
            counting.fetch_add(1, Ordering::SeqCst);
            let client = headers["x-drover-client"].to_str().unwrap().to_owned();
            let guard = Counted(Arc::clone(&breaking), false);
            let pieces = Arc::clone(&pieces);
            let rest = futures::stream::unfold((pieces, guard), |(pieces, mut guard)| async move {
                let piece = pieces.lock().await.recv().await.filter(|piece| !piece.is_empty());
                guard.1 = piece.is_none();
                let piece = piece?;
                Some((Ok::<_, std::convert::Infallible>(piece), (pieces, guard)))
            });
            async move { ([("x-client", client)], Body::from_stream(rest)) }
        };
        let desk = Desk::new(&ctx, Router::new().route("/v1/responses", post(answer)));
        World { desk, ctx, calls, broken_off, more, _dir: dir }
    }

    fn ask(id: &str) -> Ask {
        Ask {
            v: Ask::VERSION,
            id: id.to_owned(),
            node: "sw/1".to_owned(),
            method: "POST".to_owned(),
            path: "/v1/responses".to_owned(),
            headers: vec![("x-drover-client".to_owned(), "somebody else".to_owned())],
            body: "{}".to_owned(),
        }
    }

    fn body(frame: Option<Frame>) -> Bytes {
        match frame {
            Some(Frame::Body(bytes)) => bytes,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_exchange_is_taken_up_behind_what_arrived_and_asked_for_once() {
        let world = world();
        let mut first = world.desk.open(ask("a1"), 0).unwrap();
        let Some(Frame::Head { status: 200, headers }) = first.next().await else { panic!("no head") };
        assert!(headers.contains(&("x-client".to_owned(), "sw/1".to_owned())), "{headers:?}");
        world.more.send(Bytes::from_static(b"one")).await.unwrap();
        assert_eq!(body(first.next().await), "one");
        drop(first);
        // While nobody listens the answer goes on.
        world.more.send(Bytes::from_static(b"two")).await.unwrap();
        let mut second = world.desk.open(ask("a1"), 2).unwrap();
        assert_eq!(body(second.next().await), "two");
        world.more.send(Bytes::new()).await.unwrap();
        assert_eq!(second.next().await, Some(Frame::End { error: String::new() }));
        assert_eq!(second.next().await, None);
        drop(second);
        // An agent that asks again from the beginning gets the same answer.
        let mut again = world.desk.open(ask("a1"), 0).unwrap();
        let mut text = Vec::new();
        while let Some(frame) = again.next().await {
            if let Frame::Body(bytes) = frame {
                text.extend_from_slice(&bytes);
            }
        }
        assert_eq!((text.as_slice(), world.calls.load(Ordering::SeqCst)), (&b"onetwo"[..], 1));
        assert_eq!(world.broken_off.load(Ordering::SeqCst), 0);
        drop(again);
        world.desk.release("sw/1", &["a1".to_owned()]);
        assert_eq!(world.desk.held().bytes, 0);
        assert!(matches!(world.desk.open(ask("a1"), 3), Err(Refused::Gone)));
    }

    #[tokio::test]
    async fn what_is_released_is_broken_off_and_another_node_cannot_do_it() {
        let world = world();
        let mut reader = world.desk.open(ask("b"), 0).unwrap();
        assert!(matches!(reader.next().await, Some(Frame::Head { .. })));
        world.desk.release("sw/2", &["b".to_owned()]);
        world.more.send(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(body(reader.next().await), "x");
        world.desk.release("sw/1", &["b".to_owned()]);
        assert!(matches!(reader.next().await, Some(Frame::End { error }) if !error.is_empty()));
        assert_eq!(world.broken_off.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn what_nobody_comes_back_for_is_broken_off_in_the_end() {
        let world = world();
        let mut reader = world.desk.open(ask("c"), 0).unwrap();
        assert!(matches!(reader.next().await, Some(Frame::Head { .. })));
        drop(reader);
        let began = Instant::now();
        world.desk.clear(began + ALONE / 2);
        assert_eq!(world.desk.held().exchanges.len(), 1);
        world.desk.clear(began + ALONE + CLEAR);
        assert_eq!(world.desk.held().exchanges.len(), 0);
        while world.broken_off.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn memory_is_bounded_for_each_node_and_what_is_over_makes_room() {
        let world = world();
        let mut readers = Vec::new();
        for number in 0..MOST_OF_NODE {
            readers.push(world.desk.open(ask(&format!("d{number}")), 0).unwrap());
        }
        assert!(matches!(world.desk.open(ask("more"), 0), Err(Refused::Busy)));
        assert!(world.desk.open(Ask { node: "sw/2".to_owned(), ..ask("more") }, 0).is_ok());
        world.desk.release("sw/1", &["d0".to_owned()]);
        assert!(world.desk.open(ask("more"), 0).is_ok());
        for (path, id) in [("/status", "e"), ("/v1/responses", ""), ("/v1/responses", "../x")] {
            assert!(world.desk.open(Ask { path: path.to_owned(), ..ask(id) }, 0).is_err(), "{path} {id}");
        }
        let huge = Frame::Body(Bytes::from(vec![b'x'; MOST_OF_ANSWER + 1]));
        assert!(!world.desk.push(&readers[1].exchange, huge));
    }
}
