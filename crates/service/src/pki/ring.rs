//! The ring of gossip keys: up to eight, of which one seals and any opens.
//!
//! A ring is a value with a revision. A change makes the next revision on one node; the others see in that node's signed
//! record that there is a newer one ([`RingSummary`]), and fetch it over a connection that both ends' certificates protect. So
//! a node needs no ring key to get the ring, only its identity, and nobody is cut off for having been away.

use std::collections::BTreeMap;
use std::fmt;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{PkiError, from_hex, random, to_hex};

/// Most keys in a ring.
pub const MAX_KEYS: usize = 8;

/// Label of a node's record that says which keys it has.
pub const RING_LABEL: &str = "drover.ring";

/// Names a key in a datagram: the first byte of its fingerprint.
pub type KeyId = u8;

/// A change that the ring refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// There is no room.
    #[error("the ring has {MAX_KEYS} keys already; remove one first")]
    Full,
    /// Two keys would have the same id.
    #[error("another key has the id {0:02x} already; take another key")]
    SameId(KeyId),
    /// There is no such key.
    #[error("the ring has no key {0:02x}; `drover keys list` shows those that it has")]
    Unknown(KeyId),
    /// The key that seals.
    #[error("key {0:02x} is in use; use another one first")]
    InUse(KeyId),
    /// The text is no ring.
    #[error("not a key ring: {0}")]
    Text(String),
    /// A node would be cut off.
    #[error("{}: try again when they have it, or when they are gone for good", .0.join(", "))]
    WouldCutOff(Vec<String>),
}

/// Keys of 32 bytes, one of them primary. Never shown: its debug form has fingerprints only.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyRing {
    revision: u64,
    primary: KeyId,
    keys: BTreeMap<KeyId, [u8; 32]>,
}

/// What people may see of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RingKeyInfo {
    /// Its id.
    pub id: KeyId,
    /// First 8 bytes of a hash of it, in hexadecimal.
    pub fingerprint: String,
    /// It seals.
    pub primary: bool,
}

/// How a ring is written to its file, and sent to a node with a certificate.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    v: u32,
    revision: u64,
    primary: String,
    keys: Vec<String>,
}

impl KeyRing {
    /// A ring of one fresh key.
    pub fn generate() -> Result<Self, PkiError> {
        Ok(Self::of(random()?))
    }

    /// A ring of one key.
    pub fn of(key: [u8; 32]) -> Self {
        let id = id_of(&key);
        Self { revision: 1, primary: id, keys: BTreeMap::from([(id, key)]) }
    }

    /// Counts the changes; the greater revision is the newer ring.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Id of the key that seals.
    pub fn primary(&self) -> KeyId {
        self.primary
    }

    /// The key of that id.
    pub fn get(&self, id: KeyId) -> Option<&[u8; 32]> {
        self.keys.get(&id)
    }

    /// The ids of all keys.
    pub fn ids(&self) -> impl Iterator<Item = KeyId> + '_ {
        self.keys.keys().copied()
    }

    /// What people may see of it.
    pub fn list(&self) -> Vec<RingKeyInfo> {
        let info = |(id, key): (&KeyId, &[u8; 32])| RingKeyInfo {
            id: *id,
            fingerprint: to_hex(&fingerprint(key)),
            primary: *id == self.primary,
        };
        self.keys.iter().map(info).collect()
    }

    /// Adds a fresh key whose id is free.
    pub fn add_fresh(&mut self) -> Result<KeyId, PkiError> {
        loop {
            match self.add(random()?) {
                Err(RingError::SameId(_)) => {}
                added => return Ok(added?),
            }
        }
    }

    /// Adds a key that opens from now on. Adding one that is there changes nothing.
    pub fn add(&mut self, key: [u8; 32]) -> Result<KeyId, RingError> {
        let id = id_of(&key);
        match self.keys.get(&id) {
            Some(known) if *known == key => return Ok(id),
            Some(_) => return Err(RingError::SameId(id)),
            None => {}
        }
        if self.keys.len() >= MAX_KEYS {
            return Err(RingError::Full);
        }
        self.keys.insert(id, key);
        self.revision += 1;
        Ok(id)
    }

    /// Seals with that key from now on. Ask [`RingSummary::may_use`] first.
    pub fn use_key(&mut self, id: KeyId) -> Result<(), RingError> {
        if !self.keys.contains_key(&id) {
            return Err(RingError::Unknown(id));
        }
        if self.primary != id {
            self.primary = id;
            self.revision += 1;
        }
        Ok(())
    }

    /// Forgets a key. Ask [`RingSummary::may_remove`] first.
    pub fn remove(&mut self, id: KeyId) -> Result<(), RingError> {
        if self.primary == id {
            return Err(RingError::InUse(id));
        }
        if self.keys.remove(&id).is_none() {
            return Err(RingError::Unknown(id));
        }
        self.revision += 1;
        Ok(())
    }

    /// Takes over another node's ring when it is newer. Two changes at the same time on two nodes make two rings of one
    /// revision; then all nodes take the same one of them.
    pub fn adopt(&mut self, other: &Self) -> bool {
        if (other.revision, other.rank()) <= (self.revision, self.rank()) {
            return false;
        }
        self.clone_from(other);
        true
    }

    /// Whether a node whose record says this has a ring that [`Self::adopt`] would take.
    pub fn is_behind(&self, summary: &RingSummary) -> bool {
        (summary.revision, &summary.fingerprints) > (self.revision, &self.summary().fingerprints)
    }

    /// What the node's record says of it.
    pub fn summary(&self) -> RingSummary {
        let others = self.keys.iter().filter(|(id, _)| **id != self.primary).map(|(_, key)| key);
        let keys = self.keys.get(&self.primary).into_iter().chain(others);
        RingSummary { revision: self.revision, fingerprints: keys.map(short).collect() }
    }

    /// The file's content. Secret.
    pub fn to_json(&self) -> String {
        let keys = self.keys.values().map(|key| to_hex(key)).collect();
        let written = Written { v: 1, revision: self.revision, primary: format!("{:02x}", self.primary), keys };
        serde_json::to_string(&written).unwrap_or_default()
    }

    /// Reads what [`Self::to_json`] wrote.
    pub fn from_json(text: &[u8]) -> Result<Self, RingError> {
        // What the parser says may quote the text, and the text is secret.
        let bad = |what: &str| RingError::Text(what.to_owned());
        let written: Written = serde_json::from_slice(text).map_err(|error| {
            RingError::Text(format!("it does not parse at line {} column {}", error.line(), error.column()))
        })?;
        if written.v != 1 {
            return Err(RingError::Text(format!("version {} is unknown; upgrade this node", written.v)));
        }
        if written.keys.is_empty() || written.keys.len() > MAX_KEYS {
            return Err(bad("it must have 1 to 8 keys"));
        }
        let mut keys = BTreeMap::new();
        for key in &written.keys {
            let key: [u8; 32] =
                from_hex(key).and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| bad("a key is not 32 bytes"))?;
            if keys.insert(id_of(&key), key).is_some() {
                return Err(bad("two keys have one id"));
            }
        }
        let primary = u8::from_str_radix(&written.primary, 16).ok().filter(|id| keys.contains_key(id));
        let primary = primary.ok_or_else(|| bad("the primary is none of its keys"))?;
        Ok(Self { revision: written.revision, primary, keys })
    }

    /// Decides between rings of one revision. Made of what the summary shows, so that both see the same order.
    fn rank(&self) -> Vec<u32> {
        self.summary().fingerprints
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyRing({})", self.summary())
    }
}

/// What a node's record says of its ring: the revision, and the keys with the one that seals first. This is how everybody
/// knows when a change can go on to its next step without cutting anybody off:
///
/// | step | allowed when |
/// | --- | --- |
/// | add | always; the others fetch the newer ring |
/// | use | every member's record has the key |
/// | remove | every member's record has another key first |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingSummary {
    revision: u64,
    fingerprints: Vec<u32>,
}

impl RingSummary {
    /// Reads a record's label.
    pub fn parse(text: &str) -> Option<Self> {
        let (revision, keys) = text.split_once(':')?;
        let fingerprint = |text: &str| (text.len() == 8).then(|| u32::from_str_radix(text, 16).ok())?;
        let fingerprints: Vec<u32> = keys.split(',').map(fingerprint).collect::<Option<_>>()?;
        (fingerprints.len() <= MAX_KEYS).then_some(Self { revision: revision.parse().ok()?, fingerprints })
    }

    /// Revision of the ring.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether the node has this key, so that it can open what is sealed with it.
    pub fn has(&self, key: &[u8; 32]) -> bool {
        self.fingerprints.contains(&short(key))
    }

    /// Whether the node seals with this key.
    pub fn seals_with(&self, key: &[u8; 32]) -> bool {
        self.fingerprints.first() == Some(&short(key))
    }

    /// Whether everybody can open what is sealed with the key. `members` are all that are not forgotten yet, suspect and dead
    /// ones too: they may come back.
    pub fn may_use<'a>(
        ring: &KeyRing,
        id: KeyId,
        members: impl IntoIterator<Item = (&'a str, Option<Self>)>,
    ) -> Result<(), RingError> {
        let key = ring.get(id).ok_or(RingError::Unknown(id))?;
        lacking(members, "does not have the key yet", |summary| summary.has(key))
    }

    /// Whether nobody seals with the key any more, and everybody has what is sealed with instead.
    pub fn may_remove<'a>(
        ring: &KeyRing,
        id: KeyId,
        members: impl IntoIterator<Item = (&'a str, Option<Self>)>,
    ) -> Result<(), RingError> {
        let key = ring.get(id).ok_or(RingError::Unknown(id))?;
        if ring.primary() == id {
            return Err(RingError::InUse(id));
        }
        let primary = ring.get(ring.primary()).ok_or(RingError::Unknown(ring.primary()))?;
        lacking(members, "still uses the key", |summary| !summary.seals_with(key) && summary.has(primary))
    }
}

impl fmt::Display for RingSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.revision)?;
        for (index, fingerprint) in self.fingerprints.iter().enumerate() {
            write!(f, "{}{fingerprint:08x}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// A member whose record says nothing of a ring has what it was started with, which we do not know.
fn lacking<'a>(
    members: impl IntoIterator<Item = (&'a str, Option<RingSummary>)>,
    what: &str,
    fine: impl Fn(&RingSummary) -> bool,
) -> Result<(), RingError> {
    let lacking: Vec<String> = members
        .into_iter()
        .filter(|(_, summary)| !summary.as_ref().is_some_and(&fine))
        .map(|(node_id, _)| format!("{node_id} {what}"))
        .collect();
    if lacking.is_empty() { Ok(()) } else { Err(RingError::WouldCutOff(lacking)) }
}

fn fingerprint(key: &[u8; 32]) -> [u8; 8] {
    let mut input = b"drover ring key".to_vec();
    input.extend(key);
    let mut first = [0; 8];
    for (to, from) in first.iter_mut().zip(digest(&SHA256, &input).as_ref()) {
        *to = *from;
    }
    first
}

fn short(key: &[u8; 32]) -> u32 {
    let [a, b, c, d, ..] = fingerprint(key);
    u32::from_be_bytes([a, b, c, d])
}

fn id_of(key: &[u8; 32]) -> KeyId {
    let [first, ..] = fingerprint(key);
    first
}
