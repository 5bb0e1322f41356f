//! One port per daemon: gRPC with health and reflection, `/healthz`, `/metrics`, `/targets`, and what else the daemon serves.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use axum::response::IntoResponse;
use futures::future::BoxFuture;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::{Service, ServiceExt as _};
use tower_http::classify::{GrpcCode, GrpcErrorsAsFailures, SharedClassifier};
use tower_http::trace::TraceLayer;
use tracing::{debug, error, info};

use crate::calls::{self, Calls};
use crate::context::Context;
use crate::express::Express;
use crate::listener::Listener;
use crate::notify;
use crate::own_routes::own_routes;
use crate::telemetry;
use crate::tls::Admitted;

/// Collects what a daemon serves.
pub struct Server {
    ctx: Context,
    routes: Routes,
    http: axum::Router,
    names: Vec<&'static str>,
    nodes: Routes,
    node_names: Vec<&'static str>,
    express: Option<Arc<dyn Express>>,
}

impl Server {
    /// A server with health, reflection, `/healthz` and `/metrics` only.
    pub fn new(ctx: &Context) -> Self {
        Self {
            ctx: ctx.clone(),
            routes: Routes::default(),
            http: axum::Router::new(),
            names: Vec::new(),
            nodes: Routes::default(),
            node_names: Vec::new(),
            express: None,
        }
    }

    /// Adds a gRPC service.
    #[must_use]
    pub fn grpc<S>(mut self, service: S) -> Self
    where
        S: Service<axum::http::Request<tonic::body::Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: IntoResponse,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// Adds a gRPC service that only nodes of this instance reach, over TLS with their certificate. Who asks is in the
    /// extensions of the request, as [`crate::NodePeer`].
    #[must_use]
    pub fn grpc_nodes<S>(mut self, service: S) -> Self
    where
        S: Service<axum::http::Request<tonic::body::Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: IntoResponse,
        S::Future: Send + 'static,
    {
        self.node_names.push(S::NAME);
        self.nodes = self.nodes.add_service(service);
        self
    }

    /// Adds HTTP routes.
    #[must_use]
    pub fn http(mut self, routes: axum::Router) -> Self {
        self.http = self.http.merge(routes);
        self
    }

    /// Lets somebody serve connections of users of this host before the routes do.
    #[must_use]
    pub fn express(mut self, express: Arc<dyn Express>) -> Self {
        self.express = Some(express);
        self
    }

    /// Starts to serve, enters the address in the address book and returns it.
    pub fn serve(self, listener: Listener) -> anyhow::Result<SocketAddr> {
        let addr = listener.local_addr();
        let ctx = self.ctx.clone();
        let (health, health_service) = tonic_health::server::health_reporter();
        let nodes = self.nodes.add_service(health_service.clone()).prepare().into_axum_router();
        let mut routes = self.routes.add_service(health_service);
        let served = self.names.clone();
        let reflection = move || {
            let builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(drover_proto::DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health");
            served.iter().fold(builder, |builder, name| builder.with_service_name(*name))
        };
        let older = reflection.clone();
        routes = routes
            .add_service(WhenAsked::new(move || reflection().build_v1()))
            .add_service(WhenAsked::new(move || older().build_v1alpha()));

        let names: Vec<_> = self.names.iter().chain(&self.node_names).copied().collect();
        let stopping = ctx.shutdown().clone();
        ctx.spawn("health", async move {
            for name in names.iter().copied().chain([""]) {
                health.set_service_status(name, tonic_health::ServingStatus::Serving).await;
            }
            stopping.cancelled().await;
            for name in names.into_iter().chain([""]) {
                health.set_service_status(name, tonic_health::ServingStatus::NotServing).await;
            }
        });

        let services = self.names.iter().chain(&self.node_names).copied().chain(["grpc.health.v1.Health"]);
        let calls = Calls::register(&mut ctx.registry().lock().unwrap_or_else(PoisonError::into_inner), services);
        let counted = || axum::middleware::from_fn_with_state(calls.clone(), calls::measure);
        let traced = || TraceLayer::new(faults()).make_span_with(telemetry::rpc_span).on_request(()).on_response(());
        let nodes = nodes.layer(counted()).layer(traced());
        let observed = own_routes(&ctx);
        let grpc = routes.prepare().into_axum_router().layer(counted()).layer(traced());
        let app = grpc.merge(observed.clone()).merge(self.http);
        ctx.spawn("server", accept_loop(ctx.clone(), listener, Doors { app, nodes, observed, express: self.express }));
        ctx.publish_listen(addr)?;
        info!(listen = %addr, "listening");
        notify::tell(&format!("READY=1\nSTATUS=listening on {addr}"));
        if let Some(every) = notify::expected_every() {
            ctx.spawn("watchdog", notify::signs_of_life(every, addr, ctx.shutdown().clone()));
        }
        Ok(addr)
    }
}

/// Which answers are a fault of the daemon's and belong into its log. A refusal is an answer: its caller is told, and a log that it
/// fills hides what matters.
fn faults() -> SharedClassifier<GrpcErrorsAsFailures> {
    const ANSWERS: [GrpcCode; 11] = [
        GrpcCode::Cancelled,
        GrpcCode::InvalidArgument,
        GrpcCode::NotFound,
        GrpcCode::AlreadyExists,
        GrpcCode::PermissionDenied,
        GrpcCode::ResourceExhausted,
        GrpcCode::FailedPrecondition,
        GrpcCode::Aborted,
        GrpcCode::OutOfRange,
        GrpcCode::Unimplemented,
        GrpcCode::Unauthenticated,
    ];
    SharedClassifier::new(ANSWERS.into_iter().fold(GrpcErrorsAsFailures::new(), GrpcErrorsAsFailures::with_success))
}

type Make<S> = dyn Fn() -> Result<S, tonic_reflection::server::Error> + Send + Sync;

/// A service that is made when somebody first asks for it. Reflection reads the descriptions of all services: processor time and
/// memory that a daemon which stands on every node does not spend at each start for somebody who hardly ever comes.
struct WhenAsked<S> {
    made: Arc<OnceLock<Option<S>>>,
    make: Arc<Make<S>>,
}

impl<S> WhenAsked<S> {
    fn new(make: impl Fn() -> Result<S, tonic_reflection::server::Error> + Send + Sync + 'static) -> Self {
        Self { made: Arc::default(), make: Arc::new(make) }
    }
}

impl<S> Clone for WhenAsked<S> {
    fn clone(&self) -> Self {
        Self { made: Arc::clone(&self.made), make: Arc::clone(&self.make) }
    }
}

impl<S: NamedService> NamedService for WhenAsked<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<axum::http::Request<Body>> for WhenAsked<S>
where
    S: Service<axum::http::Request<Body>, Response = axum::http::Response<Body>, Error = Infallible> + Clone,
    S::Future: Send + 'static,
{
    type Response = axum::http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: axum::http::Request<Body>) -> Self::Future {
        let make = || (self.make)().inspect_err(|error| error!(%error, "this service cannot be made")).ok();
        match self.made.get_or_init(make) {
            Some(service) => Box::pin(service.clone().call(request)),
            None => Box::pin(std::future::ready(Ok(tonic::Status::internal("it cannot be made").into_http()))),
        }
    }
}

/// How long a connection may go on after the word to stop: streams get the chance to end with a status.
const DRAIN: Duration = Duration::from_secs(5);

/// What is served to whom.
#[derive(Clone)]
struct Doors {
    /// To users of this host who may connect.
    app: axum::Router,
    /// To nodes with a certificate.
    nodes: axum::Router,
    /// To users of this host who may only look.
    observed: axum::Router,
    /// To users of this host who may connect, before anything else.
    express: Option<Arc<dyn Express>>,
}

async fn accept_loop(ctx: Context, listener: Listener, doors: Doors) {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(10));
    http.http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_concurrent_streams(1024)
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(20));
    loop {
        let (stream, peer) = tokio::select! {
            () = ctx.shutdown().cancelled() => return,
            accepted = listener.accept_any() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: give others the time to close some.
                    debug!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let http = http.clone();
        let doors = doors.clone();
        let gate = listener.gate().clone();
        let stopping = ctx.shutdown().clone();
        ctx.spawn("connection", async move {
            let admitted = tokio::select! {
                admitted = gate.admit(stream, peer) => admitted,
                () = stopping.cancelled() => None,
            };
            match admitted {
                None => {}
                Some(Admitted::Local(stream, caller)) => match doors.express {
                    None => serve_one(&http, stream, doors.app, caller, peer, stopping).await,
                    Some(express) => {
                        let Some((stream, read)) = express.serve(stream, stopping.clone()).await else { return };
                        let (rest, answers) = stream.into_split();
                        let again = tokio::io::join(io::Cursor::new(read).chain(rest), answers);
                        serve_one(&http, again, doors.app, caller, peer, stopping).await;
                    }
                },
                Some(Admitted::Observer(stream)) => serve_one(&http, stream, doors.observed, (), peer, stopping).await,
                Some(Admitted::Node(stream, node)) => {
                    serve_one(&http, *stream, doors.nodes, node, peer, stopping).await;
                }
            }
        });
    }
}

/// Every request of the connection says who makes it.
async fn serve_one<W: Clone + Send + Sync + 'static>(
    http: &Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: axum::Router,
    who: W,
    peer: SocketAddr,
    stopping: CancellationToken,
) {
    let app = app.map_request(move |mut request: axum::http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(who.clone());
        request
    });
    let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(app));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(DRAIN, connection.as_mut()).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%peer, %error, "connection ended");
    }
}
