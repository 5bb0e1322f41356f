//! What can be done to a line protocol, and what must hold all the same.

mod load;
mod strangers;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake::{Knobs, Plane, until, within};
use drover_testkit::emulate::{Connection, OneShot, command, id_of, probe, run};

fn list() -> Value {
    command("swarm_list", &json!({}))
}

async fn answer_to(connection: &mut Connection, ask: &Value) -> Value {
    let id = id_of(ask);
    connection.send(ask).await.unwrap();
    within(connection.find(|event| event["data"]["request_id"] == id))
        .await
        .unwrap()
        .expect("the connection was closed")
}

/// Everything to the end of the connection.
async fn rest(stream: &mut TcpStream) -> Vec<Value> {
    let mut bytes = Vec::new();
    within(stream.read_to_end(&mut bytes)).await.unwrap();
    assert!(bytes.is_ascii());
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "the last line is cut");
    bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

#[tokio::test]
async fn nonsense_harms_nobody_and_the_connection_lives() {
    let plane = Plane::start(Knobs::default());
    let mut connection = plane.connect().await;
    let nonsense: &[&[u8]] = &[
        b"\"x\"\n",
        b"[]\n7\nnull\n\n  \r\n",
        b"{\"protocol\":\n",
        b"\0\0\0\n",
        b"\xff\xfe\xfd\n",
        b"{\"protocol\":\"codeswarm.router.v1\",\"command\":\"swarm_list\",\"payload\":null}\n",
        b"{\"protocol\":\"codeswarm.router.v1\",\"command\":[],\"payload\":7}\n",
        b"{\"protocol\":\"codeswarm.router.v9\",\"command\":\"swarm_list\",\"request_id\":\"v9\"}\n",
    ];
    for line in nonsense {
        connection.stream.write_all(line).await.unwrap();
    }
    let deep = format!("{}\n", "[".repeat(100_000));
    connection.stream.write_all(deep.as_bytes()).await.unwrap();
    let ask = list();
    let id = id_of(&ask);
    connection.send(&ask).await.unwrap();
    let mut rejections = 0;
    let answer = loop {
        let event = within(connection.next()).await.unwrap().unwrap();
        assert_ne!(event["data"]["request_id"], "v9");
        if event["data"]["request_id"] == id {
            break event;
        }
        assert_eq!(event["event"], "command_rejected");
        rejections += 1;
    };
    assert_eq!((answer["event"].as_str(), rejections), (Some("swarm_list"), 2));
}

#[tokio::test]
async fn a_line_may_come_in_pieces_and_end_with_the_connection() {
    let plane = Plane::start(Knobs::default());
    let mut stream = TcpStream::connect(plane.addr).await.unwrap();
    let (first, cut) = (list(), list());
    let line = format!("{first}\r\n{cut}");
    for byte in line.as_bytes().chunks(7) {
        stream.write_all(byte).await.unwrap();
    }
    // Half a close: what was asked is answered, the line that never ended is not.
    stream.shutdown().await.unwrap();
    let events = rest(&mut stream).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["data"]["request_id"], id_of(&first));
}

#[tokio::test]
async fn large_lines_pass_both_ways_and_oversized_ones_end_the_connection() {
    let plane = Plane::start(Knobs::default());
    let mut connection = plane.connect().await;
    let file = "ä".repeat(5 << 19);
    let payload = json!({"nodes": 1, "agents_bundle": {"mode": "directory", "agents_md_content": "# A",
        "skills_files": [{"path": "big/SKILL.md", "content": file}]}});
    let launched = answer_to(&mut connection, &command("swarm_launch", &payload)).await;
    assert_eq!(launched["event"], "swarm_launch_progress");
    until(|| plane.fake.specs().len() == 1).await;
    assert_eq!(plane.fake.specs()[0].skills[0].content.len(), 5 << 20);

    let plane = Plane::start_with(Knobs::default(), 1000, 1 << 20, &drover_config::SecurityConfig::default());
    let mut stream = TcpStream::connect(plane.addr).await.unwrap();
    let junk = vec![b'x'; 64 << 10];
    // The other side may close while we write.
    let _ = stream.write_all(&junk).await;
    let events = rest(&mut stream).await;
    assert_eq!(events.last().unwrap()["event"], "subscription_ended");
    assert!(events.last().unwrap()["data"]["reason"].as_str().unwrap().contains("1000 bytes"));
    assert_eq!(run(plane.addr, &mut OneShot::list(), Duration::from_secs(20)).await.unwrap().exit, Some(0));
}

#[tokio::test]
async fn a_client_that_asks_three_thousand_times_before_it_reads_gets_every_answer() {
    let plane = Plane::start(Knobs::default());
    let swarm = plane.fake.add_swarm(1);
    let mut stream = TcpStream::connect(plane.addr).await.unwrap();
    let mut waiting = BTreeMap::new();
    let mut lines = String::new();
    for index in 0..3000 {
        let ask = match index % 3 {
            0 => list(),
            1 => command("swarm_status", &json!({ "swarm_id": swarm })),
            _ => command("swarm_status", &json!({ "swarm_id": format!("no-{index}") })),
        };
        waiting.insert(id_of(&ask), ["swarm_list", "swarm_status", "command_rejected"][index % 3]);
        lines += &ask.to_string();
        lines.push('\n');
    }
    within(stream.write_all(lines.as_bytes())).await.unwrap();
    stream.shutdown().await.unwrap();
    for event in rest(&mut stream).await {
        let id = event["data"]["request_id"].as_str().unwrap();
        assert_eq!(waiting.remove(id), event["event"].as_str());
    }
    assert!(waiting.is_empty(), "{} requests were not answered", waiting.len());
}

#[tokio::test]
async fn sixteen_clients_that_ask_at_once_each_get_their_own_answer() {
    let plane = Plane::start(Knobs::default());
    let swarms: Vec<String> = (0..16).map(|nodes| plane.fake.add_swarm(nodes + 1)).collect();
    let ask = async |swarm: &String| {
        let mut connection = Connection::open(plane.addr).await.unwrap();
        for _ in 0..20 {
            let status = answer_to(&mut connection, &command("swarm_status", &json!({ "swarm_id": swarm }))).await;
            assert_eq!((&status["event"], &status["data"]["swarm_id"]), (&json!("swarm_status"), &json!(swarm)));
        }
    };
    futures::future::join_all(swarms.iter().map(ask)).await;
}

#[tokio::test]
async fn probes_are_cheap_and_silent() {
    let plane = Plane::start(Knobs::default());
    for round in 0..200 {
        assert!(probe(plane.addr).await, "{round}");
        if round % 20 == 0 {
            // Lets the server take what waits in the kernel's queue, which is short.
            plane.connect().await;
        }
    }
    let metrics = || {
        let mut text = String::new();
        let registry = plane.ctx.registry();
        prometheus_client::encoding::text::encode(&mut text, &registry.lock().unwrap()).unwrap();
        text
    };
    until(|| metrics().contains("drover_control_connections 0")).await;
    assert!(metrics().contains("drover_control_ignored_lines_total 0"));
}

#[tokio::test]
async fn a_request_made_in_the_first_moment_sees_its_own_events() {
    let plane = Plane::start(Knobs { echo: true, ..Knobs::default() });
    for _ in 0..100 {
        let mut connection = Connection::open(plane.addr).await.unwrap();
        let ask = command("swarm_launch", &json!({"nodes": 1, "system_prompt": "go"}));
        let first = answer_to(&mut connection, &ask).await;
        assert_eq!(first["data"]["stage"], "queued");
        let last = within(connection.find(|event| event["event"] == "inject_delivered")).await.unwrap().unwrap();
        assert_eq!(last["data"]["request_id"], id_of(&ask));
    }
}

#[tokio::test]
async fn a_repeated_request_is_answered_again_but_only_to_its_asker() {
    let plane = Plane::start(Knobs::default());
    let mut watcher = plane.connect().await;
    let launch = command("swarm_launch", &json!({"nodes": 1, "partition": "p"}));
    let mut first = plane.connect().await;
    first.send(&launch).await.unwrap();
    let one = within(first.find(|event| event["event"] == "swarm_launched")).await.unwrap().unwrap();
    let mut second = plane.connect().await;
    let two = answer_to(&mut second, &launch).await;
    assert_eq!((&two["event"], &two["data"]["swarm_id"]), (&json!("swarm_launched"), &one["data"]["swarm_id"]));

    let swarm = one["data"]["swarm_id"].clone();
    let inject = command("inject", &json!({"swarm_id": swarm, "nodes": "all", "content": "once"}));
    for connection in [&mut first, &mut second] {
        connection.send(&inject).await.unwrap();
        let mine = |event: &Value| event["data"]["request_id"] == id_of(&inject);
        let ack = within(connection.find(mine)).await.unwrap().unwrap();
        let delivered = within(connection.find(mine)).await.unwrap().unwrap();
        assert_eq!((&ack["event"], &delivered["event"]), (&json!("inject_ack"), &json!("inject_delivered")));
        assert_eq!(ack["data"]["injection_id"], delivered["data"]["injection_id"]);
    }
    assert_eq!(plane.fake.contents(), ["once"]);

    // Everybody else has seen each event once.
    let marker = plane.fake.say_many("agent_error", swarm.as_str().unwrap(), 0, &[json!({"message": "end"})]);
    let mut names = Vec::new();
    while let Some(event) = within(watcher.next()).await.unwrap() {
        if event["seq"] == marker {
            break;
        }
        names.push(event["event"].as_str().unwrap().to_owned());
    }
    let count = |name: &str| names.iter().filter(|seen| *seen == name).count();
    assert_eq!((count("swarm_launched"), count("inject_ack"), count("inject_delivered")), (1, 1, 1));
}

#[tokio::test]
async fn an_inject_that_cannot_be_done_fails_in_both_words_and_only_for_the_asker() {
    let plane = Plane::start(Knobs::default());
    let swarm = plane.fake.add_swarm(2);
    let mut watcher = plane.connect().await;
    let mut connection = plane.connect().await;
    for (payload, node, error) in [
        (json!({"swarm_id": "nonsense", "nodes": 3, "content": "x"}), 3, "unknown swarm_id"),
        (json!({"swarm_id": "nonsense", "nodes": "all", "content": "x"}), 0, "unknown swarm_id"),
        (json!({"swarm_id": swarm, "nodes": [9], "content": "x"}), 9, "no node 9"),
        (json!({"swarm_id": swarm, "nodes": -1, "content": "x"}), -1, "numbered from 0"),
        (json!({"swarm_id": swarm, "nodes": [], "content": "x"}), 0, "empty list"),
        (json!({"swarm_id": swarm, "nodes": 1, "content": 5}), 1, "content must be text"),
    ] {
        let ask = command("inject", &payload);
        let failed = answer_to(&mut connection, &ask).await;
        assert_eq!((&failed["event"], &failed["data"]["node_id"]), (&json!("inject_failed"), &json!(node)));
        assert!(failed["data"]["error"].as_str().unwrap().contains(error), "{failed}");
        let rejected = within(connection.next()).await.unwrap().unwrap();
        assert_eq!(
            (&rejected["event"], &rejected["data"]["request_id"]),
            (&json!("command_rejected"), &ask["request_id"])
        );
    }
    let end = answer_to(&mut watcher, &list()).await;
    assert_eq!(end["event"], "swarm_list");
    assert_eq!(plane.fake.last_seq(), 0);
}

#[tokio::test]
async fn a_stream_that_breaks_is_resumed_without_a_gap_or_a_double() {
    let plane = Plane::start(Knobs { break_stream_after: Some(7), ..Knobs::default() });
    let swarm = plane.fake.add_swarm(1);
    let mut connection = plane.connect().await;
    connection.chunk = 5;
    let texts: Vec<Value> = (0..100).map(|n| json!({"content": format!("ä{n}🙂")})).collect();
    let mut last = 0;
    for some in texts.chunks(9) {
        last = plane.fake.say_many("assistant_delta", &swarm, 0, some);
    }
    for (seq, text) in (1..=last).zip(&texts) {
        let event = within(connection.find(|event| event["event"] == "assistant_delta")).await.unwrap().unwrap();
        assert_eq!((&event["seq"], &event["data"]["content"]), (&json!(seq), &text["content"]));
    }
    assert!(plane.fake.watches.load(std::sync::atomic::Ordering::Relaxed) > 10);
}

#[tokio::test]
async fn what_is_pending_is_answered_before_the_shutdown_closes() {
    let plane = Plane::start(Knobs { launches_hang: true, ..Knobs::default() });
    let mut connection = plane.connect().await;
    let mut idle = plane.connect().await;
    let launch = command("swarm_launch", &json!({"nodes": 1}));
    assert_eq!(answer_to(&mut connection, &launch).await["data"]["stage"], "queued");
    // A request under way does not keep others on the connection waiting.
    assert_eq!(answer_to(&mut connection, &list()).await["event"], "swarm_list");
    plane.ctx.shutdown().cancel();
    let rejected = within(connection.next()).await.unwrap().unwrap();
    assert_eq!(
        (&rejected["event"], &rejected["data"]["request_id"]),
        (&json!("command_rejected"), &launch["request_id"])
    );
    assert!(rejected["data"]["reason"].as_str().unwrap().contains("shutting down"));
    assert_eq!(within(connection.next()).await.unwrap(), None);
    assert_eq!(within(idle.find(|event| event["event"] == "command_rejected")).await.unwrap(), None);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_told_and_closed_and_nobody_waits_for_it() {
    let plane = Plane::start_with(Knobs::default(), 1 << 20, 256 << 10, &drover_config::SecurityConfig::default());
    let swarm = plane.fake.add_swarm(1);
    let mut slow = TcpStream::connect(plane.addr).await.unwrap();
    slow.write_all(format!("{}\n", list()).as_bytes()).await.unwrap();
    let mut first = [0; 1];
    within(slow.read_exact(&mut first)).await.unwrap();
    let mut reader = plane.connect().await;
    let text = json!({"content": "x".repeat(4000)});
    let mut last = 0;
    // The kernel's buffers take a few megabytes before anything waits in ours.
    for _ in 0..40 {
        last = plane.fake.say_many("assistant_delta", &swarm, 0, &vec![text.clone(); 50]);
        within(reader.find(|event| event["seq"] == last)).await.unwrap().unwrap();
    }
    let mut bytes = first.to_vec();
    within(slow.read_to_end(&mut bytes)).await.unwrap();
    let lines: Vec<Value> = bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).expect("every line is whole"))
        .collect();
    let (end, before) = lines.split_last().unwrap();
    assert_eq!(end["event"], "subscription_ended");
    let seen: Vec<u64> = before.iter().filter_map(|event| event["seq"].as_u64()).collect();
    assert_eq!(seen, (1..=seen.len() as u64).collect::<Vec<_>>());
    assert_eq!(end["data"]["last_seq"], json!(seen.last()));
    assert!(*seen.last().unwrap() < last);
}

#[tokio::test]
async fn a_client_that_asks_and_does_not_read_is_read_no_further_instead_of_filling_memory() {
    let plane = Plane::start_with(Knobs::default(), 1 << 20, 1 << 20, &drover_config::SecurityConfig::default());
    for _ in 0..200 {
        plane.fake.add_swarm(1);
    }
    let stream = TcpStream::connect(plane.addr).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let mut lines = String::new();
    for _ in 0..2000 {
        lines += &list().to_string();
        lines.push('\n');
    }
    let write = async {
        writing.write_all(lines.as_bytes()).await.unwrap();
        writing.shutdown().await.unwrap();
    };
    let read = async {
        let mut bytes = Vec::new();
        reading.read_to_end(&mut bytes).await.unwrap();
        bytes.split(|&byte| byte == b'\n').count() - 1
    };
    // Some 200 MB of answers pass through a queue of one.
    let ((), answers) =
        tokio::time::timeout(Duration::from_mins(1), async { tokio::join!(write, read) }).await.unwrap();
    assert_eq!(answers, 2000);
}
