//! A socket of this host that leads to the follower of a cluster.
//!
//! The router finds it in the address book like any daemon and need not know that the other end is elsewhere. What cannot be
//! carried is not just closed: the caller is answered in its own protocol with the reason, so that `drover why` can say it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Context as _;
use drover_proto::mailbox::mailbox_service_server::{MailboxService, MailboxServiceServer};
use drover_proto::mailbox::{
    CarryRequest, CarryResponse, DeliverRequest, DeliverResponse, FollowRequest, FollowResponse, RemoveSwarmRequest,
    RemoveSwarmResponse,
};
use drover_proto::status_of;
use drover_service::Context;
use drover_types::Failure;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::Cluster;
use crate::metrics::RelayMetrics;

/// How long a caller waits for the cluster to be ready before it is told what it waits for. A little less than callers have
/// patience for; the work goes on meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a caller that is told why may take to listen.
const TELLING: Duration = Duration::from_secs(10);

/// Listens for callers of the clusters' followers until the daemon ends. Returns where, for each.
pub fn serve(ctx: &Context, clusters: &[Cluster]) -> anyhow::Result<Vec<SocketAddr>> {
    let metrics = RelayMetrics::register(&ctx.registry());
    clusters.iter().map(|cluster| serve_one(ctx, cluster, &metrics)).collect()
}

fn serve_one(ctx: &Context, cluster: &Cluster, metrics: &RelayMetrics) -> anyhow::Result<SocketAddr> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = ctx.bind("the way to a cluster's follower", None, any)?;
    let addr = listener.local_addr();
    let name = cluster.settings().follower_name();
    ctx.publish_stand_in(&name, addr).context("failed to write the address book")?;
    debug!(%name, %addr, "listening for callers of a cluster's follower");
    let (cluster, accepting, metrics) = (cluster.clone(), ctx.clone(), metrics.clone());
    ctx.spawn("cluster relay", async move {
        let stopping = accepting.shutdown().clone();
        while let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((stream, _)) => {
                    let (cluster, stopping, metrics) = (cluster.clone(), stopping.clone(), metrics.clone());
                    accepting.spawn("relayed connection", async move {
                        stopping.run_until_cancelled(carry(&cluster, stream, &metrics)).await;
                    });
                }
                Err(error) => {
                    debug!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Ok(addr)
}

/// Carries one connection to its end.
async fn carry(cluster: &Cluster, mut stream: TcpStream, metrics: &RelayMetrics) {
    let label = [("cluster", cluster.settings().name.clone())];
    let reached = match tokio::time::timeout(PATIENCE, cluster.reach()).await {
        Ok(reached) => reached,
        Err(_) => Err(cluster.not_yet()),
    };
    let (mut pipe, ready) = match reached {
        Ok(reached) => reached,
        Err(failure) => {
            metrics.refusals.get_or_create(&label).inc();
            return refuse(stream, failure).await;
        }
    };
    metrics.connections.get_or_create(&label).inc();
    let open = Open::begin(metrics.open.get_or_create(&label).clone());
    let mut counted = Counted {
        inner: &mut pipe,
        read: metrics.bytes_in.get_or_create(&label).clone(),
        written: metrics.bytes_out.get_or_create(&label).clone(),
    };
    let carried = copy_bidirectional(&mut stream, &mut counted).await;
    drop(open);
    // Nothing at all came back, or the connection broke: perhaps the follower is not there any more.
    if !matches!(carried, Ok((_, back)) if back > 0) {
        debug!(cluster = cluster.settings().name, ?carried, ended = ?pipe.watch().so_far(), "relayed connection ended");
        cluster.forget(&ready);
    }
}

/// Counts a connection for as long as it is there, also when its task is cancelled.
struct Open(Gauge);

impl Open {
    fn begin(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts the bytes that pass.
struct Counted<'a, T> {
    inner: &'a mut T,
    read: Counter,
    written: Counter,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut *self.inner).poll_read(cx, buffer);
        self.read.inc_by((buffer.filled().len() - before) as u64);
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<'_, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut *self.inner).poll_write(cx, bytes);
        if let Poll::Ready(Ok(written)) = polled {
            self.written.inc_by(written as u64);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.inner).poll_shutdown(cx)
    }
}

/// Answers the first call of a connection with the reason why there is nobody to carry it to, then closes: the next connection
/// may fare better.
async fn refuse(stream: TcpStream, failure: Failure) {
    let told = Arc::new(Notify::new());
    let service = MailboxServiceServer::new(Refusal { failure, told: Arc::clone(&told) });
    let one = futures::stream::once(async { Ok::<_, std::io::Error>(stream) }).chain(futures::stream::pending());
    let over = async {
        let _ = tokio::time::timeout(TELLING, told.notified()).await;
    };
    let served = tonic::transport::Server::builder().add_service(service).serve_with_incoming_shutdown(one, over);
    let _ = tokio::time::timeout(TELLING * 2, served).await;
}

/// A follower that is not there.
struct Refusal {
    failure: Failure,
    told: Arc<Notify>,
}

impl Refusal {
    fn status(&self) -> Status {
        self.told.notify_one();
        status_of(&self.failure)
    }
}

#[tonic::async_trait]
impl MailboxService for Refusal {
    type FollowStream = BoxStream<'static, Result<FollowResponse, Status>>;
    type CarryStream = BoxStream<'static, Result<CarryResponse, Status>>;

    async fn carry(&self, _: Request<CarryRequest>) -> Result<Response<Self::CarryStream>, Status> {
        Err(self.status())
    }

    async fn deliver(&self, _: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        Err(self.status())
    }

    async fn follow(&self, _: Request<Streaming<FollowRequest>>) -> Result<Response<Self::FollowStream>, Status> {
        Err(self.status())
    }

    async fn remove_swarm(&self, _: Request<RemoveSwarmRequest>) -> Result<Response<RemoveSwarmResponse>, Status> {
        Err(self.status())
    }
}
