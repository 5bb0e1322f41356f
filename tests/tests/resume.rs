//! Whoever follows the event log sees each event once and in order: through kills of the router, after having been cut
//! off for reading too slowly, and over what retention has deleted.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_e2e::cli::json;
use drover_e2e::sure::must;
use drover_proto::failure_of;
use drover_proto::router::{Event, InjectRequest, WatchEventsRequest, WatchEventsResponse};
use drover_service::address_book;
use drover_testkit::cluster::{Cluster, RouterClient, signal};
use drover_testkit::emulate::{OneShot, run};
use drover_types::ErrorCode;
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tonic::Streaming;

const PATIENCE: Duration = Duration::from_secs(40);
const KILLS: usize = 20;
const NODES: u32 = 4;

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn launch(cluster: &Cluster, nodes: u32) -> String {
    let nodes = nodes.to_string();
    let launched = must(json(cluster, &["launch", "--nodes", &nodes, "--agent", "echo", "--detach", "--json"]));
    launched["swarm_id"].as_str().unwrap().to_owned()
}

async fn watch(
    router: &mut RouterClient,
    after_seq: u64,
    follow: bool,
) -> Result<Streaming<WatchEventsResponse>, tonic::Status> {
    router
        .watch_events(WatchEventsRequest { after_seq, follow, ..Default::default() })
        .await
        .map(tonic::Response::into_inner)
}

/// The log as it stands, and the first kept event when that is not the first after `after_seq`.
async fn log(cluster: &Cluster, after_seq: u64) -> (Vec<Event>, u64) {
    let mut stream = watch(&mut cluster.router(), after_seq, false).await.unwrap();
    let (mut events, mut first_kept) = (Vec::new(), 0);
    while let Some(batch) = stream.message().await.unwrap() {
        first_kept = first_kept.max(batch.first_kept_seq);
        events.extend(batch.events);
    }
    (events, first_kept)
}

/// Injects until it is accepted by a router that may die at any moment; the same request can be repeated.
async fn inject(cluster: &Cluster, request_id: &str, swarm: &str, content: &str) -> Result<(), tonic::Status> {
    let request = InjectRequest {
        request_id: request_id.to_owned(),
        swarm_id: swarm.to_owned(),
        content: content.to_owned(),
        ..Default::default()
    };
    let mut steps = cluster.router().inject(request).await?.into_inner();
    while steps.message().await?.is_some() {}
    Ok(())
}

// ---- kills ---------------------------------------------------------------------------------------------------------

/// Follows for ever, resuming behind the last event it has. Keeps everything.
async fn follow(mut router: RouterClient, seen: Arc<Mutex<Vec<Event>>>) {
    loop {
        let last = seen.lock().unwrap_or_else(PoisonError::into_inner).last().map_or(0, |event| event.seq);
        if let Ok(mut stream) = watch(&mut router, last, true).await {
            while let Ok(Some(batch)) = stream.message().await {
                assert_eq!(batch.first_kept_seq, 0, "nothing is forgotten here");
                seen.lock().unwrap_or_else(PoisonError::into_inner).extend(batch.events);
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_once_and_in_order_over_twenty_kills() {
    let cluster = must(Cluster::start("{}").await);
    let swarm = launch(&cluster, NODES);
    let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
    let count = || seen.lock().unwrap_or_else(PoisonError::into_inner).len();
    let over = AtomicBool::new(false);

    let prompts = async {
        let mut sent = 0;
        while !over.load(Ordering::Relaxed) {
            let (request, prompt) = (format!("load-{sent}"), format!("{sent}\n@echo deltas=120 size=200"));
            let deadline = Instant::now() + PATIENCE;
            while let Err(status) = inject(&cluster, &request, &swarm, &prompt).await {
                assert!(Instant::now() < deadline, "{status}\n{}", cluster.logs());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            sent += 1;
        }
        sent
    };
    let kills = async {
        for _ in 0..KILLS {
            // In the middle of things: events flow, and the subscriber gets them.
            let before = count();
            until("events", || count() > before + 50).await;
            let router = cluster.daemon("router").unwrap();
            signal(router.pid, Signal::KILL).unwrap();
            until("another router", || cluster.daemon("router").is_some_and(|now| now != router)).await;
        }
        over.store(true, Ordering::Relaxed);
    };
    let work = async {
        let (sent, ()) = tokio::join!(prompts, kills);
        let turns = sent * NODES as usize;
        let ended = |events: &[Event]| events.iter().filter(|event| event.event == "turn_complete").count();
        until("every turn has ended", || ended(&seen.lock().unwrap_or_else(PoisonError::into_inner)) >= turns).await;
        turns
    };
    let turns = tokio::select! {
        turns = work => turns,
        () = follow(cluster.router(), Arc::clone(&seen)) => unreachable!("it follows for ever"),
    };

    // What was given out is what is in the log: the same numbers, and the same event under each.
    let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    let (log, _) = log(&cluster, 0).await;
    assert!(seen.windows(2).all(|pair| pair[0].seq < pair[1].seq), "in order, each once");
    for (given, kept) in seen.iter().zip(&log) {
        assert_eq!(given, kept, "an event was given out that the log does not have");
    }
    assert!(log.len() >= seen.len());
    let times = |name: &str| log.iter().filter(|event| event.event == name).count();
    assert_eq!((times("inject_ack"), times("turn_started"), times("turn_complete")), (turns, turns, turns));
    assert_eq!(times("assistant_delta"), turns * 120, "no event of a worker is lost or doubled");
}

// ---- slow subscribers ----------------------------------------------------------------------------------------------

/// Whole lines of a stream of bytes.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// What the next read brings; `None` at the end of the connection.
    async fn read(&mut self, stream: &mut TcpStream) -> Option<Vec<Value>> {
        let mut buffer = vec![0; 256 << 10];
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.expect("something to read").unwrap();
        if read == 0 {
            assert!(self.rest.is_empty(), "the last line is whole: {}", String::from_utf8_lossy(&self.rest));
            return None;
        }
        self.rest.extend_from_slice(&buffer[..read]);
        let whole = self.rest.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let lines = self.rest[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let lines = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
        self.rest.drain(..whole);
        Some(lines)
    }
}

/// Reads lines to the end of the connection.
async fn read_lines(stream: &mut TcpStream) -> Vec<Value> {
    let (mut all, mut lines) = (Vec::new(), Lines::default());
    while let Some(more) = lines.read(stream).await {
        all.extend(more);
    }
    all
}

/// Reads lines until so many turns have ended; gives the numbers of the events.
async fn read_until_turns(stream: &mut TcpStream, turns: usize, ended: &AtomicUsize) -> Vec<u64> {
    let (mut seqs, mut lines) = (Vec::new(), Lines::default());
    while ended.load(Ordering::Relaxed) < turns {
        let more = lines.read(stream).await.expect("whoever reads is not cut off");
        seqs.extend(more.iter().filter_map(|line| line["seq"].as_u64()));
        ended.fetch_add(more.iter().filter(|line| line["event"] == "turn_complete").count(), Ordering::Relaxed);
    }
    seqs
}

/// Numbers without a gap.
fn contiguous(seqs: &[u64]) -> bool {
    seqs.windows(2).all(|pair| pair[0] + 1 == pair[1])
}

/// A counter of the router.
async fn counter(cluster: &Cluster, name: &str) -> u64 {
    let listen = address_book::read(cluster.state(), "router").unwrap().listen;
    let mut stream = TcpStream::connect(listen).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}: {text}"));
    line.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_too_slowly_is_told_where_to_resume_and_nobody_waits() {
    let cluster = must(Cluster::start("router: {subscriber_max_bytes: 2MiB}").await);
    let swarm = launch(&cluster, 2);
    let addr: SocketAddr = must(cluster.control_addr()).parse().unwrap();

    // Two that do not read, one of each kind, and two that do.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let mut lazy_lines = socket.connect(addr).await.unwrap();
    let mut eager_lines = TcpStream::connect(addr).await.unwrap();
    let begin = log(&cluster, 0).await.0.last().unwrap().seq;
    let mut lazy = watch(&mut cluster.router(), begin, true).await.unwrap();
    let live = tokio::time::timeout(PATIENCE, lazy.message()).await.unwrap().unwrap().unwrap();
    assert!(live.live, "it has the present before it stops reading");

    // All in all more than the kernel's buffers and the limit hold together. In each round less than the limit, and the
    // next when those who read have it: so whatever the speed of this machine, they are never behind by the limit.
    let (rounds, turns) = (12, 24);
    let (read, read_lines_of) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let flood = async {
        for round in 0..rounds {
            let prompt = "@echo deltas=400 size=2000";
            must(inject(&cluster, &format!("flood-{round}"), &swarm, prompt).await.map_err(Into::into));
            let wanted = 2 * (round + 1);
            until("the eager ones have this round", || {
                read.load(Ordering::Relaxed) >= wanted && read_lines_of.load(Ordering::Relaxed) >= wanted
            })
            .await;
        }
    };
    let eager = async {
        let mut stream = watch(&mut cluster.router(), begin, true).await.unwrap();
        let mut events: Vec<Event> = Vec::new();
        while read.load(Ordering::Relaxed) < turns {
            let batch = tokio::time::timeout(PATIENCE, stream.message()).await.expect("events flow").unwrap().unwrap();
            let ended = batch.events.iter().filter(|event| event.event == "turn_complete").count();
            events.extend(batch.events);
            read.fetch_add(ended, Ordering::Relaxed);
        }
        events
    };
    let polling = async {
        // While two subscribers stand still, questions are answered.
        let mut answered = 0;
        while counter(&cluster, "drover_control_slow_clients_total ").await == 0 {
            let list = run(addr, &mut OneShot::list(), PATIENCE).await.unwrap();
            assert_eq!(list.exit, Some(0));
            answered += 1;
        }
        // The one of lines reads on as soon as it is cut off: the last word is not kept for ever.
        (answered, read_lines(&mut lazy_lines).await)
    };
    let eager_reading = read_until_turns(&mut eager_lines, turns, &read_lines_of);
    let (events, (answered, lazy_lines), eager_lines, ()) = tokio::join!(eager, polling, eager_reading, flood);
    assert!(answered > 0);
    let last = events.last().unwrap().seq;
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert!(contiguous(&seqs) && seqs[0] == begin + 1, "the eager one has everything");
    assert!(contiguous(&eager_lines), "so has the eager one of lines");

    // The slow one of lines: everything up to a point, then why and where to go on, then the end.
    let (word, lines) = lazy_lines.split_last().unwrap();
    assert_eq!(word["event"], "subscription_ended", "{word}");
    let reason = word["data"]["reason"].as_str().unwrap();
    assert!(reason.contains("bytes"), "{reason}");
    let seqs: Vec<u64> = lines.iter().filter_map(|line| line["seq"].as_u64()).collect();
    assert!(contiguous(&seqs), "no gap before the cut");
    let resume = word["data"]["last_seq"].as_u64().unwrap();
    assert_eq!(Some(&resume), seqs.last(), "the word names the last event that was sent");
    assert!(resume < last, "it was cut off on the way");

    // The slow one of gRPC: the same.
    let mut seqs = Vec::new();
    let status = loop {
        match tokio::time::timeout(PATIENCE, lazy.message()).await.expect("a word on why") {
            Ok(Some(batch)) => seqs.extend(batch.events.iter().map(|event| event.seq)),
            Ok(None) => panic!("it ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(failure_of(&status).code, ErrorCode::SlowSubscriber, "{status}");
    let resume_grpc = *seqs.last().unwrap();
    assert!(contiguous(&seqs) && seqs[0] == begin + 1 && resume_grpc < last);
    assert!(status.message().contains(&format!("after_seq {resume_grpc}")), "{status}");

    // Both go on there and have everything once.
    for from in [resume, resume_grpc] {
        let rest: Vec<u64> = log(&cluster, from).await.0.iter().map(|event| event.seq).collect();
        assert!(contiguous(&rest) && rest[0] == from + 1 && *rest.last().unwrap() >= last);
    }
}

// ---- retention -----------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn old_events_go_and_their_numbers_never_come_back() {
    let mut cluster = must(Cluster::start("router: {keep_events: 300}").await);
    let swarm = launch(&cluster, 1);
    must(inject(&cluster, "first", &swarm, "@echo deltas=1000").await.map_err(Into::into));
    let mut highest = 0;
    until_log(&cluster, &mut highest, 1000).await;

    // Killed, so that nothing of its end is orderly. The next router deletes as it starts.
    kill_router(&cluster).await;
    let deadline = Instant::now() + PATIENCE;
    let (events, first_kept) = loop {
        let (events, first_kept) = log(&cluster, 0).await;
        if first_kept > 1 {
            break (events, first_kept);
        }
        assert!(Instant::now() < deadline, "nothing was deleted: {} events\n{}", events.len(), cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert!(contiguous(&seqs) && seqs[0] == first_kept, "from {first_kept}: {:?}", &seqs[..3]);
    assert!((300..600).contains(&seqs.len()), "{}", seqs.len());
    assert!(*seqs.last().unwrap() >= highest);

    // A subscriber that was away is told what it has missed, and goes on with what there is.
    let (rest, told) = log(&cluster, 10).await;
    assert_eq!((told, rest.first().map(|event| event.seq)), (first_kept, Some(first_kept)));
    let (rest, told) = log(&cluster, first_kept).await;
    assert_eq!((told, rest.first().map(|event| event.seq)), (0, Some(first_kept + 1)));
    // One that comes from another log is not given the wrong events.
    let refused = watch(&mut cluster.router(), highest + 1_000_000, true).await.unwrap_err();
    assert_eq!(failure_of(&refused).code, ErrorCode::InvalidRequest, "{refused}");

    // As few as can be kept, over several restarts in order and not: each event has a number that none had before.
    must(cluster.down());
    std::fs::write(cluster.dir().join("drover.yaml"), "router: {keep_events: 1}").unwrap();
    must(cluster.up().await);
    for round in 0..3 {
        until_log(&cluster, &mut highest, 1).await;
        let before = highest;
        must(inject(&cluster, &format!("again-{round}"), &swarm, "hello").await.map_err(Into::into));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (events, _) = log(&cluster, before).await;
            assert!(events.iter().all(|event| event.seq > before));
            if events.iter().any(|event| event.event == "turn_complete") {
                break;
            }
            assert!(Instant::now() < deadline, "{}", cluster.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        until_log(&cluster, &mut highest, 1).await;
        assert!(highest > before);
        if round == 1 {
            must(cluster.down());
            must(cluster.up().await);
        } else {
            kill_router(&cluster).await;
        }
    }
}

async fn kill_router(cluster: &Cluster) {
    let router = cluster.daemon("router").unwrap();
    signal(router.pid, Signal::KILL).unwrap();
    until("another router", || cluster.daemon("router").is_some_and(|now| now != router)).await;
    must(cluster.wait_ready(PATIENCE).await);
}

/// Waits until the log is so long; notes its highest number, which only grows.
async fn until_log(cluster: &Cluster, highest: &mut u64, events: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (log, _) = log(cluster, 0).await;
        if log.len() >= events {
            let last = log.last().unwrap().seq;
            assert!(last >= *highest, "{last} after {highest}");
            *highest = last;
            return;
        }
        assert!(Instant::now() < deadline, "{} events\n{}", log.len(), cluster.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
