//! Why a datagram was dropped, and how often.

use drover_service::pki::CertFault;

use crate::core::Untrusted;

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal),+ $(,)?) => {
        /// Why a datagram was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
        pub enum Refusal {
            $($(#[$doc])* #[error($text)] $name,)+
        }

        impl Refusal {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Stable name for counters.
            pub fn code(self) -> &'static str {
                match self {
                    $(Self::$name => $code,)+
                }
            }
        }
    };
}

refusals! {
    /// It ends too early.
    Truncated = "truncated" "it ends too early",
    /// It is longer than any that we send.
    Oversized = "oversized" "it is too long",
    /// Another version, or no datagram of ours at all.
    UnknownVersion = "unknown_version" "it is of another version; upgrade the older node",
    /// It is not sealed.
    Plaintext = "plaintext" "it is not sealed; the sender has security.gossip_plaintext or no identity",
    /// Sealed with a ring key that we do not have.
    UnknownKey = "unknown_key" "it is sealed with a ring key that is not known here",
    /// The sender is not known. Harmless when it has just started: it is asked to introduce itself.
    UnknownPeer = "unknown_peer" "the sender is not known here yet",
    /// The seal does not fit.
    Forged = "forged" "the seal does not fit",
    /// It has been seen before, or is older than what is remembered.
    Replayed = "replayed" "it has been here before",
    /// From another instance that has the same ring key.
    WrongCluster = "wrong_cluster" "it belongs to another instance",
    /// The certificate is from another authority, or from none.
    BadCert = "bad_cert" "the certificate is not from this instance",
    /// The certificate is not valid now.
    ExpiredCert = "expired_cert" "the certificate is not valid now; issue a new one, or check the clocks",
    /// A signature does not fit.
    BadSignature = "bad_signature" "the signature does not fit",
    /// The certificate is for another node.
    ForeignName = "foreign_name" "the certificate is for another node",
    /// The sender's clock is ahead.
    Future = "future" "the sender's clock is far ahead of the one here; set the clocks",
    /// More than is looked at.
    TooMany = "too_many" "there are too many at once",
    /// It does not say what it should, though the seal fits.
    Malformed = "malformed" "it makes no sense",
}

impl Refusal {
    /// Reasons that are told to the sender, because it can do something about them.
    pub(super) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    pub(super) fn to_code(self) -> u8 {
        self as u8
    }
}

impl From<Untrusted> for Refusal {
    fn from(untrusted: Untrusted) -> Self {
        match untrusted {
            Untrusted::BadCert | Untrusted::NoCert => Self::BadCert,
            Untrusted::ExpiredCert => Self::ExpiredCert,
            Untrusted::BadSignature => Self::BadSignature,
            Untrusted::ForeignName => Self::ForeignName,
        }
    }
}

/// What the core calls a fault of a certificate.
pub(super) fn untrusted(fault: CertFault) -> Untrusted {
    match fault {
        CertFault::Malformed | CertFault::Foreign | CertFault::Revoked => Untrusted::BadCert,
        CertFault::Expired | CertFault::NotYet => Untrusted::ExpiredCert,
    }
}

/// How often each happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusals([u64; Refusal::ALL.len()]);

impl Default for Refusals {
    fn default() -> Self {
        Self([0; Refusal::ALL.len()])
    }
}

impl Refusals {
    /// How often that happened.
    pub fn get(&self, refusal: Refusal) -> u64 {
        self.0[refusal as usize]
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Each with its name.
    pub fn iter(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        Refusal::ALL.iter().map(|refusal| (*refusal, self.get(*refusal)))
    }

    pub(super) fn count(&mut self, refusal: Refusal) {
        self.0[refusal as usize] += 1;
    }
}
