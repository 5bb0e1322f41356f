//! Seals what goes out, opens what comes in, and knows the keys of every pair.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use drover_service::pki::{Identity, KeyId, KeyRing, RING_LABEL, RingSummary};
use x25519_dalek::PublicKey;

use super::certified::{Certified, verify};
use super::envelope::{
    End, HEADER, Header, Kind, MAX_DATAGRAM, OVERHEAD, TAG, boot_tag, hello_key, open_into, pair_key, seal_in_place,
    write_hello,
};
use super::hello::{Challenge, Challenges, Hello, Purpose, Step, proved};
use super::limit::{Limit, Rate};
use super::refusal::{Refusal, Refusals};
use super::secrets::BootSecrets;
use super::window::Window;
use crate::core::{ClusterId, NodeKey, SignedRecord, Time};

const SALT: usize = 16;
/// Room for the counters of one acquaintance with a peer; the next acquaintance begins behind it, so that a key that comes
/// again never meets a counter that comes again.
const ACQUAINTANCE: u64 = 1 << 40;
/// Forgotten boots whose counters are still remembered, so that nothing of theirs can be played again when they come back.
const FORGOTTEN: usize = 4096;

/// A key that was removed opens what peers send for so long, because a peer may not have heard of it yet. It opens no hello, and
/// the ring key is no secret that a pair's key rests on alone, so whoever stole it gains nothing.
const RETIRED: Duration = Duration::from_mins(2);

/// Signatures that are checked for addresses that have proved themselves: a host may start hundreds of nodes at once, and no
/// single address takes more than a few percent of a processor.
const PROOFS: (Rate, Rate) = (Rate { burst: 256, per_second: 64 }, Rate { burst: 2000, per_second: 1000 });
/// Asks that are answered. Cheap; bounded, so that nobody bounces much off us.
const ASKS: (Rate, Rate) = (Rate { burst: 256, per_second: 64 }, Rate { burst: 4000, per_second: 2000 });
/// Hints to those whose datagrams were not taken, and asks because of such hints.
const HINTS: (Rate, Rate) = (Rate { burst: 16, per_second: 4 }, Rate { burst: 256, per_second: 64 });

/// The time, twice: monotonic for what passes, wall clock for whether other clocks agree.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Monotonic.
    pub now: Time,
    /// Microseconds of Unix time.
    pub unix_us: u64,
}

/// What a datagram turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// A message of a node that is known; its bytes are in the buffer.
    Message(NodeKey),
    /// The node at that address has shown that it is there now. With `answer`, the buffer goes back to it.
    Contact {
        /// Who it is; certificate and signature have been checked.
        record: Arc<SignedRecord>,
        /// The buffer is to be sent back.
        answer: bool,
    },
    /// A step of getting to know each other: the buffer goes back.
    Answer,
    /// Whoever is at that address says that it does not take what we send. Anybody could say so: a hint for people who wonder
    /// why a seed does not answer, and nothing else.
    Hint(Refusal),
}

/// The keys of one pair under one ring key.
#[derive(Clone, Copy)]
struct PairKeys {
    send: [u8; 32],
    receive: [u8; 32],
}

/// What the two X25519 keys of a pair agree on. Agreed when it is first needed.
#[derive(Clone, Copy)]
enum Shared {
    NotYet,
    Secret([u8; 32]),
    /// The peer's public key is one that agrees on nothing secret.
    Nothing,
}

struct Peer {
    addr: SocketAddr,
    tag: u64,
    dh_public: [u8; 32],
    shared: Shared,
    sent: u64,
    last: u64,
    window: Window,
    keys: Vec<(KeyId, PairKeys)>,
    ring: Option<RingSummary>,
    heard_with: Option<KeyId>,
}

/// Everything that seals and opens for one node.
pub struct Sealer {
    cluster: ClusterId,
    own: Arc<SignedRecord>,
    tag: u64,
    secrets: BootSecrets,
    identity: Arc<Identity>,
    certified: Certified,
    ring: KeyRing,
    retired: Vec<(KeyId, [u8; 32], Time)>,
    peers: BTreeMap<NodeKey, Peer>,
    tags: BTreeMap<u64, NodeKey>,
    forgotten: VecDeque<(u64, u64)>,
    acquaintances: u64,
    hellos: u64,
    challenges: Challenges,
    proofs: Limit,
    asks: Limit,
    hints: Limit,
    refusals: Refusals,
}

impl Sealer {
    /// `own` is this node's record, which must hold [`BootSecrets::dh_public`].
    pub fn new(
        identity: Arc<Identity>,
        certified: Certified,
        ring: KeyRing,
        secrets: BootSecrets,
        own: Arc<SignedRecord>,
    ) -> Self {
        let limit = |rates: (Rate, Rate)| Limit::new(secrets.spread, rates.0, rates.1);
        Self {
            cluster: identity.cluster_id(),
            tag: boot_tag(&own.record.node_id, own.record.boot),
            challenges: Challenges::new(&secrets.cookie),
            proofs: limit(PROOFS),
            asks: limit(ASKS),
            hints: limit(HINTS),
            own,
            secrets,
            identity,
            certified,
            ring,
            retired: Vec::new(),
            peers: BTreeMap::new(),
            tags: BTreeMap::new(),
            forgotten: VecDeque::new(),
            acquaintances: 0,
            hellos: 0,
            refusals: Refusals::default(),
        }
    }

    /// This node's record has changed. A new boot number is another boot: peers have to learn it before they can open what is
    /// sealed from now on.
    pub fn local(&mut self, own: Arc<SignedRecord>) {
        let tag = boot_tag(&own.record.node_id, own.record.boot);
        self.own = own;
        if tag != self.tag {
            self.tag = tag;
            for peer in self.peers.values_mut() {
                peer.keys.clear();
            }
        }
    }

    /// A fresh certificate of the same node, or a new list of revoked ones.
    pub fn renew(&mut self, identity: Arc<Identity>) {
        self.certified.renew(&identity);
        self.identity = identity;
    }

    /// The ring in force.
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Another ring from now on. The label [`RING_LABEL`] of this node's record must follow: [`KeyRing::summary`].
    pub fn set_ring(&mut self, now: Time, ring: KeyRing) {
        for id in self.ring.ids().filter(|id| ring.get(*id).is_none()) {
            if let Some(key) = self.ring.get(id) {
                self.retired.push((id, *key, now + RETIRED));
            }
        }
        for peer in self.peers.values_mut() {
            peer.keys.clear();
        }
        self.ring = ring;
    }

    /// How often something was refused.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Peers that are known.
    pub fn known(&self) -> usize {
        self.peers.len()
    }

    /// A node's newest record, which has been checked.
    pub fn learn(&mut self, record: &SignedRecord) {
        let claims = &record.record;
        if record.key == self.own.key {
            return;
        }
        let tag = boot_tag(&claims.node_id, claims.boot);
        let ring = claims.labels.get(RING_LABEL).and_then(|label| RingSummary::parse(label));
        if let Some(peer) = self.peers.get_mut(&record.key)
            && peer.tag == tag
            && peer.dh_public == claims.dh_public
        {
            peer.addr = claims.addr;
            peer.ring = ring;
            return;
        }
        self.forget(record.key);
        let seen = self.forgotten.iter().find(|(forgotten, _)| *forgotten == tag).map(|(_, highest)| *highest);
        let sent = self.acquaintances.saturating_mul(ACQUAINTANCE);
        self.acquaintances += 1;
        self.tags.insert(tag, record.key);
        self.peers.insert(
            record.key,
            Peer {
                addr: claims.addr,
                tag,
                dh_public: claims.dh_public,
                shared: Shared::NotYet,
                sent,
                last: sent.saturating_add(ACQUAINTANCE - 1),
                window: seen.map_or_else(Window::default, Window::after),
                keys: Vec::new(),
                ring,
                heard_with: None,
            },
        );
    }

    /// A node is gone for good.
    pub fn forget(&mut self, key: NodeKey) {
        let Some(peer) = self.peers.remove(&key) else { return };
        self.tags.remove(&peer.tag);
        if peer.window.highest() > 0 {
            self.forgotten.retain(|(tag, _)| *tag != peer.tag);
            self.forgotten.push_back((peer.tag, peer.window.highest()));
            if self.forgotten.len() > FORGOTTEN {
                self.forgotten.pop_front();
            }
        }
    }

    /// Seals a message to a known node; false, with `out` empty, when the node is not known or the message too long.
    pub fn seal(&mut self, to: NodeKey, plain: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some(id) = self.peers.get(&to).map(|peer| self.key_for(peer)) else { return false };
        let Some(keys) = self.keys(to, id) else { return false };
        let Some(peer) = self.peers.get_mut(&to) else { return false };
        if plain.len() + OVERHEAD > MAX_DATAGRAM || peer.sent >= peer.last {
            return false;
        }
        peer.sent += 1;
        let header = Header { kind: Kind::Pair, key_id: id, tag: self.tag, counter: peer.sent };
        out.extend_from_slice(&header.to_bytes());
        out.extend_from_slice(plain);
        let sealed = seal_in_place(&keys.send, header.counter, &self.cluster, out, HEADER);
        if !sealed {
            out.clear();
        }
        sealed
    }

    /// The first datagram to an address where a node may be.
    pub fn hello(&mut self, at: Moment, to: SocketAddr, out: &mut Vec<u8>) {
        // A node that has been away may lack the key that seals now: every other try is with another key of the ring.
        let others: Vec<KeyId> = self.ring.ids().filter(|id| *id != self.ring.primary()).collect();
        let turn = self.hellos as usize;
        let id = match others.get((turn / 2) % others.len().max(1)) {
            Some(other) if turn % 2 == 1 => *other,
            _ => self.ring.primary(),
        };
        let challenge = self.challenges.make(at.now, to, Purpose::Asked);
        self.write(at, id, &Hello::Ask { challenge }, out);
    }

    /// Opens a datagram. What is in it, or goes back to where it came from, is put into `out`; after a refusal, too, when that
    /// is not empty: a hint to the sender, shorter than what it sent.
    pub fn open(
        &mut self,
        at: Moment,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Opened, Refusal> {
        out.clear();
        self.retired.retain(|(_, _, until)| *until > at.now);
        let opened = self.open_any(at, from, datagram, out);
        if let Err(why) = opened {
            self.refusals.count(why);
            out.clear();
            self.hint(at, from, datagram, why, out);
        }
        opened
    }

    fn open_any(
        &mut self,
        at: Moment,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Opened, Refusal> {
        /// How a datagram in the clear begins.
        const PLAIN: u8 = 0xd7;
        if datagram.len() > MAX_DATAGRAM {
            return Err(Refusal::Oversized);
        }
        if datagram.first() == Some(&PLAIN) {
            return Err(Refusal::Plaintext);
        }
        let head = datagram.first_chunk().ok_or(Refusal::Truncated)?;
        let header = Header::from_bytes(head).ok_or(Refusal::UnknownVersion)?;
        match header.kind {
            Kind::Notice => self.open_notice(at, from, header, datagram, out),
            // Our own, sent back to us.
            _ if header.tag == self.tag => Err(Refusal::Replayed),
            Kind::Pair => self.open_pair(header, datagram, out),
            Kind::Hello => self.open_hello(at, from, header, datagram, out),
        }
    }

    fn open_pair(&mut self, header: Header, datagram: &[u8], out: &mut Vec<u8>) -> Result<Opened, Refusal> {
        if datagram.len() < OVERHEAD {
            return Err(Refusal::Truncated);
        }
        let retired = self.retired.iter().any(|(id, _, _)| *id == header.key_id);
        if self.ring.get(header.key_id).is_none() && !retired {
            return Err(Refusal::UnknownKey);
        }
        let key = *self.tags.get(&header.tag).ok_or(Refusal::UnknownPeer)?;
        let keys = self.keys(key, header.key_id).ok_or(Refusal::Forged)?;
        let peer = self.peers.get_mut(&key).ok_or(Refusal::UnknownPeer)?;
        if !peer.window.is_new(header.counter) {
            return Err(Refusal::Replayed);
        }
        if !open_into(&keys.receive, header.counter, &self.cluster, datagram, HEADER, out) {
            return Err(Refusal::Forged);
        }
        peer.window.note(header.counter);
        peer.heard_with = Some(header.key_id);
        Ok(Opened::Message(key))
    }

    fn open_hello(
        &mut self,
        at: Moment,
        from: SocketAddr,
        header: Header,
        datagram: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Opened, Refusal> {
        let salt = datagram.get(HEADER..).and_then(<[u8]>::first_chunk::<SALT>).ok_or(Refusal::Truncated)?;
        if datagram.len() < HEADER + SALT + TAG {
            return Err(Refusal::Truncated);
        }
        let ring_key = self.ring.get(header.key_id).ok_or(Refusal::UnknownKey)?;
        let key = hello_key(ring_key, salt).ok_or(Refusal::Forged)?;
        if !open_into(&key, header.counter, &[], datagram, HEADER + SALT, out) {
            return Err(Refusal::Forged);
        }
        let hello = Hello::decode(out, &self.cluster, at.unix_us)?;
        out.clear();
        match hello {
            Hello::Ask { challenge } => {
                if !self.asks.take(at.now, from.ip()) {
                    return Err(Refusal::TooMany);
                }
                let own = self.challenges.make(at.now, from, Purpose::Shown);
                self.write(at, header.key_id, &Hello::Show { echo: challenge, challenge: own }, out);
                Ok(Opened::Answer)
            }
            Hello::Show { echo, challenge } => {
                if !self.challenges.fits(at.now, from, Purpose::Asked, &echo) {
                    return Err(Refusal::Forged);
                }
                self.may_check(at, from)?;
                let introduce = Hello::Introduce {
                    echo: challenge,
                    challenge: self.challenges.make(at.now, from, Purpose::Asked),
                    proof: Box::new(self.prove(Step::Introduce, &challenge)),
                    record: Arc::clone(&self.own),
                };
                self.write(at, header.key_id, &introduce, out);
                Ok(Opened::Answer)
            }
            Hello::Introduce { echo, challenge, proof, record } => {
                if !self.challenges.fits(at.now, from, Purpose::Shown, &echo) {
                    return Err(Refusal::Forged);
                }
                self.may_check(at, from)?;
                self.believe(header.tag, Step::Introduce, &echo, &proof, &record)?;
                let met = Hello::Met {
                    echo: challenge,
                    proof: Box::new(self.prove(Step::Met, &challenge)),
                    record: Arc::clone(&self.own),
                };
                self.write(at, header.key_id, &met, out);
                Ok(Opened::Contact { record, answer: true })
            }
            Hello::Met { echo, proof, record } => {
                if !self.challenges.fits(at.now, from, Purpose::Asked, &echo) {
                    return Err(Refusal::Forged);
                }
                self.may_check(at, from)?;
                self.believe(header.tag, Step::Met, &echo, &proof, &record)?;
                Ok(Opened::Contact { record, answer: false })
            }
        }
    }

    /// Whether one more signature may be checked for that address.
    fn may_check(&mut self, at: Moment, from: SocketAddr) -> Result<(), Refusal> {
        if self.proofs.take(at.now, from.ip()) { Ok(()) } else { Err(Refusal::TooMany) }
    }

    /// Whether the record is its node's own, and the node itself has just sent it.
    fn believe(
        &mut self,
        tag: u64,
        step: Step,
        echo: &Challenge,
        proof: &[u8; 64],
        record: &SignedRecord,
    ) -> Result<(), Refusal> {
        if boot_tag(&record.record.node_id, record.record.boot) != tag {
            return Err(Refusal::ForeignName);
        }
        let public_key = self.certified.key_of(record)?;
        verify(&public_key, &proved(&self.cluster, tag, step, echo), proof)?;
        Ok(())
    }

    fn prove(&self, step: Step, echo: &Challenge) -> [u8; 64] {
        self.identity.sign(&proved(&self.cluster, self.tag, step, echo))
    }

    fn write(&mut self, at: Moment, id: KeyId, hello: &Hello, out: &mut Vec<u8>) {
        out.clear();
        self.hellos += 1;
        let header = Header { kind: Kind::Hello, key_id: id, tag: self.tag, counter: self.hellos };
        let plain = hello.encode(&self.cluster, at.unix_us);
        let written = match (plain, self.ring.get(id)) {
            (Some(plain), Some(key)) => write_hello(header, key, &self.secrets.salt, &plain, out),
            _ => false,
        };
        if !written {
            out.clear();
        }
    }

    /// Tells a sender why its datagram was not taken, when it can do something about it: 19 bytes, less than any datagram.
    fn hint(&mut self, at: Moment, from: SocketAddr, datagram: &[u8], why: Refusal, out: &mut Vec<u8>) {
        let worth = matches!(
            why,
            Refusal::UnknownKey
                | Refusal::UnknownPeer
                | Refusal::Forged
                | Refusal::WrongCluster
                | Refusal::Future
                | Refusal::BadCert
                | Refusal::ExpiredCert
        );
        let Some(header) = datagram.first_chunk().and_then(Header::from_bytes) else { return };
        if worth && header.kind != Kind::Notice && datagram.len() > HEADER && self.hints.take(at.now, from.ip()) {
            out.extend_from_slice(&Header { kind: Kind::Notice, key_id: why.to_code(), ..header }.to_bytes());
        }
    }

    /// A hint is for us when it names a datagram that we sent. One that says that the sender does not know us is followed only
    /// to the address of a peer that we know: nobody makes us send to anybody else.
    fn open_notice(
        &mut self,
        at: Moment,
        from: SocketAddr,
        header: Header,
        datagram: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Opened, Refusal> {
        if datagram.len() != HEADER {
            return Err(Refusal::Malformed);
        }
        let why = Refusal::from_code(header.key_id).ok_or(Refusal::Malformed)?;
        if header.tag != self.tag {
            return Err(Refusal::Forged);
        }
        // Before anything that takes time: whoever has seen one of our datagrams can make these.
        if !self.hints.take(at.now, from.ip()) {
            return Err(Refusal::TooMany);
        }
        let peer = self.peers.values().find(|peer| peer.addr == from);
        let first = |peer: &Peer| peer.last.saturating_sub(ACQUAINTANCE - 1);
        let to_peer = peer.is_some_and(|peer| header.counter > first(peer) && header.counter <= peer.sent);
        if !to_peer && (header.counter == 0 || header.counter > self.hellos) {
            return Err(Refusal::Forged);
        }
        if to_peer && matches!(why, Refusal::UnknownPeer | Refusal::Forged) {
            self.hello(at, from, out);
            return Ok(Opened::Answer);
        }
        Ok(Opened::Hint(why))
    }

    /// The ring key for what is sent to a peer: the primary as soon as the peer's record says that it has it, until then the
    /// one that the peer uses itself. So a change of the ring is no moment at which all have to act at once.
    fn key_for(&self, peer: &Peer) -> KeyId {
        let primary = self.ring.primary();
        let Some(theirs) = &peer.ring else { return primary };
        let has = |id: KeyId| self.ring.get(id).is_some_and(|key| theirs.has(key));
        if has(primary) {
            return primary;
        }
        let heard = peer.heard_with.filter(|id| self.ring.get(*id).is_some());
        heard.or_else(|| self.ring.ids().find(|id| has(*id))).unwrap_or(primary)
    }

    fn keys(&mut self, key: NodeKey, id: KeyId) -> Option<PairKeys> {
        let retired = || self.retired.iter().rev().find(|(known, _, _)| *known == id).map(|(_, key, _)| key);
        let ring_key = *self.ring.get(id).or_else(retired)?;
        let (tag, public) = (self.tag, self.own.record.dh_public);
        let cluster = self.cluster;
        let peer = self.peers.get_mut(&key)?;
        if let Some((_, keys)) = peer.keys.iter().find(|(known, _)| *known == id) {
            return Some(*keys);
        }
        if matches!(peer.shared, Shared::NotYet) {
            let shared = self.secrets.dh.diffie_hellman(&PublicKey::from(peer.dh_public));
            let secret = shared.was_contributory();
            peer.shared = if secret { Shared::Secret(shared.to_bytes()) } else { Shared::Nothing };
        }
        let Shared::Secret(shared) = peer.shared else { return None };
        let (we, they) = (End { tag, dh_public: &public }, End { tag: peer.tag, dh_public: &peer.dh_public });
        let keys = PairKeys {
            send: pair_key(&ring_key, &shared, &cluster, we, they)?,
            receive: pair_key(&ring_key, &shared, &cluster, they, we)?,
        };
        peer.keys.push((id, keys));
        Some(keys)
    }

    /// The key that seals the next message to a peer.
    #[cfg(test)]
    pub(super) fn send_key(&mut self, to: NodeKey) -> Option<[u8; 32]> {
        let id = self.peers.get(&to).map(|peer| self.key_for(peer))?;
        self.keys(to, id).map(|keys| keys.send)
    }
}
