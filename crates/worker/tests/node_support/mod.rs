//! A node seen from outside: its directories, the real program, and what it writes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stderr, reason = "a failed test shows the worker's log")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use drover_mailbox::{Cursor, Line, Mailbox, Record, StreamReader, StreamWriter, decode_line, encode_line, lines};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// A record of an outbox.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) generation: u32,
    pub(crate) seq: u64,
    pub(crate) injection: String,
    pub(crate) trace: Option<String>,
    pub(crate) kind: String,
    pub(crate) data: Value,
}

pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) mailbox: Mailbox,
    pub(crate) swarm: SwarmId,
    inbox: StreamWriter,
    seq: u64,
    pub(crate) generation: u32,
    pub(crate) child: Option<Child>,
    config: Value,
    /// Which agent runs.
    pub(crate) agent: &'static str,
}

impl Node {
    /// A node without a worker.
    pub(crate) fn new(config: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path().join("mailbox"));
        let swarm: SwarmId = "swarm-1".parse().unwrap();
        let inbox = StreamWriter::open(mailbox.inbox_dir(&swarm, NodeIndex(2)), 4096).unwrap();
        Self { dir, mailbox, swarm, inbox, seq: 0, generation: 0, child: None, config, agent: "echo" }
    }

    /// A node with a worker that is ready.
    pub(crate) fn up(config: Value) -> Self {
        let mut node = Self::new(config);
        node.start();
        node.wait_for("worker_hello", "");
        node
    }

    pub(crate) fn node_dir(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn command(&self, generation: u32) -> Command {
        let config = self.dir.path().join("drover.json");
        fs::write(&config, json!({ "worker": self.config }).to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-worker"));
        command
            .args(["--listen", "127.0.0.1:0", "--config"])
            .arg(config)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.dir.path())
            .env("DROVER_STATE_DIR", self.state_dir())
            .env("DROVER_SWARM_ID", self.swarm.as_str())
            .env("DROVER_NODE_ID", "2")
            .env("DROVER_GENERATION", generation.to_string())
            .env("DROVER_JOB_ID", "local-1")
            .env("DROVER_MAILBOX", self.mailbox.root())
            .env("DROVER_NODE_DIR", self.node_dir())
            .env("DROVER_AGENT", self.agent)
            .stdin(Stdio::null());
        command
    }

    /// Starts the next generation.
    pub(crate) fn start(&mut self) {
        self.generation += 1;
        let log = fs::File::create(self.dir.path().join(format!("worker-{}.log", self.generation))).unwrap();
        self.child = Some(self.command(self.generation).stderr(log).spawn().unwrap());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn kill_9(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        self.child.take().unwrap().wait().unwrap();
    }

    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.exit()
    }

    /// Waits for the worker's end.
    pub(crate) fn exit(&mut self) -> ExitStatus {
        let status = until("the worker ends", || self.child.as_mut().unwrap().try_wait().unwrap());
        self.child = None;
        status
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join(format!("worker-{}.log", self.generation))).unwrap()
    }

    /// Appends a record to the inbox, as the follower does.
    #[expect(clippy::needless_pass_by_value, reason = "callers write the data in place")]
    pub(crate) fn deliver(&mut self, kind: &str, injection: Option<&str>, data: Value) {
        self.seq += 1;
        self.append(self.seq, kind, injection, &data);
    }

    /// The same under a number of the caller's choice.
    pub(crate) fn append(&mut self, seq: u64, kind: &str, injection: Option<&str>, data: &Value) {
        let raw = to_raw_value(data).unwrap();
        let record = Record {
            seq,
            ts: 1,
            job_id: "local-1".into(),
            node_id: 2,
            generation: 0,
            injection_id: injection.map(Into::into),
            trace: injection.map(|id| format!("00-trace-of-{id}").into()),
            kind: kind.into(),
            data: &raw,
        };
        let mut line = Vec::new();
        encode_line(&record, &mut line);
        self.append_raw(&line);
    }

    pub(crate) fn append_raw(&mut self, line: &[u8]) {
        self.inbox.append(line).unwrap();
        self.inbox.sync().unwrap();
    }

    pub(crate) fn inject(&mut self, injection: &str, content: &str) {
        self.deliver("inject", Some(injection), json!({ "content": content, "steer": false }));
    }

    /// Every record of every generation so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for generation in self.mailbox.generations(&self.swarm, NodeIndex(2)).unwrap() {
            let id = OutboxId { swarm: self.swarm.clone(), node: NodeIndex(2), generation };
            let mut reader = StreamReader::new(self.mailbox.outbox_dir(&id), Cursor::default());
            while let Some(chunk) = reader.next_chunk(1 << 20).unwrap() {
                seen.extend(lines(&chunk.lines).map(|line| read(line, generation)));
            }
        }
        seen
    }

    /// The records of one injection.
    pub(crate) fn of(&self, injection: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.injection == injection).collect()
    }

    /// Their names, runs of the same one only once.
    pub(crate) fn kinds(&self, injection: &str) -> Vec<String> {
        let mut kinds: Vec<String> = self.of(injection).into_iter().map(|seen| seen.kind).collect();
        kinds.dedup();
        kinds
    }

    /// Waits for a record of this kind and injection ("" for none) of the present generation.
    pub(crate) fn wait_for(&self, kind: &str, injection: &str) -> Seen {
        let fits = |seen: &Seen| seen.kind == kind && seen.injection == injection && seen.generation == self.generation;
        until(&format!("{kind} of {injection:?}"), || self.seen().into_iter().find(fits))
    }

    /// Waits for the end of a turn, in any generation.
    /// The end of a prompt, but for how long its turn took.
    pub(crate) fn wait_end(&self, injection: &str) -> Value {
        let mut end = until(&format!("end of {injection}"), || {
            self.of(injection).into_iter().find(|seen| seen.kind == "turn_complete").map(|seen| seen.data)
        });
        // Told for turns that ran and ended here, so not in every end.
        if let Some(took) = end.as_object_mut().and_then(|end| end.remove("duration_ms")) {
            assert!(took.as_u64().is_some_and(|ms| ms < 120_000), "{took}");
        }
        end
    }

    /// Injections in the agent's own ledger, in order.
    pub(crate) fn ledger(&self) -> Vec<String> {
        let text = fs::read_to_string(self.node_dir().join(drover_worker::LEDGER)).unwrap_or_default();
        let id = |line| serde_json::from_str::<Value>(line).unwrap()["injection_id"].as_str().unwrap().to_owned();
        text.lines().map(id).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of generation {}\n{}", self.generation, self.log());
        }
    }
}

fn read(line: &[u8], generation: Generation) -> Seen {
    let Ok(Line::Record(record)) = decode_line(line) else { panic!("{:?}", String::from_utf8_lossy(line)) };
    assert_eq!((record.job_id.as_ref(), record.node_id, record.generation), ("local-1", 2, generation.0));
    Seen {
        generation: generation.0,
        seq: record.seq,
        injection: record.injection_id.as_deref().unwrap_or_default().to_owned(),
        trace: record.trace.as_deref().map(str::to_owned),
        kind: record.kind.into_owned(),
        data: serde_json::from_str(record.data.get()).unwrap(),
    }
}

/// Asks again and again until there is an answer.
pub(crate) fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).unwrap().mode() & 0o777
}
