//! Keys of the configuration whose effect shows only in a whole instance.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{must, wait_for};
use drover_proto::common::LaunchSpec;
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::{OpenSession, SendRequest};
use drover_proto::router::launch_swarm_response::Step;
use drover_proto::router::{InjectRequest, LaunchSwarmRequest};
use drover_testkit::cluster::{Cluster, program};
use serde_json::Value;

/// Ports that were free a moment ago.
fn free_ports<const N: usize>() -> [SocketAddr; N] {
    let held: Vec<TcpListener> = (0..N).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    std::array::from_fn(|index| held[index].local_addr().unwrap())
}

fn answers_healthz(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer.starts_with("HTTP/1.1 200")
}

/// Sends one command to the control plane and gives the first line that comes back; empty when the connection ends.
fn ask(address: &str, command: &str, request_id: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let line =
        format!("{{\"protocol\":\"codeswarm.router.v1\",\"command\":\"{command}\",\"request_id\":\"{request_id}\"}}\n");
    let _ = stream.write_all(line.as_bytes());
    let mut answer = String::new();
    let _ = BufReader::new(stream).read_line(&mut answer);
    answer
}

fn launch(cluster: &Cluster, nodes: &str) -> String {
    let launched = must(json(cluster, &["launch", "--nodes", nodes, "--detach", "--json"]));
    launched["swarm_id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_daemon_listens_where_it_is_told() {
    let [router, control, allocator, follower, worker] = free_ports();
    let config = format!(
        "router: {{listen: '{router}', control_listen: '{control}'}}\nallocator: {{listen: '{allocator}'}}\n\
         follower: {{listen: '{follower}'}}\nworker: {{listen: '{worker}', agent: echo}}\n"
    );
    let cluster = must(Cluster::start(&config).await);
    for (name, address) in [("router", router), ("allocator", allocator), ("follower", follower)] {
        assert!(answers_healthz(address), "the {name} does not answer at {address}");
    }
    assert!(ask(&control.to_string(), "swarm_list", "r1").contains("\"r1\""), "no control plane at {control}");
    launch(&cluster, "1");
    wait_for("the worker's own port", || answers_healthz(worker).then_some(()));
}

fn segments(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries.filter(|entry| entry.as_ref().is_ok_and(|e| e.path().extension().is_some_and(|end| end == "jsonl"))).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_segments_are_as_configured() {
    let cluster =
        must(Cluster::start("worker: {agent: echo, segment_bytes: 1KiB}\nfollower: {segment_bytes: 1KiB}\n").await);
    let swarm = launch(&cluster, "1");
    let prompt = "x".repeat(700);
    for _ in 0..4 {
        let said = must(ok(&cluster, &["inject", &swarm, "--prompt", &prompt]));
        assert!(said.stdout.contains(&prompt), "the echo agent answers what it was sent: {}", said.stdout);
    }
    let node = cluster.state().path().join("mailbox").join(&swarm).join("00");
    for stream in ["inbox", "outbox/1"] {
        assert!(segments(&node.join(stream)) > 2, "{stream} has {} segments", segments(&node.join(stream)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lines_and_slow_readers_are_cut_off_as_configured() {
    let config = "worker: {agent: echo}\nrouter: {max_line_bytes: 1KiB, subscriber_max_bytes: 64KiB}\n";
    let cluster = must(Cluster::start(config).await);
    let control = must(cluster.control_addr());
    assert!(ask(&control, "swarm_list", &"r".repeat(500)).contains("rrr"), "a line that is short enough is answered");
    let refused = ask(&control, "swarm_list", &"r".repeat(1500));
    assert!(refused.contains("longer than 1024 bytes"), "a longer one ends the connection and says why: {refused}");

    let mut slow = TcpStream::connect(&control).unwrap();
    let swarm = launch(&cluster, "1");
    // Socket buffers of both sides take some megabytes; this is several times that.
    must(ok(&cluster, &["inject", &swarm, "--prompt", "@echo deltas=1500 size=16000"]));
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut got = Vec::new();
    let ended = slow.read_to_end(&mut got);
    let total = 1500 * 16_000;
    assert!(got.len() < total, "a reader that waits got all {} bytes ({ended:?})", got.len());
    assert!(
        ended.is_ok() || ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset),
        "the slow connection was not closed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_termination_waits_as_long_as_configured() {
    let cluster = must(
        Cluster::start("worker: {agent: echo, drain_grace: 30s}\nrouter: {graceful_terminate_timeout: 2s}\n").await,
    );
    let swarm = launch(&cluster, "1");
    let mut asking = cluster.command(&["inject", &swarm, "--prompt", "@echo delay=60s"]).spawn().unwrap();
    wait_for("the turn to begin", || {
        let events = must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
        events.iter().any(|event| event["event"] == "turn_started").then_some(())
    });
    let began = Instant::now();
    must(ok(&cluster, &["terminate", &swarm]));
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1900), "it did not wait for the turn: {took:?}");
    assert!(took < Duration::from_secs(15), "it waited for longer than configured: {took:?}");
    asking.wait().unwrap();
}

/// A codex that notes how it was started and is the fake app-server then.
fn noting_codex(dir: &Path) -> (PathBuf, PathBuf) {
    let (script, notes) = (dir.join("codex"), dir.join("notes.txt"));
    let fake = must(program("fake-app-server"));
    let text = format!(
        "#!/bin/sh\nprintf '%s|%s|%s\\n' \"$*\" \"$CARGO_PKG_NAME\" \"$CARGO_PKG_VERSION\" >> '{}'\nexec '{}' \"$@\"\n",
        notes.display(),
        fake.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    (script, notes)
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_is_started_as_configured() {
    let dir = tempfile::tempdir().unwrap();
    let (codex, notes) = noting_codex(dir.path());
    let config = format!(
        "worker:\n  agent: codex\n  codex_bin: {}\n  codex_args: [-c, drover_test=1]\n  agent_env: [CARGO_PKG_NAME]\n  \
         max_agent_restarts: 1\n  max_restarts: 0\n",
        codex.display()
    );
    let cluster = must(Cluster::start(&config).await);
    let swarm = launch(&cluster, "1");
    let starts = || {
        let text = fs::read_to_string(&notes).unwrap_or_default();
        text.lines().filter(|line| line.contains("app-server")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = starts();
    for line in &before {
        let parts: Vec<&str> = line.split('|').collect();
        assert!(parts[0].contains("-c drover_test=1"), "codex_args are missing: {line}");
        assert_eq!(parts[1..], ["drover-e2e", ""], "only variables of agent_env reach codex: {line}");
    }
    // It crashes, comes back once, crashes again, and is given up.
    for _ in 0..2 {
        must(run(&cluster, &["inject", &swarm, "--prompt", "@mock crash"]));
    }
    let node = wait_for("the node to be given up", || {
        let status = must(json(&cluster, &["status", &swarm, "--json"]));
        Some(status["nodes"][0].clone()).filter(|node| node["state"] == "failed")
    });
    assert_eq!(starts().len(), before.len() + 1, "codex was started again once: {node}");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_events_make_room_as_configured() {
    for keep in ["keep_events: 20", "keep_events_for: 1s"] {
        let mut cluster = must(Cluster::start(&format!("worker: {{agent: echo}}\nrouter: {{{keep}}}\n")).await);
        let swarm = launch(&cluster, "1");
        must(ok(&cluster, &["inject", &swarm, "--prompt", "@echo deltas=200 size=20"]));
        let seqs = |cluster: &Cluster| -> Vec<u64> {
            let events = must(json_lines(cluster, &["events", "--since", "0", "--json"]));
            events.iter().filter_map(|event| event["seq"].as_u64()).collect()
        };
        let before = seqs(&cluster);
        assert!(before.len() > 200, "{} events", before.len());
        // What is old is looked for now and then, and at each start.
        must(cluster.down());
        must(cluster.up().await);
        let kept = wait_for("old events to go", || Some(seqs(&cluster)).filter(|kept| kept.len() < 60));
        assert!(kept.first() > before.first() && kept.last() >= before.last(), "{keep}: the oldest go, the last stays");
    }
}

/// A collector of traces: keeps each export as it came over the wire.
fn collect_traces(dir: &Path) -> (drover_service::Context, SocketAddr, tokio::sync::mpsc::Receiver<Bytes>) {
    let (exports_in, exports) = tokio::sync::mpsc::channel(64);
    let take = move |export: Bytes| {
        let exports = exports_in.clone();
        async move {
            let _ = exports.send(export).await;
            ([("content-type", "application/grpc"), ("grpc-status", "0")], "")
        }
    };
    let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let ctx = drover_service::Context::for_test("collector", dir);
    let listener =
        must(ctx.bind("the collector", Some("127.0.0.1:0".parse().unwrap()), "127.0.0.1:0".parse().unwrap()));
    let routes = axum::Router::new().route(path, axum::routing::post(take));
    let address = must(drover_service::Server::new(&ctx).http(routes).serve(listener));
    (ctx, address, exports)
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// One trace covers the request, the daemons that the router asks for it, the turn at the worker, and what the router learnt of it.
#[tokio::test(flavor = "multi_thread")]
async fn traces_go_where_they_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (collector, endpoint, mut exports) = collect_traces(dir.path());
    let config = format!("worker: {{agent: echo}}\ntelemetry: {{otlp_endpoint: 'http://{endpoint}'}}\n");
    let cluster = must(Cluster::start(&config).await);
    // A launch is one trace with what the allocator does for it.
    let launched = [0xc3_u8; 16];
    let mut call = tonic::Request::new(LaunchSwarmRequest {
        spec: Some(LaunchSpec { node_count: 1, ..LaunchSpec::default() }),
        ..LaunchSwarmRequest::default()
    });
    let traceparent = format!("00-{:032x}-1111111111111111-01", u128::from_be_bytes(launched));
    call.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    let mut steps = cluster.router().launch_swarm(call).await.unwrap().into_inner();
    let mut swarm = String::new();
    while let Some(step) = steps.message().await.unwrap() {
        if let Some(Step::Launched(told)) = step.step {
            swarm = told.swarm_id;
        }
    }
    // One asker names its trace in the request, another one in the metadata of its call.
    let traces = [[0xa1_u8; 16], [0xb2_u8; 16], launched, [0xd4_u8; 16]];
    let hex = |trace: [u8; 16]| format!("{:032x}", u128::from_be_bytes(trace));
    for (index, trace) in traces[..2].iter().enumerate() {
        let traceparent = format!("00-{}-1111111111111111-01", hex(*trace));
        let mut request =
            InjectRequest { swarm_id: swarm.clone(), content: "hello".into(), ..InjectRequest::default() };
        let mut call = tonic::Request::new(InjectRequest::default());
        if index == 0 {
            request.traceparent = traceparent;
        } else {
            call.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
        }
        *call.get_mut() = request;
        let mut answers = cluster.router().inject(call).await.unwrap().into_inner();
        while answers.message().await.unwrap().is_some() {}
    }

    // What is said in a session goes through the router to the node that has it.
    let target = drover_service::Target::Daemon { state: cluster.state().clone(), name: "router".to_owned() };
    let mut door = HandoffServiceClient::new(drover_service::connect(target));
    let begun = Instant::now();
    loop {
        let mut call = tonic::Request::new(SendRequest {
            session_id: "traced".to_owned(),
            request_id: "r1".to_owned(),
            prompt: "hello".to_owned(),
            open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
            ..SendRequest::default()
        });
        let traceparent = format!("00-{}-1111111111111111-01", hex(traces[3]));
        call.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
        // The node may not have told yet that it takes sessions.
        let status = match door.send(call).await {
            Ok(answer) => {
                let mut answer = answer.into_inner();
                while answer.message().await.unwrap().is_some() {}
                break;
            }
            Err(status) => status,
        };
        assert!(begun.elapsed() < Duration::from_secs(30), "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let mut wanted: Vec<(&str, &str, usize)> = vec![
        ("drover-router", "Send", 3),
        ("drover-handoff-coordinator", "session_turn", 3),
        ("drover-router", "LaunchSwarm", 2),
        ("drover-slurm-allocator", "EnsureAllocation", 2),
        ("drover-router", "inject", 0),
        ("drover-router", "Inject", 1),
    ];
    for index in 0..2 {
        wanted.extend([
            ("drover-outbox-follower", "Deliver", index),
            ("drover-worker", "turn", index),
            ("drover-router", "turn_complete", index),
        ]);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while !wanted.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let export = tokio::time::timeout(left, exports.recv()).await;
        let export = export.unwrap_or_else(|_| panic!("no spans of {wanted:?}")).unwrap();
        wanted.retain(|(service, span, trace)| {
            ![service.as_bytes(), span.as_bytes(), &traces[*trace]].iter().all(|part| holds(&export, part))
        });
    }
    let outbox = cluster.state().path().join("mailbox").join(&swarm).join("00/outbox/1/00000001.jsonl");
    let ends: Vec<String> = (fs::read_to_string(outbox).unwrap().lines())
        .filter(|line| line.contains("\"turn_complete\"") && line.contains("\"trace\""))
        .map(str::to_owned)
        .collect();
    for trace in &traces[..2] {
        let trace = *trace;
        let end = ends.iter().find(|line| line.contains(&hex(trace))).expect("the record names its trace");
        assert!(!end.contains("1111111111111111"), "it names the turn's own span: {end}");
    }
    collector.shutdown().cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_of_which_nothing_comes_up_fails_after_the_configured_time() {
    let dir = tempfile::tempdir().unwrap();
    let codex = dir.path().join("codex");
    fs::write(&codex, "#!/bin/sh\nexec sleep 600\n").unwrap();
    fs::set_permissions(&codex, fs::Permissions::from_mode(0o755)).unwrap();
    let config = format!(
        "worker: {{agent: codex, codex_bin: {}}}\nrouter: {{launch_soft_timeout: 1s, launch_hard_timeout: 2s}}\n",
        codex.display()
    );
    let cluster = must(Cluster::start(&config).await);
    let began = Instant::now();
    let ran = must(run(&cluster, &["launch", "--nodes", "1", "--detach", "--agent", "codex", "--json"]));
    let took = began.elapsed();
    assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
    assert!(took >= Duration::from_millis(1900) && took < Duration::from_secs(15), "{took:?}");
    let listed: Value = must(json(&cluster, &["list", "--json"]));
    assert_eq!(listed[0]["status"], "failed", "{listed}");
}
