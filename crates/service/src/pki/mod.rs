//! Who is who: the certificate authority of an instance, the identities of its nodes, and the ring of gossip keys.
//!
//! ```text
//! <state>/pki/          Authority: ca.key ca.crt instance.json ring.json issued.jsonl [revoked.crl]
//!      │ issue(node_id)
//!      ▼
//! <node>/identity/      Identity:  node.key node.crt ca.crt identity.json ring.json [revoked.crl]
//! ```
//!
//! A certificate names one node of one instance and nothing else. Whoever holds the ring key alone is nobody: the ring keeps
//! strangers from taking part at all, the certificate says who speaks.

mod authority;
mod files;
mod identity;
mod login_side;
mod name;
mod ring;
mod trust;

use std::io;
use std::path::PathBuf;

pub use authority::{Authority, Issued};
pub use identity::{Follower, Identity, IdentityHandle};
pub use login_side::issue_own;
pub use name::{MAX_NODE_ID, node_domain};
pub use ring::{KeyId, KeyRing, MAX_KEYS, RING_LABEL, RingError, RingKeyInfo, RingSummary};
pub use trust::{CertFault, Certificate, Trust};
pub(crate) use trust::{name_and_serial, node_id_of};

/// Names one instance: 16 random bytes that its authority chose.
pub type ClusterId = [u8; 16];

/// Why keys or certificates cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("failed to use {path}: check that it exists and belongs to you")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others can read what must be secret.
    #[error(
        "{path} can be read by others: its key has to be taken for stolen; make a new one, or chmod 600 it if you know better"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// Another user owns what decides whom we trust.
    #[error("{path} belongs to uid {owner}, not to uid {me}: use an identity of your own")]
    Foreign {
        /// The file or directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        me: u32,
    },
    /// A file says something else than it should.
    #[error("{path} is damaged ({what}): issue the identity again, or restore the file")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A name that no node can have.
    #[error("{0:?} cannot name a node: it must have 1 to {MAX_NODE_ID} bytes and no control characters")]
    Name(String),
    /// Making a key or certificate failed.
    #[error("failed to make a certificate")]
    Make(#[from] rcgen::Error),
    /// The system has no random numbers.
    #[error("the system gives no random numbers")]
    Random,
    /// The ring of gossip keys cannot be changed in that way.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// TLS cannot be set up with these files.
    #[error("failed to set up TLS with this identity: {0}")]
    Tls(String),
}

/// Fills `bytes` from the system's random numbers.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    use ::ring::rand::SecureRandom as _;
    let mut bytes = [0; N];
    ::ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| PkiError::Random)?;
    Ok(bytes)
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests;
