//! From configuration to a serving daemon.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_config::Config;
use drover_service::guard::{Doors, Guard, Role};
use drover_service::{Context, Daemon, NoArgs, Server, Token};
use rustix::process::Resource;
use tracing::{debug, info, warn};

use crate::cache::Cache;
use crate::errands::Errands;
use crate::grpc::{Door, Service};
use crate::http;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::pool;
use crate::settings::{self, Settings};
use crate::shell::{Driver, Start};

/// The daemon.
#[derive(Debug)]
pub struct Dispatcher;

/// When memory that the start needed is given back: after it, after a first run, and when all has been used.
const RELEASES: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(8), Duration::from_mins(2)];

/// Lets go of the code that only the start needed, which is most of what the daemon takes of memory while tasks wait.
async fn release_memory(ctx: Context) {
    for pause in RELEASES {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.shutdown().cancelled() => return,
        }
        if let Err(error) = drover_memory::release_code() {
            return debug!(%error, "memory of the start is not given back");
        }
    }
}

/// Every call and every caller is a connection, and the usual limit is meant for programs that have few.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        warn!(%error, "as many open files as before have to do");
    }
}

impl Daemon for Dispatcher {
    const NAME: &'static str = "llm-dispatcher";
    const ABOUT: &'static str =
        "Does many model calls at once, as fast as limits and money allow; loses none and pays for none twice";
    type Args = NoArgs;
    /// Handing a call from thread to thread costs more than all that is done for it; pages are read, and the ledger is written, on
    /// threads of their own.
    const ONE_THREAD: bool = true;

    fn grace(_config: &Config) -> Duration {
        settings::GRACE
    }

    async fn run(config: Arc<Config>, _args: NoArgs, ctx: Context) -> anyhow::Result<()> {
        raise_file_limit();
        let settings = Settings::new(&config, ctx.config_file())?;
        let explicit = ctx.explicit_listen().or(settings.listen());
        // Before it binds: only then its port takes nodes.
        pool::identify(&config, &ctx)?;
        let audit = ctx.state().path().join("audit");
        let doors = Doors { daemon: "dispatcher", roles: Role::OF_DISPATCHER, log: "dispatch" };
        let guard = Guard::new(&ctx, &config.security, doors, Token::default(), &audit)
            .with_context(|| format!("cannot keep the doors; the audit log is in {}", audit.display()))?;
        let listener = ctx.bind("the dispatcher", explicit, Settings::default_listen())?.with_guests(guard.guests());
        let lanes = settings.lanes()?;
        if let Some(source) = &settings.source {
            info!(config = %source, provider = %settings.scaling.provider.name, "configured");
        } else {
            warn!(
                "No configuration found: answers are simulated; `drover setup` sets a provider up, as does a node_scaling \
                 section in drover.yaml"
            );
        }

        let dir = ctx.state().join("dispatcher").context("failed to make dispatcher/ in the state directory")?;
        // Without a ledger nobody could say what was spent, so nothing is.
        let (ledger, closed) = Ledger::open(&dir)?;
        let metrics = Metrics::register(&ctx.registry());
        let start = Start {
            settings: settings.core(),
            lanes,
            ledger: ledger.clone(),
            zone: settings.zone.clone(),
            metrics: metrics.clone(),
            seed: settings::fresh_seed(),
        };
        let (pool, driver) = Driver::start(start, &ctx).await?;
        let pool = match settings.cache() {
            Some(cache) => pool.cached(Cache::open(&dir, cache, metrics.clone(), &ctx)),
            None => pool,
        };
        let price = |provider: &str, model: &str| settings.price(provider, model);
        let errands = Errands::new(&settings.scaling, settings.key_dir.as_deref(), price)?;
        let limits = &settings.scaling.limits;
        let nodes = Nodes::new(&config, &ctx, limits.max_nodes, settings.scaling.fetch.timeout.get());
        let errands = errands.on(nodes.clone());
        let service = Service::new(&ctx, pool, ledger, settings, errands, metrics);
        let mut server = Server::new(&ctx).grpc(Door::service(&service, &guard));
        if service.may_dispatch().is_ok() {
            let token = http::load_or_make_token(&dir)?;
            let (express, routes) = http::doors(&service.pool, service.errands.clone(), http::Access::new(token));
            server = server.http(routes).express(express);
        }
        let mut post = None;
        if service.may_dispatch().is_ok() {
            let routes = http::routes_for_nodes(&service.pool, service.errands.clone());
            (server, post) = pool::Post::open(&config, &ctx, routes, server);
            if let Some(nodes) = nodes {
                server = nodes.serve(server, &ctx);
            }
        }
        let listen = server.serve(listener)?;
        pool::tell_whereabouts(&config, &ctx, listen);
        if let Some(post) = post {
            post.start(&ctx);
        }
        drop(service);
        ctx.spawn("memory", release_memory(ctx.clone()));
        driver.run().await;
        guard.close().await;
        // The file is closed in order when the last call of the service is over; that must not hold up the end.
        let _ = tokio::time::timeout(Duration::from_secs(2), closed.wait()).await;
        Ok(())
    }
}
