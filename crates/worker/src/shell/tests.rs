//! The loop with a disk that can be full and with agents of its own.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use drover_mailbox::{Cursor, Line, decode_line};
use drover_types::{Generation, NodeIndex};
use serde_json::Value;

use super::*;
use crate::agent::Agent as _;
use crate::core::{History, Order, Place, Policy};
use crate::echo::EchoAgent;
use crate::inbox::InboxReader;
use crate::store::{KEEP_BYTES, Sink, Stamp};

fn node() -> OutboxId {
    OutboxId { swarm: "s".parse().unwrap(), node: NodeIndex(0), generation: Generation(1) }
}

/// A disk that can be full.
#[derive(Clone, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
    refused: Arc<AtomicU32>,
}

impl Disk {
    fn kinds(&self) -> Vec<String> {
        let bytes = self.bytes.lock().unwrap();
        let kind = |line| match decode_line(line) {
            Ok(Line::Record(record)) => {
                format!("{}({})", record.kind, record.injection_id.unwrap_or_default())
            }
            other => panic!("{other:?}"),
        };
        bytes.split_inclusive(|byte| *byte == b'\n').map(kind).collect()
    }

    async fn wait_for(&self, wanted: &str) {
        let found = async {
            while !self.kinds().iter().any(|kind| kind == wanted) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(10), found).await;
        assert!(waited.is_ok(), "waited in vain for {wanted} in {:?}", self.kinds());
    }
}

impl Sink for Disk {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.bytes.lock().unwrap().extend_from_slice(lines);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }

    fn position(&self) -> (u32, u64) {
        (1, 0)
    }
}

#[tokio::test]
async fn a_full_disk_stops_prompts_and_loses_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = drover_service::Context::for_test("worker", dir.path());
    let (outbox, journal) = (Disk::default(), Disk::default());
    let policy = Policy {
        auto_approve: false,
        approval_timeout: Duration::from_mins(1),
        drain_grace: Duration::from_mins(1),
        max_queue: 10,
        hello: serde_json::Map::new(),
    };
    let mut effects = Vec::new();
    let core = Core::start(policy, Cursor::default(), 0, History::default(), Vec::new(), &mut effects);
    let stamp = Stamp { job_id: "j".into(), node_id: 0, generation: 1 };
    let store = Store::new(outbox.clone(), journal.clone(), stamp, KEEP_BYTES);
    let (commands, commands_out) = mpsc::channel(4);
    let (events_in, events) = mpsc::channel(4);
    let (inbox_in, inbox) = mpsc::channel(4);
    let (_drains_in, drains) = mpsc::channel(1);
    let (status_in, _status) = watch::channel(Status::default());
    let (_reader, control) = InboxReader::new(dir.path().join("inbox"), Cursor::default());
    let metrics = Metrics::register(&ctx.registry());
    let shell = Shell::new(node(), (core, effects), store, commands, Arc::new(|| false), control, status_in, metrics);
    let agent = Box::new(EchoAgent::new(dir.path()));
    ctx.spawn("agent", async move { agent.run(commands_out, events_in).await });
    let shutdown = ctx.shutdown().clone();
    let (ended_in, mut ended) = mpsc::channel(1);
    let (_words_in, words) = mpsc::channel(1);
    let feeds = Feeds { events, inbox, drains, words, shutdown: shutdown.clone() };
    ctx.spawn("worker", async move {
        let _ = ended_in.send(shell.drive(feeds).await).await;
    });
    let inject = |seq: u64, name: &str, content: &str| {
        let place = |offset| Place { segment: 1, offset };
        let order = Order::Inject { content: content.into(), steer: false };
        let injection = Some(name.parse().unwrap());
        vec![Delivery { start: place(seq), end: place(seq + 1), seq, injection, trace: None, order }]
    };

    inbox_in.send(inject(1, "a", "@echo delay=100ms\nhello")).await.unwrap();
    outbox.wait_for("turn_started(a)").await;
    outbox.full.store(true, Ordering::Relaxed);
    inbox_in.send(inject(2, "b", "x")).await.unwrap();
    let refused = async {
        while outbox.refused.load(Ordering::Relaxed) < 3 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap();
    let ledger = || -> Vec<Value> {
        let text = std::fs::read_to_string(dir.path().join(crate::LEDGER)).unwrap();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["injection_id"].clone()).collect()
    };
    assert_eq!(ledger(), ["a"], "no prompt goes to the agent before its begin is on disk");
    assert!(!outbox.kinds().contains(&"turn_complete(a)".to_owned()));

    outbox.full.store(false, Ordering::Relaxed);
    outbox.wait_for("turn_complete(b)").await;
    let kinds = outbox.kinds();
    let at = |wanted: &str| kinds.iter().position(|kind| kind == wanted);
    assert!(at("turn_complete(a)") < at("turn_started(b)"), "{kinds:?}");
    assert_eq!(ledger(), ["a", "b"]);

    // With a disk that stays full, the end is bounded too, and says what is missing.
    outbox.full.store(true, Ordering::Relaxed);
    shutdown.cancel();
    let error = ended.recv().await.unwrap().unwrap_err().to_string();
    assert!(error.contains("could not be written"), "{error}");
}

/// An agent that neither ends its turn nor itself.
struct Deaf;

#[async_trait::async_trait]
impl crate::agent::Agent for Deaf {
    async fn run(self: Box<Self>, mut commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        let _ = events.send(AgentEvent::Ready { detail: Value::Null, pid: None }).await;
        while commands.recv().await.is_some() {}
        pending::<()>().await;
    }
}

/// Whoever kills workers waits longer than the worst end that is still in order: a turn that does not end, a disk that
/// stays full, an agent that does not go.
#[tokio::test]
async fn the_longest_end_is_over_before_anybody_kills() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = drover_service::Context::for_test("worker", dir.path());
    let config = WorkerConfig { drain_grace: "100ms".parse().unwrap(), ..WorkerConfig::default() };
    let policy = Policy {
        auto_approve: false,
        approval_timeout: Duration::from_mins(10),
        drain_grace: config.drain_grace.get(),
        max_queue: 10,
        hello: serde_json::Map::new(),
    };
    let (outbox, mut effects) = (Disk::default(), Vec::new());
    let core = Core::start(policy, Cursor::default(), 0, History::default(), Vec::new(), &mut effects);
    let stamp = Stamp { job_id: "j".into(), node_id: 0, generation: 1 };
    let store = Store::new(outbox.clone(), Disk::default(), stamp, KEEP_BYTES);
    let (commands, commands_out) = mpsc::channel(4);
    let (events_in, events) = mpsc::channel(4);
    let (inbox_in, inbox) = mpsc::channel(4);
    let (drains_in, drains) = mpsc::channel(1);
    let (status_in, _status) = watch::channel(Status::default());
    let (_reader, control) = InboxReader::new(dir.path().join("inbox"), Cursor::default());
    let metrics = Metrics::register(&ctx.registry());
    let shell = Shell::new(node(), (core, effects), store, commands, Arc::new(|| false), control, status_in, metrics);
    ctx.spawn("agent", async move { Box::new(Deaf).run(commands_out, events_in).await });
    let (ended_in, mut ended) = mpsc::channel(1);
    let (_words_in, words) = mpsc::channel(1);
    let feeds = Feeds { events, inbox, drains, words, shutdown: CancellationToken::new() };
    ctx.spawn("worker", async move {
        let _ = ended_in.send(shell.drive(feeds).await).await;
    });
    let place = |offset| Place { segment: 1, offset };
    let order = Order::Inject { content: "x".into(), steer: false };
    let injection = Some("a".parse().unwrap());
    inbox_in
        .send(vec![Delivery { start: place(0), end: place(1), seq: 1, injection, trace: None, order }])
        .await
        .unwrap();
    outbox.wait_for("turn_started(a)").await;

    outbox.full.store(true, Ordering::Relaxed);
    let began = Instant::now();
    drains_in.send(Drain { reason: "test".into(), force: false }).await.unwrap();
    ended.recv().await.unwrap().unwrap_err();
    let took = began.elapsed();
    assert!(took >= config.drain_grace.get() + WorkerConfig::INTERRUPT_GRACE + WorkerConfig::AGENT_STOP, "{took:?}");
    assert!(took <= config.longest_end() && config.longest_end() < config.kill_after(), "{took:?}");
}
