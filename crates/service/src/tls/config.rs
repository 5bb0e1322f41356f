//! How TLS is set up. One protocol version, one provider, no resumption: every connection shows its certificate.

use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, Error, RootCertStore, ServerConfig, version};

use crate::pki::{PkiError, Trust};

const ALPN: &[u8] = b"h2";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(trust: &Trust) -> Result<Arc<RootCertStore>, PkiError> {
    let mut roots = RootCertStore::empty();
    for ca in trust.cas() {
        roots.add(ca.clone()).map_err(failed)?;
    }
    Ok(Arc::new(roots))
}

/// Asks every client for a certificate of this instance.
pub(crate) fn server_config(
    trust: &Trust,
    cert: &CertificateDer<'static>,
    key: &PrivatePkcs8KeyDer<'static>,
) -> Result<Arc<ServerConfig>, PkiError> {
    let mut clients = WebPkiClientVerifier::builder_with_provider(roots(trust)?, provider());
    if let Some(revoked) = trust.revoked() {
        clients = clients.with_crls([revoked]).only_check_end_entity_revocation().allow_unknown_revocation_status();
    }
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(failed)?
        .with_client_cert_verifier(clients.build().map_err(failed)?)
        .with_single_cert(vec![cert.clone()], PrivateKeyDer::Pkcs8(key.clone_key()))
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Shows the node's certificate, and asks for one of this instance.
pub(crate) fn client_config(
    trust: &Trust,
    cert: &CertificateDer<'static>,
    key: &PrivatePkcs8KeyDer<'static>,
) -> Result<Arc<ClientConfig>, PkiError> {
    let mut servers = WebPkiServerVerifier::builder_with_provider(roots(trust)?, provider());
    if let Some(revoked) = trust.revoked() {
        servers = servers.with_crls([revoked]).only_check_end_entity_revocation().allow_unknown_revocation_status();
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(failed)?
        .with_webpki_verifier(servers.build().map_err(failed)?)
        .with_client_auth_cert(vec![cert.clone()], PrivateKeyDer::Pkcs8(key.clone_key()))
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn failed(error: impl Into<Box<dyn std::error::Error>>) -> PkiError {
    PkiError::Tls(error.into().to_string())
}

/// Why a handshake failed: a short name for the counter, and what to tell people.
pub(super) fn reason(error: &std::io::Error) -> (&'static str, String) {
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return ("broken", format!("the connection broke in the handshake: {error}"));
    };
    let words = |name, text: &str| (name, text.to_owned());
    match error {
        Error::NoCertificatesPresented => words("no_certificate", "it shows no certificate"),
        Error::InvalidCertificate(fault) => match fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                words("expired", "its certificate has expired: issue a new one, or check the clocks")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                words("not_yet_valid", "its certificate is not valid yet: check the clocks")
            }
            CertificateError::Revoked => words("revoked", "its certificate was revoked"),
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                words("foreign", "its certificate is not from this instance")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                words("wrong_name", "its certificate is for another node")
            }
            other => ("bad_certificate", format!("its certificate cannot be used: {other}")),
        },
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => {
                words("refused_us", "it refuses our certificate: it has expired, or its clock is wrong")
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                words("refused_us", "it refuses our certificate: it belongs to another instance")
            }
            AlertDescription::CertificateRevoked => words("refused_us", "it refuses our certificate: it was revoked"),
            other => ("refused_us", format!("it refuses the connection: {other:?}")),
        },
        other => ("broken", format!("the handshake failed: {other}")),
    }
}
