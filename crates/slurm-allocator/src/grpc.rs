//! `drover.allocator.v1.AllocatorService`: checks what comes in, speaks the protocol's words on the way out.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;

use drover_config::ProviderConfig;
use drover_proto::allocator as pb;
use drover_proto::allocator::allocator_service_server::AllocatorService;
use drover_proto::status_of;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, SwarmId};
use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status};

use crate::allocation::{AllocatedNode, Allocation, AllocationState, WorkerState};
use crate::allocator::Allocator;
use crate::board::{Update, Viewer};
use crate::cluster::{Clusters, Report};

/// The service.
pub(crate) struct Grpc {
    allocator: Allocator,
    followers: Followers,
    clusters: Clusters,
    ctx: Context,
}

/// Which follower reaches the files of what is launched on an entry of the catalogue; those of this host are not listed.
type Followers = Arc<BTreeMap<String, String>>;

impl Grpc {
    pub(crate) fn new(allocator: Allocator, clusters: &Clusters, ctx: &Context) -> Self {
        Self { allocator, followers: Arc::new(clusters.followers()), clusters: clusters.clone(), ctx: ctx.clone() }
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchAllocationsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AllocatorService for Grpc {
    async fn ensure_allocation(
        &self,
        request: Request<pb::EnsureAllocationRequest>,
    ) -> Result<Response<pb::EnsureAllocationResponse>, Status> {
        let request = request.into_inner();
        let swarm = swarm_id(&request.swarm_id)?;
        let spec = request.spec.ok_or_else(|| {
            status_of(&Failure::new(ErrorCode::InvalidRequest, "the request has no spec").hint("say what to launch"))
        })?;
        let allocation = self.allocator.ensure(swarm, &spec).await.map_err(|failure| status_of(&failure))?;
        let allocation = Some(message(&allocation, &self.followers));
        Ok(Response::new(pb::EnsureAllocationResponse { allocation }))
    }

    async fn release_allocation(
        &self,
        request: Request<pb::ReleaseAllocationRequest>,
    ) -> Result<Response<pb::ReleaseAllocationResponse>, Status> {
        let request = request.into_inner();
        let swarm = swarm_id(&request.swarm_id)?;
        let known = self.allocator.release(&swarm, request.force).await.map_err(|failure| status_of(&failure))?;
        Ok(Response::new(pb::ReleaseAllocationResponse { known }))
    }

    type WatchAllocationsStream = WatchStream;

    async fn watch_allocations(
        &self,
        _request: Request<pb::WatchAllocationsRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        use pb::watch_allocations_response::Change;
        let (all, viewer) = self.allocator.board().watch();
        let snapshot: Vec<_> = all
            .iter()
            .map(|allocation| Change::Allocation(message(allocation, &self.followers)))
            .chain([Change::SnapshotEnd(true)])
            .map(|change| Ok(pb::WatchAllocationsResponse { change: Some(change) }))
            .collect();
        let shutdown = self.ctx.shutdown().clone();
        let ended = async move {
            shutdown.cancelled().await;
            Err(status_of(&Failure::new(ErrorCode::ShuttingDown, "the allocator is shutting down").hint("watch again")))
        };
        // The first of the two to end ends the stream: with the shutdown it ends with a status that says so.
        let changes = stream::select(changes(viewer, Arc::clone(&self.followers)), stream::once(ended));
        let changes = changes.scan(false, |over, change| {
            let before = std::mem::replace(over, change.is_err());
            futures::future::ready((!before).then_some(change))
        });
        Ok(Response::new(Box::pin(stream::iter(snapshot).chain(changes))))
    }

    async fn list_providers(
        &self,
        _request: Request<pb::ListProvidersRequest>,
    ) -> Result<Response<pb::ListProvidersResponse>, Status> {
        let providers = self.allocator.providers().into_iter().map(|entry| {
            let report = self.clusters.get(&entry.id).map(|cluster| cluster.report()).unwrap_or_default();
            provider(entry, report)
        });
        Ok(Response::new(pb::ListProvidersResponse { providers: providers.collect() }))
    }
}

/// Changes as they are asked for. Nothing is queued: what a slow caller has not asked for yet is not made yet.
fn changes(
    viewer: Viewer,
    followers: Followers,
) -> impl Stream<Item = Result<pb::WatchAllocationsResponse, Status>> + Send {
    use pb::watch_allocations_response::Change;
    stream::unfold((viewer, VecDeque::new(), followers), |(mut viewer, mut ready, followers)| async move {
        if ready.is_empty() {
            ready.extend(viewer.next().await?);
        }
        let change = match ready.pop_front()? {
            Update::Allocation(allocation) => Change::Allocation(message(&allocation, &followers)),
            Update::Progress(line) => Change::Progress(pb::LaunchProgress {
                swarm_id: line.swarm.to_string(),
                stage: line.stage.to_owned(),
                message: line.message.clone(),
            }),
        };
        Some((Ok(pb::WatchAllocationsResponse { change: Some(change) }), (viewer, ready, followers)))
    })
}

fn swarm_id(text: &str) -> Result<SwarmId, Status> {
    text.parse().map_err(|error: drover_types::IdError| {
        status_of(&Failure::new(ErrorCode::InvalidRequest, format!("swarm id {text:?} is not one: {error}")))
    })
}

fn message(allocation: &Allocation, followers: &BTreeMap<String, String>) -> pb::Allocation {
    let state = match allocation.state {
        AllocationState::Pending => pb::AllocationState::Pending,
        AllocationState::Running => pb::AllocationState::Running,
        AllocationState::Completing => pb::AllocationState::Completing,
        AllocationState::Completed => pb::AllocationState::Completed,
        AllocationState::Failed => pb::AllocationState::Failed,
    };
    pb::Allocation {
        swarm_id: allocation.swarm.to_string(),
        job_id: allocation.job.to_string(),
        state: state.into(),
        backend_state: allocation.backend_state.clone(),
        reason: allocation.reason.clone(),
        nodes: allocation.nodes.iter().map(node).collect(),
        backend: allocation.backend.as_str().to_owned(),
        provider: allocation.provider.clone(),
        follower: followers.get(&allocation.provider).cloned().unwrap_or_default(),
    }
}

fn node(node: &AllocatedNode) -> pb::AllocatedNode {
    let state = match node.state {
        WorkerState::Pending => pb::WorkerState::Pending,
        WorkerState::Running => pb::WorkerState::Running,
        WorkerState::Restarting => pb::WorkerState::Restarting,
        WorkerState::Exited => pb::WorkerState::Exited,
        WorkerState::Failed => pb::WorkerState::Failed,
    };
    pb::AllocatedNode {
        node_id: node.node.0,
        host: node.host.clone(),
        generation: node.generation.0,
        state: state.into(),
        reason: node.reason.clone(),
        pid: node.pid,
        restarts: node.restarts,
    }
}

fn provider(provider: ProviderConfig, report: Report) -> pb::Provider {
    let orphans = report.orphans.into_iter().map(|(job, swarm, state)| pb::Orphan {
        job_id: job.to_string(),
        swarm_id: swarm.to_string(),
        backend_state: state,
    });
    let fields = provider.launch_fields.into_iter().map(|field| pb::LaunchField {
        key: field.key,
        label: field.label,
        r#type: field.kind,
        default: field.default,
        required: field.required,
        options: field.options,
    });
    pb::Provider {
        id: provider.id,
        label: provider.label,
        backend: provider.backend.as_str().to_owned(),
        provider_ref: provider.provider_ref,
        cluster_profile: provider.profile.unwrap_or_default(),
        defaults: provider.defaults.into_iter().collect(),
        disabled: provider.disabled_reason.is_some(),
        disabled_reason: provider.disabled_reason.unwrap_or_default(),
        launch_fields: fields.collect(),
        trouble: report.trouble,
        orphans: orphans.collect(),
    }
}
