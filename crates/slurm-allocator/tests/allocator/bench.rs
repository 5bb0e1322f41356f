//! A real allocator process with stand-in workers, on a state directory of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use drover_proto::allocator::allocator_service_client::AllocatorServiceClient;
use drover_proto::allocator::watch_allocations_response::Change;
use drover_proto::allocator::{
    Allocation, EnsureAllocationRequest, LaunchProgress, ReleaseAllocationRequest, WatchAllocationsRequest,
    WatchAllocationsResponse,
};
use drover_proto::common::LaunchSpec;
use drover_proto::failure_of;
use drover_service::{StateDir, address_book};
use drover_types::Failure;
use rustix::process::{Pid, Signal, kill_process};
use tonic::Streaming;
use tonic::transport::Channel;

pub(crate) const LIMIT: Duration = Duration::from_secs(30);
pub(crate) const NAME: &str = "slurm-allocator";

pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    /// The allocator's PATH, where it is to find other programs than this machine's.
    pub(crate) path: Option<std::ffi::OsString>,
    allocator: Option<Child>,
}

impl Bench {
    /// A state directory with a running allocator.
    pub(crate) async fn start(config: &str) -> Self {
        let mut bench = Self::new(config);
        bench.up().await;
        bench
    }

    pub(crate) fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.yaml"), config).unwrap();
        let worker = dir.path().join("worker.sh");
        fs::write(&worker, include_str!("worker.sh")).unwrap();
        fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        Self { dir, path: None, allocator: None }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state").canonicalize().unwrap()
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-slurm-allocator"));
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("allocator.log")).unwrap();
        command
            .args(["--listen", "127.0.0.1:0", "--config"])
            .arg(self.dir.path().join("config.yaml"))
            .env("DROVER_STATE_DIR", self.state())
            .env("DROVER_WORKER_BIN", self.dir.path().join("worker.sh"))
            .env("DROVER_SECRET_OF_NOBODY", "x")
            .env("OPENAI_API_KEY", "sk-test")
            .stdin(Stdio::null())
            .stderr(log);
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        command
    }

    /// Starts the allocator and waits until it serves.
    pub(crate) async fn up(&mut self) {
        let child = self.command().spawn().unwrap();
        let pid = child.id();
        self.allocator = Some(child);
        let state = StateDir::open(&self.state()).unwrap();
        until("the allocator serves", || {
            address_book::read(&state, NAME).filter(|entry| entry.pid == pid && !entry.listen.is_empty())
        })
        .await;
    }

    pub(crate) fn allocator_pid(&self) -> u32 {
        self.allocator.as_ref().unwrap().id()
    }

    /// kill -9.
    pub(crate) fn kill_allocator(&mut self) {
        let mut child = self.allocator.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// An orderly end.
    pub(crate) async fn stop_allocator(&mut self) {
        let mut child = self.allocator.take().unwrap();
        signal(child.id(), Signal::TERM);
        let status = until("the allocator ends", || child.try_wait().unwrap()).await;
        assert!(status.success(), "{status}");
    }

    /// Starts a second allocator, which is expected to end by itself.
    pub(crate) fn run_second(&self) -> Output {
        self.command().stderr(Stdio::piped()).output().unwrap()
    }

    pub(crate) async fn client(&self) -> AllocatorServiceClient<Channel> {
        let entry = address_book::read(&StateDir::open(&self.state()).unwrap(), NAME).expect("an allocator runs");
        AllocatorServiceClient::connect(format!("http://{}", entry.listen)).await.unwrap()
    }

    pub(crate) async fn ensure(&self, swarm: &str, spec: LaunchSpec) -> Result<Allocation, Failure> {
        let request = EnsureAllocationRequest { swarm_id: swarm.into(), spec: Some(spec) };
        let answer = self.client().await.ensure_allocation(request).await.map_err(|status| failure_of(&status))?;
        Ok(answer.into_inner().allocation.unwrap())
    }

    pub(crate) async fn release(&self, swarm: &str, force: bool) -> Result<bool, Failure> {
        let request = ReleaseAllocationRequest { swarm_id: swarm.into(), force };
        let answer = self.client().await.release_allocation(request).await.map_err(|status| failure_of(&status))?;
        Ok(answer.into_inner().known)
    }

    pub(crate) async fn watch(&self) -> Watch {
        Watch { stream: self.client().await.watch_allocations(WatchAllocationsRequest {}).await.unwrap().into_inner() }
    }

    /// The swarm as the snapshot has it.
    pub(crate) async fn get(&self, swarm: &str) -> Option<Allocation> {
        self.watch().await.snapshot().await.into_iter().find(|allocation| allocation.swarm_id == swarm)
    }

    /// Waits until the swarm is as described.
    pub(crate) async fn wait(&self, swarm: &str, what: &str, is: impl Fn(&Allocation) -> bool) -> Allocation {
        self.watch().await.wait(swarm, what, is).await
    }

    pub(crate) fn node_dir(&self, swarm: &str, node: u32) -> PathBuf {
        self.state().join(format!("nodes/{swarm}/{node:02}"))
    }

    pub(crate) fn ledger(&self, swarm: &str, node: u32) -> Vec<String> {
        let text = fs::read_to_string(self.node_dir(swarm, node).join("ledger")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Shell code that each worker runs before it claims its node.
    pub(crate) fn behave(&self, code: &str) {
        fs::write(self.state().join("behaviour"), code).unwrap();
    }

    pub(crate) fn record(&self, swarm: &str) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.record_file(swarm)).unwrap()).unwrap()
    }

    pub(crate) fn set_record(&self, swarm: &str, record: &serde_json::Value) {
        fs::write(self.record_file(swarm), serde_json::to_vec(record).unwrap()).unwrap();
    }

    pub(crate) fn record_file(&self, swarm: &str) -> PathBuf {
        self.state().join(format!("allocator/{swarm}.json"))
    }

    /// Every living process that was started for a node of this state directory.
    pub(crate) fn processes(&self) -> Vec<u32> {
        processes_with(&format!("DROVER_STATE_DIR={}", self.state().display()), "DROVER_NODE_ID=")
    }

    /// The living workers of a node: those that lead their session, not what they started.
    pub(crate) fn workers(&self, swarm: &str, node: u32) -> Vec<u32> {
        let dir = format!("DROVER_NODE_DIR={}", self.node_dir(swarm, node).display());
        processes_with(&dir, "DROVER_GENERATION=").into_iter().filter(|&pid| session(pid) == Some(pid)).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(mut child) = self.allocator.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // They outlive the allocator by design.
        for pid in self.processes() {
            signal(pid, Signal::KILL);
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("allocator.log")).unwrap_or_default();
            println!("--- the allocator's log\n{log}");
        }
    }
}

pub(crate) struct Watch {
    stream: Streaming<WatchAllocationsResponse>,
}

impl Watch {
    pub(crate) async fn next(&mut self) -> Change {
        let message = tokio::time::timeout(LIMIT, self.stream.message()).await.expect("nothing came");
        message.unwrap().expect("the stream ended").change.unwrap()
    }

    pub(crate) async fn snapshot(&mut self) -> Vec<Allocation> {
        let mut all = Vec::new();
        loop {
            match self.next().await {
                Change::Allocation(allocation) => all.push(allocation),
                Change::SnapshotEnd(_) => return all,
                Change::Progress(line) => panic!("{line:?} in the snapshot"),
            }
        }
    }

    /// How the stream ends.
    pub(crate) async fn end(mut self) -> Failure {
        loop {
            match tokio::time::timeout(LIMIT, self.stream.message()).await.expect("the stream did not end") {
                Ok(message) => assert!(message.is_some(), "the stream ended without a status"),
                Err(status) => return failure_of(&status),
            }
        }
    }

    pub(crate) async fn wait(&mut self, swarm: &str, what: &str, is: impl Fn(&Allocation) -> bool) -> Allocation {
        let deadline = Instant::now() + LIMIT;
        let mut last = None;
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.stream.message()).await {
                Ok(Ok(Some(WatchAllocationsResponse { change: Some(Change::Allocation(allocation)) })))
                    if allocation.swarm_id == swarm =>
                {
                    if is(&allocation) {
                        return allocation;
                    }
                    last = Some(allocation);
                }
                Ok(Ok(Some(_))) => {}
                Ok(other) => panic!("the stream ended before {what}: {other:?}"),
                Err(_) => break,
            }
        }
        panic!("not in time: {what}; last {last:#?}");
    }

    /// Lines of progress up to and with this stage.
    pub(crate) async fn progress_until(&mut self, stage: &str) -> Vec<LaunchProgress> {
        let mut lines = Vec::new();
        loop {
            if let Change::Progress(line) = self.next().await {
                lines.push(line);
                if lines.last().is_some_and(|line| line.stage == stage) {
                    return lines;
                }
            }
        }
    }
}

pub(crate) fn echo(nodes: u32) -> LaunchSpec {
    LaunchSpec { node_count: nodes, agent: "echo".into(), ..LaunchSpec::default() }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal);
}

/// Polls until there is something, or panics.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn alive(pid: u32) -> bool {
    drover_service::process::of(pid).is_some()
}

pub(crate) fn session(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(3)?.parse().ok()
}

fn processes_with(variable: &str, also: &str) -> Vec<u32> {
    let has = |pid: u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let variables: Vec<&[u8]> = environment.split(|&byte| byte == 0).collect();
        variables.contains(&variable.as_bytes()) && variables.iter().any(|found| found.starts_with(also.as_bytes()))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|&pid| alive(pid) && has(pid)).collect()
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
