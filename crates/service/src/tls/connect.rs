//! From one node to another.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::refusal::{Judged, described, noting, reason};
use crate::pki::{Identity, IdentityHandle, node_domain, node_id_of};

/// How long a connect with its handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_AFTER: Duration = Duration::from_secs(5);
const SILENT: Duration = Duration::from_secs(10);

/// A channel to a node that shows its certificate, and ours to it. It connects when first used and again whenever the
/// connection is lost, each time with the identity that is in force then.
pub fn connect_node(identity: &IdentityHandle, addr: SocketAddr, node_id: &str) -> Channel {
    let identity = identity.clone();
    let node_id = node_id.to_owned();
    Endpoint::from_static("http://drover.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(ASK_AFTER)
        .keep_alive_timeout(SILENT)
        .connect_with_connector_lazy(service_fn(move |_: Uri| {
            let (handle, node_id) = (identity.clone(), node_id.clone());
            async move {
                let identity = handle.current();
                let connected = connect_node_stream(&identity, addr, &node_id).await;
                let stream = connected.inspect_err(|error| {
                    if error.kind() == io::ErrorKind::PermissionDenied {
                        handle.tell_refusal(&error.to_string());
                    }
                })?;
                let (peer, shown) = (format!("{node_id} at {addr}"), described(&identity.cert().into()));
                Ok::<_, io::Error>(TokioIo::new(Judged::new(stream, handle, peer, shown)))
            }
        }))
}

/// A connection to a node, after the handshake. A refused TCP connection is told apart from every other failure by its kind.
pub async fn connect_node_stream(
    identity: &Identity,
    addr: SocketAddr,
    node_id: &str,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let refused = |why: &str| io::Error::new(io::ErrorKind::PermissionDenied, format!("{node_id} at {addr}: {why}"));
    let name = ServerName::try_from(node_domain(node_id)).map_err(|_| refused("its name cannot be asked for"))?;
    let connector = TlsConnector::from(std::sync::Arc::clone(&identity.client));
    let handshake = tokio::time::timeout(CONNECT_TIMEOUT, connector.connect(name, stream));
    let (handshake, shown) = noting(handshake).await;
    let stream = handshake
        .map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("{node_id} at {addr} does not finish the handshake"))
        })?
        .map_err(|error| refused(&reason(&error, shown.as_deref()).1))?;
    // The host name is a hash cut short; the certificate says the whole name.
    let named = stream.get_ref().1.peer_certificates().and_then(|chain| node_id_of(chain.first()?));
    if named.as_deref() == Some(node_id) {
        Ok(stream)
    } else {
        Err(refused(&format!("its {} is for another node", shown.as_deref().unwrap_or("certificate"))))
    }
}
