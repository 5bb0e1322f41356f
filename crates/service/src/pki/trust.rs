//! Whom an instance trusts: certificates that its authority issued, that are valid now and not revoked.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::name;

/// Why a certificate is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CertFault {
    /// It cannot be read, or has no name of a node in it.
    #[error("the certificate is no certificate of a node")]
    Malformed,
    /// Another authority issued it, or none.
    #[error("the certificate is not from this instance")]
    Foreign,
    /// Its time is over.
    #[error("the certificate has expired: issue a new one, or check the clock")]
    Expired,
    /// Its time has not come.
    #[error("the certificate is not valid yet: check the clocks")]
    NotYet,
    /// It was withdrawn.
    #[error("the certificate was revoked")]
    Revoked,
}

/// What a certificate that was found good says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Whose it is.
    pub node_id: String,
    /// The node's Ed25519 key.
    pub public_key: [u8; 32],
}

/// The authority's certificates, and what was revoked. While an authority is replaced there are two: the new one, and the one that
/// issued what nodes still show.
#[derive(Clone)]
pub struct Trust {
    anchors: Arc<[TrustAnchor<'static>]>,
    cas: Arc<[CertificateDer<'static>]>,
    revoked: Option<Arc<(CertRevocationList<'static>, Vec<u8>)>>,
}

impl Trust {
    /// Trusts what these authorities issued; there is at least one.
    pub fn new(cas: Vec<CertificateDer<'static>>, revoked: Option<&[u8]>) -> Result<Self, CertFault> {
        let anchor = |ca| webpki::anchor_from_trusted_cert(ca).map(|anchor| anchor.to_owned());
        let anchors = cas.iter().map(anchor).collect::<Result<Vec<_>, _>>().map_err(|_| CertFault::Malformed)?;
        if anchors.is_empty() {
            return Err(CertFault::Malformed);
        }
        let revoked = revoked
            .map(|der| {
                let list = BorrowedCertRevocationList::from_der(der).and_then(|list| list.to_owned());
                list.map(|list| Arc::new((CertRevocationList::from(list), der.to_vec())))
            })
            .transpose()
            .map_err(|_| CertFault::Malformed)?;
        Ok(Self { anchors: anchors.into(), cas: cas.into(), revoked })
    }

    /// The authority's certificates, the newest first.
    pub fn cas(&self) -> &[CertificateDer<'static>] {
        &self.cas
    }

    /// The Ed25519 keys by which [`super::Authority::sign`] may have signed.
    pub fn authority_keys(&self) -> impl Iterator<Item = &[u8]> {
        self.anchors.iter().map(|anchor| {
            // The key is the end of the key's description; an Ed25519 key has 32 bytes.
            let info: &[u8] = &anchor.subject_public_key_info;
            info.get(info.len().saturating_sub(32)..).unwrap_or_default()
        })
    }

    /// The list of revoked certificates, signed by the authority, in DER.
    pub fn revoked(&self) -> Option<CertificateRevocationListDer<'static>> {
        self.revoked.as_ref().map(|revoked| revoked.1.clone().into())
    }

    /// Whether the certificate is good at `now`, in seconds of Unix time, and whose it is.
    pub fn check(&self, cert: &[u8], now: u64) -> Result<Certificate, CertFault> {
        let der = CertificateDer::from(cert);
        let cert = EndEntityCert::try_from(&der).map_err(|_| CertFault::Malformed)?;
        let lists: Vec<&CertRevocationList<'_>> = self.revoked.iter().map(|revoked| &revoked.0).collect();
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options.with_depth(RevocationCheckDepth::EndEntity).with_status_policy(UnknownStatusPolicy::Allow).build()
        });
        cert.verify_for_usage(
            &[webpki::ring::ED25519],
            &self.anchors,
            &[],
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(now)),
            KeyUsage::client_auth(),
            revocation,
            None,
        )
        .map_err(|error| fault(&error))?;
        read(&cert).ok_or(CertFault::Malformed)
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trust({} authorities, revocations: {})", self.cas.len(), self.revoked.is_some())
    }
}

/// What a certificate says that somebody else has found good.
pub(crate) fn node_id_of(cert: &CertificateDer<'_>) -> Option<String> {
    read(&EndEntityCert::try_from(cert).ok()?).map(|certificate| certificate.node_id)
}

/// Whose a certificate says that it is, and its serial number: for people, who are told about it whether or not it is believed.
pub(crate) fn name_and_serial(cert: &CertificateDer<'_>) -> Option<(Option<String>, String)> {
    let cert = EndEntityCert::try_from(cert).ok()?;
    Some((cert.valid_uri_names().next().and_then(name::node_id_of), super::to_hex(cert.serial())))
}

fn read(cert: &EndEntityCert<'_>) -> Option<Certificate> {
    // An Ed25519 key is a fixed heading of 12 bytes and the key.
    const HEADING: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    let spki = cert.subject_public_key_info();
    let public_key = spki.as_ref().strip_prefix(&HEADING)?.try_into().ok()?;
    let mut names = cert.valid_uri_names();
    let node_id = name::node_id_of(names.next()?)?;
    // Two names would be two nodes.
    names.next().is_none().then_some(Certificate { node_id, public_key })
}

fn fault(error: &webpki::Error) -> CertFault {
    use webpki::Error;
    match error {
        Error::CertExpired { .. } => CertFault::Expired,
        Error::CertNotValidYet { .. } => CertFault::NotYet,
        Error::CertRevoked => CertFault::Revoked,
        Error::UnknownIssuer | Error::InvalidSignatureForPublicKey | Error::CaUsedAsEndEntity => CertFault::Foreign,
        Error::UnsupportedSignatureAlgorithmContext(_) | Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            CertFault::Foreign
        }
        _ => CertFault::Malformed,
    }
}
