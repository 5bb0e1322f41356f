//! `swarm_list` for many askers at once.
//!
//! Clients poll the list, and every poll has the same answer. Requests that come while the router is being asked wait for
//! the next time it is asked, all together: each sees the state at or after its own arrival, and the router is asked as
//! often as it can answer, not as often as clients ask.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drover_proto::failure_of;
use drover_service::{Caller, Context, Door};
use drover_types::{ErrorCode, Failure};
use tokio::sync::{mpsc, oneshot};

use crate::answer::swarm_list_body;
use crate::upstream::Upstream;

type Answer = Result<Bytes, Arc<Failure>>;

/// Askers that may wait before further ones wait for a place.
const WAITING: usize = 4096;
/// After the word to stop, the router still has this long to answer.
const DRAIN: Duration = Duration::from_secs(1);

/// Where to ask.
#[derive(Clone)]
pub(crate) struct Lister {
    asks: mpsc::Sender<oneshot::Sender<Answer>>,
}

impl Lister {
    pub(crate) fn start(ctx: &Context, upstream: Arc<dyn Upstream>) -> Self {
        let (asks, mut waiting) = mpsc::channel::<oneshot::Sender<Answer>>(WAITING);
        let shutdown = ctx.shutdown().clone();
        ctx.spawn("control-list", async move {
            let mut askers = Vec::new();
            while waiting.recv_many(&mut askers, WAITING).await > 0 {
                let stop = async {
                    shutdown.cancelled().await;
                    tokio::time::sleep(DRAIN).await;
                };
                let answer = tokio::select! {
                    list = upstream.list(Caller::own(Door::JsonLine)) => match list {
                        Ok(list) => Ok(swarm_list_body(&list.swarms)),
                        Err(status) => Err(Arc::new(failure_of(&status))),
                    },
                    () = stop => return,
                };
                for asker in askers.drain(..) {
                    // An asker may have left.
                    let _ = asker.send(answer.clone());
                }
            }
        });
        Self { asks }
    }

    /// The value of `swarms` as JSON.
    pub(crate) async fn swarms(&self) -> Answer {
        let (asker, answer) = oneshot::channel();
        let gone = || Arc::new(Failure::new(ErrorCode::ShuttingDown, "the router is shutting down"));
        self.asks.send(asker).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}
