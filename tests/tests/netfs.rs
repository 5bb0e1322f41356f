//! File systems that behave like those of a cluster: seen by two clients, with attributes that may be seconds old and
//! changes that nobody is told of.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok};
use drover_e2e::mounts::{FuseMount, fuse};
use drover_e2e::sure::must;
use drover_testkit::cluster::{self, Cluster, program, signal};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

/// Older than any attribute may be, three times over, for each of the two ways.
const PATIENCE: Duration = Duration::from_secs(45);

const NODES: usize = 3;
const ROUNDS: usize = 4;

/// Every prompt has one acknowledgement, one start and one end; answers are whole.
fn check_events(events: &[Value], prompts: usize) {
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    let acked = of("inject_ack");
    assert_eq!(acked.len(), prompts, "{events:?}");
    for ack in acked {
        for name in ["turn_started", "assistant", "turn_complete"] {
            let mine = of(name).into_iter().filter(|event| event["injection_id"] == ack["injection_id"]);
            assert_eq!(mine.count(), 1, "{name} of {ack}");
        }
    }
    let numbers: Vec<u64> = events.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    assert!(of("mailbox_damage").is_empty(), "{events:?}");
}

/// The log of a daemon that `up` runs.
fn log(cluster: &Cluster) -> String {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    read(&cluster.dir().join("up.log")) + &read(&cluster.state().path().join("logs/router.log"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_on_a_network_file_system_is_noticed_and_works() {
    if let Err(why) = fuse() {
        return skip(&this_test(), &why);
    }
    let mut cluster = must(Cluster::prepare("worker: {agent: echo}"));
    let source = cluster.dir().join("source");
    fs::create_dir(&source).unwrap();
    fs::set_permissions(&source, fs::Permissions::from_mode(0o700)).unwrap();
    let state = cluster.state().path().to_owned();
    let _mount = must(FuseMount::mount(&source, &state, 3));
    assert_eq!(drover_mailbox::is_network_fs(&state).unwrap(), Some("fuse"));
    must(cluster.up().await);

    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "over the network"])).stdout;
    assert_eq!(said.matches("over the network").count(), 2, "{said}");
    assert!(log(&cluster).contains("network file system"), "{}", cluster.logs());

    // No shared memory, no log beside the file: the database itself says so in its header, and another look is refused.
    let database = source.join("router/router.sqlite");
    let header = fs::read(&database).unwrap();
    assert_eq!((header[18], header[19]), (1, 1), "a rollback journal and no write-ahead log");
    assert!(!source.join("router/router.sqlite-wal").exists() && !source.join("router/router.sqlite-shm").exists());

    // A router that is killed comes back, and the past is still told.
    let killed = cluster.daemon("router").unwrap().pid;
    signal(killed, Signal::KILL).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while cluster.daemon("router").is_none_or(|router| router.pid == killed) {
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    must(cluster.wait_ready(PATIENCE).await);
    must(ok(&cluster, &["inject", &swarm, "--node", "1", "--prompt", "and again"]));
    check_events(&must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"])), 3);
    must(ok(&cluster, &["terminate", &swarm]));
    assert!(must(cluster.down()).success(), "{}", cluster.logs());
    let database = rusqlite::Connection::open(&database).unwrap();
    let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

/// The two sides see the mailbox through mounts of their own, as a login node and a compute node do: neither is told of
/// what the other writes, and each believes for seconds that a file is as long as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_between_two_clients_with_old_attributes_loses_nothing() {
    if let Err(why) = fuse() {
        return skip(&this_test(), &why);
    }
    let dir = must(cluster::scratch_dir("netfs-"));
    let [source, login, compute] = ["source", "login", "compute"].map(|name| dir.path().join(name));
    for path in [&source, &login, &compute] {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let _login = must(FuseMount::mount(&source, &login, 3));
    let _compute = must(FuseMount::mount(&source, &compute, 3));
    // Small segments, so that they rotate while both sides look.
    let config = format!(
        "worker: {{agent: echo, segment_bytes: 4KiB}}\nfollower: {{segment_bytes: 4KiB}}\ncluster: {{workspace_root: {}}}\n",
        login.display()
    );
    let cluster = must(Cluster::prepare(&config));
    let worker = dir.path().join("worker");
    let script = format!(
        "#!/bin/sh\nDROVER_MAILBOX={}/mailbox exec {} daemon worker \"$@\"\n",
        compute.display(),
        program("drover").unwrap().display()
    );
    fs::write(&worker, script).unwrap();
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
    let mut up = cluster.command(&["up"]);
    up.env("DROVER_WORKER_BIN", &worker).stdin(Stdio::null()).stdout(Stdio::null());
    up.stderr(fs::File::create(cluster.dir().join("up.log")).unwrap());
    let mut up = up.spawn().unwrap();
    must(cluster.wait_ready(PATIENCE).await);

    let count = NODES.to_string();
    let launched = must(json(&cluster, &["launch", "--nodes", &count, "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let prompt = format!("round {round} {}", "x".repeat(1500));
        let said = must(ok(&cluster, &["inject", &swarm, "--prompt", &prompt])).stdout;
        assert_eq!(said.matches(&format!("round {round}")).count(), NODES, "{said}");
        assert!(begun.elapsed() < PATIENCE, "round {round} took {:?}", begun.elapsed());
    }
    // A worker dies with its file in the middle of things; its successor and the follower agree on where to go on.
    let status = must(json(&cluster, &["status", &swarm, "--json"]));
    let pid = status["nodes"][0]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL).unwrap();
    must(ok(&cluster, &["inject", &swarm, "--node", "0", "--prompt", "after the end"]));
    let events = must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
    check_events(&events, NODES * ROUNDS + 1);
    must(ok(&cluster, &["terminate", &swarm]));
    cluster::end(&mut up, Duration::from_secs(10));
}
