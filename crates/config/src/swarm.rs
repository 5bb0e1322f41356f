//! Membership, load and handoff.

use std::net::SocketAddr;

use crate::human::HumanDuration;
use crate::schema::section;

section! {
    /// Membership, load monitoring and session handoff.
    pub struct SwarmConfig {
        /// Let the nodes find each other and know of each other's state and load.
        pub enabled: bool = true,
        /// Address for gRPC, `/healthz` and `/metrics` of membership. Unset: port 7954 of `bind_addr`, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// Name of this node in the gossip. Unset: `<swarm_id>/<index>`.
        pub node_id: Option<String> = None,
        /// Address that the gossip binds to. Unset: 127.0.0.1.
        pub bind_addr: String = "127.0.0.1".into(),
        /// UDP port of the gossip. Unset: 7946, or a free port when that is taken.
        pub bind_port: Option<u16> = None,
        /// Address that the other nodes are told. Unset: `bind_addr`; for 0.0.0.0 the one that leads to the first seed.
        pub advertise_addr: Option<String> = None,
        /// Region that this node is in; nodes of one region watch each other.
        pub region: String = "default".into(),
        /// Finding the other nodes.
        pub discovery: DiscoveryConfig = DiscoveryConfig::default(),
        /// Giving sessions to other nodes.
        pub handoff: HandoffConfig = HandoffConfig::default(),
        /// Calls between nodes.
        pub rpc: RpcConfig = RpcConfig::default(),
        /// Measuring the load of this node.
        pub load_monitor: LoadMonitorConfig = LoadMonitorConfig::default(),
        /// What is done when a node joins, leaves, is suspect or is alive again, beside the log and the metrics.
        pub events: EventsConfig = EventsConfig::default(),
    }
}

impl SwarmConfig {
    /// UDP port of the gossip when none is configured and this one is free.
    pub const DEFAULT_BIND_PORT: u16 = 7946;
}

section! {
    /// What is done when a node joins, leaves, is suspect or is alive again, beside the log and the metrics.
    pub struct EventsConfig {
        /// Most events that may wait for one handler; the oldest is dropped and counted when it is full.
        pub queue: usize = 256,
        /// The handlers. Each runs its events one after another.
        pub handlers: Vec<EventHandlerConfig> = Vec::new(),
    }
}

section! {
    /// One thing to do at an event: a command or a webhook.
    pub struct EventHandlerConfig {
        /// Events that it is for, such as `NodeJoined`. Empty: all.
        pub on: Vec<String> = Vec::new(),
        /// Program and arguments. The event is its standard input as JSON, and in `DROVER_EVENT` and `DROVER_EVENT_NODE_ID`.
        pub command: Vec<String> = Vec::new(),
        /// Address that the event is posted to as JSON.
        pub webhook: Option<String> = None,
        /// Longest time for one event; then the command is killed, or the request given up.
        pub timeout: HumanDuration = HumanDuration::secs(10),
    }
}

section! {
    /// Finding the other nodes.
    pub struct DiscoveryConfig {
        /// Nodes to ask first, as `host:port`.
        pub join_addrs: Vec<String> = Vec::new(),
        /// Pause between two probes of a node; every other pace of the gossip follows from it.
        pub gossip_interval: HumanDuration = HumanDuration::secs(1),
        /// Pause between full exchanges of state.
        pub push_pull_interval: HumanDuration = HumanDuration::secs(30),
        /// Longest silence until a node is suspect.
        pub node_timeout: HumanDuration = HumanDuration::secs(5),
        /// How long a dead node stays listed.
        pub dead_node_timeout: HumanDuration = HumanDuration::secs(30),
    }
}

section! {
    /// Giving sessions to other nodes.
    pub struct HandoffConfig {
        /// Hand sessions off when the node is overloaded. What a person orders is done anyway.
        pub enabled: bool = true,
        /// Load score from which a node is overloaded, from 0 to 1.
        pub load_threshold: f64 = 0.8,
        /// Longest time for one handoff.
        pub timeout: HumanDuration = HumanDuration::secs(30),
        /// Attempts with one node after the first; then it is reported suspect, and another is tried.
        pub max_retries: u32 = 3,
        /// Pause between attempts.
        pub retry_delay: HumanDuration = HumanDuration::secs(5),
    }
}

section! {
    /// Calls between nodes.
    pub struct RpcConfig {
        /// Port of a node's sessions: turns and handoffs come in there. With the default a free one is taken when it is in use.
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
        /// Sessions that count as a full node.
        pub max_sessions: u32 = 8,
    }
}
