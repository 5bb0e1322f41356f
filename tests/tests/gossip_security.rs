//! Real nodes, and an attacker who sits on the network between them with the ring key and no identity: see
//! `crates/testkit/src/bin/gossip-attacker.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{GetStatusRequest, GetStatusResponse, ListMembersRequest, Member, MemberState};
use drover_service::pki::{Authority, KeyRing};
use drover_service::{StateDir, Target, address_book, connect};
use drover_testkit::cluster::{end, program, scratch_dir};
use serde_json::Value;
use tonic::transport::Channel;

const PORT: u16 = 7946;
const FLOOD_SECONDS: u64 = 5;

/// Addresses of this test alone: every test process has a network of the loopback to itself.
fn host(number: u8) -> Ipv4Addr {
    let process = std::process::id();
    Ipv4Addr::new(127, 64 + (process >> 8 & 63) as u8, process as u8, number)
}

struct Node {
    child: Child,
    client: MembershipServiceClient<Channel>,
    name: String,
    rpc: SocketAddr,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = drover_testkit::cluster::signal(self.child.id(), rustix::process::Signal::TERM);
        end(&mut self.child, Duration::from_secs(5));
    }
}

impl Node {
    /// Starts the daemon; `advertised` when the others are to reach it elsewhere than where it listens.
    async fn start(
        dir: &Path,
        authority: &Authority,
        number: u8,
        advertised: Option<Ipv4Addr>,
        seed: Option<SocketAddr>,
    ) -> Self {
        let node_id = format!("sw/{number}");
        let dir = dir.join(number.to_string());
        let (state, identity) = (dir.join("state"), dir.join("identity"));
        authority.issue(&node_id, Duration::from_hours(1)).unwrap().store(&identity).unwrap();
        let advertise = advertised.map_or_else(String::new, |addr| format!("  advertise_addr: {addr}\n"));
        let config = format!(
            "swarm:\n  bind_addr: {}\n  bind_port: {PORT}\n{advertise}  discovery: {{ gossip_interval: 500ms, node_timeout: 5s }}\n",
            host(number)
        );
        fs::write(dir.join("drover.yaml"), config).unwrap();
        let listen = advertised.map_or_else(|| host(number), |_| Ipv4Addr::UNSPECIFIED);
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new(program("drover-gossip-membership").unwrap());
        command
            .args(["--listen", &format!("{listen}:0")])
            .arg("--config")
            .arg(dir.join("drover.yaml"))
            .arg("--identity")
            .arg(&identity)
            .env("DROVER_STATE_DIR", &state)
            .env("DROVER_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(seed) = seed {
            command.args(["--seeds", &seed.to_string()]);
        }
        let child = command.spawn().unwrap();
        let listening = until("the daemon listens", async || {
            let state = StateDir::open(&state).ok()?;
            let mut entries = address_book::list(&state).into_iter();
            entries.find_map(|entry| entry.listen.parse::<SocketAddr>().ok())
        })
        .await;
        let reached = SocketAddr::from((host(number), listening.port()));
        let client = MembershipServiceClient::new(connect(Target::Address(reached.to_string())));
        Self { child, client, name: node_id, rpc: reached }
    }

    async fn status(&self) -> GetStatusResponse {
        self.client.clone().get_status(GetStatusRequest {}).await.unwrap().into_inner()
    }

    async fn members(&self) -> Vec<Member> {
        let asked = self.client.clone().list_members(ListMembersRequest::default()).await;
        let mut members = asked.unwrap().into_inner().members;
        members.sort_by(|a, b| a.node_id.cmp(&b.node_id));
        members
    }

    /// What everybody believes, without what changes by itself.
    async fn view(&self) -> Vec<(String, i32, u64, u32, String, u32, BTreeMap<String, String>)> {
        let shown = |member: Member| {
            let labels = member.labels.into_iter().collect();
            (member.node_id, member.state, member.boot, member.incarnation, member.addr, member.port, labels)
        };
        self.members().await.into_iter().map(shown).collect()
    }

    fn resident_kib(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Processor time so far.
    fn busy(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = text.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

struct Attacker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Drop for Attacker {
    fn drop(&mut self) {
        end(&mut self.child, Duration::ZERO);
    }
}

impl Attacker {
    /// Between the nodes from the beginning: in front of node 1 for those who join, and in front of node 3 for all.
    fn tap(dir: &Path, authority: &Authority) -> Self {
        let ring = dir.join("stolen-ring.json");
        fs::write(&ring, authority.ring().unwrap().to_json()).unwrap();
        let cluster = format!("{:032x}", u128::from_be_bytes(authority.cluster_id()));
        let mut command = Command::new(program("gossip-attacker").unwrap());
        command.arg("--ring").arg(ring).args(["--cluster", &cluster, "--seconds", &FLOOD_SECONDS.to_string()]);
        for number in 1..=3 {
            command.args(["--node", &format!("{}:{PORT}", host(number))]);
        }
        for (tap, behind) in [(101, 1), (103, 3)] {
            command.args(["--tap", &format!("{}:{PORT}={}:{PORT}", host(tap), host(behind))]);
        }
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut attacker = Self { child, input, output };
        assert_eq!(attacker.line(), "tapping\n");
        attacker
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    /// Says when, and where else to try.
    fn attack(&mut self, nodes: &[Node]) {
        let rpcs: Vec<String> = nodes.iter().map(|node| format!("{}={}", node.name, node.rpc)).collect();
        self.input.take().unwrap().write_all(format!("{}\n", rpcs.join(" ")).as_bytes()).unwrap();
    }

    fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

fn all_alive(members: &[Member], count: usize) -> bool {
    members.len() == count && members.iter().all(|member| member.state() == MemberState::Alive)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ring_key_without_an_identity_changes_nothing_but_counters() {
    let dir = scratch_dir("gossip-security-").unwrap();
    let dir = dir.path();
    let authority = Authority::open_or_create_at(&dir.join("pki")).unwrap();
    let mut attacker = Attacker::tap(dir, &authority);
    let seed = Some(SocketAddr::from((host(101), PORT)));
    let nodes = [
        Node::start(dir, &authority, 1, None, None).await,
        Node::start(dir, &authority, 2, None, seed).await,
        Node::start(dir, &authority, 3, Some(host(103)), seed).await,
    ];
    for node in &nodes {
        until("everybody knows everybody", async || all_alive(&node.members().await, 3).then_some(())).await;
    }
    // The attacker needs something to play again.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut before = Vec::new();
    for node in &nodes {
        before.push((node.view().await, node.resident_kib(), node.busy(), node.status().await.refused));
    }
    assert!(before.windows(2).all(|two| two[0].0 == two[1].0), "they disagree before anything was done");

    let began = Instant::now();
    attacker.attack(&nodes);
    while !attacker.ended() {
        assert!(began.elapsed() < Duration::from_mins(2), "the attacker does not come to an end");
        for (node, (view, ..)) in nodes.iter().zip(&before) {
            assert_eq!(&node.view().await, view, "{}: the attack had an effect", node.name);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let report: Value = serde_json::from_str(&attacker.line()).unwrap();
    println!("{report}");
    // It is no test if the attacker had nothing in its hands.
    assert!(report["records"].as_array().unwrap().len() >= 2 && report["kept"].as_u64().unwrap() > 20, "{report}");
    for kind in ["stolen record", "forged record", "forged rumor", "accusation", "replay", "introduction", "garbage"] {
        assert!(report["sent"][kind].as_u64().unwrap_or(0) > 10 || kind == "stolen record", "{kind}: {report}");
    }
    for (node, told) in nodes.iter().zip(report["over_tls"].as_array().unwrap()) {
        assert!(told.as_str().unwrap().contains("not from this instance"), "{}: {told}", node.name);
    }
    let (sent, back) = (report["sent_bytes"].as_u64().unwrap(), report["back_bytes"].as_u64().unwrap());
    assert!(back <= sent, "{back} bytes came back for {sent}");

    let mut counted = BTreeMap::<String, u64>::new();
    for (node, (view, resident, busy, refused)) in nodes.iter().zip(&before) {
        let now = node.status().await;
        for (reason, count) in now.refused {
            *counted.entry(reason.clone()).or_default() += count - refused.get(&reason).copied().unwrap_or_default();
        }
        assert_eq!(&node.view().await, view, "{}", node.name);
        let grown = node.resident_kib().saturating_sub(*resident);
        let worked = node.busy().saturating_sub(*busy);
        println!("{}: {grown} KiB more, {worked:?} of work in {:?}", node.name, began.elapsed());
        assert!(grown < 8 * 1024, "{}: {grown} KiB more", node.name);
        assert!(worked < began.elapsed() / 2, "{}: {worked:?} of work in {:?}", node.name, began.elapsed());
    }
    println!("{counted:?}");
    for reason in ["forged", "replayed", "bad_cert", "bad_signature", "plaintext", "unknown_version", "too_many"] {
        assert!(counted.get(reason).is_some_and(|count| *count > 0), "{reason} was not counted: {counted:?}");
    }

    // Nor has it made them blind: a node that is killed is missed by the others.
    drover_testkit::cluster::signal(nodes[1].child.id(), rustix::process::Signal::KILL).unwrap();
    until("the loss of a node is noticed", async || {
        let members = nodes[0].members().await;
        members.iter().any(|member| member.node_id == "sw/2" && member.state() == MemberState::Dead).then_some(())
    })
    .await;
}

/// Keys are changed while the nodes talk; nobody is lost, and afterwards the old key opens nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_ring_is_rotated_under_a_running_cluster() {
    use drover_proto::membership::{AddKeyRequest, RemoveKeyRequest, UseKeyRequest};
    let dir = scratch_dir("gossip-rotation-").unwrap();
    let dir = dir.path();
    let authority = Authority::open_or_create_at(&dir.join("pki")).unwrap();
    let seed = Some(SocketAddr::from((host(11), PORT)));
    let nodes = [
        Node::start(dir, &authority, 11, None, None).await,
        Node::start(dir, &authority, 12, None, seed).await,
        Node::start(dir, &authority, 13, None, seed).await,
    ];
    for node in &nodes {
        until("everybody knows everybody", async || all_alive(&node.members().await, 3).then_some(())).await;
    }
    let mut operator = nodes[1].client.clone();
    let old = u32::from(authority.ring().unwrap().primary());
    let fresh = operator.add_key(AddKeyRequest::default()).await.unwrap().into_inner().key_id;
    // Refused until all have it, then taken; the same for the removal.
    until("all have the key", async || {
        let asked = operator.clone().use_key(UseKeyRequest { key_id: fresh, ..Default::default() }).await;
        asked.ok().map(drop)
    })
    .await;
    until("nobody uses the old key", async || {
        let asked = operator.clone().remove_key(RemoveKeyRequest { key_id: old, ..Default::default() }).await;
        asked.ok().map(drop)
    })
    .await;
    for (node, number) in nodes.iter().zip(11..) {
        let stored = dir.join(format!("{number}/identity/ring.json"));
        until("the ring is kept for the next start", async || {
            let ring = KeyRing::from_json(&fs::read(&stored).ok()?).ok()?;
            (ring.list().len() == 1 && u32::from(ring.primary()) == fresh).then_some(())
        })
        .await;
        assert!(all_alive(&node.members().await, 3));
    }
    // A node whose identity is from before finds in, by its certificate.
    authority.adopt_ring(&KeyRing::from_json(&fs::read(dir.join("11/identity/ring.json")).unwrap()).unwrap()).unwrap();
    let late = Node::start(dir, &authority, 14, None, seed).await;
    until("a later node joins", async || all_alive(&late.members().await, 4).then_some(())).await;
    for node in &nodes {
        let status = node.status().await;
        let odd: Vec<_> =
            status.refused.iter().filter(|(reason, count)| **count > 0 && *reason != "unknown_peer").collect();
        assert!(odd.is_empty(), "{}: {odd:?}", node.name);
        let lost = node.members().await.iter().any(|member| member.state() != MemberState::Alive);
        assert!(!lost && node.rpc.port() != 0);
    }
}
