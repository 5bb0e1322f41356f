//! The door with the mailbox behind it, where the test plays the dispatcher.

use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_dispatcher::pool::{Answers, pool_dir};
use drover_mailbox::StreamWriter;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

struct World {
    door: Door,
    root: PathBuf,
    ctx: Context,
    _dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
    }
}

async fn world() -> World {
    world_with(Times::default()).await
}

async fn world_with(times: Times) -> World {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("worker", dir.path());
    let root = dir.path().join("mailbox");
    let plan = Plan {
        ctx: ctx.clone(),
        node_id: "sw/0".to_owned(),
        mailbox: root.clone(),
        identity: None,
        way: "auto".to_owned(),
        address: None,
        times,
    };
    World { door: plan.open().await.unwrap(), root, ctx, _dir: dir }
}

fn request(world: &World, path: &str, token: &str, more: &str, body: &str) -> String {
    let (addr, length) = (world.door.addr, body.len());
    let method = if body.is_empty() { "GET" } else { "POST" };
    format!(
        "{method} {path} HTTP/1.1\r\nhost: {addr}\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n\
         connection: close\r\n{more}\r\n{body}"
    )
}

async fn send(world: &World, request: &str) -> TcpStream {
    let mut stream = TcpStream::connect(world.door.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn read(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8(text).unwrap()
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..6000 {
        if let Some(found) = look() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what}: not within 30 s");
}

fn asked(root: &Path) -> Vec<(String, Value)> {
    let entries = std::fs::read_dir(pool_dir(root).join("asks")).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.'));
    files
        .filter_map(|name| {
            let text = std::fs::read(pool_dir(root).join("asks").join(&name)).ok()?;
            Some((name.strip_suffix(".json")?.to_owned(), serde_json::from_slice(&text).ok()?))
        })
        .collect()
}

fn line(seq: u64, kind: &str, data: &Value) -> String {
    json!({"v": 1, "seq": seq, "ts": 1, "job_id": "", "node_id": 0, "gen": 0, "type": kind, "data": data}).to_string()
        + "\n"
}

#[tokio::test]
async fn only_the_agent_is_let_in_and_only_to_the_pool() {
    let world = world().await;
    let token = world.door.token();
    for (path, token, more, status) in [
        ("/v1/responses", "", "", 401),
        ("/v1/responses", "0000", "", 401),
        ("/v1/responses", token.reveal(), "origin: http://localhost\r\n", 403),
        ("/status", token.reveal(), "", 404),
        ("/v1/models", token.reveal(), "", 404),
    ] {
        let answer = read(send(&world, &request(&world, path, token, more, "{}")).await).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path} {more}: {answer}");
    }
    let foreign = request(&world, "/v1/responses", token.reveal(), "", "{}")
        .replace(&format!("host: {}", world.door.addr), "host: evil.example");
    assert!(read(send(&world, &foreign).await).await.starts_with("HTTP/1.1 403"));
    assert!(asked(&world.root).is_empty(), "nothing of it was carried");
    assert_eq!((format!("{:?}", world.door.token()), token.reveal().len()), ("Token(…)".to_owned(), 64));
}

#[tokio::test]
async fn an_answer_comes_as_it_grows_and_the_request_goes_when_it_is_whole() {
    let world = world().await;
    let stream =
        send(&world, &request(&world, "/v1/responses", world.door.token().reveal(), "", "{\"input\":\"x\"}")).await;
    let (key, ask) = until("the request", || asked(&world.root).pop()).await;
    assert_eq!((&ask["body"], &ask["node"]), (&json!("{\"input\":\"x\"}"), &json!("sw/0")));
    assert!(!ask.to_string().contains(world.door.token().reveal()), "the token stays on the node");
    let mut writer = StreamWriter::open(Answers::of(&world.root).dir(&key), 1 << 20).unwrap();
    let head = json!({"status": 200, "headers": [["content-type", "text/event-stream"]]});
    writer.append(line(1, "head", &head).as_bytes()).unwrap();
    writer.append(line(2, "body", &json!({"text": "data: one\n\n"})).as_bytes()).unwrap();
    writer.append(line(2, "wait", &json!({})).as_bytes()).unwrap();
    writer
        .append(
            (line(3, "body", &json!({"text": "data: two\n\n"})) + &line(4, "end", &json!({"error": ""}))).as_bytes(),
        )
        .unwrap();
    let answer = read(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("text/event-stream"), "{answer}");
    assert!(answer.contains("data: one") && answer.contains("data: two") && answer.ends_with("0\r\n\r\n"), "{answer}");
    until("the request to go", || asked(&world.root).is_empty().then_some(())).await;
}

#[tokio::test]
async fn an_agent_that_goes_away_takes_its_request_with_it() {
    let world = world().await;
    let asking = request(&world, "/v1/responses", world.door.token().reveal(), "", "{\"input\":\"x\"}");
    let stream = send(&world, &asking).await;
    let (key, _) = until("the request", || asked(&world.root).pop()).await;
    drop(stream);
    until("the request to go", || asked(&world.root).is_empty().then_some(())).await;

    // Also in the middle of the answer.
    let mut stream = send(&world, &asking).await;
    let (second, _) = until("the request", || asked(&world.root).pop()).await;
    assert_ne!(key, second, "one that was given up is not taken up again");
    let mut writer = StreamWriter::open(Answers::of(&world.root).dir(&second), 1 << 20).unwrap();
    writer.append(line(1, "head", &json!({"status": 200, "headers": []})).as_bytes()).unwrap();
    writer.append(line(2, "body", &json!({"text": "begun"})).as_bytes()).unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("begun") {
        assert!(stream.read_buf(&mut text).await.unwrap() > 0);
    }
    drop(stream);
    until("the request to go", || asked(&world.root).is_empty().then_some(())).await;
}

/// The dispatcher falls silent in the middle of an answer. The agent gets an error, asks again, and is given the answer of the
/// same exchange from its beginning.
#[tokio::test]
async fn what_broke_is_taken_up_by_the_agents_next_try() {
    let secs = Duration::from_secs;
    let world = world_with(Times { patience: secs(3), silent: secs(2), ..Times::default() }).await;
    let asking = request(&world, "/v1/responses", world.door.token().reveal(), "", "{\"input\":\"x\"}");
    let stream = send(&world, &asking).await;
    let (key, _) = until("the request", || asked(&world.root).pop()).await;
    let dir = Answers::of(&world.root).dir(&key);
    let mut writer = StreamWriter::open(&dir, 1 << 20).unwrap();
    writer.append(line(1, "head", &json!({"status": 200, "headers": []})).as_bytes()).unwrap();
    writer.append(line(2, "body", &json!({"text": "begun "})).as_bytes()).unwrap();
    let answer = read(stream).await;
    assert!(answer.contains("begun") && !answer.ends_with("0\r\n\r\n"), "it must not look whole: {answer}");
    assert_eq!(asked(&world.root).len(), 1, "the exchange is kept");

    let stream = send(&world, &asking).await;
    writer
        .append((line(3, "body", &json!({"text": "and ended"})) + &line(4, "end", &json!({"error": ""}))).as_bytes())
        .unwrap();
    let answer = read(stream).await;
    assert!(answer.contains("begun ") && answer.contains("and ended") && answer.ends_with("0\r\n\r\n"), "{answer}");
    until("the request to go", || asked(&world.root).is_empty().then_some(())).await;
}

#[tokio::test]
async fn without_a_dispatcher_there_is_an_error_that_says_so_and_nothing_is_left_to_be_paid() {
    let secs = Duration::from_secs;
    let world = world_with(Times { patience: secs(1), found: secs(1), ..Times::default() }).await;
    let asking = request(&world, "/v1/responses", world.door.token().reveal(), "", "{\"input\":\"x\"}");
    let answer = read(send(&world, &asking).await).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-should-retry: true"), "{answer}");
    assert!(answer.contains("pool_unreachable") && answer.contains("no dispatcher"), "{answer}");
    assert!(asked(&world.root).is_empty());
}
