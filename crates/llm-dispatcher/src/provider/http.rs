//! The HTTP/1.1 client of the providers: connections that are made, used and kept.
//!
//! No task is spawned for a connection. Whoever waits for an answer reads it, and dropping a call closes its connection, which
//! ends the request at the provider. A connection is kept for the next call once its answer was read to the end.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls_platform_verifier::BuilderVerifierExt as _;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::proxy::{Proxy, ProxyError};
use super::wire::{Fields, Stream, Unsent, Wire};

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
pub(super) enum HttpError {
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
    Broken(#[source] io::Error),
    /// The answer is larger than allowed.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

struct Idle {
    wire: Wire,
    since: Instant,
}

/// Connections to one origin that wait for a next call.
type Idles = Mutex<Vec<Idle>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Inner {
    settings: HttpSettings,
    proxy: Proxy,
    idle: Mutex<HashMap<Origin, Arc<Idles>>>,
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

/// An origin with the connections to it.
#[derive(Clone)]
pub(super) struct Destination {
    origin: Arc<Origin>,
    idle: Arc<Idles>,
    inner: Arc<Inner>,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.origin.fmt(f)
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

    /// How many connections wait for a next call, in tests.
    #[cfg(test)]
    pub(crate) fn idle(&self) -> usize {
        lock(&self.inner.idle).values().map(|idle| lock(idle).len()).sum()
    }

    /// Where requests of this origin go.
    pub(super) fn to(&self, origin: Origin) -> Destination {
        let idle = Arc::clone(lock(&self.inner.idle).entry(origin.clone()).or_default());
        Destination { origin: Arc::new(origin), idle, inner: Arc::clone(&self.inner) }
    }
}

impl Destination {
    /// Sends a request, all of its bytes, and waits for the head of its answer.
    pub(super) async fn send(&self, request: &[u8]) -> Result<Answer, HttpError> {
        loop {
            let (mut wire, reused) = match self.take_idle() {
                Some(wire) => (wire, true),
                None => (self.connect().await?, false),
            };
            match wire.send(request).await {
                Ok(()) => {}
                // Not a byte of it was sent, on a connection that had gone stale: another one takes it.
                Err(Unsent::Stale) if reused => continue,
                Err(Unsent::Stale) => return Err(HttpError::Broken(io::ErrorKind::ConnectionReset.into())),
                Err(Unsent::Broken(error)) => return Err(HttpError::Broken(error)),
            }
            let head = wire.head().await.map_err(HttpError::Broken)?;
            return Ok(Answer { status: head.status, fields: head.fields, wire: Some(wire), to: self.clone() });
        }
    }

    fn take_idle(&self) -> Option<Wire> {
        let mut idle = lock(&self.idle);
        // The last one used is the one most likely alive; when it is too old, so are all the others.
        while let Some(mut newest) = idle.pop() {
            if newest.since.elapsed() > self.inner.settings.idle_timeout {
                idle.clear();
                return None;
            }
            if newest.wire.is_ready() {
                return Some(newest.wire);
            }
        }
        None
    }

    fn keep(&self, wire: Wire) {
        let mut idle = lock(&self.idle);
        if idle.len() < self.inner.settings.max_idle {
            idle.push(Idle { wire, since: Instant::now() });
        }
    }

    async fn connect(&self) -> Result<Wire, HttpError> {
        let settings = &self.inner.settings;
        let within = settings.connect_timeout;
        let Ok(opened) = tokio::time::timeout(within, self.open(&self.origin)).await else {
            let Origin { host, port, .. } = &*self.origin;
            return Err(HttpError::ConnectTimeout { host: host.clone(), port: *port, within });
        };
        Ok(Wire::new(opened?, settings.max_head_bytes))
    }

    async fn open(&self, origin: &Origin) -> Result<Stream, HttpError> {
        let failed = |source| HttpError::Connect { host: origin.host.clone(), port: origin.port, source };
        let stream = match self.inner.proxy.tunnel(origin).await? {
            Some(stream) => stream,
            None => TcpStream::connect((origin.host.as_str(), origin.port)).await.map_err(failed)?,
        };
        stream.set_nodelay(true).map_err(failed)?;
        if !origin.tls {
            return Ok(Stream::Plain(stream));
        }
        let tls = match self.inner.tls.get_or_init(system_tls) {
            Ok(tls) => Arc::clone(tls),
            Err(error) => return Err(HttpError::Tls(error.clone())),
        };
        let name = ServerName::try_from(origin.host.clone()).map_err(|error| failed(io::Error::other(error)))?;
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, stream).await.map_err(failed)?;
        Ok(Stream::Tls(Box::new(stream)))
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
pub(super) struct Answer {
    /// Status.
    pub(super) status: StatusCode,
    /// Fields of the head.
    pub(super) fields: Fields,
    wire: Option<Wire>,
    to: Destination,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Answer {
    /// The next piece of the body; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        let Some(wire) = &mut self.wire else { return Ok(None) };
        let piece = wire.piece().await.map_err(HttpError::Broken)?;
        if piece.is_none() {
            self.ended();
        }
        Ok(piece)
    }

    /// The whole body, when it is no larger than this.
    pub(super) async fn bytes(&mut self, max: usize) -> Result<Bytes, HttpError> {
        if let Some(wire) = &mut self.wire
            && let Some(length) = wire.remaining()
        {
            let length = usize::try_from(length).ok().filter(|&length| length <= max);
            // All of it lies in one place then, and is one piece.
            wire.gather(length.ok_or(HttpError::TooLarge(max))?).await.map_err(HttpError::Broken)?;
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
    fn ended(&mut self) {
        if let Some(mut wire) = self.wire.take()
            && wire.is_ready()
        {
            self.to.keep(wire);
        }
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
