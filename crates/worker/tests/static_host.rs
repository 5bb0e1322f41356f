//! The worker of a static host from outside: the test plays its supervisor and the allocator.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]
#![expect(clippy::print_stderr, reason = "a failed test shows the worker's log")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use drover_mailbox::{Cursor, Line, Mailbox, Record, StreamReader, StreamWriter, decode_line, encode_line, lines};
use drover_proto::worker::worker_service_client::WorkerServiceClient;
use drover_proto::worker::{DrainRequest, GetStatusRequest};
use drover_service::{StateDir, address_book};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host, its supervisor and the allocator's side of its files.
struct Host {
    dir: tempfile::TempDir,
    mailbox: Mailbox,
    config: Value,
    child: Option<Child>,
    inbox_seq: u64,
    revision: u64,
}

impl Host {
    fn new(worker: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = json!({ "hosts": ["n1", "n2"], "workspace_root": dir.path().join("shared") });
        let config = json!({ "worker": worker, "cluster": cluster });
        let mailbox = Mailbox::new(dir.path().join("shared/mailbox"));
        fs::create_dir_all(mailbox.root()).unwrap();
        Self { dir, mailbox, config, child: None, inbox_seq: 0, revision: 0 }
    }

    fn command(&self, host: &str) -> Command {
        let config = self.dir.path().join("drover.json");
        fs::write(&config, self.config.to_string()).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_file()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-worker"));
        command
            .args(["--static", "--host", host, "--listen", "127.0.0.1:0", "--config"])
            .arg(config)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.dir.path())
            .env("DROVER_STATE_DIR", self.state_dir())
            .stdin(Stdio::null())
            .stderr(log);
        command
    }

    fn start(&mut self) {
        self.child = Some(self.command("n1").spawn().unwrap());
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("worker.log")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap()
    }

    fn signal(&mut self, signal: Signal) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        kill_process(Pid::from_raw(child.id().cast_signed()).unwrap(), signal).unwrap();
        until("the worker ends", || child.try_wait().unwrap())
    }

    fn write_assignment(&mut self, text: &str) {
        let dir = self.mailbox.root().join("static");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(".n1.new"), text).unwrap();
        fs::rename(dir.join(".n1.new"), dir.join("n1.json")).unwrap();
    }

    #[expect(clippy::needless_pass_by_value, reason = "callers write the order in place")]
    fn assign(&mut self, swarm: &str, release: Value) {
        self.revision += 1;
        let assignment = json!({
            "swarm_id": swarm, "node_id": 1, "job_id": format!("static-{swarm}"), "agent": "echo",
            "settings": {"drain_grace": "60s"}, "release": release,
        });
        let text = json!({ "v": 1, "host": "n1", "revision": self.revision, "assignment": assignment }).to_string();
        self.write_assignment(&text);
    }

    fn inject(&mut self, swarm: &str, injection: &str, content: &str) {
        self.inbox_seq += 1;
        let data = to_raw_value(&json!({ "content": content, "steer": false })).unwrap();
        let record = Record {
            seq: self.inbox_seq,
            ts: 1,
            job_id: "j".into(),
            node_id: 1,
            generation: 0,
            injection_id: Some(injection.into()),
            trace: None,
            kind: "inject".into(),
            data: &data,
        };
        let mut line = Vec::new();
        encode_line(&record, &mut line);
        let swarm: SwarmId = swarm.parse().unwrap();
        let mut inbox = StreamWriter::open(self.mailbox.inbox_dir(&swarm, NodeIndex(1)), 1 << 20).unwrap();
        inbox.append(&line).unwrap();
    }

    /// Data of the first record of this kind in a generation's outbox.
    fn record(&self, swarm: &str, generation: u32, kind: &str, injection: Option<&str>) -> Value {
        let id = OutboxId { swarm: swarm.parse().unwrap(), node: NodeIndex(1), generation: Generation(generation) };
        until(&format!("{kind} of {swarm}, generation {generation}"), || {
            let mut reader = StreamReader::new(self.mailbox.outbox_dir(&id), Cursor::default());
            while let Ok(Some(chunk)) = reader.next_chunk(1 << 20) {
                for line in lines(&chunk.lines) {
                    if let Ok(Line::Record(record)) = decode_line(line)
                        && record.kind == kind
                        && record.injection_id.as_deref() == injection
                    {
                        return Some(serde_json::from_str(record.data.get()).unwrap());
                    }
                }
            }
            None
        })
    }

    /// Waits until the worker says that it acted upon the present assignment and serves this.
    fn says(&self, serving: &Value) {
        until(&format!("the worker's word on revision {}: {serving}", self.revision), || {
            let text = fs::read(self.mailbox.root().join("static/workers/n1.json")).ok()?;
            let said: Value = serde_json::from_slice(&text).unwrap();
            (said["revision"] == self.revision && said["serving"] == *serving).then_some(())
        });
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log\n{}", self.log());
        }
    }
}

fn node_dir(host: &Host, swarm: &str) -> PathBuf {
    host.state_dir().join("nodes").join(swarm).join("01")
}

fn ledger(dir: &Path) -> usize {
    fs::read_to_string(dir.join(drover_worker::LEDGER)).unwrap_or_default().lines().count()
}

#[test]
fn a_host_serves_one_assignment_after_another_and_survives_its_own_death() {
    let mut host = Host::new(&json!({"drain_grace": "0s"}));
    host.start();
    host.says(&Value::Null);
    host.assign("s", Value::Null);
    host.says(&json!({"swarm_id": "s", "node_id": 1, "generation": 1}));
    let pid = host.child.as_ref().unwrap().id();
    assert_eq!(host.record("s", 1, "worker_hello", None)["pid"], pid);
    host.inject("s", "a", "hello");
    assert_eq!(host.record("s", 1, "assistant", Some("a"))["content"], "hello");
    assert_eq!(ledger(&node_dir(&host, "s")), 1);

    // Its supervisor starts it again: the next generation, nothing carried out twice.
    host.signal(Signal::KILL);
    host.start();
    host.says(&json!({"swarm_id": "s", "node_id": 1, "generation": 2}));
    host.inject("s", "b", "@echo delay=60s");
    host.record("s", 2, "turn_started", Some("b"));
    // The turn is announced before the agent sees the prompt.
    until("the second prompt in the ledger", || (ledger(&node_dir(&host, "s")) == 2).then_some(()));

    // The launch's own drain_grace holds until somebody loses patience.
    host.assign("s", json!({ "force": false }));
    let told = "released";
    until("the release is heard", || host.log().contains(told).then_some(()));
    host.assign("s", json!({ "force": true }));
    let mut end = host.record("s", 2, "turn_complete", Some("b"));
    assert!(end.as_object_mut().unwrap().remove("duration_ms").is_some());
    assert_eq!(end, json!({ "status": "interrupted" }));
    host.record("s", 2, "worker_bye", None);
    host.says(&Value::Null);

    // The same process takes the next one.
    let pid = host.child.as_ref().unwrap().id();
    host.inbox_seq = 0;
    host.assign("t", Value::Null);
    host.says(&json!({"swarm_id": "t", "node_id": 1, "generation": 1}));
    assert_eq!(host.record("t", 1, "worker_hello", None)["pid"], pid);
    host.inject("t", "a", "again");
    assert_eq!(host.record("t", 1, "assistant", Some("a"))["content"], "again");
    assert_eq!(host.signal(Signal::TERM).code(), Some(0));
    assert!(host.record("t", 1, "worker_bye", None)["reason"].as_str().unwrap().contains("signal"));

    // A host that was given away while its worker was down is not served.
    host.revision += 1;
    host.write_assignment(&json!({"v": 1, "host": "n1", "revision": host.revision, "assignment": null}).to_string());
    host.start();
    host.says(&Value::Null);
    assert_eq!(host.signal(Signal::TERM).code(), Some(0));
    assert_eq!(host.mailbox.generations(&"t".parse().unwrap(), NodeIndex(1)).unwrap(), [Generation(1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_stays_ended_and_its_failing_successor_is_given_up() {
    // The configuration has no codex, and the launch asks for nothing else.
    let mut host = Host::new(&json!({"restart_delay": "10ms", "max_restarts": 2, "codex_bin": "/nonexistent/codex"}));
    host.start();
    host.says(&Value::Null);
    let state = StateDir::open(&host.state_dir()).unwrap();
    let entry = until("the address", || address_book::read(&state, "worker-static-n1"));
    let mut client = WorkerServiceClient::connect(format!("http://{}", entry.listen)).await.unwrap();
    let status = client.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.state.as_str(), status.node), ("waiting", None));
    let refused = client.drain(DrainRequest::default()).await.unwrap_err();
    assert!(refused.message().contains("no node"), "{refused}");

    host.assign("s", Value::Null);
    host.says(&json!({"swarm_id": "s", "node_id": 1, "generation": 1}));
    host.record("s", 1, "worker_hello", None);
    client.drain(DrainRequest { reason: "maintenance".into() }).await.unwrap();
    assert_eq!(host.record("s", 1, "worker_bye", None), json!({ "reason": "maintenance" }));
    host.says(&Value::Null);
    assert_eq!(client.get_status(GetStatusRequest {}).await.unwrap().into_inner().state, "waiting");

    host.revision += 1;
    let assignment = json!({"swarm_id": "u", "node_id": 1, "job_id": "static-u", "agent": "codex"});
    let text = json!({"v": 1, "host": "n1", "revision": host.revision, "assignment": assignment}).to_string();
    host.write_assignment(&text);
    until("the node is given up", || host.log().contains("given up").then_some(()));
    assert_eq!(host.record("u", 3, "worker_error", None)["fatal"], true);
    host.says(&Value::Null);
    assert_eq!(host.mailbox.generations(&"u".parse().unwrap(), NodeIndex(1)).unwrap().len(), 3);
    assert_eq!(host.signal(Signal::TERM).code(), Some(0));
}

#[test]
fn whatever_is_wrong_is_named() {
    let mut host = Host::new(&json!({}));
    let refused = |command: &mut Command, code: i32| {
        let output = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        String::from_utf8(output.stderr).unwrap()
    };
    let told = refused(&mut host.command("n3"), 78);
    assert!(told.contains("n3") && told.contains("n1, n2") && told.contains("cluster.hosts"), "{told}");
    let told = refused(&mut host.command("../n1"), 2);
    assert!(told.contains("is no host name"), "{told}");
    let told = refused(host.command("n1").env("DROVER_MAILBOX", "/nonexistent/mailbox"), 1);
    assert!(told.contains("/nonexistent/mailbox") && told.contains("workspace_root"), "{told}");

    for (text, words) in [
        ("{\"v\":1,\"host\":\"n1\",", "is no assignment"),
        ("{\"v\":1,\"host\":\"n2\",\"revision\":1,\"assignment\":null}", "the assignment of host \"n2\""),
    ] {
        host.write_assignment(text);
        if host.child.is_none() {
            host.start();
        }
        let told = until("a complaint", || host.log().lines().find(|line| line.contains(words)).map(str::to_owned));
        assert!(told.contains("n1.json"), "{told}");
    }
    // With the file in order again, all is well.
    host.assign("s", Value::Null);
    host.says(&json!({"swarm_id": "s", "node_id": 1, "generation": 1}));

    let other = tempfile::tempdir().unwrap();
    let told = refused(host.command("n1").env("DROVER_STATE_DIR", other.path()), 1);
    let pid = host.child.as_ref().unwrap().id();
    assert!(told.contains("host n1 already has a worker") && told.contains(&format!("pid {pid}")), "{told}");
    assert!(refused(&mut host.command("n1"), 1).contains("already runs"));
}
