//! What each call needs, and what is written down of those that change something. A call that is added to the service does not
//! compile until it has its place here.

use std::pin::Pin;

use drover_proto::router as pb;
use drover_proto::router::router_service_server::RouterService;
use futures::{Stream, StreamExt as _};
use serde_json::{Map, Value};
use tonic::{Request, Response, Status};

use super::{Doors, Needs, Role, ended, put};

type Fields = Map<String, Value>;
type Steps<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

const READ: Needs = Needs::OneOf(&[Role::Read]);
const READ_OR_APPROVE: Needs = Needs::OneOf(&[Role::Read, Role::Approve]);
const INJECT: Needs = Needs::OneOf(&[Role::Inject]);
const LAUNCH: Needs = Needs::OneOf(&[Role::Launch]);
const TERMINATE: Needs = Needs::OneOf(&[Role::Terminate]);
const APPROVE: Needs = Needs::OneOf(&[Role::Approve]);

/// Most nodes that are named one by one.
const MOST_NODES: usize = 64;

fn put_nodes(fields: &mut Fields, nodes: &[u32]) {
    match nodes.len() {
        0 => put(fields, "nodes", "all"),
        few if few <= MOST_NODES => drop(fields.insert("nodes".to_owned(), nodes.into())),
        many => put(fields, "nodes", &format!("{many} of them")),
    }
}

/// The answer of a stream, and what its first step says: that is there when the call is answered.
async fn first_step<T: Send + 'static>(
    answer: Result<Response<Steps<T>>, Status>,
    read: impl FnOnce(&T, &mut Fields),
) -> (Result<Response<Steps<T>>, Status>, Fields) {
    let mut told = Fields::new();
    let (metadata, mut steps, extensions) = match answer {
        Ok(answer) => answer.into_parts(),
        Err(status) => return (Err(status), told),
    };
    let first = steps.next().await;
    if let Some(Ok(step)) = &first {
        read(step, &mut told);
    }
    let steps: Steps<T> = Box::pin(futures::stream::iter(first).chain(steps));
    (Ok(Response::from_parts(metadata, steps, extensions)), told)
}

fn launch_fields(request: &pb::LaunchSwarmRequest) -> Fields {
    let mut of = Fields::new();
    put(&mut of, "request_id", &request.request_id);
    let Some(spec) = &request.spec else { return of };
    of.insert("node_count".to_owned(), spec.node_count.into());
    of.insert("prompt_bytes".to_owned(), spec.system_prompt.len().into());
    for (name, value) in [
        ("agent", &spec.agent),
        ("provider", &spec.provider),
        ("partition", &spec.partition),
        ("time", &spec.time),
        ("account", &spec.account),
        ("qos", &spec.qos),
    ] {
        put(&mut of, name, value);
    }
    of
}

fn key_fields(key_id: u32, force: bool) -> Fields {
    Fields::from_iter([("key_id".to_owned(), key_id.into()), ("force".to_owned(), force.into())])
}

#[tonic::async_trait]
impl RouterService for Doors {
    async fn get_info(&self, request: Request<pb::GetInfoRequest>) -> Result<Response<pb::GetInfoResponse>, Status> {
        self.look("get_info", &request, Needs::Nothing)?;
        self.inner.get_info(request).await
    }

    type LaunchSwarmStream = Steps<pb::LaunchSwarmResponse>;

    async fn launch_swarm(
        &self,
        request: Request<pb::LaunchSwarmRequest>,
    ) -> Result<Response<Self::LaunchSwarmStream>, Status> {
        let caller = self.caller(&request, LAUNCH);
        let asked = launch_fields(request.get_ref());
        let taken = self.begin("launch", caller, asked).await?;
        let answer = self.inner.launch_swarm(request).await;
        let (answer, told) = first_step(answer, |step: &pb::LaunchSwarmResponse, told| match &step.step {
            Some(pb::launch_swarm_response::Step::Progress(progress)) => put(told, "swarm_id", &progress.swarm_id),
            Some(pb::launch_swarm_response::Step::Launched(swarm)) => put(told, "swarm_id", &swarm.swarm_id),
            None => {}
        })
        .await;
        ended(taken, answer, told).await
    }

    type InjectStream = Steps<pb::InjectResponse>;

    async fn inject(&self, request: Request<pb::InjectRequest>) -> Result<Response<Self::InjectStream>, Status> {
        let caller = self.caller(&request, INJECT);
        let (asked, of) = (request.get_ref(), &mut Fields::new());
        put(of, "request_id", &asked.request_id);
        self.put_swarm(of, &asked.swarm_id);
        put_nodes(of, &asked.nodes);
        put(of, "injection_id", &asked.injection_id);
        of.insert("prompt_bytes".to_owned(), asked.content.len().into());
        let taken = self.begin("inject", caller, std::mem::take(of)).await?;
        let answer = self.inner.inject(request).await;
        let (answer, told) =
            first_step(answer, |step: &pb::InjectResponse, told| put(told, "injection_id", &step.injection_id)).await;
        ended(taken, answer, told).await
    }

    async fn list_swarms(
        &self,
        request: Request<pb::ListSwarmsRequest>,
    ) -> Result<Response<pb::ListSwarmsResponse>, Status> {
        self.look("list_swarms", &request, READ)?;
        self.inner.list_swarms(request).await
    }

    async fn get_swarm(&self, request: Request<pb::GetSwarmRequest>) -> Result<Response<pb::GetSwarmResponse>, Status> {
        self.look("get_swarm", &request, READ)?;
        self.inner.get_swarm(request).await
    }

    type TerminateSwarmStream = Steps<pb::TerminateSwarmResponse>;

    async fn terminate_swarm(
        &self,
        request: Request<pb::TerminateSwarmRequest>,
    ) -> Result<Response<Self::TerminateSwarmStream>, Status> {
        let caller = self.caller(&request, TERMINATE);
        let (asked, of) = (request.get_ref(), &mut Fields::new());
        put(of, "request_id", &asked.request_id);
        self.put_swarm(of, &asked.swarm_id);
        of.insert("force".to_owned(), asked.force.into());
        let taken = self.begin("terminate", caller, std::mem::take(of)).await?;
        let answer = self.inner.terminate_swarm(request).await;
        ended(taken, answer, Fields::new()).await
    }

    async fn interrupt(
        &self,
        request: Request<pb::InterruptRequest>,
    ) -> Result<Response<pb::InterruptResponse>, Status> {
        let caller = self.caller(&request, INJECT);
        let (asked, of) = (request.get_ref(), &mut Fields::new());
        put(of, "request_id", &asked.request_id);
        self.put_swarm(of, &asked.swarm_id);
        put_nodes(of, &asked.nodes);
        put(of, "injection_id", &asked.injection_id);
        let taken = self.begin("interrupt", caller, std::mem::take(of)).await?;
        let answer = self.inner.interrupt(request).await;
        ended(taken, answer, Fields::new()).await
    }

    type WatchEventsStream = Steps<pb::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        self.look("watch_events", &request, READ)?;
        self.inner.watch_events(request).await
    }

    async fn list_approvals(
        &self,
        request: Request<pb::ListApprovalsRequest>,
    ) -> Result<Response<pb::ListApprovalsResponse>, Status> {
        self.look("list_approvals", &request, READ_OR_APPROVE)?;
        self.inner.list_approvals(request).await
    }

    async fn resolve_approval(
        &self,
        request: Request<pb::ResolveApprovalRequest>,
    ) -> Result<Response<pb::ResolveApprovalResponse>, Status> {
        let caller = self.caller(&request, APPROVE);
        let (asked, of) = (request.get_ref(), &mut Fields::new());
        put(of, "request_id", &asked.request_id);
        put(of, "approval_id", &asked.approval_id);
        put(of, "job_id", &asked.job_id);
        put(of, "call_id", &asked.call_id);
        of.insert("approved".to_owned(), asked.approved.into());
        let taken = self.begin("approve", caller, std::mem::take(of)).await?;
        let answer = self.inner.resolve_approval(request).await;
        let mut told = Fields::new();
        if let Some(approval) = answer.as_ref().ok().and_then(|answer| answer.get_ref().approval.as_ref()) {
            put(&mut told, "approval_id", &approval.approval_id);
            put(&mut told, "swarm_id", &approval.swarm_id);
            put(&mut told, "status", &approval.status);
        }
        ended(taken, answer, told).await
    }

    async fn list_providers(
        &self,
        request: Request<pb::ListProvidersRequest>,
    ) -> Result<Response<pb::ListProvidersResponse>, Status> {
        self.look("list_providers", &request, Needs::Nothing)?;
        self.inner.list_providers(request).await
    }

    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        self.look("explain", &request, READ)?;
        self.inner.explain(request).await
    }

    async fn list_members(
        &self,
        request: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        self.look("list_members", &request, READ)?;
        self.inner.list_members(request).await
    }

    type WatchMembersStream = Steps<pb::WatchMembersResponse>;

    async fn watch_members(
        &self,
        request: Request<pb::WatchMembersRequest>,
    ) -> Result<Response<Self::WatchMembersStream>, Status> {
        self.look("watch_members", &request, READ)?;
        self.inner.watch_members(request).await
    }

    async fn list_keys(&self, request: Request<pb::ListKeysRequest>) -> Result<Response<pb::ListKeysResponse>, Status> {
        self.look("list_keys", &request, Needs::Everything)?;
        self.inner.list_keys(request).await
    }

    async fn add_key(&self, request: Request<pb::AddKeyRequest>) -> Result<Response<pb::AddKeyResponse>, Status> {
        // The key itself is nobody's business.
        let caller = self.caller(&request, Needs::Everything);
        let taken = self.begin("add_key", caller, Fields::new()).await?;
        let answer = RouterService::add_key(&*self.inner, request).await;
        let mut told = Fields::new();
        if let Ok(answer) = &answer {
            told.insert("key_id".to_owned(), answer.get_ref().key_id.into());
        }
        ended(taken, answer, told).await
    }

    async fn use_key(&self, request: Request<pb::UseKeyRequest>) -> Result<Response<pb::UseKeyResponse>, Status> {
        let caller = self.caller(&request, Needs::Everything);
        let asked = key_fields(request.get_ref().key_id, request.get_ref().force);
        let taken = self.begin("use_key", caller, asked).await?;
        let answer = RouterService::use_key(&*self.inner, request).await;
        ended(taken, answer, Fields::new()).await
    }

    async fn remove_key(
        &self,
        request: Request<pb::RemoveKeyRequest>,
    ) -> Result<Response<pb::RemoveKeyResponse>, Status> {
        let caller = self.caller(&request, Needs::Everything);
        let asked = key_fields(request.get_ref().key_id, request.get_ref().force);
        let taken = self.begin("remove_key", caller, asked).await?;
        let answer = RouterService::remove_key(&*self.inner, request).await;
        ended(taken, answer, Fields::new()).await
    }
}
