//! From a configuration to a serving allocator.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_proto::allocator::allocator_service_server::AllocatorServiceServer;
use drover_service::{Context, Daemon, MAX_MESSAGE_BYTES, NoArgs, Server};

use crate::allocator::Allocator;
use crate::backend::Backend;
use crate::board::Board;
use crate::catalogue::BackendKind;
use crate::cluster::{Clusters, serve_relay};
use crate::grpc::Grpc;
use crate::local::{self, Local};
use crate::membership::{Membership, keep_voters};
use crate::metrics::Metrics;
use crate::slurm::Slurm;
use crate::static_hosts::StaticHosts;
use crate::store::Store;

/// The first instance on a host listens here.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7951);

/// The daemon.
pub struct SlurmAllocator;

impl Daemon for SlurmAllocator {
    const NAME: &'static str = "slurm-allocator";
    const ABOUT: &'static str = "Turns launch specs into running workers and says how they fare";
    type Args = NoArgs;

    async fn run(config: Arc<Config>, _args: NoArgs, ctx: Context) -> anyhow::Result<()> {
        let listener = ctx.bind("slurm-allocator", config.allocator.listen, DEFAULT_LISTEN)?;
        // Every swarm of an earlier allocator is on the board before anybody can ask: a snapshot without one of them
        // would say that it has ended.
        let clusters = Clusters::new(&ctx, &config);
        let allocator = assemble(&config, &clusters, &ctx).await?;
        let far: Vec<_> = clusters.all().into_iter().filter(|cluster| !cluster.settings().own_follower).collect();
        serve_relay(&ctx, &far)?;
        let service = AllocatorServiceServer::new(Grpc::new(allocator, &clusters, &ctx))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Server::new(&ctx).grpc(service).serve(listener)?;
        ctx.shutdown().cancelled().await;
        Ok(())
    }
}

/// Backends, with what they had before.
async fn assemble(config: &Arc<Config>, clusters: &Clusters, ctx: &Context) -> anyhow::Result<Allocator> {
    let store = Store::new(ctx.state().join("allocator").context("cannot use the state directory")?);
    let mailbox = Mailbox::new(config.mailbox_root(ctx.state().path()));
    let mut records = {
        let (store, mailbox) = (store.clone(), mailbox.clone());
        tokio::task::spawn_blocking(move || {
            local::make_mailbox_root(&mailbox).with_context(|| format!("cannot make {}", mailbox.root().display()))?;
            Ok::<_, anyhow::Error>(store.load()?)
        })
        .await??
    };
    let board = Board::default();
    let metrics = Metrics::register(&ctx.registry());
    let elsewhere = clusters.followers().into_keys().collect();
    let membership = Membership::new(ctx, config, &mailbox, elsewhere);
    let local = Local::new(ctx, config, board.clone(), store.clone(), mailbox.clone(), metrics.clone(), &membership)
        .context("cannot use the state directory")?;
    let mut of = |kind| records.extract_if(.., |record| record.backend == kind).collect::<Vec<_>>();
    let slurm = Slurm::new(ctx, config, clusters, &board, &store, &metrics, &membership, of(BackendKind::Slurm));
    let hosts = StaticHosts::new(ctx, config, board.clone(), store, mailbox, metrics, &membership);
    local.restore(of(BackendKind::Local)).await?;
    hosts.restore(of(BackendKind::Static)).await?;
    ctx.spawn("voters", keep_voters(membership, board.clone(), ctx.clone()));
    let backends: BTreeMap<BackendKind, Arc<dyn Backend>> = BTreeMap::from([
        (BackendKind::Local, Arc::new(local) as _),
        (BackendKind::Static, Arc::new(hosts) as _),
        (BackendKind::Slurm, Arc::new(slurm) as _),
    ]);
    Ok(Allocator::new(ctx, Arc::clone(config), board, backends))
}
