//! One running codex: its pipes, its end, and the processes that it started.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use super::home::{self, MARK};
use super::rpc::{Decoder, Faults, Message};
use super::stderr_log::StderrLog;
use super::{CodexSettings, PoolDoor};

/// How long each step of an orderly end may take before the next, harsher one.
const STEP: Duration = Duration::from_secs(2);
/// How long what codex wrote before it died may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// How long killed processes may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// What comes out of a running codex.
#[derive(Debug)]
pub(super) enum Output {
    /// It says something.
    Message(Message),
    /// It is gone.
    Exited(String),
}

/// A running codex. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pid: u32,
    stdin: Option<ChildStdin>,
    unsent: BytesMut,
    stdout: Option<ChildStdout>,
    decoder: Decoder,
    buffer: BytesMut,
    stderr: Option<ChildStderr>,
    stderr_buffer: BytesMut,
    log: StderrLog,
    ending: Option<(Step, Instant)>,
    exited: Option<(ExitStatus, Instant)>,
}

/// What comes next when codex does not end.
#[derive(Debug, Clone, Copy)]
enum Step {
    Terminate,
    Kill,
}

impl Process {
    /// Starts `codex app-server` in a process group of its own, so that a signal to the worker's terminal does not reach it.
    pub(super) fn spawn(settings: &CodexSettings) -> io::Result<Self> {
        let log = StderrLog::open(&settings.node_dir.join("codex.stderr.log"))?;
        let mut child = Command::new(&settings.bin)
            .args(["-c", "analytics.enabled=false"])
            .args(&settings.args)
            .args(settings.pool.iter().flat_map(PoolDoor::arguments))
            .arg("app-server")
            .current_dir(&settings.cwd)
            .env_clear()
            .envs(home::environment(settings))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self {
            pid: child.id().unwrap_or_default(),
            stdin: child.stdin.take(),
            unsent: BytesMut::new(),
            stdout: child.stdout.take(),
            decoder: Decoder::default(),
            buffer: BytesMut::with_capacity(64 * 1024),
            stderr: child.stderr.take(),
            stderr_buffer: BytesMut::with_capacity(4096),
            child,
            log,
            ending: None,
            exited: None,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Queues bytes for codex; they are written while `next` is awaited.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        if self.stdin.is_some() {
            self.unsent.extend_from_slice(bytes);
        }
    }

    /// Lines that could not be used so far.
    pub(super) fn faults(&self) -> Faults {
        self.decoder.faults()
    }

    /// Ends codex, in order or at once. `next` then gives `Exited`.
    pub(super) fn end(&mut self, hard: bool) {
        let step = if hard { Step::Kill } else { Step::Terminate };
        // Codex ends when its input ends.
        self.stdin = None;
        self.unsent.clear();
        let at = if hard { Instant::now() } else { Instant::now() + STEP };
        self.ending = Some((step, at));
    }

    /// Waits for the next thing that happens. Safe to drop at any point and to call again.
    pub(super) async fn next(&mut self) -> Output {
        loop {
            if let Some(message) = self.decoder.next_message() {
                return Output::Message(message);
            }
            if let Some((status, _)) = self.exited
                && self.stdout.is_none()
            {
                return Output::Exited(self.reason(status));
            }
            let drained_at = self.exited.map(|(_, at)| at);
            let step_at = self.ending.map(|(_, at)| at);
            tokio::select! {
                biased;
                read = read_some(&mut self.stdout, &mut self.buffer), if self.stdout.is_some() => {
                    if matches!(read, Ok(1..)) {
                        self.decoder.push(&self.buffer);
                        self.buffer.clear();
                    } else {
                        self.stdout = None;
                        self.decoder.finish();
                        // Without its output it is of no use, even if it lives on.
                        if self.ending.is_none() && self.exited.is_none() {
                            self.ending = Some((Step::Terminate, Instant::now() + LAST_WORDS));
                        }
                    }
                }
                read = read_some(&mut self.stderr, &mut self.stderr_buffer), if self.stderr.is_some() => {
                    if matches!(read, Ok(1..)) {
                        self.log.append(&self.stderr_buffer);
                        self.stderr_buffer.clear();
                    } else {
                        self.stderr = None;
                    }
                }
                written = write_some(&mut self.stdin, &self.unsent), if self.stdin.is_some() && !self.unsent.is_empty() => {
                    match written {
                        Ok(count) => self.unsent.advance(count),
                        // It no longer reads; its exit will say why.
                        Err(_) => self.stdin = None,
                    }
                }
                status = self.child.wait(), if self.exited.is_none() => {
                    let status = status.unwrap_or_default();
                    self.exited = Some((status, Instant::now() + LAST_WORDS));
                    self.stdin = None;
                }
                () = sleep_until(drained_at), if drained_at.is_some() => self.stdout = None,
                () = sleep_until(step_at), if step_at.is_some() && self.exited.is_none() => self.escalate(),
            }
        }
    }

    fn escalate(&mut self) {
        let Some((step, _)) = self.ending else { return };
        let signal = match step {
            Step::Terminate => Signal::TERM,
            Step::Kill => Signal::KILL,
        };
        self.ending = Some((Step::Kill, Instant::now() + STEP));
        if let Some(group) = pid_of(self.pid) {
            // Fails only when the group is gone, which is what is wanted.
            let _ = kill_process_group(group, signal);
        }
    }

    fn reason(&self, status: ExitStatus) -> String {
        match self.log.last_line() {
            Some(line) => format!("{status}, last words: {line}"),
            None => status.to_string(),
        }
    }
}

fn pid_of(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

async fn read_some<R: tokio::io::AsyncRead + Unpin>(from: &mut Option<R>, into: &mut BytesMut) -> io::Result<usize> {
    match from {
        Some(from) => from.read_buf(into).await,
        None => std::future::pending().await,
    }
}

async fn write_some(to: &mut Option<ChildStdin>, bytes: &[u8]) -> io::Result<usize> {
    match to {
        Some(to) => to.write(bytes).await,
        None => std::future::pending().await,
    }
}

pub(super) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// One process among all of this machine; the start time tells it from a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seen {
    pid: u32,
    start_time: u64,
}

/// The processes that belong to a node's agent: what codex has started, and what carries the node's mark although its
/// parents are gone.
#[derive(Debug, Default)]
pub(super) struct Family {
    /// Children of codex and, below each, everything that descends from it.
    branches: Vec<(Seen, Vec<Seen>)>,
    orphans: Vec<Seen>,
}

impl Family {
    /// Looks through `/proc`. Without codex's pid everything with the mark is an orphan.
    pub(super) fn look(codex: Option<u32>, mark: &OsString) -> Self {
        let all: Vec<(Seen, u32)> = processes();
        let children = |of: u32| all.iter().filter(move |(_, parent)| *parent == of).map(|(seen, _)| *seen);
        let mut family = Self::default();
        let mut known = BTreeSet::new();
        if let Some(codex) = codex {
            known.insert(codex);
            for child in children(codex) {
                let mut below = Vec::new();
                let mut todo = VecDeque::from([child]);
                while let Some(seen) = todo.pop_front() {
                    if known.insert(seen.pid) {
                        below.push(seen);
                        todo.extend(children(seen.pid));
                    }
                }
                family.branches.push((child, below));
            }
        }
        let own = std::process::id();
        let marked = all.iter().filter(|(seen, _)| seen.pid != own && !known.contains(&seen.pid));
        family.orphans = marked.filter(|(seen, _)| has_mark(seen.pid, mark)).map(|(seen, _)| *seen).collect();
        family
    }

    /// What has come since `before`. A branch that was there then is left alone with all that grows on it: it is a
    /// tool server of codex, not a command.
    pub(super) fn since(&self, before: &Self) -> Vec<Seen> {
        let old = |seen: &Seen| before.branches.iter().any(|(branch, _)| branch == seen);
        let mut new: Vec<Seen> =
            self.branches.iter().filter(|(branch, _)| !old(branch)).flat_map(|(_, below)| below.clone()).collect();
        let known: BTreeSet<Seen> =
            before.branches.iter().flat_map(|(_, below)| below).chain(&before.orphans).copied().collect();
        new.extend(self.orphans.iter().filter(|seen| !known.contains(seen)));
        new
    }
}

/// Kills these and nothing that took over their numbers.
pub(super) fn kill(all: &[Seen]) {
    for seen in all {
        if stat(seen.pid).is_some_and(|(now, _)| now == *seen)
            && let Some(pid) = pid_of(seen.pid)
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Kills everything that carries the mark and waits until it is gone; returns how many there were.
pub(super) async fn sweep(mark: &OsString) -> usize {
    let until = Instant::now() + KILL_LIMIT;
    let mut count = 0;
    loop {
        let left = Family::look(None, mark).orphans;
        count = count.max(left.len());
        if left.is_empty() || Instant::now() > until {
            return count;
        }
        kill(&left);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn processes() -> Vec<(Seen, u32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(stat).collect()
}

/// The process and its parent; none when it is gone or only waits to be collected.
fn stat(pid: u32) -> Option<(Seen, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and parentheses; what follows the last one may not.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let start_time = fields.nth(17)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some((Seen { pid, start_time }, parent))
}

fn has_mark(pid: u32, mark: &OsString) -> bool {
    let Ok(vars) = std::fs::read(Path::new("/proc").join(pid.to_string()).join("environ")) else { return false };
    vars.split(|&byte| byte == 0)
        .any(|var| var.strip_prefix(MARK.as_bytes()).and_then(|rest| rest.strip_prefix(b"=")) == Some(mark.as_bytes()))
}
