//! Datagrams of the gossip, as a stranger, a holder of the ring key and a member could send them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use drover_membership::core::{NodeKey, Record, SignedRecord, Signer as _, Time};
use drover_membership::seal::{BootSecrets, Certified, Moment, NodeSigner, Opened, Refusal, Sealer, envelope};
use drover_membership::wire;
use drover_service::pki::{Authority, Identity, KeyRing, RingSummary};

const UNIX: u64 = 1_800_000_000;
const RING_KEY: [u8; 32] = [1; 32];

struct Node {
    sealer: Sealer,
    record: Arc<SignedRecord>,
    addr: SocketAddr,
}

/// Two members that know each other.
struct Pair {
    a: Node,
    b: Node,
    cluster: [u8; 16],
    /// The seconds go on, or nobody would be answered after the first thousands.
    seconds: u64,
    sent: u64,
}

thread_local! {
    static PAIR: RefCell<Option<Pair>> = const { RefCell::new(None) };
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::open_or_create_at(dir.path()).expect("an authority");
        let start = |number: u8| {
            let node_id = format!("s/{number}");
            let identity = authority.issue_between(&node_id, UNIX - 1_000_000, UNIX + 1_000_000_000);
            let identity: Arc<Identity> = Arc::new(identity.expect("an identity"));
            let secrets = BootSecrets::from_entropy([number; 96]);
            let addr = SocketAddr::from(([10, 0, 0, number], 7946));
            let record = Arc::new(NodeSigner::new(Arc::clone(&identity)).sign(Record {
                node_id,
                boot: 1,
                incarnation: 1,
                addr,
                rpc_port: 1,
                protocol: 1,
                region: String::new(),
                capabilities: BTreeMap::new(),
                labels: BTreeMap::new(),
                dh_public: secrets.dh_public(),
                leaving: false,
                timestamp_us: 1,
            }));
            let certified = Certified::new(&identity, Arc::new(|| UNIX));
            let sealer = Sealer::new(identity, certified, KeyRing::of(RING_KEY), secrets, Arc::clone(&record));
            Node { sealer, record, addr }
        };
        let (mut a, mut b) = (start(1), start(2));
        a.sealer.learn(&b.record);
        b.sealer.learn(&a.record);
        Self { a, b, cluster: authority.cluster_id(), seconds: 100, sent: 0 }
    }

    /// Gives `b` a datagram. Whatever it is: a refusal is counted, and nobody gets back more than was sent.
    fn open(&mut self, from: SocketAddr, datagram: &[u8]) -> (Result<Opened, Refusal>, Vec<u8>) {
        self.seconds += 1;
        let at = Moment { now: Time(self.seconds * 1_000_000), unix_us: UNIX * 1_000_000 };
        let (before, known) = (self.b.sealer.refusals().total(), self.b.sealer.known());
        let mut out = Vec::new();
        let opened = self.b.sealer.open(at, from, datagram, &mut out);
        assert_eq!(self.b.sealer.refusals().total(), before + u64::from(opened.is_err()), "not counted");
        assert_eq!(self.b.sealer.known(), known, "a stranger made state");
        let answers = match &opened {
            Ok(Opened::Message(_)) => false,
            // An ask that a hint led to goes to the address of a peer only.
            Ok(Opened::Answer) => from != self.a.addr,
            _ => true,
        };
        assert!(!answers || out.len() <= datagram.len(), "more went back than came");
        (opened, out)
    }
}

/// The first byte says who sends the rest.
pub(crate) fn datagram(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    record(rest);
    message(rest);
    lease(rest);
    ring(rest);
    PAIR.with_borrow_mut(|pair| {
        let pair = pair.get_or_insert_with(Pair::new);
        let stranger = SocketAddr::from(([10, 9, 9, 9], 9));
        match mode % 4 {
            0 => {
                let (opened, _) = pair.open(stranger, rest);
                assert!(opened.is_err(), "a stranger is taken for {opened:?}");
            }
            1 => holder_of_the_ring_key(pair, stranger, rest),
            2 => member(pair, rest),
            _ => {
                // A member's datagram, changed on its way.
                let mut sealed = Vec::new();
                assert!(pair.a.sealer.seal(pair.b.record.key, b"0123456789abcdef", &mut sealed));
                let mut changed = sealed.clone();
                for (byte, mask) in changed.iter_mut().zip(rest) {
                    *byte ^= mask;
                }
                if changed != sealed {
                    let from = pair.a.addr;
                    assert!(pair.open(from, &changed).0.is_err(), "a changed datagram is taken");
                }
                let from = pair.a.addr;
                assert!(matches!(pair.open(from, &sealed).0, Ok(Opened::Message(_))), "the true one is kept out");
            }
        }
    });
}

/// Any hello, under any tag and about either side's own record; none makes it a contact.
fn holder_of_the_ring_key(pair: &mut Pair, from: SocketAddr, rest: &[u8]) {
    let Some((tag, plain)) = rest.split_first_chunk::<8>() else { return };
    pair.sent += 1;
    let header = envelope::Header {
        kind: envelope::Kind::Hello,
        key_id: KeyRing::of(RING_KEY).primary(),
        tag: if tag[0] == 0 { envelope::boot_tag("s/1", 1) } else { u64::from_be_bytes(*tag) },
        counter: pair.sent,
    };
    // Most get past the cluster and the clock, or only these would be tried.
    let mut hello = Vec::new();
    if tag[1] % 8 != 0 {
        hello.extend_from_slice(&pair.cluster);
        hello.extend_from_slice(&(UNIX * 1_000_000).to_be_bytes());
    }
    hello.extend_from_slice(plain);
    if tag[2] % 4 == 0 {
        let _ = pair.a.record.encode(false, &mut hello);
    }
    let mut sealed = Vec::new();
    assert!(envelope::write_hello(header, &RING_KEY, &[7; 16], &hello, &mut sealed));
    let (opened, out) = pair.open(from, &sealed);
    match opened {
        Ok(Opened::Answer) => assert!(!out.is_empty() && out.len() <= sealed.len()),
        Ok(other) => panic!("the ring key alone made {other:?}"),
        Err(_) => {}
    }
}

/// What a member seals arrives as it was, whatever it is.
fn member(pair: &mut Pair, rest: &[u8]) {
    let (key, from): (NodeKey, _) = (pair.a.record.key, pair.a.addr);
    let mut sealed = Vec::new();
    let fits = rest.len() + envelope::OVERHEAD <= envelope::MAX_DATAGRAM;
    assert_eq!(pair.a.sealer.seal(pair.b.record.key, rest, &mut sealed), fits);
    if fits {
        let (opened, out) = pair.open(from, &sealed);
        assert_eq!((opened, out.as_slice()), (Ok(Opened::Message(key)), rest));
        assert_eq!(pair.open(from, &sealed).0, Err(Refusal::Replayed));
    }
}

/// Every record has one encoding, or a signature could cover another one.
fn record(bytes: &[u8]) {
    if let Ok((record, rest)) = SignedRecord::decode(bytes) {
        let mut again = Vec::new();
        record.encode(false, &mut again).expect("what was read is within bounds");
        assert_eq!(again, bytes[..bytes.len() - rest.len()], "a record has two encodings");
    }
    if let Ok(record) = Record::decode(bytes) {
        assert_eq!(record.encode().expect("what was read is within bounds"), bytes);
        assert_eq!(record.encoded_len(), bytes.len());
    }
}

fn message(bytes: &[u8]) {
    let Ok(message) = wire::decode(bytes) else { return };
    let mut again = Vec::new();
    wire::encode(&message, &mut again);
    assert_eq!(again, bytes, "a message has two encodings");
}

fn lease(bytes: &[u8]) {
    let mut again = Vec::new();
    if let Ok(request) = wire::decode_request(bytes) {
        wire::encode_request(&request, &mut again);
        assert_eq!(wire::decode_request(&again).as_ref(), Ok(&request));
    }
    again.clear();
    if let Ok(reply) = wire::decode_reply(bytes) {
        wire::encode_reply(&reply, &mut again);
        assert_eq!(wire::decode_reply(&again).as_ref(), Ok(&reply));
    }
}

fn ring(bytes: &[u8]) {
    if let Ok(ring) = KeyRing::from_json(bytes) {
        assert_eq!(KeyRing::from_json(ring.to_json().as_bytes()).as_ref(), Ok(&ring));
    }
    if let Some(summary) = std::str::from_utf8(bytes).ok().and_then(RingSummary::parse) {
        assert_eq!(RingSummary::parse(&summary.to_string()).as_ref(), Some(&summary));
    }
}
