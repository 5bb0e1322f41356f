//! A whole drover instance on this machine: the real `drover up` with its own state directory, real worker processes, and
//! nothing left behind.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::GetInfoRequest;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::process::ProcessId;
use drover_service::{MAX_MESSAGE_BYTES, StateDir, Target, address_book, connect, process};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tonic::transport::Channel;

/// The daemons that `up` runs, by their names in the address book.
pub const DAEMONS: [&str; 3] = ["router", "slurm-allocator", "outbox-follower"];

/// The router's client as tests use it.
pub type RouterClient = RouterServiceClient<Channel>;

/// A running instance. Dropping it ends every process that was started for it.
pub struct Cluster {
    dir: Option<TempDir>,
    state: StateDir,
    config: PathBuf,
    drover: PathBuf,
    environment: Vec<(OsString, OsString)>,
    up: Option<Child>,
}

impl Cluster {
    /// Starts `drover up` with this configuration (YAML) and waits until every daemon answers.
    pub async fn start(config: &str) -> anyhow::Result<Self> {
        let mut cluster = Self::prepare(config)?;
        cluster.up().await?;
        Ok(cluster)
    }

    /// Makes the directories and the configuration, starts nothing.
    pub fn prepare(config: &str) -> anyhow::Result<Self> {
        let dir = scratch_dir("cluster-")?;
        Self::prepare_in(dir, config)
    }

    /// Like [`Cluster::start`], with everything on a file system of its own that holds so many MiB. Needs root.
    pub async fn start_on_small_disk(config: &str, mib: u32) -> anyhow::Result<(Self, SmallDisk)> {
        let dir = scratch_dir("cluster-")?;
        let disk = SmallDisk::mount(&dir.path().join("state"), mib)?;
        let mut cluster = Self::prepare_in(dir, config)?;
        cluster.up().await?;
        Ok((cluster, disk))
    }

    fn prepare_in(dir: TempDir, config: &str) -> anyhow::Result<Self> {
        let state = StateDir::open(&dir.path().join("state"))?;
        let config_file = dir.path().join("drover.yaml");
        fs::write(&config_file, config)?;
        Ok(Self {
            dir: Some(dir),
            state,
            config: config_file,
            drover: program("drover")?,
            environment: Vec::new(),
            up: None,
        })
    }

    /// Sets a variable for everything that is started from now on, such as a PATH with other programs on it.
    pub fn set_env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.environment.push((name.into(), value.into()));
    }

    /// Runs this copy of the program from now on, such as one that is replaced while it runs.
    pub fn use_program(&mut self, drover: PathBuf) {
        self.drover = drover;
    }

    /// Starts `drover up` again after [`Cluster::down`].
    pub async fn up(&mut self) -> anyhow::Result<()> {
        ensure!(self.up.is_none(), "drover up runs already");
        let log = fs::File::create(self.dir().join("up.log"))?;
        let child = self.command(&["up"]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        self.up = Some(child);
        self.wait_ready(Duration::from_secs(20)).await
    }

    /// Waits until the router answers and reaches allocator and follower.
    pub async fn wait_ready(&self, limit: Duration) -> anyhow::Result<()> {
        wait_ready(&self.state, limit).await.with_context(|| self.logs())
    }

    /// Ends `drover up` in order; swarms go on.
    pub fn down(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        let mut up = self.up.take().context("drover up does not run")?;
        signal(up.id(), Signal::TERM)?;
        Ok(up.wait()?)
    }

    /// Sends `drover up` a signal; [`Cluster::is_up`] tells when it has ended.
    pub fn tell_up(&self, what: Signal) -> anyhow::Result<()> {
        Ok(signal(self.up.as_ref().context("drover up does not run")?.id(), what)?)
    }

    /// Whether `drover up` runs. When it has ended it can be started again.
    pub fn is_up(&mut self) -> anyhow::Result<bool> {
        let ended = match &mut self.up {
            Some(up) => up.try_wait()?.is_some(),
            None => true,
        };
        if ended {
            self.up = None;
        }
        Ok(!ended)
    }

    /// A `drover` command for this instance.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.drover);
        command.args(args).env("DROVER_STATE_DIR", self.state.path()).env("DROVER_CONFIG", &self.config);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.env_remove("NO_COLOR").current_dir(self.dir());
        command
    }

    /// Where everything of this instance lies.
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().map_or(Path::new("."), TempDir::path)
    }

    /// Its state directory.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// A client of its router, which finds the router again after a restart.
    pub fn router(&self) -> RouterClient {
        router(&self.state)
    }

    /// Address of its JSON-line control plane.
    pub fn control_addr(&self) -> anyhow::Result<String> {
        control_addr(&self.state)
    }

    /// The process of a daemon.
    pub fn daemon(&self, name: &str) -> Option<ProcessId> {
        address_book::read(&self.state, name).map(|entry| ProcessId { pid: entry.pid, start_time: entry.start_time })
    }

    /// Leaves the directory where it is when this is dropped, and says where that is.
    pub fn keep(&mut self) -> String {
        self.dir.take().map_or_else(String::new, |dir| dir.keep().display().to_string())
    }

    /// The last lines of every log, for failures.
    pub fn logs(&self) -> String {
        let mut files = vec![self.dir().join("up.log")];
        let listed = fs::read_dir(self.state.path().join("logs")).into_iter().flatten().filter_map(Result::ok);
        files.extend(listed.map(|entry| entry.path()));
        let tails: Vec<String> =
            files.iter().map(|file| format!("--- {}\n{}\n", file.display(), tail(file, 30))).collect();
        tails.concat()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut up) = self.up.take() {
            end(&mut up, Duration::from_secs(10));
        }
        // Workers outlive the daemons by design. They are ours, and are known by their environment.
        for pid in processes_of(self.state.path()) {
            let _ = signal(pid, Signal::KILL);
        }
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            let kept = dir.keep();
            let mut stderr = io::stderr();
            let _ = io::Write::write_fmt(&mut stderr, format_args!("kept {}\n", kept.display()));
        }
    }
}

/// A file system of its own, small enough to fill. Drop it before the cluster that lives on it has gone: it is unmounted
/// lazily, when its last user ends.
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: &Path, mib: u32) -> anyhow::Result<Self> {
        fs::create_dir_all(path)?;
        let options = format!("size={mib}m,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status()?;
        ensure!(mounted.success(), "failed to mount a tmpfs on {}", path.display());
        Ok(Self { path: path.to_owned() })
    }

    /// Leaves no byte free.
    pub fn fill(&self) -> anyhow::Result<()> {
        Ok(fill(&self.path.join("filler"))?)
    }

    /// Takes the right to write away, or gives it back.
    pub fn read_only(&self, read_only: bool) -> anyhow::Result<()> {
        let options = if read_only { "remount,ro" } else { "remount,rw" };
        let mounted = Command::new("mount").args(["-o", options]).arg(&self.path).status()?;
        ensure!(mounted.success(), "failed to remount {}", self.path.display());
        Ok(())
    }

    /// Gives the space back.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.path.join("filler"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// Writes a file until its disk has no byte free.
pub(crate) fn fill(path: &Path) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    let mut block = vec![0; 1 << 20];
    while !block.is_empty() {
        match io::Write::write(&mut file, &block) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => block.truncate(block.len() / 2),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A client of the router of this state directory, which finds the router again after a restart.
pub fn router(state: &StateDir) -> RouterClient {
    let channel = connect(Target::Daemon { state: state.clone(), name: "router".to_owned() });
    RouterServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Where the router of this state directory serves the JSON-line control plane.
pub fn control_addr(state: &StateDir) -> anyhow::Result<String> {
    let entry = address_book::read(state, "router").context("the router is not running")?;
    entry.control.context("the router has published no control address")
}

/// Waits until the router of this state directory answers and reaches allocator and follower.
pub async fn wait_ready(state: &StateDir, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let mut last = "no answer".to_owned();
    while Instant::now() < deadline {
        match router(state).get_info(GetInfoRequest {}).await {
            Ok(info) => {
                let info = info.into_inner();
                if info.allocator_error.is_empty() && info.follower_error.is_empty() {
                    return Ok(());
                }
                last = format!("allocator: {}; follower: {}", info.allocator_error, info.follower_error);
            }
            Err(status) => status.message().clone_into(&mut last),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("the daemons are not ready after {limit:?}: {last}")
}

/// Asks a child to end, and ends it when it has not after this long.
pub fn end(child: &mut Child, limit: Duration) {
    let _ = signal(child.id(), Signal::TERM);
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// A directory that is not below the system's temporary directory, where codex refuses to work.
pub fn scratch_dir(prefix: &str) -> anyhow::Result<TempDir> {
    let base = target_dir()?.join("tmp");
    fs::create_dir_all(&base)?;
    Ok(tempfile::Builder::new().prefix(prefix).tempdir_in(base)?)
}

/// A program of this workspace that was built beside the one that runs.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe()?;
    let found = me.ancestors().skip(1).take(3).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built: run cargo build --workspace --bins"))
}

fn target_dir() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe()?;
    let found = me.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    found.map(Path::to_owned).context("not run from a cargo target directory")
}

/// Sends a signal to a process that this program started.
pub fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Every living process whose environment names this state directory.
pub fn processes_of(state: &Path) -> Vec<u32> {
    let mut wanted = b"DROVER_STATE_DIR=".to_vec();
    wanted.extend_from_slice(state.as_os_str().as_bytes());
    let me = std::process::id();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != me && process::of(pid).is_some())
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == wanted)
        })
        .collect()
}

pub(crate) fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
