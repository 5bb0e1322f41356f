//! The sessions behind the router's doors: who may say something, look, or move sessions, and what is written down of it.

use std::pin::Pin;
use std::sync::Arc;

use drover_proto::handoff as pb;
use drover_proto::handoff::handoff_service_server::HandoffService;
use drover_proto::status_of;
use drover_sessions::Client;
use drover_types::{ErrorCode, Failure};
use futures::{Stream, StreamExt as _};
use serde_json::{Map, Value};
use tonic::{Request, Response, Status};

use super::{Guard, Needs, Role, Taken, begin, ended, look, put};
use crate::sessions::Sessions;

type Steps<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

const READ: Needs = Needs::OneOf(&[Role::Read]);
const INJECT: Needs = Needs::OneOf(&[Role::Inject]);

/// The router as a door to the sessions.
pub(crate) struct SessionDoors {
    pub(crate) inner: Arc<Sessions>,
    pub(crate) guard: Arc<Guard>,
}

impl SessionDoors {
    fn look<T>(&self, call: &'static str, request: &Request<T>) -> Result<(), Status> {
        look(&self.guard, call, request, READ)
    }

    /// Lets a command in, and writes down that it is taken.
    async fn take<T>(
        &self,
        command: &'static str,
        needs: Needs,
        request: &Request<T>,
        asked: Map<String, Value>,
    ) -> Result<Taken<'_>, Status> {
        let caller = self.guard.check(request.extensions(), request.metadata(), needs);
        begin(&self.guard, command, caller, asked).await
    }
}

/// Writes down what became of a command.
async fn done<A>(taken: Taken<'_>, answer: Result<A, Status>) -> Result<Response<A>, Status> {
    ended(taken, answer.map(Response::new), Map::new()).await
}

#[tonic::async_trait]
impl HandoffService for SessionDoors {
    type SendStream = Steps<pb::SendResponse>;

    async fn send(&self, request: Request<pb::SendRequest>) -> Result<Response<Self::SendStream>, Status> {
        let mut asked = Map::new();
        put(&mut asked, "session_id", &request.get_ref().session_id);
        put(&mut asked, "request_id", &request.get_ref().request_id);
        asked.insert("prompt_bytes".to_owned(), request.get_ref().prompt.len().into());
        let taken = self.take("session_send", INJECT, &request, asked).await?;
        let answer = self.inner.send(request.into_inner()).await.map(|(stream, watcher)| {
            let seen = stream.inspect(move |step| {
                if let Ok(step) = step {
                    watcher.see(step);
                }
            });
            let steps: Self::SendStream = Box::pin(seen);
            steps
        });
        done(taken, answer).await
    }

    async fn interrupt(
        &self,
        request: Request<pb::InterruptRequest>,
    ) -> Result<Response<pb::InterruptResponse>, Status> {
        let mut asked = Map::new();
        put(&mut asked, "session_id", &request.get_ref().session_id);
        put(&mut asked, "request_id", &request.get_ref().request_id);
        let taken = self.take("session_interrupt", INJECT, &request, asked).await?;
        let request = request.into_inner();
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.interrupt(request).await.map(Response::into_inner) }
        };
        let answer = self.inner.slow(&request.session_id, call).await;
        done(taken, answer).await
    }

    async fn close(&self, request: Request<pb::CloseRequest>) -> Result<Response<pb::CloseResponse>, Status> {
        let mut asked = Map::new();
        put(&mut asked, "session_id", &request.get_ref().session_id);
        let taken = self.take("session_close", INJECT, &request, asked).await?;
        let request = request.into_inner();
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.close(request).await.map(Response::into_inner) }
        };
        let answer = self.inner.slow(&request.session_id, call).await;
        done(taken, answer).await
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        self.look("list_sessions", &request)?;
        // The router has none of its own, so all are meant.
        self.inner.list(request.into_inner().closed).await.map(Response::new)
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        self.look("get_session", &request)?;
        let request = request.into_inner();
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.get_session(request).await }
        };
        self.inner.slow(&request.session_id, call).await
    }

    async fn handoff(&self, request: Request<pb::HandoffRequest>) -> Result<Response<pb::HandoffResponse>, Status> {
        let mut asked = Map::new();
        put(&mut asked, "session_id", &request.get_ref().session_id);
        put(&mut asked, "to", &request.get_ref().to);
        let taken = self.take("session_handoff", Needs::Everything, &request, asked).await?;
        let request = request.into_inner();
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.handoff(request).await.map(Response::into_inner) }
        };
        let answer = self.inner.slow(&request.session_id, call).await;
        done(taken, answer).await
    }

    type DrainStream = Steps<pb::DrainResponse>;

    async fn drain(&self, request: Request<pb::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        let mut asked = Map::new();
        put(&mut asked, "node_id", &request.get_ref().node_id);
        asked.insert("undo".to_owned(), request.get_ref().undo.into());
        let taken = self.take("session_drain", Needs::Everything, &request, asked).await?;
        let request = request.into_inner();
        if request.node_id.is_empty() {
            let failure = Failure::new(ErrorCode::InvalidRequest, "the router cannot be drained: name a node");
            return done(taken, Err(status_of(&failure.hint("`drover members` shows the nodes")))).await;
        }
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.drain(request).await.map(Response::into_inner) }
        };
        let answer = self.inner.slow("", call).await.map(|steps| {
            let steps: Self::DrainStream = Box::pin(steps);
            steps
        });
        done(taken, answer).await
    }

    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        self.look("session_explain", &request)?;
        let request = request.into_inner();
        let call = |mut door: Client| {
            let request = request.clone();
            async move { door.explain(request).await }
        };
        self.inner.slow(&request.session_id, call).await
    }

    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::GetStatusResponse>, Status> {
        Err(Status::unimplemented("the router has no sessions of its own: ask a node, at its own port"))
    }

    type WatchEventsStream = Steps<pb::WatchEventsResponse>;

    async fn watch_events(
        &self,
        _: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Err(Status::unimplemented("the router's own log has the events of all nodes: WatchEvents of drover.router.v1"))
    }
}
