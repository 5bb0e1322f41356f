//! The router as this crate sees it: one object, whichever transport the client was made with.

use std::sync::Arc;

use bytes::Bytes;
use drover_proto::router as pb;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::Caller;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::codegen::{Body, StdError};
use tonic::{Status, Streaming};

type Answer<M> = BoxFuture<'static, Result<M, Status>>;

/// The calls that the control plane makes, each in the name of whoever asked for it.
pub(crate) trait Upstream: Send + Sync + 'static {
    fn info(&self, who: Caller) -> Answer<pb::GetInfoResponse>;
    fn launch(&self, who: Caller, request: pb::LaunchSwarmRequest) -> Answer<Streaming<pb::LaunchSwarmResponse>>;
    fn inject(&self, who: Caller, request: pb::InjectRequest) -> Answer<Streaming<pb::InjectResponse>>;
    fn list(&self, who: Caller) -> Answer<pb::ListSwarmsResponse>;
    fn swarm(&self, who: Caller, request: pb::GetSwarmRequest) -> Answer<pb::GetSwarmResponse>;
    fn terminate(
        &self,
        who: Caller,
        request: pb::TerminateSwarmRequest,
    ) -> Answer<Streaming<pb::TerminateSwarmResponse>>;
    fn watch(&self, who: Caller, request: pb::WatchEventsRequest) -> Answer<Streaming<pb::WatchEventsResponse>>;
    fn approvals(&self, who: Caller) -> Answer<pb::ListApprovalsResponse>;
    fn resolve(&self, who: Caller, request: pb::ResolveApprovalRequest) -> Answer<pb::ResolveApprovalResponse>;
    fn providers(&self, who: Caller) -> Answer<pb::ListProvidersResponse>;
}

/// Hides the transport.
pub(crate) fn upstream<T>(client: RouterServiceClient<T>) -> Arc<dyn Upstream>
where
    T: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    T::Future: Send,
{
    let client = client
        .max_decoding_message_size(drover_service::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(drover_service::MAX_MESSAGE_BYTES);
    Arc::new(Client(client))
}

struct Client<T>(RouterServiceClient<T>);

macro_rules! call {
    ($self:ident . $method:ident ( $who:expr, $request:expr )) => {{
        let mut client = $self.0.clone();
        async move { client.$method($who.request($request)).await.map(tonic::Response::into_inner) }.boxed()
    }};
}

impl<T> Upstream for Client<T>
where
    T: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    T::Future: Send,
{
    fn info(&self, who: Caller) -> Answer<pb::GetInfoResponse> {
        call!(self.get_info(who, pb::GetInfoRequest {}))
    }

    fn launch(&self, who: Caller, request: pb::LaunchSwarmRequest) -> Answer<Streaming<pb::LaunchSwarmResponse>> {
        call!(self.launch_swarm(who, request))
    }

    fn inject(&self, who: Caller, request: pb::InjectRequest) -> Answer<Streaming<pb::InjectResponse>> {
        call!(self.inject(who, request))
    }

    fn list(&self, who: Caller) -> Answer<pb::ListSwarmsResponse> {
        call!(self.list_swarms(who, pb::ListSwarmsRequest {}))
    }

    fn swarm(&self, who: Caller, request: pb::GetSwarmRequest) -> Answer<pb::GetSwarmResponse> {
        call!(self.get_swarm(who, request))
    }

    fn terminate(
        &self,
        who: Caller,
        request: pb::TerminateSwarmRequest,
    ) -> Answer<Streaming<pb::TerminateSwarmResponse>> {
        call!(self.terminate_swarm(who, request))
    }

    fn watch(&self, who: Caller, request: pb::WatchEventsRequest) -> Answer<Streaming<pb::WatchEventsResponse>> {
        call!(self.watch_events(who, request))
    }

    fn approvals(&self, who: Caller) -> Answer<pb::ListApprovalsResponse> {
        call!(self.list_approvals(who, pb::ListApprovalsRequest { swarm_id: String::new() }))
    }

    fn resolve(&self, who: Caller, request: pb::ResolveApprovalRequest) -> Answer<pb::ResolveApprovalResponse> {
        call!(self.resolve_approval(who, request))
    }

    fn providers(&self, who: Caller) -> Answer<pb::ListProvidersResponse> {
        call!(self.list_providers(who, pb::ListProvidersRequest {}))
    }
}
