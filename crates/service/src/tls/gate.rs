//! Who may come in through the one port.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::warn;

use super::NodePeer;
use super::refusal::{noting, reason};
use crate::caller::{Caller, Door};
use crate::pki::{IdentityHandle, node_id_of};
use crate::{now_us, peer};

/// The first byte of a TLS connection; no HTTP request begins with it.
const HANDSHAKE: u8 = 0x16;
/// How long a new connection may take to say what it is, and then to show who it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long somebody who is refused may take to hear it, and how much it may have sent meanwhile.
const HEARING: Duration = Duration::from_secs(1);
const UNHEARD: u64 = 64 << 10;
/// Connections that may be on their way in at one time. Strangers can open more; those have to wait for the kernel.
const UNDECIDED: usize = 512;
/// Refusals are told to people so often at most, and counted always.
const SAY_AGAIN_US: u64 = 1_000_000;

/// What is needed to let nodes in: shared by all listeners of a daemon.
#[derive(Clone)]
pub(crate) struct Nodes {
    identity: Arc<OnceLock<IdentityHandle>>,
    refused: Family<[(&'static str, &'static str); 1], Counter>,
    undecided: Arc<Semaphore>,
    said: Arc<AtomicU64>,
}

impl Nodes {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let refused = Family::<[(&'static str, &'static str); 1], Counter>::default();
        registry.register(
            "refused_nodes",
            "Connections of nodes that could not show who they are, by reason",
            refused.clone(),
        );
        Self { identity: Arc::default(), refused, undecided: Arc::new(Semaphore::new(UNDECIDED)), said: Arc::default() }
    }

    /// The daemon's identity. The first call decides; later certificates are put into the handle.
    pub(crate) fn set_identity(&self, identity: IdentityHandle) {
        let _ = self.identity.set(identity);
    }

    pub(crate) fn identity(&self) -> Option<&IdentityHandle> {
        self.identity.get()
    }

    fn refuse(&self, peer: SocketAddr, listen: SocketAddr, name: &'static str, why: &str) {
        self.refused.get_or_create(&[("reason", name)]).inc();
        let (now, last) = (now_us(), self.said.load(Ordering::Relaxed));
        if now.saturating_sub(last) >= SAY_AGAIN_US
            && self.said.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            warn!(%peer, %listen, reason = name, "refused a node's connection: {why}");
        }
    }
}

/// Decides about one listener's connections. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) listen: SocketAddr,
    pub(crate) allowed: Arc<BTreeSet<u32>>,
    /// Users whom the daemon itself asks what they may do.
    pub(crate) guests: Arc<BTreeSet<u32>>,
    pub(crate) observers: Arc<BTreeSet<u32>>,
    pub(crate) refused: Counter,
    pub(crate) nodes: Nodes,
}

/// A connection that may come in.
pub(crate) enum Admitted {
    /// Of an allowed user of this host.
    Local(TcpStream, Caller),
    /// Of a user of this host who may only see how we fare.
    Observer(TcpStream),
    /// Of a node that showed its certificate.
    Node(Box<TlsStream<TcpStream>>, NodePeer),
}

impl Gate {
    /// Whether the connection may come in, and as what. Says and counts why not.
    pub(crate) async fn admit(&self, stream: TcpStream, peer: SocketAddr) -> Option<Admitted> {
        // Answers are small and waited for.
        let _ = stream.set_nodelay(true);
        let Some(identity) = self.nodes.identity() else {
            return self.admit_local(stream, peer).await;
        };
        let Ok(undecided) = self.nodes.undecided.try_acquire() else {
            self.nodes.refuse(peer, self.listen, "too_many", "too many connections are still in their handshake");
            return None;
        };
        let mut first = [0];
        match tokio::time::timeout(PATIENCE, stream.peek(&mut first)).await {
            Ok(Ok(1)) => {}
            // Gone again, or silent: a probe. Nobody waits for an answer.
            _ => return None,
        }
        if first != [HANDSHAKE] {
            drop(undecided);
            return self.admit_local(stream, peer).await;
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&identity.current().server));
        let (handshake, shown) = noting(tokio::time::timeout(PATIENCE, acceptor.accept(stream).into_fallible())).await;
        let late = || (io::Error::new(io::ErrorKind::TimedOut, "no progress"), None);
        match handshake.map_or_else(|_| Err(late()), |done| done.map_err(|(error, stream)| (error, Some(stream)))) {
            Ok(stream) => {
                let shown = stream.get_ref().1.peer_certificates().and_then(|chain| node_id_of(chain.first()?));
                let Some(node_id) = shown else {
                    self.nodes.refuse(peer, self.listen, "bad_certificate", "its certificate names no node");
                    return None;
                };
                Some(Admitted::Node(Box::new(stream), NodePeer { node_id: node_id.into(), addr: peer }))
            }
            Err((error, stream)) => {
                let (name, why) = reason(&error, shown.as_deref());
                self.nodes.refuse(peer, self.listen, name, &why);
                if let Some(stream) = stream {
                    let_hear(stream).await;
                }
                None
            }
        }
    }

    async fn admit_local(&self, stream: TcpStream, peer: SocketAddr) -> Option<Admitted> {
        let uid = user_of(&stream, peer).await;
        if uid.is_some_and(|uid| self.observers.contains(&uid) && !self.may_call(uid)) {
            return Some(Admitted::Observer(stream));
        }
        self.judge(uid, peer).map(|caller| Admitted::Local(stream, caller))
    }

    fn may_call(&self, uid: u32) -> bool {
        self.allowed.contains(&uid) || self.guests.contains(&uid)
    }

    /// The user who holds the other end, when the kernel says that it is an allowed one of this host.
    pub(crate) async fn admit_user(&self, stream: &TcpStream, peer: SocketAddr) -> Option<Caller> {
        self.judge(user_of(stream, peer).await, peer)
    }

    fn judge(&self, uid: Option<u32>, peer: SocketAddr) -> Option<Caller> {
        match uid {
            Some(uid) if self.may_call(uid) => Some(Caller { uid, door: Door::Grpc, proven: false }),
            // Connected and gone again before we looked: a probe. Nobody waits for an answer.
            None if peer.ip().is_loopback() => None,
            None => {
                self.nodes.refuse(peer, self.listen, "plaintext", "it comes from another host and is not encrypted");
                None
            }
            Some(uid) => {
                self.refused.inc();
                warn!(%peer, uid, listen = %self.listen, "refused a connection of another user; security.allow_uids and security.roles list who may connect");
                None
            }
        }
    }
}

/// Lets the other side hear why: closed at once, with something of it unread, the connection would only break off.
async fn let_hear(mut stream: TcpStream) {
    let heard = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(UNHEARD), &mut tokio::io::sink()).await
    };
    // Whoever does not go by itself has been told all the same.
    let _ = tokio::time::timeout(HEARING, heard).await;
}

/// The user who holds the other end of a connection within this host.
async fn user_of(stream: &TcpStream, peer: SocketAddr) -> Option<u32> {
    let local = stream.local_addr().ok()?;
    tokio::task::spawn_blocking(move || peer::uid_of_peer(local, peer)).await.ok().flatten()
}
