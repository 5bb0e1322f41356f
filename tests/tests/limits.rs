//! What ends by itself or with force, and what a restart must not blur: time limits, floods, the length of a turn.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok};
use drover_e2e::sure::{must, wait_until};
use drover_proto::router::terminate_swarm_response::Step;
use drover_proto::router::{GetInfoRequest, InjectRequest, InjectionState, TerminateSwarmRequest, WatchEventsRequest};
use drover_service::process;
use drover_testkit::cluster::{Cluster, end, program, router, scratch_dir, signal, wait_ready};
use rustix::process::Signal;
use serde_json::Value;

fn launch(cluster: &Cluster, nodes: &str, more: &[&str]) -> Value {
    let args = [&["launch", "--nodes", nodes, "--agent", "echo", "--detach", "--json"], more].concat();
    must(json(cluster, &args))
}

fn name(launched: &Value) -> String {
    launched["swarm_id"].as_str().unwrap().to_owned()
}

fn events(cluster: &Cluster, swarm: &str, name: &str) -> Vec<Value> {
    let all = must(json_lines(cluster, &["events", "--since", "0", "--swarm", swarm, "--json"]));
    all.into_iter().filter(|event| event["event"] == name).collect()
}

/// Sends a prompt and waits until it is in every inbox.
async fn deliver(cluster: &Cluster, swarm: &str, content: &str) {
    let request = InjectRequest { swarm_id: swarm.to_owned(), content: content.to_owned(), ..InjectRequest::default() };
    let mut steps = cluster.router().inject(request).await.unwrap().into_inner();
    let mut delivered = false;
    while let Some(step) = steps.message().await.unwrap() {
        delivered |= step.state() == InjectionState::Delivered;
    }
    assert!(delivered);
}

/// A process that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.0, Duration::from_secs(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_limit_ends_a_swarm_on_this_machine_whatever_dies_meanwhile() {
    let cluster = must(Cluster::start("worker: {drain_grace: 1s}").await);
    let began = Instant::now();
    let launched = launch(&cluster, "2", &["--time", "00:00:05"]);
    assert_eq!(launched["time"], "00:00:05");
    let swarm = name(&launched);
    let pids: Vec<u32> =
        launched["nodes"].as_array().unwrap().iter().map(|node| node["pid"].as_u64().unwrap() as u32).collect();
    deliver(&cluster, &swarm, "@echo delay=60s").await;

    // The allocator that counted is gone; its successor knows what is left.
    let allocator = cluster.daemon("slurm-allocator").unwrap();
    signal(allocator.pid, Signal::KILL).unwrap();
    let status = || must(json(&cluster, &["status", &swarm, "--json"]));
    wait_until("the end of the swarm", || {
        let over = status()["status"] == "terminated";
        assert!(!over || began.elapsed() >= Duration::from_secs(5), "it ended before its time");
        over
    });
    assert!(began.elapsed() < Duration::from_secs(20), "it ended late: {:?}", began.elapsed());
    assert!(cluster.daemon("slurm-allocator").is_some_and(|now| now != allocator));

    let reason = "its time limit of 00:00:05 was reached";
    assert_eq!(status()["reason"], reason);
    let why = must(ok(&cluster, &["why", &swarm])).stdout;
    assert!(why.contains(reason), "{why}");
    let ended = events(&cluster, &swarm, "swarm_terminated");
    assert!(ended.len() == 1 && ended[0]["data"]["reason"] == reason, "{ended:?}");
    // Each turn ended once, and says that it did not come to its own end.
    let turns = events(&cluster, &swarm, "turn_complete");
    assert_eq!(turns.len(), 2, "{turns:?}");
    assert!(turns.iter().all(|turn| turn["data"]["status"] == "interrupted"), "{turns:?}");
    let byes = events(&cluster, &swarm, "worker_bye");
    assert_eq!(byes.len(), 2, "{byes:?}");
    assert!(byes.iter().all(|bye| bye["data"]["reason"].as_str().is_some_and(|reason| !reason.is_empty())), "{byes:?}");
    wait_until("the end of the workers", || pids.iter().all(|&pid| process::of(pid).is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_ends_soon_after_its_grace() {
    const GRACE: Duration = Duration::from_secs(2);
    let cluster = must(Cluster::start("router: {graceful_terminate_timeout: 2s}").await);
    let swarm = name(&launch(&cluster, "2", &[]));
    deliver(&cluster, &swarm, "@echo deltas=1000000000 size=300").await;
    let mut client = cluster.router();
    let deadline = Instant::now() + Duration::from_secs(30);
    // So much is on its way that the end has to be found behind a backlog.
    while client.get_info(GetInfoRequest {}).await.unwrap().into_inner().last_seq < 20_000 {
        assert!(Instant::now() < deadline, "no flood: {}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let asked = Instant::now();
    let request = TerminateSwarmRequest { swarm_id: swarm.clone(), ..TerminateSwarmRequest::default() };
    let mut steps = client.terminate_swarm(request).await.unwrap().into_inner();
    let mut terminated = false;
    while let Some(step) = steps.message().await.unwrap() {
        terminated |= matches!(step.step, Some(Step::Terminated(_)));
    }
    let took = asked.elapsed();
    assert!(terminated);
    assert!(took >= GRACE, "its turns had no grace: {took:?}");
    // What is on its way is read first; a debug build takes its time for that.
    let more = if cfg!(debug_assertions) { 6 } else { 2 };
    assert!(took < GRACE + Duration::from_secs(more), "it ended after {took:?}");
    let turns = events(&cluster, &swarm, "turn_complete");
    assert_eq!(turns.len(), 2, "each turn ended once: {turns:?}");
    assert!(turns.iter().all(|turn| turn["data"]["status"] != "completed"), "{turns:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_is_as_long_as_it_was_however_late_it_is_read() {
    const TURN_MS: u64 = 1500;
    let mut cluster = must(Cluster::start("{}").await);
    let swarm = name(&launch(&cluster, "1", &[]));
    deliver(&cluster, &swarm, &format!("@echo delay={TURN_MS}ms")).await;
    wait_until("the turn to begin", || events(&cluster, &swarm, "turn_started").len() == 1);
    must(cluster.down());
    // The turn ends while nobody reads, and is read long after.
    tokio::time::sleep(Duration::from_millis(3 * TURN_MS)).await;
    must(cluster.up().await);
    wait_until("the end of the turn", || !events(&cluster, &swarm, "turn_complete").is_empty());

    let told = events(&cluster, &swarm, "turn_complete").remove(0);
    assert_eq!(told["data"]["status"], "completed", "{told}");
    let duration = told["data"]["duration_ms"].as_u64().unwrap();
    assert!((TURN_MS..2 * TURN_MS).contains(&duration), "the worker measured {duration} ms");
    let mut log = cluster.router().watch_events(WatchEventsRequest::default()).await.unwrap().into_inner();
    let (mut happened, mut stored) = (Vec::new(), Vec::new());
    while let Some(batch) = log.message().await.unwrap() {
        for event in batch.events.iter().filter(|event| event.event.starts_with("turn_")) {
            happened.push(event.timestamp_us / 1000);
            stored.push(event.stored_us / 1000);
        }
    }
    assert_eq!(happened.len(), 2);
    let between = happened[1] - happened[0];
    assert!((TURN_MS - 100..2 * TURN_MS).contains(&between), "the events lie {between} ms apart");
    assert!(stored[1] - stored[0] > 3 * TURN_MS, "it was read late: {stored:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_to_be_a_daemon_brings_its_company_or_says_that_it_has_none() {
    let cluster = must(Cluster::prepare("{}"));
    let start = |exe: &std::path::Path, state: &std::path::Path| {
        let mut command = Command::new(exe);
        command.args(["--daemon", "--config"]).arg(cluster.dir().join("drover.yaml"));
        command.env("DROVER_STATE_DIR", state).env_remove("DROVER_CONFIG").current_dir(cluster.dir());
        Running(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let beside = must(program("drover-router"));
    let mut child = start(&beside, cluster.state().path());
    must(cluster.wait_ready(Duration::from_secs(20)).await);
    assert_eq!(cluster.daemon("router").unwrap().pid, child.0.id(), "the process that was started is the router");
    let swarm = name(&launch(&cluster, "1", &[]));
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "hello"]));
    assert!(said.stdout.contains("hello"), "{}", said.stdout);
    signal(child.0.id(), Signal::TERM).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(0));

    // The same file where nothing else of drover is.
    let alone = must(scratch_dir("alone-"));
    let exe = alone.path().join("drover-router");
    std::fs::hard_link(&beside, &exe).unwrap();
    let state = must(drover_service::StateDir::open(&alone.path().join("state")).map_err(Into::into));
    let mut child = start(&exe, state.path());
    wait_until("the router", || drover_service::address_book::read(&state, "router").is_some());
    let info = router(&state).get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert!(!info.allocator_error.is_empty() && !info.follower_error.is_empty(), "{info:?}");
    assert!(wait_ready(&state, Duration::from_millis(100)).await.is_err());
    signal(child.0.id(), Signal::TERM).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    for words in
        ["there is no drover program beside this one", "start drover-slurm-allocator and drover-outbox-follower"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
}
