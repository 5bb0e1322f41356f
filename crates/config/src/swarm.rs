//! The sections of capabilities whose daemons are not part of this version: read and checked, so that a file for them
//! can be written today.

use crate::human::HumanDuration;
use crate::schema::section;

section! {
    /// Membership, load monitoring and session handoff.
    pub struct SwarmConfig {
        /// Take part in a swarm of instances.
        pub enabled: bool = false,
        /// Name of this node in the gossip. Unset: `<swarm_id>/<index>`.
        pub node_id: Option<String> = None,
        /// Address that the gossip binds to.
        pub bind_addr: String = "127.0.0.1".into(),
        /// UDP port of the gossip.
        pub bind_port: u16 = 7946,
        /// Finding the other nodes.
        pub discovery: DiscoveryConfig = DiscoveryConfig::default(),
        /// Giving sessions to other nodes.
        pub handoff: HandoffConfig = HandoffConfig::default(),
        /// Calls between nodes.
        pub rpc: RpcConfig = RpcConfig::default(),
        /// Measuring the load of this node.
        pub load_monitor: LoadMonitorConfig = LoadMonitorConfig::default(),
    }
}

section! {
    /// Finding the other nodes.
    pub struct DiscoveryConfig {
        /// Nodes to ask first, as `host:port`.
        pub join_addrs: Vec<String> = Vec::new(),
        /// Pause between gossip messages.
        pub gossip_interval: HumanDuration = HumanDuration::secs(1),
        /// Pause between full exchanges of state.
        pub push_pull_interval: HumanDuration = HumanDuration::secs(30),
        /// Silence after which a node is suspect.
        pub node_timeout: HumanDuration = HumanDuration::secs(5),
        /// Silence after which a node is dead.
        pub dead_node_timeout: HumanDuration = HumanDuration::secs(30),
    }
}

section! {
    /// Giving sessions to other nodes.
    pub struct HandoffConfig {
        /// Hand sessions off when the node is overloaded.
        pub enabled: bool = true,
        /// Load score from which a node is overloaded, from 0 to 1.
        pub load_threshold: f64 = 0.8,
        /// Longest time for one handoff.
        pub timeout: HumanDuration = HumanDuration::secs(30),
        /// Attempts after the first.
        pub max_retries: u32 = 3,
        /// Pause between attempts.
        pub retry_delay: HumanDuration = HumanDuration::secs(5),
    }
}

section! {
    /// Calls between nodes.
    pub struct RpcConfig {
        /// Port that handoff calls come in on.
        pub port: u16 = 7947,
        /// Longest time for one call.
        pub timeout: HumanDuration = HumanDuration::secs(10),
    }
}

section! {
    /// Measuring the load of this node: a weighted sum of processor, memory and sessions.
    pub struct LoadMonitorConfig {
        /// Measure at all.
        pub enabled: bool = true,
        /// Pause between samples.
        pub interval: HumanDuration = HumanDuration::secs(5),
        /// Samples that one score averages over.
        pub sample_size: u32 = 60,
        /// Weight of the processor.
        pub cpu_weight: f64 = 0.3,
        /// Weight of the memory.
        pub memory_weight: f64 = 0.3,
        /// Weight of the sessions.
        pub session_weight: f64 = 0.4,
    }
}

section! {
    /// Many prompts at once through a model provider.
    pub struct NodeScalingConfig {
        /// Dispatch at all.
        pub enabled: bool = true,
        /// Limits that hold whatever is asked.
        pub limits: LimitsConfig = LimitsConfig::default(),
        /// Whose model answers.
        pub provider: ProviderSettings = ProviderSettings::default(),
        /// What it may cost.
        pub cost: CostConfig = CostConfig::default(),
    }
}

section! {
    /// Limits that hold whatever is asked.
    pub struct LimitsConfig {
        /// Most worker nodes at once.
        pub max_nodes: u32 = 10,
        /// Most calls to the provider at once.
        pub max_concurrent_api: u32 = 5,
        /// Most calls in a minute. Unset: as many as the provider takes.
        pub requests_per_minute: Option<u32> = None,
        /// Most tokens in a minute. Unset: as many as the provider takes.
        pub tokens_per_minute: Option<u64> = None,
    }
}

section! {
    /// Whose model answers.
    pub struct ProviderSettings {
        /// `gemini`, `groq`, `openai`, `anthropic` or `sim`; any name when `base_url` is set.
        pub name: String = "sim".into(),
        /// The model's name at the provider.
        pub model: Option<String> = None,
        /// Environment variable that holds the key.
        pub api_key_env: Option<String> = None,
        /// Address of the provider, or of any that speaks like OpenAI's.
        pub base_url: Option<String> = None,
    }
}

section! {
    /// What dispatching may cost.
    pub struct CostConfig {
        /// Most US dollars in a day. Unset: no cap.
        pub max_daily_spend: Option<f64> = None,
    }
}
