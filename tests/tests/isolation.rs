//! Fifty swarms at once: whatever is said reaches whom it concerns under the right names, and nobody else. The judge is
//! what the players write, which names swarm, node and injection as they found them in their own inboxes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_e2e::stage::{Player, Stage};
use drover_e2e::sure::must;
use drover_proto::router::{Event, WatchEventsRequest};
use drover_testkit::cluster::RouterClient;
use drover_testkit::emulate::{Connection, command, id_of};
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

const SWARMS: usize = 50;
const NODES: u32 = 3;
const ROUNDS: usize = 3;
/// Every approval of every node of every swarm is about this call.
const CALL: &str = "call-1";
const PATIENCE: Duration = Duration::from_secs(30);

/// An event, whichever way it came.
#[derive(Debug)]
struct Told {
    seq: u64,
    name: String,
    swarm: String,
    job: String,
    node: Option<u64>,
    injection: String,
    data: Value,
}

impl Told {
    fn of_grpc(event: &Event) -> Self {
        Self {
            seq: event.seq,
            name: event.event.clone(),
            swarm: event.swarm_id.clone(),
            job: event.job_id.clone(),
            node: event.node_id.map(u64::from),
            injection: event.injection_id.clone(),
            data: serde_json::from_slice(&event.data).unwrap(),
        }
    }

    /// `None` for an answer, which is no event of the log.
    fn of_line(line: &Value) -> Option<Self> {
        let text = |key: &str| line["data"][key].as_str().unwrap_or_default().to_owned();
        Some(Self {
            seq: line["seq"].as_u64()?,
            name: line["event"].as_str().unwrap().to_owned(),
            swarm: text("swarm_id"),
            job: text("job_id"),
            node: line["data"]["node_id"].as_u64(),
            injection: text("injection_id"),
            data: line["data"].clone(),
        })
    }
}

/// What a player writes into everything it says.
fn names(swarm: &str, node: u32, injection: &str) -> String {
    format!("{swarm}/{node}/{injection}")
}

/// Plays the workers: answers what comes, and names itself in every word.
fn play(
    players: Vec<(String, u32, Arc<Mutex<Player>>)>,
    over: Arc<AtomicBool>,
) -> std::thread::JoinHandle<anyhow::Result<()>> {
    std::thread::spawn(move || {
        while !over.load(Ordering::Relaxed) {
            for (swarm, node, player) in &players {
                let mut player = player.lock().unwrap_or_else(PoisonError::into_inner);
                for order in player.orders()? {
                    let injection = Some(order.injection_id.as_str());
                    let me = names(swarm, *node, &order.injection_id);
                    match order.kind.as_str() {
                        "inject" => {
                            let content = order.data["content"].as_str().unwrap_or_default();
                            anyhow::ensure!(content.contains(swarm.as_str()), "{me} was given {content:?}");
                            player.queue("turn_started", injection, "{}")?;
                            for piece in 0..3 {
                                let said = json!({"content": me, "piece": piece});
                                player.queue("assistant_delta", injection, &said.to_string())?;
                            }
                            player.queue("usage", injection, &json!({"total_tokens": 7, "of": me}).to_string())?;
                            if content.contains("asks") {
                                // The same call everywhere; only the place tells them apart.
                                let asked = json!({"call_id": CALL, "command": ["touch", me], "reason": me});
                                player.queue("exec_approval_required", injection, &asked.to_string())?;
                            } else {
                                finish(&mut player, injection, &me)?;
                            }
                        }
                        "approval" => {
                            let settled = json!({
                                "approval_id": order.data["approval_id"], "call_id": CALL, "of": me,
                                "approved": order.data["approved"], "decision": order.data["decision"], "source": "router",
                            });
                            player.queue("exec_approval_resolved", injection, &settled.to_string())?;
                            finish(&mut player, injection, &me)?;
                        }
                        other => anyhow::bail!("{me} was given a record of type {other}"),
                    }
                    player.flush()?;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    })
}

fn finish(player: &mut Player, injection: Option<&str>, me: &str) -> anyhow::Result<()> {
    player.queue("assistant", injection, &json!({ "content": me }).to_string())?;
    player.queue("turn_complete", injection, &json!({"status": "completed", "of": me}).to_string())
}

/// Reads a connection to the event with this number.
async fn read_lines(mut connection: Connection, upto: tokio::sync::watch::Receiver<u64>) -> Vec<Value> {
    let mut lines: Vec<Value> = Vec::new();
    let deadline = Instant::now() + PATIENCE + PATIENCE;
    loop {
        let last = lines.iter().rev().find_map(|line| line["seq"].as_u64()).unwrap_or(0);
        if *upto.borrow() > 0 && last >= *upto.borrow() {
            return lines;
        }
        assert!(Instant::now() < deadline, "only to {last} of {}", *upto.borrow());
        if let Ok(line) = tokio::time::timeout(Duration::from_millis(100), connection.next()).await {
            lines.push(line.unwrap().expect("the connection stays"));
        }
    }
}

/// The log, whole or of one swarm.
async fn log(mut router: RouterClient, swarm: &str) -> Vec<Event> {
    let request = WatchEventsRequest { swarm_id: swarm.to_owned(), ..Default::default() };
    let mut stream = router.watch_events(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(batch) = stream.message().await.unwrap() {
        events.extend(batch.events);
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_swarms_do_not_mix() {
    let stage = must(Stage::start().await);
    let addr: SocketAddr = must(stage.control_addr()).parse().unwrap();
    let (end, upto) = tokio::sync::watch::channel(0);
    let listening = tokio::task::JoinSet::from_iter([read_lines(Connection::open(addr).await.unwrap(), upto)]);

    let swarms: Vec<String> = join_all((0..SWARMS).map(|_| stage.launch(NODES))).await.into_iter().map(must).collect();
    assert_eq!(swarms.iter().collect::<HashSet<_>>().len(), SWARMS);
    let places = swarms.iter().flat_map(|swarm| (0..NODES).map(move |node| (swarm.clone(), node)));
    let players = places.map(|(swarm, node)| {
        let player = must(stage.player(&swarm, node));
        (swarm, node, player)
    });
    let over = Arc::new(AtomicBool::new(false));
    let playing = play(players.collect(), Arc::clone(&over));

    // Every swarm has a client of its own, and all of them send at once. The last round asks for approval.
    join_all(swarms.iter().enumerate().map(|(index, swarm)| client(addr, index, swarm))).await;
    two_questions_in_one_write(addr, &swarms).await;
    over.store(true, Ordering::Relaxed);
    must(playing.join().unwrap());

    let all = log(stage.router(), "").await;
    end.send_replace(all.last().unwrap().seq);
    let lines = listening.join_all().await.pop().unwrap();

    let mut told: Vec<Told> = all.iter().map(Told::of_grpc).collect();
    judge(&swarms, &told);
    for swarm in &swarms {
        let of_swarm = log(stage.router(), swarm).await;
        let expected = all.iter().filter(|event| event.swarm_id == *swarm).map(|event| event.seq);
        assert!(of_swarm.iter().map(|event| event.seq).eq(expected), "the stream of {swarm} is what concerns it");
    }

    let heard: Vec<Told> = lines.iter().filter_map(Told::of_line).collect();
    judge(&swarms, &heard);
    let first = heard[0].seq;
    told.retain(|event| event.seq >= first);
    assert_eq!(told.len(), heard.len(), "both ways tell the same events");
    for (one, other) in told.iter().zip(&heard) {
        assert_eq!(
            (one.seq, &one.name, &one.swarm, &one.job, one.node, &one.injection),
            (other.seq, &other.name, &other.swarm, &other.job, other.node, &other.injection)
        );
    }
}

/// One swarm's client: injects, waits, and answers its own approvals, yes in every second swarm.
async fn client(addr: SocketAddr, index: usize, swarm: &str) {
    let mut connection = Connection::open(addr).await.unwrap();
    for round in 0..ROUNDS {
        let asks = round + 1 == ROUNDS;
        let content = format!("for {swarm}: round {round}{}", if asks { " asks" } else { "" });
        let mut ask = command("inject", &json!({"swarm_id": swarm, "nodes": "all", "content": content}));
        ask["request_id"] = json!(format!("{swarm}|{round}"));
        connection.send(&ask).await.unwrap();
        let mut waiting: HashSet<u64> = (0..u64::from(NODES)).collect();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !waiting.is_empty() {
            let line = tokio::time::timeout_at(deadline, connection.next()).await;
            let line = line.unwrap_or_else(|_| panic!("{swarm} still waits for {waiting:?}")).unwrap().unwrap();
            if line["data"]["swarm_id"] != *swarm {
                continue;
            }
            match line["event"].as_str().unwrap_or_default() {
                "exec_approval_required" => {
                    let answer = json!({
                        "job_id": line["data"]["job_id"], "call_id": CALL, "node_id": line["data"]["node_id"],
                        "approved": index.is_multiple_of(2),
                    });
                    let mut answer = command("approve_execution", &answer);
                    answer["request_id"] = json!(format!("{swarm}|approve"));
                    connection.send(&answer).await.unwrap();
                }
                "turn_complete" => {
                    waiting.remove(&line["data"]["node_id"].as_u64().unwrap());
                }
                "inject_failed" | "command_rejected" => panic!("{line}"),
                _ => {}
            }
        }
    }
}

/// Each of two questions that come in one write, and of many at once, is answered under its own id.
async fn two_questions_in_one_write(addr: SocketAddr, swarms: &[String]) {
    let askers = (0..16).map(|asker| async move {
        let mut connection = Connection::open(addr).await.unwrap();
        for round in 0..10 {
            let pair = [&swarms[(asker + round) % SWARMS], &swarms[(asker + round + 1) % SWARMS]];
            let asks = pair.map(|swarm| command("swarm_status", &json!({ "swarm_id": swarm })));
            let bytes = format!("{}\n{}\n", asks[0], asks[1]);
            connection.stream.write_all(bytes.as_bytes()).await.unwrap();
            let mut expected: HashMap<String, &String> =
                asks.iter().zip(pair).map(|(ask, swarm)| (id_of(ask), swarm)).collect();
            let deadline = tokio::time::Instant::now() + PATIENCE;
            while !expected.is_empty() {
                let line = tokio::time::timeout_at(deadline, connection.next()).await.unwrap().unwrap().unwrap();
                let id = line["data"]["request_id"].as_str().unwrap_or_default();
                if line["event"] == "swarm_status"
                    && let Some(swarm) = expected.remove(id)
                {
                    assert_eq!(line["data"]["swarm_id"], **swarm, "{line}");
                }
            }
        }
    });
    join_all(askers).await;
}

/// Checks every event, and that as many came as must have come.
fn judge(swarms: &[String], told: &[Told]) {
    assert!(told.windows(2).all(|pair| pair[0].seq < pair[1].seq), "in order, each once");
    let index: HashMap<&str, usize> = swarms.iter().enumerate().map(|(index, swarm)| (swarm.as_str(), index)).collect();
    let mut owners: HashMap<String, (String, u64)> = HashMap::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for event in told {
        let Some(&index) = index.get(event.swarm.as_str()) else {
            panic!("an event of no swarm of ours: {event:?}");
        };
        *counts.entry(event.name.as_str()).or_default() += 1;
        if !event.job.is_empty() || event.node.is_some() {
            assert_eq!(event.job, format!("played-{}", &event.swarm[..8]), "{event:?}");
        }
        if let Some(request) = event.data["request_id"].as_str().filter(|id| id.contains('|')) {
            assert!(request.starts_with(&event.swarm), "{event:?}");
        }
        if let Some(prompt) = event.data["prompt"].as_str() {
            assert!(prompt.contains(&event.swarm), "{event:?}");
        }
        let Some(node) = event.node.filter(|_| !event.injection.is_empty()) else { continue };
        let owner = owners.entry(event.injection.clone()).or_insert_with(|| (event.swarm.clone(), node));
        assert_eq!(*owner, (event.swarm.clone(), node), "an injection has one place: {event:?}");
        let me = names(&event.swarm, node as u32, &event.injection);
        for field in ["content", "of", "reason"] {
            if let Some(said) = event.data[field].as_str() {
                assert_eq!(said, me, "{event:?}");
            }
        }
        if event.name.starts_with("exec_approval_") {
            assert_eq!(event.data["call_id"], CALL);
            if event.name != "exec_approval_required" {
                assert_eq!(event.data["approved"], index.is_multiple_of(2), "another swarm's answer: {event:?}");
            }
        }
    }
    let turns = SWARMS * NODES as usize * ROUNDS;
    for (name, times) in [
        ("inject_ack", turns),
        ("inject_delivered", turns),
        ("turn_started", turns),
        ("assistant_delta", turns * 3),
        ("usage", turns),
        ("assistant", turns),
        ("turn_complete", turns),
        ("exec_approval_required", turns / ROUNDS),
        ("exec_approval_submitted", turns / ROUNDS),
        ("exec_approval_resolved", turns / ROUNDS),
    ] {
        assert_eq!(counts.get(name).copied().unwrap_or(0), times, "{name}: {counts:?}");
    }
    assert_eq!(owners.len(), turns);
}
