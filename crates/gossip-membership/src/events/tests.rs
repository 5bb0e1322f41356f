use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use drover_config::EventHandlerConfig;

use super::*;

fn info(id: &str) -> NodeInfo {
    NodeInfo {
        id: id.to_owned(),
        addr: "10.0.0.1".to_owned(),
        port: 7946,
        agent_caps: [("model".to_owned(), "m".to_owned())].into(),
        load_score: 0.5,
        labels: [("swarm_id".to_owned(), "s".to_owned())].into(),
        timestamp: 7,
        version: "1".to_owned(),
    }
}

fn handler(json: serde_json::Value) -> EventHandlerConfig {
    serde_json::from_value(json).unwrap()
}

/// A program that appends what it is given to a file.
fn noting(dir: &Path) -> (String, std::path::PathBuf) {
    let (script, notes) = (dir.join("note"), dir.join("notes"));
    let text =
        format!("#!/bin/sh\n{{ echo \"$DROVER_EVENT $DROVER_EVENT_NODE_ID\"; cat; echo; }} >> '{}'\n", notes.display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    (script.display().to_string(), notes)
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Takes one request and gives its body.
fn hook() -> (String, std::sync::mpsc::Receiver<String>) {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", socket.local_addr().unwrap());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = socket.accept().unwrap();
        let mut got = Vec::new();
        let mut chunk = [0; 4096];
        while !String::from_utf8_lossy(&got).contains("\"event\"") {
            let n = stream.read(&mut chunk).unwrap();
            assert!(n > 0, "the request ended early");
            got.extend_from_slice(&chunk[..n]);
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").unwrap();
        let text = String::from_utf8(got).unwrap();
        tell.send(text[text.find("\r\n\r\n").unwrap() + 4..].to_owned()).unwrap();
    });
    (url, told)
}

#[tokio::test]
async fn handlers_get_their_events_with_their_payloads() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("events", dir.path());
    let metrics = Metrics::register(&ctx.registry());
    let (script, notes) = noting(dir.path());
    let (url, told) = hook();
    let config = EventsConfig {
        queue: 8,
        handlers: vec![
            handler(serde_json::json!({ "on": ["NodeJoined", "NodeLeft"], "command": [script] })),
            handler(serde_json::json!({ "on": ["NodeAlive"], "webhook": url })),
        ],
    };
    let events = Dispatcher::start(&config, &ctx, &metrics);
    events.publish(11, Kind::NodeJoined(info("s/1")));
    events.publish(12, Kind::NodeSuspect("s/1".to_owned()));
    events.publish(13, Kind::NodeAlive(info("s/1")));
    events.publish(14, Kind::NodeLeft("s/1".to_owned()));

    let text =
        until("both notes", || std::fs::read_to_string(&notes).ok().filter(|text| text.lines().count() == 4)).await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[2]), ("NodeJoined s/1", "NodeLeft s/1"));
    let joined: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
    assert_eq!(
        joined,
        serde_json::json!({ "seq": 1, "timestamp": 11, "event": "NodeJoined", "data": {
            "ID": "s/1", "Addr": "10.0.0.1", "Port": 7946, "AgentCaps": { "model": "m" }, "LoadScore": 0.5,
            "Labels": { "swarm_id": "s" }, "Timestamp": 7, "Version": "1",
        }})
    );
    let left: serde_json::Value = serde_json::from_str(lines[3]).unwrap();
    assert_eq!(left, serde_json::json!({ "seq": 4, "timestamp": 14, "event": "NodeLeft", "data": { "NodeID": "s/1" }}));
    let posted = until("the webhook", || told.try_recv().ok()).await;
    let posted: serde_json::Value = serde_json::from_str(&posted).unwrap();
    assert_eq!((&posted["seq"], &posted["event"]), (&3.into(), &"NodeAlive".into()));

    let seen: Vec<_> = events.log().after(1).iter().map(|event| (event.seq, event.kind.name())).collect();
    assert_eq!(seen, [(2, "NodeSuspect"), (3, "NodeAlive"), (4, "NodeLeft")]);
    ctx.shutdown().cancel();
}

#[tokio::test]
async fn a_handler_that_hangs_holds_up_nothing_and_loses_the_oldest() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("events", dir.path());
    let metrics = Metrics::register(&ctx.registry());
    let (script, notes) = noting(dir.path());
    // The first hangs, and so does what it started; both are to go when its timeout is over.
    let pid = dir.path().join("pid");
    let hang = format!("sleep 600 & echo $! > '{}'; wait", pid.display());
    let config = EventsConfig {
        queue: 2,
        handlers: vec![
            handler(serde_json::json!({ "command": ["sh", "-c", hang], "timeout": "300ms" })),
            handler(serde_json::json!({ "command": [script] })),
            handler(serde_json::json!({ "command": ["/no/such/program"] })),
        ],
    };
    let events = Dispatcher::start(&config, &ctx, &metrics);
    let began = Instant::now();
    events.publish(0, Kind::NodeLeft("first".to_owned()));
    let child = until("the hanging program", || std::fs::read_to_string(&pid).ok()?.trim().parse::<u32>().ok()).await;
    for index in 0..50 {
        events.publish(0, Kind::NodeLeft(format!("n{index}")));
    }
    assert!(began.elapsed() < Duration::from_secs(5), "publishing waited");
    assert_eq!(events.log().after(0).len(), 51, "the log has all of them");
    let text = until("the last event at the handler that works", || {
        std::fs::read_to_string(&notes).ok().filter(|text| text.contains("n49") && text.ends_with("}\n"))
    })
    .await;
    assert!(text.contains("n48") && !text.contains("n30"), "the newest stay, the oldest go: {text}");
    until("the timeout", || (metrics.handled_so_far("timeout") >= 1).then_some(())).await;
    let gone = || !drover_service::process::of(child).is_some_and(|id| drover_service::process::is_alive(&id));
    until("what the handler started to be gone", || gone().then_some(())).await;
    assert!(metrics.handled_so_far("failed") >= 1, "a program that is not there");
    assert!(metrics.handled_so_far("dropped") >= 40);
    ctx.shutdown().cancel();
}
