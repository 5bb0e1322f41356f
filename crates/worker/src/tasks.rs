//! Takes tasks of the dispatcher on this node: pages to read, whole or for what a model is asked about them. Comes to the dispatcher by itself, again and again, and shows it
//! the node's certificate.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_config::{Config, NodeScalingConfig};
use drover_dispatcher::nodes::{Hand, KINDS};
use drover_dispatcher::pool::NODE_ID;
use drover_mailbox::Mailbox;
use drover_proto::tasks::task_service_client::TaskServiceClient;
use drover_proto::tasks::{Attempt, Offer, WorkRequest, WorkResponse, work_request, work_response};
use drover_service::pki::{Identity, IdentityHandle};
use drover_service::{Context, MAX_MESSAGE_BYTES, connect_node, why};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::door::find_dispatcher;

/// What the record of a node that takes tasks says beside its agent.
pub(crate) const CAPABILITY: &str = ",tasks=fetch/extract";

/// Pages at once.
const AT_ONCE: u32 = 16;
/// Pause before the dispatcher is looked for again; it doubles up to the longest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// What it takes to take tasks.
pub(crate) struct Tasks {
    ctx: Context,
    identity: PathBuf,
    mailbox: PathBuf,
    address: Option<String>,
    scaling: NodeScalingConfig,
}

impl Tasks {
    /// `None` when this node is not to take any, or cannot show who it is.
    pub(crate) fn of(mailbox: &Mailbox, identity: Option<&Path>, config: &Config, ctx: &Context) -> Option<Self> {
        if !config.worker.run_tasks {
            return None;
        }
        let Some(identity) = identity else {
            warn!("worker.run_tasks is set, but this node was started without an identity: it takes no tasks");
            return None;
        };
        Some(Self {
            ctx: ctx.clone(),
            identity: identity.to_owned(),
            mailbox: mailbox.root().to_owned(),
            address: config.worker.pool_address.clone(),
            scaling: config.node_scaling.clone().unwrap_or_default(),
        })
    }

    /// Takes tasks until the node is over.
    pub(crate) async fn serve(self, over: CancellationToken) {
        let hand = match Hand::new(&self.scaling) {
            Ok(hand) => Arc::new(hand),
            Err(error) => return warn!(error = format!("{error:#}"), "this node takes no tasks"),
        };
        let mut pause = AGAIN.0;
        loop {
            let mut worked = false;
            tokio::select! {
                ended = self.work(&hand, &mut worked) => debug!(why = why(&ended), "no tasks come for now"),
                () = over.cancelled() => return,
                () = self.ctx.shutdown().cancelled() => return,
            }
            if worked {
                pause = AGAIN.0;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(AGAIN.1),
                () = over.cancelled() => return,
                () = self.ctx.shutdown().cancelled() => return,
            }
        }
    }

    /// One stream to the dispatcher, to its end.
    async fn work(&self, hand: &Arc<Hand>, worked: &mut bool) -> Status {
        let addr = match find_dispatcher(self.address.as_deref(), &self.mailbox).await {
            Ok(addr) => addr,
            Err(why) => return Status::unavailable(why),
        };
        let dir = self.identity.clone();
        let identity = match tokio::task::spawn_blocking(move || Identity::load(&dir)).await {
            Ok(Ok(identity)) => IdentityHandle::new(identity),
            Ok(Err(error)) => return Status::unauthenticated(error.to_string()),
            Err(error) => return Status::internal(error.to_string()),
        };
        let mut client = TaskServiceClient::new(connect_node(&identity, addr, NODE_ID))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (tell, told) = mpsc::channel::<WorkRequest>(AT_ONCE as usize * 2);
        let offer = Offer { kinds: KINDS.map(|kind| kind.as_str().to_owned()).to_vec(), at_once: AT_ONCE };
        let said = futures::stream::unfold(told, |mut told| async move { Some((told.recv().await?, told)) });
        let first = WorkRequest { said: Some(work_request::Said::Offer(offer)) };
        let said = futures::stream::iter([first]).chain(said);
        let mut orders = match client.work(said).await {
            Ok(orders) => orders.into_inner(),
            Err(status) => return status,
        };
        *worked = true;
        info!(dispatcher = %addr, "this node takes tasks");
        let running = Running::default();
        // Whatever is under way ends with the stream: the dispatcher gives it to another node.
        let all = CancellationToken::new();
        let _guard = all.clone().drop_guard();
        loop {
            let order = match orders.message().await {
                Ok(Some(WorkResponse { said: Some(order) })) => order,
                Ok(Some(WorkResponse { said: None })) => continue,
                Ok(None) => return Status::unavailable("the dispatcher has ended the stream"),
                Err(status) => return status,
            };
            match order {
                work_response::Said::Attempt(attempt) => {
                    let stop = all.child_token();
                    running.add(attempt.attempt, stop.clone());
                    let (hand, tell, running) = (Arc::clone(hand), tell.clone(), running.clone());
                    self.ctx.spawn("task", do_one(hand, attempt, stop, tell, running));
                }
                work_response::Said::Void(attempt) => running.stop(attempt),
            }
        }
    }
}

async fn do_one(
    hand: Arc<Hand>,
    attempt: Attempt,
    stop: CancellationToken,
    tell: mpsc::Sender<WorkRequest>,
    running: Running,
) {
    tokio::select! {
        result = hand.do_attempt(&attempt) => {
            running.stop(attempt.attempt);
            // A stream that is gone takes no results, and its attempts are void.
            let _ = tell.send(WorkRequest { said: Some(work_request::Said::Result(result)) }).await;
        }
        () = stop.cancelled() => {}
    }
}

/// Attempts under way, by number.
#[derive(Clone, Default)]
struct Running(Arc<Mutex<HashMap<u64, CancellationToken>>>);

impl Running {
    fn add(&self, attempt: u64, stop: CancellationToken) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt, stop);
    }

    fn stop(&self, attempt: u64) {
        if let Some(stop) = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&attempt) {
            stop.cancel();
        }
    }
}
