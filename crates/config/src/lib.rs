//! The one configuration file: a section per daemon, defaults, validation, human durations. The only user of `serde_yaml`.
//!
//! A file is read into a tree that knows where everything stands, overrides from the environment are put into the tree,
//! older names are brought up to date, and the typed sections are read from it. So every complaint names its place:
//!
//! ```text
//! text -> tree -> + DROVER_... -> legacy names -> sections -> validate -> Config, warnings
//! ```
//!
//! Not here: the command line, the state directory, and the meaning of the values.

mod cluster;
mod human;
mod legacy;
mod load;
mod providers;
mod read;
mod reference;
mod scaling;
mod schema;
mod secret;
mod sections;
mod swarm;
mod telegram;
mod tree;
mod validate;

use std::collections::BTreeMap;

pub use cluster::{
    ClusterConfig, LaunchProvider, LocalBackend, ModelPricing, Profiles, SlurmBackend, SlurmDefaults, SshConfig,
};
pub use human::{HumanDuration, HumanError, HumanSize};
pub use load::{Env, Fault, LoadError, Loaded, Source, load};
pub use providers::{Backend, LaunchFieldConfig, ProviderConfig, SshWay};
pub use reference::reference;
pub use scaling::{
    CacheConfig, CostConfig, FetchConfig, LimitsConfig, NodeScalingConfig, ProviderSettings, SearchSettings,
    SimSettings,
};
pub use schema::{Key, schema};
pub use sections::{
    AllocatorConfig, FollowerConfig, RolesConfig, RouterConfig, SecurityConfig, TelemetryConfig, WorkerConfig,
};
pub use swarm::{
    DiscoveryConfig, EventHandlerConfig, EventsConfig, HandoffConfig, LoadMonitorConfig, RpcConfig, SwarmConfig,
};
pub use telegram::TelegramConfig;
pub use validate::Problem;

use schema::section;

section! {
    /// The whole file.
    pub struct Config {
        /// The router and its JSON-line control plane.
        pub router: RouterConfig = RouterConfig::default(),
        /// The allocator.
        pub allocator: AllocatorConfig = AllocatorConfig::default(),
        /// The outbox follower.
        pub follower: FollowerConfig = FollowerConfig::default(),
        /// The worker and its agent.
        pub worker: WorkerConfig = WorkerConfig::default(),
        /// Where swarms run.
        pub cluster: ClusterConfig = ClusterConfig::default(),
        /// How the login host is reached, in the older shape.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ssh: Option<SshConfig> = None,
        /// What a launch that names nothing asks Slurm for, in the older shape.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub slurm: Option<SlurmDefaults> = None,
        /// The catalogue of places to launch swarms on.
        pub launch_providers: Vec<LaunchProvider> = Vec::new(),
        /// What the tokens of a model cost, by model.
        pub model_pricing: BTreeMap<String, ModelPricing> = BTreeMap::new(),
        /// Who may talk to the daemons.
        pub security: SecurityConfig = SecurityConfig::default(),
        /// Traces.
        pub telemetry: TelemetryConfig = TelemetryConfig::default(),
        /// Membership, load monitoring and handoff.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub swarm: Option<SwarmConfig> = None,
        /// Talking to sessions by writing to a Telegram bot.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub telegram: Option<TelegramConfig> = None,
        /// Many prompts at once through a model provider.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub node_scaling: Option<NodeScalingConfig> = None,
    }
}

impl Config {
    /// The configuration in effect as YAML, with secrets hidden. It loads again, as long as nothing was hidden.
    pub fn dump(&self) -> String {
        let shown = serde_yaml::to_string(self).map_err(|error| error.to_string()).and_then(|text| {
            let mut root = tree::parse(&text).map_err(|error| error.message)?;
            secret::mask(&mut root);
            serde_yaml::to_string(&root).map_err(|error| error.to_string())
        });
        shown.unwrap_or_else(|error| format!("# the configuration cannot be shown: {error}\n"))
    }
}
