//! Records that are believed because of their certificates, and the signing of our own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_service::pki::{Certificate, Identity, IdentityHandle, Trust};
use ring::digest::{Context, SHA256};
use ring::signature::{ED25519, UnparsedPublicKey};

use super::refusal::untrusted;
use crate::core::{ClusterId, Record, SignedRecord, Signer, Untrusted, Verifier};

/// A certificate that was found good is not looked at again for so long, in seconds.
const RECHECK: u64 = 60;
/// Certificates that are remembered; only good ones are, so only the authority can fill this.
const REMEMBERED: usize = 16_384;
/// Signatures that are remembered for the moment in which they are checked twice.
const RECENT: usize = 64;

/// Tells the time, in seconds of Unix time.
pub(super) type UnixClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Believes a record when its certificate is from our authority, is for the node that the record names, and its key signed the
/// record for this instance. Clones are the same one: what was checked for one is not checked again for another.
#[derive(Clone)]
pub struct Certified {
    cluster: ClusterId,
    clock: UnixClock,
    checked: Arc<Mutex<Checked>>,
}

/// What was found good, and by what.
struct Checked {
    trust: Trust,
    certificates: BTreeMap<[u8; 32], (Certificate, u64)>,
    /// Signatures that fit, by the hash of all that they cover: a node that says hello brings a record that is checked here at the door
    /// and once more when it becomes a member.
    records: BTreeMap<[u8; 32], u64>,
}

impl Certified {
    /// Checks by what this identity trusts.
    pub fn new(identity: &Identity, clock: Arc<dyn Fn() -> u64 + Send + Sync>) -> Self {
        let checked =
            Checked { trust: identity.trust().clone(), certificates: BTreeMap::new(), records: BTreeMap::new() };
        Self { cluster: identity.cluster_id(), clock, checked: Arc::new(Mutex::new(checked)) }
    }

    /// Trusts by another identity from now on: other authorities, or a new list of revoked certificates.
    pub fn renew(&self, identity: &Identity) {
        let mut checked = self.checked();
        checked.trust = identity.trust().clone();
        checked.certificates.clear();
        checked.records.clear();
    }

    fn checked(&self) -> MutexGuard<'_, Checked> {
        self.checked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Like [`Verifier::check`], and says with which key the node signs.
    pub(super) fn key_of(&self, record: &SignedRecord) -> Result<[u8; 32], Untrusted> {
        if record.cert.is_empty() {
            return Err(Untrusted::NoCert);
        }
        let now = (self.clock)();
        let mut checked = self.checked();
        let certificate = checked.certificate(&record.cert, now)?;
        if certificate.node_id != record.record.node_id {
            return Err(Untrusted::ForeignName);
        }
        let message = record.record.signed_bytes(&self.cluster).map_err(|_| Untrusted::BadSignature)?;
        checked.signature(&certificate.public_key, &message, &record.signature, now)?;
        Ok(certificate.public_key)
    }
}

impl Checked {
    fn certificate(&mut self, der: &[u8], now: u64) -> Result<Certificate, Untrusted> {
        let hash = hash(&[der]);
        if let Some((certificate, at)) = self.certificates.get(&hash)
            && now.abs_diff(*at) < RECHECK
        {
            return Ok(certificate.clone());
        }
        let certificate = self.trust.check(der, now).map_err(untrusted)?;
        if self.certificates.len() >= REMEMBERED {
            self.certificates.clear();
        }
        self.certificates.insert(hash, (certificate.clone(), now));
        Ok(certificate)
    }

    fn signature(&mut self, key: &[u8; 32], message: &[u8], signature: &[u8; 64], now: u64) -> Result<(), Untrusted> {
        let hash = hash(&[key, signature, message]);
        if self.records.get(&hash).is_some_and(|at| now.abs_diff(*at) < RECHECK) {
            return Ok(());
        }
        verify(key, message, signature)?;
        if self.records.len() >= RECENT {
            self.records.clear();
        }
        self.records.insert(hash, now);
        Ok(())
    }
}

impl Verifier for Certified {
    fn check(&mut self, record: &SignedRecord) -> Result<(), Untrusted> {
        self.key_of(record).map(drop)
    }
}

/// Whether the signature fits.
pub(super) fn verify(public_key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> Result<(), Untrusted> {
    UnparsedPublicKey::new(&ED25519, public_key).verify(message, signature).map_err(|_| Untrusted::BadSignature)
}

/// Of parts of which all but the last have a fixed length.
fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    for (to, from) in hash.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    hash
}

/// Signs this node's own records with the identity that is in force.
#[derive(Debug, Clone)]
pub struct NodeSigner {
    identity: IdentityHandle,
}

impl NodeSigner {
    /// Signs as this node.
    pub fn new(identity: impl Into<IdentityHandle>) -> Self {
        Self { identity: identity.into() }
    }
}

impl Signer for NodeSigner {
    fn sign(&mut self, record: Record) -> SignedRecord {
        let identity = self.identity.current();
        // A record out of bounds cannot be encoded, and so not be signed: nobody will believe it.
        let signature = record.signed_bytes(&identity.cluster_id()).map_or([0; 64], |message| identity.sign(&message));
        SignedRecord::new(record, signature, Arc::from(identity.cert()))
    }
}
