//! From configuration to a serving daemon.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_config::Config;
use drover_service::{Context, Daemon, NoArgs, Server};
use tracing::{info, warn};

use crate::errands::Errands;
use crate::grpc::{Door, Service};
use crate::http;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::settings::{self, Settings};
use crate::shell::{Driver, Start};

/// The daemon.
#[derive(Debug)]
pub struct Dispatcher;

impl Daemon for Dispatcher {
    const NAME: &'static str = "llm-dispatcher";
    const ABOUT: &'static str =
        "Does many model calls at once, as fast as limits and money allow; loses none and pays for none twice";
    type Args = NoArgs;

    fn grace(_config: &Config) -> Duration {
        settings::GRACE
    }

    async fn run(config: Arc<Config>, _args: NoArgs, ctx: Context) -> anyhow::Result<()> {
        let settings = Settings::new(&config, ctx.config_file())?;
        let explicit = ctx.explicit_listen().or(settings.listen());
        let listener = ctx.bind("the dispatcher", explicit, Settings::default_listen())?;
        let lanes = settings.lanes()?;
        if let Some(source) = &settings.source {
            info!(config = %source, provider = %settings.scaling.provider.name, "configured");
        } else {
            warn!(
                "No configuration found: answers are simulated; to use a provider add a node_scaling section to drover.yaml"
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
        let errands = Errands::new(&settings.scaling)?;
        let service = Service::new(&ctx, pool, ledger, settings, errands, metrics);
        let mut server = Server::new(&ctx).grpc(Door::service(&service));
        if service.may_dispatch().is_ok() {
            let token = http::load_or_make_token(&dir)?;
            server = server.http(http::router(&service.pool, http::Access::new(token)));
        }
        server.serve(listener)?;
        drop(service);
        driver.run().await;
        // The file is closed in order when the last call of the service is over; that must not hold up the end.
        let _ = tokio::time::timeout(Duration::from_secs(2), closed.wait()).await;
        Ok(())
    }
}
