//! How fast. Each test asserts that nothing is lost, prints the rate, and asks only for a fraction of the goal of a
//! release build, so that it holds in a debug build on a busy machine.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::fake::{Knobs, Plane, within};

/// The id in a line, without parsing the line.
fn id_in(line: &str) -> Option<&str> {
    let (_, after) = line.split_once("\"request_id\":\"")?;
    after.split('"').next()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_connections_with_thirty_two_requests_each_under_way() {
    const ROUNDS: usize = 40;
    let plane = Plane::start(Knobs::default());
    for _ in 0..5 {
        plane.fake.add_swarm(4);
    }
    let one = async |client: usize| {
        let stream = TcpStream::connect(plane.addr).await.unwrap();
        let (reading, mut writing) = stream.into_split();
        let mut lines = BufReader::new(reading).lines();
        for round in 0..ROUNDS {
            let mut waiting = BTreeSet::new();
            let mut asks = String::new();
            for number in 0..32 {
                let id = format!("{client}-{round}-{number}");
                asks += r#"{"protocol":"codeswarm.router.v1","command":"swarm_list","request_id":""#;
                asks += &id;
                asks += "\"}\n";
                waiting.insert(id);
            }
            writing.write_all(asks.as_bytes()).await.unwrap();
            while !waiting.is_empty() {
                let line = within(lines.next_line()).await.unwrap().unwrap();
                assert!(waiting.remove(id_in(&line).unwrap()), "{line}");
            }
        }
    };
    let begin = Instant::now();
    futures::future::join_all((0..16).map(one)).await;
    let rate = (16 * 32 * ROUNDS) as f64 / begin.elapsed().as_secs_f64();
    println!("{rate:.0} requests/s");
    assert!(rate > 1000.0, "{rate:.0} requests/s");
}

#[tokio::test]
async fn one_connection_one_request_at_a_time() {
    let plane = Plane::start(Knobs::default());
    plane.fake.add_swarm(4);
    let mut connection = plane.connect().await;
    let mut took = Vec::new();
    for _ in 0..500 {
        let ask = super::list();
        let begin = Instant::now();
        super::answer_to(&mut connection, &ask).await;
        took.push(begin.elapsed());
    }
    took.sort();
    println!("median {:?}, p99 {:?}", took[250], took[495]);
    assert!(took[250].as_millis() < 20, "median {:?}", took[250]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_subscribers_get_every_event() {
    const EVENTS: usize = 5000;
    let plane = Plane::start(Knobs::default());
    let swarm = plane.fake.add_swarm(1);
    let mut streams = Vec::new();
    for _ in 0..16 {
        let connection = plane.connect().await;
        streams.push(BufReader::with_capacity(1 << 16, connection.stream));
    }
    let data = vec![json!({"content": "d".repeat(280)}); EVENTS];
    let begin = Instant::now();
    plane.fake.say_many("assistant_delta", &swarm, 0, &data);
    let read = async |stream: &mut BufReader<TcpStream>| {
        let mut line = Vec::new();
        for seq in 1..=EVENTS {
            line.clear();
            within(stream.read_until(b'\n', &mut line)).await.unwrap();
            let marker = format!("\"seq\":{seq},");
            assert!(line.windows(marker.len()).any(|part| part == marker.as_bytes()));
        }
    };
    futures::future::join_all(streams.iter_mut().map(read)).await;
    let rate = (16 * EVENTS) as f64 / begin.elapsed().as_secs_f64();
    println!("{rate:.0} deliveries/s");
    assert!(rate > 5000.0, "{rate:.0} deliveries/s");
}
