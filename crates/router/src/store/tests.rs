//! The writer on disks that fill up, turn read-only or come back, and what subscribers see of it.

use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drover_mailbox::{Record, encode_line};
use drover_proto::allocator::{AllocationState, WorkerState};
use drover_proto::common::{LaunchSpec, OutboxRef};
use drover_proto::mailbox::FollowResponse;
use drover_proto::router as pb;
use drover_proto::router::router_service_server::RouterService as _;
use drover_service::{Context, now_us};
use drover_types::{ErrorCode, NodeIndex, SwarmId};
use futures::StreamExt as _;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, mpsc};
use tonic::Request;

use super::Past;
use super::queue::{Command, StoreHandle};
use super::schema::{Place, Sharing};
use super::writer::{Orders, Retention, StoreSettings, Writer};
use crate::core::effects::Out;
use crate::core::input::{AllocatedNode, Allocation, Input};
use crate::core::model::Settings;
use crate::grpc::Service;
use crate::metrics::Metrics;
use crate::registry::Shared;
use crate::shell::Decoder;

/// Notes what leaves the router.
#[derive(Clone, Default)]
struct Noted {
    out: Arc<Mutex<Vec<Out>>>,
    asked_again: Arc<Mutex<u32>>,
}

impl Orders for Noted {
    fn perform(&mut self, out: Out) {
        self.out.lock().unwrap().push(out);
    }
    fn ask_allocations_again(&mut self) {
        *self.asked_again.lock().unwrap() += 1;
    }
}

/// A router without its shell: this test plays the other daemons.
struct Rig {
    dir: PathBuf,
    place: Place,
    store: StoreHandle,
    shared: Arc<Shared>,
    service: Service,
    noted: Noted,
    thread: Option<std::thread::JoinHandle<()>>,
    /// What the worker of node 0 has written.
    outbox: Vec<u8>,
    records: u64,
}

fn settings(place: &Place) -> StoreSettings {
    StoreSettings {
        place: place.clone(),
        core: Settings {
            default_agent: "echo".into(),
            soft_timeout: 1 << 40,
            hard_timeout: 1 << 40,
            graceful: 1_000_000,
            keep_ended: 1 << 40,
        },
        keep: Retention { age: 1 << 50, count: 1 << 40 },
        ring_bytes: 64 << 10,
    }
}

impl Rig {
    fn at(dir: &Path, max_pages: u32, change: impl FnOnce(&mut StoreSettings)) -> Self {
        let place = Place { path: dir.join("router.sqlite"), sharing: Sharing::Wal, max_pages: Arc::default() };
        place.max_pages.store(max_pages, Ordering::Relaxed);
        Self::open(dir, place, change)
    }

    fn open(dir: &Path, place: Place, change: impl FnOnce(&mut StoreSettings)) -> Self {
        let mut settings = settings(&place);
        change(&mut settings);
        let (store, commands) = StoreHandle::new();
        let noted = Noted::default();
        let metrics = Metrics::default();
        let (writer, shared) = Writer::open(settings, noted.clone(), metrics.clone(), now_us).unwrap();
        let thread = std::thread::spawn(move || writer.run(commands));
        let ctx = Context::for_test("router", &dir.join("state"));
        let service = Service {
            ring: crate::shell::RingFile::new(ctx.state()),
            shared: Arc::clone(&shared),
            store: store.clone(),
            past: Past::new(&place, &store),
            metrics,
            subscriber_max_bytes: 1 << 30,
            allocator: ctx.channel("slurm-allocator"),
            providers: arc_swap::ArcSwap::default(),
            ctx,
        };
        let dir = dir.to_owned();
        Self { dir, place, store, shared, service, noted, thread: Some(thread), outbox: Vec::new(), records: 0 }
    }

    async fn stop(&mut self) {
        self.store.tell(Command::Stop).await;
        self.thread.take().unwrap().join().unwrap();
    }

    /// Ends and begins again with the same files.
    async fn restart(mut self, change: impl FnOnce(&mut StoreSettings)) -> Self {
        self.stop().await;
        let (outbox, records) = (std::mem::take(&mut self.outbox), self.records);
        let mut next = Self::open(&self.dir.clone(), self.place.clone(), change);
        (next.outbox, next.records) = (outbox, records);
        next.happen(Input::FollowerUp("".into())).await;
        next
    }

    async fn happen(&self, input: Input) {
        self.store.tell(Command::Happened(input)).await;
    }

    /// A swarm of one node that is up.
    async fn running(&mut self) -> SwarmId {
        self.happen(Input::FollowerUp("".into())).await;
        self.happen(Input::AllocatorSnapshot { begun_at: now_us(), allocations: Vec::new() }).await;
        let spec = LaunchSpec { node_count: 1, ..LaunchSpec::default() };
        let request = pb::LaunchSwarmRequest { request_id: "launch".into(), spec: Some(spec), ..Default::default() };
        let mut steps = self.service.launch_swarm(Request::new(request)).await.unwrap().into_inner();
        let Some(Ok(first)) = steps.next().await else { panic!("no first step") };
        let Some(pb::launch_swarm_response::Step::Progress(progress)) = first.step else { panic!("{first:?}") };
        let swarm: SwarmId = progress.swarm_id.parse().unwrap();
        let node = AllocatedNode {
            index: NodeIndex(0),
            host: "here".into(),
            generation: 1,
            state: WorkerState::Running,
            reason: String::new(),
            pid: 1,
            restarts: 0,
        };
        let allocation = Allocation {
            swarm: swarm.clone(),
            job: "job-1".into(),
            state: AllocationState::Running,
            backend_state: "RUNNING".into(),
            reason: String::new(),
            backend: "local".into(),
            provider: "here".into(),
            follower: String::new(),
            nodes: vec![node],
        };
        self.happen(Input::Ensured(swarm.clone(), Ok(allocation))).await;
        self.says("worker_hello", None, "{}");
        self.ship(&swarm, 0).await;
        let Some(Ok(last)) = steps.next().await else { panic!("no last step") };
        assert!(matches!(last.step, Some(pb::launch_swarm_response::Step::Launched(_))), "{last:?}");
        swarm
    }

    /// The worker of node 0 writes a record.
    fn says(&mut self, kind: &str, injection: Option<&str>, data: &str) {
        self.records += 1;
        let data = RawValue::from_string(data.to_owned()).unwrap();
        let record = Record {
            seq: self.records,
            ts: now_us(),
            job_id: "job-1".into(),
            node_id: 0,
            generation: 1,
            injection_id: injection.map(Into::into),
            trace: None,
            kind: kind.into(),
            data: &data,
        };
        encode_line(&record, &mut self.outbox);
    }

    /// The follower ships everything behind a place.
    async fn ship(&self, swarm: &SwarmId, from: u64) {
        let outbox = OutboxRef { swarm_id: swarm.to_string(), node_id: 0, generation: 1 };
        let response = FollowResponse {
            outbox: Some(outbox),
            segment: 1,
            start_offset: from,
            lines: self.outbox[from as usize..].to_vec().into(),
            next_segment: 1,
            next_offset: self.outbox.len() as u64,
            damage: String::new(),
        };
        let chunk = Decoder::new(Metrics::default()).chunk(response).unwrap();
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        self.store.tell(Command::Records(chunk, permit)).await;
    }

    async fn inject(&self, request_id: &str, swarm: &SwarmId, content: &str) -> Result<String, tonic::Status> {
        let request = pb::InjectRequest {
            request_id: request_id.into(),
            swarm_id: swarm.to_string(),
            content: content.into(),
            ..Default::default()
        };
        let mut steps = self.service.inject(Request::new(request)).await?.into_inner();
        Ok(steps.next().await.unwrap()?.injection_id)
    }

    async fn watch(&self, request: pb::WatchEventsRequest) -> Watching {
        Watching { stream: self.service.watch_events(Request::new(request)).await.unwrap().into_inner(), live: false }
    }

    /// Every event in the log, through the front door.
    async fn log(&self) -> Vec<pb::Event> {
        let mut watching = self.watch(pb::WatchEventsRequest::default()).await;
        let mut events = Vec::new();
        while let Some(message) = watching.stream.next().await {
            events.extend(message.unwrap().events);
        }
        events
    }

    /// Where the router last asked to follow node 0 from.
    fn asked_from(&self) -> Option<u64> {
        self.noted.out.lock().unwrap().iter().rev().find_map(|out| match out {
            Out::Follow(_, _, cursor) => Some(cursor.offset),
            _ => None,
        })
    }

    async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds(self) {
            assert!(Instant::now() < deadline, "never happened: {what}");
            self.happen(Input::Tick).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

struct Watching {
    stream: std::pin::Pin<Box<dyn futures::Stream<Item = Result<pb::WatchEventsResponse, tonic::Status>> + Send>>,
    live: bool,
}

impl Watching {
    /// The numbers of the next events, as many as asked for.
    async fn numbers(&mut self, count: usize) -> Vec<u64> {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            let message = self.stream.next().await.unwrap().unwrap();
            self.live |= message.live;
            numbers.extend(message.events.iter().map(|event| event.seq));
        }
        numbers
    }
}

fn failure(status: &tonic::Status) -> drover_types::Failure {
    drover_proto::failure_of(status)
}

fn check_file(place: &Place) {
    let conn = rusqlite::Connection::open(&place.path).unwrap();
    let verdict: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

/// The log has every number once, and says of every prompt that it was acknowledged what the callers were told.
fn check_log(events: &[pb::Event], told: &[String]) {
    assert!(events.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1), "numbers are not whole");
    let acknowledged: Vec<&str> =
        events.iter().filter(|event| event.event == "inject_ack").map(|event| event.injection_id.as_str()).collect();
    assert_eq!(acknowledged, told, "acknowledged in the log and told to callers");
}

/// Fills the disk by prompts until one is refused; returns the ids of those that were taken.
async fn fill(rig: &Rig, swarm: &SwarmId) -> (Vec<String>, String) {
    let mut told = Vec::new();
    for n in 0..200 {
        let request = format!("fill-{n}");
        match rig.inject(&request, swarm, &"x".repeat(100_000)).await {
            Ok(id) => told.push(id),
            Err(status) => {
                let failure = failure(&status);
                assert_eq!(failure.code, ErrorCode::StoreUnavailable, "{failure:?}");
                assert!(failure.hint.contains("make room"), "{failure:?}");
                return (told, request);
            }
        }
    }
    panic!("the disk never filled");
}

/// What must hold once room has been made: nothing that was promised is lost, nothing is there twice, all goes on.
async fn recovers(rig: &mut Rig, swarm: &SwarmId, mut told: Vec<String>, refused: &str) {
    rig.until("the store works again", |rig| rig.shared.store_error.load().is_empty()).await;
    assert_eq!(*rig.noted.asked_again.lock().unwrap(), 1, "what the allocator said meanwhile is asked for again");
    // The records that came while nothing could be written are asked for again, from where the log is.
    let from = rig.asked_from().unwrap();
    assert!(from < rig.outbox.len() as u64);
    rig.ship(swarm, from).await;
    told.push(rig.inject(refused, swarm, &"x".repeat(100_000)).await.unwrap());
    let events = rig.log().await;
    check_log(&events, &told);
    let deltas = events.iter().filter(|event| event.event == "assistant_delta").count();
    assert_eq!(deltas, 3, "each record once");
}

#[tokio::test]
async fn a_full_disk_is_said_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::at(dir.path(), 150, |_| {});
    let swarm = rig.running().await;
    rig.says("assistant_delta", None, r#"{"content":"before"}"#);
    let stored = rig.outbox.len() as u64;
    let hello = rig.asked_from().unwrap();
    rig.ship(&swarm, hello).await;
    rig.until("the first delta is stored", |rig| rig.shared.log.last() == 4).await;

    let (told, refused) = fill(&rig, &swarm).await;
    // Records that come now are dropped, and stay in their outbox.
    rig.says("assistant_delta", None, r#"{"content":"meanwhile"}"#);
    rig.says("assistant_delta", None, r#"{"content":"too"}"#);
    rig.ship(&swarm, stored).await;
    let info = rig.service.get_info(Request::new(pb::GetInfoRequest {})).await.unwrap().into_inner();
    assert!(info.store_error.contains("full"), "{info:?}");
    let listed = rig.service.list_swarms(Request::new(pb::ListSwarmsRequest {})).await.unwrap().into_inner();
    assert_eq!(listed.swarms[0].status, "running", "reading goes on");
    let why = pb::ExplainRequest { subject: swarm.to_string() };
    let why = rig.service.explain(Request::new(why)).await.unwrap().into_inner();
    assert!(why.because[0].contains("cannot write its event log"), "{why:?}");

    rig.place.max_pages.store(100_000, Ordering::Relaxed);
    recovers(&mut rig, &swarm, told, &refused).await;
    rig.stop().await;
    check_file(&rig.place);
}

/// A file system of its own, taken away with it.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        mount(path, options).then(|| Self(path.to_owned()))
    }
}

fn mount(path: &Path, options: &str) -> bool {
    Program::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).status().is_ok_and(|it| it.success())
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Program::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_disk_that_is_really_full_or_read_only_is_survived_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    // Only root can make a file system; the other test fills the database without one.
    let Some(_mounted) = Mounted::new(&path, "size=3m") else { return };
    let mut rig = Rig::at(&path, 0, |_| {});
    let swarm = rig.running().await;
    let (told, refused) = fill(&rig, &swarm).await;
    for content in ["a", "b", "c"] {
        rig.says("assistant_delta", None, &format!(r#"{{"content":"{content}"}}"#));
    }
    rig.ship(&swarm, rig.asked_from().unwrap()).await;
    assert!(mount(&path, "remount,size=300m"));
    recovers(&mut rig, &swarm, told.clone(), &refused).await;

    // SQLite keeps its files open, and a file system with files open for writing cannot be made read-only: begin anew.
    rig.stop().await;
    assert!(mount(&path, "remount,ro"));
    let refused = Writer::open(settings(&rig.place), Noted::default(), Metrics::default(), now_us).err().unwrap();
    assert!(refused.to_string().contains("router.sqlite"), "{refused}");
    assert!(mount(&path, "remount,rw"));
    let rig = Rig::open(&rig.dir.clone(), rig.place.clone(), |_| {});
    assert_eq!(rig.log().await.iter().filter(|event| event.event == "inject_ack").count(), told.len() + 1);
    check_file(&rig.place);
}

#[tokio::test]
async fn what_was_answered_is_on_disk_and_numbers_go_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::at(dir.path(), 0, |_| {});
    let swarm = rig.running().await;
    let mut told = Vec::new();
    for round in 0..3 {
        for n in 0..5 {
            told.push(rig.inject(&format!("r{round}-{n}"), &swarm, "x").await.unwrap());
            let conn = rusqlite::Connection::open(&rig.place.path).unwrap();
            let rows: u32 = conn.query_row("SELECT count(*) FROM injections", [], |row| row.get(0)).unwrap();
            assert_eq!(rows, told.len() as u32, "answered before it was on disk");
        }
        rig = rig.restart(|_| {}).await;
        let again = rig.inject(&format!("r{round}-0"), &swarm, "x").await.unwrap();
        assert_eq!(&again, &told[round * 5], "a repeated request is known after a restart");
        let status = rig.inject(&format!("r{round}-0"), &swarm, "y").await.unwrap_err();
        assert_eq!(failure(&status).code, ErrorCode::RequestReused);
    }
    check_log(&rig.log().await, &told);
    rig.stop().await;
}

#[tokio::test]
async fn old_events_go_and_their_numbers_do_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::at(dir.path(), 0, |_| {});
    let swarm = rig.running().await;
    for n in 0..50 {
        rig.inject(&format!("r{n}"), &swarm, "x").await.unwrap();
    }
    let last = rig.shared.log.last();
    let mut rig = rig.restart(|settings| settings.keep.count = 10).await;
    rig.until("old events are gone", |rig| rig.shared.log.first_kept() == last - 9).await;
    let mut watching = rig.watch(pb::WatchEventsRequest { after_seq: 3, ..Default::default() }).await;
    let first = watching.stream.next().await.unwrap().unwrap();
    assert_eq!((first.first_kept_seq, first.events[0].seq), (last - 9, last - 9), "a gap is said");
    let request = pb::WatchEventsRequest { after_seq: last - 5, ..Default::default() };
    let first = rig.watch(request).await.stream.next().await.unwrap().unwrap();
    assert_eq!((first.first_kept_seq, first.events[0].seq), (0, last - 4));

    rig = rig.restart(|settings| settings.keep.age = 0).await;
    rig.until("all but the last are gone", |rig| rig.shared.log.first_kept() == last).await;
    rig = rig.restart(|_| {}).await;
    rig.inject("next", &swarm, "x").await.unwrap();
    assert_eq!(rig.shared.log.last(), last + 1);
    rig.stop().await;
}

#[tokio::test]
async fn subscribers_see_each_event_once_wherever_they_begin() {
    let dir = tempfile::tempdir().unwrap();
    // Memory for a few hundred events: subscribers go back and forth between it and the file.
    let mut rig = Rig::at(dir.path(), 0, |_| {});
    let swarm = rig.running().await;
    let before = rig.shared.log.last();
    let (wanted, total) = (6000_u64, before + 6000);
    let follow = |after_seq| pb::WatchEventsRequest { after_seq, follow: true, ..Default::default() };
    let mut watching = Vec::new();
    for after in [0, 1, before] {
        watching.push((after, rig.watch(follow(after)).await));
    }
    let (mut live, swarm_only) = (rig.watch(pb::WatchEventsRequest { from_now: true, ..follow(0) }).await, {
        let named = pb::WatchEventsRequest { swarm_id: swarm.as_str()[..8].to_owned(), ..follow(0) };
        rig.watch(named).await
    });
    watching.push((0, swarm_only));
    let mark = live.stream.next().await.unwrap().unwrap();
    assert!(mark.live && mark.events.is_empty(), "the present is said even when nothing happens");
    watching.push((before, live));
    for round in 0..60 {
        let from = rig.outbox.len() as u64;
        for n in 0..100 {
            rig.says("assistant_delta", None, &format!(r#"{{"content":"{round}/{n}"}}"#));
        }
        rig.ship(&swarm, from).await;
    }
    let mut readers = tokio::task::JoinSet::new();
    for (after, mut watching) in watching {
        readers.spawn(async move {
            let numbers = watching.numbers((total - after) as usize).await;
            assert_eq!(numbers, (after + 1..=total).collect::<Vec<_>>());
        });
    }
    // One that reads a little and comes back where it stopped.
    let mut position = 0;
    while position < total {
        let numbers = rig.watch(follow(position)).await.numbers(1).await;
        assert_eq!(numbers[0], position + 1);
        position = *numbers.last().unwrap();
    }
    while let Some(read) = readers.join_next().await {
        read.unwrap();
    }
    assert_eq!(rig.log().await.len() as u64, total, "without follow it ends at the present");
    let beyond = pb::WatchEventsRequest { after_seq: total + wanted, ..Default::default() };
    let status = rig.service.watch_events(Request::new(beyond)).await.err().unwrap();
    assert_eq!(failure(&status).code, ErrorCode::InvalidRequest);
    rig.stop().await;
}

#[tokio::test]
async fn a_slow_subscriber_is_cut_off_and_told_where_to_resume() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::at(dir.path(), 0, |_| {});
    rig.service.subscriber_max_bytes = 50_000;
    let swarm = rig.running().await;
    let mut slow = rig.watch(pb::WatchEventsRequest { follow: true, ..Default::default() }).await;
    while !slow.live {
        slow.live = slow.stream.next().await.unwrap().unwrap().live;
    }
    let before = rig.shared.log.last();
    for _ in 0..10 {
        let from = rig.outbox.len() as u64;
        for _ in 0..100 {
            rig.says("assistant_delta", None, r#"{"content":"x"}"#);
        }
        rig.ship(&swarm, from).await;
    }
    rig.until("all is stored", |rig| rig.shared.log.last() == before + 1000).await;
    let status = slow.stream.next().await.unwrap().unwrap_err();
    let failure = failure(&status);
    assert_eq!(failure.code, ErrorCode::SlowSubscriber);
    assert!(failure.message.contains(&format!("after_seq {before}")), "{failure:?}");
    assert!(slow.stream.next().await.is_none());
    // Catching up from far behind is not slowness.
    let mut back = rig.watch(pb::WatchEventsRequest { after_seq: before, follow: true, ..Default::default() }).await;
    assert_eq!(back.numbers(1000).await.len(), 1000);
    rig.stop().await;
}

#[tokio::test]
async fn a_network_file_system_is_used_by_one_connection_only() {
    let dir = tempfile::tempdir().unwrap();
    let place =
        Place { path: dir.path().join("router.sqlite"), sharing: Sharing::Exclusive, max_pages: Arc::default() };
    let mut rig = Rig::open(dir.path(), place, |settings| settings.ring_bytes = 1000);
    let swarm = rig.running().await;
    for n in 0..50 {
        rig.inject(&format!("r{n}"), &swarm, "x").await.unwrap();
    }
    let events = rig.log().await;
    assert_eq!(events.len() as u64, rig.shared.log.last());
    let files: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("router.sqlite"))
        .collect();
    assert!(files.iter().all(|name| !name.ends_with("-shm") && !name.ends_with("-wal")), "{files:?}");
    rig.stop().await;
    check_file(&rig.place);
}

#[tokio::test]
async fn a_caller_that_does_not_read_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::at(dir.path(), 0, |_| {});
    rig.happen(Input::FollowerUp("".into())).await;
    let (steps, mut unread) = mpsc::channel(2);
    let order = crate::core::input::LaunchOrder {
        place: None,
        request_id: "slow".into(),
        spec: LaunchSpec { node_count: 1, ..LaunchSpec::default() },
        trace: String::new(),
        prior: None,
    };
    rig.store.tell(Command::Call(super::Call::Launch(Box::new(order), steps))).await;
    rig.until("the swarm is there", |rig| !rig.shared.registry.load().swarms.is_empty()).await;
    let swarm: SwarmId = rig.shared.registry.load().swarms.keys().next().unwrap().clone();
    for n in 0..1000 {
        let progress =
            Input::AllocatorProgress { swarm: swarm.clone(), stage: "starting".into(), message: n.to_string() };
        rig.happen(progress).await;
    }
    let refused = drover_types::Failure::new(ErrorCode::LaunchFailed, "no such partition");
    rig.happen(Input::Ensured(swarm.clone(), Err(refused))).await;
    rig.until("the launch failed", |rig| rig.shared.registry.load().listing().swarms[0].status == "failed").await;
    let mut last = None;
    while let Some(step) = unread.recv().await {
        last = Some(step);
    }
    assert!(last.unwrap().is_last(), "progress is missed, the end is not");
    rig.stop().await;
}

/// What a router of the first version left behind, in the middle of its work.
const VERSION_1: &str = include_str!("version1.sql");

#[tokio::test]
async fn a_file_of_the_first_version_is_taken_over_whole() {
    let dir = tempfile::tempdir().unwrap();
    let old = rusqlite::Connection::open(dir.path().join("router.sqlite")).unwrap();
    old.execute_batch(VERSION_1).unwrap();
    let count: u64 = old.query_row("SELECT count(*) FROM events", [], |row| row.get::<_, i64>(0)).unwrap() as u64;
    drop(old);
    let keep = |settings: &mut StoreSettings| settings.core.keep_ended = 1 << 60;
    let mut rig = Rig::at(dir.path(), 0, keep);
    let (mut expected, mut told) = (count, Vec::new());
    for round in 0..2 {
        let listed = rig.service.list_swarms(Request::new(pb::ListSwarmsRequest {})).await.unwrap().into_inner().swarms;
        let status: Vec<&str> = listed.iter().map(|swarm| swarm.status.as_str()).collect();
        assert_eq!(status, ["running", "terminated"]);
        let node = &listed[0].nodes[1];
        assert_eq!(
            (node.generation, node.outstanding, node.running_injection.is_empty()),
            (1, 1 + round, false),
            "{node:?}"
        );
        let asked = rig.service.list_approvals(Request::new(pb::ListApprovalsRequest::default())).await.unwrap();
        let asked = asked.into_inner().approvals;
        assert_eq!((asked.len(), asked[0].status.as_str()), (1, "pending"));

        // Requests of then are known, and new ones go on behind them.
        let swarm: SwarmId = listed[0].swarm_id.parse().unwrap();
        for (request_id, node, content) in [
            ("ad27387e-5726-4470-b199-8f35d552ed6e", 1, "@echo approval=ls"),
            ("baaa1bc7-62bc-4326-85b6-cc1d655e70e3", 0, "hello"),
        ] {
            let request = pb::InjectRequest {
                request_id: request_id.into(),
                swarm_id: swarm.to_string(),
                nodes: vec![node],
                content: content.into(),
                ..Default::default()
            };
            let mut steps = rig.service.inject(Request::new(request)).await.unwrap().into_inner();
            told.push(steps.next().await.unwrap().unwrap().injection_id);
        }
        assert_eq!(told[..2], told[told.len() - 2..], "the same prompts as ever");
        assert_eq!(asked[0].injection_id, told[0]);
        rig.inject(&format!("new-{round}"), &swarm, "x").await.unwrap();
        let events = rig.log().await;
        assert!(events.len() as u64 > expected, "the new prompts are in the log");
        assert!(events.iter().zip(1..).all(|(event, seq)| event.seq == seq), "every number once");
        let old = &events[..count as usize];
        assert!(old.iter().all(|event| event.timestamp_us == event.stored_us && event.stored_us > 0));
        assert!(events[count as usize].stored_us > old[old.len() - 1].stored_us);
        expected = events.len() as u64;
        rig = rig.restart(keep).await;
    }
    rig.stop().await;
    check_file(&rig.place);
}
