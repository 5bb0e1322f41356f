//! Records that are believed because of their certificates, and the signing of our own.

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_service::pki::{Certificate, Identity, Trust};
use ring::digest::{SHA256, digest};
use ring::signature::{ED25519, UnparsedPublicKey};

use super::refusal::untrusted;
use crate::core::{ClusterId, Record, SignedRecord, Signer, Untrusted, Verifier};

/// A certificate that was found good is not looked at again for so long, in seconds.
const RECHECK: u64 = 60;
/// Certificates that are remembered; only good ones are, so only the authority can fill this.
const REMEMBERED: usize = 16_384;

/// Tells the time, in seconds of Unix time.
pub(super) type UnixClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Believes a record when its certificate is from our authority, is for the node that the record names, and its key signed the
/// record for this instance.
#[derive(Clone)]
pub struct Certified {
    trust: Trust,
    cluster: ClusterId,
    clock: UnixClock,
    known: BTreeMap<[u8; 32], (Certificate, u64)>,
}

impl Certified {
    /// Checks by what this identity trusts.
    pub fn new(identity: &Identity, clock: Arc<dyn Fn() -> u64 + Send + Sync>) -> Self {
        Self { trust: identity.trust().clone(), cluster: identity.cluster_id(), clock, known: BTreeMap::new() }
    }

    /// Trusts by another identity from now on: a fresh certificate, or a new list of revoked ones.
    pub fn renew(&mut self, identity: &Identity) {
        self.trust = identity.trust().clone();
        self.known.clear();
    }

    /// Like [`Verifier::check`], and says with which key the node signs.
    pub(super) fn key_of(&mut self, record: &SignedRecord) -> Result<[u8; 32], Untrusted> {
        if record.cert.is_empty() {
            return Err(Untrusted::NoCert);
        }
        let certificate = self.certificate(&record.cert)?;
        if certificate.node_id != record.record.node_id {
            return Err(Untrusted::ForeignName);
        }
        let message = record.record.signed_bytes(&self.cluster).map_err(|_| Untrusted::BadSignature)?;
        verify(&certificate.public_key, &message, &record.signature)?;
        Ok(certificate.public_key)
    }

    fn certificate(&mut self, der: &[u8]) -> Result<Certificate, Untrusted> {
        let now = (self.clock)();
        let hash = hash(der);
        if let Some((certificate, at)) = self.known.get(&hash)
            && now.abs_diff(*at) < RECHECK
        {
            return Ok(certificate.clone());
        }
        let certificate = self.trust.check(der, now).map_err(untrusted)?;
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        self.known.insert(hash, (certificate.clone(), now));
        Ok(certificate)
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

fn hash(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    for (to, from) in hash.iter_mut().zip(digest(&SHA256, bytes).as_ref()) {
        *to = *from;
    }
    hash
}

/// Signs this node's own records with its identity.
#[derive(Debug, Clone)]
pub struct NodeSigner {
    identity: Arc<Identity>,
}

impl NodeSigner {
    /// Signs as this node.
    pub fn new(identity: Arc<Identity>) -> Self {
        Self { identity }
    }
}

impl Signer for NodeSigner {
    fn sign(&mut self, record: Record) -> SignedRecord {
        // A record out of bounds cannot be encoded, and so not be signed: nobody will believe it.
        let signature =
            record.signed_bytes(&self.identity.cluster_id()).map_or([0; 64], |message| self.identity.sign(&message));
        SignedRecord::new(record, signature, Arc::from(self.identity.cert()))
    }
}
