//! A short way for requests that come very often: one who may serve a connection before the routes see it.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// Serves what it can of a connection; the rest is for the routes. It stands behind the gate: whoever connects may do so.
pub trait Express: Send + Sync + 'static {
    /// Serves the requests of a connection in their order until it has ended or the daemon stops. At the first request that is
    /// for the routes it gives the connection back, with all that was read of it and not answered.
    fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        stopping: CancellationToken,
    ) -> BoxFuture<'static, Option<(TcpStream, Bytes)>>;
}
