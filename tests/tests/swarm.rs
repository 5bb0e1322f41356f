//! A local swarm as its user meets it: the real program, real daemons, real workers.

use std::process::Command;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_service::process;
use drover_testkit::cluster::{Cluster, DAEMONS, processes_of, program, scratch_dir, signal};
use rustix::process::Signal;
use serde_json::Value;

fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn launch_inject_status_events_terminate() {
    let cluster = must(Cluster::start("{}").await);
    let launched = must(json(
        &cluster,
        &["launch", "--nodes", "4", "--agent", "echo", "--prompt", "You are a test.", "--detach", "--json"],
    ));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    for field in ["job_id", "node_count", "system_prompt", "status", "slurm_state", "partition", "time", "nodes"] {
        assert!(launched.get(field).is_some(), "{field} is missing: {launched}");
    }
    assert_eq!(launched["node_count"], 4);

    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "hello to everyone"]));
    assert_eq!(said.stdout.matches("hello to everyone").count(), 4, "one answer per node:\n{}", said.stdout);

    let status = must(json(&cluster, &["status", &swarm[..8], "--json"]));
    assert_eq!((status["status"].as_str(), status["slurm_state"].as_str()), (Some("running"), Some("RUNNING")));
    let nodes = status["nodes"].as_array().unwrap();
    let indices: Vec<_> = nodes.iter().map(|node| node["node_id"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert!(nodes.iter().all(|node| node["state"] == "idle" && node["host"].is_string()), "{status}");

    let events = must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
    let seqs: Vec<_> = events.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert!(seqs.windows(2).all(|pair| pair[0] < pair[1]), "in order: {seqs:?}");
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    // Two prompts, the first one and ours, on four nodes.
    for name in ["inject_ack", "inject_delivered", "turn_started", "assistant", "turn_complete"] {
        assert_eq!(count(name), 8, "{name}");
    }
    for event in &events {
        assert_eq!(event["swarm_id"], Value::String(swarm.clone()));
        assert!(event["data"].is_object() && event["timestamp"].is_string(), "{event}");
    }

    assert_eq!(must(json(&cluster, &["list", "--json"])).as_array().map(Vec::len), Some(1));
    must(ok(&cluster, &["terminate", &swarm]));
    let status = must(json(&cluster, &["status", &swarm, "--json"]));
    assert_eq!(status["status"], "terminated");
    assert!(status["nodes"].as_array().unwrap().iter().all(|node| node["state"] == "exited"), "{status}");

    let refused = must(run(&cluster, &["inject", &swarm, "--prompt", "too late"]));
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("terminated"), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn swarms_outlive_the_daemons_and_a_dead_node_comes_back() {
    let mut cluster = must(Cluster::start("worker: {restart_delay: 50ms}").await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--agent", "echo", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let pids = |cluster: &Cluster| -> Vec<u64> {
        let status = must(json(cluster, &["status", &swarm, "--json"]));
        status["nodes"].as_array().unwrap().iter().map(|node| node["pid"].as_u64().unwrap_or(0)).collect()
    };
    let before = pids(&cluster);

    assert_eq!(must(cluster.down()).code(), Some(0), "up drains and exits 0");
    assert!(before.iter().all(|&pid| process::of(pid as u32).is_some()), "workers go on without daemons");
    must(cluster.up().await);
    assert_eq!(pids(&cluster), before, "the same workers are found again");
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "still there"]));
    assert_eq!(said.stdout.matches("still there").count(), 2, "{}", said.stdout);

    signal(before[1] as u32, Signal::KILL).unwrap();
    wait_for("a new worker for node 1", Duration::from_secs(10), || {
        let now = pids(&cluster);
        now[0] == before[0] && now[1] != before[1] && now[1] != 0
    });
    let said = must(ok(&cluster, &["inject", &swarm, "--node", "1", "--prompt", "and you"]));
    assert_eq!(said.stdout.matches("and you").count(), 1, "{}", said.stdout);
    let events = must(json_lines(&cluster, &["events", "--since", "0", "--json"]));
    assert!(events.iter().any(|event| event["event"] == "node_restarted" && event["node_id"] == 1), "said aloud");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_under_up_is_restarted_and_a_second_up_is_refused() {
    let cluster = must(Cluster::start("{}").await);
    for daemon in DAEMONS {
        let before = cluster.daemon(daemon).unwrap();
        signal(before.pid, Signal::KILL).unwrap();
        wait_for(daemon, Duration::from_secs(10), || cluster.daemon(daemon).is_some_and(|now| now != before));
    }
    must(cluster.wait_ready(Duration::from_secs(10)).await);
    let second = must(run(&cluster, &["up"]));
    assert_ne!(second.code, 0);
    assert!(second.stderr.contains("pid"), "names who runs: {}", second.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_swarms_of_four_and_two_instances_share_a_host() {
    let (one, two) = (must(Cluster::start("{}").await), must(Cluster::start("{}").await));
    let mut swarms = Vec::new();
    for cluster in [&one, &one, &two] {
        let launched = must(json(cluster, &["launch", "--nodes", "4", "--agent", "echo", "--detach", "--json"]));
        swarms.push(launched["swarm_id"].as_str().unwrap().to_owned());
    }
    assert_ne!(must(one.control_addr()), must(two.control_addr()));
    for (cluster, swarm) in [(&one, &swarms[0]), (&one, &swarms[1]), (&two, &swarms[2])] {
        let said = must(ok(cluster, &["inject", swarm, "--prompt", &format!("for {swarm}")]));
        assert_eq!(said.stdout.matches(&format!("for {swarm}")).count(), 4, "{}", said.stdout);
    }
    let foreign = must(run(&two, &["status", &swarms[0]]));
    assert_eq!(foreign.code, 1);
    assert!(foreign.stderr.contains("drover list"), "says what to do: {}", foreign.stderr);
}

/// Another user's instance on the same host: it works, and neither side gets into the other.
#[tokio::test(flavor = "multi_thread")]
async fn two_users_share_a_host_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        drover_testkit::skip(&drover_testkit::this_test(), "needs root to become another user");
        return;
    }
    let mine = must(Cluster::start("{}").await);
    let home = must(scratch_dir("other-user-"));
    std::os::unix::fs::chown(home.path(), Some(65534), Some(65534)).unwrap();
    let drover = must(program("drover"));
    let as_other = |args: &[&str]| {
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
            .arg(&drover)
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", home.path())
            .env("DROVER_STATE_DIR", home.path().join("state"))
            .current_dir(home.path())
            .output()
            .unwrap();
        drover_e2e::cli::Ran::from(output)
    };
    // The first command starts the other user's own daemons, on other ports than mine.
    let launched = as_other(&["launch", "--nodes", "1", "--agent", "echo", "--detach", "--json"]);
    let guard = Processes(home.path().join("state"));
    assert_eq!(launched.code, 0, "{}{}", launched.stdout, launched.stderr);
    let entry = std::fs::read_to_string(home.path().join("state/run/router.json")).unwrap();
    let entry: Value = serde_json::from_str(&entry).unwrap();
    assert_ne!(entry["control"].as_str().unwrap(), must(mine.control_addr()));

    let my_router = drover_service::address_book::read(mine.state(), "router").unwrap().listen;
    let intruding = as_other(&["list", "--router", &my_router]);
    assert_eq!(intruding.code, 69, "{}{}", intruding.stdout, intruding.stderr);
    let prying = as_other(&["list", "--json"]);
    assert_eq!(prying.code, 0, "{}", prying.stderr);
    drop(guard);
}

/// Ends what another user's instance left running.
struct Processes(std::path::PathBuf);

impl Drop for Processes {
    fn drop(&mut self) {
        for pid in processes_of(&self.0) {
            let _ = signal(pid, Signal::KILL);
        }
    }
}
