//! What a node claims of itself, signed, and who checks it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ring::digest::{SHA256, digest};

/// First 8 bytes of SHA-256 of the node id: what a node is called inside the protocol. Its place on the ring of watchers
/// follows from it, so that no node chooses its neighbours without choosing its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeKey(pub u64);

impl NodeKey {
    /// The key of a node id.
    pub fn of(node_id: &str) -> Self {
        let hash = digest(&SHA256, node_id.as_bytes());
        let mut first = [0; 8];
        for (to, from) in first.iter_mut().zip(hash.as_ref()) {
            *to = *from;
        }
        Self(u64::from_be_bytes(first))
    }
}

impl std::fmt::Display for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Names one instance of drover; bound into every signature, so that a record is worth nothing in another instance.
pub type ClusterId = [u8; 16];

/// Bounds of what a record may hold.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest node id in bytes.
    pub node_id: usize,
    /// Longest region name in bytes.
    pub region: usize,
    /// Longest key of a capability or label in bytes.
    pub key: usize,
    /// Longest value of a capability or label in bytes.
    pub value: usize,
    /// Most capabilities, and most labels.
    pub pairs: usize,
    /// Longest encoded record in bytes, without signature and certificate.
    pub record: usize,
    /// Longest certificate in bytes.
    pub cert: usize,
}

/// The bounds that every node of a cluster holds to.
pub const BOUNDS: Bounds =
    Bounds { node_id: 128, region: 64, key: 64, value: 255, pairs: 32, record: 1024, cert: 2048 };

/// A node's claim about itself. Greater `(boot, incarnation)` wins; no clock decides between two claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Name of the node, unique in the cluster.
    pub node_id: String,
    /// Grows with every start of the node's process.
    pub boot: u64,
    /// Grows with every new claim of one boot: changed metadata, a refuted suspicion, the leave.
    pub incarnation: u32,
    /// Where it takes datagrams.
    pub addr: SocketAddr,
    /// Port of its gRPC server at the same address, which also carries the streams of the protocol.
    pub rpc_port: u16,
    /// Version of the protocol that it speaks.
    pub protocol: u16,
    /// Region that it is in; empty when there is only one.
    pub region: String,
    /// What it can do: models, tools.
    pub capabilities: BTreeMap<String, String>,
    /// Labels; `swarm_id` and `node_index` are among them.
    pub labels: BTreeMap<String, String>,
    /// Public X25519 key of this boot, from which pair keys are agreed.
    pub dh_public: [u8; 32],
    /// It says good-bye; its last record.
    pub leaving: bool,
    /// Wall-clock microseconds when it was made. Shown to people, never used for ordering.
    pub timestamp_us: u64,
}

impl Record {
    /// The node's key.
    pub fn key(&self) -> NodeKey {
        NodeKey::of(&self.node_id)
    }

    /// What orders two records of one node.
    pub fn version(&self) -> (u64, u32) {
        (self.boot, self.incarnation)
    }
}

/// A record with the proof that it is the node's own.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedRecord {
    /// The claim.
    pub record: Record,
    /// Key of `record.node_id`, computed once.
    pub key: NodeKey,
    /// Ed25519 signature by the certificate's key over [`Record::signed_bytes`].
    pub signature: [u8; 64],
    /// Certificate in DER. Empty when it was left out because the receiver knows it from an earlier record.
    pub cert: Arc<[u8]>,
}

impl std::fmt::Debug for SignedRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Record { node_id, boot, incarnation, leaving, .. } = &self.record;
        write!(f, "{node_id} boot {boot} incarnation {incarnation}{}", if *leaving { " leaving" } else { "" })
    }
}

/// First-hand load of a node: on every ping and ack, and sent on change. Not part of the record, because it changes too
/// often to be a rumour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// 0 to 200 stands for 0.0 to 1.0.
    pub score: u8,
    /// The node calls itself overloaded.
    pub overloaded: bool,
    /// Counts up with each report of one boot, so that a late datagram does not bring back an old one; wraps.
    pub seq: u16,
}

impl Load {
    /// Score as a number from 0 to 1.
    pub fn ratio(self) -> f64 {
        f64::from(self.score.min(200)) / 200.0
    }

    /// Scaled and clipped from a number from 0 to 1.
    pub fn score_of(ratio: f64) -> u8 {
        if ratio.is_nan() { 0 } else { (ratio.clamp(0.0, 1.0) * 200.0).round() as u8 }
    }

    /// Whether this is the later report of one boot.
    pub fn is_after(self, other: Self) -> bool {
        let ahead = self.seq.wrapping_sub(other.seq);
        ahead != 0 && ahead < 1 << 15
    }
}

/// Why bytes are not a record, or a record is out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The bytes end too early.
    #[error("record is truncated")]
    Truncated,
    /// Bytes follow the end.
    #[error("record has bytes after its end")]
    Trailing,
    /// A field is longer than allowed.
    #[error("{0} is longer than allowed; shorten it")]
    TooLong(&'static str),
    /// A field that must not be empty is.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// Text that is not UTF-8.
    #[error("{0} is not valid UTF-8")]
    NotText(&'static str),
    /// A number, flag or order of keys that the one canonical form does not have.
    #[error("{0} is not in canonical form")]
    NotCanonical(&'static str),
    /// A layout of another version.
    #[error("record format {0} is unknown; upgrade this node")]
    UnknownFormat(u8),
    /// More bytes than a record may have.
    #[error("record needs {0} bytes of at most 1024; remove labels or capabilities")]
    TooLarge(usize),
}

/// Why a record is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Untrusted {
    /// The certificate is not from the CA of this instance, or not readable.
    #[error("certificate is not from this instance")]
    BadCert,
    /// The certificate is not valid now.
    #[error("certificate is expired or not yet valid; check the clocks")]
    ExpiredCert,
    /// The signature does not fit.
    #[error("signature does not fit")]
    BadSignature,
    /// The certificate is for another node.
    #[error("certificate is for another node")]
    ForeignName,
    /// No certificate came with it and none is known.
    #[error("no certificate is known for the node")]
    NoCert,
}

/// Decides whether a record is its node's own. The real one looks at certificates; the simulator has a cheap one.
pub trait Verifier: Send {
    /// `record.cert` is never empty: the core fills in what it knows.
    fn check(&mut self, record: &SignedRecord) -> Result<(), Untrusted>;
}

/// Signs this node's own records.
pub trait Signer: Send {
    /// The record has been found within [`BOUNDS`].
    fn sign(&mut self, record: Record) -> SignedRecord;
}
