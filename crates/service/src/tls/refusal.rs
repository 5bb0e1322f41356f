//! Why a certificate was not taken, in words: whose it is, which one, and what to do. Both sides say it: the one that refuses, and
//! the one that is refused, which TLS tells no more than the kind of fault.

use std::cell::RefCell;
use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::pki::{IdentityHandle, name_and_serial};

tokio::task_local! {
    /// What the other side of the handshake under way shows.
    static SHOWN: RefCell<Option<String>>;
}

/// Runs a handshake, and tells what certificate the other side showed in it, if any.
pub(super) async fn noting<T>(handshake: impl Future<Output = T>) -> (T, Option<String>) {
    SHOWN
        .scope(RefCell::default(), async {
            let done = handshake.await;
            (done, SHOWN.with(RefCell::take))
        })
        .await
}

/// A certificate as people look for it: `drover pki list` has the same number.
pub(super) fn described(cert: &CertificateDer<'_>) -> String {
    match name_and_serial(cert) {
        Some((Some(node), serial)) => format!("certificate {serial} of {node}"),
        Some((None, serial)) => format!("certificate {serial}"),
        None => "certificate".to_owned(),
    }
}

/// Judges as another does, and notes what was shown.
#[derive(Debug)]
pub(super) struct Noting<V: ?Sized>(pub(super) Arc<V>);

impl<V: ?Sized> Noting<V> {
    fn note(cert: &CertificateDer<'_>) {
        // Outside of a handshake of ours nobody asks.
        let _ = SHOWN.try_with(|shown| shown.replace(Some(described(cert))));
    }
}

impl ClientCertVerifier for Noting<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::note(cert);
        self.0.verify_client_cert(cert, others, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }

    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }
}

impl ServerCertVerifier for Noting<dyn ServerCertVerifier> {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::note(cert);
        self.0.verify_server_cert(cert, others, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// Why a handshake failed: a short name for the counter, and what to tell people.
pub(super) fn reason(error: &io::Error, shown: Option<&str>) -> (&'static str, String) {
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return ("broken", format!("the connection broke in the handshake: {error}"));
    };
    let its = format!("its {}", shown.unwrap_or("certificate"));
    match error {
        Error::NoCertificatesPresented => ("no_certificate", "it shows no certificate".to_owned()),
        Error::InvalidCertificate(fault) => match fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ("expired", format!("{its} has expired{}: {RENEW}", at(fault)))
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                ("not_yet_valid", format!("{its} is not valid yet{}: check the clocks of both hosts", at(fault)))
            }
            CertificateError::Revoked => ("revoked", format!("{its} was revoked: {REISSUE}")),
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                ("foreign", format!("{its} is not from this instance: {OURS}"))
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ("wrong_name", format!("{its} is for another node"))
            }
            other => ("bad_certificate", format!("{its} cannot be used: {other}")),
        },
        Error::AlertReceived(alert) => ("refused_us", refused_us(*alert, "our certificate")),
        other => ("broken", format!("the handshake failed: {other}")),
    }
}

const RENEW: &str =
    "renew it (`drover pki rotate DIR`; launches renew those of swarms by themselves), or set the clock right";
const REISSUE: &str = "if the node is to come back, `drover pki issue NODE --to DIR` makes another one";
const OURS: &str = "another one issued it; give the node an identity of this one (`drover pki issue NODE --to DIR`)";

/// When it expired, or is going to be valid.
fn at(fault: &CertificateError) -> String {
    let (CertificateError::ExpiredContext { not_after: at, .. }
    | CertificateError::NotValidYetContext { not_before: at, .. }) = fault
    else {
        return String::new();
    };
    let at = i64::try_from(at.as_secs()).ok().and_then(|at| jiff::Timestamp::from_second(at).ok());
    at.map_or_else(String::new, |at| format!(" ({at})"))
}

/// What an alert of the other side means for the certificate that it was shown.
fn refused_us(alert: AlertDescription, shown: &str) -> String {
    match alert {
        AlertDescription::CertificateExpired => {
            format!("it refuses {shown}, which has expired or is not valid yet by its clock: {RENEW}")
        }
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            format!("it refuses {shown}, which is from another instance: use an identity that its own one issued")
        }
        AlertDescription::CertificateRevoked => format!("it refuses {shown}, which was revoked: {REISSUE}"),
        AlertDescription::CertificateRequired => "it wants a certificate and was shown none".to_owned(),
        other => format!("it refuses the connection: {other:?}; its log says why"),
    }
}

/// The innermost reason of a failed call between nodes: the layers above it only say "transport error".
pub fn why(status: &tonic::Status) -> String {
    let Some(mut reason) = status.source() else { return status.message().to_owned() };
    while let Some(next) = reason.source() {
        reason = next;
    }
    reason.to_string()
}

/// A connection whose other side may refuse our certificate only now: in TLS 1.3 the client has finished before it is judged.
pub(super) struct Judged<S> {
    inner: S,
    identity: IdentityHandle,
    /// Whom we talk to.
    peer: String,
    /// What we have shown.
    shown: String,
}

impl<S> Judged<S> {
    pub(super) fn new(inner: S, identity: IdentityHandle, peer: String, shown: String) -> Self {
        Self { inner, identity, peer, shown }
    }

    /// Says in words what the other side says by a number.
    fn in_words(&self, error: io::Error) -> io::Error {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(Error::AlertReceived(alert)) => {
                let why = format!("{}: {}", self.peer, refused_us(*alert, &format!("our {}", self.shown)));
                self.identity.tell_refusal(&why);
                io::Error::new(io::ErrorKind::PermissionDenied, why)
            }
            _ => error,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Judged<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        polled.map_err(|error| self.in_words(error))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Judged<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        polled.map_err(|error| self.in_words(error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bytes);
        polled.map_err(|error| self.in_words(error))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
