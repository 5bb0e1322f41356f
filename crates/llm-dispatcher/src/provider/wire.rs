//! One connection that speaks HTTP/1.1: bytes of a request out, the head and the body of its answer in.
//!
//! There is no task and no queue behind it. Whoever waits for an answer reads the socket, so that nothing has to be woken in
//! between: a call is one write and, as a rule, one read.

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::io::poll_read_buf;

/// Most fields in the head of an answer.
const MAX_FIELDS: usize = 100;
/// Room for what comes in next. An answer that has less in it takes one read.
const ROOM: usize = 8 << 10;
/// More room than this is given back when an answer is over.
const KEPT_ROOM: usize = 64 << 10;
/// Longest line that says how long a chunk is, and most bytes of what may follow the last one.
const MAX_LINE: usize = 4 << 10;

/// The socket.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, into),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl Stream {
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
}

/// Fields of a head, as they came.
#[derive(Debug, Default)]
pub(super) struct Fields {
    text: Box<[u8]>,
    /// Name and value of each.
    places: Vec<(Range<u32>, Range<u32>)>,
}

impl Fields {
    fn of(text: &[u8], fields: &[httparse::Header<'_>]) -> Self {
        let at = |part: &[u8]| {
            let start = part.as_ptr() as usize - text.as_ptr() as usize;
            start as u32..(start + part.len()) as u32
        };
        let places = fields.iter().map(|field| (at(field.name.as_bytes()), at(field.value))).collect();
        Self { text: text.into(), places }
    }

    fn part(&self, place: &Range<u32>) -> &[u8] {
        self.text.get(place.start as usize..place.end as usize).unwrap_or_default()
    }

    /// Name and value of each, in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.places.iter().map(|(name, value)| (self.part(name), self.part(value)))
    }

    /// The first value of this name, when it is text.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let mut all = self.iter();
        let (_, value) = all.find(|(there, _)| there.eq_ignore_ascii_case(name.as_bytes()))?;
        std::str::from_utf8(value).ok().map(str::trim)
    }

    /// These, in tests.
    #[cfg(test)]
    pub(super) fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        let lines: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let text = lines.concat() + "\r\n";
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let Ok(httparse::Status::Complete((_, found))) = httparse::parse_headers(text.as_bytes(), &mut fields) else {
            panic!("these are no fields: {text}");
        };
        Self::of(text.as_bytes(), found)
    }
}

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) fields: Fields,
}

/// How the body of the answer that is being read ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// It has ended, or none was asked for.
    None,
    /// After so many more bytes.
    Length(u64),
    /// Chunks: so many bytes of the present one are still to come.
    Chunk(u64),
    /// The line behind a chunk, and then the next chunk's length.
    BehindChunk,
    /// With the length of a chunk that comes next.
    ChunkLength,
    /// What may follow the last chunk, of which so many bytes have been read.
    Trailers(usize),
    /// With the connection.
    Close,
}

/// What there is of a body.
enum Taken {
    /// A piece of it.
    Piece(Bytes),
    /// Its end.
    End,
    /// Nothing yet: more must be read first.
    Nothing,
}

/// Why a request was not written.
pub(super) enum Unsent {
    /// Nothing of it was sent, because the other side had closed the connection before.
    Stale,
    /// Something of it may have been sent.
    Broken(io::Error),
}

/// What comes in of answers, as far as it was read. It knows no connection.
#[derive(Debug)]
pub(super) struct Reading {
    /// What came in; what is before `from` was used.
    buffer: Vec<u8>,
    from: usize,
    body: Body,
    /// The connection can serve another request after this one.
    lasting: bool,
    max_head: usize,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    reading: Reading,
}

fn nonsense(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Wire {
    pub(super) fn new(stream: Stream, max_head: usize) -> Self {
        Self { stream, reading: Reading::new(max_head) }
    }

    /// Whether another request can be sent: the answer before was read to its end, and the other side has neither closed the
    /// connection nor sent what nobody asked for.
    pub(super) fn is_ready(&mut self) -> bool {
        if self.reading.body != Body::None || !self.reading.lasting || self.reading.from < self.reading.buffer.len() {
            return false;
        }
        self.reading.buffer.clear();
        self.reading.from = 0;
        let mut byte = [0];
        let mut into = ReadBuf::new(&mut byte);
        // Costs no call of the system while nothing has come in.
        Pin::new(&mut self.stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut into).is_pending()
    }

    /// Sends a whole request.
    pub(super) async fn send(&mut self, request: &[u8]) -> Result<(), Unsent> {
        self.reading.lasting = true;
        let mut sent = 0;
        while sent < request.len() {
            let written = poll_fn(|cx| match self.stream.poll_write(cx, &request[sent..]) {
                Poll::Ready(written) => Poll::Ready(written),
                // Whoever does not take the whole may have begun to say why.
                Poll::Pending => match self.poll_fill(cx) {
                    Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    Poll::Ready(Ok(_)) => Poll::Ready(Ok(0)),
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    Poll::Pending => Poll::Pending,
                },
            });
            match written.await {
                Ok(0) => {
                    // The answer is there before the request is: it is read, and the connection is no use afterwards.
                    self.reading.lasting = false;
                    return Ok(());
                }
                Ok(count) => sent += count,
                // Under TLS a part of what was refused may be on its way.
                Err(_) if sent == 0 && matches!(self.stream, Stream::Plain(_)) => return Err(Unsent::Stale),
                Err(error) => return Err(Unsent::Broken(error)),
            }
        }
        poll_fn(|cx| self.stream.poll_flush(cx)).await.map_err(Unsent::Broken)
    }

    /// Waits for the head of the answer.
    pub(super) async fn head(&mut self) -> io::Result<Head> {
        loop {
            if let Some(head) = self.reading.parse_head()? {
                if !head.status.is_informational() {
                    return Ok(head);
                }
                if head.status == StatusCode::SWITCHING_PROTOCOLS {
                    return Err(nonsense("the other side speaks another protocol now"));
                }
                continue;
            }
            if self.reading.buffer.len() - self.reading.from > self.reading.max_head {
                return Err(nonsense("the head of the answer is too large"));
            }
            if poll_fn(|cx| self.poll_fill(cx)).await? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed before there was an answer"));
            }
        }
    }

    /// The next piece of the body; `None` at its end.
    pub(super) async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.reading.take()? {
                Taken::Piece(piece) => return Ok(Some(piece)),
                Taken::End => return Ok(None),
                Taken::Nothing => {}
            }
            if poll_fn(|cx| self.poll_fill(cx)).await? == 0 {
                if self.reading.body == Body::Close {
                    self.reading.body = Body::None;
                    self.reading.lasting = false;
                    return Ok(None);
                }
                self.reading.lasting = false;
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed in the middle of the answer"));
            }
        }
    }

    /// How long the rest of the body is, when that is known and all of it has come in already or fits in the buffer.
    pub(super) fn remaining(&self) -> Option<u64> {
        match self.reading.body {
            Body::None => Some(0),
            Body::Length(left) => Some(left),
            _ => None,
        }
    }

    /// Waits until so much of the body has come in, or its connection has ended; then it can be cut in one piece.
    pub(super) async fn gather(&mut self, count: usize) -> io::Result<()> {
        while self.reading.buffer.len() - self.reading.from < count {
            if poll_fn(|cx| self.poll_fill(cx)).await? == 0 {
                self.reading.lasting = false;
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed in the middle of the answer"));
            }
        }
        Ok(())
    }

    /// Reads what there is. 0 when the other side has closed.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.reading.from > 0 && self.reading.from == self.reading.buffer.len() {
            self.reading.buffer.clear();
            self.reading.from = 0;
        } else if self.reading.from > ROOM {
            self.reading.buffer.drain(..self.reading.from);
            self.reading.from = 0;
        }
        self.reading.buffer.reserve(ROOM);
        poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.reading.buffer)
    }
}

impl Reading {
    fn new(max_head: usize) -> Self {
        Self { buffer: Vec::new(), from: 0, body: Body::None, lasting: true, max_head }
    }

    fn parse_head(&mut self) -> io::Result<Option<Head>> {
        let text = &self.buffer[self.from..];
        if text.is_empty() {
            return Ok(None);
        }
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut answer = httparse::Response::new(&mut fields);
        let length = match answer.parse(text) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        let status = answer.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or_else(|| nonsense("the answer has no status"))?;
        let (body, lasting) = framing(status, answer.version, answer.headers)?;
        let head = Head { status, fields: Fields::of(&text[..length], answer.headers) };
        self.from += length;
        self.body = body;
        self.lasting &= lasting;
        Ok(Some(head))
    }

    /// A piece of what has come in.
    fn take(&mut self) -> io::Result<Taken> {
        loop {
            let here = self.buffer.len() - self.from;
            match self.body {
                Body::None => return Ok(Taken::End),
                Body::Length(0) => self.body = Body::None,
                Body::Chunk(0) => self.body = Body::BehindChunk,
                _ if here == 0 => return Ok(Taken::Nothing),
                Body::Length(left) => {
                    let piece = self.cut(left);
                    self.body = Body::Length(left - piece.len() as u64);
                    return Ok(Taken::Piece(piece));
                }
                Body::Chunk(left) => {
                    let piece = self.cut(left);
                    self.body = Body::Chunk(left - piece.len() as u64);
                    return Ok(Taken::Piece(piece));
                }
                Body::Close => return Ok(Taken::Piece(self.cut(u64::MAX))),
                Body::BehindChunk => match self.buffer[self.from..] {
                    [b'\r', b'\n', ..] => {
                        self.from += 2;
                        self.body = Body::ChunkLength;
                    }
                    [b'\r'] => return Ok(Taken::Nothing),
                    _ => return Err(nonsense("a chunk does not end where it says")),
                },
                Body::ChunkLength => match httparse::parse_chunk_size(&self.buffer[self.from..]) {
                    Ok(httparse::Status::Complete((line, length))) => {
                        self.from += line;
                        self.body = if length == 0 { Body::Trailers(0) } else { Body::Chunk(length) };
                    }
                    Ok(httparse::Status::Partial) if here <= MAX_LINE => return Ok(Taken::Nothing),
                    _ => return Err(nonsense("a chunk has no length")),
                },
                Body::Trailers(before) => {
                    let rest = &self.buffer[self.from..];
                    let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
                        if before + here > MAX_LINE {
                            return Err(nonsense("too much follows the answer"));
                        }
                        return Ok(Taken::Nothing);
                    };
                    let last = matches!(rest[..end], [] | [b'\r']);
                    self.from += end + 1;
                    let read = before + end + 1;
                    if read > MAX_LINE {
                        return Err(nonsense("too much follows the answer"));
                    }
                    self.body = if last { Body::None } else { Body::Trailers(read) };
                }
            }
        }
    }

    fn cut(&mut self, most: u64) -> Bytes {
        let here = self.buffer.len() - self.from;
        let count = usize::try_from(most).map_or(here, |most| most.min(here));
        let piece = Bytes::copy_from_slice(&self.buffer[self.from..self.from + count]);
        self.from += count;
        if self.from == self.buffer.len() {
            self.buffer.clear();
            self.buffer.shrink_to(KEPT_ROOM);
            self.from = 0;
        }
        piece
    }
}

/// Status and body of an answer that arrives in these pieces and then ends, as the client of the providers reads it; `None` when it is
/// no whole answer. Public for fuzzing.
pub fn read_answer<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<(u16, Vec<u8>)> {
    const MAX_HEAD: usize = 64 << 10;
    let mut reading = Reading::new(MAX_HEAD);
    let (mut status, mut body) = (None, Vec::new());
    for piece in pieces {
        reading.buffer.extend_from_slice(piece);
        while status.is_none() {
            let Some(head) = reading.parse_head().ok()? else { break };
            status = Some(head.status.as_u16()).filter(|_| !head.status.is_informational());
            if head.status == StatusCode::SWITCHING_PROTOCOLS {
                return None;
            }
        }
        if status.is_none() {
            if reading.buffer.len() - reading.from > MAX_HEAD {
                return None;
            }
            continue;
        }
        loop {
            match reading.take().ok()? {
                Taken::Piece(piece) => body.extend_from_slice(&piece),
                Taken::End => return status.map(|status| (status, body)),
                Taken::Nothing => break,
            }
        }
    }
    status.filter(|_| reading.body == Body::Close).map(|status| (status, body))
}

/// How a body ends, and whether its connection lasts longer than it.
fn framing(status: StatusCode, version: Option<u8>, fields: &[httparse::Header<'_>]) -> io::Result<(Body, bool)> {
    if status.is_informational() {
        return Ok((Body::None, true));
    }
    let mut lasting = version == Some(1);
    let mut length: Option<u64> = None;
    let mut chunked = false;
    for field in fields {
        let value = || std::str::from_utf8(field.value).map_err(|_| nonsense("a field of the head is no text"));
        if field.name.eq_ignore_ascii_case("content-length") {
            for part in value()?.split(',') {
                let part = part.trim();
                let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
                let said = part.parse().ok().filter(|_| digits);
                let said: u64 = said.ok_or_else(|| nonsense("the length of the answer is no number"))?;
                if length.replace(said).is_some_and(|before| before != said) {
                    return Err(nonsense("the answer has two lengths"));
                }
            }
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked || !value()?.trim().eq_ignore_ascii_case("chunked") {
                return Err(nonsense("the answer is encoded in a way that was not asked for"));
            }
            chunked = true;
        } else if field.name.eq_ignore_ascii_case("connection") {
            let words = value()?;
            let says = |word: &str| words.split(',').any(|said| said.trim().eq_ignore_ascii_case(word));
            lasting = (lasting || says("keep-alive")) && !says("close");
        }
    }
    if matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Ok((Body::None, lasting));
    }
    Ok(match (chunked, length) {
        // With both, one of them is wrong: the answer is read as HTTP says, and then nothing more is trusted.
        (true, length) => (Body::ChunkLength, lasting && length.is_none()),
        (false, Some(length)) => (Body::Length(length), lasting),
        (false, None) => (Body::Close, false),
    })
}
