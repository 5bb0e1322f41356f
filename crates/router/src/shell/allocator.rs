//! The client of the allocator: what it sees, and what it is asked.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::allocator as pb;
use drover_proto::allocator::allocator_service_client::AllocatorServiceClient;
use drover_proto::allocator::watch_allocations_response::Change;
use drover_proto::allocator::{AllocationState, WorkerState};
use drover_proto::common::LaunchSpec;
use drover_proto::failure_of;
use drover_service::{Context, MAX_MESSAGE_BYTES, in_trace, now_us};
use drover_types::{ErrorCode, Failure, NodeIndex, SwarmId};
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use super::Backoff;
use super::orders::Plans;
use crate::core::input::{AllocatedNode, Allocation, Input};
use crate::store::{Command, StoreHandle};

/// Calls at the same time: a backend that hangs for one swarm must not hold up the others.
const CALLS: usize = 64;
/// A backend may take its time; a call that takes longer is made again, which is safe.
const ENSURE_TIMEOUT: Duration = Duration::from_mins(5);
const RELEASE_TIMEOUT: Duration = Duration::from_mins(1);
/// The catalogue is asked for by people who wait.
const LIST_TIMEOUT: Duration = Duration::from_secs(1);

type Client = AllocatorServiceClient<Channel>;

/// Starts the tasks that talk to the allocator.
pub(crate) fn run(ctx: &Context, plans: &Arc<Plans>, store: &StoreHandle, channel: Channel) {
    let client = client(channel);
    let shutdown = ctx.shutdown().clone();
    let again = Arc::new(tokio::sync::Notify::new());
    let watch = watch_for_ever(store.clone(), client.clone(), Arc::clone(&again));
    ctx.spawn("watch-allocations", async move {
        shutdown.run_until_cancelled(watch).await;
    });
    let shutdown = ctx.shutdown().clone();
    let orders = ask_for_ever(ctx.clone(), Arc::clone(plans), store.clone(), client, again);
    ctx.spawn("ask-allocator", async move {
        shutdown.run_until_cancelled(orders).await;
    });
}

fn client(channel: Channel) -> Client {
    AllocatorServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// The catalogue, if the allocator answers soon.
pub(crate) async fn list_providers(channel: Channel) -> Result<Vec<pb::Provider>, Failure> {
    let mut client = client(channel);
    match tokio::time::timeout(LIST_TIMEOUT, client.list_providers(pb::ListProvidersRequest {})).await {
        Ok(Ok(response)) => Ok(response.into_inner().providers),
        Ok(Err(status)) => Err(failure_of(&status)),
        Err(_) => Err(Failure::new(ErrorCode::BackendUnavailable, "the allocator does not answer")
            .hint("`drover doctor` checks it; `drover daemon slurm-allocator` starts it")),
    }
}

async fn watch_for_ever(store: StoreHandle, client: Client, again: Arc<tokio::sync::Notify>) {
    let mut backoff = Backoff::default();
    loop {
        let ended = tokio::select! {
            ended = watch(&store, client.clone(), &mut backoff) => ended,
            () = again.notified() => continue,
        };
        let why = failure_of(&ended).message;
        debug!(error = why, "no stream from the allocator");
        store.tell(Command::Happened(Input::AllocatorDown(why))).await;
        tokio::time::sleep(backoff.after_failure()).await;
    }
}

/// Watches allocations until the stream breaks, and says why it did.
async fn watch(store: &StoreHandle, mut client: Client, backoff: &mut Backoff) -> Status {
    // Before the call: whatever was answered before it is in the snapshot.
    let begun_at = now_us();
    let mut changes = match client.watch_allocations(pb::WatchAllocationsRequest {}).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    let mut snapshot = Some(Vec::new());
    loop {
        let change = match changes.message().await {
            Ok(Some(response)) => response.change,
            Ok(None) => return Status::unavailable("the allocator ended the stream"),
            Err(status) => return status,
        };
        let input = match change {
            Some(Change::Allocation(allocation)) => match (allocation_of(allocation), &mut snapshot) {
                (None, _) => continue,
                (Some(allocation), Some(snapshot)) => {
                    snapshot.push(allocation);
                    continue;
                }
                (Some(allocation), None) => Input::AllocationChanged(allocation),
            },
            Some(Change::SnapshotEnd(_)) => {
                let allocations = snapshot.take().unwrap_or_default();
                info!(allocations = allocations.len(), "watching allocations");
                backoff.reset();
                Input::AllocatorSnapshot { begun_at, allocations }
            }
            Some(Change::Progress(progress)) => match progress.swarm_id.parse() {
                Ok(swarm) => Input::AllocatorProgress { swarm, stage: progress.stage, message: progress.message },
                Err(_) => continue,
            },
            None => continue,
        };
        store.tell(Command::Happened(input)).await;
    }
}

fn allocation_of(told: pb::Allocation) -> Option<Allocation> {
    let Ok(swarm) = told.swarm_id.parse::<SwarmId>() else {
        warn!(swarm_id = told.swarm_id, "the allocator has an allocation of no swarm");
        return None;
    };
    let state = AllocationState::try_from(told.state).unwrap_or(AllocationState::Unspecified);
    let nodes = told
        .nodes
        .into_iter()
        .map(|node| AllocatedNode {
            index: NodeIndex(node.node_id),
            host: node.host,
            generation: node.generation,
            state: WorkerState::try_from(node.state).unwrap_or(WorkerState::Unspecified),
            reason: node.reason,
            pid: node.pid,
            restarts: node.restarts,
        })
        .collect();
    Some(Allocation {
        swarm,
        job: told.job_id,
        state,
        backend_state: told.backend_state,
        reason: told.reason,
        backend: told.backend,
        provider: told.provider,
        follower: told.follower,
        nodes,
    })
}

async fn ask_for_ever(
    ctx: Context,
    plans: Arc<Plans>,
    store: StoreHandle,
    client: Client,
    again: Arc<tokio::sync::Notify>,
) {
    let calls = Arc::new(Semaphore::new(CALLS));
    loop {
        let plan = plans.allocator.take();
        if plan.watch_again {
            again.notify_one();
        }
        // Releases first, and never behind a hung launch: what they give back may be what a launch waits for.
        for (swarm, force) in plan.release {
            let (store, client) = (store.clone(), client.clone());
            ctx.spawn("release-allocation", async move {
                let result = release(client, &swarm, force).await;
                store.tell(Command::Happened(Input::Released(swarm, result))).await;
            });
        }
        for (swarm, (spec, trace)) in plan.ensure {
            let (store, client, calls) = (store.clone(), client.clone(), Arc::clone(&calls));
            let shutdown = ctx.shutdown().clone();
            ctx.spawn("ensure-allocation", async move {
                let work = async {
                    let _permit = calls.acquire().await;
                    let result = ensure(client, &swarm, &spec, &trace).await;
                    store.tell(Command::Happened(Input::Ensured(swarm, result))).await;
                };
                shutdown.run_until_cancelled(work).await;
            });
        }
        plans.allocator.rung().await;
    }
}

async fn ensure(mut client: Client, swarm: &SwarmId, spec: &LaunchSpec, trace: &str) -> Result<Allocation, Failure> {
    let request = pb::EnsureAllocationRequest { swarm_id: swarm.to_string(), spec: Some(spec.clone()) };
    match tokio::time::timeout(ENSURE_TIMEOUT, client.ensure_allocation(in_trace(request, trace))).await {
        Ok(Ok(response)) => response
            .into_inner()
            .allocation
            .and_then(allocation_of)
            .filter(|allocation| allocation.swarm == *swarm)
            .ok_or_else(|| Failure::new(ErrorCode::Internal, "the allocator answered without an allocation")),
        Ok(Err(status)) => Err(failure_of(&status)),
        Err(_) => Err(late(ENSURE_TIMEOUT)),
    }
}

async fn release(mut client: Client, swarm: &SwarmId, force: bool) -> Result<bool, Failure> {
    let request = pb::ReleaseAllocationRequest { swarm_id: swarm.to_string(), force };
    match tokio::time::timeout(RELEASE_TIMEOUT, client.release_allocation(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner().known),
        Ok(Err(status)) => Err(failure_of(&status)),
        Err(_) => Err(late(RELEASE_TIMEOUT)),
    }
}

fn late(after: Duration) -> Failure {
    Failure::new(ErrorCode::BackendUnavailable, format!("the allocator did not answer within {} s", after.as_secs()))
}
