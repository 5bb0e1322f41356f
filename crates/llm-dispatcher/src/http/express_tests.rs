//! The short way, over real connections, with a real pool behind it.

use std::time::Duration;

use drover_service::Express as _;
use drover_testkit::mock_llm::Settings as MockSettings;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::tests::{TOKEN, World, chat, world};

/// What came back of a connection: the bytes that are for the routes, or nothing when it ended.
type Rest = oneshot::Receiver<Option<Vec<u8>>>;

async fn connect(world: &World) -> (TcpStream, Rest) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (theirs, _) = listener.accept().await.unwrap();
    let (tell, rest) = oneshot::channel();
    let served = std::sync::Arc::clone(&world.express).serve(theirs, world.ctx.shutdown().clone());
    world.ctx.spawn("connection", async move {
        let _ = tell.send(served.await.map(|(_, bytes)| bytes.to_vec()));
    });
    (ours, rest)
}

fn post(body: &Value, more: &str) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         authorization: Bearer {TOKEN}\r\n{more}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn answer(stream: &mut TcpStream) -> (String, Value) {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(text).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    (head, serde_json::from_slice(&body).unwrap())
}

/// Whatever goes wrong, a test ends.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_mins(1), work).await.expect("it takes for ever")
}

#[tokio::test]
async fn requests_of_one_connection_are_answered_in_their_order_however_their_bytes_come() {
    let world = world(MockSettings::default(), None).await;
    let (mut stream, rest) = connect(&world).await;
    let said = |word: &str| chat(&format!("[[say:{word}]]"));
    soon(async {
        stream.write_all(post(&said("one"), "").as_bytes()).await.unwrap();
        let (head, body) = answer(&mut stream).await;
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\ndate: ") && !head.contains("simulated"),
            "{head}"
        );
        assert_eq!(body["choices"][0]["message"]["content"], "one");
        assert_eq!((&body["object"], &body["drover"]["provider"]), (&json!("chat.completion"), &json!("local")));
        // Two at once, and a third byte by byte.
        let both = post(&said("two"), "") + &post(&said("three"), "x-drover-client: somebody\r\n");
        stream.write_all(both.as_bytes()).await.unwrap();
        for byte in post(&said("four"), "").bytes() {
            stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        for word in ["two", "three", "four"] {
            assert_eq!(answer(&mut stream).await.1["choices"][0]["message"]["content"], word);
        }
        drop(stream);
        assert_eq!(rest.await.unwrap(), None);
    })
    .await;
    assert_eq!(world.mock.ledger().calls, 4);
}

#[tokio::test]
async fn what_fails_is_told_as_the_routes_tell_it() {
    let world = world(MockSettings::default(), None).await;
    let body = chat("[[status:400]]");
    let (mut stream, _rest) = connect(&world).await;
    let (head, said) = soon(async {
        stream.write_all(post(&body, "").as_bytes()).await.unwrap();
        answer(&mut stream).await
    })
    .await;
    let (status, theirs) = world.post_json("/v1/chat/completions", &body).await;
    assert!(
        head.starts_with(&format!("HTTP/1.1 {} ", status.as_str())) && head.contains("x-should-retry: false"),
        "{head}"
    );
    assert_eq!(said, theirs);
}

#[tokio::test]
async fn what_is_not_for_here_comes_back_whole_and_nothing_was_done_about_it() {
    let world = world(MockSettings::default(), None).await;
    let good = post(&chat("x"), "");
    let streamed = json!({"model": "small", "messages": [{"role": "user", "content": "x"}], "stream": true});
    let unknown = json!({"model": "no/such/model/at/all", "messages": []});
    let long = post(&json!({"model": "small", "messages": [{"role": "user", "content": "x".repeat(2 << 20)}]}), "");
    for request in [
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
        post(&streamed, ""),
        post(&unknown, ""),
        post(&json!({"model": 1}), ""),
        post(&chat("x"), "origin: https://evil.example\r\n"),
        post(&chat("x"), "expect: 100-continue\r\n"),
        good.replace(TOKEN, "guessed"),
        good.replace("host: localhost", "host: evil.example"),
        good.replace("HTTP/1.1", "HTTP/1.0"),
        good.replace("/v1/chat/completions", "/v1/chat/completions?x=y"),
        long,
    ] {
        let (mut stream, rest) = connect(&world).await;
        let short: String = request.chars().take(300).collect();
        let came = soon(async {
            // Of a long one only the beginning is taken from the socket here.
            let (sent, rest) = tokio::join!(stream.write_all(&request.as_bytes()[..request.len().min(64 << 10)]), rest);
            sent.unwrap();
            rest.unwrap()
        })
        .await;
        let came = came.unwrap_or_else(|| panic!("it was not given back: {short}"));
        assert!(request.as_bytes().starts_with(&came) && !came.is_empty(), "{short}");
    }
    assert_eq!(world.mock.ledger().calls, 0);
}

#[tokio::test]
async fn who_goes_away_takes_the_call_along() {
    let world = world(MockSettings { latency_ms: 60_000.0, ..MockSettings::default() }, None).await;
    let (mut stream, rest) = connect(&world).await;
    soon(async {
        stream.write_all(post(&chat("x"), "").as_bytes()).await.unwrap();
        while world.mock.ledger().in_flight == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(stream);
        assert_eq!(rest.await.unwrap(), None);
        while world.mock.ledger().in_flight > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(world.mock.ledger().aborted, 1);
}

#[tokio::test]
async fn a_daemon_that_stops_ends_connections_that_wait() {
    let world = world(MockSettings::default(), None).await;
    let (_stream, rest) = connect(&world).await;
    tokio::task::yield_now().await;
    world.ctx.shutdown().cancel();
    assert_eq!(soon(rest).await.unwrap(), None);
}
