//! Rules that one key alone cannot say. Every problem of a file is found in one go.

use std::net::SocketAddr;

use crate::Config;
use crate::cluster::SlurmBackend;
use crate::human::{HumanDuration, HumanSize};
use crate::scaling::{NodeScalingConfig, ProviderSettings};
use crate::swarm::SwarmConfig;

/// When codex asks before it acts.
pub(crate) const APPROVAL_POLICIES: &[&str] = &["untrusted", "on-request", "never"];
/// The same in existing files, with the word that codex no longer has.
const OLD_APPROVAL_POLICIES: &[&str] = &["untrusted", "on-failure", "on-request", "never"];
/// What codex may touch.
pub(crate) const SANDBOX_MODES: &[&str] = &["read-only", "workspace-write", "danger-full-access"];
/// Events that a handler can be for.
const EVENTS: &[&str] = &["NodeJoined", "NodeLeft", "NodeSuspect", "NodeAlive"];
/// The longest name that a node or a region may have in the gossip.
const MAX_NAME: usize = 128;
/// Providers of models that drover knows by name.
const MODEL_PROVIDERS: &[&str] = &["gemini", "groq", "openai", "anthropic", "sim"];
/// What the bound on an answer is called.
const MAX_TOKENS_FIELDS: &[&str] = &["max_tokens", "max_completion_tokens"];
/// Who can be asked to search the web.
const SEARCH_BACKENDS: &[&str] = &["off", "searxng", "brave", "tavily", "gemini"];
/// The greatest daily cap, in US dollars: what is counted in millionths of millionths must fit.
const MOST_MONEY: f64 = 1_000_000.0;
/// The smallest segment that makes sense: some records fit, and a test can still rotate.
const MIN_SEGMENT: HumanSize = HumanSize(1024);

/// A value that is well formed and wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The dotted path of the key.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl Problem {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }

    /// Whether a key that is needed is not there.
    pub(crate) fn is_missing(&self) -> bool {
        self.message.starts_with("Missing required")
    }

    /// A key that the chosen backend cannot do without.
    pub(crate) fn missing(section: &str, key: &str) -> Self {
        Self::new(format!("{section}.{key}"), format!("Missing required config field: {section}.{key}"))
    }
}

/// Collects what is wrong.
struct Check {
    problems: Vec<Problem>,
}

impl Check {
    fn that(&mut self, holds: bool, path: &str, message: impl Into<String>) {
        if !holds {
            let message = message.into();
            let named = if message.starts_with("must ") { format!("{path} {message}") } else { message };
            self.problems.push(Problem::new(path, named));
        }
    }

    fn word(&mut self, path: &str, value: &str, known: &[&str]) {
        self.that(
            known.contains(&value),
            path,
            format!("unknown value {value:?}, expected one of {}", known.join(", ")),
        );
    }

    fn positive(&mut self, path: &str, value: HumanDuration) {
        self.that(!value.get().is_zero(), path, "must be longer than 0");
    }

    fn at_least(&mut self, path: &str, value: HumanSize, least: HumanSize) {
        self.that(value >= least, path, format!("must be at least {least}, is {value}"));
    }

    fn share(&mut self, path: &str, value: f64) {
        self.that((0.0..=1.0).contains(&value), path, format!("must be from 0 to 1, is {value}"));
    }

    fn amount(&mut self, path: &str, value: f64) {
        self.that(value >= 0.0 && value.is_finite(), path, format!("must be 0 or more, is {value}"));
    }

    fn url(&mut self, path: &str, value: &str) {
        let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
        let fine = host.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace));
        self.that(fine, path, "must be an address that begins with http:// or https://");
    }
}

impl Config {
    /// Everything that is wrong with the values, taken together.
    pub fn validate(&self) -> Vec<Problem> {
        let mut check = Check { problems: Vec::new() };
        self.check_listens(&mut check);
        self.check_router(&mut check);
        self.check_worker(&mut check);
        let follower = &self.follower;
        check.positive("follower.hot_poll", follower.hot_poll);
        check.that(
            follower.cold_poll >= follower.hot_poll,
            "follower.cold_poll",
            format!("must not be shorter than follower.hot_poll, which is {}", follower.hot_poll),
        );
        check.at_least("follower.segment_bytes", follower.segment_bytes, MIN_SEGMENT);
        check.at_least("security.audit_file_size", self.security.audit_file_size, MIN_SEGMENT);
        if let Some(idle) = follower.end_when_idle {
            check.positive("follower.end_when_idle", idle);
        }
        check.that(self.allocator.max_local_nodes > 0, "allocator.max_local_nodes", "must be at least 1");
        if let Some(endpoint) = &self.telemetry.otlp_endpoint {
            check.url("telemetry.otlp_endpoint", endpoint);
        }
        self.check_cluster(&mut check);
        for (model, price) in &self.model_pricing {
            for (key, value) in [
                ("input", price.input_tokens_usd_per_m),
                ("cached_input", price.cached_input_tokens_usd_per_m),
                ("output", price.output_tokens_usd_per_m),
                ("reasoning_output", price.reasoning_output_tokens_usd_per_m),
            ] {
                check.amount(&format!("model_pricing.{model}.{key}_tokens_usd_per_m"), value);
            }
        }
        if let Some(swarm) = &self.swarm {
            check_swarm(swarm, &mut check);
        }
        if let Some(scaling) = &self.node_scaling {
            check_scaling(scaling, &mut check);
        }
        check.problems
    }

    fn check_listens(&self, check: &mut Check) {
        let membership = self.swarm.as_ref().and_then(|swarm| swarm.listen);
        let dispatcher = self.node_scaling.as_ref().and_then(|scaling| scaling.listen);
        let listens: [(&str, Option<SocketAddr>); 7] = [
            ("router.listen", self.router.listen),
            ("router.control_listen", self.router.control_listen),
            ("allocator.listen", self.allocator.listen),
            ("follower.listen", self.follower.listen),
            ("worker.listen", self.worker.listen),
            ("swarm.listen", membership),
            ("node_scaling.listen", dispatcher),
        ];
        for (index, (path, address)) in listens.iter().enumerate() {
            let Some(address) = address.filter(|address| address.port() != 0) else { continue };
            if let Some((other, _)) = listens[..index].iter().find(|(_, earlier)| *earlier == Some(address)) {
                check.problems.push(Problem::new(*path, format!("{address} is taken by {other}")));
            }
        }
    }

    fn check_router(&self, check: &mut Check) {
        let router = &self.router;
        check.at_least("router.max_line_bytes", router.max_line_bytes, HumanSize(1024));
        check.at_least("router.subscriber_max_bytes", router.subscriber_max_bytes, HumanSize(4096));
        check.that(router.keep_events > 0, "router.keep_events", "must be at least 1");
        check.positive("router.launch_soft_timeout", router.launch_soft_timeout);
        check.that(
            router.launch_hard_timeout >= router.launch_soft_timeout,
            "router.launch_hard_timeout",
            format!("must not be shorter than router.launch_soft_timeout, which is {}", router.launch_soft_timeout),
        );
    }

    fn check_worker(&self, check: &mut Check) {
        let worker = &self.worker;
        check.word("worker.approval_policy", &worker.approval_policy, APPROVAL_POLICIES);
        check.word("worker.sandbox_mode", &worker.sandbox_mode, SANDBOX_MODES);
        check.word("worker.codex_provider", &worker.codex_provider, &["own", "pool"]);
        check.word("worker.pool_carriage", &worker.pool_carriage, &["auto", "grpc", "mailbox"]);
        let is_address = |text: &String| {
            text.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
        };
        check.that(
            worker.pool_address.as_ref().is_none_or(is_address),
            "worker.pool_address",
            "must be host:port, such as login1:7955",
        );
        check.positive("worker.approval_timeout", worker.approval_timeout);
        check.positive("worker.restart_delay", worker.restart_delay);
        check.at_least("worker.segment_bytes", worker.segment_bytes, MIN_SEGMENT);
        check.that(worker.max_queue > 0, "worker.max_queue", "must be at least 1");
        for (index, name) in worker.agent_env.iter().enumerate() {
            let fine = !name.is_empty() && !name.contains(['=', '\0', ' ']);
            check.that(
                fine,
                &format!("worker.agent_env[{index}]"),
                "must be the name of a variable, without its value",
            );
        }
    }

    fn check_cluster(&self, check: &mut Check) {
        let (_, problems) = self.resolve_providers();
        check.problems.extend(problems);
        if let Some(subdir) = &self.cluster.cluster_subdir {
            check_subdir("cluster.cluster_subdir", subdir, check);
        }
        if let Some(mode) = &self.cluster.local.default_sandbox_mode {
            check.word("cluster.local.default_sandbox_mode", mode, SANDBOX_MODES);
        }
        check_slurm("cluster.slurm", &self.cluster.slurm, check);
        for (name, profile) in &self.cluster.slurm.profiles.0 {
            let path = format!("cluster.slurm.profiles.{name}");
            check_slurm(&path, profile, check);
            check.that(profile.profiles.0.is_empty(), &format!("{path}.profiles"), "a profile cannot have profiles");
        }
    }
}

fn check_slurm(path: &str, slurm: &SlurmBackend, check: &mut Check) {
    if let Some(subdir) = &slurm.cluster_subdir {
        check_subdir(&format!("{path}.cluster_subdir"), subdir, check);
    }
    if let Some(policy) = &slurm.approval_policy {
        check.word(&format!("{path}.approval_policy"), policy, OLD_APPROVAL_POLICIES);
    }
    if let Some(poll) = slurm.poll {
        check.positive(&format!("{path}.poll"), poll);
    }
    if let Some(calls) = slurm.calls_per_minute {
        // Fewer leave no room to look before anything is submitted or ended.
        check.that(calls >= 4, &format!("{path}.calls_per_minute"), "must be at least 4");
    }
    if let Some(dir) = &slurm.local_dir {
        check.that(dir.starts_with('/'), &format!("{path}.local_dir"), "must be an absolute path");
    }
    if let Some(host) = &slurm.login_host {
        // A leading dash would be read as an option of ssh.
        let fine = !host.is_empty() && !host.starts_with('-') && !host.contains(char::is_whitespace);
        check.that(fine, &format!("{path}.login_host"), format!("{host:?} cannot be the name of a host"));
    }
}

fn check_subdir(path: &str, subdir: &str, check: &mut Check) {
    let inside = !subdir.starts_with('/') && !subdir.split('/').any(|part| part == "..");
    check.that(inside, path, "must be a relative path without `..`");
}

fn check_swarm(swarm: &SwarmConfig, check: &mut Check) {
    let discovery = &swarm.discovery;
    for (path, name) in [("swarm.node_id", swarm.node_id.as_deref()), ("swarm.region", Some(swarm.region.as_str()))] {
        let Some(name) = name else { continue };
        check.that(
            !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control),
            path,
            format!("must have from 1 to {MAX_NAME} bytes and no control characters"),
        );
    }
    if let Some(address) = &swarm.advertise_addr {
        let fine = address.parse::<std::net::IpAddr>().is_ok_and(|address| !address.is_unspecified());
        check.that(fine, "swarm.advertise_addr", format!("invalid address {address:?}, expected one such as 10.0.0.7"));
    }
    check_handlers(swarm, check);
    check.that(
        swarm.bind_addr.parse::<std::net::IpAddr>().is_ok(),
        "swarm.bind_addr",
        format!("invalid address {:?}, expected one such as 127.0.0.1", swarm.bind_addr),
    );
    check.that(
        swarm.rpc.port != swarm.bind_port.unwrap_or(SwarmConfig::DEFAULT_BIND_PORT) || swarm.rpc.port == 0,
        "swarm.rpc.port",
        "must differ from swarm.bind_port",
    );
    for (index, address) in discovery.join_addrs.iter().enumerate() {
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        check.that(
            matches!(port, Some(Ok(1..))),
            &format!("swarm.discovery.join_addrs[{index}]"),
            format!("invalid address {address:?}, expected one such as 127.0.0.1:7946"),
        );
    }
    check.positive("swarm.discovery.gossip_interval", discovery.gossip_interval);
    check.positive("swarm.discovery.push_pull_interval", discovery.push_pull_interval);
    check.that(
        discovery.node_timeout > discovery.gossip_interval,
        "swarm.discovery.node_timeout",
        format!("must be longer than gossip_interval, which is {}", discovery.gossip_interval),
    );
    check.that(
        discovery.dead_node_timeout > discovery.node_timeout,
        "swarm.discovery.dead_node_timeout",
        format!("must be longer than node_timeout, which is {}", discovery.node_timeout),
    );
    check.share("swarm.handoff.load_threshold", swarm.handoff.load_threshold);
    check.positive("swarm.handoff.timeout", swarm.handoff.timeout);
    check.positive("swarm.rpc.timeout", swarm.rpc.timeout);
    let load = &swarm.load_monitor;
    check.positive("swarm.load_monitor.interval", load.interval);
    check.that(load.sample_size > 0, "swarm.load_monitor.sample_size", "must be at least 1");
    let weights = [
        ("cpu_weight", load.cpu_weight),
        ("memory_weight", load.memory_weight),
        ("session_weight", load.session_weight),
    ];
    check.that(load.max_sessions > 0, "swarm.load_monitor.max_sessions", "must be at least 1");
    for (key, weight) in weights {
        check.share(&format!("swarm.load_monitor.{key}"), weight);
    }
    let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
    check.that(
        (sum - 1.0).abs() < 1e-6,
        "swarm.load_monitor",
        format!("cpu_weight, memory_weight and session_weight must add up to 1, they add up to {sum}"),
    );
}

fn check_handlers(swarm: &SwarmConfig, check: &mut Check) {
    check.that(swarm.events.queue > 0, "swarm.events.queue", "must be at least 1");
    for (index, handler) in swarm.events.handlers.iter().enumerate() {
        let path = format!("swarm.events.handlers[{index}]");
        for (nth, event) in handler.on.iter().enumerate() {
            check.word(&format!("{path}.on[{nth}]"), event, EVENTS);
        }
        check.that(
            handler.command.is_empty() != handler.webhook.is_none(),
            &path,
            "must have either a command or a webhook",
        );
        if let Some(url) = &handler.webhook {
            check.url(&format!("{path}.webhook"), url);
        }
        check.positive(&format!("{path}.timeout"), handler.timeout);
    }
}

fn check_scaling(scaling: &NodeScalingConfig, check: &mut Check) {
    let limits = &scaling.limits;
    check.that(limits.max_nodes > 0, "node_scaling.limits.max_nodes", "must be at least 1");
    check.that(limits.max_concurrent_api > 0, "node_scaling.limits.max_concurrent_api", "must be at least 1");
    check.that(limits.requests_per_minute != Some(0), "node_scaling.limits.requests_per_minute", "must be at least 1");
    check.that(limits.tokens_per_minute != Some(0), "node_scaling.limits.tokens_per_minute", "must be at least 1");
    check.positive("node_scaling.limits.timeout", limits.timeout);
    check.that(limits.max_attempts > 0, "node_scaling.limits.max_attempts", "must be at least 1");
    check_provider("node_scaling.provider", &scaling.provider, check);
    for (index, provider) in scaling.fallback.iter().enumerate() {
        check_provider(&format!("node_scaling.fallback[{index}]"), provider, check);
    }
    if let Some(provider) = &scaling.coordinator {
        check_provider("node_scaling.coordinator", provider, check);
    }
    let cost = &scaling.cost;
    if let Some(spend) = cost.max_daily_spend {
        check.amount("node_scaling.cost.max_daily_spend", spend);
        check.that(
            spend <= MOST_MONEY,
            "node_scaling.cost.max_daily_spend",
            format!("must be at most {MOST_MONEY}; leave it out for no cap"),
        );
    }
    check.share("node_scaling.cost.warn_at", cost.warn_at);
    check.share("node_scaling.sim.error_rate", scaling.sim.error_rate);
    check.that(
        scaling.sim.requests_per_minute != Some(0),
        "node_scaling.sim.requests_per_minute",
        "must be at least 1",
    );
    let search = &scaling.search;
    check.word("node_scaling.search.backend", &search.backend, SEARCH_BACKENDS);
    if let Some(url) = &search.base_url {
        check.url("node_scaling.search.base_url", url);
    }
    check.that(
        search.backend != "searxng" || search.base_url.is_some(),
        "node_scaling.search.base_url",
        "must say where searxng is",
    );
    one_key_source("node_scaling.search", search.api_key_env.as_ref(), search.api_key_file.is_some(), check);
    if let Some(price) = search.price {
        check.amount("node_scaling.search.price", price);
    }
    check.at_least("node_scaling.fetch.max_bytes", scaling.fetch.max_bytes, HumanSize(1024));
    check.positive("node_scaling.fetch.timeout", scaling.fetch.timeout);
    check.at_least("node_scaling.cache.max_bytes", scaling.cache.max_bytes, HumanSize::mib(1));
    check.positive("node_scaling.cache.ttl", scaling.cache.ttl);
}

fn check_provider(path: &str, provider: &ProviderSettings, check: &mut Check) {
    match &provider.base_url {
        Some(url) => check.url(&format!("{path}.base_url"), url),
        None => check.word(&format!("{path}.name"), &provider.name, MODEL_PROVIDERS),
    }
    check.that(!provider.name.is_empty(), &format!("{path}.name"), "must not be empty");
    check.that(
        provider.name == "sim" || provider.model.is_some(),
        &format!("{path}.model"),
        "must name the model: providers retire theirs too often for a default",
    );
    check.that(provider.max_tokens > 0, &format!("{path}.max_tokens"), "must be at least 1");
    if let Some(field) = &provider.max_tokens_field {
        check.word(&format!("{path}.max_tokens_field"), field, MAX_TOKENS_FIELDS);
    }
    one_key_source(path, provider.api_key_env.as_ref(), provider.api_key_file.is_some(), check);
}

fn one_key_source(path: &str, variable: Option<&String>, file: bool, check: &mut Check) {
    check.that(
        variable.is_none() || !file,
        &format!("{path}.api_key_file"),
        "must not stand beside api_key_env: a key comes from one place",
    );
    let name = |name: &String| !name.is_empty() && !name.contains(['=', '\0', ' ']);
    check.that(
        variable.is_none_or(name),
        &format!("{path}.api_key_env"),
        "must be the name of a variable, without its value",
    );
}
