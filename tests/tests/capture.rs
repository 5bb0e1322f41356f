//! What somebody sees who reads every packet: between nodes and daemons of other hosts no prompt, and in the gossip nothing that
//! can be read. Each time the same is said without TLS or sealing first, and found: the capture can find. Needs root, for the
//! packets.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, ok};
use drover_e2e::sure::must;
use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{ListMembersRequest, MemberState};
use drover_service::pki::Authority;
use drover_service::{StateDir, Target, address_book, connect};
use drover_testkit::cluster::{Cluster, end, program, scratch_dir};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_llm::{MockLlm, Settings};
use drover_testkit::{skip, this_test};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, sockopt};

const PATIENCE: Duration = Duration::from_mins(1);
/// Every protocol (linux/if_ether.h), in the order of the network.
const EVERY_PROTOCOL: u32 = 0x0003_u16.to_be() as u32;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(&this_test(), "reading packets needs root");
    }
    root
}

/// Reads every IPv4 packet of this host from or to some addresses.
struct Capture {
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    over: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(addrs: &[SocketAddr]) -> Self {
        let protocol = NonZeroU32::new(EVERY_PROTOCOL).map(Protocol::from_raw);
        let socket: OwnedFd =
            rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol).unwrap();
        // A burst must not be lost: what was not captured was not looked at.
        sockopt::set_socket_recv_buffer_size_force(&socket, 64 << 20).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(100))).unwrap();
        let wanted: BTreeSet<(Ipv4Addr, u16)> = addrs
            .iter()
            .map(|addr| match addr {
                SocketAddr::V4(addr) => (*addr.ip(), addr.port()),
                SocketAddr::V6(addr) => panic!("{addr} is none of IPv4"),
            })
            .collect();
        let (seen, over) = (Arc::<Mutex<Vec<Vec<u8>>>>::default(), Arc::<AtomicBool>::default());
        let (all, stop) = (Arc::clone(&seen), Arc::clone(&over));
        let reader = std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 17];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, _)) = rustix::net::recv(&socket, &mut packet[..], RecvFlags::empty()) else { continue };
                if let Some(payload) = payload_of(&packet[..length], &wanted) {
                    all.lock().unwrap().push(payload.to_vec());
                }
            }
        });
        Self { seen, over, reader: Some(reader) }
    }

    fn bytes(&self) -> usize {
        self.seen.lock().unwrap().iter().map(Vec::len).sum()
    }

    fn holds(&self, planted: &str) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.iter().any(|packet| packet.windows(planted.len()).any(|window| window == planted.as_bytes()))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// What a packet carries from or to one of these.
fn payload_of<'a>(packet: &'a [u8], wanted: &BTreeSet<(Ipv4Addr, u16)>) -> Option<&'a [u8]> {
    let first = *packet.first()?;
    if first >> 4 != 4 {
        return None;
    }
    let (head, protocol) = (usize::from(first & 15) * 4, *packet.get(9)?);
    let addr = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(head + at..head + at + 2)?.try_into().ok()?));
    let (from, to) = ((addr(12)?, port(0)?), (addr(16)?, port(2)?));
    if !wanted.contains(&from) && !wanted.contains(&to) {
        return None;
    }
    let length = match protocol {
        TCP => usize::from(packet.get(head + 12)? >> 4) * 4,
        UDP => 8,
        _ => return None,
    };
    packet.get(head + length..)
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Addresses of this test alone: every test process has a network of the loopback to itself.
fn host(number: u8) -> Ipv4Addr {
    let process = std::process::id();
    Ipv4Addr::new(127, 64 + (process >> 8 & 63) as u8, process as u8, number)
}

struct Member(Child);

impl Drop for Member {
    fn drop(&mut self) {
        end(&mut self.0, Duration::from_secs(5));
    }
}

/// Two members that know each other say something of themselves; what of it is to be read on the wire?
async fn is_gossip_readable(dir: &Path, sealed: bool) -> bool {
    const PLANTED: &str = "planted-in-the-gossip-4c1d";
    const PORT: u16 = 7946;
    let authority = sealed.then(|| Authority::open_or_create_at(&dir.join("pki")).unwrap());
    // Other addresses each time: nobody of the first pair is to be heard in the second.
    let numbers = if sealed { [11, 12] } else { [21, 22] };
    let capture = Capture::of(&numbers.map(|number| SocketAddr::from((host(number), PORT))));
    let (mut members, mut clients) = (Vec::new(), Vec::new());
    for number in numbers {
        let own = dir.join(number.to_string());
        fs::create_dir_all(&own).unwrap();
        let mut command = Command::new(must(program("drover-gossip-membership")));
        let seed = format!("\"{}:{PORT}\"", host(numbers[0]));
        let config = format!(
            "swarm:\n  node_id: sw/{number}\n  region: {PLANTED}\n  bind_addr: {}\n  bind_port: {PORT}\n  \
             discovery: {{ gossip_interval: 100ms, join_addrs: [{seed}] }}\nsecurity: {{ gossip_plaintext: {} }}\n",
            host(number),
            !sealed,
        );
        fs::write(own.join("drover.yaml"), config).unwrap();
        if let Some(authority) = &authority {
            let identity = own.join("identity");
            authority.issue(&format!("sw/{number}"), Duration::from_hours(1)).unwrap().store(&identity).unwrap();
            command.arg("--identity").arg(identity);
        }
        let log = fs::File::create(own.join("log")).unwrap();
        let listen = if sealed { host(number) } else { Ipv4Addr::LOCALHOST };
        command.args(["--listen", &format!("{listen}:0"), "--config"]).arg(own.join("drover.yaml"));
        let state = own.join("state");
        command.env("DROVER_STATE_DIR", &state).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        members.push(Member(command.spawn().unwrap()));
        let state = StateDir::open(&state).unwrap();
        let listening = || address_book::list(&state).into_iter().find(|entry| !entry.listen.is_empty());
        until("the daemon to listen", async || listening().is_some()).await;
        let addr = listening().unwrap().listen;
        clients.push(MembershipServiceClient::new(connect(Target::Address(addr))));
    }
    for client in &mut clients {
        until("both to know both, and where they are", async || {
            let asked = client.list_members(ListMembersRequest::default()).await;
            let members = asked.map(|answer| answer.into_inner().members).unwrap_or_default();
            let known = |member: &&drover_proto::membership::Member| {
                member.state() == MemberState::Alive && member.region == PLANTED
            };
            members.iter().filter(known).count() == 2
        })
        .await;
    }
    let before = capture.bytes();
    until("the gossip to go on", async || capture.bytes() > before + 500).await;
    capture.holds(PLANTED)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_read_in_the_gossip() {
    if !is_root() {
        return;
    }
    let dir = must(scratch_dir("capture-"));
    assert!(is_gossip_readable(&dir.path().join("clear"), false).await, "the capture finds nothing, whatever is said");
    assert!(!is_gossip_readable(&dir.path().join("sealed"), true).await, "what is sealed can be read");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_prompt_can_be_read_between_a_node_and_the_dispatcher() {
    const CLEAR: &str = "planted-in-the-clear-91be";
    const HIDDEN: &str = "planted-behind-tls-07aa";
    if !is_root() {
        return;
    }
    let Some(codex) = codex_bin() else { return };
    let mock = must(MockLlm::start(Settings { api_key: Some("key".to_owned()), ..Settings::default() }));
    let config = format!(
        "node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\", api_key_env: PROVIDER_API_KEY, \
         max_tokens: 4096}}\n  limits: {{hedge: false, max_attempts: 1}}\n  cost: {{max_daily_spend: 5}}\n\
         model_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\n\
         worker: {{codex_bin: {}, codex_provider: pool, pool_carriage: grpc, sandbox_mode: danger-full-access, approval_policy: never}}\n",
        mock.base_url("openai"),
        codex.display()
    );
    let mut cluster = must(Cluster::prepare(&config));
    cluster.set_env("PROVIDER_API_KEY", "key");
    cluster.set_env("CODEX_HOME", cluster.dir().join("no-codex-home"));
    must(cluster.up().await);
    let launched = must(json(&cluster, &["launch", "--nodes", "1", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let listen = || address_book::read(cluster.state(), "llm-dispatcher").map(|entry| entry.listen);
    until("the dispatcher", async || listen().is_some_and(|listen| !listen.is_empty())).await;
    let capture = Capture::of(&[listen().unwrap().parse().unwrap()]);

    // Its own user on its own host needs no TLS, and is heard on that very port.
    fs::write(cluster.dir().join("prompts.txt"), format!("[[say:yes]] {CLEAR}\n")).unwrap();
    must(ok(&cluster, &["dispatch", "prompts.txt"]));
    until("the prompt in the clear", async || capture.holds(CLEAR)).await;

    // A node's agent asks through TLS; its prompt is long enough to be whole in some packet.
    let (before, calls) = (capture.bytes(), mock.ledger().answered);
    let prompt = format!("[[say:it arrived]] {}", format!("{HIDDEN} ").repeat(200));
    let said = must(ok(&cluster, &["inject", &swarm, "--prompt", &prompt])).stdout;
    assert!(said.contains("it arrived") && mock.ledger().answered > calls, "{said}");
    until("the packets", async || capture.bytes() > before + prompt.len()).await;
    assert!(!capture.holds(HIDDEN), "a prompt can be read behind TLS");
    assert!(!capture.holds("it arrived"), "an answer can be read behind TLS");
}
