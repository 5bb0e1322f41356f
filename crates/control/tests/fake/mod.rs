//! A router without workers: the event log, the registry and the order of events that the real one promises, and knobs
//! for what can go wrong.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use drover_config::SecurityConfig;
use drover_control::ControlSettings;
use drover_proto::allocator::{LaunchField, Provider};
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_proto::router::router_service_server::{RouterService, RouterServiceServer};
use drover_proto::status_of;
use drover_service::{Caller, Context, MAX_MESSAGE_BYTES};
use drover_types::{ErrorCode, Failure};
use futures::stream::{self, BoxStream, StreamExt as _};
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// What goes wrong, or goes on.
#[derive(Debug, Clone, Default)]
pub struct Knobs {
    /// Every injection is carried out at once: the turn's events follow its acknowledgement without a pause.
    pub echo: bool,
    /// Launches say `queued` and nothing more.
    pub launches_hang: bool,
    /// Launches fail with this after their progress.
    pub launch_failure: Option<Failure>,
    /// The list is refused with this.
    pub list_failure: Option<Failure>,
    /// Deliveries to this node fail.
    pub broken_node: Option<u32>,
    /// The event stream breaks after this many events, each time anew.
    pub break_stream_after: Option<usize>,
}

#[derive(Default)]
struct State {
    knobs: Knobs,
    events: Vec<pb::Event>,
    swarms: Vec<pb::Swarm>,
    specs: Vec<LaunchSpec>,
    launches: BTreeMap<String, (String, u64)>,
    injects: BTreeMap<String, Vec<pb::InjectResponse>>,
    contents: Vec<String>,
    approvals: Vec<pb::Approval>,
}

/// The router.
#[derive(Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    written: watch::Sender<u64>,
    /// How often events were watched.
    pub watches: Arc<AtomicU32>,
}

type Stream<M> = BoxStream<'static, Result<M, Status>>;

fn failure(code: ErrorCode, message: &str) -> Status {
    status_of(&Failure::new(code, message))
}

impl State {
    fn say(&mut self, name: &str, swarm_id: &str, node: Option<u32>, injection: &str, data: &Value) -> u64 {
        let seq = self.events.len() as u64 + 1;
        let job_id = self.swarm(swarm_id).map_or(String::new(), |swarm| swarm.job_id.clone());
        self.events.push(pb::Event {
            seq,
            timestamp_us: 1_772_063_938_000_000 + seq,
            stored_us: 0,
            event: name.to_owned(),
            swarm_id: swarm_id.to_owned(),
            job_id,
            node_id: node,
            injection_id: injection.to_owned(),
            data: data.to_string().into_bytes().into(),
        });
        seq
    }

    fn swarm(&mut self, id: &str) -> Option<&mut pb::Swarm> {
        self.swarms.iter_mut().find(|swarm| swarm.swarm_id == id)
    }

    fn turn(&mut self, swarm: &str, node: u32, injection: &str, content: &str) {
        let text = format!("echo: {content}");
        let (first, second) = text.split_at(text.char_indices().nth(4).map_or(0, |(at, _)| at));
        self.say("turn_started", swarm, Some(node), injection, &json!({}));
        self.say("assistant_delta", swarm, Some(node), injection, &json!({ "content": first }));
        self.say("assistant_delta", swarm, Some(node), injection, &json!({ "content": second }));
        self.say("usage", swarm, Some(node), injection, &json!({ "total_tokens": 42 }));
        self.say("assistant", swarm, Some(node), injection, &json!({ "content": text, "final_answer": true }));
        self.say("turn_complete", swarm, Some(node), injection, &json!({ "status": "completed" }));
    }

    fn inject(&mut self, request_id: &str, swarm: &str, node: u32, content: &str) -> Vec<pb::InjectResponse> {
        let injection = uuid::Uuid::new_v4().to_string();
        let broken = self.knobs.broken_node == Some(node);
        let seq = self.say(
            "inject_ack",
            swarm,
            Some(node),
            &injection,
            &json!({"request_id": request_id, "prompt": content}),
        );
        let step = |state: pb::InjectionState, seq, error: &str| pb::InjectResponse {
            node_id: node,
            injection_id: injection.clone(),
            state: state.into(),
            error: error.to_owned(),
            seq,
        };
        let mut steps = vec![step(pb::InjectionState::Accepted, seq, "")];
        if self.knobs.echo && !broken {
            self.turn(swarm, node, &injection, content);
        }
        if broken {
            let data = json!({"request_id": request_id, "error": "the inbox is on fire"});
            let seq = self.say("inject_failed", swarm, Some(node), &injection, &data);
            steps.push(step(pb::InjectionState::Failed, seq, "the inbox is on fire"));
        } else {
            let seq = self.say("inject_delivered", swarm, Some(node), &injection, &json!({"request_id": request_id}));
            steps.push(step(pb::InjectionState::Delivered, seq, ""));
        }
        steps
    }
}

impl Fake {
    /// A router with these knobs.
    pub fn new(knobs: Knobs) -> Self {
        let state = State { knobs, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), written: watch::Sender::new(0), watches: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn tell(&self) {
        let last = self.state().events.len() as u64;
        self.written.send_replace(last);
    }

    /// Turns knobs.
    pub fn turn_knobs(&self, change: impl FnOnce(&mut Knobs)) {
        change(&mut self.state().knobs);
    }

    /// Adds a running swarm.
    pub fn add_swarm(&self, nodes: u32) -> String {
        let mut state = self.state();
        let swarm_id = uuid::Uuid::new_v4().to_string();
        let job_id = (272_900 + state.swarms.len()).to_string();
        state.swarms.push(pb::Swarm {
            swarm_id: swarm_id.clone(),
            job_id,
            node_count: nodes,
            system_prompt: "You are grüße 🙂".to_owned(),
            status: "running".to_owned(),
            slurm_state: "RUNNING".to_owned(),
            provider: "local".to_owned(),
            provider_id: "local".to_owned(),
            ..pb::Swarm::default()
        });
        swarm_id
    }

    /// Removes a swarm from the registry.
    pub fn forget_swarm(&self, swarm_id: &str) {
        self.state().swarms.retain(|swarm| swarm.swarm_id != swarm_id);
    }

    /// Appends runtime events of one node.
    pub fn say_many(&self, name: &str, swarm_id: &str, node: u32, data: &[Value]) -> u64 {
        let mut state = self.state();
        let mut last = 0;
        for data in data {
            last = state.say(name, swarm_id, Some(node), "i", data);
        }
        drop(state);
        self.tell();
        last
    }

    /// Adds an approval that waits.
    pub fn add_approval(&self, swarm_id: &str, call_id: &str) -> String {
        let mut state = self.state();
        let approval_id = uuid::Uuid::new_v4().to_string();
        let job_id = state.swarm(swarm_id).map(|swarm| swarm.job_id.clone()).unwrap_or_default();
        state.approvals.push(pb::Approval {
            approval_id: approval_id.clone(),
            swarm_id: swarm_id.to_owned(),
            job_id,
            call_id: call_id.to_owned(),
            injection_id: "i".to_owned(),
            status: "pending".to_owned(),
            data: br#"{"command":["touch","x"],"reason":"needs writing","cwd":"/w"}"#.to_vec().into(),
            ..pb::Approval::default()
        });
        approval_id
    }

    /// What launches asked for.
    pub fn specs(&self) -> Vec<LaunchSpec> {
        self.state().specs.clone()
    }

    /// Prompts taken.
    pub fn contents(&self) -> Vec<String> {
        self.state().contents.clone()
    }

    /// The last event's number.
    pub fn last_seq(&self) -> u64 {
        self.state().events.len() as u64
    }
}

fn steps<M: Send + 'static>(steps: Vec<Result<M, Status>>) -> Response<Stream<M>> {
    Response::new(stream::iter(steps).boxed())
}

fn launched(swarm: pb::Swarm, seq: u64) -> pb::LaunchSwarmResponse {
    pb::LaunchSwarmResponse { step: Some(pb::launch_swarm_response::Step::Launched(swarm)), seq }
}

#[tonic::async_trait]
impl RouterService for Fake {
    type LaunchSwarmStream = Stream<pb::LaunchSwarmResponse>;
    type InjectStream = Stream<pb::InjectResponse>;
    type TerminateSwarmStream = Stream<pb::TerminateSwarmResponse>;
    type WatchEventsStream = Stream<pb::WatchEventsResponse>;
    type WatchMembersStream = Stream<pb::WatchMembersResponse>;

    async fn get_info(&self, _: Request<pb::GetInfoRequest>) -> Result<Response<pb::GetInfoResponse>, Status> {
        Ok(Response::new(pb::GetInfoResponse { last_seq: self.last_seq(), ..pb::GetInfoResponse::default() }))
    }

    async fn launch_swarm(
        &self,
        request: Request<pb::LaunchSwarmRequest>,
    ) -> Result<Response<Self::LaunchSwarmStream>, Status> {
        let pb::LaunchSwarmRequest { request_id, spec, .. } = request.into_inner();
        let spec = spec.unwrap_or_default();
        let known = self.state().launches.get(&request_id).cloned();
        if let Some((swarm_id, seq)) = known {
            let swarm = self.state().swarm(&swarm_id).cloned().unwrap_or_default();
            return Ok(steps(vec![Ok(launched(swarm, seq))]));
        }
        let swarm_id = self.add_swarm(spec.node_count);
        let mut state = self.state();
        let knobs = state.knobs.clone();
        let mut out = Vec::new();
        for (stage, message) in [("queued", "recorded"), ("submitting", "Submitted batch job 4242"), ("ready", "up")] {
            let data = json!({"request_id": request_id, "stage": stage, "message": message, "provider": "local",
                "provider_id": "local", "timestamp": 1.5});
            let seq = state.say("swarm_launch_progress", &swarm_id, None, "", &data);
            let progress = pb::LaunchProgress { stage: stage.to_owned(), ..pb::LaunchProgress::default() };
            out.push(Ok(pb::LaunchSwarmResponse {
                step: Some(pb::launch_swarm_response::Step::Progress(progress)),
                seq,
            }));
            if knobs.launches_hang {
                drop(state);
                self.tell();
                return Ok(Response::new(stream::iter(out).chain(stream::pending()).boxed()));
            }
        }
        if let Some(failure) = knobs.launch_failure {
            out.push(Err(status_of(&failure)));
        } else {
            let data = json!({"request_id": request_id, "node_count": spec.node_count, "partition": spec.partition,
                "time": spec.time, "provider": "local", "provider_id": "local"});
            let seq = state.say("swarm_launched", &swarm_id, None, "", &data);
            let swarm = state.swarm(&swarm_id).cloned().unwrap_or_default();
            out.push(Ok(launched(swarm, seq)));
            state.launches.insert(request_id.clone(), (swarm_id.clone(), seq));
            if !spec.system_prompt.is_empty() {
                for node in 0..spec.node_count {
                    state.inject(&request_id, &swarm_id, node, &spec.system_prompt);
                }
            }
            state.specs.push(spec);
        }
        drop(state);
        self.tell();
        Ok(steps(out))
    }

    async fn inject(&self, request: Request<pb::InjectRequest>) -> Result<Response<Self::InjectStream>, Status> {
        let pb::InjectRequest { request_id, swarm_id, nodes, content, .. } = request.into_inner();
        let mut state = self.state();
        if let Some(known) = state.injects.get(&request_id) {
            return Ok(steps(known.iter().cloned().map(Ok).collect()));
        }
        let Some(swarm) = state.swarm(&swarm_id) else {
            return Err(failure(ErrorCode::UnknownSwarm, "no swarm has this id"));
        };
        if swarm.status != "running" {
            return Err(failure(ErrorCode::SwarmOver, "the swarm is over"));
        }
        let count = swarm.node_count;
        let nodes: Vec<u32> = if nodes.is_empty() { (0..count).collect() } else { nodes };
        if let Some(wrong) = nodes.iter().find(|&&node| node >= count) {
            return Err(failure(
                ErrorCode::NodeOutOfRange,
                &format!("the swarm has {count} nodes and no node {wrong}"),
            ));
        }
        let mut out = Vec::new();
        for node in nodes {
            out.extend(state.inject(&request_id, &swarm_id, node, &content));
        }
        state.contents.push(content);
        state.injects.insert(request_id, out.clone());
        drop(state);
        self.tell();
        Ok(steps(out.into_iter().map(Ok).collect()))
    }

    async fn list_swarms(&self, _: Request<pb::ListSwarmsRequest>) -> Result<Response<pb::ListSwarmsResponse>, Status> {
        let state = self.state();
        match &state.knobs.list_failure {
            Some(failure) => Err(status_of(failure)),
            None => Ok(Response::new(pb::ListSwarmsResponse { swarms: state.swarms.clone() })),
        }
    }

    async fn get_swarm(&self, request: Request<pb::GetSwarmRequest>) -> Result<Response<pb::GetSwarmResponse>, Status> {
        let asked = request.into_inner().swarm_id;
        // Like the real one, an unambiguous beginning will do.
        let swarm = self.state().swarms.iter().find(|swarm| swarm.swarm_id.starts_with(&asked)).cloned();
        let swarm = swarm.ok_or_else(|| failure(ErrorCode::UnknownSwarm, "no swarm has this id"))?;
        Ok(Response::new(pb::GetSwarmResponse { swarm: Some(swarm), backend_error: String::new() }))
    }

    async fn terminate_swarm(
        &self,
        request: Request<pb::TerminateSwarmRequest>,
    ) -> Result<Response<Self::TerminateSwarmStream>, Status> {
        let pb::TerminateSwarmRequest { request_id, swarm_id, .. } = request.into_inner();
        let mut state = self.state();
        let Some(swarm) = state.swarm(&swarm_id).map(|swarm| swarm.clone()) else {
            return Err(failure(ErrorCode::UnknownSwarm, "no swarm has this id"));
        };
        let terminated = |swarm: pb::Swarm, seq| pb::TerminateSwarmResponse {
            step: Some(pb::terminate_swarm_response::Step::Terminated(swarm)),
            seq,
        };
        if swarm.status == "terminated" {
            // The event of the earlier request, which had another id.
            let said = state.events.iter().rev().find(|event| event.event == "swarm_terminated");
            let seq = said.map_or(0, |event| event.seq);
            return Ok(steps(vec![Ok(terminated(swarm, seq))]));
        }
        let node_count = swarm.node_count;
        let data = json!({"request_id": request_id, "status": "terminating", "node_count": node_count});
        state.say("swarm_status", &swarm_id, None, "", &data);
        let data = json!({"request_id": request_id, "stage": "graceful_wait", "message": "waiting"});
        state.say("swarm_terminate_progress", &swarm_id, None, "", &data);
        let seq = state.say("swarm_terminated", &swarm_id, None, "", &json!({ "request_id": request_id }));
        let data = json!({"request_id": request_id, "stage": "completed", "message": "done"});
        state.say("swarm_terminate_progress", &swarm_id, None, "", &data);
        if let Some(swarm) = state.swarm(&swarm_id) {
            "terminated".clone_into(&mut swarm.status);
        }
        drop(state);
        self.tell();
        Ok(steps(vec![Ok(terminated(swarm, seq))]))
    }

    async fn interrupt(&self, _: Request<pb::InterruptRequest>) -> Result<Response<pb::InterruptResponse>, Status> {
        Ok(Response::new(pb::InterruptResponse::default()))
    }

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        self.watches.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner();
        let start = if request.from_now { self.last_seq() } else { request.after_seq };
        let break_after = self.state().knobs.break_stream_after;
        let fake = self.clone();
        let end = break_after.map(|count| start + count as u64);
        let written = self.written.subscribe();
        let batches = stream::unfold((start, true, written), move |(at, first, mut written)| {
            let fake = fake.clone();
            async move {
                if end.is_some_and(|end| at >= end) {
                    return Some((Err(Status::unavailable("the stream was cut")), (u64::MAX, false, written)));
                }
                if at == u64::MAX {
                    return None;
                }
                if !first && written.wait_for(|&last| last > at).await.is_err() {
                    return None;
                }
                let events: Vec<pb::Event> = {
                    let state = fake.state();
                    let to = end.map_or(state.events.len(), |end| state.events.len().min(end as usize));
                    state.events[(at as usize).min(to)..to.min(at as usize + 1000)].to_vec()
                };
                let next = at + events.len() as u64;
                let batch = pb::WatchEventsResponse { events, live: first, first_kept_seq: 0 };
                Some((Ok(batch), (next, false, written)))
            }
        });
        Ok(Response::new(batches.boxed()))
    }

    async fn list_approvals(
        &self,
        _: Request<pb::ListApprovalsRequest>,
    ) -> Result<Response<pb::ListApprovalsResponse>, Status> {
        let approvals = self.state().approvals.clone();
        Ok(Response::new(pb::ListApprovalsResponse { approvals_version: 7, approvals }))
    }

    async fn resolve_approval(
        &self,
        request: Request<pb::ResolveApprovalRequest>,
    ) -> Result<Response<pb::ResolveApprovalResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        let found = state.approvals.iter_mut().find(|a| a.job_id == request.job_id && a.call_id == request.call_id);
        let Some(approval) = found else {
            return Err(failure(ErrorCode::UnknownApproval, "no approval has this name"));
        };
        let already_resolved = approval.status == "resolved";
        let decision = if request.decision.is_empty() { "\"accept\"".to_owned() } else { request.decision };
        if !already_resolved {
            "resolved".clone_into(&mut approval.status);
            approval.decision = decision;
        }
        let approval = approval.clone();
        if !already_resolved {
            let data = json!({"request_id": request.request_id, "approval_id": approval.approval_id,
                "call_id": approval.call_id, "approved": request.approved, "decision": "accept"});
            state.say("exec_approval_submitted", &approval.swarm_id, Some(0), "i", &data);
        }
        drop(state);
        self.tell();
        Ok(Response::new(pb::ResolveApprovalResponse { approval: Some(approval), already_resolved }))
    }

    async fn list_providers(
        &self,
        _: Request<pb::ListProvidersRequest>,
    ) -> Result<Response<pb::ListProvidersResponse>, Status> {
        let field = LaunchField { key: "partition".to_owned(), r#type: "text".to_owned(), ..LaunchField::default() };
        let provider = Provider {
            id: "local".to_owned(),
            label: "This machine".to_owned(),
            backend: "local".to_owned(),
            provider_ref: "local".to_owned(),
            launch_fields: vec![field],
            ..Provider::default()
        };
        Ok(Response::new(pb::ListProvidersResponse { providers: vec![provider] }))
    }

    async fn explain(&self, _: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        Ok(Response::new(pb::ExplainResponse::default()))
    }

    // The JSON-line control plane has no commands for members and keys.

    async fn list_members(
        &self,
        _: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        Ok(Response::new(pb::ListMembersResponse::default()))
    }

    async fn watch_members(
        &self,
        _: Request<pb::WatchMembersRequest>,
    ) -> Result<Response<Self::WatchMembersStream>, Status> {
        Ok(steps(Vec::new()))
    }

    async fn list_keys(&self, _: Request<pb::ListKeysRequest>) -> Result<Response<pb::ListKeysResponse>, Status> {
        Ok(Response::new(pb::ListKeysResponse::default()))
    }

    async fn add_key(&self, _: Request<pb::AddKeyRequest>) -> Result<Response<pb::AddKeyResponse>, Status> {
        Ok(Response::new(pb::AddKeyResponse::default()))
    }

    async fn use_key(&self, _: Request<pb::UseKeyRequest>) -> Result<Response<pb::UseKeyResponse>, Status> {
        Ok(Response::new(pb::UseKeyResponse::default()))
    }

    async fn remove_key(&self, _: Request<pb::RemoveKeyRequest>) -> Result<Response<pb::RemoveKeyResponse>, Status> {
        Ok(Response::new(pb::RemoveKeyResponse::default()))
    }
}

/// Lets everybody in whom the port lets in.
#[derive(Debug)]
struct Open;

impl drover_control::Entrance for Open {
    fn wants_token(&self) -> bool {
        false
    }

    fn admit(&self, caller: Caller, _: Option<&str>) -> Result<Caller, Failure> {
        Ok(caller)
    }
}

/// A control plane over a fake router.
pub struct Plane {
    /// Where clients connect.
    pub addr: SocketAddr,
    /// The router behind it.
    pub fake: Fake,
    /// The daemon's context.
    pub ctx: Context,
    _dir: tempfile::TempDir,
}

impl Plane {
    /// One with usual limits.
    pub fn start(knobs: Knobs) -> Self {
        Self::start_with(knobs, 16 << 20, 64 << 20, &SecurityConfig::default())
    }

    /// One on a port that another has left.
    pub fn start_at(addr: SocketAddr) -> Self {
        Self::build(Knobs::default(), addr, 16 << 20, 64 << 20, &SecurityConfig::default())
    }

    /// One with these limits.
    pub fn start_with(knobs: Knobs, max_line: usize, client_max: usize, security: &SecurityConfig) -> Self {
        let any_port: SocketAddr = "127.0.0.1:0".parse().unwrap();
        Self::build(knobs, any_port, max_line, client_max, security)
    }

    fn build(knobs: Knobs, at: SocketAddr, max_line: usize, client_max: usize, security: &SecurityConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ctx = Context::for_test_with("router", dir.path(), security);
        let fake = Fake::new(knobs);
        let listener = ctx.bind("control plane", Some(at), at).unwrap();
        let addr = listener.local_addr();
        let client = RouterServiceClient::new(
            RouterServiceServer::new(fake.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
        let settings = ControlSettings {
            max_line_bytes: max_line,
            client_max_bytes: client_max,
            debug: false,
            entrance: Arc::new(Open),
        };
        let serving = drover_control::serve(ctx.clone(), listener, client, settings);
        ctx.spawn("serve", async move { serving.await.unwrap() });
        Self { addr, fake, ctx, _dir: dir }
    }

    /// Connects and waits until the connection has had its first answer, so that it is sure to be a member.
    pub async fn connect(&self) -> drover_testkit::emulate::Connection {
        let mut connection = drover_testkit::emulate::Connection::open(self.addr).await.unwrap();
        let hello = drover_testkit::emulate::command("swarm_list", &json!({}));
        connection.send(&hello).await.unwrap();
        let id = drover_testkit::emulate::id_of(&hello);
        within(connection.find(|event| event["data"]["request_id"] == id)).await.unwrap().unwrap();
        connection
    }
}

/// Nothing in these tests takes longer.
pub async fn within<F: Future>(work: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("it took too long")
}

/// Waits for a condition.
pub async fn until(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
