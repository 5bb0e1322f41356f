//! A daemon that hangs or is gone slows nobody down, changes no swarm's status, and is named to whoever asks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, ok, run};
use drover_e2e::stage::Stage;
use drover_e2e::sure::must;
use drover_proto::common::LaunchSpec;
use drover_proto::router::launch_swarm_response::Step;
use drover_proto::router::{
    ExplainRequest, GetInfoRequest, GetInfoResponse, GetSwarmRequest, LaunchSwarmRequest, ListSwarmsRequest,
};
use drover_service::process;
use drover_testkit::cluster::{Cluster, RouterClient, signal};
use drover_testkit::emulate::{self, Connection, Inject, Launch, OneShot, command, id_of};
use rustix::process::Signal;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_mins(1);
/// How long so many questions may take while something hangs, unless the machine is so busy that they take a third of it while
/// nothing does. Answered one by one from memory they take a tenth.
const ROUNDS: usize = 100;
const PROMPTLY: Duration = Duration::from_secs(10);

/// A process held still; it goes on when this is dropped, so that a failed test can end it in order.
struct Held(u32);

impl Held {
    fn new(pid: u32) -> Self {
        signal(pid, Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = signal(self.0, Signal::CONT);
    }
}

async fn status(router: &mut RouterClient, swarm: &str) -> (String, String) {
    let request = GetSwarmRequest { swarm_id: swarm.to_owned() };
    let answer = router.get_swarm(request).await.unwrap().into_inner();
    (answer.swarm.unwrap().status, answer.backend_error)
}

async fn info(router: &mut RouterClient) -> GetInfoResponse {
    router.get_info(GetInfoRequest {}).await.unwrap().into_inner()
}

async fn ask(connection: &mut Connection, name: &str, payload: &Value) -> Value {
    let ask = command(name, payload);
    connection.send(&ask).await.unwrap();
    let answer = connection.find(|event| event["data"]["request_id"] == id_of(&ask));
    tokio::time::timeout(PROMPTLY, answer).await.expect("an answer").unwrap().expect("the connection stays")
}

/// How long the rounds of [`answers_promptly`] may take on this machine as busy as it is, measured while nothing hangs.
async fn promptly(addr: SocketAddr, router: &mut RouterClient, swarm: &str) -> Duration {
    let begun = Instant::now();
    answers_promptly(addr, router, &[(swarm, "running")], PATIENCE).await;
    PROMPTLY.max(begun.elapsed() * 3)
}

/// Asks for list and status in both ways, many times; each swarm is as expected every time.
async fn answers_promptly(addr: SocketAddr, router: &mut RouterClient, expected: &[(&str, &str)], limit: Duration) {
    let begun = Instant::now();
    let mut connection = Connection::open(addr).await.unwrap();
    for round in 0..ROUNDS {
        let listed = router.list_swarms(ListSwarmsRequest {}).await.unwrap().into_inner().swarms;
        let list = ask(&mut connection, "swarm_list", &json!({})).await;
        for (swarm, wanted) in expected {
            let found = listed.iter().find(|listed| listed.swarm_id == *swarm).map(|swarm| swarm.status.as_str());
            assert_eq!(found, Some(*wanted), "round {round}");
            assert_eq!(list["data"]["swarms"][swarm]["status"], *wanted, "round {round}: {list}");
        }
        let (swarm, wanted) = expected[round % expected.len()];
        assert_eq!(status(router, swarm).await.0, wanted);
        let told = ask(&mut connection, "swarm_status", &json!({ "swarm_id": swarm })).await;
        assert_eq!(told["data"]["status"], wanted, "{told}");
        assert!(told["data"]["node_count"].is_number(), "{told}");
    }
    assert!(begun.elapsed() < limit, "{ROUNDS} rounds of four questions took {:?}", begun.elapsed());
}

/// Waits until the router says of a peer what it should, and counts that it answers all the while.
async fn until_said(router: &mut RouterClient, what: &str, said: impl Fn(&GetInfoResponse) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = info(router).await;
        if said(&info) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {info:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn explained(router: &mut RouterClient, subject: &str) -> String {
    let answer = router.explain(ExplainRequest { subject: subject.to_owned() }).await.unwrap().into_inner();
    format!("{}: {} -> {}", answer.state, answer.because.join(" "), answer.next.join(" "))
}

/// Both at once, because noticing that somebody hangs takes its time.
#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_holds_up_nobody() {
    tokio::join!(a_hung_allocator(), a_hung_follower());
}

async fn a_hung_allocator() {
    let cluster = must(Cluster::start("worker: {agent: echo}").await);
    let addr: SocketAddr = must(cluster.control_addr()).parse().unwrap();
    let mut router = cluster.router();
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let limit = promptly(addr, &mut router, &swarm).await;

    let held = Held::new(cluster.daemon("slurm-allocator").unwrap().pid);
    // One launch of each kind; both are recorded at once and wait.
    let spec = LaunchSpec { node_count: 1, ..Default::default() };
    let request = LaunchSwarmRequest { request_id: "hung".into(), spec: Some(spec), ..Default::default() };
    let mut steps = router.launch_swarm(request).await.unwrap().into_inner();
    let first = tokio::time::timeout(PROMPTLY, steps.message()).await.unwrap().unwrap().unwrap();
    let Some(Step::Progress(progress)) = first.step else { panic!("{first:?}") };
    let waiting = progress.swarm_id;
    let mut by_line = Launch::new(1, "and one by line", true);
    let by_line = emulate::run(addr, &mut by_line, PATIENCE);
    let meanwhile = async {
        answers_promptly(addr, &mut router, &[(&swarm, "running"), (&waiting, "launching")], limit).await;
        let why = explained(&mut router, &waiting).await;
        assert!(why.starts_with("launching: The allocator has not confirmed"), "{why}");
        // What does not need the allocator goes on; the catalogue is answered from memory or with a word.
        let said = emulate::run(addr, &mut Inject::new(&swarm, None, "still here"), PATIENCE).await.unwrap();
        assert_eq!(said.exit, Some(0), "{:?}", said.screen);
        let begun = Instant::now();
        let providers = emulate::run(addr, &mut OneShot::providers(), PATIENCE).await.unwrap();
        assert!(providers.exit.is_some() && begun.elapsed() < PROMPTLY, "{:?}", providers.screen);

        until_said(&mut router, "the allocator hangs", |info| !info.allocator_error.is_empty()).await;
        let (status, error) = status(&mut router, &swarm).await;
        assert_eq!((status.as_str(), error.is_empty()), ("running", false));
        let mut connection = Connection::open(addr).await.unwrap();
        let told = ask(&mut connection, "swarm_status", &json!({ "swarm_id": swarm })).await;
        assert!(told["data"]["error"].is_string() && told["data"]["node_count"] == 2, "{told}");
        for subject in [&swarm, &waiting, &format!("{swarm}/0")] {
            let why = must(ok(&cluster, &["why", subject])).stdout;
            assert!(why.contains("The slurm-allocator stopped answering"), "{why}");
        }
        answers_promptly(addr, &mut router, &[(&swarm, "running"), (&waiting, "launching")], limit).await;
        drop(held);
    };
    let (by_line, ()) = tokio::join!(by_line, meanwhile);

    let by_line = by_line.unwrap();
    assert_eq!(by_line.exit, Some(0), "{:?}\n{}", by_line.screen, cluster.logs());
    loop {
        let step = tokio::time::timeout(PATIENCE, steps.message()).await.expect("the launch goes on");
        if let Some(Step::Launched(launched)) = step.unwrap().expect("it is launched").step {
            assert_eq!(launched.swarm_id, waiting);
            break;
        }
    }
    until_said(&mut router, "the allocator answers again", |info| info.allocator_error.is_empty()).await;
    assert_eq!(status(&mut router, &swarm).await, ("running".to_owned(), String::new()));
    let events = must(drover_e2e::cli::json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
    assert!(events.iter().all(|event| event["event"] != "swarm_state"), "no status has changed");
}

async fn a_hung_follower() {
    const NODES: u32 = 200;
    let stage = must(Stage::start().await);
    let addr: SocketAddr = must(stage.control_addr()).parse().unwrap();
    let mut router = stage.router();
    let swarm = must(stage.launch(NODES).await);
    let limit = promptly(addr, &mut router, &swarm).await;

    let held = Held::new(must(stage.process("outbox-follower")).pid);
    let mut connection = Connection::open(addr).await.unwrap();
    let prompt = command("inject", &json!({"swarm_id": swarm, "nodes": "all", "content": "to everyone"}));
    connection.send(&prompt).await.unwrap();
    // Every prompt is on disk and acknowledged, though none can be delivered.
    let mut acked = Vec::new();
    while acked.len() < NODES as usize {
        let event = tokio::time::timeout(PROMPTLY, connection.next()).await.expect("an acknowledgement");
        let event = event.unwrap().expect("the connection stays");
        assert!(event["event"] != "inject_failed" && event["event"] != "inject_delivered", "{event}");
        if event["event"] == "inject_ack" {
            acked.push(event["data"]["injection_id"].as_str().unwrap().to_owned());
        }
    }
    answers_promptly(addr, &mut router, &[(&swarm, "running")], limit).await;
    let why = explained(&mut router, &acked[0]).await;
    assert!(why.starts_with("accepted: It was accepted for node"), "{why}");
    assert!(why.contains("is not delivered"), "{why}");

    until_said(&mut router, "the follower hangs", |info| !info.follower_error.is_empty()).await;
    for subject in [&acked[0], &swarm, &format!("{swarm}/0")] {
        let why = explained(&mut router, subject).await;
        assert!(why.contains("The outbox-follower stopped answering"), "{why}");
    }
    answers_promptly(addr, &mut router, &[(&swarm, "running")], limit).await;

    drop(held);
    let players: Vec<_> = (0..NODES).map(|node| must(stage.player(&swarm, node))).collect();
    let playing = async {
        // A delivery that was repeated is carried out once, as workers do.
        let mut done: HashSet<String> = HashSet::new();
        while done.len() < NODES as usize {
            for player in &players {
                let mut player = player.lock().unwrap_or_else(PoisonError::into_inner);
                for prompt in must(player.prompts()) {
                    if done.insert(prompt.injection_id.clone()) {
                        must(player.answer(&prompt));
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let listening = async {
        let (mut delivered, mut completed) = (HashSet::new(), 0);
        while delivered.len() < NODES as usize || completed < NODES {
            let event = connection.next().await.unwrap().expect("the connection stays");
            match event["event"].as_str().unwrap_or_default() {
                "inject_delivered" => {
                    assert!(delivered.insert(event["data"]["injection_id"].to_string()), "twice: {event}");
                }
                "turn_complete" => completed += 1,
                "inject_failed" | "swarm_state" => panic!("{event}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(playing, listening) }).await.expect("everything completes");
    until_said(&mut router, "the follower answers again", |info| info.follower_error.is_empty()).await;
    assert_eq!(status(&mut router, &swarm).await.0, "running");
}

/// The allocator is gone and what it keeps is still there: that says nothing about its swarms.
#[tokio::test(flavor = "multi_thread")]
async fn an_allocator_that_is_gone_ends_no_swarm() {
    // No `up`: nothing starts the allocator again until a command does.
    let cluster = must(Cluster::prepare("worker: {agent: echo, restart_delay: 50ms}"));
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    must(cluster.wait_ready(PATIENCE).await);
    let mut router = cluster.router();
    let pids = pids(&cluster, &swarm);

    signal(cluster.daemon("slurm-allocator").unwrap().pid, Signal::KILL).unwrap();
    until_said(&mut router, "the allocator is gone", |info| !info.allocator_error.is_empty()).await;
    // A worker dies too, and nobody can say so or start it again.
    signal(pids[1], Signal::KILL).unwrap();
    let said = must(ok(&cluster, &["inject", &swarm, "--node", "0", "--prompt", "hello", "--no-start"]));
    assert!(said.stdout.contains("hello"), "{}", said.stdout);
    // Longer than any patience of the router for a backend that has answered.
    let until = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < until {
        assert_eq!(status(&mut router, &swarm).await.0, "running");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let told = must(json(&cluster, &["status", &swarm, "--json", "--no-start"]));
    assert!(told["backend_error"].as_str().is_some_and(|error| !error.is_empty()), "{told}");

    // The router restarts without it, and still knows no better than that it runs.
    let killed = cluster.daemon("router").unwrap();
    signal(killed.pid, Signal::KILL).unwrap();
    // Its lock goes with it, which takes a moment.
    while process::is_alive(&killed) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let state = cluster.state().path();
    let alone = cluster.command(&["daemon", "router"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let _alone = Alone(alone);
    let deadline = Instant::now() + PATIENCE;
    let mut router = loop {
        let mut router = cluster.router();
        if router.get_info(GetInfoRequest {}).await.is_ok() {
            break router;
        }
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    until_said(&mut router, "the allocator is still gone", |info| !info.allocator_error.is_empty()).await;
    let until = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < until {
        assert_eq!(status(&mut router, &swarm).await.0, "running");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let why = must(ok(&cluster, &["why", &swarm, "--no-start"])).stdout;
    assert!(why.contains("The slurm-allocator stopped answering"), "{why}");

    // The next command starts it: the swarm is the one it was, and the dead worker is replaced.
    let back = must(run(&cluster, &["inject", &swarm, "--prompt", "welcome back"]));
    assert_eq!(back.code, 0, "{}{}\n{}", back.stdout, back.stderr, cluster.logs());
    assert!(back.stderr.contains("starting slurm-allocator"), "{}", back.stderr);
    assert_eq!(back.stdout.matches("welcome back").count(), 2, "{}", back.stdout);
    let after = self::pids(&cluster, &swarm);
    assert!(after[0] == pids[0] && after[1] != pids[1], "{pids:?} {after:?}");
    assert!(process::of(pids[0]).is_some());
    assert!(state.join("allocator").is_dir());
}

fn pids(cluster: &Cluster, swarm: &str) -> Vec<u32> {
    let status = must(json(cluster, &["status", swarm, "--json", "--no-start"]));
    status["nodes"].as_array().unwrap().iter().map(|node| node["pid"].as_u64().unwrap_or(0) as u32).collect()
}

/// A child that ends with the test.
struct Alone(std::process::Child);

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
