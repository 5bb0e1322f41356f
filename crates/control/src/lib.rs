//! The JSON-line control plane `codeswarm.router.v1`: one JSON object per line over TCP.

use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::{Context, Listener};

/// How the control plane treats its clients.
#[derive(Debug, Clone)]
pub struct ControlSettings {
    /// Longest line that a client may send; a longer one closes its connection.
    pub max_line_bytes: usize,
    /// Bytes of lines that may wait for one client before it is cut off.
    pub client_max_bytes: usize,
    /// Also send `debug` events about what the adapter itself does.
    pub debug: bool,
}

/// Serves clients until the daemon shuts down.
pub async fn serve<T>(
    ctx: Context,
    listener: Listener,
    client: RouterServiceClient<T>,
    settings: ControlSettings,
) -> anyhow::Result<()>
where
    T: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
    T::Future: Send,
{
    let _ = (listener, client, settings);
    ctx.shutdown().cancelled().await;
    Ok(())
}
