//! Membership as the user of a swarm meets it: it is there by itself, tells what happens to nodes once, and never stands in the
//! way of an agent.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_proto::router::ListMembersRequest;
use drover_service::pki::{Authority, KeyRing};
use drover_service::process::{self, ProcessId};
use drover_service::{StateDir, address_book};
use drover_testkit::cluster::{Cluster, processes_of, signal};
use rustix::process::Signal;
use serde_json::Value;

/// Five times as fast as by default, so that a test need not wait for what takes seconds on purpose.
const FAST: &str = "swarm: {discovery: {gossip_interval: 200ms, node_timeout: 1s, dead_node_timeout: 10s}}\n";
/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(instead) => assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}, but {instead}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn launch(cluster: &Cluster, nodes: u32) -> String {
    let nodes = nodes.to_string();
    let launched = must(json(cluster, &["launch", "--nodes", &nodes, "--agent", "echo", "--detach", "--json"]));
    launched["swarm_id"].as_str().unwrap().to_owned()
}

fn members(cluster: &Cluster) -> Vec<Value> {
    must(json(cluster, &["members", "--json"])).as_array().unwrap().clone()
}

/// The state of every member, by gossip id.
fn states(cluster: &Cluster) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    members(cluster).iter().map(|member| (text(&member["node_id"]), text(&member["state"]))).collect()
}

/// Waits until exactly these nodes of the swarms are members, and alive.
fn all_alive(cluster: &Cluster, swarms: &[(&str, u32)]) {
    let wanted: BTreeMap<String, String> = swarms
        .iter()
        .flat_map(|(swarm, nodes)| (0..*nodes).map(move |index| (format!("{swarm}/{index}"), "alive".to_owned())))
        .collect();
    until("every node is alive", || {
        let seen = states(cluster);
        if seen == wanted { Ok(()) } else { Err(format!("{seen:?}")) }
    });
}

/// Events of the members of a swarm, as "NodeJoined 1", in order.
fn told(cluster: &Cluster, swarm: &str) -> Vec<String> {
    let events = must(json_lines(cluster, &["events", "--since", "0", "--swarm", swarm, "--json"]));
    events
        .iter()
        .filter(|event| {
            matches!(event["event"].as_str(), Some("NodeJoined" | "NodeLeft" | "NodeSuspect" | "NodeAlive"))
        })
        .map(|event| format!("{} {}", event["event"].as_str().unwrap(), event["node_id"]))
        .collect()
}

/// What was told of one node.
fn told_of(cluster: &Cluster, swarm: &str, node: u32) -> Vec<String> {
    let of_node = |line: &String| line.ends_with(&format!(" {node}"));
    told(cluster, swarm).into_iter().filter(of_node).map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// How a node came and went. A suspicion in between is left out: whether there is one before a node is found gone, or found
/// well, depends on how busy the machine is.
fn comings_and_goings(cluster: &Cluster, swarm: &str, node: u32) -> Vec<String> {
    let came_or_went = |what: &String| ["NodeJoined", "NodeLeft"].contains(&what.as_str());
    told_of(cluster, swarm, node).into_iter().filter(came_or_went).collect()
}

/// Waits until exactly these comings and goings of a node were told.
fn told_once(cluster: &Cluster, swarm: &str, node: u32, wanted: &[&str]) {
    until(&format!("node {node} is told of"), || {
        let seen = comings_and_goings(cluster, swarm, node);
        if seen == wanted { Ok(()) } else { Err(format!("{seen:?}")) }
    });
}

/// The membership daemon of a node.
fn daemon(state: &StateDir, swarm: &str, node: u32) -> Option<ProcessId> {
    let entry = address_book::read(state, &format!("gossip-membership-{swarm}+{node}"))?;
    Some(ProcessId { pid: entry.pid, start_time: entry.start_time })
}

fn daemon_of(cluster: &Cluster, swarm: &str, node: u32) -> ProcessId {
    until("the node has a membership daemon", || daemon(cluster.state(), swarm, node).ok_or("none".to_owned()))
}

fn worker_of(cluster: &Cluster, swarm: &str, node: usize) -> (u32, u64) {
    let status = must(json(cluster, &["status", swarm, "--json"]));
    let node = &status["nodes"][node];
    (node["pid"].as_u64().unwrap_or_default() as u32, node["generation"].as_u64().unwrap_or_default())
}

fn kill(id: ProcessId) {
    if process::is_alive(&id) {
        signal(id.pid, Signal::KILL).unwrap();
    }
}

async fn reporter(cluster: &Cluster) -> (String, u64) {
    let answer = cluster.router().list_members(ListMembersRequest::default()).await.unwrap().into_inner();
    (answer.reporter, answer.epoch)
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_members_by_themselves_and_go_with_their_swarm() {
    let cluster = must(Cluster::start("{}").await);
    let began = Instant::now();
    let swarm = launch(&cluster, 4);
    let answered = must(ok(&cluster, &["inject", &swarm, "--prompt", "hello"]));
    assert_eq!(answered.stdout.matches("hello").count(), 4, "{}", answered.stdout);
    all_alive(&cluster, &[(&swarm, 4)]);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(15), "known after {took:?}");

    let heard = until("the load of everybody is known", || {
        let all = members(&cluster);
        if all.iter().all(|member| member["load_score"].is_number()) { Ok(all) } else { Err(format!("{all:?}")) }
    });
    for (index, member) in heard.iter().enumerate() {
        assert_eq!((&member["swarm_id"], &member["node_index"]), (&swarm.clone().into(), &index.into()));
        assert_eq!(member["capabilities"]["agent"], "echo", "{member}");
        for field in ["addr", "port", "incarnation", "labels", "version", "timestamp"] {
            assert!(!member[field].is_null(), "{field} is missing: {member}");
        }
        assert_eq!(member["labels"]["generation"], "1", "{member}");
    }
    let status = must(json(&cluster, &["status", &swarm, "--json"]));
    let all = status["nodes"].as_array().unwrap();
    assert!(all.iter().all(|node| node["membership"]["state"] == "alive"), "{status}");
    let mut joined = told(&cluster, &swarm);
    joined.retain(|line| line.starts_with("NodeJoined") || line.starts_with("NodeLeft"));
    joined.sort();
    assert_eq!(joined, ["NodeJoined 0", "NodeJoined 1", "NodeJoined 2", "NodeJoined 3"]);

    must(ok(&cluster, &["terminate", &swarm]));
    until("the members go with their swarm", || {
        let left = members(&cluster);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    for node in 0..4 {
        told_once(&cluster, &swarm, node, &["NodeJoined", "NodeLeft"]);
        until("the daemon ends", || match daemon(cluster.state(), &swarm, node) {
            None => Ok(()),
            Some(id) => Err(format!("{id:?} runs")),
        });
    }
    let seeds = std::fs::read_dir(cluster.state().path().join("mailbox/gossip")).unwrap();
    let left: Vec<_> = seeds.map(|entry| entry.unwrap().file_name()).filter(|name| name != "voters.json").collect();
    assert!(left.is_empty(), "addresses of nodes that are gone: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_a_node_is_told_once() {
    let cluster = must(Cluster::start(FAST).await);
    let swarm = launch(&cluster, 4);
    all_alive(&cluster, &[(&swarm, 4)]);

    // Its daemon dies and is started again; the agent does not notice.
    let before = daemon_of(&cluster, &swarm, 1);
    kill(before);
    told_once(&cluster, &swarm, 1, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    all_alive(&cluster, &[(&swarm, 4)]);
    assert_ne!(daemon_of(&cluster, &swarm, 1), before);
    assert_eq!(worker_of(&cluster, &swarm, 1).1, 1, "the worker goes on");

    // Its daemon stands still and goes on: it was suspect. When it was the one that led, the next leader may find it gone
    // already; when the machine is slow, so may anybody.
    let stopped = daemon_of(&cluster, &swarm, 2);
    let led = reporter(&cluster).await.0 == format!("{swarm}/2");
    let known = told_of(&cluster, &swarm, 2).len();
    let since = || told_of(&cluster, &swarm, 2).split_off(known);
    signal(stopped.pid, Signal::STOP).unwrap();
    until("the silent node is told of", || {
        if since().is_empty() { Err("nothing") } else { Ok(()) }.map_err(str::to_owned)
    });
    signal(stopped.pid, Signal::CONT).unwrap();
    all_alive(&cluster, &[(&swarm, 4)]);
    until("what was told ends with a node that is there", || {
        let seen = since();
        let well = seen == ["NodeSuspect", "NodeAlive"]
            || seen == ["NodeSuspect", "NodeLeft", "NodeJoined"]
            || (led && seen == ["NodeLeft", "NodeJoined"]);
        if well { Ok(()) } else { Err(format!("led: {led}, {seen:?}")) }
    });

    // Its worker dies: the daemon goes with it, and both come back as the next generation.
    let (orphan, (pid, generation)) = (daemon_of(&cluster, &swarm, 3), worker_of(&cluster, &swarm, 3));
    signal(pid, Signal::KILL).unwrap();
    told_once(&cluster, &swarm, 3, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    all_alive(&cluster, &[(&swarm, 4)]);
    // It says good-bye before it ends, so its departure is known while it still tidies up.
    until("the daemon of a dead worker ends", || {
        if process::is_alive(&orphan) { Err(format!("{orphan:?} runs")) } else { Ok(()) }
    });
    let again = members(&cluster).into_iter().find(|member| member["node_index"] == 3).unwrap();
    assert_eq!(again["labels"]["generation"], (generation + 1).to_string(), "{again}");
    assert_eq!(comings_and_goings(&cluster, &swarm, 0), ["NodeJoined"], "nothing happened to this one");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_survive_the_one_who_reports_them_and_a_deaf_login_side() {
    let cluster = must(Cluster::start(FAST).await);
    let swarm = launch(&cluster, 5);
    all_alive(&cluster, &[(&swarm, 5)]);

    // Whoever reports dies, worker and daemon, and so does another in the same moment.
    let (id, _) = reporter(&cluster).await;
    let (of, index) = id.rsplit_once('/').unwrap();
    assert_eq!(of, swarm);
    let leader: u32 = index.parse().unwrap();
    let other = (leader + 1) % 5;
    let (lead, with) = (daemon_of(&cluster, &swarm, leader), daemon_of(&cluster, &swarm, other));
    signal(worker_of(&cluster, &swarm, leader as usize).0, Signal::KILL).unwrap();
    kill(lead);
    kill(with);
    for node in [leader, other] {
        told_once(&cluster, &swarm, node, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    }
    all_alive(&cluster, &[(&swarm, 5)]);

    // Nobody listens for a while.
    let router = cluster.daemon("router").unwrap();
    signal(router.pid, Signal::STOP).unwrap();
    let third = (leader + 2) % 5;
    let gone = daemon_of(&cluster, &swarm, third);
    kill(gone);
    until("the daemon is started again", || match daemon(cluster.state(), &swarm, third) {
        Some(id) if id != gone => Ok(()),
        other => Err(format!("{other:?}")),
    });
    signal(router.pid, Signal::KILL).unwrap();
    must(cluster.wait_ready(PATIENCE).await);
    told_once(&cluster, &swarm, third, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    all_alive(&cluster, &[(&swarm, 5)]);
    for node in 0..5 {
        let expected = if [leader, other, third].contains(&node) { 3 } else { 1 };
        let seen = comings_and_goings(&cluster, &swarm, node);
        assert_eq!(seen.len(), expected, "node {node}: {seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_swarms_are_one_cluster_and_end_each_for_itself() {
    let cluster = must(Cluster::start(FAST).await);
    let (one, two) = (launch(&cluster, 2), launch(&cluster, 2));
    all_alive(&cluster, &[(&one, 2), (&two, 2)]);
    must(ok(&cluster, &["terminate", &one]));
    all_alive(&cluster, &[(&two, 2)]);
    assert_eq!(comings_and_goings(&cluster, &two, 0), ["NodeJoined"]);
    let of_two = must(json(&cluster, &["members", &two, "--json"]));
    assert_eq!(of_two.as_array().map(Vec::len), Some(2), "{of_two}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_reach_every_node_before_they_are_used() {
    let cluster = must(Cluster::start(FAST).await);
    let swarm = launch(&cluster, 3);
    all_alive(&cluster, &[(&swarm, 3)]);
    let ring = || must(json(&cluster, &["keys", "list", "--json"]));
    let listed = || -> BTreeMap<String, (u64, bool)> {
        let text = |key: &Value| key["key_id"].as_str().map_or_else(|| key["key_id"].to_string(), str::to_owned);
        let all = ring()["keys"].as_array().unwrap().clone();
        all.iter().map(|key| (text(key), (key["nodes"].as_u64().unwrap(), key["in_use"] == true))).collect()
    };
    let first = until("every node has said which key it has", || match listed() {
        keys if keys.values().all(|(nodes, _)| *nodes == 3) && keys.len() == 1 => Ok(keys),
        keys => Err(format!("{keys:?}")),
    });
    let old = first.keys().next().unwrap().clone();
    must(ok(&cluster, &["keys", "add"]));
    let new = until("every node has the new key", || match listed() {
        keys if keys.len() == 2 && keys.values().all(|(nodes, _)| *nodes == 3) => {
            Ok(keys.keys().find(|id| **id != old).unwrap().clone())
        }
        keys => Err(format!("{keys:?}")),
    });
    must(ok(&cluster, &["keys", "use", &new]));
    until("the old key can be removed", || {
        let removed = must(run(&cluster, &["keys", "remove", &old]));
        if removed.code == 0 { Ok(()) } else { Err(removed.stderr) }
    });
    until("every node has forgotten it", || match listed() {
        keys if keys.len() == 1 && keys.get(&new) == Some(&(3, true)) => Ok(()),
        keys => Err(format!("{keys:?}")),
    });
    // Nobody was lost on the way, and one who comes back has the ring of the others.
    kill(daemon_of(&cluster, &swarm, 0));
    told_once(&cluster, &swarm, 0, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    all_alive(&cluster, &[(&swarm, 3)]);
    assert_eq!(comings_and_goings(&cluster, &swarm, 1), ["NodeJoined"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_want_it_has_none() {
    let cluster = must(Cluster::start("swarm: {enabled: false}\n").await);
    let swarm = launch(&cluster, 2);
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "alone"]));
    assert_eq!(said.stdout.matches("alone").count(), 2, "{}", said.stdout);
    assert!(members(&cluster).is_empty());
    let started = processes_of(cluster.state().path());
    let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let gossip: Vec<_> = started.iter().map(name).filter(|line| line.contains("gossip-membership")).collect();
    assert!(gossip.is_empty(), "{gossip:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_goes_on_when_its_membership_cannot() {
    // An address of documentation: nobody has it, so nobody can bind it.
    let cluster = must(Cluster::start("swarm: {bind_addr: 192.0.2.7}\n").await);
    let swarm = launch(&cluster, 2);
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "still here"]));
    assert_eq!(said.stdout.matches("still here").count(), 2, "{}", said.stdout);
    let why = until("why says so", || {
        let why = must(run(&cluster, &["why", &format!("{swarm}/0")]));
        if why.stdout.contains("192.0.2.7") { Ok(why.stdout) } else { Err(format!("{}{}", why.stdout, why.stderr)) }
    });
    assert!(why.contains("the agent goes on without"), "{why}");
    let doctor = must(run(&cluster, &["doctor", "--json"]));
    assert!(doctor.stdout.contains("192.0.2.7"), "{}{}", doctor.stdout, doctor.stderr);
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", "and still"]));
    assert_eq!(said.stdout.matches("and still").count(), 2, "{}", said.stdout);
}

/// A worker of a host of one's own, as a supervisor starts it; ended with the test.
struct Host(std::process::Child);

impl Host {
    fn start(cluster: &Cluster, name: &str) -> Self {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(cluster.dir().join(format!("{name}.log")));
        let mut command = cluster.command(&["daemon", "worker", "--static", "--host", name]);
        Self(command.stdin(std::process::Stdio::null()).stderr(log.unwrap()).spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_of_ones_own_are_members_too() {
    let config = format!("{FAST}cluster: {{backend: static, hosts: [h1, h2], workspace_root: shared}}\n");
    let cluster = must(Cluster::start(&config).await);
    let _one = Host::start(&cluster, "h1");
    let mut two = Host::start(&cluster, "h2");
    let swarm = launch(&cluster, 2);
    all_alive(&cluster, &[(&swarm, 2)]);
    told_once(&cluster, &swarm, 1, &["NodeJoined"]);
    assert!(!reporter(&cluster).await.0.is_empty(), "somebody leads and reports");

    // Its daemon dies: the worker beside it starts another.
    let before = daemon_of(&cluster, &swarm, 1);
    kill(before);
    told_once(&cluster, &swarm, 1, &["NodeJoined", "NodeLeft", "NodeJoined"]);
    all_alive(&cluster, &[(&swarm, 2)]);
    assert_ne!(daemon_of(&cluster, &swarm, 1), before);

    // The host goes, and its supervisor starts its worker again.
    let orphan = daemon_of(&cluster, &swarm, 1);
    two.kill();
    told_once(&cluster, &swarm, 1, &["NodeJoined", "NodeLeft", "NodeJoined", "NodeLeft"]);
    // It says good-bye before it ends, so its departure is known while it still tidies up.
    until("the daemon of a dead worker ends", || {
        if process::is_alive(&orphan) { Err(format!("{orphan:?} runs")) } else { Ok(()) }
    });
    let _two = Host::start(&cluster, "h2");
    all_alive(&cluster, &[(&swarm, 2)]);

    must(ok(&cluster, &["terminate", &swarm]));
    until("the members go with their swarm", || {
        let left = members(&cluster);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    for host in ["h1", "h2"] {
        let identity = cluster.dir().join(format!("shared/mailbox/static/{host}.identity"));
        until("the identity of the host is withdrawn", || {
            if identity.exists() { Err("it is there") } else { Ok(()) }.map_err(str::to_owned)
        });
    }
}

/// One answer of `/metrics` of a node's membership daemon.
async fn metrics(cluster: &Cluster, swarm: &str, node: u32) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let Some(entry) = address_book::read(cluster.state(), &format!("gossip-membership-{swarm}+{node}")) else {
        return String::new();
    };
    let mut text = String::new();
    let Ok(mut stream) = tokio::net::TcpStream::connect(&entry.listen).await else { return text };
    let _ = stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await;
    let _ = stream.read_to_string(&mut text).await;
    text
}

/// Each node gets a fault of its own: the log, `doctor` and the metrics of its daemon say which.
#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_node_out_is_said_in_log_doctor_and_metrics() {
    let cluster = must(Cluster::start(FAST).await);
    let swarm = launch(&cluster, 4);
    all_alive(&cluster, &[(&swarm, 4)]);
    let ours = Authority::open_at(&cluster.state().path().join("pki")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::open_or_create_at(&elsewhere.path().join("pki")).unwrap();
    let dir = |node: u32| cluster.state().path().join(format!("nodes/{swarm}/{node:02}"));
    let (name, hour) = (|node: u32| format!("{swarm}/{node}"), 3600);
    let now = drover_service::now_us() / 1_000_000;
    // Another key; another instance, which has got hold of the key; a certificate that is an hour ahead of this node's clock.
    let ring =
        |ring: &KeyRing, node: u32| std::fs::write(dir(node).join("identity/ring.json"), ring.to_json()).unwrap();
    ring(&KeyRing::generate().unwrap(), 1);
    theirs.issue(&name(2), Duration::from_secs(24 * hour)).unwrap().store(&dir(2).join("identity")).unwrap();
    ring(&ours.ring().unwrap(), 2);
    ours.issue_between(&name(3), now + hour, now + 48 * hour).unwrap().store(&dir(3).join("identity")).unwrap();
    for node in 1..4 {
        kill(daemon_of(&cluster, &swarm, node));
    }
    for (node, code, words) in [
        (1, "wrong_key", "the same key ring"),
        (2, "wrong_cluster", "belongs to another drover instance"),
        (3, "clock_off", "set the clocks"),
    ] {
        said_everywhere(&cluster, &swarm, node, code, words).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_that_does_not_answer_is_said_in_log_doctor_and_metrics() {
    let config = "swarm: {discovery: {gossip_interval: 200ms, node_timeout: 1s, join_addrs: ['127.0.0.1:1']}}\n";
    let cluster = must(Cluster::start(config).await);
    let swarm = launch(&cluster, 1);
    said_everywhere(&cluster, &swarm, 0, "seed_unreachable", "seed 127.0.0.1:1 does not answer").await;
}

/// Waits until `doctor` has these words, the log of the node's daemon has them with the code, and its metrics count the code.
async fn said_everywhere(cluster: &Cluster, swarm: &str, node: u32, code: &str, words: &str) {
    let log = cluster.state().path().join(format!("nodes/{swarm}/{node:02}/membership.log"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let doctor = must(run(cluster, &["doctor", "--json"])).stdout;
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let counted = metrics(cluster, swarm, node).await;
        let told = (
            doctor.contains(words),
            log.lines().any(|line| line.contains(&format!("code=\"{code}\"")) && line.contains(words)),
            counted.contains(&format!("drover_membership_notes{{code=\"{code}\"}} 1")),
        );
        if told == (true, true, true) {
            return;
        }
        assert!(Instant::now() < deadline, "{code} in doctor, log, metrics: {told:?}\n{doctor}\n{log}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
