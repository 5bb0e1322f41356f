//! One port per daemon: gRPC with health and reflection, `/healthz`, `/metrics`, and what else the daemon serves.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::Service;
use tower_http::trace::TraceLayer;
use tracing::{debug, info};

use crate::context::Context;
use crate::listener::Listener;
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

    /// Starts to serve, enters the address in the address book and returns it.
    pub fn serve(self, listener: Listener) -> anyhow::Result<SocketAddr> {
        let addr = listener.local_addr();
        let ctx = self.ctx.clone();
        let (health, health_service) = tonic_health::server::health_reporter();
        let nodes = self.nodes.add_service(health_service.clone()).prepare().into_axum_router();
        let mut routes = self.routes.add_service(health_service);
        let reflection = || {
            let builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(drover_proto::DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health");
            self.names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
        };
        routes = routes.add_service(reflection().build_v1()?).add_service(reflection().build_v1alpha()?);

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

        let traced = || TraceLayer::new_for_grpc().make_span_with(telemetry::rpc_span).on_request(()).on_response(());
        let nodes = nodes.layer(traced());
        let app = routes.prepare().into_axum_router().layer(traced()).merge(own_routes(&ctx)).merge(self.http);
        ctx.spawn("server", accept_loop(ctx.clone(), listener, app, nodes));
        ctx.publish_listen(addr)?;
        info!(listen = %addr, "listening");
        Ok(addr)
    }
}

fn own_routes(ctx: &Context) -> axum::Router {
    let stopping = ctx.shutdown().clone();
    let healthz = move || {
        let (status, text) = if stopping.is_cancelled() {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
        } else {
            (StatusCode::OK, "ok\n")
        };
        async move { (status, text) }
    };
    let registry = ctx.registry();
    let metrics = move || {
        let mut text = String::new();
        let encoded = prometheus_client::encoding::text::encode(
            &mut text,
            &registry.lock().unwrap_or_else(PoisonError::into_inner),
        );
        async move {
            match encoded {
                Ok(()) => {
                    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                        .into_response()
                }
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }
        }
    };
    axum::Router::new().route("/healthz", get(healthz)).route("/metrics", get(metrics))
}

/// How long a connection may go on after the word to stop: streams get the chance to end with a status.
const DRAIN: Duration = Duration::from_secs(5);

async fn accept_loop(ctx: Context, listener: Listener, app: axum::Router, nodes: axum::Router) {
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
        let (app, nodes) = (app.clone(), nodes.clone());
        let gate = listener.gate().clone();
        let stopping = ctx.shutdown().clone();
        ctx.spawn("connection", async move {
            let admitted = tokio::select! {
                admitted = gate.admit(stream, peer) => admitted,
                () = stopping.cancelled() => None,
            };
            match admitted {
                None => {}
                Some(Admitted::Local(stream)) => serve_one(&http, stream, app, peer, stopping).await,
                Some(Admitted::Node(stream, node)) => {
                    let nodes = nodes.layer(axum::Extension(node));
                    serve_one(&http, *stream, nodes, peer, stopping).await;
                }
            }
        });
    }
}

async fn serve_one(
    http: &Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: axum::Router,
    peer: SocketAddr,
    stopping: CancellationToken,
) {
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
