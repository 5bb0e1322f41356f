//! A disk that fills up: a clear error, nothing corrupt, nothing lost, and on it goes when there is space again.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::time::{Duration, Instant};

use drover_e2e::cli::{Ran, json, json_lines, ok, run};
use drover_e2e::mounts::LoopDisk;
use drover_e2e::sure::must;
use drover_testkit::cluster::{Cluster, processes_of, signal};
use drover_testkit::{skip, this_test};
use rusqlite::OpenFlags;
use rustix::process::Signal;
use serde_json::Value;

fn events_of(cluster: &Cluster) -> Vec<Value> {
    must(json_lines(cluster, &["events", "--since", "0", "--json"]))
}

/// Every prompt that was acknowledged has come to one end.
fn each_ends_once(events: &[Value]) {
    for ack in events.iter().filter(|event| event["event"] == "inject_ack") {
        let ends = events.iter().filter(|event| {
            event["injection_id"] == ack["injection_id"]
                && (event["event"] == "turn_complete" || event["event"] == "inject_failed")
        });
        assert_eq!(ends.count(), 1, "{ack}");
    }
}

fn check_database(cluster: &Cluster) {
    // The router, which may still run, keeps every other program out with a lock; a look that writes nothing needs none.
    let (file, flags) = (cluster.state().path().join("router/router.sqlite"), OpenFlags::SQLITE_OPEN_READ_ONLY);
    let database = rusqlite::Connection::open_with_flags_and_vfs(file, flags, c"unix-none").unwrap();
    database.pragma_update(None, "locking_mode", "EXCLUSIVE").unwrap();
    let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

/// Injects again and again until it works.
async fn until_injected(cluster: &Cluster, swarm: &str, prompt: &str) -> Ran {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ran = must(run(cluster, &["inject", swarm, "--prompt", prompt]));
        if ran.code == 0 {
            return ran;
        }
        assert!(Instant::now() < deadline, "no recovery: {}\n{}", ran.stderr, cluster.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A prompt is refused with the reason and the way out, while everything that only reads goes on.
async fn refused_aloud(cluster: &Cluster, swarm: &str, prompt: &str) {
    let refused = must(run(cluster, &["inject", swarm, "--prompt", prompt]));
    assert_eq!(refused.code, 1, "{}{}", refused.stdout, refused.stderr);
    let what = ["router.sqlite", "audit.jsonl"].iter().any(|file| refused.stderr.contains(file));
    assert!(what, "what cannot be written: {}", refused.stderr);
    assert!(refused.stderr.contains("make it writable"), "what to do: {}", refused.stderr);
    let status = must(json(cluster, &["status", swarm, "--json"]));
    assert_eq!(status["status"], "running", "nothing is given up: {status}");
    let why = must(ok(cluster, &["why", swarm])).stdout;
    assert!(why.contains("cannot write its"), "{why}");
    let info = cluster.router().get_info(drover_proto::router::GetInfoRequest {}).await.unwrap().into_inner();
    assert!(!info.store_error.is_empty(), "{info:?}");
}

/// First a state directory in which nothing may be changed any more, and then again may; then a disk that fails and takes
/// the whole file system with it, as the kernel does it with a real one.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_turns_read_only_under_a_running_router_is_said_and_survived() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a file system on a loop device");
        return;
    }
    let mut cluster = must(Cluster::prepare("worker: {agent: echo, drain_grace: 2s}"));
    let disk = match LoopDisk::mount(&cluster.dir().join("disk.img"), cluster.state().path(), 64) {
        Ok(disk) => disk,
        Err(why) => return skip(&this_test(), &format!("needs a loop device: {why:#}")),
    };
    must(cluster.up().await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    must(ok(&cluster, &["inject", &swarm, "--prompt", "before"]));
    let router = cluster.daemon("router").unwrap().pid;

    // A turn is under way when it happens; its words are kept by the worker until they can be written.
    let mut turn = cluster.command(&["inject", &swarm, "--node", "0", "--prompt", "under way\n@echo delay=3s"]);
    let turn = turn.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let begun = |events: &[Value]| events.iter().filter(|event| event["event"] == "turn_started").count() == 3;
    while !begun(&events_of(&cluster)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    must(disk.immutable(true));
    refused_aloud(&cluster, &swarm, "while nothing can be written").await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    refused_aloud(&cluster, &swarm, "still").await;
    must(disk.immutable(false));
    let after = until_injected(&cluster, &swarm, "after").await;
    assert_eq!(after.stdout.matches("after").count(), 2, "{}", after.stdout);
    let turn = Ran::from(turn.wait_with_output().unwrap());
    assert!(turn.code == 0 && turn.stdout.contains("under way"), "{}{}", turn.stdout, turn.stderr);
    assert_eq!(cluster.daemon("router").unwrap().pid, router, "nobody had to start it again");
    let events = events_of(&cluster);
    each_ends_once(&events);
    assert_eq!(events.iter().filter(|event| event["event"] == "inject_ack").count(), 5, "a refused prompt is none");

    must(disk.fail());
    refused_aloud(&cluster, &swarm, "the disk is gone").await;
    let _ = cluster.down();
    for pid in processes_of(cluster.state().path()) {
        signal(pid, Signal::KILL).unwrap();
    }
    while !processes_of(cluster.state().path()).is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    must(disk.repair());
    must(cluster.up().await);
    assert!(events_of(&cluster).starts_with(&events), "everything that was told once is there");
    until_injected(&cluster, &swarm, "on a disk that was repaired").await;
    each_ends_once(&events_of(&cluster));
    check_database(&cluster);
    must(ok(&cluster, &["terminate", &swarm]));
    assert!(must(cluster.down()).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_survived() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a small file system");
        return;
    }
    let (cluster, disk) = must(Cluster::start_on_small_disk("{}", 24).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--agent", "echo", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    must(ok(&cluster, &["inject", &swarm, "--prompt", "before"]));

    must(disk.fill());
    // Megabytes cannot fit into what is left anywhere, so this prompt cannot be taken.
    let large = cluster.dir().join("large.txt");
    std::fs::write(&large, "x".repeat(3 << 20)).unwrap();
    let refused = must(run(&cluster, &["inject", &swarm, "--prompt-file", large.to_str().unwrap()]));
    assert_eq!(refused.code, 1, "{}{}", refused.stdout, refused.stderr);
    let said = refused.stderr.to_lowercase();
    assert!(said.contains("space") || said.contains("full") || said.contains("disk"), "{}", refused.stderr);
    must(ok(&cluster, &["list"]));

    must(disk.free());
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let after = must(run(&cluster, &["inject", &swarm, "--prompt", "after"]));
        if after.code == 0 {
            assert_eq!(after.stdout.matches("after").count(), 2, "{}", after.stdout);
            break;
        }
        assert!(Instant::now() < deadline, "no recovery: {}\n{}", after.stderr, cluster.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    each_ends_once(&events_of(&cluster));
    check_database(&cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_state_directory_is_said() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a file system read-only");
        return;
    }
    let (mut cluster, disk) = must(Cluster::start_on_small_disk("{}", 24).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "1", "--agent", "echo", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    must(ok(&cluster, &["terminate", &swarm]));
    assert!(must(cluster.down()).success());
    must(disk.read_only(true));
    let refused = must(run(&cluster, &["up"]));
    assert_eq!(refused.code, 1, "{}{}", refused.stdout, refused.stderr);
    let said = refused.stderr.to_lowercase();
    assert!(said.contains("read-only") && said.contains("state"), "{}", refused.stderr);
    must(disk.read_only(false));
    must(cluster.up().await);
    let status = must(json(&cluster, &["status", &swarm, "--json"]));
    assert_eq!(status["status"], "terminated", "what was written before is there");
}
