//! Certificates by hand: made, listed, renewed and revoked while nodes run with them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, ok, run};
use drover_e2e::sure::must;
use drover_testkit::cluster::Cluster;
use serde_json::Value;

/// A revoked member is dead to the others after their timeouts, which are those of a real network.
const PATIENCE: Duration = Duration::from_secs(90);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Serial number and state of every certificate of a node, oldest first.
fn certificates(cluster: &Cluster, node: &str) -> Vec<(String, String)> {
    let list = must(json(cluster, &["pki", "list", "--json"]));
    let text = |issued: &Value, name: &str| issued[name].as_str().unwrap().to_owned();
    let of_node = list.as_array().unwrap().iter().filter(|issued| issued["node_id"] == node);
    of_node.map(|issued| (text(issued, "serial"), text(issued, "state"))).collect()
}

fn states(cluster: &Cluster) -> Vec<String> {
    let members = must(json(cluster, &["members", "--json"]));
    members.as_array().unwrap().iter().map(|member| member["state"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_issued_renewed_and_revoked_by_hand_while_nodes_run() {
    let config = "worker: {agent: echo}\nswarm: {discovery: {gossip_interval: 200ms, node_timeout: 3s}}\n";
    let cluster = must(Cluster::start(config).await);
    let made = must(json(&cluster, &["pki", "init", "--json"]));
    assert_eq!(must(json(&cluster, &["pki", "init", "--json"])), made, "a second time makes no other one");
    must(ok(&cluster, &["pki", "issue", "spare/0", "--to", "spare", "--days", "1"]));
    let dir = cluster.dir().join("spare");
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(dir.join("node.key")).unwrap().permissions().mode() & 0o777, 0o600);
    let again = must(run(&cluster, &["pki", "issue", "spare/0", "--to", "spare"]));
    assert!(again.code == 1 && again.stderr.contains("rotate"), "{}", again.stderr);
    must(ok(&cluster, &["pki", "rotate", "spare", "--revoke"]));
    let spare = certificates(&cluster, "spare/0");
    assert_eq!(spare.iter().map(|(_, state)| state.as_str()).collect::<Vec<_>>(), ["revoked", "good"]);
    let unknown = must(run(&cluster, &["pki", "revoke", "nobody"]));
    assert!(unknown.code == 1 && unknown.stderr.contains("pki list"), "{}", unknown.stderr);

    let launched = must(json(&cluster, &["launch", "--nodes", "3", "--prompt", "hello", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap();
    until("three members", || states(&cluster) == ["alive"; 3]);
    let before = certificates(&cluster, &format!("{swarm}/1"));
    must(ok(&cluster, &["pki", "rotate"]));
    let after = certificates(&cluster, &format!("{swarm}/1"));
    assert_eq!((after.len(), after[..before.len()] == before[..]), (before.len() + 1, true));
    // Long enough for a member that is not believed any more to be given up.
    let quiet = Instant::now() + Duration::from_secs(5);
    while Instant::now() < quiet {
        assert!(states(&cluster).iter().all(|state| state != "dead"), "fresh keys cut a member off");
        std::thread::sleep(Duration::from_millis(200));
    }
    until("three members with fresh keys", || states(&cluster) == ["alive"; 3]);

    must(ok(&cluster, &["pki", "revoke", &format!("{swarm}/1")]));
    assert!(certificates(&cluster, &format!("{swarm}/1")).iter().all(|(_, state)| state == "revoked"));
    // What was revoked before stays so.
    assert_eq!(certificates(&cluster, "spare/0")[0].1, "revoked");
    until("the others to give it up", || {
        let list = states(&cluster);
        list.iter().filter(|state| *state == "alive").count() == 2
    });
    must(ok(&cluster, &["inject", swarm, "--node", "0", "--prompt", "the others go on"]));
}
