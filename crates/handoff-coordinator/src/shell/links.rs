//! What goes to other nodes: to each one stream for words and one for the bytes of sessions, so that words do not wait behind them.
//!
//! What cannot be sent is dropped: the core takes every message for one that may be lost, and says it again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use drover_proto::transfer::TellRequest;
use drover_proto::transfer::transfer_service_client::TransferServiceClient;
use drover_service::pki::IdentityHandle;
use drover_service::{Context, MAX_MESSAGE_BYTES, Target, connect, connect_node, why};
use drover_types::SessionId;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tracing::debug;

use super::session_disk::Places;
use super::view::View;
use super::wire;
use crate::core::{HandoffId, Message, NodeId, Rooms};
use crate::metrics::Metrics;

/// Messages that may wait for one node; what comes on top is lost.
const QUEUE: usize = 1024;
/// Messages that are on their way within one stream.
const UNDER_WAY: usize = 2;
/// A link that nobody uses is closed after this.
const IDLE: Duration = Duration::from_mins(1);
/// Name of the header by which a node without a certificate says who it is.
pub(crate) const NODE_HEADER: &str = "x-drover-node";

enum Piece {
    Word(TellRequest),
    Records { handoff: HandoffId, session: SessionId, offset: u64, len: u64 },
}

#[derive(Clone)]
struct Link {
    words: mpsc::Sender<Piece>,
    records: mpsc::Sender<Piece>,
}

/// The links of this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Links {
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeId,
    identity: Option<IdentityHandle>,
    view: View,
    places: Places,
    rate: Rate,
    metrics: Metrics,
    ctx: Context,
    links: Mutex<HashMap<NodeId, Link>>,
    /// Connections to doors; each goes on until its node listens elsewhere or is gone.
    channels: Mutex<HashMap<NodeId, (SocketAddr, Channel)>>,
}

impl Links {
    pub(crate) fn new(
        me: NodeId,
        identity: Option<IdentityHandle>,
        view: View,
        places: Places,
        bytes_per_second: u64,
        metrics: Metrics,
        ctx: &Context,
    ) -> Self {
        let rate = Rate::new(bytes_per_second);
        let (links, channels, ctx) = (Mutex::default(), Mutex::default(), ctx.clone());
        Self { inner: Arc::new(Inner { me, identity, view, places, rate, metrics, ctx, links, channels }) }
    }

    /// A channel to a node's sessions; nothing while it is not known where that is.
    pub(crate) fn channel(&self, node: &NodeId) -> Option<Channel> {
        self.inner.channel(node)
    }

    /// Who this node is, for nodes that see no certificate.
    pub(crate) fn sign<T>(&self, request: &mut tonic::Request<T>) {
        if self.inner.identity.is_none()
            && let Ok(name) = self.inner.me.as_str().parse()
        {
            request.metadata_mut().insert(NODE_HEADER, name);
        }
    }

    pub(crate) fn send(&self, to: &NodeId, message: Message) {
        self.push(to, Piece::Word(wire::encode(message)));
    }

    pub(crate) fn send_recover(&self, to: &NodeId, session: &SessionId) {
        self.push(to, Piece::Word(wire::recover(session)));
    }

    pub(crate) fn send_relief(&self, to: &NodeId, rooms: &Rooms) {
        self.push(to, Piece::Word(wire::relief(rooms)));
    }

    pub(crate) fn send_ordered(&self, to: &NodeId) {
        self.push(to, Piece::Word(wire::ordered()));
    }

    pub(crate) fn send_chunk(&self, to: &NodeId, handoff: HandoffId, session: SessionId, offset: u64, len: u64) {
        self.push(to, Piece::Records { handoff, session, offset, len });
    }

    fn push(&self, to: &NodeId, piece: Piece) {
        let mut links = self.inner.links.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = || {
            let (words, said) = mpsc::channel(QUEUE);
            let (records, copied) = mpsc::channel(QUEUE);
            for (name, pieces) in [("link", said), ("copy", copied)] {
                self.inner.ctx.spawn(name, Arc::clone(&self.inner).carry(to.clone(), pieces));
            }
            Link { words, records }
        };
        if !links.contains_key(to) {
            links.retain(|_, link| !(link.words.is_closed() && link.records.is_closed()));
        }
        let link = links.entry(to.clone()).or_insert_with(&mut open);
        if link.words.is_closed() || link.records.is_closed() {
            *link = open();
        }
        let lane = if matches!(piece, Piece::Word(_)) { &link.words } else { &link.records };
        if lane.try_send(piece).is_err() {
            self.inner.metrics.dropped.inc();
        }
    }
}

impl Inner {
    fn channel(&self, node: &NodeId) -> Option<Channel> {
        let addr = self.view.addr(node)?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((to, channel)) = channels.get(node)
            && *to == addr
        {
            return Some(channel.clone());
        }
        let channel = match &self.identity {
            Some(identity) => connect_node(identity, addr, node.as_str()),
            None => connect(Target::Address(addr.to_string())),
        };
        // Nodes come and go, and each channel has a task and buffers of its own.
        channels.retain(|known, _| !self.view.is_gone(known));
        channels.insert(node.clone(), (addr, channel.clone()));
        Some(channel)
    }

    /// Sends what is to be sent, until nobody has anything to send for a while.
    async fn carry(self: Arc<Self>, to: NodeId, mut pieces: mpsc::Receiver<Piece>) {
        let mut out: Option<mpsc::Sender<TellRequest>> = None;
        loop {
            let piece = tokio::select! {
                piece = timeout(IDLE, pieces.recv()) => piece,
                () = self.ctx.shutdown().cancelled() => return,
            };
            let Ok(Some(piece)) = piece else { return };
            let message = match piece {
                Piece::Word(message) => message,
                Piece::Records { handoff, session, offset, len } => {
                    self.rate.wait(len).await;
                    match self.read(&session, offset, len).await {
                        Ok(bytes) => wire::chunk(handoff, offset, bytes),
                        // It has moved on since; the core knows by now.
                        Err(error) => {
                            debug!(session_id = %session, %error, "records that were to go cannot be read");
                            continue;
                        }
                    }
                }
            };
            if out.as_ref().is_none_or(mpsc::Sender::is_closed) {
                out = self.open(&to);
            }
            let Some(stream) = &out else {
                self.metrics.dropped.inc();
                continue;
            };
            if stream.send(message).await.is_err() {
                self.metrics.dropped.inc();
                out = None;
            }
        }
    }

    fn open(self: &Arc<Self>, to: &NodeId) -> Option<mpsc::Sender<TellRequest>> {
        let channel = self.channel(to)?;
        let (tell, told) = mpsc::channel(UNDER_WAY);
        let mut client = TransferServiceClient::new(channel).max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut request = tonic::Request::new(ReceiverStream::new(told));
        if self.identity.is_none()
            && let Ok(name) = self.me.as_str().parse()
        {
            request.metadata_mut().insert(NODE_HEADER, name);
        }
        let (to, stopping) = (to.clone(), self.ctx.shutdown().clone());
        self.ctx.spawn("tell", async move {
            tokio::select! {
                ended = client.tell(request) => {
                    if let Err(status) = ended {
                        debug!(node = %to, error = why(&status), "the link to a node broke off");
                    }
                }
                () = stopping.cancelled() => {}
            }
        });
        Some(tell)
    }

    async fn read(&self, session: &SessionId, offset: u64, len: u64) -> io::Result<Bytes> {
        let path = self.places.log(session);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; len as usize];
            File::open(path)?.read_exact_at(&mut bytes, offset)?;
            Ok(Bytes::from(bytes))
        });
        read.await.map_err(io::Error::other)?
    }
}

/// Bytes in a second, over all links.
struct Rate {
    per_second: u64,
    next: Mutex<Option<Instant>>,
}

impl Rate {
    fn new(per_second: u64) -> Self {
        Self { per_second, next: Mutex::default() }
    }

    /// Waits until so many bytes may go.
    async fn wait(&self, len: u64) {
        if self.per_second == 0 {
            return;
        }
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let at = next.filter(|at| *at > now).unwrap_or(now);
            *next = Some(at + Duration::from_micros(len.saturating_mul(1_000_000) / self.per_second));
            at
        };
        sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_go_no_faster_than_allowed() {
        let rate = Rate::new(1 << 20);
        let begun = Instant::now();
        for _ in 0..41 {
            rate.wait(256 << 10).await;
        }
        assert_eq!(begun.elapsed().as_secs(), 10);
        let none = Rate::new(0);
        none.wait(u64::MAX).await;
    }
}
