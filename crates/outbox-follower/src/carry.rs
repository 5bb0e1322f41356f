//! Carries a call to a node and its answer back, by files: for whoever reaches this host and not the node.
//!
//! The call lies there for as long as somebody waits here. Whoever leaves takes it away with him, and the node gives it up.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drover_mailbox::{Cursor, Mailbox, Post, StreamReader, is_network_fs};
use drover_proto::mailbox::{CarryRequest, CarryResponse};
use drover_proto::status_of;
use drover_types::{ErrorCode, Failure};
use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::debug;

use crate::refs;
use crate::run::Shared;

/// Calls that are carried at a time; each has a file open.
pub(crate) const AT_ONCE: usize = 256;
/// How often the answer is looked at: right after something came, and at last; and on a file system that hosts share.
const LOOK: (Duration, Duration) = (Duration::from_millis(3), Duration::from_millis(40));
const LOOK_NETWORK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// A node looks for calls several times in a second, and about every second where hosts share the files.
const FOUND: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(7));
/// A node that is at work says so every few seconds.
const SILENT: Duration = Duration::from_secs(30);
/// How often the node is told that somebody still waits.
const TOUCH: Duration = Duration::from_secs(15);
/// How much is read in one go.
const CHUNK: usize = 1 << 20;
/// Chunks that may wait for the caller; the node's file waits behind them.
const WAITING: usize = 4;

/// Puts the call there and streams what comes back.
pub(crate) fn start(
    shared: &Arc<Shared>,
    request: CarryRequest,
) -> Result<impl Stream<Item = Result<CarryResponse, Status>> + Send + use<>, Failure> {
    let node = refs::node(request.node.as_ref())?;
    if !Post::is_name(&request.call_id) {
        return Err(Failure::new(ErrorCode::InvalidRequest, format!("call {:?}: no such name", request.call_id)));
    }
    let permit = Arc::clone(&shared.carried).try_acquire_owned().map_err(|_| {
        Failure::new(ErrorCode::BackendUnavailable, format!("{AT_ONCE} calls to nodes are under way here"))
            .hint("try again in a moment")
    })?;
    let mailbox = Mailbox::new(&shared.settings.mailbox);
    let carriage = Carriage {
        name: format!("{}/{}", node.swarm, node.node),
        post: Post::new(&mailbox.post_dir(&node.swarm, node.node)),
        known: mailbox.node_dir(&node.swarm, node.node),
        id: request.call_id,
    };
    let (out, lines) = mpsc::channel(WAITING);
    let (stopping, used) = (shared.ctx.shutdown().clone(), shared.usage.begin());
    shared.ctx.spawn("carry", async move {
        let _used: (_, OwnedSemaphorePermit) = (used, permit);
        let ended = tokio::select! {
            ended = carriage.carry(request.call, &out) => ended,
            () = out.closed() => Ok(()),
            () = stopping.cancelled() => {
                Err(Failure::new(ErrorCode::ShuttingDown, "the outbox follower is shutting down").into())
            }
        };
        carriage.take_away().await;
        if let Err(Broken(failure)) = ended {
            let _ = out.send(Err(status_of(&failure))).await;
        }
    });
    Ok(ReceiverStream::new(lines))
}

/// Why it goes no further.
struct Broken(Failure);

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

fn lost(why: String) -> Broken {
    Broken(Failure::new(ErrorCode::BackendUnavailable, why))
}

struct Carriage {
    /// The node, for people.
    name: String,
    post: Post,
    /// Is there while the node's swarm is.
    known: std::path::PathBuf,
    id: String,
}

impl Carriage {
    async fn carry(&self, call: Bytes, out: &mpsc::Sender<Result<CarryResponse, Status>>) -> Result<(), Broken> {
        let network = self.put(call).await?;
        let ((first, last), found) = if network { (LOOK_NETWORK, FOUND.1) } else { (LOOK, FOUND.0) };
        let mut reader = Some(StreamReader::new(self.post.answer(&self.id), Cursor::default()));
        let (mut heard, mut touched, mut begun, mut pause) = (Instant::now(), Instant::now(), false, first);
        loop {
            let Some(mut open) = reader.take() else { return Err(lost("the answer cannot be read".to_owned())) };
            let looked = tokio::task::spawn_blocking(move || {
                let chunk = open.next_chunk(CHUNK);
                (open, chunk)
            });
            let (open, chunk) = looked.await.map_err(|error| lost(error.to_string()))?;
            reader = Some(open);
            match chunk {
                Ok(Some(chunk)) => {
                    (heard, begun, pause) = (Instant::now(), true, first);
                    // Without a reader nobody waits any more.
                    if !chunk.lines.is_empty() && out.send(Ok(CarryResponse { lines: chunk.lines })).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => debug!(%error, node = self.name, "an answer in the mailbox cannot be read at the moment"),
            }
            let limit = if begun { SILENT } else { found };
            if heard.elapsed() >= limit {
                let what = if begun { "says nothing any more" } else { "has not looked for calls in its mailbox" };
                return Err(lost(format!("{} {what} for {} s", self.name, limit.as_secs())));
            }
            if touched.elapsed() >= TOUCH {
                touched = Instant::now();
                let (post, id) = (self.post.clone(), self.id.clone());
                let _ = tokio::task::spawn_blocking(move || post.touch(&id)).await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(last);
        }
    }

    /// Whether the file system is one that hosts share.
    async fn put(&self, call: Bytes) -> Result<bool, Broken> {
        let (post, id, known) = (self.post.clone(), self.id.clone(), self.known.clone());
        let put = tokio::task::spawn_blocking(move || {
            if !known.is_dir() {
                return Ok(None);
            }
            post.put(&id, &call)?;
            Ok::<_, std::io::Error>(Some(is_network_fs(&known).ok().flatten().is_some()))
        });
        match put.await {
            Ok(Ok(Some(network))) => Ok(network),
            Ok(Ok(None)) => Err(lost(format!("{} has no mailbox here", self.name))),
            Ok(Err(error)) => Err(lost(format!("the mailbox of {} cannot be written: {error}", self.name))),
            Err(error) => Err(lost(error.to_string())),
        }
    }

    async fn take_away(&self) {
        let (post, id) = (self.post.clone(), self.id.clone());
        let removed = tokio::task::spawn_blocking(move || post.remove(&id)).await;
        if let Ok(Err(error)) = removed {
            debug!(%error, node = self.name, "a call stays in the mailbox until the node clears it away");
        }
    }
}
