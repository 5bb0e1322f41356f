//! A disk that fills up: a clear error, nothing corrupt, nothing lost, and on it goes when there is space again.

use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_testkit::cluster::Cluster;
use drover_testkit::{skip, this_test};

fn must<T>(result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}"))
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
    let events = must(json_lines(&cluster, &["events", "--since", "0", "--json"]));
    let acked: Vec<_> = events.iter().filter(|event| event["event"] == "inject_ack").collect();
    for ack in &acked {
        let ends = events.iter().filter(|event| {
            event["injection_id"] == ack["injection_id"]
                && (event["event"] == "turn_complete" || event["event"] == "inject_failed")
        });
        assert_eq!(ends.count(), 1, "{ack}");
    }
    let database = rusqlite::Connection::open(cluster.state().path().join("router/router.sqlite")).unwrap();
    let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
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
