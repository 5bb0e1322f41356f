//! The HTTP/1.1 client of the providers: hyper's connection, driven by the call itself.
//!
//! No task is spawned for a connection. Whoever waits for an answer polls the connection, so there is nothing to wake in
//! between, and dropping a call closes its connection, which ends the request at the provider. A connection is kept for the
//! next call once its answer was read to the end.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls_platform_verifier::BuilderVerifierExt as _;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::proxy::{Proxy, ProxyError};

/// How a connection is made and kept.
#[derive(Debug, Clone, Copy)]
pub struct HttpSettings {
    /// Longest that connecting may take, TLS included.
    pub connect_timeout: Duration,
    /// A connection that was unused for this long is not used again: shorter than servers keep theirs, so that one seldom
    /// closes just as the other writes.
    pub idle_timeout: Duration,
    /// Most unused connections kept for one origin.
    pub max_idle: usize,
    /// Largest head of an answer.
    pub max_head_bytes: usize,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(15),
            max_idle: 1024,
            max_head_bytes: 64 << 10,
        }
    }
}

/// Where requests go: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Over TLS.
    pub tls: bool,
    /// Name or address; an IPv6 address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Origin {
    /// What stands in the `host` header.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let default = if self.tls { 443 } else { 80 };
        if self.port == default { host } else { format!("{host}:{}", self.port) }
    }
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum HttpError {
    /// No connection.
    #[error("cannot connect to {host}:{port}")]
    Connect {
        /// Where to.
        host: String,
        /// Its port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Connecting took too long.
    #[error("no connection to {host}:{port} within {within:?}")]
    ConnectTimeout {
        /// Where to.
        host: String,
        /// Its port.
        port: u16,
        /// How long it was tried.
        within: Duration,
    },
    /// TLS cannot be set up at all.
    #[error("TLS is not possible here")]
    Tls(#[source] rustls::Error),
    /// The proxy that the environment names is no use.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The connection broke after the request was, perhaps in part, sent.
    #[error("the connection broke")]
    Broken(#[source] hyper::Error),
    /// The answer ended early.
    #[error("the answer ended early")]
    Ended,
    /// The answer is larger than allowed.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

type Stream = TokioIo<Box<dyn Io>>;
type Connection = http1::Connection<Stream, Full<Bytes>>;

/// One connection: the end that requests go in at, and the machine that must be polled for anything to happen.
struct Wire {
    sender: http1::SendRequest<Full<Bytes>>,
    machine: Pin<Box<Connection>>,
    /// The machine has ended and must not be polled again.
    over: bool,
}

impl Wire {
    fn drive(&mut self, cx: &mut Context<'_>) {
        // An error of the machine also reaches the one who waits for the answer, by hyper's own channel.
        if !self.over && self.machine.as_mut().poll(cx).is_ready() {
            self.over = true;
        }
    }
}

struct Idle {
    wire: Wire,
    since: Instant,
}

struct Inner {
    settings: HttpSettings,
    proxy: Proxy,
    idle: Mutex<HashMap<Arc<Origin>, Vec<Idle>>>,
    tls: OnceLock<Result<Arc<ClientConfig>, rustls::Error>>,
}

/// The client. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct HttpClient {
    inner: Arc<Inner>,
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

impl HttpClient {
    /// A client with the certificates of the system, and the proxy that the environment names.
    pub fn new(settings: HttpSettings) -> Self {
        Self::with(settings, Proxy::from_env(|name| std::env::var(name).ok()), OnceLock::new())
    }

    /// A client with TLS settings of its own and no proxy.
    pub fn with_tls(settings: HttpSettings, tls: ClientConfig) -> Self {
        Self::with(settings, Proxy::default(), OnceLock::from(Ok(Arc::new(tls))))
    }

    fn with(settings: HttpSettings, proxy: Proxy, tls: OnceLock<Result<Arc<ClientConfig>, rustls::Error>>) -> Self {
        Self { inner: Arc::new(Inner { settings, proxy, idle: Mutex::default(), tls }) }
    }

    /// Sends a request and waits for the head of its answer. The request's target is a path; `host` is set by the caller.
    pub async fn send(&self, origin: &Arc<Origin>, mut request: Request<Full<Bytes>>) -> Result<Answer, HttpError> {
        loop {
            let (mut wire, reused) = match self.take_idle(origin).await {
                Some(wire) => (wire, true),
                None => (self.connect(origin).await?, false),
            };
            let mut waiting = pin!(wire.sender.try_send_request(request));
            let head = poll_fn(|cx| {
                if !wire.over && wire.machine.as_mut().poll(cx).is_ready() {
                    wire.over = true;
                }
                waiting.as_mut().poll(cx)
            })
            .await;
            match head {
                Ok(head) => return Ok(Answer::new(head, wire, Arc::clone(origin), Arc::clone(&self.inner))),
                Err(mut error) => match error.take_message() {
                    // Not a byte of it was sent, on a connection that had gone stale: another one takes it.
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(HttpError::Broken(error.into_error())),
                },
            }
        }
    }

    /// How many connections wait for a next call, in tests.
    #[cfg(test)]
    pub(crate) fn idle(&self) -> usize {
        self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner).values().map(Vec::len).sum()
    }

    async fn take_idle(&self, origin: &Arc<Origin>) -> Option<Wire> {
        loop {
            let idle = {
                let mut all = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
                let kept = all.get_mut(origin)?;
                // The last one used is the one most likely alive; when it is too old, so are all the others.
                let newest = kept.pop()?;
                if newest.since.elapsed() > self.inner.settings.idle_timeout {
                    kept.clear();
                    return None;
                }
                newest
            };
            let mut wire = idle.wire;
            poll_fn(|cx| {
                wire.drive(cx);
                Poll::Ready(())
            })
            .await;
            if !wire.over && wire.sender.is_ready() {
                return Some(wire);
            }
        }
    }

    async fn connect(&self, origin: &Origin) -> Result<Wire, HttpError> {
        let settings = &self.inner.settings;
        let within = settings.connect_timeout;
        let stream = match tokio::time::timeout(within, self.open(origin)).await {
            Ok(stream) => stream?,
            Err(_) => {
                return Err(HttpError::ConnectTimeout { host: origin.host.clone(), port: origin.port, within });
            }
        };
        let (sender, machine) = http1::Builder::new()
            .max_buf_size(settings.max_head_bytes.max(8 << 10))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(HttpError::Broken)?;
        Ok(Wire { sender, machine: Box::pin(machine), over: false })
    }

    async fn open(&self, origin: &Origin) -> Result<Box<dyn Io>, HttpError> {
        let failed = |source| HttpError::Connect { host: origin.host.clone(), port: origin.port, source };
        let stream = match self.inner.proxy.tunnel(origin).await? {
            Some(stream) => stream,
            None => TcpStream::connect((origin.host.as_str(), origin.port)).await.map_err(failed)?,
        };
        stream.set_nodelay(true).map_err(failed)?;
        if !origin.tls {
            return Ok(Box::new(stream));
        }
        let tls = match self.inner.tls.get_or_init(system_tls) {
            Ok(tls) => Arc::clone(tls),
            Err(error) => return Err(HttpError::Tls(error.clone())),
        };
        let name = ServerName::try_from(origin.host.clone()).map_err(|error| failed(io::Error::other(error)))?;
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, stream).await.map_err(failed)?;
        Ok(Box::new(stream))
    }
}

/// TLS that trusts whom the system trusts.
fn system_tls() -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_platform_verifier()?
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The head of an answer, and its body as it comes in.
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    body: Incoming,
    wire: Option<Wire>,
    origin: Arc<Origin>,
    inner: Arc<Inner>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Answer {
    fn new(head: Response<Incoming>, wire: Wire, origin: Arc<Origin>, inner: Arc<Inner>) -> Self {
        let (parts, body) = head.into_parts();
        Self { status: parts.status, headers: parts.headers, body, wire: Some(wire), origin, inner }
    }

    /// The next piece of the body; `None` at its end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        let piece = poll_fn(|cx| {
            let mut driven = false;
            loop {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(data) => return Poll::Ready(Ok(Some(data))),
                        // Trailers; only the end can follow.
                        Err(_) => driven = false,
                    },
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(HttpError::Broken(error))),
                    Poll::Ready(None) => return Poll::Ready(Ok(None)),
                    Poll::Pending => match &mut self.wire {
                        // Asking for the body has told the machine that someone wants it: now it reads.
                        Some(wire) if !driven && !wire.over => {
                            wire.drive(cx);
                            driven = true;
                        }
                        Some(wire) if !wire.over => return Poll::Pending,
                        _ => return Poll::Ready(Err(HttpError::Ended)),
                    },
                }
            }
        })
        .await?;
        if piece.is_none() {
            self.keep().await;
        }
        Ok(piece)
    }

    /// The whole body, when it is no larger than this.
    pub async fn bytes(&mut self, max: usize) -> Result<Bytes, HttpError> {
        if self.body.size_hint().lower() > max as u64 {
            return Err(HttpError::TooLarge(max));
        }
        let Some(first) = self.chunk().await? else { return Ok(Bytes::new()) };
        if first.len() > max {
            return Err(HttpError::TooLarge(max));
        }
        let Some(second) = self.chunk().await? else { return Ok(first) };
        let mut whole = BytesMut::from(first);
        let mut next = Some(second);
        while let Some(piece) = next {
            if whole.len() + piece.len() > max {
                return Err(HttpError::TooLarge(max));
            }
            whole.extend_from_slice(&piece);
            next = self.chunk().await?;
        }
        Ok(whole.freeze())
    }

    /// The answer was read to its end: its connection may serve the next call.
    async fn keep(&mut self) {
        let Some(mut wire) = self.wire.take() else { return };
        poll_fn(|cx| {
            wire.drive(cx);
            Poll::Ready(())
        })
        .await;
        if wire.over || !wire.sender.is_ready() {
            return;
        }
        let mut all = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all.entry(Arc::clone(&self.origin)).or_default();
        if kept.len() < self.inner.settings.max_idle {
            kept.push(Idle { wire, since: Instant::now() });
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn get(path: &str) -> Request<Full<Bytes>> {
        Request::get(path).header("host", "localhost").body(Full::default()).unwrap()
    }

    fn origin_of(listener: &TcpListener) -> Arc<Origin> {
        let port = listener.local_addr().unwrap().port();
        Arc::new(Origin { tls: false, host: "127.0.0.1".into(), port })
    }

    fn plain() -> HttpClient {
        HttpClient::with(HttpSettings::default(), Proxy::default(), OnceLock::new())
    }

    /// Reads requests without bodies and answers each with the next of these texts, one list per connection.
    async fn scripted(listener: TcpListener, connections: Vec<Vec<&'static str>>) -> usize {
        let mut served = 0;
        for answers in connections {
            let (mut stream, _) = listener.accept().await.unwrap();
            for answer in answers {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                served += 1;
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            // What was written must arrive whole even when the other side writes at this moment.
            stream.shutdown().await.unwrap();
        }
        served
    }

    fn put_back(client: &HttpClient, origin: &Arc<Origin>, wire: Wire) {
        let mut all = client.inner.idle.lock().unwrap();
        all.entry(Arc::clone(origin)).or_default().push(Idle { wire, since: Instant::now() });
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_it_closes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = origin_of(&listener);
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        let server = scripted(listener, vec![vec![ok, chunked, ok], vec![ok]]);
        let client = plain();
        let calls = async {
            for number in 0..3 {
                let mut answer = client.send(&origin, get("/")).await.unwrap();
                assert_eq!(answer.bytes(10).await.unwrap(), "ok");
                // With the last answer the end of the connection may have come, too.
                assert!(client.idle() == 1 || number == 2);
            }
            // The server has closed, or is about to: either way the next request gets through on another connection.
            tokio::time::timeout(Duration::from_secs(30), async {
                loop {
                    let Some(wire) = client.take_idle(&origin).await else { break };
                    put_back(&client, &origin, wire);
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap();
            let mut answer = client.send(&origin, get("/")).await.unwrap();
            assert_eq!(answer.bytes(10).await.unwrap(), "ok");
        };
        let (served, ()) = tokio::join!(server, calls);
        assert_eq!(served, 4);
    }

    #[tokio::test]
    async fn torn_and_huge_answers_are_errors_and_their_connections_are_not_kept() {
        for (answer, wanted) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "broke"),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "broke"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n01234567890", "larger"),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\n012345\r\n6\r\n012345\r\n0\r\n\r\n", "larger"),
            ("HTTP/1.1 200 OK\r\n\r\nuntil the connection ends", "larger"),
            ("SSH-2.0-OpenSSH_9.2p1\r\n", "broke"),
            ("", "broke"),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let origin = origin_of(&listener);
            let client = plain();
            let call = async {
                let mut head = client.send(&origin, get("/")).await?;
                head.bytes(10).await
            };
            let (_, result) = tokio::join!(scripted(listener, vec![vec![answer]]), call);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(wanted), "{answer:?}: {error}");
            assert_eq!(client.idle(), 0, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn dropping_a_call_closes_its_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = origin_of(&listener);
        let client = plain();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 1024];
            assert!(stream.read(&mut buffer).await.unwrap() > 0);
            stream
        };
        let mut call = Box::pin(client.send(&origin, get("/")));
        let mut stream = tokio::select! {
            stream = server => stream,
            _ = &mut call => panic!("nothing was answered"),
        };
        drop(call);
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await.unwrap();
        assert!(end.is_err() || rest.is_empty());
    }

    #[tokio::test]
    async fn nobody_there_is_an_error_that_says_where() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = origin_of(&listener);
        drop(listener);
        let error = plain().send(&origin, get("/")).await.unwrap_err();
        assert!(matches!(error, HttpError::Connect { .. }), "{error}");
        assert!(error.to_string().contains(&origin.port.to_string()), "{error}");
    }

    #[tokio::test]
    async fn tls_is_spoken_with_those_whom_we_trust_and_with_nobody_else() {
        let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server_config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![issued.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server_config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin =
            Arc::new(Origin { tls: true, host: "localhost".into(), port: listener.local_addr().unwrap().port() });

        let mut roots = rustls::RootCertStore::empty();
        roots.add(issued.cert.der().clone()).unwrap();
        let trusting = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let strangers = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();

        for (config, trusted) in [(trusting, true), (strangers, false)] {
            let client = HttpClient::with_tls(HttpSettings::default(), config);
            let server = async {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                    request.into_body().collect().await?;
                    Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from_static(b"ok"))))
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            };
            let call = async {
                let mut answer = client.send(&origin, get("/")).await?;
                answer.bytes(10).await
            };
            let ((), result) = tokio::join!(server, call);
            assert_eq!(result.is_ok(), trusted, "{result:?}");
        }
    }
}
