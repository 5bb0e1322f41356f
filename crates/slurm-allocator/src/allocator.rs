//! Sends each request to the backend that has the swarm, and lets one launch per swarm run at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_config::Config;
use drover_proto::common::LaunchSpec;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, SwarmId};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio::sync::oneshot;

use crate::allocation::Allocation;
use crate::backend::{Backend, Request};
use crate::board::Board;
use crate::catalogue::{self, BackendKind};
use crate::spec::Spec;

type Outcome = Result<Allocation, Failure>;
type Launch = Shared<BoxFuture<'static, Outcome>>;

/// What the gRPC service calls. Cheap to clone.
#[derive(Clone)]
pub struct Allocator {
    ctx: Context,
    config: Arc<Config>,
    board: Board,
    backends: Arc<BTreeMap<BackendKind, Arc<dyn Backend>>>,
    /// Launches that are under way. A repeated request waits for the same one.
    launching: Arc<Mutex<BTreeMap<SwarmId, Launch>>>,
}

impl Allocator {
    /// With these backends, which report to this board.
    pub fn new(
        ctx: &Context,
        config: Arc<Config>,
        board: Board,
        backends: BTreeMap<BackendKind, Arc<dyn Backend>>,
    ) -> Self {
        Self { ctx: ctx.clone(), config, board, backends: Arc::new(backends), launching: Arc::default() }
    }

    /// The catalogue.
    pub fn providers(&self) -> Vec<drover_config::ProviderConfig> {
        catalogue::providers(&self.config)
    }

    /// Where changes are seen.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The swarm's allocation, started when there is none.
    pub async fn ensure(&self, swarm: SwarmId, asked: &LaunchSpec) -> Outcome {
        if let Some(known) = self.board.get(&swarm)
            && !self.launching().contains_key(&swarm)
        {
            return Ok((*known).clone());
        }
        let (kind, provider) = catalogue::choose(&self.config, &asked.provider)?;
        let spec = Spec::parse(asked, &provider, self.config.worker.agent)?;
        let backend = self.backends.get(&kind).ok_or_else(|| {
            Failure::new(ErrorCode::ProviderUnavailable, format!("the {kind} backend is not running"))
        })?;
        let launch = self.launch(Arc::clone(backend), Request { swarm, spec, provider: provider.id });
        launch.await
    }

    /// Joins the launch of this swarm that is under way, or begins one. It runs as a task of its own: a caller that goes
    /// away does not leave half a launch behind.
    fn launch(&self, backend: Arc<dyn Backend>, request: Request) -> Launch {
        let swarm = request.swarm.clone();
        let mut launching = self.launching();
        if let Some(launch) = launching.get(&swarm) {
            return launch.clone();
        }
        // Looked at again under the lock: a launch that ended in between has put its result there first.
        if let Some(known) = self.board.get(&swarm) {
            return futures::future::ready(Ok((*known).clone())).boxed().shared();
        }
        let (sender, receiver) = oneshot::channel::<Outcome>();
        let launch = receiver
            .map(|outcome| {
                outcome.unwrap_or_else(|_| {
                    Err(Failure::new(ErrorCode::ShuttingDown, "the allocator is shutting down")
                        .hint("repeat the request"))
                })
            })
            .boxed()
            .shared();
        launching.insert(swarm.clone(), launch.clone());
        let all = Arc::clone(&self.launching);
        self.ctx.spawn("launch", async move {
            let outcome = backend.launch(request).await;
            all.lock().unwrap_or_else(PoisonError::into_inner).remove(&swarm);
            let _ = sender.send(outcome);
        });
        launch
    }

    /// Begins the end of the swarm's allocation. False when there is none.
    pub async fn release(&self, swarm: &SwarmId, force: bool) -> Result<bool, Failure> {
        let under_way = self.launching().get(swarm).cloned();
        if let Some(launch) = under_way {
            // A failed launch leaves nothing to release, which is found out below.
            let _ = launch.await;
        }
        let Some(known) = self.board.get(swarm) else { return Ok(false) };
        if let Some(backend) = self.backends.get(&known.backend) {
            backend.release(swarm, force).await?;
        }
        Ok(true)
    }

    fn launching(&self) -> MutexGuard<'_, BTreeMap<SwarmId, Launch>> {
        self.launching.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
