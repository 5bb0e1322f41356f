//! The pool of models for agents on nodes: what a node's worker carries here is answered as the HTTP front answers it, under the
//! same limits and the same budget.
//!
//! ```text
//! node:  codex ─ HTTP, loopback ─> the worker's door ─┬─ TLS, gRPC ──────────> grpc ────┐
//!                                                     └─ files of the mailbox > mailbox ─┤
//! here:                                     provider <─ shell <─ http's routes <─ desk <─┘
//! ```
//!
//! An exchange is one request and its answer. It belongs to the desk and not to a connection: a carriage that breaks is taken up
//! again by the id of the exchange, behind the last frame that arrived, and the provider is asked once. The node is known by
//! its certificate, or by the mailbox that only this user can write; it never sees a key.

mod desk;
mod files;
mod grpc;
mod mailbox;
mod whereabouts;
mod wire;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use axum::Router;
use drover_config::Config;
use drover_service::pki::issue_own;
use drover_service::{Context, Server};

pub use files::{Answers, Asks, pool_dir};
pub(crate) use grpc::node_of;
pub use whereabouts::Whereabouts;
pub use wire::{Ask, BadFrame, Frame};

use desk::Desk;

/// The dispatcher's own name among the nodes of its instance. No node of a swarm has one without a slash.
pub const NODE_ID: &str = "llm-dispatcher";

/// Gives the dispatcher the identity by which nodes know it, before it binds, if nodes are to come at all.
pub(crate) fn identify(config: &Config, ctx: &Context) -> anyhow::Result<()> {
    if config.worker.nodes_use_dispatcher() {
        let issued = issue_own(ctx, NODE_ID);
        ctx.use_identity(issued.context("failed to make the identity by which nodes know the dispatcher")?);
    }
    Ok(())
}

/// What serves nodes beside the port: started when the port is bound.
pub(crate) struct Post {
    desk: Desk,
    root: PathBuf,
}

impl Post {
    /// Adds the pool to what nodes reach. `None` when no node is to ask it.
    pub(crate) fn open(config: &Config, ctx: &Context, routes: Router, server: Server) -> (Server, Option<Self>) {
        if !config.worker.nodes_ask_pool() {
            return (server, None);
        }
        let desk = Desk::new(ctx, routes);
        let server = server.grpc_nodes(grpc::Door::service(&desk));
        (server, Some(Self { desk, root: config.mailbox_root(ctx.state().path()) }))
    }

    /// Looks after the mailbox until the daemon ends.
    pub(crate) fn start(self, ctx: &Context) {
        let keeper = self.desk.clone();
        ctx.spawn("pool desk", async move { keeper.keep().await });
        ctx.spawn("pool mailbox", mailbox::serve(self.desk, self.root, ctx.clone()));
    }
}

/// Says in the mailbox where nodes reach the dispatcher, until it ends.
pub(crate) fn tell_whereabouts(config: &Config, ctx: &Context, listen: std::net::SocketAddr) {
    if !config.worker.nodes_use_dispatcher() {
        return;
    }
    let root = config.mailbox_root(ctx.state().path());
    let stopping = ctx.shutdown().clone();
    ctx.spawn("whereabouts", async move {
        let here = Whereabouts::of(listen);
        let said = here.clone();
        let act = |root: PathBuf, act: fn(&Whereabouts, &Path) -> std::io::Result<()>, here: Whereabouts| {
            tokio::task::spawn_blocking(move || act(&here, &root))
        };
        if let Ok(Err(error)) = act(root.clone(), Whereabouts::write, said).await {
            tracing::warn!(%error, mailbox = %root.display(), "nodes are not told where the dispatcher is");
        }
        stopping.cancelled().await;
        let _ = act(root, Whereabouts::remove, here).await;
    });
}
