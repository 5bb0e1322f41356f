//! The door for people, gateways and, over TLS, for other nodes that pass turns on.

use drover_proto::handoff::handoff_service_server::{HandoffService, HandoffServiceServer};
use drover_proto::handoff::{
    CloseRequest, CloseResponse, DrainRequest, DrainResponse, ExplainRequest, ExplainResponse, GetSessionRequest,
    GetSessionResponse, GetStatusRequest, GetStatusResponse, HandoffRequest, HandoffResponse, InterruptRequest,
    InterruptResponse, ListSessionsRequest, ListSessionsResponse, SendRequest, SendResponse, WatchEventsRequest,
    WatchEventsResponse,
};
use drover_proto::status_of;
use drover_service::MAX_MESSAGE_BYTES;
use drover_types::{ErrorCode, Failure, SessionId};
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, debug_span};

use super::Shell;
use super::ear::Ear;
use super::route::{Route, Wanted};
use super::{drain, interrupt, sessions};

/// Events that may wait for a slow reader.
const EARS: usize = 64;

/// The service.
#[derive(Clone)]
pub(crate) struct Door {
    shell: Shell,
}

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = BoxStream<'static, Result<T, Status>>;

impl Door {
    pub(crate) fn service(shell: &Shell) -> HandoffServiceServer<Self> {
        HandoffServiceServer::new(Self { shell: shell.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it stands in map_err")]
pub(crate) fn failed(failure: Failure) -> Status {
    status_of(&failure)
}

pub(crate) fn session_of(text: &str) -> Result<SessionId, Status> {
    text.parse()
        .map_err(|error: drover_types::IdError| failed(Failure::new(ErrorCode::InvalidRequest, error.to_string())))
}

#[tonic::async_trait]
impl HandoffService for Door {
    type SendStream = Stream<SendResponse>;
    type DrainStream = Stream<DrainResponse>;
    type WatchEventsStream = Stream<WatchEventsResponse>;

    async fn send(&self, request: Request<SendRequest>) -> Answer<Self::SendStream> {
        let wanted = Wanted::check(request.into_inner(), &self.shell).map_err(failed)?;
        let (ear, heard) = Ear::new(self.shell.patience);
        // In the trace that the caller brought, from here until the turn is answered.
        let span = debug_span!("session_turn", session_id = %wanted.session, request_id = %wanted.request);
        self.shell.ctx.spawn("turn", Route::new(&self.shell, wanted, ear).follow().instrument(span));
        Ok(Response::new(heard))
    }

    async fn interrupt(&self, request: Request<InterruptRequest>) -> Answer<InterruptResponse> {
        let InterruptRequest { session_id, request_id } = request.into_inner();
        let session = session_of(&session_id)?;
        let invalid = |error: drover_types::IdError| failed(Failure::new(ErrorCode::InvalidRequest, error.to_string()));
        let turn = if request_id.is_empty() { None } else { Some(request_id.parse().map_err(invalid)?) };
        Ok(Response::new(interrupt::interrupt(&self.shell, session, turn).await.map_err(failed)?))
    }

    async fn close(&self, request: Request<CloseRequest>) -> Answer<CloseResponse> {
        let session = session_of(&request.get_ref().session_id)?;
        sessions::close(&self.shell, session).await.map_err(failed)?;
        Ok(Response::new(CloseResponse {}))
    }

    async fn list_sessions(&self, request: Request<ListSessionsRequest>) -> Answer<ListSessionsResponse> {
        let ListSessionsRequest { all, closed } = request.into_inner();
        let sessions = sessions::list(&self.shell, all, closed).await.map_err(failed)?;
        Ok(Response::new(ListSessionsResponse { sessions }))
    }

    async fn get_session(&self, request: Request<GetSessionRequest>) -> Answer<GetSessionResponse> {
        let GetSessionRequest { session_id, last } = request.into_inner();
        let found = sessions::get(&self.shell, session_of(&session_id)?, last as usize).await.map_err(failed)?;
        Ok(Response::new(found))
    }

    async fn handoff(&self, request: Request<HandoffRequest>) -> Answer<HandoffResponse> {
        let HandoffRequest { session_id, to } = request.into_inner();
        let session = session_of(&session_id)?;
        Ok(Response::new(sessions::hand_over(&self.shell, session, to).await?))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Answer<Self::DrainStream> {
        let told = drain::begin(&self.shell, request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Answer<ExplainResponse> {
        let session = session_of(&request.get_ref().session_id)?;
        Ok(Response::new(sessions::explain(&self.shell, session).await.map_err(failed)?))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<GetStatusResponse> {
        let shell = &self.shell;
        let look = shell.jobs.with(|engine| (engine.held(), engine.moving(), engine.is_over())).await;
        let (held, (leaving, arriving), overloaded) = look.map_err(failed)?;
        let own = shell.view.own();
        let mut notes = Vec::new();
        if shell.identity.is_none() {
            notes.push("this node has no identity: its sessions stay on this host".to_owned());
        }
        if shell.view.able().is_empty() {
            notes.push("no other node takes sessions".to_owned());
        }
        Ok(Response::new(GetStatusResponse {
            node_id: shell.me.node.to_string(),
            boot: shell.me.boot,
            held: held as u32,
            leaving: leaving as u32,
            arriving: arriving as u32,
            running_turns: shell.host.running() as u32,
            draining: own.leaving,
            load: own.load,
            overloaded,
            peers: shell.view.able().len() as u32,
            agents: shell.agents.names().map(str::to_owned).collect(),
            notes,
            drain: shell.drains.state().filter(|_| own.leaving),
        }))
    }

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let (tell, told) = mpsc::channel(EARS);
        let (events, stopping) = (self.shell.events.clone(), self.shell.ctx.shutdown().clone());
        let mut seen = request.into_inner().since;
        self.shell.ctx.spawn("watch events", async move {
            let mut changed = events.watch();
            loop {
                changed.mark_unchanged();
                for event in events.after(seen) {
                    seen = event.seq;
                    let response = WatchEventsResponse {
                        seq: event.seq,
                        timestamp_us: event.at_us,
                        event: event.name.to_owned(),
                        data: event.data.to_string(),
                    };
                    if tell.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = changed.changed() => if changed.is_err() { return },
                    () = tell.closed() => return,
                    () = stopping.cancelled() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }
}
