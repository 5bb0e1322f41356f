//! The JSON-line control plane `codeswarm.router.v1`: one JSON object per line over TCP, for the clients that exist.
//!
//! It translates lines to calls of the router's gRPC service and answers and events back to lines. It owns nothing and
//! decides nothing: no swarm, no prompt and no event lives here, and it works the same with the router in its process or
//! elsewhere.
//!
//! ```text
//! client --lines--> connection --Command--> desk --calls--> router
//! client <--lines-- outbox <--answers------ desk
//!                   outbox <--events, each encoded once-- hub <-- pump <--one WatchEvents for all-- router
//! ```
//!
//! The parts that read what strangers send are pure and public for fuzzing: [`LineDecoder`], [`decode`] and
//! [`Command::check`].

mod answer;
mod connection;
mod desk;
mod envelope;
mod hub;
mod json;
mod line;
mod lister;
mod metrics;
mod outbox;
mod pump;
mod request;
mod translate;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::{Caller, Context, Door, Listener};
use drover_types::Failure;
use tracing::{info, warn};

pub use line::{Command, Inbound, LineDecoder, LineTooLong, PROTOCOL, RequestId, ShownToken, decode};

use crate::connection::serve_client;
use crate::desk::Desk;
use crate::hub::Hub;
use crate::lister::Lister;
use crate::metrics::Metrics;

/// How long to wait before accepting again when the system has no room for a connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Who may use the control plane. Whoever does sees every event.
pub trait Entrance: std::fmt::Debug + Send + Sync + 'static {
    /// Whether the first line of a connection has to be a token.
    fn wants_token(&self) -> bool;
    /// The caller as the router is to know them, or why they may not come in. Their token is the one they showed.
    fn admit(&self, caller: Caller, token: Option<&str>) -> Result<Caller, Failure>;
}

/// How the control plane treats its clients.
#[derive(Debug, Clone)]
pub struct ControlSettings {
    /// Longest line that a client may send; a longer one closes its connection.
    pub max_line_bytes: usize,
    /// Bytes of lines that may wait for one client before it is cut off.
    pub client_max_bytes: usize,
    /// Also send `debug` events about what the adapter itself does.
    pub debug: bool,
    /// Who may come in.
    pub entrance: Arc<dyn Entrance>,
}

/// Serves clients until the daemon shuts down. Clients that are still connected then have their requests answered or
/// rejected, and are closed by tasks that the shutdown waits for.
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
    let upstream = upstream::upstream(client);
    let hub = Hub::new(settings.debug, Metrics::register(&ctx.registry()));
    ctx.spawn("control-events", pump::follow_events(ctx.clone(), Arc::clone(&hub), Arc::clone(&upstream)));
    let lister = Lister::start(&ctx, Arc::clone(&upstream));
    let desk = Arc::new(Desk { upstream, hub, lister });
    let settings = Arc::new(settings);
    info!(listen = %listener.local_addr(), "JSON-line control plane ready");
    loop {
        let accepted = tokio::select! {
            () = ctx.shutdown().cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, caller)) => {
                let caller = Caller { door: Door::JsonLine, ..caller };
                ctx.spawn(
                    "control-client",
                    serve_client(ctx.clone(), stream, caller, Arc::clone(&desk), Arc::clone(&settings)),
                );
            }
            Err(error) => {
                warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
