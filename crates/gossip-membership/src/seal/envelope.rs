//! The bytes around what is said, and the keys that seal it. Whoever holds a ring key can do all that is in here, except to
//! make the key of a pair: for that one of the two secret X25519 keys is needed.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};

use crate::core::ClusterId;

/// Longest datagram that is looked at. What we send ourselves stays below the path's usual limit of 1,400 bytes, except a hello
/// of a node with very many labels.
pub const MAX_DATAGRAM: usize = 4096;
/// Version of the envelope and of what is in it.
pub const VERSION: u8 = 1;
/// Bytes before what is sealed.
pub const HEADER: usize = 19;
/// Bytes that the seal adds at the end.
pub const TAG: usize = 16;
/// Bytes that a datagram between two nodes has beside its message.
pub const OVERHEAD: usize = HEADER + TAG;

/// What kind of datagram it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Between two nodes that know each other.
    Pair,
    /// First contact.
    Hello,
    /// A hint why a datagram was not taken.
    Notice,
}

/// What stands before the sealed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Kind of datagram.
    pub kind: Kind,
    /// Ring key, or the reason in a notice.
    pub key_id: u8,
    /// Sender and boot; in a notice those of the refused datagram.
    pub tag: u64,
    /// Never twice in one boot.
    pub counter: u64,
}

impl Header {
    /// The bytes.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = VERSION;
        bytes[1] = match self.kind {
            Kind::Pair => 1,
            Kind::Hello => 2,
            Kind::Notice => 3,
        };
        bytes[2] = self.key_id;
        bytes[3..11].copy_from_slice(&self.tag.to_be_bytes());
        bytes[11..].copy_from_slice(&self.counter.to_be_bytes());
        bytes
    }

    /// Reads them; `None` for another version or kind.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Option<Self> {
        let kind = match (bytes[0], bytes[1]) {
            (VERSION, 1) => Kind::Pair,
            (VERSION, 2) => Kind::Hello,
            (VERSION, 3) => Kind::Notice,
            _ => return None,
        };
        let number = |at: usize| bytes[at..at + 8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        Some(Self { kind, key_id: bytes[2], tag: number(3), counter: number(11) })
    }
}

/// Names a boot of a node: the first 8 bytes of SHA-256 of both. Says nothing to those who do not know the node.
pub fn boot_tag(node_id: &str, boot: u64) -> u64 {
    let mut input = b"drover gossip boot\0".to_vec();
    input.extend(boot.to_be_bytes());
    input.extend(node_id.as_bytes());
    digest(&SHA256, &input).as_ref().iter().take(8).fold(0, |tag, byte| tag << 8 | u64::from(*byte))
}

/// One end of a pair, as far as everybody knows it.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// Its boot.
    pub tag: u64,
    /// The public key in its record.
    pub dh_public: &'a [u8; 32],
}

/// The key that seals what `from` sends to `to`. `shared` is what the two agreed on; all else may be known to anybody.
pub fn pair_key(
    ring_key: &[u8; 32],
    shared: &[u8; 32],
    cluster: &ClusterId,
    from: End<'_>,
    to: End<'_>,
) -> Option<[u8; 32]> {
    let salt = Salt::new(HKDF_SHA256, ring_key);
    let info: [&[u8]; 6] = [
        b"drover gossip pair 1",
        cluster,
        &from.tag.to_be_bytes(),
        &to.tag.to_be_bytes(),
        from.dh_public,
        to.dh_public,
    ];
    expand(&salt, shared, &info)
}

/// The key of a sender's hellos: everybody with the ring key can make it.
pub fn hello_key(ring_key: &[u8; 32], salt: &[u8; 16]) -> Option<[u8; 32]> {
    expand(&Salt::new(HKDF_SHA256, salt), ring_key, &[b"drover gossip hello 1"])
}

struct Bytes32;

impl KeyType for Bytes32 {
    fn len(&self) -> usize {
        32
    }
}

fn expand(salt: &Salt, secret: &[u8], info: &[&[u8]]) -> Option<[u8; 32]> {
    let mut key = [0; 32];
    salt.extract(secret).expand(info, Bytes32).ok()?.fill(&mut key).ok()?;
    Some(key)
}

/// Seals what stands in `out` from `at` on; everything before it is bound in, and so is `context`.
pub fn seal_in_place(key: &[u8; 32], counter: u64, context: &[u8], out: &mut Vec<u8>, at: usize) -> bool {
    let Some(key) = cipher(key) else { return false };
    let Some((head, body)) = out.split_at_mut_checked(at) else { return false };
    let Ok(tag) = key.seal_in_place_separate_tag(nonce(counter), Aad::from([head, context].concat()), body) else {
        return false;
    };
    out.extend_from_slice(tag.as_ref());
    true
}

/// Opens what stands in `datagram` from `at` on into `out`; false when the seal does not fit.
pub fn open_into(key: &[u8; 32], counter: u64, context: &[u8], datagram: &[u8], at: usize, out: &mut Vec<u8>) -> bool {
    out.clear();
    let Some(key) = cipher(key) else { return false };
    let Some((head, body)) = datagram.split_at_checked(at) else { return false };
    out.extend_from_slice(body);
    let plain = key.open_in_place(nonce(counter), Aad::from([head, context].concat()), out).map(|plain| plain.len());
    out.truncate(plain.unwrap_or(0));
    plain.is_ok()
}

/// Writes a hello: header, salt, and `plain` sealed under the ring key.
pub fn write_hello(header: Header, ring_key: &[u8; 32], salt: &[u8; 16], plain: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    out.extend_from_slice(&header.to_bytes());
    out.extend_from_slice(salt);
    out.extend_from_slice(plain);
    hello_key(ring_key, salt).is_some_and(|key| seal_in_place(&key, header.counter, &[], out, HEADER + salt.len()))
}

fn cipher(key: &[u8; 32]) -> Option<LessSafeKey> {
    Some(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).ok()?))
}

/// Each key has one sender and the sender counts, so a counter is enough of a nonce.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}
