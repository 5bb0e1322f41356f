//! Certificates that are expired, foreign or revoked, at the gRPC of every daemon that takes nodes: each is refused, and both sides say
//! which certificate it was, why, and what to do.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, ok};
use drover_e2e::sure::must;
use drover_proto::handoff::GetStatusRequest;
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_service::pki::{Authority, Identity, IdentityHandle};
use drover_service::{address_book, connect_node, now_us, why};
use drover_testkit::cluster::{Cluster, scratch_dir};

const PATIENCE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

/// A daemon that takes nodes.
#[derive(Debug)]
struct Server {
    addr: SocketAddr,
    /// What its certificate must say that it is.
    node: String,
}

impl Server {
    /// Calls it as this node. Whoever is let in is told that this is not served here.
    async fn call(&self, identity: Identity) -> Result<(), String> {
        let channel = connect_node(&IdentityHandle::new(identity), self.addr, &self.node);
        let called = HandoffServiceClient::new(channel).get_status(GetStatusRequest {}).await;
        match called {
            Ok(_) => Ok(()),
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(()),
            Err(status) => Err(why(&status)),
        }
    }
}

/// Waits until each daemon that takes nodes runs.
async fn servers(cluster: &Cluster, swarm: &str) -> Vec<Server> {
    let begun = Instant::now();
    loop {
        let entries = address_book::list(cluster.state());
        let found = ["gossip-membership-", "handoff-coordinator-", "llm-dispatcher"].map(|kind| {
            let entry = entries.iter().find(|entry| entry.name.starts_with(kind))?;
            let node = if kind == "llm-dispatcher" { kind.to_owned() } else { format!("{swarm}/0") };
            Some(Server { addr: entry.listen.parse().ok()?, node })
        });
        if found.iter().all(Option::is_some) {
            return found.into_iter().flatten().collect();
        }
        assert!(begun.elapsed() < PATIENCE, "{found:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Everything that daemons of this instance have logged.
fn logs(dir: &Path, all: &mut String) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            logs(&path, all);
        } else if path.extension().is_some_and(|kind| kind == "log") {
            all.push_str(&fs::read_to_string(path).unwrap_or_default());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_foreign_and_revoked_certificates_are_refused_and_both_sides_say_so() {
    let config = "worker: {agent: echo, run_tasks: true}\nnode_scaling: {listen: 127.0.0.1:0, provider: {name: sim}}\n";
    let cluster = must(Cluster::start(config).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "1", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap();
    let servers = servers(&cluster, swarm).await;
    let ours = Authority::open_or_create(cluster.state()).unwrap();
    let other = scratch_dir("certificates-").unwrap();
    let theirs = Authority::open_or_create_at(&other.path().join("pki")).unwrap();

    // Who belongs here comes in, so that the test can fail.
    for server in &servers {
        assert_eq!(server.call(ours.issue("visitor/0", HOUR).unwrap()).await, Ok(()), "{server:?}");
    }
    let kept = other.path().join("kept");
    ours.issue("visitor/1", HOUR).unwrap().store(&kept).unwrap();
    for server in &servers {
        assert_eq!(server.call(Identity::load(&kept).unwrap()).await, Ok(()), "{server:?}");
    }
    must(ok(&cluster, &["pki", "revoke", "visitor/1"]));

    let now = now_us() / 1_000_000;
    let expired = || ours.issue_between("visitor/2", now - 7200, now - 3600).unwrap();
    // It trusts us, so that it is the daemon that refuses.
    let strange = other.path().join("strange");
    theirs.issue("visitor/3", HOUR).unwrap().store(&strange).unwrap();
    fs::copy(cluster.state().path().join("pki/ca.crt"), strange.join("ca.crt")).unwrap();
    let foreign = || Identity::load(&strange).unwrap();
    let revoked = || Identity::load(&kept).unwrap();
    let cases: [(&str, &dyn Fn() -> Identity, &str, &str); 3] = [
        ("visitor/1", &revoked, "which was revoked", "was revoked: if the node is to come back, `drover pki issue"),
        ("visitor/2", &expired, "which has expired", "has expired ("),
        ("visitor/3", &foreign, "which is from another instance", "is not from this instance: another one issued it"),
    ];
    for server in &servers {
        for (node, identity, to_client, in_log) in &cases {
            let begun = Instant::now();
            // What was revoked reaches the daemons within seconds; and each says so in its log once a second at most.
            loop {
                let told = server.call(identity()).await.err().unwrap_or_default();
                let mut log = String::new();
                logs(cluster.state().path(), &mut log);
                let at = format!("listen={}", server.addr);
                let logged = log.lines().any(|line| {
                    line.contains(&at)
                        && line.contains(&format!(" of {node} {in_log}"))
                        && line.contains("certificate ")
                });
                let client_knows = told
                    .contains(&format!("{} at {}: it refuses our certificate ", server.node, server.addr))
                    && told.contains(&format!(" of {node}, {to_client}"));
                if client_knows && logged {
                    break;
                }
                assert!(begun.elapsed() < PATIENCE, "{node} at {server:?} was told {told:?}; the log:\n{log}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        assert_eq!(server.call(ours.issue("visitor/0", HOUR).unwrap()).await, Ok(()), "{server:?}");
    }
}
