//! The membership daemon as a process: which program, with what environment, and how it ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use drover_service::process::{self, ProcessId};
use drover_service::{Context, LIFELINE, StateDir, address_book, programs};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::Instant;
use tracing::{info, warn};

use super::Plan;

/// The daemon, by its name among our programs.
const NAME: &str = "gossip-membership";
/// A log larger than this is put aside when the daemon starts; one older log is kept.
const LOG_BYTES: u64 = 4 << 20;
/// How much of a log's end is looked at for the reason of a failure.
const TAIL_BYTES: u64 = 2048;
/// How long the daemon of an earlier worker of this node may take to notice that it is alone, and to say good-bye.
const PREDECESSOR: Duration = Duration::from_secs(4);
/// The first pause between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A daemon that was started, and runs until it is found dead.
pub(crate) struct Running {
    child: Child,
    /// The kernel closes it with this process, and then the daemon ends.
    _line: Option<ChildStdin>,
}

impl Running {
    /// Starts it.
    pub(super) fn start(plan: &Plan, ctx: &Context, seeds: &[String]) -> Result<Self, String> {
        let program = programs::find(NAME)?;
        let log = open_log(&log_file(plan)).map_err(|error| format!("its log cannot be opened: {error}"))?;
        let mut command = Command::new(&program.path);
        command.args(&program.args).args(["--node-id", &plan.node_id()]);
        if let Some(dir) = &plan.identity {
            command.arg("--identity").arg(dir);
        }
        command
            .env("DROVER_SWARM_ID", plan.id.swarm.as_str())
            .env("DROVER_NODE_ID", plan.id.node.to_string())
            .env("DROVER_GENERATION", plan.id.generation.to_string())
            .env("DROVER_STATE_DIR", ctx.state().path())
            .env("DROVER_MEMBERSHIP_DIR", plan.node_dir.join("membership"))
            .env("DROVER_SEEDS", seeds.join(","))
            .env("DROVER_LABELS", plan.labels())
            .env("DROVER_CAPABILITIES", plan.capabilities());
        Self::spawn(command, ctx, log)
    }

    /// Starts a program that ends when this process does.
    pub(crate) fn spawn(mut command: Command, ctx: &Context, log: File) -> Result<Self, String> {
        command
            .env(LIFELINE, "stdin")
            // A signal from the terminal is for the worker, which ends the daemon in its turn.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(file) = ctx.config_file() {
            command.env("DROVER_CONFIG", file);
        }
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(|error| format!("{program}: {error}"))?;
        // Waiting for a child closes what it still holds of its input.
        let line = child.stdin.take();
        info!(pid = child.id(), program, "a daemon beside this worker started");
        Ok(Self { child, _line: line })
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Its process id, while it has one.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Asks it to say good-bye and end.
    pub(crate) fn ask_to_end(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // One that is gone already needs no word.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// Name of the node's daemon in the address book.
pub(super) fn instance(plan: &Plan) -> String {
    format!("{NAME}-{}+{}", plan.id.swarm, plan.id.node)
}

/// Waits until the daemon of an earlier worker of this node is gone, and ends it when it does not go by itself.
pub(crate) async fn after_predecessor(name: &str, state: &StateDir) {
    let deadline = Instant::now() + PREDECESSOR;
    let mut pause = LOOK_AGAIN;
    while let Some(entry) = address_book::read(state, name) {
        let there = ProcessId { pid: entry.pid, start_time: entry.start_time };
        if entry.host != process::hostname() {
            // A directory that several hosts share. Of two daemons of one name the others believe the later one.
            return;
        }
        if Instant::now() >= deadline {
            warn!(pid = there.pid, name, "the daemon of an earlier worker does not end by itself");
            if let Some(pid) = Pid::from_raw(there.pid.cast_signed()).filter(|_| process::is_alive(&there)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_AGAIN * 10);
    }
}

pub(super) fn log_file(plan: &Plan) -> PathBuf {
    plan.node_dir.join("membership.log")
}

pub(crate) fn open_log(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_BYTES) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Why it ended, in its own last words when there are any.
pub(crate) fn why(log: &Path, status: &io::Result<ExitStatus>) -> String {
    let how = match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("its end cannot be learnt: {error}"),
    };
    match last_line(log) {
        Some(line) => format!("{how}; its log ends: {line}"),
        None => how,
    }
}

fn last_line(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.chars().filter(|c| !c.is_control()).collect())
}
