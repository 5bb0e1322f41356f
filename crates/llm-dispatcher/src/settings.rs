//! What the daemon is told by its configuration, brought into the shapes that its parts want.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use drover_config::{Config, Env, ModelPricing, NodeScalingConfig, ProviderSettings};
use drover_service::ExitWith;

use crate::cache::CacheSettings;
use crate::call::{CallAnswer, CallError, CallRequest, FailureKind, Provider, Sink};
use crate::configured::{Configured, key_dir, key_file};
use crate::core::{HedgeSettings, LaneSettings, Money, Price, RetrySettings, Settings as CoreSettings};
use crate::ledger::Zone;
use crate::provider::{
    self, Endpoint, EndpointError, HttpClient, KeySource, MaxTokensField, Prices, ProviderKind, Sim,
};
use crate::setup;
use crate::shell::{Lanes, NewLane};

/// Port of gRPC and HTTP unless another is configured.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7955);
/// Exit code for a configuration that cannot be used.
const BAD_CONFIG: u8 = 78;
/// Tasks that may wait, whoever handed them in; runs hand in theirs as room becomes free.
const MOST_QUEUED: usize = 1_000_000;

/// Everything the daemon has to know.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The section in force.
    pub(crate) scaling: NodeScalingConfig,
    /// Where it came from, in words; `None` when nothing is configured and answers are simulated.
    pub(crate) source: Option<String>,
    /// What models cost that the table does not have, or has wrong.
    pricing: BTreeMap<String, ModelPricing>,
    /// Where days of the budget begin.
    pub(crate) zone: Zone,
    /// Where keys lie that no setting names.
    pub(crate) key_dir: Option<PathBuf>,
}

impl Settings {
    /// Brings the configuration together: that of drover, or an older one of the dispatcher alone, or simulated answers.
    pub(crate) fn new(config: &Config, source: Option<&Path>) -> anyhow::Result<Self> {
        let env = Env::of_process();
        let configured = Configured::of(config, source, &env)
            .map_err(|error| ExitWith { code: BAD_CONFIG, message: error.to_string() })?;
        let Configured { scaling, pricing, source } = configured;
        let zone = Zone::named(scaling.cost.timezone.as_deref())
            .map_err(|error| wrong(format!("node_scaling.cost.timezone: {error}")))?;
        Ok(Self { scaling, source, pricing, zone, key_dir: key_dir(&env) })
    }

    /// Address that is asked for; unset: the default, or a free port.
    pub(crate) fn listen(&self) -> Option<SocketAddr> {
        self.scaling.listen
    }

    /// Address unless another is asked for.
    pub(crate) fn default_listen() -> SocketAddr {
        DEFAULT_LISTEN
    }

    /// What the core is set to; its lanes come with [`Settings::lanes`].
    pub(crate) fn core(&self) -> CoreSettings {
        let NodeScalingConfig { limits, cost, .. } = &self.scaling;
        let cap = cost.max_daily_spend.and_then(Money::from_usd);
        let mark = cost.max_daily_spend.and_then(|cap| Money::from_usd(cap * cost.warn_at));
        CoreSettings {
            max_nodes: limits.max_nodes,
            max_concurrent_api: limits.max_concurrent_api,
            max_queued: MOST_QUEUED,
            max_daily_spend: cap,
            warn_at: mark,
            allow_unknown_price: cost.allow_unknown_prices,
            retry: RetrySettings { max_attempts: limits.max_attempts, ..RetrySettings::default() },
            hedge: if limits.hedge {
                HedgeSettings::default()
            } else {
                HedgeSettings { max: 0, ..HedgeSettings::default() }
            },
            ..CoreSettings::default()
        }
    }

    /// Where calls go: provider, fallbacks in their order, then the coordinator's and `sim`, which are not in the chain.
    pub(crate) fn lanes(&self) -> anyhow::Result<Lanes> {
        let scaling = &self.scaling;
        let table = Prices::built_in().context("failed to read the table of prices")?;
        let http = HttpClient::new(provider::HttpSettings::default());
        let mut lanes = Vec::new();
        let mut chained = 0;
        let configured = std::iter::once(&scaling.provider).chain(&scaling.fallback);
        for (index, settings) in configured.enumerate() {
            lanes.push(self.lane(settings, &table, &http)?);
            chained = index + 1;
        }
        if let Some(coordinator) = &scaling.coordinator
            && !lanes
                .iter()
                .any(|lane: &NewLane| lane.name == coordinator.name && Some(&lane.model) == coordinator.model.as_ref())
        {
            lanes.push(self.lane(coordinator, &table, &http)?);
        }
        if !lanes.iter().any(|lane| lane.name == "sim") {
            lanes.push(self.lane(&ProviderSettings::default(), &table, &http)?);
        }
        let pricing = self.pricing.clone();
        let timeout = scaling.limits.timeout.get();
        let lanes =
            Lanes::new(lanes, chained, timeout, move |provider, model| price_of(&pricing, &table, provider, model));
        Ok(if scaling.search.backend == "off" { lanes } else { lanes.with_fees(&scaling.search.backend, timeout) })
    }

    /// What a model costs; `None` when nobody knows.
    pub(crate) fn price(&self, provider: &str, model: &str) -> Option<Price> {
        setup::price(&self.pricing, provider, model)
    }

    /// How answers are kept; `None` when they are not.
    pub(crate) fn cache(&self) -> Option<CacheSettings> {
        let NodeScalingConfig { cache, provider, fallback, coordinator, sim, .. } = &self.scaling;
        // A name says nothing of who stands behind it: another address is another provider.
        let places = serde_json::to_string(&(provider, fallback, coordinator, sim)).unwrap_or_default();
        cache.enabled.then(|| CacheSettings { max_bytes: cache.max_bytes.0, ttl: cache.ttl.get(), salt: places })
    }

    fn lane(&self, settings: &ProviderSettings, table: &Prices, http: &HttpClient) -> anyhow::Result<NewLane> {
        let limits = &self.scaling.limits;
        let model = settings.model.clone().unwrap_or_else(|| settings.name.clone());
        let priced = price_of(&self.pricing, table, &settings.name, &model);
        // A key that is missing is no reason not to start: other providers work without it.
        let (provider, unusable) = match self.provider(settings, http) {
            Ok(provider) => (provider, None),
            Err(error @ EndpointError::Key { .. }) => {
                let why = error.to_string();
                (Arc::new(Keyless { name: settings.name.clone(), why: why.clone() }) as Arc<dyn Provider>, Some(why))
            }
            Err(error) => return Err(wrong(format!("node_scaling.provider: {error}")).into()),
        };
        let simulated = provider.simulated();
        Ok(NewLane {
            provider,
            name: settings.name.clone(),
            model,
            price_up_to: priced.and_then(|(_, most)| most),
            max_tokens: settings.max_tokens,
            unusable,
            settings: LaneSettings {
                price: priced.map(|(price, _)| price),
                requests_per_minute: limits.requests_per_minute.map(f64::from),
                tokens_per_minute: limits.tokens_per_minute.map(|tokens| tokens as f64),
                // What only pretends takes whatever is configured.
                max_in_flight: simulated.then_some(limits.max_concurrent_api),
                timeout: limits.timeout.get(),
                ..LaneSettings::default()
            },
        })
    }

    fn provider(&self, settings: &ProviderSettings, http: &HttpClient) -> Result<Arc<dyn Provider>, EndpointError> {
        if settings.name == "sim" && settings.base_url.is_none() {
            let sim = &self.scaling.sim;
            return Ok(Arc::new(Sim::new(provider::SimSettings {
                latency: sim.latency.get(),
                error_rate: sim.error_rate,
                requests_per_minute: sim.requests_per_minute,
                ..provider::SimSettings::default()
            })));
        }
        let endpoint = endpoint_of(settings, self.key_dir.as_deref());
        provider::build(&endpoint, http, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }
}

/// What is configured of a provider, as its wire format wants it.
pub(crate) fn endpoint_of(settings: &ProviderSettings, key_dir: Option<&Path>) -> Endpoint {
    let mut endpoint = Endpoint::named(&settings.name, None);
    let file = key_file(key_dir, &settings.name);
    if endpoint.kind == ProviderKind::Sim {
        // With an address it is somebody's server, whatever it is called.
        endpoint.kind = ProviderKind::Compatible;
    }
    endpoint.base_url.clone_from(&settings.base_url);
    if let Some(file) = &settings.api_key_file {
        endpoint.key = KeySource::File(file.clone());
    } else if let Some(variable) = &settings.api_key_env {
        endpoint.key = KeySource::Env { variable: variable.clone(), file };
    } else if let KeySource::Env { file: usual, .. } = &mut endpoint.key {
        *usual = file;
    }
    endpoint.api_version.clone_from(&settings.api_version);
    endpoint.max_tokens_field = settings.max_tokens_field.as_deref().map(|field| match field {
        "max_tokens" => MaxTokensField::MaxTokens,
        _ => MaxTokensField::MaxCompletionTokens,
    });
    endpoint
}

/// Stands in for a provider whose key is missing.
#[derive(Debug)]
struct Keyless {
    name: String,
    why: String,
}

#[async_trait]
impl Provider for Keyless {
    fn name(&self) -> &str {
        &self.name
    }

    async fn call(&self, _: &str, _: &CallRequest, _: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        Err(CallError { maybe_billed: false, ..CallError::new(FailureKind::Auth, self.why.clone()) })
    }
}

/// What a model costs, and up to which input: as configured, else as the table says. What only pretends is free.
pub(crate) fn price_of(
    pricing: &BTreeMap<String, ModelPricing>,
    table: &Prices,
    provider: &str,
    model: &str,
) -> Option<(Price, Option<u64>)> {
    if let Some(own) = pricing.get(model) {
        // What a million tokens cost in micro-dollars is what one costs in pico-dollars.
        let pico = |usd: f64| Money::from_usd(usd).map_or(0, |money| (money.pico() / 1_000_000) as u64);
        let output = own.output_tokens_usd_per_m.max(own.reasoning_output_tokens_usd_per_m);
        let cached = own.cached_input_tokens_usd_per_m;
        let price = Price {
            input: pico(own.input_tokens_usd_per_m),
            output: pico(output),
            cached_input: (cached > 0.0).then(|| pico(cached)),
            per_call: 0,
        };
        return Some((price, None));
    }
    if provider == "sim" {
        return Some((Price::default(), None));
    }
    let listed = table.listed(provider, model)?;
    Some((listed.price, listed.up_to_input_tokens))
}

fn wrong(message: String) -> ExitWith {
    ExitWith { code: BAD_CONFIG, message }
}

/// A seed that differs from start to start.
pub(crate) fn fresh_seed() -> u64 {
    rand::random()
}

/// How long the daemon may take to end: calls that are broken off, then the ledger.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use drover_config::{CostConfig, HumanDuration, HumanSize, SimSettings};

    use super::*;

    fn settings(scaling: NodeScalingConfig, pricing: &[(&str, ModelPricing)]) -> Settings {
        let pricing = pricing.iter().map(|(model, price)| ((*model).to_owned(), price.clone()));
        let config = Config { node_scaling: Some(scaling), model_pricing: pricing.collect(), ..Config::default() };
        Settings::new(&config, None).unwrap()
    }

    #[test]
    fn prices_are_those_of_model_pricing_then_the_table_then_unknown() {
        let own = ModelPricing {
            input_tokens_usd_per_m: 0.0375,
            cached_input_tokens_usd_per_m: 0.01,
            output_tokens_usd_per_m: 2.0,
            reasoning_output_tokens_usd_per_m: 3.5,
        };
        let settings = settings(NodeScalingConfig::default(), &[("m", own)]);
        let table = Prices::built_in().unwrap();
        let price = |provider, model| price_of(&settings.pricing, &table, provider, model);
        let expected = Price { input: 37_500, output: 3_500_000, cached_input: Some(10_000), per_call: 0 };
        assert_eq!(price("anyone", "m"), Some((expected, None)));
        assert_eq!(price("openai", "gpt-4o-mini").unwrap().0.input, 150_000);
        assert_eq!(price("openai", "gpt-unheard-of"), None);
        assert_eq!(price("sim", "sim"), Some((Price::default(), None)));
    }

    #[test]
    fn limits_and_cost_reach_the_core_and_its_lanes() {
        let mut scaling = NodeScalingConfig::default();
        scaling.limits.max_nodes = 7;
        scaling.limits.max_concurrent_api = 3;
        scaling.limits.requests_per_minute = Some(90);
        scaling.limits.tokens_per_minute = Some(9000);
        scaling.limits.max_attempts = 2;
        scaling.limits.hedge = false;
        scaling.limits.timeout = HumanDuration::secs(7);
        scaling.cost =
            CostConfig { max_daily_spend: Some(5.0), warn_at: 0.5, allow_unknown_prices: true, ..scaling.cost };
        let settings = settings(scaling, &[]);
        let core = settings.core();
        assert_eq!((core.max_nodes, core.max_concurrent_api, core.allow_unknown_price), (7, 3, true));
        assert_eq!((core.retry.max_attempts, core.hedge.max), (2, 0));
        assert_eq!((core.max_daily_spend, core.warn_at), (Money::from_usd(5.0), Money::from_usd(2.5)));
        let lanes = settings.lanes().unwrap();
        let lane = &lanes.settings()[1];
        assert_eq!((lane.requests_per_minute, lane.tokens_per_minute), (Some(90.0), Some(9000.0)));
        assert_eq!(lane.timeout, Duration::from_secs(7));
        assert_eq!(lanes.chain().first().unwrap().name, "sim");
    }

    #[test]
    fn provider_fallbacks_and_coordinator_are_all_set_up_as_configured() {
        let settings = ProviderSettings {
            name: "groq".to_owned(),
            model: Some("m".to_owned()),
            api_key_env: Some("SOME_KEY".to_owned()),
            api_key_file: None,
            base_url: Some("http://127.0.0.1:1".to_owned()),
            api_version: Some("v9".to_owned()),
            max_tokens_field: Some("max_completion_tokens".to_owned()),
            max_tokens: 77,
        };
        let keys = Some(Path::new("/keys"));
        let endpoint = endpoint_of(&settings, keys);
        assert_eq!((endpoint.name.as_str(), endpoint.kind), ("groq", ProviderKind::Groq));
        let fallback = Some("/keys/groq-key.txt".into());
        assert_eq!(endpoint.key, KeySource::Env { variable: "SOME_KEY".to_owned(), file: fallback.clone() });
        let usual = endpoint_of(&ProviderSettings { api_key_env: None, ..settings.clone() }, keys);
        assert_eq!(usual.key, KeySource::Env { variable: "GROQ_API_KEY".to_owned(), file: fallback });
        assert_eq!(endpoint.base_url, settings.base_url);
        assert_eq!(endpoint.api_version.as_deref(), Some("v9"));
        assert_eq!(endpoint.max_tokens_field, Some(MaxTokensField::MaxCompletionTokens));
        let file = ProviderSettings { api_key_env: None, api_key_file: Some("/k".into()), ..settings.clone() };
        assert_eq!(endpoint_of(&file, keys).key, KeySource::File("/k".into()));

        let of = |name: &str| ProviderSettings {
            name: name.to_owned(),
            model: Some(format!("{name}-m")),
            ..settings.clone()
        };
        let scaling = NodeScalingConfig {
            provider: of("gemini"),
            fallback: vec![of("groq"), of("own")],
            coordinator: Some(of("anthropic")),
            ..NodeScalingConfig::default()
        };
        let lanes = self::settings(scaling, &[]).lanes().unwrap();
        let named = |chain: &crate::shell::Chain| -> Vec<String> {
            chain.lanes().iter().map(|lane| format!("{} {} {}", lane.name, lane.model, lane.max_tokens)).collect()
        };
        assert_eq!(named(&lanes.chain()), ["gemini gemini-m 77", "groq groq-m 77", "own own-m 77"]);
        // The coordinator is asked by name, and so is what only pretends; nobody has their keys here.
        let all: Vec<String> = lanes.all().iter().map(|lane| lane.name.clone()).collect();
        assert_eq!(all, ["", "gemini", "groq", "own", "anthropic", "sim"]);
        let error = lanes.named(Some("anthropic"), None).unwrap_err();
        assert!(error.message.contains("SOME_KEY") && error.hint.contains("--provider sim"), "{error:?}");
        assert_eq!(named(&lanes.named(Some("sim"), None).unwrap()), ["sim sim 1024"]);
        assert!(lanes.named(Some("nobody"), None).unwrap_err().message.contains("gemini"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_simulated_provider_behaves_as_configured() {
        let ask = async |sim: SimSettings| {
            let lanes = settings(NodeScalingConfig { sim, ..NodeScalingConfig::default() }, &[]).lanes().unwrap();
            let chain = lanes.chain();
            let provider = chain.first().and_then(|lane| lane.provider.clone()).unwrap();
            let began = tokio::time::Instant::now();
            let first = provider.call("sim", &CallRequest::prompt("x", 9), &mut crate::call::NoSink).await;
            let second = provider.call("sim", &CallRequest::prompt("x", 9), &mut crate::call::NoSink).await;
            (first.map_err(|error| error.kind), second.map_err(|error| error.kind), began.elapsed())
        };
        let slow = SimSettings { latency: HumanDuration::secs(30), ..SimSettings::default() };
        let (first, _, took) = ask(slow).await;
        assert!(first.is_ok() && took >= Duration::from_mins(1), "{took:?}");
        let (first, ..) = ask(SimSettings { error_rate: 1.0, ..SimSettings::default() }).await;
        assert!(first.is_err());
        let limited =
            SimSettings { latency: HumanDuration::millis(1), requests_per_minute: Some(1), ..SimSettings::default() };
        let (first, second, _) = ask(limited).await;
        assert!(first.is_ok(), "{first:?}");
        assert_eq!(second.unwrap_err(), FailureKind::RateLimited);
    }

    #[test]
    fn answers_are_kept_as_configured() {
        let mut scaling = NodeScalingConfig::default();
        assert!(settings(scaling.clone(), &[]).cache().is_none(), "only when enabled");
        scaling.cache.enabled = true;
        scaling.cache.max_bytes = HumanSize::mib(3);
        scaling.cache.ttl = HumanDuration::secs(90);
        let one = settings(scaling.clone(), &[]).cache().unwrap();
        assert_eq!((one.max_bytes, one.ttl), (3 << 20, Duration::from_secs(90)));
        // The same name at another address is somebody else.
        scaling.provider.base_url = Some("http://127.0.0.1:2".to_owned());
        assert_ne!(settings(scaling, &[]).cache().unwrap().salt, one.salt);
    }

    #[test]
    fn a_time_zone_that_is_none_is_a_mistake_in_the_configuration() {
        let mut scaling = NodeScalingConfig::default();
        scaling.cost.timezone = Some("Mars/Olympus".to_owned());
        let config = Config { node_scaling: Some(scaling), ..Config::default() };
        let error = Settings::new(&config, None).unwrap_err();
        assert_eq!(error.downcast_ref::<ExitWith>().map(|exit| exit.code), Some(BAD_CONFIG));
        assert!(error.to_string().contains("timezone"), "{error}");
    }
}
