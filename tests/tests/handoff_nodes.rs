//! Sessions on real daemons: they move while people talk in them, and whatever is killed or stopped, nothing is lost or answered twice.
#![expect(clippy::print_stdout, reason = "helpers of tests fail by panicking")]

use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok};
use drover_e2e::handoff::nodes::{Door, LIMIT, Nodes, Plan};
use drover_e2e::handoff::{faults, orders};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{Answer, GetStatusRequest, HandoffRequest, OpenSession, SendRequest};
use drover_service::{Target, address_book, connect};
use drover_testkit::cluster::{Cluster, signal};
use rustix::process::Signal;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_goes_on_where_it_was_after_it_moved() {
    let nodes = Nodes::start(Plan::fast(3)).await.unwrap();
    let first = nodes.say(0, "talk", "r0", "the first words").await.unwrap();
    assert_eq!((first.text.as_str(), first.answer.text.as_str()), ("the first words", "the first words"));
    for turn in 1..4 {
        let said = nodes.say(turn % 3, "talk", &format!("r{turn}"), &format!("words {turn}")).await.unwrap();
        assert_eq!(said.answer.turn, turn as u32);
    }
    let (epoch, from, _) = nodes.owner("talk").unwrap();
    assert_eq!((epoch, nodes.name(from)), (1, first.answer.node_id));
    let to = (from + 1) % 3;
    // Any node takes the order, also one that has nothing to do with it.
    let moved = nodes.hand_over((from + 2) % 3, "talk", to).await.unwrap();
    assert_eq!((moved.from, moved.to, moved.epoch), (nodes.name(from), nodes.name(to), 2));
    assert_eq!(nodes.owner("talk"), Some((2, to, "moved".to_owned())));

    let said = nodes.say(from, "talk", "r4", "@echo recall").await.unwrap();
    assert_eq!(said.answer.text, "4 before: the first words .. words 3");
    assert_eq!(said.answer.node_id, nodes.name(to));
    // What was answered before the move is answered the same when it is asked again, and not run again.
    let again = nodes.say(to, "talk", "r2", "words 2").await.unwrap();
    assert_eq!((again.answer.text.as_str(), again.answer.turn), ("words 2", 2));
    let told = nodes.explain(from, "talk").await.unwrap();
    let causes: Vec<_> = told.owners.iter().map(|owner| owner.cause.as_str()).collect();
    assert_eq!(causes, ["opened", "moved"]);
}

fn passed(outcome: anyhow::Result<String>) {
    match outcome {
        Ok(said) => println!("{said}"),
        Err(error) => panic!("{error:#}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_side_is_killed_or_stopped_the_session_goes_on() {
    let seed = rand::random::<u64>() >> 16;
    println!("seed {seed}");
    passed(faults::struck_at_any_step(seed, 8).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_or_a_target_that_is_killed_while_it_copies_loses_nothing() {
    passed(faults::killed_while_copying(false, 8, 0.6).await);
    passed(faults::killed_while_copying(true, 8, 0.6).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_host_had_that_is_gone_is_taken_over() {
    passed(faults::host_gone_after_the_claim().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_follows_no_rule_changes_nothing() {
    passed(faults::a_node_that_follows_no_rule().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tool_that_is_at_work_during_a_move_is_called_once() {
    passed(faults::tool_in_flight().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_through_every_door_during_moves_are_answered_once() {
    passed(faults::turns_during_moves(6).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_emptied_keeps_nothing_and_the_others_get_even_shares() {
    passed(faults::emptied(30).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_its_door_its_planner_and_its_node() {
    passed(orders::a_drain_outlives_everybody(24).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_who_listens_and_does_not_read_loses_nothing() {
    passed(orders::a_listener_that_does_not_read().await);
}

/// Five times as fast as by default.
const FAST: &str = "swarm: {discovery: {gossip_interval: 200ms, node_timeout: 1s}, handoff: {retry_delay: 200ms}, rpc: {timeout: 2s}}\n";

fn must<T>(result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}"))
}

fn pid_of(cluster: &Cluster, swarm: &str, node: u32) -> Option<u32> {
    address_book::read(cluster.state(), &format!("handoff-coordinator-{swarm}+{node}")).map(|entry| entry.pid)
}

fn door(cluster: &Cluster, swarm: &str, node: u32) -> Door {
    let name = format!("handoff-coordinator-{swarm}+{node}");
    HandoffServiceClient::new(connect(Target::Daemon { state: cluster.state().clone(), name }))
}

/// Asks until there is an answer.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Says something until it is answered, as a client does whose door was gone.
async fn say(cluster: &Cluster, swarm: &str, node: u32, request: &str, prompt: &str) -> Answer {
    let ask = SendRequest {
        session_id: "talk".to_owned(),
        request_id: request.to_owned(),
        prompt: prompt.to_owned(),
        open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
        ..SendRequest::default()
    };
    until("an answer", async || {
        let mut stream = door(cluster, swarm, node).send(ask.clone()).await.ok()?.into_inner();
        while let Ok(Some(response)) = stream.message().await {
            if let Some(Update::Answer(answer)) = response.update {
                return Some(answer);
            }
        }
        None
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nodes_of_a_swarm_keep_sessions_by_themselves_and_tell_of_their_moves() {
    let cluster = must(Cluster::start(FAST).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--agent", "echo", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    for node in 0..2 {
        until("both nodes take sessions", async || {
            let status = door(&cluster, &swarm, node).get_status(GetStatusRequest {}).await.ok()?.into_inner();
            (status.peers == 1).then_some(())
        })
        .await;
    }
    let first = say(&cluster, &swarm, 0, "r0", "the first words").await;
    let from = u32::from(first.node_id.ends_with("/1"));
    let to = format!("{swarm}/{}", 1 - from);
    let request = HandoffRequest { session_id: "talk".to_owned(), to: to.clone() };
    let moved = door(&cluster, &swarm, from).handoff(request).await.unwrap().into_inner();
    assert_eq!((moved.to.as_str(), moved.epoch), (to.as_str(), 2));

    // Its daemon is killed, and the worker starts it again.
    let pid = until("the daemon", async || pid_of(&cluster, &swarm, 1 - from)).await;
    signal(pid, Signal::KILL).unwrap();
    until("another daemon", async || pid_of(&cluster, &swarm, 1 - from).filter(|now| *now != pid)).await;
    let answer = say(&cluster, &swarm, from, "r1", "@echo recall").await;
    assert_eq!(answer.text, "1 before: the first words .. the first words");

    let told = until("the events of the move", async || {
        let events = must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
        let names = |event: &Value| event["event"].as_str().unwrap_or_default().starts_with("Handoff");
        let told: Vec<Value> = events.into_iter().filter(names).collect();
        (told.len() >= 2).then_some(told)
    })
    .await;
    assert_eq!((&told[0]["event"], &told[1]["event"]), (&"HandoffStarted".into(), &"HandoffCompleted".into()));
    assert_eq!((&told[1]["data"]["session_id"], &told[1]["data"]["to"]), (&"talk".into(), &Value::from(to.as_str())));
    assert!(told[1]["data"]["result"]["bytes"].as_u64().unwrap() > 0, "{}", told[1]);
    must(ok(&cluster, &["terminate", &swarm]));
    until("the end of its daemons", async || (0..2).all(|node| pid_of(&cluster, &swarm, node).is_none()).then_some(()))
        .await;
}
