//! From settings to a running follower.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use drover_config::Config;
use drover_mailbox::is_network_fs;
use drover_proto::mailbox::mailbox_service_server::MailboxServiceServer;
use drover_service::{Context, Daemon, MAX_MESSAGE_BYTES, Server};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use crate::carry;
use crate::deliver::Inboxes;
use crate::lane::Bell;
use crate::metrics::Metrics;
use crate::settings::{FollowerArgs, Settings};
use crate::usage::Usage;
use crate::watch::Watches;

/// Where it listens unless told otherwise.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7952);
/// A look at a network file system waits for its server: several at a time. A local one answers from memory.
const NETWORK_LANES: usize = 4;

/// The follower. Clones are the same one.
#[derive(Clone)]
pub struct Follower {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) ctx: Context,
    pub(crate) settings: Settings,
    pub(crate) metrics: Metrics,
    pub(crate) watches: Arc<Watches>,
    pub(crate) inboxes: Inboxes,
    pub(crate) usage: Usage,
    /// Room for calls to nodes.
    pub(crate) carried: Arc<Semaphore>,
    /// Lanes of one stream.
    pub(crate) lanes: usize,
    /// Lanes of all streams.
    bells: Mutex<Vec<Weak<Bell>>>,
}

impl Shared {
    pub(crate) fn register(&self, new: &[Arc<Bell>]) {
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|bell| bell.strong_count() > 0);
        bells.extend(new.iter().map(Arc::downgrade));
    }

    pub(crate) fn bells(&self) -> Vec<Arc<Bell>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}

impl Follower {
    /// Starts a follower's tasks; it serves nobody before its service is added to a server. Needs a tokio runtime.
    pub fn start(settings: Settings, ctx: &Context) -> anyhow::Result<Self> {
        let root = &settings.mailbox;
        make_root(root)
            .with_context(|| format!("cannot use mailbox {}: check that it can be written", root.display()))?;
        let network = is_network_fs(root)
            .with_context(|| format!("cannot tell which file system holds mailbox {}", root.display()))?;
        let metrics = Metrics::new(&mut ctx.registry().lock().unwrap_or_else(PoisonError::into_inner));
        let watch = settings.watch && network.is_none();
        info!(mailbox = %root.display(), file_system = network.unwrap_or("local"), watch, "mailbox opened");
        if let Some(name) = network {
            warn!(file_system = name, hot_poll = ?settings.hot_poll, cold_poll = ?settings.cold_poll, "the mailbox is on a network file system: outboxes are polled");
        }
        let usage = Usage::new();
        if let Some(long) = settings.end_when_idle {
            end_when_idle(ctx, usage.clone(), long);
        }
        Ok(Self {
            shared: Arc::new(Shared {
                usage,
                carried: Arc::new(Semaphore::new(carry::AT_ONCE)),
                watches: Arc::new(Watches::new(watch)),
                inboxes: Inboxes::start(&settings, ctx, &metrics),
                lanes: if network.is_some() { NETWORK_LANES } else { 1 },
                bells: Mutex::default(),
                ctx: ctx.clone(),
                settings,
                metrics,
            }),
        })
    }

    /// The gRPC service, with the message limits that all daemons share.
    pub fn service(&self) -> MailboxServiceServer<Self> {
        MailboxServiceServer::new(self.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Ends the daemon in order when nobody has used it for so long.
fn end_when_idle(ctx: &Context, usage: Usage, long: Duration) {
    let stopping = ctx.shutdown().clone();
    ctx.spawn("idle end", async move {
        if stopping.run_until_cancelled(usage.idle_for(long)).await.is_some() {
            info!(idle = ?long, "nobody uses this follower any more: ending");
            stopping.cancel();
        }
    });
}

/// The root, made when it is missing, without links and relative parts: what the file watcher says starts with it.
fn make_root(root: &Path) -> std::io::Result<PathBuf> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
    std::fs::canonicalize(root)
}

impl Daemon for Follower {
    const NAME: &'static str = "outbox-follower";
    const ABOUT: &'static str = "Appends to inboxes and tails outboxes on one side of the file system";
    type Args = FollowerArgs;
    /// It mostly waits for files.
    const HEAPS: i32 = 1;

    async fn run(config: Arc<Config>, args: FollowerArgs, ctx: Context) -> anyhow::Result<()> {
        let settings = Settings::new(&config, args, ctx.state().path());
        let explicit = ctx.explicit_listen().or(config.follower.listen);
        let listener = ctx.bind("outbox-follower", explicit, DEFAULT_LISTEN)?;
        let follower = Self::start(settings, &ctx)?;
        Server::new(&ctx).grpc(follower.service()).serve(listener)?;
        ctx.shutdown().cancelled().await;
        Ok(())
    }
}
