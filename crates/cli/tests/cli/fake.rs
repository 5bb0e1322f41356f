//! A router that says what the test tells it to, and remembers what it was asked.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use assert_cmd::Command;
use drover_proto::allocator::Provider;
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_proto::router::router_service_server::{RouterService, RouterServiceServer};
use drover_types::{ErrorCode, Failure};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What the router knows and does.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) version: Option<String>,
    pub(crate) swarms: Vec<pb::Swarm>,
    pub(crate) providers: Vec<Provider>,
    pub(crate) events: Vec<pb::Event>,
    pub(crate) approvals: Vec<pb::Approval>,
    /// Per `WatchEvents` call: after how many events the connection breaks.
    pub(crate) cuts: Vec<usize>,
    /// What `Inject` answers; the injection of node n is called `inj-n` by the helpers.
    pub(crate) injects: Vec<pb::InjectResponse>,
    /// Every call but `GetInfo` fails like this.
    pub(crate) failure: Option<Failure>,
    pub(crate) explain: pb::ExplainResponse,
    pub(crate) members: pb::ListMembersResponse,
    /// What a watch of the members says behind its snapshot.
    pub(crate) member_changes: Vec<pb::watch_members_response::Update>,
    pub(crate) keys: pb::ListKeysResponse,
    /// Why a key cannot be used unless that is forced.
    pub(crate) key_refusal: Option<Failure>,
    pub(crate) seen: Seen,
}

/// What the router was asked.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) after: Vec<u64>,
    pub(crate) launches: Vec<LaunchSpec>,
    pub(crate) injects: Vec<pb::InjectRequest>,
    pub(crate) answers: Vec<pb::ResolveApprovalRequest>,
    pub(crate) interrupts: Vec<pb::InterruptRequest>,
    pub(crate) explained: Vec<String>,
    pub(crate) terminated: Vec<pb::TerminateSwarmRequest>,
    /// Changes of the key ring, in words.
    pub(crate) keys: Vec<String>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<Script>>);

type Stream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;
type Answer<T> = Result<Response<T>, Status>;

fn stream<T: Send + 'static>(items: Vec<Result<T, Status>>) -> Response<Stream<T>> {
    Response::new(Box::pin(tokio_stream::iter(items)))
}

impl Service {
    fn with<T>(&self, act: impl FnOnce(&mut Script) -> T) -> Result<T, Status> {
        let mut script = self.0.lock().unwrap();
        match &script.failure {
            Some(failure) => Err(drover_proto::status_of(failure)),
            None => Ok(act(&mut script)),
        }
    }
}

#[tonic::async_trait]
impl RouterService for Service {
    async fn get_info(&self, _: Request<pb::GetInfoRequest>) -> Answer<pb::GetInfoResponse> {
        let script = self.0.lock().unwrap();
        let version = script.version.clone().unwrap_or_else(|| drover_types::VERSION.to_owned());
        Ok(Response::new(pb::GetInfoResponse { version, host: "here".into(), pid: 4242, ..Default::default() }))
    }

    type LaunchSwarmStream = Stream<pb::LaunchSwarmResponse>;
    async fn launch_swarm(&self, request: Request<pb::LaunchSwarmRequest>) -> Answer<Self::LaunchSwarmStream> {
        use pb::launch_swarm_response::Step;
        self.with(|script| {
            let spec = request.into_inner().spec.unwrap_or_default();
            script.seen.launches.push(spec);
            let swarm = script.swarms.first().cloned().unwrap_or_default();
            let progress = pb::LaunchProgress {
                swarm_id: swarm.swarm_id.clone(),
                stage: "starting".into(),
                message: "starting workers".into(),
                ..Default::default()
            };
            stream(vec![
                Ok(pb::LaunchSwarmResponse { step: Some(Step::Progress(progress)), seq: 1 }),
                Ok(pb::LaunchSwarmResponse { step: Some(Step::Launched(swarm)), seq: 2 }),
            ])
        })
    }

    type InjectStream = Stream<pb::InjectResponse>;
    async fn inject(&self, request: Request<pb::InjectRequest>) -> Answer<Self::InjectStream> {
        self.with(|script| {
            script.seen.injects.push(request.into_inner());
            stream(script.injects.iter().cloned().map(Ok).collect())
        })
    }

    async fn list_swarms(&self, _: Request<pb::ListSwarmsRequest>) -> Answer<pb::ListSwarmsResponse> {
        self.with(|script| Response::new(pb::ListSwarmsResponse { swarms: script.swarms.clone() }))
    }

    async fn get_swarm(&self, request: Request<pb::GetSwarmRequest>) -> Answer<pb::GetSwarmResponse> {
        let id = request.into_inner().swarm_id;
        let found = self.with(|script| script.swarms.iter().find(|swarm| swarm.swarm_id.starts_with(&id)).cloned())?;
        match found {
            Some(swarm) => Ok(Response::new(pb::GetSwarmResponse { swarm: Some(swarm), backend_error: String::new() })),
            None => Err(drover_proto::status_of(&Failure::new(
                ErrorCode::UnknownSwarm,
                format!("no swarm has the id {id}"),
            ))),
        }
    }

    type TerminateSwarmStream = Stream<pb::TerminateSwarmResponse>;
    async fn terminate_swarm(&self, request: Request<pb::TerminateSwarmRequest>) -> Answer<Self::TerminateSwarmStream> {
        use pb::terminate_swarm_response::Step;
        self.with(|script| {
            let request = request.into_inner();
            let mut swarm =
                script.swarms.iter().find(|swarm| swarm.swarm_id == request.swarm_id).cloned().unwrap_or_default();
            swarm.status = "terminated".into();
            script.seen.terminated.push(request);
            stream(vec![Ok(pb::TerminateSwarmResponse { step: Some(Step::Terminated(swarm)), seq: 9 })])
        })
    }

    async fn interrupt(&self, request: Request<pb::InterruptRequest>) -> Answer<pb::InterruptResponse> {
        self.with(|script| {
            let request = request.into_inner();
            let nodes = request.nodes.len() as u32;
            script.seen.interrupts.push(request);
            Response::new(pb::InterruptResponse { nodes })
        })
    }

    type WatchEventsStream = Stream<pb::WatchEventsResponse>;
    async fn watch_events(&self, request: Request<pb::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let request = request.into_inner();
        self.with(|script| {
            script.seen.after.push(request.after_seq);
            let cut = if script.cuts.is_empty() { usize::MAX } else { script.cuts.remove(0) };
            // One event too many, as a router that was killed between storing and sending would repeat it.
            let mut items: Vec<_> = script
                .events
                .iter()
                .filter(|event| event.seq >= request.after_seq)
                .take(cut)
                .map(|event| {
                    Ok(pb::WatchEventsResponse { events: vec![event.clone()], live: false, first_kept_seq: 0 })
                })
                .collect();
            items.push(if cut == usize::MAX {
                Ok(pb::WatchEventsResponse { live: true, ..Default::default() })
            } else {
                Err(Status::unavailable("the router is gone"))
            });
            let items = tokio_stream::iter(items);
            let stream: Self::WatchEventsStream = if request.follow && cut == usize::MAX {
                Box::pin(tokio_stream::StreamExt::chain(items, tokio_stream::pending()))
            } else {
                Box::pin(items)
            };
            Response::new(stream)
        })
    }

    async fn list_approvals(&self, _: Request<pb::ListApprovalsRequest>) -> Answer<pb::ListApprovalsResponse> {
        self.with(|script| {
            Response::new(pb::ListApprovalsResponse { approvals_version: 3, approvals: script.approvals.clone() })
        })
    }

    async fn resolve_approval(
        &self,
        request: Request<pb::ResolveApprovalRequest>,
    ) -> Answer<pb::ResolveApprovalResponse> {
        self.with(|script| {
            let request = request.into_inner();
            let mut approval = script.approvals.first().cloned().unwrap_or_default();
            let already_resolved = !approval.decision.is_empty();
            approval.approval_id.clone_from(&request.approval_id);
            script.seen.answers.push(request);
            Response::new(pb::ResolveApprovalResponse { approval: Some(approval), already_resolved })
        })
    }

    async fn list_providers(&self, _: Request<pb::ListProvidersRequest>) -> Answer<pb::ListProvidersResponse> {
        self.with(|script| Response::new(pb::ListProvidersResponse { providers: script.providers.clone() }))
    }

    async fn list_members(&self, request: Request<pb::ListMembersRequest>) -> Answer<pb::ListMembersResponse> {
        self.with(|script| {
            let swarm = request.into_inner().swarm_id;
            let mut members = script.members.clone();
            members.members.retain(|member| swarm.is_empty() || member.swarm_id == swarm);
            Response::new(members)
        })
    }

    type WatchMembersStream = Stream<pb::WatchMembersResponse>;
    async fn watch_members(&self, _: Request<pb::WatchMembersRequest>) -> Answer<Self::WatchMembersStream> {
        use pb::watch_members_response::Update;
        self.with(|script| {
            let cut = if script.cuts.is_empty() { usize::MAX } else { script.cuts.remove(0) };
            let snapshot = Update::Snapshot(script.members.clone());
            let updates = std::iter::once(snapshot).chain(script.member_changes.iter().cloned());
            let mut items: Vec<_> =
                updates.take(cut).map(|update| Ok(pb::WatchMembersResponse { update: Some(update) })).collect();
            if cut != usize::MAX {
                items.push(Err(Status::unavailable("the router is gone")));
            }
            let items = tokio_stream::iter(items);
            let stream: Self::WatchMembersStream = if cut == usize::MAX {
                Box::pin(tokio_stream::StreamExt::chain(items, tokio_stream::pending()))
            } else {
                Box::pin(items)
            };
            Response::new(stream)
        })
    }

    async fn list_keys(&self, _: Request<pb::ListKeysRequest>) -> Answer<pb::ListKeysResponse> {
        self.with(|script| Response::new(script.keys.clone()))
    }

    async fn add_key(&self, request: Request<pb::AddKeyRequest>) -> Answer<pb::AddKeyResponse> {
        self.with(|script| {
            script.seen.keys.push(format!("add {}", request.into_inner().key.len()));
            Response::new(pb::AddKeyResponse { ring: Some(script.keys.clone()), key_id: 0xb2 })
        })
    }

    async fn use_key(&self, request: Request<pb::UseKeyRequest>) -> Answer<pb::UseKeyResponse> {
        let request = request.into_inner();
        self.with(|script| script.seen.keys.push(format!("use {:02x} {}", request.key_id, request.force)))?;
        self.with(|script| match &script.key_refusal {
            Some(refusal) if !request.force => Err(drover_proto::status_of(refusal)),
            _ => Ok(Response::new(pb::UseKeyResponse { ring: Some(script.keys.clone()) })),
        })?
    }

    async fn remove_key(&self, request: Request<pb::RemoveKeyRequest>) -> Answer<pb::RemoveKeyResponse> {
        self.with(|script| {
            let request = request.into_inner();
            script.seen.keys.push(format!("remove {:02x} {}", request.key_id, request.force));
            Response::new(pb::RemoveKeyResponse { ring: Some(script.keys.clone()) })
        })
    }

    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Answer<pb::ExplainResponse> {
        self.with(|script| {
            script.seen.explained.push(request.into_inner().subject);
            Response::new(script.explain.clone())
        })
    }
}

/// A running fake.
pub(crate) struct Fake {
    addr: SocketAddr,
    script: Arc<Mutex<Script>>,
    home: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn start(script: Script) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let script = Arc::new(Mutex::new(script));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let service = RouterServiceServer::new(Service(Arc::clone(&script)));
        let server = tonic::transport::Server::builder().add_service(service);
        let tasks = tokio_util::task::TaskTracker::new();
        tasks.spawn_on(
            async move {
                server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
            },
            runtime.handle(),
        );
        Self { addr, script, home: tempfile::tempdir().unwrap(), _runtime: runtime }
    }

    /// `drover ARGS --router <this one>`, in a home of its own.
    pub(crate) fn drover(&self, args: &[&str]) -> Command {
        let mut command = drover(self.home.path());
        command.args(args).args(["--router", &self.addr.to_string()]);
        command
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> String {
        self.addr.to_string()
    }

    pub(crate) fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.script.lock().unwrap().seen)
    }
}

/// The program under test, knowing nothing of the machine it runs on.
pub(crate) fn drover(home: &std::path::Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("drover"));
    command
        .env_clear()
        .env("HOME", home)
        .env("PATH", "/usr/bin:/bin")
        .env("DROVER_STATE_DIR", home.join("state"))
        .current_dir(home)
        .timeout(std::time::Duration::from_secs(30));
    command
}

pub(crate) const SWARM: &str = "0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11";

/// A swarm of two idle nodes.
pub(crate) fn swarm() -> pb::Swarm {
    let node = |node_id| pb::Node {
        node_id,
        host: "here".into(),
        state: "idle".into(),
        generation: 1,
        pid: 100 + node_id,
        ..Default::default()
    };
    pb::Swarm {
        swarm_id: SWARM.into(),
        job_id: "local-1".into(),
        node_count: 2,
        status: "running".into(),
        slurm_state: "RUNNING".into(),
        provider: "local".into(),
        provider_id: "local".into(),
        agent: "echo".into(),
        nodes: vec![node(0), node(1)],
        ..Default::default()
    }
}

/// An event of node `node`'s injection `inj-<node>`.
pub(crate) fn event(seq: u64, node: u32, name: &str, data: &str) -> pb::Event {
    pb::Event {
        seq,
        timestamp_us: 1_772_063_938_000_000 + seq * 1000,
        stored_us: 0,
        event: name.into(),
        swarm_id: SWARM.into(),
        job_id: "local-1".into(),
        node_id: Some(node),
        injection_id: format!("inj-{node}"),
        data: data.to_owned().into(),
    }
}

pub(crate) fn accepted(node_id: u32) -> pb::InjectResponse {
    pb::InjectResponse {
        node_id,
        injection_id: format!("inj-{node_id}"),
        state: pb::InjectionState::Accepted.into(),
        error: String::new(),
        seq: 1,
    }
}
