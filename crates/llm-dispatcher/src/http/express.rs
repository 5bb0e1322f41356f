//! The short way through the front: chat completions that are not streamed, as most programs ask for them.
//!
//! A request of that kind is read, answered and written here, on the connection itself; between the socket and the pool there
//! is nothing. All else - other paths, streams, refusals, whatever is unusual in a head - goes to the routes, with all of its
//! bytes, before anything was done about it. So there is one place that knows how to refuse, and it is not this one.

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::pin::{Pin, pin};
use std::str;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;
use futures::future::BoxFuture;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use super::chat::{self, Asked, ChatRequest};
use super::error::SHOULD_RETRY;
use super::outcome::{self, SIMULATED};
use super::{Access, Front};
use crate::shell::Done;

/// The one path.
const PATH: &str = "/v1/chat/completions";
/// Most fields of a head; those of a request with more are for the routes.
const MAX_FIELDS: usize = 32;
/// Largest head, and largest request in all.
const MAX_HEAD: usize = 8 << 10;
const MAX_BYTES: usize = 1 << 20;
/// Room for what comes in next.
const ROOM: usize = 8 << 10;
/// A connection that says nothing for so long is closed.
const SILENCE: Duration = Duration::from_mins(1);

/// The short way.
pub(crate) struct Express {
    front: Arc<Front>,
    access: Arc<Access>,
    /// The present second and its name in answers.
    date: Mutex<(i64, String)>,
}

impl Express {
    pub(super) fn new(front: Arc<Front>, access: Arc<Access>) -> Arc<Self> {
        Arc::new(Self { front, access, date: Mutex::default() })
    }

    /// Reads a request, when all of it is there and it is one for here.
    fn read(&self, bytes: &[u8], verified: &mut Vec<u8>) -> Read {
        let (head, length) = match Framed::of(bytes) {
            Framed::Request(head, length) => (head, length),
            Framed::More => return Read::More(0),
            Framed::Other => return Read::Other,
        };
        let whole = length.saturating_add(head.length);
        if whole > MAX_BYTES || !self.access.is_place(head.host) {
            return Read::Other;
        }
        // Who has shown the token on this connection shows the same again.
        if verified.is_empty() || verified != head.authorization.as_bytes() {
            if !self.access.is_token(head.authorization) {
                return Read::Other;
            }
            head.authorization.as_bytes().clone_into(verified);
        }
        let Some(body) = bytes.get(length..whole) else { return Read::More(whole) };
        let Ok(body) = serde_json::from_slice::<ChatRequest>(body) else { return Read::Other };
        if body.streams() {
            return Read::Other;
        }
        match Asked::of(&self.front, &head.ours, body) {
            Ok(asked) => Read::Whole(Box::new(asked), whole),
            Err(_) => Read::Other,
        }
    }

    /// The answer, head and body.
    fn answer(&self, done: Done, body: &mut Vec<u8>, out: &mut Vec<u8>) {
        body.clear();
        out.clear();
        let told = outcome::answered(done);
        let written = match &told {
            Ok((answer, facts)) => chat::write(answer, facts, body),
            Err(refusal) => serde_json::to_writer(&mut *body, &refusal.body()),
        };
        let status = match &told {
            _ if written.is_err() => axum::http::StatusCode::INTERNAL_SERVER_ERROR,
            Ok(_) => axum::http::StatusCode::OK,
            Err(refusal) => refusal.status,
        };
        let reason = status.canonical_reason().unwrap_or_default();
        let length = body.len();
        // Writing into memory does not fail.
        let _ = write!(
            out,
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n",
            status.as_str()
        );
        let _ = match &told {
            Ok((_, facts)) if facts.simulated() => write!(out, "{SIMULATED}: true\r\n"),
            Ok(_) => Ok(()),
            Err(refusal) => write!(out, "{SHOULD_RETRY}: {}\r\n", refusal.should_retry()),
        };
        self.write_date(out);
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(body);
    }

    fn write_date(&self, out: &mut Vec<u8>) {
        let now = Timestamp::now();
        let mut date = self.date.lock().unwrap_or_else(PoisonError::into_inner);
        if date.0 != now.as_second() {
            let name = DateTimePrinter::new().timestamp_to_rfc9110_string(&now);
            *date = (now.as_second(), name.unwrap_or_default());
        }
        if !date.1.is_empty() {
            let _ = write!(out, "date: {}\r\n", date.1);
        }
    }
}

impl drover_service::Express for Express {
    fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        stopping: CancellationToken,
    ) -> BoxFuture<'static, Option<(TcpStream, Bytes)>> {
        Box::pin(async move {
            let mut connection = Connection::new(stream);
            match connection.serve(&self, &stopping).await {
                Left::Routes => Some((connection.stream, connection.bytes.into())),
                Left::Over => None,
            }
        })
    }
}

/// What was read.
enum Read {
    /// A request, which ends so many bytes on.
    Whole(Box<Asked>, usize),
    /// More bytes are needed: so many in all, when that is known.
    More(usize),
    /// It is for the routes.
    Other,
}

/// What begins in some bytes.
enum Framed<'a> {
    /// A request for here; its body begins so many bytes on.
    Request(Head<'a>, usize),
    /// What may still become one.
    More,
    /// What is for the routes.
    Other,
}

impl<'a> Framed<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        let length = match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => length,
            // What begins otherwise is not waited for.
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD && may_be_ours(bytes) => return Self::More,
            _ => return Self::Other,
        };
        if (request.method, request.path, request.version) != (Some("POST"), Some(PATH), Some(1)) {
            return Self::Other;
        }
        Head::of(request.headers).map_or(Self::Other, |head| Self::Request(head, length))
    }
}

/// Where the body of the request that these bytes begin with begins, and how long it is, when the short way may take it. Public for
/// fuzzing.
pub fn framed_request(bytes: &[u8]) -> Option<(usize, usize)> {
    match Framed::of(bytes) {
        Framed::Request(head, length) => Some((length, head.length)),
        Framed::More | Framed::Other => None,
    }
}

/// What is needed of a head.
struct Head<'a> {
    host: &'a str,
    authorization: &'a str,
    length: usize,
    /// Fields that are looked at later.
    ours: HeaderMap,
}

impl<'a> Head<'a> {
    /// Nothing when there is anything unusual in it.
    fn of(fields: &[httparse::Header<'a>]) -> Option<Self> {
        let (mut host, mut authorization, mut length, mut json) = (None, None, None, false);
        let mut ours = HeaderMap::new();
        for field in fields {
            let value = str::from_utf8(field.value).ok()?.trim();
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            let once = |seen: bool| (!seen).then_some(value);
            match field.name.len() {
                4 if is("host") => host = Some(once(host.is_some())?),
                6 if is("origin") || is("expect") => return None,
                7 if is("upgrade") => return None,
                10 if is("connection") && !value.eq_ignore_ascii_case("keep-alive") => return None,
                12 if is("content-type") => json = value.eq_ignore_ascii_case("application/json"),
                13 if is("authorization") => authorization = Some(once(authorization.is_some())?),
                13 if is("cache-control") => put(&mut ours, field)?,
                14 if is("content-length") => {
                    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                    length = Some(once(length.is_some() || !digits)?.parse().ok()?);
                }
                16 if is("content-encoding") => return None,
                17 if is("transfer-encoding") => return None,
                _ if field.name.get(..8).is_some_and(|start| start.eq_ignore_ascii_case("x-drover")) => {
                    put(&mut ours, field)?;
                }
                _ => {}
            }
        }
        Some(Self { host: host?, authorization: authorization?, length: length.filter(|_| json)?, ours })
    }
}

fn put(map: &mut HeaderMap, field: &httparse::Header<'_>) -> Option<()> {
    let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
    map.append(name, HeaderValue::from_bytes(field.value).ok()?);
    Some(())
}

/// Whether the request line can still become ours.
fn may_be_ours(bytes: &[u8]) -> bool {
    const LINE: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\n";
    let both = bytes.len().min(LINE.len());
    bytes[..both] == LINE[..both]
}

/// Why a connection is left.
enum Left {
    /// What comes next is for the routes.
    Routes,
    /// It has ended, or the daemon has.
    Over,
}

struct Connection {
    stream: TcpStream,
    /// What came in and was not answered.
    bytes: Vec<u8>,
    /// What was shown with a request that was let in.
    verified: Vec<u8>,
    body: Vec<u8>,
    out: Vec<u8>,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, bytes: Vec::new(), verified: Vec::new(), body: Vec::new(), out: Vec::new() }
    }

    async fn serve(&mut self, express: &Express, stopping: &CancellationToken) -> Left {
        let mut stopped = pin!(stopping.cancelled());
        // One timer that is moved when it rings costs less than one for every request.
        let mut alarm = pin!(tokio::time::sleep(SILENCE));
        loop {
            let heard = Instant::now();
            let mut wanted = 1;
            let asked = loop {
                if self.bytes.len() >= wanted {
                    match express.read(&self.bytes, &mut self.verified) {
                        Read::Whole(asked, end) => {
                            self.bytes.drain(..end);
                            break asked;
                        }
                        Read::More(whole) => wanted = whole.max(self.bytes.len() + 1),
                        Read::Other => return Left::Routes,
                    }
                }
                let missing = wanted.saturating_sub(self.bytes.len()).max(ROOM);
                let came = poll_fn(|cx| {
                    let read = self.poll_fill(cx, missing);
                    if read.is_ready() {
                        return read;
                    }
                    if stopped.as_mut().poll(cx).is_ready() || silent(&mut alarm, heard, cx) {
                        return Poll::Ready(Ok(0));
                    }
                    Poll::Pending
                });
                if !matches!(came.await, Ok(1..)) {
                    return Left::Over;
                }
            };
            let Asked { client, job, .. } = *asked;
            let done = {
                let mut work = pin!(client.run(job));
                let mut watched = true;
                poll_fn(|cx| {
                    if let Poll::Ready(done) = work.as_mut().poll(cx) {
                        return Poll::Ready(Some(done));
                    }
                    // Who goes away takes the call along: dropping it breaks it off.
                    while watched {
                        match self.poll_fill(cx, ROOM) {
                            Poll::Ready(Ok(1..)) => watched = self.bytes.len() < MAX_BYTES,
                            Poll::Ready(_) => return Poll::Ready(None),
                            Poll::Pending => break,
                        }
                    }
                    Poll::Pending
                })
                .await
            };
            let Some(done) = done else { return Left::Over };
            express.answer(done, &mut self.body, &mut self.out);
            if self.stream.write_all(&self.out).await.is_err() || stopping.is_cancelled() {
                return Left::Over;
            }
            self.out.shrink_to(ROOM);
            self.body.shrink_to(ROOM);
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<io::Result<usize>> {
        self.bytes.reserve(room);
        poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.bytes)
    }
}

/// Whether nothing was heard for too long. The timer rings at the earliest when that can be.
fn silent(alarm: &mut Pin<&mut Sleep>, heard: Instant, cx: &mut Context<'_>) -> bool {
    while alarm.as_mut().poll(cx).is_ready() {
        let end = heard + SILENCE;
        if end <= Instant::now() {
            return true;
        }
        alarm.as_mut().reset(end);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Option<(String, String, usize, usize)> {
        let text = format!("{text}\r\n\r\n");
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let (_, fields) = httparse::parse_headers(text.as_bytes(), &mut fields).unwrap().unwrap();
        let head = Head::of(fields)?;
        Some((head.host.to_owned(), head.authorization.to_owned(), head.length, head.ours.len()))
    }

    #[test]
    fn what_is_unusual_in_a_head_is_for_the_routes() {
        let plain =
            "Host: localhost:1\r\nAuthorization: Bearer x\r\ncontent-type: application/json\r\ncontent-length: 12";
        let read = Some(("localhost:1".to_owned(), "Bearer x".to_owned(), 12, 0));
        assert_eq!(head(plain), read);
        assert_eq!(head(&format!("{plain}\r\nuser-agent: x\r\nconnection: Keep-Alive\r\naccept: */*")), read);
        let named =
            head(&format!("{plain}\r\nX-Drover-Client: a\r\nx-drover-priority: low\r\ncache-control: no-cache"));
        assert_eq!(named.map(|named| named.3), Some(3));
        for more in [
            "host: localhost",
            "authorization: Bearer y",
            "content-length: 12",
            "origin: null",
            "expect: 100-continue",
            "upgrade: h2c",
            "connection: close",
            "content-encoding: gzip",
            "transfer-encoding: chunked",
            "content-type: text/plain",
        ] {
            assert_eq!(head(&format!("{plain}\r\n{more}")), None, "{more}");
        }
        for (part, other) in [("12", "+12"), ("12", ""), ("12", "1 2"), ("Host: localhost:1\r\n", "")] {
            assert_eq!(head(&plain.replace(part, other)), None, "{part} as {other}");
        }
    }

    #[test]
    fn a_beginning_of_our_line_is_waited_for_and_no_other() {
        assert!(
            may_be_ours(b"") && may_be_ours(b"POST /v1/ch") && may_be_ours(b"POST /v1/chat/completions HTTP/1.1\r\nHo")
        );
        assert!(!may_be_ours(b"PRI * HTTP/2.0") && !may_be_ours(b"POST /v1/responses") && !may_be_ours(b"GET"));
    }
}
