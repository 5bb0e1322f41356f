//! `gossip-attacker`: holds a ring key, sits on the network, and has no node's identity. Tries whatever that lets it try
//! against nodes that a test has started, and says what it did.
//!
//! ```text
//! node C --seed--> [tap] --> node A      it forwards, so nobody misses anything; it keeps and reads what it can
//! node A --ping--> [tap] --> node C
//! ```
//!
//! It taps until a line comes on standard input, with the gRPC addresses of the nodes as ID=ADDR; then it attacks, and prints one
//! JSON document.
#![expect(clippy::print_stdout, reason = "the report is what this program is for")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser as _;
use drover_membership::core::{Accusation, Message, Record, Rumor, SignedRecord};
use drover_membership::seal::envelope::{self, End, HEADER, Header, Kind};
use drover_membership::wire;
use drover_service::now_us;
use drover_service::pki::{Authority, Identity, KeyRing};
use rand::{Rng as _, SeedableRng as _};

/// Datagrams that are kept to be played again.
const KEPT: usize = 2000;
const SALT: [u8; 16] = [66; 16];
/// A boot of no node.
const NOBODY: u64 = 66;

#[derive(clap::Parser)]
#[command(about = "Attacks gossip nodes of a test with a ring key and no identity")]
struct Args {
    /// File with the ring
    #[arg(long)]
    ring: PathBuf,
    /// Cluster id, 32 hexadecimal digits
    #[arg(long)]
    cluster: String,
    /// Gossip addresses of the nodes
    #[arg(long = "node", required = true)]
    nodes: Vec<SocketAddr>,
    /// Forwards what comes to the first address to the second: LISTEN=BEHIND
    #[arg(long = "tap")]
    taps: Vec<String>,
    /// How long to flood
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Datagrams a second while flooding
    #[arg(long, default_value_t = 4000)]
    rate: u64,
}

/// What the taps have seen.
#[derive(Default)]
struct Seen {
    datagrams: Vec<Vec<u8>>,
    records: BTreeMap<String, Arc<SignedRecord>>,
}

struct Attacker {
    ring: KeyRing,
    cluster: [u8; 16],
    /// An identity of its own making, for a name of its choosing.
    self_made: Authority,
    socket: UdpSocket,
    counter: AtomicU64,
    sent: Mutex<BTreeMap<&'static str, u64>>,
    sent_bytes: AtomicU64,
    back_bytes: AtomicU64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let ring = KeyRing::from_json(&std::fs::read(&args.ring)?).context("the ring")?;
    let cluster = hex16(&args.cluster).context("the cluster id is not 32 hexadecimal digits")?;
    let dir = tempfile::tempdir()?;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let attacker = Attacker {
        ring,
        cluster,
        self_made: Authority::open_or_create_at(&dir.path().join("pki"))?,
        socket,
        counter: AtomicU64::new(0),
        sent: Mutex::default(),
        sent_bytes: AtomicU64::new(0),
        back_bytes: AtomicU64::new(0),
    };
    let seen = Arc::new(Mutex::new(Seen::default()));
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| -> anyhow::Result<()> {
        for tap in &args.taps {
            let (listen, behind) = tap.split_once('=').context("--tap is LISTEN=BEHIND")?;
            let socket = UdpSocket::bind(listen.parse::<SocketAddr>()?).with_context(|| format!("tap {listen}"))?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let behind = behind.parse()?;
            let (attacker, seen, stop) = (&attacker, &seen, &stop);
            scope.spawn(move || forward(attacker, &socket, behind, seen, stop));
        }
        println!("tapping");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        let attacked = attacker.attack(&args, &line, &seen);
        stop.store(true, Ordering::Relaxed);
        println!("{}", attacked?);
        Ok(())
    })
}

fn hex16(text: &str) -> Option<[u8; 16]> {
    let bytes: Option<Vec<u8>> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// Passes everything on in both directions, and keeps it.
fn forward(attacker: &Attacker, socket: &UdpSocket, behind: SocketAddr, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    let mut asker = None;
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let datagram = &buffer[..length];
        let to = if from == behind { asker } else { Some(behind) };
        if from != behind {
            asker = Some(from);
        }
        if let Some(to) = to {
            let _ = socket.send_to(datagram, to);
        }
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = attacker.read_record(datagram) {
            seen.records.insert(record.record.node_id.clone(), Arc::new(record));
        }
        if seen.datagrams.len() < KEPT {
            seen.datagrams.push(datagram.to_vec());
        }
    }
}

impl Attacker {
    fn key(&self) -> (u8, [u8; 32]) {
        let id = self.ring.primary();
        (id, self.ring.get(id).copied().unwrap_or_default())
    }

    /// Hellos can be read with the ring key; the records in them are no secret.
    fn read_hello(&self, datagram: &[u8]) -> Option<Vec<u8>> {
        let header = Header::from_bytes(datagram.first_chunk()?)?;
        let salt = datagram.get(HEADER..)?.first_chunk()?;
        let key = envelope::hello_key(self.ring.get(header.key_id)?, salt)?;
        let mut plain = Vec::new();
        (header.kind == Kind::Hello
            && envelope::open_into(&key, header.counter, &[], datagram, HEADER + 16, &mut plain))
        .then_some(plain)
    }

    fn read_record(&self, datagram: &[u8]) -> Option<SignedRecord> {
        let plain = self.read_hello(datagram)?;
        SignedRecord::decode(plain.get(16 + 8 + 1 + 32 + 64..)?).ok().map(|(record, _)| record)
    }

    fn send(&self, what: &'static str, to: SocketAddr, datagram: &[u8]) {
        if self.socket.send_to(datagram, to).is_ok() {
            *self.sent.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
            self.sent_bytes.fetch_add(datagram.len() as u64, Ordering::Relaxed);
        }
    }

    /// A hello under the ring key: step, two challenges, and what else belongs to it.
    fn hello(&self, tag: u64, step: u8, first: [u8; 16], second: [u8; 16], rest: &[u8]) -> Vec<u8> {
        let (key_id, key) = self.key();
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        let header = Header { kind: Kind::Hello, key_id, tag, counter };
        let mut plain = self.cluster.to_vec();
        plain.extend(now_us().to_be_bytes());
        plain.push(step);
        plain.extend(first);
        plain.extend(second);
        plain.extend(rest);
        let mut out = Vec::new();
        envelope::write_hello(header, &key, &SALT, &plain, &mut out);
        out
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        let (length, _) = self.socket.recv_from(buffer).ok()?;
        self.back_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Some(length)
    }

    /// Asks for a challenge for its own address, as any newcomer would.
    fn challenge(&self, node: SocketAddr) -> Option<[u8; 16]> {
        let mut buffer = [0; 4096];
        for _ in 0..5 {
            self.send("ask", node, &self.hello(NOBODY, 1, [5; 16], [0; 16], &[]));
            while let Some(length) = self.receive(&mut buffer) {
                if let Some(plain) = self.read_hello(&buffer[..length])
                    && plain.get(24) == Some(&2)
                {
                    return plain.get(41..57)?.try_into().ok();
                }
            }
        }
        None
    }

    /// Introduces itself with that record, proved by the key that it has.
    fn introduce(&self, what: &'static str, node: SocketAddr, record: &SignedRecord, signer: &Identity) {
        let tag = envelope::boot_tag(&record.record.node_id, record.record.boot);
        let Some(echo) = self.challenge(node) else { return };
        let mut proved = b"drover gossip hello 1\0".to_vec();
        proved.extend(self.cluster);
        proved.extend(tag.to_be_bytes());
        proved.push(3);
        proved.extend(echo);
        let mut rest = signer.sign(&proved).to_vec();
        if record.encode(false, &mut rest).is_ok() {
            self.send(what, node, &self.hello(tag, 3, echo, [5; 16], &rest));
        }
    }

    /// Messages in a node's name, sealed with every key that the ring key and what is public can make, and in the clear.
    fn speak_as(
        &self,
        what: &'static str,
        node: SocketAddr,
        victim: &SignedRecord,
        all: &[Arc<SignedRecord>],
        message: &Message,
    ) {
        let mut plain = Vec::new();
        wire::encode(message, &mut plain);
        let (key_id, key) = self.key();
        let tag = |record: &SignedRecord| envelope::boot_tag(&record.record.node_id, record.record.boot);
        let from = End { tag: tag(victim), dh_public: &victim.record.dh_public };
        for peer in all {
            let to = End { tag: tag(peer), dh_public: &peer.record.dh_public };
            for shared in [[0; 32], key, victim.record.dh_public, peer.record.dh_public] {
                let Some(pair) = envelope::pair_key(&key, &shared, &self.cluster, from, to) else { continue };
                let counter = self.counter.fetch_add(1, Ordering::Relaxed) + (1 << 50);
                let header = Header { kind: Kind::Pair, key_id, tag: from.tag, counter };
                let mut out = header.to_bytes().to_vec();
                out.extend_from_slice(&plain);
                envelope::seal_in_place(&pair, counter, &self.cluster, &mut out, HEADER);
                self.send(what, node, &out);
            }
        }
        let clear = [&[0xd7, 1, 2][..], &victim.key.0.to_be_bytes(), &plain].concat();
        self.send("plaintext", node, &clear);
    }

    fn attack(&self, args: &Args, rpcs: &str, seen: &Mutex<Seen>) -> anyhow::Result<serde_json::Value> {
        let (records, datagrams) = {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            (seen.records.values().cloned().collect::<Vec<_>>(), seen.datagrams.clone())
        };
        let Some(victim) = records.first() else { bail!("the taps have seen no record") };
        for node in &args.nodes {
            self.impersonate(*node, &records)?;
            self.evict(*node, &records);
        }
        self.replay(&args.nodes, &datagrams);
        let over_tls = self.over_tls(rpcs)?;
        self.flood(args, victim)?;
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lengths: BTreeSet<usize> = datagrams.iter().map(Vec::len).collect();
        Ok(serde_json::json!({
            "records": records.iter().map(|record| record.record.node_id.clone()).collect::<Vec<_>>(),
            "kept": datagrams.len(),
            "lengths": lengths.len(),
            "sent": sent,
            "sent_bytes": self.sent_bytes.load(Ordering::Relaxed),
            "back_bytes": self.back_bytes.load(Ordering::Relaxed),
            "over_tls": over_tls,
        }))
    }

    /// To be another node, or to change what one says of itself.
    fn impersonate(&self, node: SocketAddr, records: &[Arc<SignedRecord>]) -> anyhow::Result<()> {
        let stranger = self.self_made.issue("attacker/1", Duration::from_hours(1))?;
        for record in records {
            let same_name = self.self_made.issue(&record.record.node_id, Duration::from_hours(1))?;
            self.introduce("stolen record", node, record, &same_name);
            let newer = |change: fn(&mut Record)| {
                let mut claims = Record { incarnation: record.record.incarnation + 1, ..record.record.clone() };
                change(&mut claims);
                claims
            };
            let made = [
                newer(|claims| claims.leaving = true),
                newer(|claims| claims.addr = SocketAddr::from(([127, 0, 0, 66], 6666))),
                newer(|claims| claims.dh_public = [9; 32]),
                newer(|claims| drop(claims.labels.insert("role".to_owned(), "attacker".to_owned()))),
                newer(|claims| claims.boot += 1),
                newer(|claims| "attacker/1".clone_into(&mut claims.node_id)),
            ];
            for claims in made {
                let Ok(message) = claims.signed_bytes(&self.cluster) else { continue };
                for signer in [&same_name, &stranger] {
                    for cert in [signer.cert(), &record.cert] {
                        let forged = SignedRecord::new(claims.clone(), signer.sign(&message), Arc::from(cert));
                        self.introduce("forged record", node, &forged, signer);
                        let rumor = Rumor::Alive { record: Arc::new(forged), bare: false };
                        let gossip = Message::Gossip { rumors: vec![rumor] };
                        self.speak_as("forged rumor", node, record, records, &gossip);
                    }
                }
            }
        }
        Ok(())
    }

    /// To have nodes taken for dead.
    fn evict(&self, node: SocketAddr, records: &[Arc<SignedRecord>]) {
        for accuser in records {
            for accused in records {
                let accusation = Accusation {
                    key: accused.key,
                    boot: accused.record.boot,
                    incarnation: accused.record.incarnation,
                    accuser: accuser.key,
                    refused: true,
                };
                for rumor in [Rumor::Suspect(accusation), Rumor::Dead(accusation)] {
                    self.speak_as("accusation", node, accuser, records, &Message::Gossip { rumors: vec![rumor] });
                }
            }
        }
    }

    fn replay(&self, nodes: &[SocketAddr], datagrams: &[Vec<u8>]) {
        for (index, datagram) in datagrams.iter().enumerate() {
            for node in nodes {
                self.send("replay", *node, datagram);
            }
            if index % 16 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// The other way in: TLS with certificates of its own making.
    fn over_tls(&self, rpcs: &str) -> anyhow::Result<Vec<String>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        rpcs.split_whitespace()
            .map(|rpc| {
                let (node_id, addr) = rpc.rsplit_once('=').context("a gRPC address is ID=ADDR")?;
                let identity = self.self_made.issue(node_id, Duration::from_hours(1))?;
                let connected = drover_service::connect_node_stream(&identity, addr.parse()?, node_id);
                Ok(match runtime.block_on(connected) {
                    Ok(_) => "let in".to_owned(),
                    Err(error) => error.to_string(),
                })
            })
            .collect()
    }

    /// Garbage, asks, and introductions with nothing true in them, as fast as it was told to.
    fn flood(&self, args: &Args, victim: &SignedRecord) -> anyhow::Result<()> {
        let signer = self.self_made.issue(&victim.record.node_id, Duration::from_hours(1))?;
        let tag = envelope::boot_tag(&victim.record.node_id, victim.record.boot);
        let mut introductions = Vec::new();
        for node in &args.nodes {
            let echo = self.challenge(*node).unwrap_or_default();
            let mut rest = signer.sign(b"nothing").to_vec();
            if victim.encode(false, &mut rest).is_ok() {
                introductions.push(self.hello(tag, 3, echo, [5; 16], &rest));
            }
        }
        self.socket.set_nonblocking(true)?;
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let began = Instant::now();
        let (mut count, mut buffer) = (0_u64, vec![0; 65_536]);
        while began.elapsed() < Duration::from_secs(args.seconds) {
            let due = began.elapsed().as_millis() as u64 * args.rate / 1000;
            while count < due {
                count += 1;
                let index = (count / 4) as usize % args.nodes.len();
                let (node, garbage) = (args.nodes[index], rng.random_range(1..1400));
                match count % 4 {
                    0 => {
                        let mut bytes = vec![0; garbage];
                        rng.fill(bytes.as_mut_slice());
                        self.send("garbage", node, &bytes);
                    }
                    1 => self.send("ask", node, &self.hello(rng.random(), 1, rng.random(), [0; 16], &[])),
                    2 => {
                        let header = Header { kind: Kind::Pair, key_id: self.key().0, tag, counter: rng.random() };
                        self.send("garbage in a name", node, &[&header.to_bytes()[..], &[7; 40]].concat());
                    }
                    _ => {
                        if let Some(introduction) = introductions.get(index) {
                            self.send("introduction", node, introduction);
                        }
                    }
                }
            }
            while self.receive(&mut buffer).is_some() {}
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
