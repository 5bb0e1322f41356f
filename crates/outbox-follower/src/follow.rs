//! One Follow stream: its lanes, the commands to them, and the bytes that wait for the client.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use drover_proto::mailbox::{FollowRequest, FollowResponse};
use drover_proto::status_of;
use drover_service::Context;
use drover_types::{ErrorCode, Failure};
use futures::{Stream, StreamExt as _};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;
use tracing::{debug, info};

use crate::lane::{Bell, Command, Lane};
use crate::refs::{self, NodeKey};
use crate::run::Shared;
use crate::usage::Use;

/// Lines that may wait for one client, in KiB. When it reads slowly its lanes wait; nobody else does.
const BUDGET_KIB: u32 = 4 << 10;
/// Responses that may wait; small ones run into this first.
const MAX_WAITING: usize = 1024;
/// Changes that a lane may have before it.
const MAX_COMMANDS: usize = 64;

struct Item {
    response: Result<FollowResponse, Status>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Where lanes put what they read. Blocks while too much waits.
#[derive(Clone)]
pub(crate) struct Outgoing {
    queue: mpsc::Sender<Item>,
    budget: Arc<Semaphore>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Outgoing {
    /// False when the stream is over.
    pub(crate) fn send(&self, response: FollowResponse) -> bool {
        let kib = (response.lines.len() / 1024 + 1).min(BUDGET_KIB as usize) as u32;
        let sending = async {
            let permit = Arc::clone(&self.budget).acquire_many_owned(kib).await.ok()?;
            self.queue.send(Item { response: Ok(response), _permit: Some(permit) }).await.ok()
        };
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => false,
                sent = sending => sent.is_some(),
            }
        })
    }
}

/// What the client reads. Dropping it ends the stream's lanes.
pub(crate) struct Responses {
    queue: mpsc::Receiver<Item>,
    _stop: DropGuard,
}

impl Stream for Responses {
    type Item = Result<FollowResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        self.queue.poll_recv(cx).map(|item| item.map(|item| item.response))
    }
}

/// Starts a stream.
pub(crate) fn start<R>(shared: &Arc<Shared>, requests: R) -> Responses
where
    R: Stream<Item = Result<FollowRequest, Status>> + Send + Unpin + 'static,
{
    let (queue, responses) = mpsc::channel(MAX_WAITING);
    let stop = shared.ctx.shutdown().child_token();
    let outgoing = Outgoing {
        queue: queue.clone(),
        budget: Arc::new(Semaphore::new(BUDGET_KIB as usize)),
        stop: stop.clone(),
        runtime: Handle::current(),
    };
    let mut bells = Vec::new();
    for _ in 0..shared.lanes {
        let lane = Lane::new(
            &shared.settings,
            shared.settings.max_open / shared.lanes,
            Arc::clone(&shared.watches),
            shared.metrics.clone(),
            outgoing.clone(),
        );
        bells.push(lane.bell());
        run_lane(&shared.ctx, lane);
    }
    shared.register(&bells);
    shared.metrics.streams.inc();
    let used = shared.usage.begin();
    let session = Session { shared: Arc::clone(shared), bells, queue, stop: stop.clone(), _used: used };
    shared.ctx.spawn("follow", session.run(requests));
    Responses { queue: responses, _stop: stop.drop_guard() }
}

fn run_lane(ctx: &Context, lane: Lane) {
    let failing = ctx.clone();
    ctx.spawn("follow lane", async move {
        if tokio::task::spawn_blocking(move || lane.run()).await.is_err() {
            failing.fail(anyhow::anyhow!("a thread that reads outboxes panicked"));
        }
    });
}

struct Session {
    shared: Arc<Shared>,
    bells: Vec<Arc<Bell>>,
    queue: mpsc::Sender<Item>,
    stop: CancellationToken,
    _used: Use,
}

impl Session {
    async fn run<R>(self, mut requests: R)
    where
        R: Stream<Item = Result<FollowRequest, Status>> + Send + Unpin + 'static,
    {
        debug!("a follower connected");
        let room = Arc::new(Semaphore::new(MAX_COMMANDS));
        let failure = loop {
            let request = tokio::select! {
                () = self.stop.cancelled() => break self.shutting_down(),
                request = requests.next() => request,
            };
            let request = match request {
                Some(Ok(request)) => request,
                // The client has nothing more to say but goes on reading.
                None => {
                    self.stop.cancelled().await;
                    break self.shutting_down();
                }
                Some(Err(status)) => {
                    debug!(%status, "a follower went away");
                    break None;
                }
            };
            let shares = match self.divide(&request) {
                Ok(shares) => shares,
                Err(failure) => break Some(failure),
            };
            for (bell, commands) in self.bells.iter().zip(shares) {
                if commands.is_empty() {
                    continue;
                }
                let permit = tokio::select! {
                    () = self.stop.cancelled() => None,
                    permit = Arc::clone(&room).acquire_owned() => permit.ok(),
                };
                bell.command(commands, permit);
            }
            for outbox in &request.remove {
                if let Ok(id) = refs::outbox(Some(outbox)) {
                    self.shared.inboxes.close_node(NodeKey::of(&id));
                }
            }
        };
        self.bells.iter().for_each(|bell| bell.stop());
        // Only a follower that ends by itself has others of its kind on other login hosts.
        if self.shared.settings.end_when_idle.is_some() && self.shared.metrics.streams.get() <= 1 {
            self.shared.inboxes.close_all().await;
        }
        if let Some(failure) = failure {
            info!(%failure, "follow stream ended");
            let last = Item { response: Err(status_of(&failure)), _permit: None };
            // A client that does not read has lost its connection or will see it close.
            let _ = self.queue.send_timeout(last, Duration::from_secs(1)).await;
        }
    }

    fn shutting_down(&self) -> Option<Failure> {
        self.shared.ctx.shutdown().is_cancelled().then(|| {
            Failure::new(ErrorCode::ShuttingDown, "the outbox follower is shutting down")
                .hint("follow again from the last cursors; it comes back when it is restarted")
        })
    }

    /// What of a request each lane has to do, in order. Everything of a node is in one lane.
    fn divide(&self, request: &FollowRequest) -> Result<Vec<Vec<Command>>, Failure> {
        let mut shares: Vec<Vec<Command>> = self.bells.iter().map(|_| Vec::new()).collect();
        let mut put = |node: &NodeKey, command| shares[node.place(self.bells.len())].push(command);
        for outbox in &request.remove {
            let id = refs::outbox(Some(outbox))?;
            put(&NodeKey::of(&id), Command::Drop(id));
        }
        for from in &request.add {
            let id = refs::outbox(from.outbox.as_ref())?;
            put(&NodeKey::of(&id), Command::Follow(id, refs::cursor(from.cursor.as_ref())));
        }
        for (nodes, hot) in [(&request.cold, false), (&request.hot, true)] {
            for node in nodes {
                let node = refs::node(Some(node))?;
                put(&node.clone(), Command::SetHot(node, hot));
            }
        }
        Ok(shares)
    }
}

impl Drop for Session {
    /// However a session ends, its lanes end too: they are threads, which nobody can take away from outside. A session that is
    /// dropped with its runtime gets no further turn in which it could tell them.
    fn drop(&mut self) {
        self.bells.iter().for_each(|bell| bell.stop());
        self.stop.cancel();
        self.shared.metrics.streams.dec();
    }
}
