//! A stage for a thousand nodes on one machine: the real router and the real follower as processes of their own, and beside
//! them, in this process, an allocator that starts nothing and players that stand in for the workers: they read and write
//! the mailbox through the mailbox crate, as workers do.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use drover_mailbox::{Cursor, Line, Mailbox, Owner, Record, StreamReader, StreamWriter, decode_line, encode_line};
use drover_proto::allocator::allocator_service_server::{AllocatorService, AllocatorServiceServer};
use drover_proto::allocator::watch_allocations_response::Change;
use drover_proto::allocator::{
    AllocatedNode, Allocation, AllocationState, EnsureAllocationRequest, EnsureAllocationResponse,
    ListProvidersRequest, ListProvidersResponse, Provider, ReleaseAllocationRequest, ReleaseAllocationResponse,
    WatchAllocationsRequest, WatchAllocationsResponse, WorkerState,
};
use drover_service::process::ProcessId;
use drover_service::{Context, Server, StateDir, address_book, now_us, process};
use drover_testkit::cluster::{RouterClient, control_addr, end, program, router, scratch_dir, wait_ready};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::sync::broadcast;
use tonic::{Request, Response, Status};

use crate::chaos::launch;
use crate::mounts::FuseMount;

/// Router and follower as processes, allocator and workers played. Dropping it ends the processes.
pub struct Stage {
    state: StateDir,
    children: Vec<Child>,
    ctx: Context,
    allocator: PlayedAllocator,
    mount: Option<(FuseMount, PathBuf)>,
    dir: TempDir,
}

/// How the follower of a stage learns of new records.
#[derive(Debug, Clone, Copy)]
pub enum News {
    /// The system tells of changes.
    Told,
    /// The system gives it no watcher, so that it polls, as it does on a file system that tells of nothing.
    Polled {
        /// How often it looks at the outbox of a quiet node.
        cold: Duration,
    },
    /// It sees the workers' files through a file system of its own, as from another host: FUSE, which tells of no changes and
    /// which the follower takes for a network file system. See [`crate::mounts::fuse`].
    Mounted {
        /// How often it looks at the outbox of a quiet node.
        cold: Duration,
    },
}

impl News {
    /// The command that runs `drover` so.
    fn follower(self, drover: &Path) -> Command {
        let (mut command, cold) = match self {
            Self::Told => return Command::new(drover),
            Self::Polled { cold } => {
                // A user namespace of its own, in which nobody may have a watcher; the process is the same.
                let mut command = Command::new("unshare");
                let none = "echo 0 > /proc/sys/user/max_inotify_instances && exec \"$0\" \"$@\"";
                command.args(["--user", "--map-root-user", "sh", "-c", none]).arg(drover);
                (command, cold)
            }
            Self::Mounted { cold } => (Command::new(drover), cold),
        };
        command.env("DROVER_FOLLOWER__COLD_POLL", format!("{}ms", cold.as_millis()));
        command
    }

    /// What the follower says of it when it starts.
    fn said(self) -> &'static str {
        match self {
            Self::Told => "mailbox opened",
            Self::Polled { .. } => "no file watcher to be had",
            Self::Mounted { .. } => "the mailbox is on a network file system",
        }
    }
}

impl Stage {
    /// Starts it with the default configuration.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(News::Told).await
    }

    /// Starts it with a follower that learns of new records in this way.
    pub async fn start_with(news: News) -> anyhow::Result<Self> {
        let dir = scratch_dir("stage-")?;
        let state = StateDir::open(&dir.path().join("state"))?;
        let ctx = Context::for_test("slurm-allocator", state.path());
        let mailbox = state.path().join("mailbox");
        let mount = if matches!(news, News::Mounted { .. }) {
            let (source, path) = (&mailbox, dir.path().join("mount"));
            for dir in [source, &path] {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            }
            // An open of NFS asks the server for the size. FUSE believes what it knows, even then, unless told otherwise.
            Some((FuseMount::mount(source, &path, 0)?, path))
        } else {
            None
        };
        let allocator = PlayedAllocator::new(Mailbox::new(mailbox));
        let listener = ctx.bind("allocator", None, "127.0.0.1:0".parse()?)?;
        Server::new(&ctx).grpc(AllocatorServiceServer::new(allocator.clone())).serve(listener)?;
        let mut stage = Self { state, children: Vec::new(), ctx, allocator, mount, dir };
        let drover = program("drover")?;
        stage.spawn("outbox-follower", news.follower(&drover))?;
        stage.spawn("router", Command::new(&drover))?;
        wait_ready(&stage.state, Duration::from_secs(20)).await?;
        let (log, wanted) = (fs::read_to_string(stage.log("outbox-follower"))?, news.said());
        ensure!(log.contains(wanted), "the follower did not say {wanted:?}:\n{log}");
        Ok(stage)
    }

    fn spawn(&mut self, daemon: &str, mut drover: Command) -> anyhow::Result<()> {
        let log = fs::File::create(self.log(daemon))?;
        drover.args(["daemon", daemon]);
        if let Some((_, path)) = self.mount.as_ref().filter(|_| daemon == "outbox-follower") {
            drover.arg("--mailbox").arg(path);
        }
        let child = drover
            .env("DROVER_STATE_DIR", self.state.path())
            .env_remove("DROVER_CONFIG")
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.children.push(child);
        Ok(())
    }

    fn log(&self, daemon: &str) -> PathBuf {
        self.dir.path().join(format!("{daemon}.log"))
    }

    /// A client of the router.
    pub fn router(&self) -> RouterClient {
        router(&self.state)
    }

    /// Address of the JSON-line control plane.
    pub fn control_addr(&self) -> anyhow::Result<String> {
        control_addr(&self.state)
    }

    /// The process of `router` or `outbox-follower`.
    pub fn process(&self, name: &str) -> anyhow::Result<ProcessId> {
        let entry = address_book::read(&self.state, name).with_context(|| format!("{name} is not running"))?;
        Ok(ProcessId { pid: entry.pid, start_time: entry.start_time })
    }

    /// Launches a swarm whose nodes are played.
    pub async fn launch(&self, nodes: u32) -> anyhow::Result<String> {
        launch(&mut self.router(), "echo", nodes).await
    }

    /// The player of a node.
    pub fn player(&self, swarm: &str, node: u32) -> anyhow::Result<Arc<Mutex<Player>>> {
        self.allocator.players().get(&(swarm.to_owned(), node)).cloned().context("no such player")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
        for child in &mut self.children {
            end(child, Duration::from_secs(5));
        }
    }
}

/// Stands in for one worker.
pub struct Player {
    writer: StreamWriter,
    inbox: StreamReader,
    job_id: String,
    node: u32,
    seq: u64,
    line: Vec<u8>,
}

/// A prompt as a player finds it in its inbox.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The injection.
    pub injection_id: String,
    /// The prompt's text.
    pub content: String,
}

/// A record as a player finds it in its inbox.
#[derive(Debug, Clone)]
pub struct Order {
    /// Its type.
    pub kind: String,
    /// The injection that it belongs to, or nothing.
    pub injection_id: String,
    /// Its fields.
    pub data: serde_json::Value,
}

impl Player {
    fn begin(mailbox: &Mailbox, swarm: &str, job_id: &str, node: u32) -> anyhow::Result<Self> {
        let swarm: SwarmId = swarm.parse()?;
        let outbox = OutboxId { swarm: swarm.clone(), node: NodeIndex(node), generation: Generation(1) };
        let me = ProcessId::current();
        mailbox.claim(&outbox, &Owner { host: process::hostname(), pid: me.pid, start_time: me.start_time })?;
        let mut player = Self {
            writer: StreamWriter::open(mailbox.outbox_dir(&outbox), 1 << 30)?,
            inbox: StreamReader::new(mailbox.inbox_dir(&swarm, NodeIndex(node)), Cursor::default()),
            job_id: job_id.to_owned(),
            node,
            seq: 0,
            line: Vec::new(),
        };
        let hello = format!(r#"{{"host":"stage","pid":{},"agent":"echo","version":"played","inbox_seq":0}}"#, me.pid);
        player.write("worker_hello", None, &hello)?;
        Ok(player)
    }

    /// Adds a record to what [`Player::flush`] appends.
    pub fn queue(&mut self, kind: &str, injection: Option<&str>, data: &str) -> anyhow::Result<()> {
        self.seq += 1;
        let data: Box<RawValue> = RawValue::from_string(data.to_owned())?;
        let record = Record {
            seq: self.seq,
            ts: now_us(),
            job_id: self.job_id.as_str().into(),
            node_id: self.node,
            generation: 1,
            injection_id: injection.map(Into::into),
            trace: None,
            kind: kind.into(),
            data: &data,
        };
        encode_line(&record, &mut self.line);
        Ok(())
    }

    /// Appends everything queued in one write.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        self.writer.append(&self.line)?;
        self.line.clear();
        Ok(())
    }

    /// Appends one record.
    pub fn write(&mut self, kind: &str, injection: Option<&str>, data: &str) -> anyhow::Result<()> {
        self.queue(kind, injection, data)?;
        self.flush()
    }

    /// Prompts that have come since the last look; other records are passed over.
    pub fn prompts(&mut self) -> anyhow::Result<Vec<Prompt>> {
        let prompt = |order: Order| {
            (order.kind == "inject").then(|| Prompt {
                content: order.data["content"].as_str().unwrap_or_default().to_owned(),
                injection_id: order.injection_id,
            })
        };
        Ok(self.orders()?.into_iter().filter_map(prompt).collect())
    }

    /// Every record that has come since the last look.
    pub fn orders(&mut self) -> anyhow::Result<Vec<Order>> {
        let mut orders = Vec::new();
        while let Some(chunk) = self.inbox.next_chunk(1 << 20)? {
            for line in chunk.lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
                if let Line::Record(record) = decode_line(line)? {
                    let injection_id = record.injection_id.as_deref().unwrap_or_default().to_owned();
                    ensure!(record.kind != "inject" || !injection_id.is_empty(), "a prompt without a name");
                    orders.push(Order {
                        kind: record.kind.into_owned(),
                        injection_id,
                        data: serde_json::from_str(record.data.get())?,
                    });
                }
            }
        }
        Ok(orders)
    }

    /// Answers a prompt the way an agent would: one turn with its text.
    pub fn answer(&mut self, prompt: &Prompt) -> anyhow::Result<()> {
        let id = Some(prompt.injection_id.as_str());
        let text = serde_json::to_string(&prompt.content)?;
        self.queue("turn_started", id, "{}")?;
        self.queue("assistant", id, &format!(r#"{{"content":{text}}}"#))?;
        self.queue("turn_complete", id, r#"{"status":"completed"}"#)?;
        self.flush()
    }
}

type Players = HashMap<(String, u32), Arc<Mutex<Player>>>;

/// Says at once that every node runs.
#[derive(Clone)]
struct PlayedAllocator {
    mailbox: Mailbox,
    players: Arc<Mutex<Players>>,
    allocations: Arc<Mutex<HashMap<String, Allocation>>>,
    changes: broadcast::Sender<Allocation>,
}

impl PlayedAllocator {
    fn new(mailbox: Mailbox) -> Self {
        let (changes, _) = broadcast::channel(1024);
        Self { mailbox, players: Arc::default(), allocations: Arc::default(), changes }
    }

    fn players(&self) -> MutexGuard<'_, Players> {
        self.players.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocations(&self) -> MutexGuard<'_, HashMap<String, Allocation>> {
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, allocation: &Allocation) {
        self.allocations().insert(allocation.swarm_id.clone(), allocation.clone());
        let _ = self.changes.send(allocation.clone());
    }
}

#[tonic::async_trait]
impl AllocatorService for PlayedAllocator {
    async fn ensure_allocation(
        &self,
        request: Request<EnsureAllocationRequest>,
    ) -> Result<Response<EnsureAllocationResponse>, Status> {
        let request = request.into_inner();
        let known = self.allocations().get(&request.swarm_id).cloned();
        if let Some(allocation) = known {
            return Ok(Response::new(EnsureAllocationResponse { allocation: Some(allocation) }));
        }
        let count = request.spec.map_or(1, |spec| spec.node_count);
        let job_id = format!("played-{}", &request.swarm_id[..8.min(request.swarm_id.len())]);
        let allocation = Allocation {
            swarm_id: request.swarm_id.clone(),
            job_id: job_id.clone(),
            state: AllocationState::Running.into(),
            backend_state: "RUNNING".to_owned(),
            backend: "local".to_owned(),
            provider: "local".to_owned(),
            nodes: (0..count)
                .map(|node_id| AllocatedNode {
                    node_id,
                    host: "stage".to_owned(),
                    generation: 1,
                    state: WorkerState::Running.into(),
                    pid: std::process::id(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        self.enter(&allocation);
        let (mailbox, swarm) = (self.mailbox.clone(), request.swarm_id);
        let begun = tokio::task::spawn_blocking(move || {
            (0..count)
                .map(|node| {
                    Ok(((swarm.clone(), node), Arc::new(Mutex::new(Player::begin(&mailbox, &swarm, &job_id, node)?))))
                })
                .collect::<anyhow::Result<Vec<_>>>()
        });
        let begun = begun.await.map_err(|error| Status::internal(error.to_string()))?;
        self.players().extend(begun.map_err(|error| Status::internal(format!("{error:#}")))?);
        Ok(Response::new(EnsureAllocationResponse { allocation: Some(allocation) }))
    }

    async fn release_allocation(
        &self,
        request: Request<ReleaseAllocationRequest>,
    ) -> Result<Response<ReleaseAllocationResponse>, Status> {
        let ended = self.allocations().remove(&request.into_inner().swarm_id);
        let known = ended.is_some();
        if let Some(mut allocation) = ended {
            allocation.state = AllocationState::Completed.into();
            "COMPLETED".clone_into(&mut allocation.backend_state);
            let _ = self.changes.send(allocation);
        }
        Ok(Response::new(ReleaseAllocationResponse { known }))
    }

    type WatchAllocationsStream = BoxStream<'static, Result<WatchAllocationsResponse, Status>>;

    async fn watch_allocations(
        &self,
        _: Request<WatchAllocationsRequest>,
    ) -> Result<Response<Self::WatchAllocationsStream>, Status> {
        let changes = self.changes.subscribe();
        let mut snapshot: Vec<Change> = self.allocations().values().cloned().map(Change::Allocation).collect();
        snapshot.push(Change::SnapshotEnd(true));
        let live = tokio_stream::wrappers::BroadcastStream::new(changes)
            .filter_map(|change| async { change.ok().map(Change::Allocation) });
        let all =
            stream::iter(snapshot).chain(live).map(|change| Ok(WatchAllocationsResponse { change: Some(change) }));
        Ok(Response::new(all.boxed()))
    }

    async fn list_providers(
        &self,
        _: Request<ListProvidersRequest>,
    ) -> Result<Response<ListProvidersResponse>, Status> {
        let provider =
            Provider { id: "local".into(), label: "played".into(), backend: "local".into(), ..Default::default() };
        Ok(Response::new(ListProvidersResponse { providers: vec![provider] }))
    }
}
