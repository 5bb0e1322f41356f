//! `drover.router.v1.RouterService`: checks what comes in, hands it to the writer or reads the last picture, and turns
//! what comes back into messages.

mod keys;
mod members;
mod watch;

use std::pin::Pin;
use std::sync::Arc;

use arc_swap::ArcSwap;
use drover_proto::router as pb;
use drover_proto::router::router_service_server::RouterService;
use drover_proto::{allocator, status_of};
use drover_service::{Context, process};
use drover_types::{ErrorCode, Failure, InjectionId};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::debug_span;

use crate::core::effects::{Answer, Step};
use crate::core::find_by_name;
use crate::core::input::{InjectOrder, InterruptOrder, LaunchOrder, LaunchPlace, ResolveOrder, TerminateOrder};
use crate::metrics::Metrics;
use crate::registry::Shared;
use crate::shell::{RingFile, list_providers};
use crate::store::{Call, Command, Past, StoreHandle, stopping};
use members::MemberWatcher;
use watch::Watcher;

/// Steps of a launch or a termination that may wait for their caller.
const ROOM: usize = 256;
/// Steps of an inject whose number of nodes is not known beforehand.
const MOST_INJECT_STEPS: usize = 20_016;

/// Answers the calls.
pub(crate) struct Service {
    pub(crate) ctx: Context,
    pub(crate) shared: Arc<Shared>,
    pub(crate) store: StoreHandle,
    pub(crate) past: Past,
    pub(crate) metrics: Metrics,
    pub(crate) subscriber_max_bytes: u64,
    pub(crate) allocator: Channel,
    /// The ring of gossip keys.
    pub(crate) ring: RingFile,
    /// The catalogue as last seen, for when the allocator does not answer.
    pub(crate) providers: ArcSwap<Vec<allocator::Provider>>,
}

type Steps<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The steps of a call as messages of one kind. When the first step is a failure, the call itself fails.
async fn messages<T: Send + 'static>(
    mut steps: mpsc::Receiver<Step>,
    read: impl Fn(Step) -> Option<T> + Send + 'static,
) -> Result<Response<Steps<T>>, Status> {
    let first = match steps.recv().await {
        Some(Step::Fail(failure)) => return Err(status_of(&failure)),
        Some(first) => first,
        None => return Err(status_of(&stopping())),
    };
    let stream = tokio_stream::once(first).chain(ReceiverStream::new(steps)).filter_map(move |step| {
        std::future::ready(match step {
            Step::Fail(failure) => Some(Err(status_of(&failure))),
            step => read(step).map(Ok),
        })
    });
    Ok(Response::new(Box::pin(stream)))
}

/// An injection id, when one was chosen.
fn injection_id(text: &str) -> Result<Option<InjectionId>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|error: drover_types::IdError| status_of(&Failure::new(ErrorCode::InvalidRequest, error.to_string())))
}

/// The trace that a request belongs to: the one it names, else the one its call came with. With a tracer the router's own
/// span is its next link.
fn trace_of(request: &'static str, named: String, came_with: &MetadataMap) -> String {
    if named.is_empty() {
        let called = || came_with.get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
        return drover_service::traceparent().or_else(called).unwrap_or_default();
    }
    let span = debug_span!(parent: None, "request", request);
    if span.is_disabled() {
        return named;
    }
    drover_service::remote_parent(&span, &named);
    span.in_scope(drover_service::traceparent).unwrap_or(named)
}

#[tonic::async_trait]
impl RouterService for Service {
    async fn get_info(&self, _: Request<pb::GetInfoRequest>) -> Result<Response<pb::GetInfoResponse>, Status> {
        let registry = self.shared.registry.load();
        Ok(Response::new(pb::GetInfoResponse {
            version: drover_types::VERSION.to_owned(),
            host: process::hostname(),
            pid: std::process::id(),
            control_addr: self.shared.control_addr.get().cloned().unwrap_or_default(),
            last_seq: self.shared.log.last(),
            allocator_error: registry.allocator_error.clone(),
            follower_error: registry.follower_error.clone(),
            store_error: self.shared.unwritable(),
        }))
    }

    type LaunchSwarmStream = Steps<pb::LaunchSwarmResponse>;

    async fn launch_swarm(
        &self,
        request: Request<pb::LaunchSwarmRequest>,
    ) -> Result<Response<Self::LaunchSwarmStream>, Status> {
        let (came_with, _, request) = request.into_parts();
        let Some(spec) = request.spec else {
            return Err(status_of(&Failure::new(
                ErrorCode::InvalidRequest,
                "the launch says nothing of what to launch",
            )));
        };
        let trace = trace_of("launch", request.traceparent, &came_with);
        let place = self.place_of(&spec.provider).await;
        let order = LaunchOrder { request_id: request.request_id, spec, trace, place, prior: None };
        let order = Box::new(order);
        let steps = self.store.stream(ROOM, |steps| Call::Launch(order, steps)).await.map_err(|why| status_of(&why))?;
        messages(steps, |step| match step {
            Step::Launch(message) => Some(message),
            _ => None,
        })
        .await
    }

    type InjectStream = Steps<pb::InjectResponse>;

    async fn inject(&self, request: Request<pb::InjectRequest>) -> Result<Response<Self::InjectStream>, Status> {
        let (came_with, _, request) = request.into_parts();
        let order = InjectOrder {
            request_id: request.request_id,
            swarm: request.swarm_id,
            nodes: request.nodes,
            content: request.content,
            injection_id: injection_id(&request.injection_id)?,
            steer: request.steer,
            trace: trace_of("inject", request.traceparent, &came_with),
            prior: None,
            prior_injection: None,
        };
        let order = Box::new(order);
        let steps = self
            .store
            .stream(MOST_INJECT_STEPS, |steps| Call::Inject(order, steps))
            .await
            .map_err(|why| status_of(&why))?;
        messages(steps, |step| match step {
            Step::Inject(message) => Some(message),
            _ => None,
        })
        .await
    }

    async fn list_swarms(&self, _: Request<pb::ListSwarmsRequest>) -> Result<Response<pb::ListSwarmsResponse>, Status> {
        Ok(Response::new(pb::ListSwarmsResponse::clone(self.shared.registry.load().listing())))
    }

    async fn get_swarm(&self, request: Request<pb::GetSwarmRequest>) -> Result<Response<pb::GetSwarmResponse>, Status> {
        let registry = self.shared.registry.load();
        let view = find_by_name(&registry.swarms, &request.get_ref().swarm_id).map_err(|why| status_of(&why))?;
        let mut swarm = view.swarm.clone();
        swarm.system_prompt = view.prompt.to_string();
        Ok(Response::new(pb::GetSwarmResponse { swarm: Some(swarm), backend_error: registry.allocator_error.clone() }))
    }

    type TerminateSwarmStream = Steps<pb::TerminateSwarmResponse>;

    async fn terminate_swarm(
        &self,
        request: Request<pb::TerminateSwarmRequest>,
    ) -> Result<Response<Self::TerminateSwarmStream>, Status> {
        let request = request.into_inner();
        let order = TerminateOrder { request_id: request.request_id, swarm: request.swarm_id, force: request.force };
        let steps =
            self.store.stream(ROOM, |steps| Call::Terminate(order, steps)).await.map_err(|why| status_of(&why))?;
        messages(steps, |step| match step {
            Step::Terminate(message) => Some(message),
            _ => None,
        })
        .await
    }

    async fn interrupt(
        &self,
        request: Request<pb::InterruptRequest>,
    ) -> Result<Response<pb::InterruptResponse>, Status> {
        let request = request.into_inner();
        let order = InterruptOrder {
            swarm: request.swarm_id,
            nodes: request.nodes,
            injection: injection_id(&request.injection_id)?,
        };
        match self.store.ask(|reply| Command::Call(Call::Interrupt(order, reply))).await {
            Ok(Answer::Interrupted(answer)) => Ok(Response::new(answer)),
            Ok(_) => Err(status_of(&mixed_up())),
            Err(failure) => Err(status_of(&failure)),
        }
    }

    type WatchEventsStream = Steps<pb::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let watcher = Watcher::new(self, request.get_ref()).map_err(|why| status_of(&why))?;
        Ok(Response::new(Box::pin(watcher.stream())))
    }

    async fn list_approvals(
        &self,
        request: Request<pb::ListApprovalsRequest>,
    ) -> Result<Response<pb::ListApprovalsResponse>, Status> {
        let registry = self.shared.registry.load();
        let name = &request.get_ref().swarm_id;
        let approvals = if name.is_empty() {
            registry.approvals.to_vec()
        } else {
            let view = find_by_name(&registry.swarms, name).map_err(|why| status_of(&why))?;
            let of_swarm = |approval: &&pb::Approval| approval.swarm_id == view.swarm.swarm_id;
            registry.approvals.iter().filter(of_swarm).cloned().collect()
        };
        Ok(Response::new(pb::ListApprovalsResponse { approvals_version: registry.approvals_version, approvals }))
    }

    async fn resolve_approval(
        &self,
        request: Request<pb::ResolveApprovalRequest>,
    ) -> Result<Response<pb::ResolveApprovalResponse>, Status> {
        let request = request.into_inner();
        let order = ResolveOrder {
            request_id: request.request_id,
            approval_id: request.approval_id,
            job_id: request.job_id,
            call_id: request.call_id,
            node: request.node_id,
            approved: request.approved,
            decision: request.decision,
        };
        match self.store.ask(|reply| Command::Call(Call::Resolve(order, reply))).await {
            Ok(Answer::Resolved(answer)) => Ok(Response::new(*answer)),
            Ok(_) => Err(status_of(&mixed_up())),
            Err(failure) => Err(status_of(&failure)),
        }
    }

    async fn list_providers(
        &self,
        _: Request<pb::ListProvidersRequest>,
    ) -> Result<Response<pb::ListProvidersResponse>, Status> {
        let providers = self.catalogue().await.map_err(|why| status_of(&why))?;
        Ok(Response::new(pb::ListProvidersResponse { providers: providers.to_vec() }))
    }

    async fn list_members(
        &self,
        request: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        let registry = self.shared.registry.load();
        members::list(&registry, &request.get_ref().swarm_id).map(Response::new).map_err(|why| status_of(&why))
    }

    type WatchMembersStream = Steps<pb::WatchMembersResponse>;

    async fn watch_members(
        &self,
        request: Request<pb::WatchMembersRequest>,
    ) -> Result<Response<Self::WatchMembersStream>, Status> {
        let watcher = MemberWatcher::new(self, &request.get_ref().swarm_id).map_err(|why| status_of(&why))?;
        Ok(Response::new(Box::pin(watcher.stream())))
    }

    async fn list_keys(&self, _: Request<pb::ListKeysRequest>) -> Result<Response<pb::ListKeysResponse>, Status> {
        self.keys().await.map(Response::new).map_err(|why| status_of(&why))
    }

    async fn add_key(&self, request: Request<pb::AddKeyRequest>) -> Result<Response<pb::AddKeyResponse>, Status> {
        let answer = Self::add_key(self, &request.get_ref().key).await;
        answer.map(Response::new).map_err(|why| status_of(&why))
    }

    async fn use_key(&self, request: Request<pb::UseKeyRequest>) -> Result<Response<pb::UseKeyResponse>, Status> {
        let request = request.get_ref();
        let answer = Self::use_key(self, request.key_id, request.force).await;
        answer.map(Response::new).map_err(|why| status_of(&why))
    }

    async fn remove_key(
        &self,
        request: Request<pb::RemoveKeyRequest>,
    ) -> Result<Response<pb::RemoveKeyResponse>, Status> {
        let request = request.get_ref();
        let answer = Self::remove_key(self, request.key_id, request.force).await;
        answer.map(Response::new).map_err(|why| status_of(&why))
    }

    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        let subject = request.into_inner().subject;
        let explained = self.store.ask(|reply| Command::Explain(subject, reply)).await;
        explained.map(Response::new).map_err(|why| status_of(&why))
    }
}

impl Service {
    /// The catalogue; as last seen, while the allocator does not answer.
    async fn catalogue(&self) -> Result<Arc<Vec<allocator::Provider>>, Failure> {
        match list_providers(self.allocator.clone()).await {
            Ok(providers) => {
                let providers = Arc::new(providers);
                self.providers.store(Arc::clone(&providers));
                Ok(providers)
            }
            Err(failure) => {
                let known = self.providers.load_full();
                if known.is_empty() { Err(failure) } else { Ok(known) }
            }
        }
    }

    /// The entry of the catalogue that a launch means, so that its first word can name it. Whether it can be launched on is
    /// the allocator's to say; while that does not answer, the launch waits for it all the same.
    async fn place_of(&self, asked: &str) -> Option<LaunchPlace> {
        let providers = self.catalogue().await.ok()?;
        let meant = providers.iter().find(|provider| asked.is_empty() || provider.id == asked)?;
        Some(LaunchPlace { backend: meant.backend.clone(), provider: meant.id.clone() })
    }
}

fn mixed_up() -> Failure {
    Failure::new(ErrorCode::Internal, "the answer belongs to another call")
}
