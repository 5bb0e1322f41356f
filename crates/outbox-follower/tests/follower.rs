//! The follower from outside: over gRPC where a connection matters, else through the same streams without one.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use drover_config::Config;
use drover_mailbox::{Cursor, Mailbox, Owner, StreamReader, StreamWriter, lines};
use drover_outbox_follower::{Follower, FollowerArgs, Settings};
use drover_proto::common::{Cursor as PbCursor, NodeRef, OutboxRef};
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{
    DeliverRequest, Delivery, DeliveryResult, FollowFrom, FollowRequest, FollowResponse, RemoveSwarmRequest,
};
use drover_service::{Context, MAX_MESSAGE_BYTES, Server, Target};
use drover_types::{ErrorCode, Generation, NodeIndex, OutboxId, SwarmId};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

const PATIENCE: Duration = Duration::from_secs(30);
const NEVER: Duration = Duration::from_hours(1);

struct Rig {
    dir: TempDir,
    ctx: Context,
    follower: Follower,
    mailbox: Mailbox,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
    }
}

fn rig(change: impl FnOnce(&mut Settings)) -> Rig {
    rig_in(tempfile::tempdir().unwrap(), change)
}

fn rig_in(dir: TempDir, change: impl FnOnce(&mut Settings)) -> Rig {
    let ctx = Context::for_test("outbox-follower", &dir.path().join("state"));
    let root = dir.path().join("mailbox");
    let mut settings = Settings::new(
        &Config::default(),
        FollowerArgs { mailbox: Some(root.clone()), ..FollowerArgs::default() },
        ctx.state().path(),
    );
    // What is not told and not hot must not be found by chance.
    settings.cold_poll = NEVER;
    change(&mut settings);
    let follower = Follower::start(settings, &ctx).unwrap();
    Rig { dir, ctx, follower, mailbox: Mailbox::new(root) }
}

impl Rig {
    fn client(&self) -> MailboxServiceClient<Channel> {
        let listener = self.ctx.bind("test", None, "127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = Server::new(&self.ctx).grpc(self.follower.service()).serve(listener).unwrap();
        MailboxServiceClient::new(drover_service::connect(Target::Address(addr.to_string())))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn follow(&self) -> Following {
        let (requests, receiver) = mpsc::channel(16);
        let responses = self.follower.follow_requests(ReceiverStream::new(receiver).map(Ok));
        Following { requests, responses }
    }

    fn writer(&self, id: &OutboxId, segment_bytes: u64) -> StreamWriter {
        let owner = Owner { host: "h".to_owned(), pid: 1, start_time: 1 };
        self.mailbox.claim(id, &owner).unwrap();
        StreamWriter::open(self.mailbox.outbox_dir(id), segment_bytes).unwrap()
    }

    fn inbox(&self, node: u32) -> Vec<String> {
        read_all(&self.mailbox.inbox_dir(&swarm(), NodeIndex(node)))
    }
}

/// Both ends of a Follow stream.
struct Following {
    requests: mpsc::Sender<FollowRequest>,
    responses: BoxStream<'static, Result<FollowResponse, Status>>,
}

impl Following {
    async fn ask(&self, request: FollowRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> FollowResponse {
        next(&mut self.responses).await.unwrap()
    }

    /// Reads until so many lines have come; checks that each response goes on where the one before ended.
    async fn read(&mut self, count: usize) -> Vec<String> {
        let mut found = Vec::new();
        let mut positions = std::collections::HashMap::new();
        while found.len() < count {
            let response = self.next().await;
            let outbox = response.outbox.clone().unwrap();
            let here = (response.segment, response.start_offset);
            let next = (response.next_segment, response.next_offset);
            if let Some(before) = positions.insert((outbox.node_id, outbox.generation), next) {
                assert_eq!(before, here, "outbox {outbox:?}");
            }
            assert_eq!(response.damage, "");
            found.extend(lines(&response.lines).map(|line| String::from_utf8(line.to_vec()).unwrap()));
        }
        found
    }
}

async fn next<T>(stream: &mut (impl Stream<Item = Result<T, Status>> + Unpin)) -> Result<T, Status> {
    tokio::time::timeout(PATIENCE, stream.next()).await.expect("nothing came").expect("the stream ended")
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn swarm() -> SwarmId {
    "swarm-1".parse().unwrap()
}

fn outbox(node: u32) -> OutboxId {
    OutboxId { swarm: swarm(), node: NodeIndex(node), generation: Generation(1) }
}

fn outbox_ref(node: u32) -> OutboxRef {
    OutboxRef { swarm_id: swarm().to_string(), node_id: node, generation: 1 }
}

fn node_ref(node: u32) -> NodeRef {
    NodeRef { swarm_id: swarm().to_string(), node_id: node }
}

fn add(nodes: impl IntoIterator<Item = u32>) -> FollowRequest {
    let from = |node| FollowFrom { outbox: Some(outbox_ref(node)), cursor: None };
    FollowRequest { add: nodes.into_iter().map(from).collect(), ..FollowRequest::default() }
}

fn hot(nodes: impl IntoIterator<Item = u32>) -> FollowRequest {
    FollowRequest { hot: nodes.into_iter().map(node_ref).collect(), ..FollowRequest::default() }
}

fn delivery(node: u32, record: &str) -> Delivery {
    Delivery { node: Some(node_ref(node)), record: Bytes::copy_from_slice(record.as_bytes()) }
}

fn line(number: usize) -> String {
    format!("{{\"n\":{number}}}")
}

fn put(writer: &mut StreamWriter, number: usize) {
    writer.append(format!("{}\n", line(number)).as_bytes()).unwrap();
}

fn read_all(dir: &Path) -> Vec<String> {
    let mut reader = StreamReader::new(dir, Cursor::default());
    let mut found = Vec::new();
    while let Some(chunk) = reader.next_chunk(1 << 20).unwrap() {
        found.extend(lines(&chunk.lines).map(|line| String::from_utf8(line.to_vec()).unwrap()));
    }
    found
}

fn ok() -> DeliveryResult {
    DeliveryResult::default()
}

#[tokio::test(flavor = "multi_thread")]
async fn records_go_out_and_come_back_over_grpc() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    let deliveries = vec![delivery(0, "{\"a\":1}"), delivery(1, "{\"b\":1}"), delivery(0, "{\"a\":2}")];
    let results = client.deliver(DeliverRequest { deliveries }).await.unwrap().into_inner().results;
    assert_eq!(results, vec![ok(); 3]);
    assert_eq!(rig.inbox(0), ["{\"a\":1}", "{\"a\":2}"]);
    assert_eq!(rig.inbox(1), ["{\"b\":1}"]);

    let mut writer = rig.writer(&outbox(0), 1 << 20);
    put(&mut writer, 1);
    let (requests, receiver) = mpsc::channel(4);
    requests.send(add([0])).await.unwrap();
    let mut stream = client.follow(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let first = next(&mut stream).await.unwrap();
    assert_eq!(first.lines, format!("{}\n", line(1)));
    assert_eq!((first.segment, first.start_offset, first.next_segment, first.next_offset), (1, 0, 1, 8));
    put(&mut writer, 2);
    assert_eq!(next(&mut stream).await.unwrap().lines, format!("{}\n", line(2)));

    // The end of the daemon is said in the stream, so that the client knows it can resume.
    rig.ctx.shutdown().cancel();
    let status = next(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(drover_proto::failure_of(&status).code, ErrorCode::ShuttingDown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_reader_goes_on_at_its_cursor() {
    let first = rig(|_| {});
    let mut writer = first.writer(&outbox(0), 100);
    (0..50).for_each(|n| put(&mut writer, n));
    let mut following = first.follow();
    following.ask(add([0])).await;
    let (mut found, mut cursor) = (Vec::new(), PbCursor::default());
    while found.len() < 20 {
        let response = following.next().await;
        found.extend(lines(&response.lines).map(|line| String::from_utf8(line.to_vec()).unwrap()));
        cursor = PbCursor { segment: response.next_segment, offset: response.next_offset, seq: 0 };
    }
    // The follower dies with responses on their way; what the client took over is what counts.
    drop(following);
    first.ctx.shutdown().cancel();
    (50..60).for_each(|n| put(&mut writer, n));

    let second = Follower::start(
        Settings::new(
            &Config::default(),
            FollowerArgs { mailbox: Some(first.mailbox.root().to_owned()), ..FollowerArgs::default() },
            first.dir.path(),
        ),
        &Context::for_test("outbox-follower", &first.dir.path().join("other")),
    )
    .unwrap();
    let from = FollowFrom { outbox: Some(outbox_ref(0)), cursor: Some(cursor) };
    let request = FollowRequest { add: vec![from], ..FollowRequest::default() };
    let mut responses = second.follow_requests(futures::stream::iter([Ok(request)]));
    while found.len() < 60 {
        let response = next(&mut responses).await.unwrap();
        found.extend(lines(&response.lines).map(|line| String::from_utf8(line.to_vec()).unwrap()));
    }
    assert_eq!(found, (0..60).map(line).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_change_while_they_are_followed() {
    const LINES: usize = 5000;
    for watch in [true, false] {
        let rig = rig(|settings| {
            settings.watch = watch;
            settings.hot_poll = Duration::from_millis(1);
        });
        let mut following = rig.follow();
        following.ask(add([0])).await;
        following.ask(hot([0])).await;
        let mut writer = rig.writer(&outbox(0), 2000);
        let writing = std::thread::spawn(move || {
            for n in 0..LINES {
                put(&mut writer, n);
                if n % 100 == 0 {
                    std::thread::yield_now();
                }
            }
            writer.position().0
        });
        assert_eq!(following.read(LINES).await, (0..LINES).map(line).collect::<Vec<_>>());
        assert!(writing.join().unwrap() > 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_that_appears_later_is_seen_at_once() {
    for watch in [true, false] {
        let rig = rig(|settings| {
            settings.watch = watch;
            settings.hot_poll = Duration::from_millis(5);
        });
        let mut following = rig.follow();
        following.ask(add(0..20)).await;
        let follower = rig.follower.clone();
        wait_until("every outbox was looked for", || follower.metrics().looks_for("added") >= 20).await;
        // Neither the swarm's directory nor anything below it is there yet.
        assert!(!rig.mailbox.swarm_dir(&swarm()).exists());
        for n in 0..20 {
            put(&mut rig.writer(&outbox(n), 1 << 20), n as usize);
        }
        let mut found = following.read(20).await;
        found.sort_by_key(|line| (line.len(), line.clone()));
        assert_eq!(found, (0..20).map(line).collect::<Vec<_>>());
        if watch {
            assert_eq!(
                follower.metrics().looks_for("hot") + follower.metrics().looks_for("waiting"),
                0,
                "nothing is polled"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_word_from_the_system_only_hot_nodes_are_polled() {
    let rig = rig(|settings| {
        settings.watch = false;
        settings.hot_poll = Duration::from_millis(2);
    });
    let mut writers: Vec<_> = (0..2).map(|n| rig.writer(&outbox(n), 1 << 20)).collect();
    // Both have said hello: what has not is waited for.
    for writer in &mut writers {
        put(writer, 9);
    }
    let mut following = rig.follow();
    following.ask(add([0, 1])).await;
    following.ask(hot([0])).await;
    following.read(2).await;
    let metrics = rig.follower.metrics();
    wait_until("both were looked at, one of them again", || {
        metrics.looks_for("added") >= 2 && metrics.looks_for("hot") >= 1
    })
    .await;

    put(&mut writers[1], 1);
    put(&mut writers[0], 0);
    assert_eq!(following.read(1).await, [line(0)]);
    let before = metrics.looks_for("hot");
    wait_until("the hot one is looked at again and again", || metrics.looks_for("hot") >= before + 20).await;
    assert_eq!(metrics.looks_for("cold") + metrics.looks_for("waiting"), 0, "the cold one is left alone");
    assert_eq!(metrics.lines.get(), 3);

    // Hot when it was delivered to: then what it wrote before is seen, too.
    following.ask(hot([1])).await;
    assert_eq!(following.read(1).await, [line(1)]);
    let quiet = FollowRequest { cold: vec![node_ref(0), node_ref(1)], ..FollowRequest::default() };
    following.ask(quiet).await;
    wait_until("nothing of quiet nodes is held open", || metrics.open_files.get() == 0).await;
    let after = metrics.looks_for("hot");
    // Meanwhile another one comes and is served; the quiet ones are left alone.
    for n in 2..10 {
        put(&mut rig.writer(&outbox(n), 1 << 20), n as usize);
        following.ask(add([n])).await;
        following.read(1).await;
    }
    assert_eq!(metrics.looks_for("hot"), after);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_outboxes_need_few_files_and_rest_when_quiet() {
    const NODES: u32 = 1000;
    let rig = rig(|settings| settings.max_open = 32);
    // Without the claim, which syncs each directory.
    let open = |n| StreamWriter::open(rig.mailbox.outbox_dir(&outbox(n)), 1 << 20).unwrap();
    let mut writers: Vec<_> = (0..NODES).map(open).collect();
    let mut following = rig.follow();
    following.ask(add(0..NODES)).await;
    following.ask(hot(0..NODES)).await;
    let metrics = rig.follower.metrics().clone();
    for round in 0..3 {
        for (n, writer) in writers.iter_mut().enumerate() {
            put(writer, round * 1000 + n);
        }
        let mut found = following.read(NODES as usize).await;
        found.sort();
        found.dedup();
        assert_eq!(found.len(), NODES as usize, "round {round}");
        assert!(metrics.open_files.get() <= 32, "{} files are open", metrics.open_files.get());
    }
    assert_eq!(metrics.outboxes.get(), 1000);
    assert_eq!(metrics.looks_for("hot") + metrics.looks_for("waiting"), 0, "what is told of is not polled");
    following.ask(FollowRequest { remove: (0..NODES).map(outbox_ref).collect(), ..FollowRequest::default() }).await;
    wait_until("all are dropped", || metrics.outboxes.get() == 0 && metrics.open_files.get() == 0).await;
    assert_eq!(metrics.unread_bytes.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_holds_up_nobody_else() {
    const LINES: usize = 40_000;
    let rig = rig(|_| {});
    let mut writer = rig.writer(&outbox(0), 4 << 20);
    let pad = "x".repeat(280);
    let batch: String = (0..LINES).fold(String::new(), |text, n| text + &format!("{{\"n\":{n},\"pad\":\"{pad}\"}}\n"));
    for chunk in batch.as_bytes().chunk_by(|a, _| *a != b'\n').collect::<Vec<_>>().chunks(1000) {
        writer.append(&chunk.concat()).unwrap();
    }
    let total = batch.len() as u64;
    let stuck = rig.follow();
    stuck.ask(add([0])).await;
    let metrics = rig.follower.metrics().clone();
    wait_until("the first stream has read as much as may wait", || metrics.bytes.get() > 3 << 20).await;
    let mut reading = rig.follow();
    reading.ask(add([0])).await;
    let found = reading.read(LINES).await;
    assert!(found[LINES - 1].starts_with(&format!("{{\"n\":{},", LINES - 1)));
    let waiting = metrics.bytes.get() - total;
    assert!(waiting <= 5 << 20, "{waiting} bytes wait for a client that does not read, of {total}");
    // It can be ended all the same, and both leave nothing behind.
    drop(stuck);
    drop(reading);
    wait_until("both streams have ended", || metrics.streams.get() == 0 && metrics.outboxes.get() == 0).await;
    assert_eq!(metrics.open_files.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_backlog_does_not_hide_a_short_one() {
    let rig = rig(|_| {});
    let mut writer = rig.writer(&outbox(0), 64 << 20);
    let line = format!("\"{}\"\n", "x".repeat(10_000));
    writer.append(line.repeat(1000).as_bytes()).unwrap();
    put(&mut rig.writer(&outbox(1), 1 << 20), 1);
    let mut following = rig.follow();
    following.ask(add([0, 1])).await;
    let mut before = 0;
    while following.next().await.outbox.unwrap().node_id != 1 {
        before += 1;
    }
    assert!(before <= 2, "{before} responses of another outbox came first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_cursor_and_a_damaged_file_are_followed_all_the_same() {
    let rig = rig(|_| {});
    let mut writer = rig.writer(&outbox(0), 1 << 20);
    put(&mut writer, 1);
    let mut following = rig.follow();
    following.ask(add([0])).await;
    assert_eq!(following.read(1).await, [line(1)]);
    following.ask(add([0])).await;
    assert_eq!(following.next().await.lines, format!("{}\n", line(1)), "again from the beginning");

    // The worker is killed in the middle of a line, and its host cut the file short.
    let first = rig.mailbox.outbox_dir(&outbox(0)).join("00000001.jsonl");
    std::fs::OpenOptions::new().append(true).open(&first).unwrap().write_all(b"{\"torn").unwrap();
    let mut writer = StreamWriter::open(rig.mailbox.outbox_dir(&outbox(0)), 1 << 20).unwrap();
    put(&mut writer, 2);
    let mut damage = String::new();
    loop {
        let response = following.next().await;
        damage += &response.damage;
        if response.lines == format!("{}\n", line(2)) {
            assert_eq!(response.next_segment, 2);
            break;
        }
        assert_eq!(response.lines, "");
    }
    assert_eq!(damage, "segment 1 ends in a torn line of 6 bytes");
    assert_eq!(rig.follower.metrics().damage.get(), 1);
}

#[test]
fn a_runtime_that_ends_without_another_turn_takes_the_reading_threads_along() {
    let (ended, end) = std::sync::mpsc::channel();
    let _thread = std::thread::spawn(move || {
        // With one thread no task gets a turn behind the last step of the test itself.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let following = runtime.block_on(async {
            let rig = rig(|_| {});
            let mut writer = rig.writer(&outbox(0), 1 << 20);
            put(&mut writer, 1);
            let mut following = rig.follow();
            following.ask(add([0])).await;
            assert_eq!(following.read(1).await, [line(1)]);
            following
        });
        drop(runtime);
        drop(following);
        ended.send(()).unwrap();
    });
    end.recv_timeout(PATIENCE).expect("a thread that reads outboxes never ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_record_is_refused_and_nothing_overtakes_it() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    let bad_node = |swarm_id: &str| Delivery {
        node: Some(NodeRef { swarm_id: swarm_id.to_owned(), node_id: 0 }),
        record: Bytes::from_static(b"{}"),
    };
    let deliveries = vec![
        delivery(0, "{\"a\":1}\n{\"a\":2}"),
        delivery(0, "{\"a\":3}"),
        delivery(1, "[1]"),
        delivery(2, "{\"a\":"),
        bad_node("../../etc"),
        bad_node(""),
        Delivery { node: None, record: Bytes::from_static(b"{}") },
        Delivery { node: Some(node_ref(3)), record: Bytes::from_static(b"{\"a\":\"\xff\"}") },
        delivery(5, "{\"v\":1,\"rotate\":2}"),
        delivery(4, "{\"good\":true}"),
    ];
    let results = client.deliver(DeliverRequest { deliveries }).await.unwrap().into_inner().results;
    let expected = [
        "record is more than one line",
        "an earlier record of this node was not written",
        "record is not a JSON object",
        "record is not JSON",
        "swarm \"../../etc\"",
        "swarm \"\": empty",
        "no node was named",
        "record is not UTF-8",
        "cannot append to",
        "",
    ];
    for (result, expected) in results.iter().zip(expected) {
        assert!(result.error.starts_with(expected), "{result:?} / {expected}");
        assert_eq!(result.refused, !expected.is_empty());
    }
    assert_eq!(rig.inbox(4), ["{\"good\":true}"]);
    assert!(!rig.mailbox.node_dir(&swarm(), NodeIndex(0)).exists(), "refused before anything was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_that_cannot_be_written_is_refused_alone() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    // Something of another kind stands where the inbox should be.
    std::fs::create_dir_all(rig.mailbox.node_dir(&swarm(), NodeIndex(0))).unwrap();
    std::fs::write(rig.mailbox.inbox_dir(&swarm(), NodeIndex(0)), b"").unwrap();
    let request = || DeliverRequest {
        deliveries: vec![delivery(0, "{\"a\":1}"), delivery(0, "{\"a\":2}"), delivery(1, "{\"b\":1}")],
    };
    let results = client.deliver(request()).await.unwrap().into_inner().results;
    assert!(results[0].refused && results[0].error.contains("inbox"), "{results:?}");
    assert!(results[1].refused && results[1].error.starts_with("an earlier record"), "{results:?}");
    assert_eq!(results[2], ok());
    // When the reason is gone, the same call succeeds.
    std::fs::remove_file(rig.mailbox.inbox_dir(&swarm(), NodeIndex(0))).unwrap();
    assert_eq!(client.deliver(request()).await.unwrap().into_inner().results, vec![ok(); 3]);
    assert_eq!(rig.inbox(0), ["{\"a\":1}", "{\"a\":2}"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_inbox_line_is_never_added_to() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    let dir = rig.mailbox.inbox_dir(&swarm(), NodeIndex(0));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("00000001.jsonl"), b"{\"a\":1}\n{\"content\":\"rm -rf ").unwrap();
    let request = DeliverRequest { deliveries: vec![delivery(0, "{\"a\":2}")] };
    assert_eq!(client.deliver(request).await.unwrap().into_inner().results, [ok()]);
    assert_eq!(rig.inbox(0), ["{\"a\":1}", "{\"a\":2}"]);
    assert!(dir.join("00000002.jsonl").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_inboxes_are_written_and_synced_in_one_call() {
    const NODES: u32 = 1000;
    let rig = rig(|settings| settings.max_open = 64);
    let mut client = rig.client();
    for round in 0..2 {
        let deliveries = (0..NODES).map(|n| delivery(n, &line(round))).collect();
        let began = Instant::now();
        let results = client.deliver(DeliverRequest { deliveries }).await.unwrap().into_inner().results;
        println!("1,000 inboxes, round {round}: {:?}", began.elapsed());
        assert_eq!(results, vec![ok(); NODES as usize]);
        assert!(began.elapsed() < Duration::from_secs(10));
        assert!(rig.follower.metrics().open_files.get() <= 64);
    }
    for n in [0, 499, 999] {
        assert_eq!(rig.inbox(n), [line(0), line(1)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_node_that_is_followed_no_longer_is_held_open() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    let mut following = rig.follow();
    let mut writers: Vec<_> = (0..8).map(|n| rig.writer(&outbox(n), 1 << 20)).collect();
    following.ask(add(0..8)).await;
    following.ask(hot(0..8)).await;
    for writer in &mut writers {
        put(writer, 1);
    }
    following.read(8).await;
    client.deliver(DeliverRequest { deliveries: (0..8).map(|n| delivery(n, "{\"n\":1}")).collect() }).await.unwrap();
    let metrics = rig.follower.metrics();
    wait_until("every inbox and every hot outbox is open", || metrics.open_files.get() == 16).await;

    following.ask(FollowRequest { remove: (1..8).map(outbox_ref).collect(), ..FollowRequest::default() }).await;
    wait_until("those of the other node are left", || metrics.open_files.get() == 2).await;
    // A later prompt finds its way all the same.
    let again = DeliverRequest { deliveries: vec![delivery(3, "{\"n\":2}")] };
    assert_eq!(client.deliver(again).await.unwrap().into_inner().results, [ok()]);
    assert_eq!(rig.inbox(3), ["{\"n\":1}", "{\"n\":2}"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_swarm_is_gone_and_can_come_again() {
    let rig = rig(|_| {});
    let mut client = rig.client();
    put(&mut rig.writer(&outbox(0), 1 << 20), 1);
    let mut following = rig.follow();
    following.ask(add([0])).await;
    assert_eq!(following.read(1).await, [line(1)]);
    let deliver = || DeliverRequest { deliveries: vec![delivery(0, "{}")] };
    client.deliver(deliver()).await.unwrap();
    let remove = RemoveSwarmRequest { swarm_id: swarm().to_string() };
    assert!(client.remove_swarm(remove.clone()).await.unwrap().into_inner().removed);
    assert!(!rig.mailbox.swarm_dir(&swarm()).exists());
    assert!(!client.remove_swarm(remove).await.unwrap().into_inner().removed);
    let metrics = rig.follower.metrics().clone();
    wait_until("its outboxes are dropped", || metrics.outboxes.get() == 0 && metrics.open_files.get() == 0).await;

    let status = client.remove_swarm(RemoveSwarmRequest { swarm_id: "..".to_owned() }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    client.deliver(deliver()).await.unwrap();
    assert_eq!(rig.inbox(0), ["{}"]);
    put(&mut rig.writer(&outbox(0), 1 << 20), 2);
    following.ask(add([0])).await;
    assert_eq!(following.read(1).await, [line(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_that_was_removed_is_seen_when_it_comes_back() {
    let rig = rig(|_| {});
    put(&mut rig.writer(&outbox(0), 1 << 20), 1);
    let mut following = rig.follow();
    following.ask(add([0])).await;
    assert_eq!(following.read(1).await, [line(1)]);
    std::fs::remove_dir_all(rig.mailbox.swarm_dir(&swarm())).unwrap();
    let metrics = rig.follower.metrics().clone();
    wait_until("the removal is noticed", || metrics.looks_for("told") >= 1).await;
    let mut writer = rig.writer(&outbox(0), 1 << 20);
    put(&mut writer, 2);
    put(&mut writer, 3);
    while !following.next().await.lines.ends_with(format!("{}\n", line(3)).as_bytes()) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_makes_no_sense_ends_the_stream_with_a_reason() {
    let rig = rig(|_| {});
    let mut following = rig.follow();
    let outbox = OutboxRef { swarm_id: "a/../b".to_owned(), node_id: 0, generation: 1 };
    following.ask(FollowRequest { remove: vec![outbox], ..FollowRequest::default() }).await;
    let status = next(&mut following.responses).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("a/../b"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_an_idle_outbox_leaves_at_once() {
    let rig = rig(|_| {});
    let mut writer = rig.writer(&outbox(0), 1 << 20);
    let mut following = rig.follow();
    following.ask(add([0])).await;
    put(&mut writer, 0);
    following.read(1).await;
    let mut times = Vec::new();
    for n in 1..100 {
        tokio::time::sleep(Duration::from_millis(3)).await;
        let began = Instant::now();
        put(&mut writer, n);
        following.read(1).await;
        times.push(began.elapsed());
    }
    times.sort();
    println!("record to stream: median {:?}, worst {:?}", times[49], times[98]);
    assert!(times[49] < Duration::from_millis(50), "{:?}", times[49]);
}

/// When the system has no watches left, the rest is polled. The limit is that of a user namespace of a child's own.
#[tokio::test(flavor = "multi_thread")]
async fn outboxes_beyond_the_watch_limit_are_polled() {
    const INSIDE: &str = "DROVER_TEST_FEW_WATCHES";
    if std::env::var_os(INSIDE).is_some() {
        let rig = rig(|settings| settings.hot_poll = Duration::from_millis(2));
        let mut writers: Vec<_> = (0..20).map(|n| rig.writer(&outbox(n), 1 << 20)).collect();
        let mut following = rig.follow();
        following.ask(hot(0..20)).await;
        following.ask(add(0..20)).await;
        let metrics = rig.follower.metrics();
        wait_until("some are polled", || metrics.looks_for("added") >= 20 && metrics.looks_for("hot") > 0).await;
        for (n, writer) in writers.iter_mut().enumerate() {
            put(writer, n);
        }
        assert_eq!(following.read(20).await.len(), 20);
        assert!(metrics.looks_for("told") > 0, "some are watched");
        return;
    }
    let script = "echo 5 > /proc/sys/user/max_inotify_watches || exit 77; exec \"$@\"";
    let child = std::process::Command::new("unshare")
        .args(["-U", "-r", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "outboxes_beyond_the_watch_limit_are_polled", "--nocapture"])
        .env(INSIDE, "1")
        .output();
    match child {
        Ok(output) if output.status.code() != Some(77) && !output.stderr.starts_with(b"unshare:") => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
        }
        other => {
            assert!(
                std::env::var_os("CI").is_none(),
                "no user namespace, and with CI set nothing may be skipped: {other:?}"
            );
            eprintln!("not run: no user namespace to be had");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_nobody_uses_ends_by_itself() {
    let idle = Duration::from_millis(200);
    let config = drover_config::Config::from_text(
        "test.yaml",
        "follower: {end_when_idle: 200ms}",
        &std::collections::BTreeMap::new(),
    )
    .unwrap()
    .0;
    let configured = Settings::new(&config, FollowerArgs::default(), Path::new("/state")).end_when_idle;
    assert_eq!(configured, Some(idle));
    let flag = FollowerArgs { end_when_idle: Some("5m".parse().unwrap()), ..FollowerArgs::default() };
    assert_eq!(Settings::new(&config, flag, Path::new("/state")).end_when_idle, Some(Duration::from_mins(5)));
    let settings = Settings::new(&Config::default(), FollowerArgs::default(), Path::new("/state"));
    assert_eq!(settings.end_when_idle, None, "one beside a router stays");

    let rig = rig(|settings| settings.end_when_idle = Some(Duration::from_secs(2)));
    let following = rig.follow();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!rig.ctx.shutdown().is_cancelled(), "it is in use");
    drop(following);
    wait_until("its end", || rig.ctx.shutdown().is_cancelled()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_followers_goes_on_where_the_other_stopped() {
    // A cluster with two login hosts: whoever comes back may be sent to the other one.
    let rig = rig(|settings| settings.end_when_idle = Some(NEVER));
    let mut client = rig.client();
    let mut deliver = async |record: &str| {
        let request = DeliverRequest { deliveries: vec![delivery(0, record)] };
        client.deliver(request).await.unwrap().into_inner().results
    };
    let here = rig.follow();
    assert_eq!(deliver("{\"a\":1}").await, [ok()]);
    drop(here);
    let held = || rig.follower.metrics().open_files.get();
    wait_until("the inbox to be closed", || held() == 0).await;
    let mut other = StreamWriter::open(rig.mailbox.inbox_dir(&swarm(), NodeIndex(0)), 1 << 20).unwrap();
    other.append(b"{\"b\":2}\n").unwrap();
    drop(other);
    let _here = rig.follow();
    assert_eq!(deliver("{\"c\":3}").await, [ok()]);
    assert_eq!(rig.inbox(0), ["{\"a\":1}", "{\"b\":2}", "{\"c\":3}"]);
}
