//! gRPC channels that find their daemon again after it was restarted elsewhere.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::address_book;
use crate::peer;
use crate::state_dir::StateDir;

/// Whom to connect to.
#[derive(Debug, Clone)]
pub enum Target {
    /// A daemon of this instance, looked up in the address book at every connect.
    Daemon {
        /// The instance.
        state: StateDir,
        /// Name in the address book.
        name: String,
    },
    /// A fixed `host:port`.
    Address(String),
}

/// How long one connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer with an open call that has said nothing for so long is asked whether it is still there.
const ASK_AFTER: Duration = Duration::from_secs(5);
/// A peer that does not even answer that for so long hangs: its calls fail, and people can be told.
const SILENT: Duration = Duration::from_secs(10);
/// Windows wide enough that one stream of events is not held up by acknowledgements.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// A channel that connects when first used and again whenever the connection is lost.
pub fn connect(target: Target) -> Channel {
    // The connector decides where to go; the URI only has to be one.
    Endpoint::from_static("http://drover.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(ASK_AFTER)
        .keep_alive_timeout(SILENT)
        .connect_with_connector_lazy(service_fn(move |_: Uri| {
            let target = target.clone();
            async move {
                let stream = match &target {
                    Target::Address(addr) => TcpStream::connect(addr).await?,
                    Target::Daemon { state, name } => connect_daemon(state, name).await?,
                };
                stream.set_nodelay(true)?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        }))
}

async fn connect_daemon(state: &StateDir, name: &str) -> io::Result<TcpStream> {
    let missing = |why: &str| io::Error::new(io::ErrorKind::NotFound, format!("{name} {why}"));
    let entry = address_book::read(state, name).ok_or_else(|| missing("is not running"))?;
    let addr: SocketAddr = entry.listen.parse().map_err(|_| missing("has no address yet"))?;
    let stream = TcpStream::connect(addr).await?;
    // The entry may be a moment out of date and the port in somebody else's hands by now.
    let owner = tokio::task::spawn_blocking(move || peer::listener_of(addr)).await.ok().flatten();
    if owner.is_some_and(|(uid, _)| uid != entry.uid) {
        return Err(missing("is not what listens on its address: another user's program does"));
    }
    Ok(stream)
}
