//! Somebody who holds the ring key, sees every datagram and every record, and has no certificate of the instance.

use super::super::hello::{Hello, Step, proved};
use super::*;
use crate::core::{Untrusted, Verifier as _};

const RING_KEY: [u8; 32] = [1; 32];

struct Attacker {
    addr: SocketAddr,
    salt: [u8; 16],
    counter: u64,
}

impl Attacker {
    fn new() -> Self {
        Self { addr: SocketAddr::from(([10, 0, 0, 66], 7946)), salt: [9; 16], counter: 0 }
    }

    fn write(&mut self, tag: u64, hello: &Hello) -> Vec<u8> {
        self.counter += 1;
        let key_id = KeyRing::of(RING_KEY).primary();
        let header = envelope::Header { kind: envelope::Kind::Hello, key_id, tag, counter: self.counter };
        let plain = hello.encode(&SITE.ours.cluster_id(), START.unix_us).unwrap();
        let mut out = Vec::new();
        assert!(envelope::write_hello(header, &RING_KEY, &self.salt, &plain, &mut out));
        out
    }

    /// Gets a challenge for its own address, which it may well have.
    fn challenge(&mut self, victim: &mut Node, tag: u64) -> [u8; 16] {
        let ask = self.write(tag, &Hello::Ask { challenge: [5; 16] });
        let (opened, show) = victim.open(self.addr, &ask);
        assert_eq!(opened, Ok(Opened::Answer));
        let salt = show[envelope::HEADER..][..16].try_into().unwrap();
        let header = envelope::Header::from_bytes(show.first_chunk().unwrap()).unwrap();
        let key = envelope::hello_key(&RING_KEY, &salt).unwrap();
        let mut plain = Vec::new();
        assert!(envelope::open_into(&key, header.counter, &[], &show, envelope::HEADER + 16, &mut plain));
        match Hello::decode(&plain, &SITE.ours.cluster_id(), START.unix_us).unwrap() {
            Hello::Show { challenge, .. } => challenge,
            other => panic!("{other:?}"),
        }
    }

    /// Introduces itself with a record, proved by whatever key it has.
    fn introduce(
        &mut self,
        victim: &mut Node,
        record: &Arc<SignedRecord>,
        signer: &Identity,
    ) -> Result<Opened, Refusal> {
        let tag = envelope::boot_tag(&record.record.node_id, record.record.boot);
        let echo = self.challenge(victim, tag);
        let proof = Box::new(signer.sign(&proved(&SITE.ours.cluster_id(), tag, Step::Introduce, &echo)));
        let introduce = Hello::Introduce { echo, challenge: [5; 16], proof, record: Arc::clone(record) };
        let datagram = self.write(tag, &introduce);
        victim.open(self.addr, &datagram).0
    }
}

/// A record about any node, signed by `signer` for our instance whatever its own is.
fn claim(node_id: &str, signer: &Identity, dh_public: [u8; 32]) -> Arc<SignedRecord> {
    let honest = Node::new(3, 1);
    let record = Record { node_id: node_id.to_owned(), dh_public, boot: u64::MAX, ..honest.record.record.clone() };
    let message = record.signed_bytes(&SITE.ours.cluster_id()).unwrap();
    Arc::new(SignedRecord::new(record, signer.sign(&message), Arc::from(signer.cert())))
}

#[test]
fn the_ring_key_alone_speaks_for_nobody() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    meet(&mut a, &mut b);
    talk(&mut a, &mut b);
    let mut attacker = Attacker::new();
    let self_made = {
        let dir = tempfile::tempdir().unwrap();
        identity_of(&Authority::open_or_create_at(dir.path()).unwrap(), "s/1")
    };
    let mine = entropy(666);

    // A's own record, which is no secret, from the attacker's address: keeps a dead A alive, if it were believed.
    assert_eq!(attacker.introduce(&mut b, &a.record, &self_made), Err(Refusal::BadSignature));
    // A's record with the attacker's key in it.
    let mut renamed = (*a.record).clone();
    renamed.record.dh_public = mine.dh_public();
    assert_eq!(attacker.introduce(&mut b, &Arc::new(renamed), &self_made), Err(Refusal::BadSignature));
    // A record of its own making about A, and about nobody.
    for node_id in ["s/1", "s/66"] {
        let made = claim(node_id, &self_made, mine.dh_public());
        assert_eq!(attacker.introduce(&mut b, &made, &self_made), Err(Refusal::BadCert));
    }

    // Messages in A's name: under every key that can be made from the ring key and what is public.
    let tag = envelope::boot_tag("s/1", 1);
    let header =
        envelope::Header { kind: envelope::Kind::Pair, key_id: KeyRing::of(RING_KEY).primary(), tag, counter: 1000 };
    let cluster = SITE.ours.cluster_id();
    let publics = [a.record.record.dh_public, b.record.record.dh_public];
    let end = |number: usize| envelope::End {
        tag: envelope::boot_tag(["s/1", "s/2"][number], 1),
        dh_public: &publics[number],
    };
    for shared in [[0; 32], RING_KEY, mine.dh.to_bytes(), a.record.record.dh_public, b.record.record.dh_public] {
        for (from, to) in [(end(0), end(1)), (end(1), end(0))] {
            let key = envelope::pair_key(&RING_KEY, &shared, &cluster, from, to).unwrap();
            let mut out = [&header.to_bytes()[..], b"leave"].concat();
            assert!(envelope::seal_in_place(&key, header.counter, &cluster, &mut out, envelope::HEADER));
            assert_eq!(b.open(a.addr, &out).0, Err(Refusal::Forged));
        }
    }
    assert_eq!(b.sealer.known(), 1);
    talk(&mut a, &mut b);
    assert_eq!((b.refused(Refusal::BadSignature), b.refused(Refusal::BadCert)), (2, 2));
    assert_eq!(b.refused(Refusal::Forged), 10);
}

#[test]
fn certificates_that_are_foreign_expired_for_another_node_or_no_certificates_are_refused() {
    let mut b = Node::new(2, 1);
    let mut attacker = Attacker::new();
    let dh = entropy(1).dh_public();
    let day = 24 * 3600;
    let foreign = identity_of(&SITE.theirs, "s/9");
    let expired = SITE.ours.issue_between("s/9", UNIX - 2 * day, UNIX - day).unwrap();
    let early = SITE.ours.issue_between("s/9", UNIX + day, UNIX + 2 * day).unwrap();
    let other = identity_of(&SITE.ours, "s/8");
    for (signer, refusal) in [
        (&*foreign, Refusal::BadCert),
        (&expired, Refusal::ExpiredCert),
        (&early, Refusal::ExpiredCert),
        (&*other, Refusal::ForeignName),
    ] {
        let made = claim("s/9", signer, dh);
        assert_eq!(attacker.introduce(&mut b, &made, signer), Err(refusal));
        assert_eq!(certified(&b.identity).check(&made).map_err(Refusal::from), Err(refusal));
    }
    let mut bare = (*claim("s/9", &other, dh)).clone();
    bare.cert = Arc::from([]);
    assert_eq!(certified(&b.identity).check(&bare), Err(Untrusted::NoCert));
    bare.cert = Arc::from(&b"not a certificate"[..]);
    assert_eq!(certified(&b.identity).check(&bare), Err(Untrusted::BadCert));
    bare.cert = Arc::from(&other.trust().cas()[0][..]);
    assert_eq!(certified(&b.identity).check(&bare), Err(Untrusted::BadCert));

    // The same signature in another instance is worth nothing.
    let good = Node::new(9, 1);
    assert_eq!(certified(&b.identity).check(&good.record), Ok(()));
    let mut elsewhere = (*good.record).clone();
    let message = elsewhere.record.signed_bytes(&SITE.theirs.cluster_id()).unwrap();
    elsewhere.signature = good.identity.sign(&message);
    assert_eq!(certified(&b.identity).check(&elsewhere), Err(Untrusted::BadSignature));
}

#[test]
fn a_flood_of_introductions_costs_a_bounded_number_of_signatures() {
    let mut b = Node::new(2, 1);
    let mut attacker = Attacker::new();
    let other = identity_of(&SITE.theirs, "s/9");
    let made = claim("s/9", &other, entropy(1).dh_public());
    let tag = envelope::boot_tag("s/9", u64::MAX);
    let echo = attacker.challenge(&mut b, tag);
    for _ in 0..2000 {
        let hello = Hello::Introduce { echo, challenge: [5; 16], proof: Box::new([0; 64]), record: Arc::clone(&made) };
        let datagram = attacker.write(tag, &hello);
        assert!(b.open(attacker.addr, &datagram).0.is_err());
    }
    assert_eq!(b.refused(Refusal::BadCert), 256);
    assert_eq!(b.refused(Refusal::TooMany), 2000 - 256);
    // Somebody else comes in all the same.
    let mut a = Node::new(1, 1);
    meet(&mut a, &mut b);
    talk(&mut a, &mut b);
}

/// A peer that has a certificate and offers a key that agrees on nothing gets no messages that others could read.
#[test]
fn a_public_key_that_agrees_on_nothing_secret_is_not_used() {
    let mut b = Node::new(2, 1);
    let member = identity_of(&SITE.ours, "s/9");
    b.sealer.learn(&claim("s/9", &member, [0; 32]));
    let mut out = Vec::new();
    assert!(!b.sealer.seal(NodeKey::of("s/9"), b"x", &mut out) && out.is_empty());
}
