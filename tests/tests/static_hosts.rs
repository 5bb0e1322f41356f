//! Hosts of one's own: the static backend, with workers that this test starts and starts again, as a supervisor does.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{must, wait_until};
use drover_testkit::cluster::{Cluster, signal};
use rustix::process::Signal;
use serde_json::Value;

fn start(cluster: &Cluster, host: &str) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(cluster.dir().join(format!("{host}.log")));
    let mut command = cluster.command(&["daemon", "worker", "--static", "--host", host]);
    command.stdin(Stdio::null()).stderr(log.unwrap()).spawn().unwrap()
}

fn nodes(cluster: &Cluster, swarm: &str) -> Vec<Value> {
    must(json(cluster, &["status", swarm, "--json"]))["nodes"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_of_ones_own_take_their_nodes_and_come_back() {
    let config = "cluster: {backend: static, hosts: [h1, h2], workspace_root: shared}\n\
                  worker: {agent: echo, drain_grace: 1s}\n";
    let cluster = must(Cluster::start(config).await);
    let mut workers: Vec<Child> = ["h1", "h2"].map(|host| start(&cluster, host)).into();

    let refused = must(run(&cluster, &["launch", "--nodes", "3", "--detach"]));
    assert_eq!(refused.code, 1, "{}{}", refused.stdout, refused.stderr);
    for words in ["3 hosts are needed", "2 are free: h1, h2", "cluster.hosts"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }

    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "hello"]));
    assert_eq!(said.stdout.matches("hello").count(), 2, "{}", said.stdout);
    let before = nodes(&cluster, &swarm);
    assert_eq!(before[1]["pid"], workers[1].id(), "the node runs in the process that its supervisor started");

    // Its supervisor starts what was killed; nobody else does.
    signal(workers[1].id(), Signal::KILL).unwrap();
    workers[1].wait().unwrap();
    workers[1] = start(&cluster, "h2");
    let now = workers[1].id();
    wait_until("the next generation of node 1", || nodes(&cluster, &swarm)[1]["pid"] == now);
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "still there"]));
    assert_eq!(said.stdout.matches("still there").count(), 2, "{}", said.stdout);
    assert_eq!(nodes(&cluster, &swarm)[0]["pid"], before[0]["pid"], "the other one was left alone");

    let busy = must(run(&cluster, &["launch", "--nodes", "1", "--detach"]));
    assert!(busy.code == 1 && busy.stderr.contains(&format!("h1 (swarm {swarm})")), "{}", busy.stderr);

    let began = Instant::now();
    must(ok(&cluster, &["terminate", &swarm]));
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "hosts say themselves that they are free: {:?}",
        began.elapsed()
    );
    let events = must(json_lines(&cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
    let byes = events.iter().filter(|event| event["event"] == "worker_bye").count();
    assert_eq!(byes, 2, "each worker took its leave");

    // The same processes take the next swarm.
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "once more"]));
    assert_eq!(said.stdout.matches("once more").count(), 2, "{}", said.stdout);
    for worker in &mut workers {
        assert!(worker.try_wait().unwrap().is_none(), "a worker did not outlive its first node");
        signal(worker.id(), Signal::TERM).unwrap();
        assert_eq!(worker.wait().unwrap().code(), Some(0));
    }
}
