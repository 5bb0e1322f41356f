//! The other daemons, in memory: a mailbox whose workers echo, and an allocator that starts what it is asked to start.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_mailbox::{Line, Record, decode_line, encode_line};
use drover_proto::allocator::allocator_service_server::{AllocatorService, AllocatorServiceServer};
use drover_proto::allocator::{self, AllocatedNode, Allocation, AllocationState, WorkerState};
use drover_proto::common::NodeRef;
use drover_proto::mailbox::mailbox_service_server::{MailboxService, MailboxServiceServer};
use drover_proto::mailbox::{self, DeliveryResult};
use drover_service::{Context, Server, now_us};
use futures::Stream;
use serde_json::value::RawValue;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

type Answers<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One node: its inbox as the worker sees it, and what it wrote.
#[derive(Default)]
struct Node {
    /// The last inbox record carried out.
    taken: u64,
    executed: Vec<String>,
    outbox: Vec<u8>,
    seq: u64,
}

/// Every mailbox, and how badly the follower behaves.
#[derive(Default)]
pub(crate) struct Mailboxes {
    nodes: Mutex<BTreeMap<(String, u32), Node>>,
    /// Every so many calls, Deliver writes and then fails. 0: never.
    pub(crate) lose_answers: AtomicU32,
    /// Every so many chunks, a Follow stream breaks. 0: never.
    pub(crate) break_streams: AtomicU32,
    calls: AtomicU32,
    chunks: AtomicU32,
}

fn comes_round(counter: &AtomicU32, every: &AtomicU32) -> bool {
    let every = every.load(Ordering::Relaxed);
    every != 0 && counter.fetch_add(1, Ordering::Relaxed) % every == every - 1
}

impl Mailboxes {
    /// Prompts in the order in which each node executed them.
    pub(crate) fn executed(&self, swarm: &str) -> Vec<Vec<String>> {
        let nodes = self.nodes.lock().unwrap();
        nodes.iter().filter(|((id, _), _)| id == swarm).map(|(_, node)| node.executed.clone()).collect()
    }

    /// The worker of a node writes a record.
    pub(crate) fn say(&self, swarm: &str, node: u32, kind: &str, injection: Option<&str>, data: &str) {
        let mut nodes = self.nodes.lock().unwrap();
        let mailbox = nodes.entry((swarm.to_owned(), node)).or_default();
        say(mailbox, node, kind, injection, data);
    }

    fn take(&self, swarm: &str, index: u32, line: &[u8]) {
        let Ok(Line::Record(record)) = decode_line(line) else { panic!("the router delivered no record") };
        let mut nodes = self.nodes.lock().unwrap();
        let node = nodes.entry((swarm.to_owned(), index)).or_default();
        if record.seq <= node.taken {
            return;
        }
        node.taken = record.seq;
        if record.kind == "inject" {
            let id = record.injection_id.as_deref().unwrap();
            let data: serde_json::Value = serde_json::from_str(record.data.get()).unwrap();
            node.executed.push(data["content"].as_str().unwrap().to_owned());
            say(node, index, "turn_started", Some(id), "{}");
            say(node, index, "assistant_delta", Some(id), record.data.get());
            say(node, index, "assistant", Some(id), record.data.get());
            say(node, index, "turn_complete", Some(id), r#"{"status":"completed"}"#);
        }
    }
}

fn say(mailbox: &mut Node, node: u32, kind: &str, injection: Option<&str>, data: &str) {
    mailbox.seq += 1;
    let data = RawValue::from_string(data.to_owned()).unwrap();
    let record = Record {
        seq: mailbox.seq,
        ts: now_us(),
        job_id: "fake".into(),
        node_id: node,
        generation: 1,
        injection_id: injection.map(Into::into),
        trace: None,
        kind: kind.into(),
        data: &data,
    };
    encode_line(&record, &mut mailbox.outbox);
}

struct Follower(Arc<Mailboxes>);

#[tonic::async_trait]
impl MailboxService for Follower {
    async fn deliver(
        &self,
        request: Request<mailbox::DeliverRequest>,
    ) -> Result<Response<mailbox::DeliverResponse>, Status> {
        let deliveries = request.into_inner().deliveries;
        for delivery in &deliveries {
            let NodeRef { swarm_id, node_id } = delivery.node.clone().unwrap();
            self.0.take(&swarm_id, node_id, &delivery.record);
        }
        if comes_round(&self.0.calls, &self.0.lose_answers) {
            return Err(Status::unavailable("the answer was lost"));
        }
        let results = deliveries.iter().map(|_| DeliveryResult::default()).collect();
        Ok(Response::new(mailbox::DeliverResponse { results }))
    }

    type CarryStream = Answers<mailbox::CarryResponse>;

    async fn carry(&self, _: Request<mailbox::CarryRequest>) -> Result<Response<Self::CarryStream>, Status> {
        Err(Status::unavailable("these nodes take no calls"))
    }

    type FollowStream = Answers<mailbox::FollowResponse>;

    async fn follow(
        &self,
        request: Request<Streaming<mailbox::FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut requests = request.into_inner();
        let mailboxes = Arc::clone(&self.0);
        let (chunks, stream) = mpsc::channel(4);
        let work = async move {
            let mut following = HashMap::new();
            loop {
                let poll = tokio::time::sleep(Duration::from_millis(5));
                tokio::select! {
                    message = requests.message() => match message {
                        Ok(Some(message)) => for add in message.add {
                            following.insert(add.outbox.unwrap(), add.cursor.unwrap().offset as usize);
                        },
                        _ => return,
                    },
                    () = poll => {}
                }
                for (outbox, offset) in &mut following {
                    let lines = {
                        let nodes = mailboxes.nodes.lock().unwrap();
                        let Some(node) = nodes.get(&(outbox.swarm_id.clone(), outbox.node_id)) else { continue };
                        node.outbox[*offset..].to_vec()
                    };
                    if lines.is_empty() {
                        continue;
                    }
                    let start_offset = *offset as u64;
                    *offset += lines.len();
                    let chunk = mailbox::FollowResponse {
                        outbox: Some(outbox.clone()),
                        segment: 1,
                        start_offset,
                        lines: lines.into(),
                        next_segment: 1,
                        next_offset: *offset as u64,
                        damage: String::new(),
                    };
                    if chunks.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                    if comes_round(&mailboxes.chunks, &mailboxes.break_streams) {
                        return;
                    }
                }
            }
        };
        spawn(work);
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn remove_swarm(
        &self,
        _: Request<mailbox::RemoveSwarmRequest>,
    ) -> Result<Response<mailbox::RemoveSwarmResponse>, Status> {
        Ok(Response::new(mailbox::RemoveSwarmResponse { removed: true }))
    }
}

#[expect(clippy::disallowed_methods, reason = "a fake that ends with its test's runtime")]
fn spawn(work: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(work);
}

/// Every allocation, and how badly the allocator behaves.
pub(crate) struct Allocations {
    mailboxes: Arc<Mailboxes>,
    /// Those of a cluster: what is launched on the provider `far` has its files there.
    pub(crate) far: Arc<Mailboxes>,
    known: Mutex<BTreeMap<String, Allocation>>,
    changes: broadcast::Sender<Allocation>,
    /// Ensure calls never answer.
    pub(crate) hang: AtomicBool,
    pub(crate) ensured: AtomicU32,
}

impl Allocations {
    fn change(&self, allocation: Allocation) {
        self.known.lock().unwrap().insert(allocation.swarm_id.clone(), allocation.clone());
        // Nobody listening is fine: the next one gets the snapshot.
        let _ = self.changes.send(allocation);
    }
}

struct Allocator(Arc<Allocations>);

#[tonic::async_trait]
impl AllocatorService for Allocator {
    async fn ensure_allocation(
        &self,
        request: Request<allocator::EnsureAllocationRequest>,
    ) -> Result<Response<allocator::EnsureAllocationResponse>, Status> {
        let request = request.into_inner();
        if self.0.hang.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let known = self.0.known.lock().unwrap().get(&request.swarm_id).cloned();
        let allocation = known.unwrap_or_else(|| {
            self.0.ensured.fetch_add(1, Ordering::Relaxed);
            let spec = request.spec.unwrap();
            let is_far = spec.provider == "far";
            let mailboxes = if is_far { &self.0.far } else { &self.0.mailboxes };
            let nodes = (0..spec.node_count)
                .map(|node_id| AllocatedNode {
                    node_id,
                    host: "fake".into(),
                    generation: 1,
                    state: WorkerState::Running as i32,
                    pid: 1,
                    ..AllocatedNode::default()
                })
                .collect::<Vec<_>>();
            for node in &nodes {
                mailboxes.say(&request.swarm_id, node.node_id, "worker_hello", None, r#"{"host":"fake","pid":1}"#);
            }
            Allocation {
                swarm_id: request.swarm_id.clone(),
                job_id: format!("job-{}", &request.swarm_id[..8]),
                state: AllocationState::Running as i32,
                backend_state: "RUNNING".into(),
                backend: "local".into(),
                provider: if is_far { "far".into() } else { "fake".into() },
                follower: if is_far { FAR.into() } else { String::new() },
                nodes,
                ..Allocation::default()
            }
        });
        self.0.change(allocation.clone());
        Ok(Response::new(allocator::EnsureAllocationResponse { allocation: Some(allocation) }))
    }

    async fn release_allocation(
        &self,
        request: Request<allocator::ReleaseAllocationRequest>,
    ) -> Result<Response<allocator::ReleaseAllocationResponse>, Status> {
        let known = self.0.known.lock().unwrap().get(&request.get_ref().swarm_id).cloned();
        let Some(mut allocation) = known else {
            return Ok(Response::new(allocator::ReleaseAllocationResponse { known: false }));
        };
        allocation.state = AllocationState::Completed as i32;
        self.0.change(allocation);
        Ok(Response::new(allocator::ReleaseAllocationResponse { known: true }))
    }

    type WatchAllocationsStream = Answers<allocator::WatchAllocationsResponse>;

    async fn watch_allocations(
        &self,
        _: Request<allocator::WatchAllocationsRequest>,
    ) -> Result<Response<Self::WatchAllocationsStream>, Status> {
        use allocator::watch_allocations_response::Change;
        let mut changes = self.0.changes.subscribe();
        let snapshot: Vec<Allocation> = self.0.known.lock().unwrap().values().cloned().collect();
        let (send, stream) = mpsc::channel(64);
        let message = |change| Ok(allocator::WatchAllocationsResponse { change: Some(change) });
        let work = async move {
            for allocation in snapshot {
                let _ = send.send(message(Change::Allocation(allocation))).await;
            }
            let _ = send.send(message(Change::SnapshotEnd(true))).await;
            while let Ok(allocation) = changes.recv().await {
                if send.send(message(Change::Allocation(allocation))).await.is_err() {
                    return;
                }
            }
        };
        spawn(work);
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_providers(
        &self,
        _: Request<allocator::ListProvidersRequest>,
    ) -> Result<Response<allocator::ListProvidersResponse>, Status> {
        let provider = allocator::Provider { id: "fake".into(), ..allocator::Provider::default() };
        Ok(Response::new(allocator::ListProvidersResponse { providers: vec![provider] }))
    }
}

/// Name of the cluster's follower.
pub(crate) const FAR: &str = "outbox-follower@far";

/// Starts the follower of a cluster, or what leads to it. The context ends it.
pub(crate) fn start_far(state: &Path, mailboxes: &Arc<Mailboxes>) -> Context {
    let any = "127.0.0.1:0".parse().unwrap();
    let ctx = Context::for_test(FAR, state);
    let listener = ctx.bind("follower", Some(any), any).unwrap();
    Server::new(&ctx).grpc(MailboxServiceServer::new(Follower(Arc::clone(mailboxes)))).serve(listener).unwrap();
    ctx
}

/// Starts both in the address book of a state directory. The contexts end them.
pub(crate) fn start(state: &Path) -> (Arc<Mailboxes>, Arc<Allocations>, [Context; 2]) {
    let any = "127.0.0.1:0".parse().unwrap();
    let mailboxes = Arc::new(Mailboxes::default());
    let follower = Context::for_test("outbox-follower", state);
    let listener = follower.bind("follower", Some(any), any).unwrap();
    Server::new(&follower).grpc(MailboxServiceServer::new(Follower(Arc::clone(&mailboxes)))).serve(listener).unwrap();

    let allocations = Arc::new(Allocations {
        mailboxes: Arc::clone(&mailboxes),
        far: Arc::default(),
        known: Mutex::default(),
        changes: broadcast::channel(64).0,
        hang: AtomicBool::new(false),
        ensured: AtomicU32::new(0),
    });
    let allocator = Context::for_test("slurm-allocator", state);
    let listener = allocator.bind("allocator", Some(any), any).unwrap();
    let service = AllocatorServiceServer::new(Allocator(Arc::clone(&allocations)));
    Server::new(&allocator).grpc(service).serve(listener).unwrap();
    (mailboxes, allocations, [follower, allocator])
}
