//! Two and more nodes that pass each other datagrams by hand, and somebody who holds the ring key and nothing else.

mod attack;
mod contact;
mod rotation;
mod tampering;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use drover_service::pki::{Authority, Identity, KeyRing, RING_LABEL};

use super::*;
use crate::core::{NodeKey, Record, SignedRecord, Signer as _, Time};

const UNIX: u64 = 1_800_000_000;
const START: Moment = Moment { now: Time(60_000_000), unix_us: UNIX * 1_000_000 };
const YEAR: u64 = 365 * 24 * 3600;

struct Site {
    ours: Authority,
    theirs: Authority,
    _dir: tempfile::TempDir,
}

static SITE: LazyLock<Site> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| Authority::open_or_create_at(&dir.path().join(name)).unwrap();
    Site { ours: at("ours"), theirs: at("theirs"), _dir: dir }
});

fn identity_of(authority: &Authority, node_id: &str) -> Arc<Identity> {
    Arc::new(authority.issue_between(node_id, UNIX - YEAR, UNIX + YEAR).unwrap())
}

fn certified(identity: &Identity) -> Certified {
    Certified::new(identity, Arc::new(|| UNIX))
}

fn entropy(seed: u64) -> BootSecrets {
    let mut bytes = [0; 96];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let part = NodeKey::of(&format!("{seed}-{}", index / 8)).0;
        *byte = (part >> (index % 8 * 8)) as u8;
    }
    BootSecrets::from_entropy(bytes)
}

struct Node {
    identity: Arc<Identity>,
    sealer: Sealer,
    record: Arc<SignedRecord>,
    addr: SocketAddr,
    boot: u64,
}

fn record(
    identity: &Arc<Identity>,
    addr: SocketAddr,
    boot: u64,
    dh_public: [u8; 32],
    ring: &KeyRing,
) -> Arc<SignedRecord> {
    let labels = BTreeMap::from([(RING_LABEL.to_owned(), ring.summary().to_string())]);
    Arc::new(NodeSigner::new(Arc::clone(identity)).sign(Record {
        node_id: identity.node_id().to_owned(),
        boot,
        incarnation: ring.revision() as u32,
        addr,
        rpc_port: 1,
        protocol: 1,
        region: String::new(),
        capabilities: BTreeMap::new(),
        labels,
        dh_public,
        leaving: false,
        timestamp_us: START.unix_us,
    }))
}

impl Node {
    fn start(identity: Arc<Identity>, number: u8, boot: u64, ring: KeyRing) -> Self {
        let addr = SocketAddr::from(([10, 0, 0, number], 7946));
        let secrets = entropy(u64::from(number) << 32 | boot);
        let record = record(&identity, addr, boot, secrets.dh_public(), &ring);
        let sealer = Sealer::new(Arc::clone(&identity), certified(&identity), ring, secrets, Arc::clone(&record));
        Self { identity, sealer, record, addr, boot }
    }

    fn new(number: u8, boot: u64) -> Self {
        let node_id = format!("s/{number}");
        Self::start(identity_of(&SITE.ours, &node_id), number, boot, KeyRing::of([1; 32]))
    }

    /// Another boot of the same node.
    fn restart(&self) -> Self {
        let [.., number] = match self.addr.ip() {
            std::net::IpAddr::V4(ip) => ip.octets(),
            std::net::IpAddr::V6(_) => unreachable!(),
        };
        Self::start(Arc::clone(&self.identity), number, self.boot + 1, self.sealer.ring().clone())
    }

    fn key(&self) -> NodeKey {
        self.record.key
    }

    fn set_ring(&mut self, ring: KeyRing) {
        self.record = record(&self.identity, self.addr, self.boot, self.record.record.dh_public, &ring);
        self.sealer.local(Arc::clone(&self.record));
        self.sealer.set_ring(START.now, ring);
    }

    fn seal(&mut self, to: &Self, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(self.sealer.seal(to.key(), plain, &mut out));
        out
    }

    fn open(&mut self, from: SocketAddr, datagram: &[u8]) -> (Result<Opened, Refusal>, Vec<u8>) {
        let mut out = Vec::new();
        let opened = self.sealer.open(START, from, datagram, &mut out);
        (opened, out)
    }

    fn hello(&mut self, to: SocketAddr) -> Vec<u8> {
        let mut out = Vec::new();
        self.sealer.hello(START, to, &mut out);
        out
    }

    fn refused(&self, refusal: Refusal) -> u64 {
        self.sealer.refusals().get(refusal)
    }
}

/// Both know the other's record, as if gossip had brought it.
fn acquaint(a: &mut Node, b: &mut Node) {
    a.sealer.learn(&b.record);
    b.sealer.learn(&a.record);
}

/// `a` says hello to `b`; both learn what they are told. Gives back every datagram with the sender's address.
fn meet(a: &mut Node, b: &mut Node) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut datagram = a.hello(b.addr);
    let mut seen = Vec::new();
    let (mut from, mut to) = (a, b);
    for _ in 0..8 {
        if datagram.is_empty() {
            break;
        }
        seen.push((from.addr, datagram.clone()));
        let (opened, out) = to.open(from.addr, &datagram);
        if let Opened::Contact { record, .. } = opened.unwrap() {
            assert_eq!(record, from.record);
            to.sealer.learn(&record);
        }
        datagram = out;
        std::mem::swap(&mut from, &mut to);
    }
    seen
}

/// A message each way arrives.
fn talk(a: &mut Node, b: &mut Node) {
    for _ in 0..2 {
        let datagram = a.seal(b, b"ping");
        assert_eq!(b.open(a.addr, &datagram), (Ok(Opened::Message(a.key())), b"ping".to_vec()));
        let datagram = b.seal(a, b"ack");
        assert_eq!(a.open(b.addr, &datagram), (Ok(Opened::Message(b.key())), b"ack".to_vec()));
    }
}

fn at(seconds: u64) -> Moment {
    Moment { now: START.now + Duration::from_secs(seconds), unix_us: START.unix_us + seconds * 1_000_000 }
}
