//! The gRPC face for operators and for the daemons on the same node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::membership::membership_service_server::{MembershipService, MembershipServiceServer};
use drover_proto::membership::{
    AddKeyRequest, AddKeyResponse, GetLeaderRequest, GetLeaderResponse, GetStatusRequest, GetStatusResponse,
    JoinRequest, JoinResponse, LeaveRequest, LeaveResponse, ListKeysRequest, ListKeysResponse, ListMembersRequest,
    ListMembersResponse, Member, MemberSnapshot, NodeId, NodeInfo, Note, PlaceRequest, PlaceResponse, RemoveKeyRequest,
    RemoveKeyResponse, ReportLoadRequest, ReportLoadResponse, SuspectRequest, SuspectResponse, UpdateMetadataRequest,
    UpdateMetadataResponse, UseKeyRequest, UseKeyResponse, WatchEventsRequest, WatchEventsResponse,
    WatchMembersRequest, WatchMembersResponse, watch_events_response, watch_members_response,
};
use drover_proto::status_of;
use drover_service::{Context, MAX_MESSAGE_BYTES};
use drover_types::{ErrorCode, Failure};
use futures::stream::BoxStream;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::events::{Event, Kind};
use crate::shell::{Change, Handle, MetadataChange};

/// Updates that may wait for one reader before it is counted as slow.
const READER_QUEUE: usize = 64;
/// How long Join waits for an answer of the nodes it names.
const JOIN_WAIT: Duration = Duration::from_secs(5);
/// How long Leave waits for the word to get around.
const LEAVE_WAIT: Duration = Duration::from_secs(3);

/// The service.
#[derive(Clone)]
pub(crate) struct Door {
    ctx: Context,
    handle: Handle,
}

type Answer<T> = Result<Response<T>, Status>;

impl Door {
    pub(crate) fn service(ctx: &Context, handle: &Handle) -> MembershipServiceServer<Self> {
        MembershipServiceServer::new(Self { ctx: ctx.clone(), handle: handle.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn notes(&self) -> Vec<Note> {
        let current = |note: crate::shell::Note| Note {
            code: note.code.to_owned(),
            message: note.message,
            hint: note.hint.to_owned(),
            count: note.count,
            last_us: note.last_us,
            current: note.current,
        };
        self.handle.notes().into_iter().map(current).collect()
    }

    /// Feeds a stream from a task, which ends with the reader or with the daemon.
    fn stream<T, F>(
        &self,
        name: &'static str,
        run: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F,
    ) -> BoxStream<'static, Result<T, Status>>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (tell, told) = mpsc::channel(READER_QUEUE);
        let (work, stopping, gone) = (run(tell.clone()), self.ctx.shutdown().clone(), tell);
        self.ctx.spawn(name, async move {
            tokio::select! {
                () = work => {}
                () = gone.closed() => {}
                () = stopping.cancelled() => {
                    let _ = gone.try_send(Err(status_of(&Failure::new(ErrorCode::ShuttingDown, "membership is stopping"))));
                }
            }
        });
        Box::pin(ReceiverStream::new(told))
    }
}

fn invalid(message: impl Into<String>) -> Status {
    status_of(&Failure::new(ErrorCode::InvalidRequest, message.into()))
}

#[expect(clippy::needless_pass_by_value, reason = "it stands in map_err")]
fn failed(failure: Failure) -> Status {
    status_of(&failure)
}

#[tonic::async_trait]
impl MembershipService for Door {
    type WatchMembersStream = BoxStream<'static, Result<WatchMembersResponse, Status>>;
    type WatchEventsStream = BoxStream<'static, Result<WatchEventsResponse, Status>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<GetStatusResponse> {
        let mut status = self.handle.status().await;
        status.notes = self.notes();
        Ok(Response::new(status))
    }

    async fn list_members(&self, request: Request<ListMembersRequest>) -> Answer<ListMembersResponse> {
        let swarm = request.into_inner().swarm_id;
        // A node that takes no part knows nobody; its notes say why.
        let members = self.handle.members().await.unwrap_or_default();
        let members = members.into_iter().filter(|member| of_swarm(member, &swarm)).collect();
        let mut notes = self.notes();
        notes.retain(|note| note.current);
        Ok(Response::new(ListMembersResponse { members, notes }))
    }

    async fn watch_members(&self, request: Request<WatchMembersRequest>) -> Answer<Self::WatchMembersStream> {
        let (handle, swarm) = (self.handle.clone(), request.into_inner().swarm_id);
        Ok(Response::new(self.stream("watch members", |tell| watch_members(handle, swarm, tell))))
    }

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let (log, since) = (Arc::clone(self.handle.events().log()), request.into_inner().since);
        Ok(Response::new(self.stream("watch events", |tell| async move {
            let (mut seen, mut changed) = (since, log.watch());
            loop {
                changed.mark_unchanged();
                for event in log.after(seen) {
                    seen = event.seq;
                    if tell.send(Ok(event_message(&event))).await.is_err() {
                        return;
                    }
                }
                if changed.changed().await.is_err() {
                    return;
                }
            }
        })))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Answer<JoinResponse> {
        let addrs = request.into_inner().addrs;
        if addrs.is_empty() {
            return Err(invalid("no address is given"));
        }
        let answered = self.handle.join(addrs, JOIN_WAIT).await.map_err(failed)?;
        let mut notes = self.notes();
        notes.retain(|note| note.current);
        Ok(Response::new(JoinResponse { answered, notes }))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Answer<LeaveResponse> {
        info!(reason = request.into_inner().reason, "asked to leave");
        let told = self.handle.leave(LEAVE_WAIT).await.map_err(failed)?;
        Ok(Response::new(LeaveResponse { told }))
    }

    async fn update_metadata(&self, request: Request<UpdateMetadataRequest>) -> Answer<UpdateMetadataResponse> {
        let request = request.into_inner();
        let sorted = |pairs: std::collections::HashMap<String, String>| pairs.into_iter().collect::<BTreeMap<_, _>>();
        let change = MetadataChange {
            set_labels: sorted(request.set_labels),
            remove_labels: request.remove_labels,
            set_capabilities: sorted(request.set_capabilities),
            remove_capabilities: request.remove_capabilities,
        };
        let incarnation = self.handle.update_metadata(change).await.map_err(failed)?;
        Ok(Response::new(UpdateMetadataResponse { incarnation }))
    }

    async fn report_load(&self, request: Request<ReportLoadRequest>) -> Answer<ReportLoadResponse> {
        let request = request.into_inner();
        let ReportLoadRequest { sessions, max_sessions, reporter } = request;
        let load = self.handle.report_sessions(reporter, sessions, max_sessions).await;
        Ok(Response::new(ReportLoadResponse { load: Some(load) }))
    }

    async fn suspect(&self, request: Request<SuspectRequest>) -> Answer<SuspectResponse> {
        let id = request.into_inner().node_id;
        match self.handle.suspect(id.clone()).await.map_err(failed)? {
            Some(news) => Ok(Response::new(SuspectResponse { news })),
            None => Err(invalid(format!("there is no member {id:?}"))),
        }
    }

    async fn list_keys(&self, _: Request<ListKeysRequest>) -> Answer<ListKeysResponse> {
        let keys = self.handle.keys().await.map_err(failed)?;
        Ok(Response::new(ListKeysResponse { keys }))
    }

    async fn add_key(&self, request: Request<AddKeyRequest>) -> Answer<AddKeyResponse> {
        let key = request.into_inner().key;
        let key = match key.as_ref() {
            [] => None,
            bytes => Some(bytes.try_into().map_err(|_| invalid("a key has 32 bytes"))?),
        };
        let (id, keys) = self.handle.add_key(key).await.map_err(failed)?;
        Ok(Response::new(AddKeyResponse { keys, key_id: u32::from(id) }))
    }

    async fn use_key(&self, request: Request<UseKeyRequest>) -> Answer<UseKeyResponse> {
        let UseKeyRequest { key_id, force } = request.into_inner();
        let keys = self.handle.use_key(key_id_of(key_id)?, force).await.map_err(failed)?;
        Ok(Response::new(UseKeyResponse { keys }))
    }

    async fn remove_key(&self, request: Request<RemoveKeyRequest>) -> Answer<RemoveKeyResponse> {
        let RemoveKeyRequest { key_id, force } = request.into_inner();
        let keys = self.handle.remove_key(key_id_of(key_id)?, force).await.map_err(failed)?;
        Ok(Response::new(RemoveKeyResponse { keys }))
    }

    async fn place(&self, request: Request<PlaceRequest>) -> Answer<PlaceResponse> {
        let PlaceRequest { key, count, swarm_id } = request.into_inner();
        let count = (count.max(1)) as usize;
        let node_ids = self.handle.place(key, count, swarm_id).await.map_err(failed)?;
        Ok(Response::new(PlaceResponse { node_ids }))
    }

    async fn get_leader(&self, _: Request<GetLeaderRequest>) -> Answer<GetLeaderResponse> {
        Ok(Response::new(self.handle.leader().await.map_err(failed)?))
    }
}

fn key_id_of(id: u32) -> Result<u8, Status> {
    u8::try_from(id).map_err(|_| invalid("a key id is from 0 to 255"))
}

fn of_swarm(member: &Member, swarm: &str) -> bool {
    swarm.is_empty() || member.swarm_id == swarm
}

async fn watch_members(handle: Handle, swarm: String, tell: mpsc::Sender<Result<WatchMembersResponse, Status>>) {
    let say = |update| Ok(WatchMembersResponse { update: Some(update) });
    loop {
        // First subscribe, then look: a change in between is seen twice rather than never.
        let mut changes = handle.changes();
        let members = handle.members().await.unwrap_or_default();
        let members = members.into_iter().filter(|member| of_swarm(member, &swarm)).collect();
        let snapshot = watch_members_response::Update::Snapshot(MemberSnapshot { members });
        if tell.send(say(snapshot)).await.is_err() {
            return;
        }
        loop {
            let update = match changes.recv().await {
                Ok(change) => match &*change {
                    Change::Changed(member) if of_swarm(member, &swarm) => {
                        watch_members_response::Update::Changed((**member).clone())
                    }
                    Change::Removed(id) => watch_members_response::Update::Removed(id.clone()),
                    Change::Changed(_) => continue,
                },
                Err(broadcast::error::RecvError::Lagged(_)) => break,
                Err(broadcast::error::RecvError::Closed) => return,
            };
            if tell.send(say(update)).await.is_err() {
                return;
            }
        }
    }
}

fn event_message(event: &Event) -> WatchEventsResponse {
    let payload = match &event.kind {
        Kind::NodeJoined(info) | Kind::NodeAlive(info) => watch_events_response::Payload::NodeInfo(NodeInfo {
            id: info.id.clone(),
            addr: info.addr.clone(),
            port: u32::from(info.port),
            agent_caps: info.agent_caps.clone().into_iter().collect(),
            load_score: info.load_score,
            labels: info.labels.clone().into_iter().collect(),
            timestamp: info.timestamp,
            version: info.version.clone(),
        }),
        Kind::NodeLeft(id) | Kind::NodeSuspect(id) => watch_events_response::Payload::NodeId(NodeId { id: id.clone() }),
    };
    WatchEventsResponse {
        seq: event.seq,
        timestamp_us: event.timestamp_us,
        event: event.kind.name().to_owned(),
        payload: Some(payload),
    }
}
