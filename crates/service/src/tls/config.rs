//! How TLS is set up. One protocol version, one provider, no resumption: every connection shows its certificate.

use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use super::refusal::Noting;
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
    let clients: Arc<dyn ClientCertVerifier> = clients.build().map_err(failed)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(failed)?
        .with_client_cert_verifier(Arc::new(Noting(clients)))
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
    let servers: Arc<dyn ServerCertVerifier> = servers.build().map_err(failed)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Noting(servers)))
        .with_client_auth_cert(vec![cert.clone()], PrivateKeyDer::Pkcs8(key.clone_key()))
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn failed(error: impl Into<Box<dyn std::error::Error>>) -> PkiError {
    PkiError::Tls(error.into().to_string())
}
