//! Many prompts at once through a model provider: whose model, how fast, and for how much money.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::human::{HumanDuration, HumanSize};
use crate::schema::section;

section! {
    /// Many prompts at once through a model provider.
    pub struct NodeScalingConfig {
        /// Dispatch at all.
        pub enabled: bool = true,
        /// Address for gRPC, HTTP, `/healthz` and `/metrics` of the dispatcher. Unset: 127.0.0.1:7955, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// Limits that hold whatever is asked.
        pub limits: LimitsConfig = LimitsConfig::default(),
        /// Whose model answers.
        pub provider: ProviderSettings = ProviderSettings::default(),
        /// Whose models answer when the provider does not, tried in this order.
        pub fallback: Vec<ProviderSettings> = Vec::new(),
        /// Whose model plans and sums up the requests of `drover ask`. Unset: `provider`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub coordinator: Option<ProviderSettings> = None,
        /// What it may cost.
        pub cost: CostConfig = CostConfig::default(),
        /// How the simulated provider behaves.
        pub sim: SimSettings = SimSettings::default(),
        /// Who is asked when a task searches the web.
        pub search: SearchSettings = SearchSettings::default(),
        /// What a task may read of the network.
        pub fetch: FetchConfig = FetchConfig::default(),
        /// Answers that are given again, for nothing, to exactly the same question.
        pub cache: CacheConfig = CacheConfig::default(),
    }
}

section! {
    /// Limits that hold whatever is asked.
    pub struct LimitsConfig {
        /// Most worker nodes at once: tasks that are under way, waiting for a retry included.
        pub max_nodes: u32 = 10,
        /// Most calls to the provider at once.
        pub max_concurrent_api: u32 = 5,
        /// Most calls in a minute. Unset: as many as the provider takes.
        pub requests_per_minute: Option<u32> = None,
        /// Most tokens in a minute. Unset: as many as the provider takes.
        pub tokens_per_minute: Option<u64> = None,
        /// Longest time for one call; then its request is given up.
        pub timeout: HumanDuration = HumanDuration::secs(60),
        /// Most calls for one task, the first included.
        pub max_attempts: u32 = 12,
        /// Make a slow call a second time and take the answer that comes first. Both are paid for.
        pub hedge: bool = true,
    }
}

section! {
    /// Whose model answers.
    pub struct ProviderSettings {
        /// `gemini`, `groq`, `openai`, `anthropic` or `sim`; any name when `base_url` is set.
        pub name: String = "sim".into(),
        /// The model's name at the provider.
        pub model: Option<String> = None,
        /// Environment variable that holds the key. Unset: the provider's usual one.
        pub api_key_env: Option<String> = None,
        /// File that holds the key, readable by its owner only. A name without a directory is that of a systemd credential.
        pub api_key_file: Option<PathBuf> = None,
        /// Address of the provider, or of any that speaks like OpenAI's.
        pub base_url: Option<String> = None,
        /// Version of the provider's interface. Unset: the one that knows most, such as `v1beta` of gemini.
        pub api_version: Option<String> = None,
        /// What openai and those like it call the bound on an answer: `max_tokens` or `max_completion_tokens`. Unset: the provider's habit.
        pub max_tokens_field: Option<String> = None,
        /// Most tokens of an answer, for tasks that do not say.
        pub max_tokens: u32 = 1024,
    }
}

section! {
    /// What dispatching may cost.
    pub struct CostConfig {
        /// Most US dollars in a day. Unset: no cap.
        pub max_daily_spend: Option<f64> = None,
        /// Share of `max_daily_spend` from which a warning is given, from 0 to 1.
        pub warn_at: f64 = 0.8,
        /// Time zone in which a day begins, such as Europe/Berlin. Unset: UTC.
        pub timezone: Option<String> = None,
        /// Also use models whose price is not known. They count as free, so no cap holds for them.
        pub allow_unknown_prices: bool = false,
    }
}

section! {
    /// How the simulated provider behaves.
    pub struct SimSettings {
        /// Time until an answer.
        pub latency: HumanDuration = HumanDuration::millis(200),
        /// Share of the calls that fail and may be tried again, from 0 to 1.
        pub error_rate: f64 = 0.0,
        /// Calls that it takes in a minute before it says that there are too many. Unset: any number.
        pub requests_per_minute: Option<u32> = None,
    }
}

section! {
    /// Who is asked when a task searches the web.
    pub struct SearchSettings {
        /// `off`, `searxng`, `brave`, `tavily` or `gemini`.
        pub backend: String = "off".into(),
        /// Address of the backend; searxng needs one.
        pub base_url: Option<String> = None,
        /// Environment variable that holds the backend's key.
        pub api_key_env: Option<String> = None,
        /// File that holds the backend's key, readable by its owner only.
        pub api_key_file: Option<PathBuf> = None,
        /// Model that searches, for gemini. Unset: that of `provider`, when it is gemini's too.
        pub model: Option<String> = None,
        /// US dollars for one search; of gemini for one query, of which an answer takes up to ten. Unset: not known; searxng costs nothing.
        pub price: Option<f64> = None,
    }
}

section! {
    /// What a task may read of the network.
    pub struct FetchConfig {
        /// Hosts, or hosts with a port, that may be read although they lie inside a network, such as `wiki.example.lan` or
        /// `127.0.0.1:8080`. Nothing else inside a network is ever read.
        pub allow: Vec<String> = Vec::new(),
        /// Most bytes of a page, packed and unpacked alike; what is longer is cut.
        pub max_bytes: HumanSize = HumanSize::mib(2),
        /// Longest time for a page, its redirects and its site's robots.txt included.
        pub timeout: HumanDuration = HumanDuration::secs(30),
    }
}

section! {
    /// Answers that are given again, for nothing, to exactly the same question.
    pub struct CacheConfig {
        /// Keep answers. A question that is asked twice then has one answer; tasks and requests can ask for a fresh one.
        pub enabled: bool = false,
        /// Most bytes of answers, on the disk of the state directory; a part of them is held in memory.
        pub max_bytes: HumanSize = HumanSize::mib(256),
        /// How long an answer is given again.
        pub ttl: HumanDuration = HumanDuration::days(1),
    }
}
