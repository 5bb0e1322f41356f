//! A node's identity: its key, its certificate, and whom it trusts. One directory, put on the node when it is launched.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use ring::signature::Ed25519KeyPair;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::authority::{CA_CERT, REVOKED, RING, read_revoked};
use super::files::{self, damaged};
use super::{ClusterId, KeyRing, PkiError, Trust, from_hex, to_hex};
use crate::tls;

const KEY: &str = "node.key";
const CERT: &str = "node.crt";
const ABOUT: &str = "identity.json";
/// Refusals are told to people so often at most.
const SAY_AGAIN_US: u64 = 10_000_000;

#[derive(Serialize, Deserialize)]
struct About {
    v: u32,
    node_id: String,
    cluster_id: String,
    expires: u64,
}

/// What an identity is made of.
pub(super) struct Parts {
    pub(super) node_id: String,
    pub(super) cluster_id: ClusterId,
    pub(super) expires: u64,
    pub(super) key: PrivatePkcs8KeyDer<'static>,
    pub(super) cert: CertificateDer<'static>,
    pub(super) cas: Vec<CertificateDer<'static>>,
    pub(super) revoked: Option<Vec<u8>>,
    pub(super) ring: KeyRing,
    pub(super) dir: Option<PathBuf>,
}

/// Who a node is, with the proof.
pub struct Identity {
    node_id: String,
    cluster_id: ClusterId,
    expires: u64,
    key: PrivatePkcs8KeyDer<'static>,
    signer: Ed25519KeyPair,
    cert: CertificateDer<'static>,
    trust: Trust,
    ring: KeyRing,
    dir: Option<PathBuf>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: Arc<ClientConfig>,
}

impl Identity {
    pub(super) fn new(parts: Parts) -> Result<Self, PkiError> {
        let Parts { node_id, cluster_id, expires, key, cert, cas, revoked, ring, dir } = parts;
        let signer = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der())
            .map_err(|error| PkiError::Tls(format!("the node's key: {error}")))?;
        let trust = Trust::new(cas, revoked.as_deref()).map_err(|fault| PkiError::Tls(fault.to_string()))?;
        let server = tls::server_config(&trust, &cert, &key)?;
        let client = tls::client_config(&trust, &cert, &key)?;
        Ok(Self { node_id, cluster_id, expires, key, signer, cert, trust, ring, dir, server, client })
    }

    /// Reads the directory that a launch put on the node. The certificate must be for the node that the directory names.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join(ABOUT);
        let about: About =
            serde_json::from_slice(&files::read(&path)?).map_err(|error| damaged(&path, error.to_string()))?;
        let cluster_id = from_hex(&about.cluster_id).and_then(|bytes| ClusterId::try_from(bytes).ok());
        let cluster_id = cluster_id.ok_or_else(|| damaged(&path, "the cluster id is not 16 bytes"))?;
        let path = dir.join(CERT);
        let cert =
            CertificateDer::from_pem_slice(&files::read(&path)?).map_err(|error| damaged(&path, error.to_string()))?;
        let path = dir.join(KEY);
        let key = PrivatePkcs8KeyDer::from_pem_slice(&files::read_secret(&path)?)
            .map_err(|error| damaged(&path, error.to_string()))?;
        let ring_path = dir.join(RING);
        let ring = KeyRing::from_json(&files::read_secret(&ring_path)?)
            .map_err(|error| damaged(&ring_path, error.to_string()))?;
        let identity = Self::new(Parts {
            node_id: about.node_id,
            cluster_id,
            expires: about.expires,
            key,
            cert,
            cas: read_cas(&dir.join(CA_CERT))?,
            revoked: read_revoked(&dir.join(REVOKED))?,
            ring,
            dir: Some(dir.to_owned()),
        })?;
        if super::trust::node_id_of(&identity.cert).as_deref() != Some(&identity.node_id) {
            return Err(damaged(&dir.join(CERT), format!("it is not the certificate of {}", identity.node_id)));
        }
        Ok(identity)
    }

    /// The files of the directory, by name. `node.key` and `ring.json` are secrets.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        let about =
            About { v: 1, node_id: self.node_id.clone(), cluster_id: to_hex(&self.cluster_id), expires: self.expires };
        let mut files = vec![
            (KEY, pem("PRIVATE KEY", self.key.secret_pkcs8_der())),
            (CERT, pem("CERTIFICATE", &self.cert)),
            (CA_CERT, self.trust.cas().iter().flat_map(|ca| pem("CERTIFICATE", ca)).collect()),
            (ABOUT, serde_json::to_vec(&about).unwrap_or_default()),
            (RING, self.ring.to_json().into_bytes()),
        ];
        if let Some(list) = self.trust.revoked() {
            files.push((REVOKED, pem("X509 CRL", list.as_ref())));
        }
        files
    }

    /// Writes the directory, mode 0700. A directory that is there is overwritten file by file.
    pub fn store(&self, dir: &Path) -> Result<(), PkiError> {
        files::private_dir(dir)?;
        self.files().into_iter().try_for_each(|(name, bytes)| files::write(&dir.join(name), &bytes))
    }

    /// The node.
    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// The instance that it belongs to.
    pub fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }

    /// When its certificate's time is over, in seconds of Unix time.
    pub fn expires(&self) -> u64 {
        self.expires
    }

    /// Its certificate in DER.
    pub fn cert(&self) -> &[u8] {
        &self.cert
    }

    /// Whom it trusts.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The ring that it was given, or that was stored last.
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// The same node, trusting somebody else's authority: what an impostor would do.
    #[cfg(test)]
    pub(crate) fn trusting(&self, trust: &Trust) -> Result<Self, PkiError> {
        Self::new(Parts {
            node_id: self.node_id.clone(),
            cluster_id: self.cluster_id,
            expires: self.expires,
            key: self.key.clone_key(),
            cert: self.cert.clone(),
            cas: trust.cas().to_vec(),
            revoked: None,
            ring: self.ring.clone(),
            dir: None,
        })
    }

    /// Signs with the node's key.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        // Ed25519 signatures have 64 bytes.
        for (to, from) in signature.iter_mut().zip(self.signer.sign(message).as_ref()) {
            *to = *from;
        }
        signature
    }

    /// Keeps a changed ring, so that the next start has it.
    pub fn store_ring(&self, ring: &KeyRing) -> Result<(), PkiError> {
        match &self.dir {
            Some(dir) => files::write(&dir.join(RING), ring.to_json().as_bytes()),
            None => Ok(()),
        }
    }
}

/// Whose certificates are believed: one, or two while an authority is replaced.
pub(super) fn read_cas(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let text = files::read(path)?;
    let cas = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let cas = cas.map_err(|error| damaged(path, error.to_string()))?;
    if cas.is_empty() { Err(damaged(path, "there is no certificate in it")) } else { Ok(cas) }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} of {})", self.node_id, to_hex(&self.cluster_id[..4]))
    }
}

/// The identity in force. New connections use the one that was put in last; those that are open go on.
#[derive(Debug, Clone)]
pub struct IdentityHandle {
    now: Arc<ArcSwap<Identity>>,
    /// When people were last told that somebody refuses it.
    said: Arc<AtomicU64>,
}

impl IdentityHandle {
    /// Begins with this one.
    pub fn new(identity: Identity) -> Self {
        Self::from(Arc::new(identity))
    }

    /// The one in force.
    pub fn current(&self) -> Arc<Identity> {
        self.now.load_full()
    }

    /// Uses another one from now on: a fresh certificate of the same node, or a new list of revoked ones.
    pub fn replace(&self, identity: Identity) {
        self.now.store(Arc::new(identity));
    }

    /// Tells people that somebody refuses this identity, or shows one that cannot be believed; not more than once in a while.
    pub(crate) fn tell_refusal(&self, why: &str) {
        let (now, last) = (crate::now_us(), self.said.load(Ordering::Relaxed));
        if now.saturating_sub(last) >= SAY_AGAIN_US
            && self.said.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            warn!(node_id = self.current().node_id, "no connection to a node: {why}");
        }
    }
}

impl From<Arc<Identity>> for IdentityHandle {
    fn from(identity: Arc<Identity>) -> Self {
        Self { now: Arc::new(ArcSwap::new(identity)), said: Arc::default() }
    }
}

/// Which files stand in the directory: number of the file, time of the change and length of each.
pub(super) type Stamp = Vec<Option<(u64, i64, i64, u64)>>;

/// Looks whether the login side has put a fresh certificate, another list of authorities or of revoked ones into the directory of an
/// identity, and puts it in force. Reads files: not for async code.
pub struct Follower {
    handle: IdentityHandle,
    seen: Stamp,
}

impl Follower {
    /// Begins with what stands in the directory now.
    pub fn new(handle: IdentityHandle) -> Self {
        let seen = handle.current().dir.as_deref().map(stamp).unwrap_or_default();
        Self { handle, seen }
    }

    /// The identity that is in force since this look; `None` when nothing has changed. When what is there cannot be used, the one in
    /// force stays, and the next look tries again: the files are written one after another.
    pub fn look(&mut self) -> Result<Option<Arc<Identity>>, PkiError> {
        let known = self.handle.current();
        let Some(dir) = &known.dir else { return Ok(None) };
        let now = stamp(dir);
        if now == self.seen {
            return Ok(None);
        }
        let fresh = Identity::load(dir)?;
        if fresh.node_id != known.node_id || fresh.cluster_id != known.cluster_id {
            return Err(damaged(&dir.join(ABOUT), format!("it is another node's, not that of {}", known.node_id)));
        }
        self.seen = now;
        let same = fresh.cert == known.cert
            && fresh.trust.cas() == known.trust.cas()
            && fresh.trust.revoked() == known.trust.revoked();
        if same {
            return Ok(None);
        }
        self.handle.replace(fresh);
        Ok(Some(self.handle.current()))
    }
}

fn stamp(dir: &Path) -> Stamp {
    stamp_of(dir, &[KEY, CERT, CA_CERT, ABOUT, REVOKED])
}

pub(super) fn stamp_of(dir: &Path, names: &[&str]) -> Stamp {
    let of = |name: &&str| {
        let meta = std::fs::metadata(dir.join(name)).ok()?;
        Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()))
    };
    names.iter().map(of).collect()
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----").into_bytes();
    let mut column = 0;
    for three in der.chunks(3) {
        if column % 64 == 0 {
            text.push(b'\n');
        }
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4_u32 {
            let digit = if at as usize <= three.len() { ALPHABET[(bits >> (18 - 6 * at) & 63) as usize] } else { b'=' };
            text.push(digit);
        }
        column += 4;
    }
    text.extend_from_slice(format!("\n-----END {label}-----\n").as_bytes());
    text
}
