//! The sections of the daemons. A doc comment on a field is its entry in the reference page.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drover_types::AgentKind;

use crate::human::{HumanDuration, HumanSize};
use crate::schema::section;

section! {
    /// The router and its JSON-line control plane.
    pub struct RouterConfig {
        /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7950, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// Address of the JSON-line control plane. Unset: 127.0.0.1:8765, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub control_listen: Option<SocketAddr> = None,
        /// Longest line that a JSON-line client may send; a longer one closes its connection.
        pub max_line_bytes: HumanSize = HumanSize::mib(16),
        /// Bytes of events that may wait for one subscriber before it is cut off.
        pub subscriber_max_bytes: HumanSize = HumanSize::mib(64),
        /// How long events are kept.
        pub keep_events_for: HumanDuration = HumanDuration::days(30),
        /// How many events are kept at most.
        pub keep_events: u64 = 10_000_000,
        /// How long a swarm that has ended stays listed.
        pub keep_ended_swarms_for: HumanDuration = HumanDuration::days(1),
        /// A launch with some nodes still missing after this long goes on as degraded.
        pub launch_soft_timeout: HumanDuration = HumanDuration::secs(60),
        /// A launch whose allocation runs and of which no node is up after this long has failed.
        pub launch_hard_timeout: HumanDuration = HumanDuration::secs(180),
        /// How long a termination waits for turns to end before it kills.
        pub graceful_terminate_timeout: HumanDuration = HumanDuration::secs(20),
    }
}

section! {
    /// The allocator.
    pub struct AllocatorConfig {
        /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7951, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// Most nodes that the local backend starts for one swarm.
        pub max_local_nodes: u32 = 64,
    }
}

section! {
    /// The outbox follower.
    pub struct FollowerConfig {
        /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7952, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// How often an outbox of a node at work is looked at where the file system does not tell of changes.
        pub hot_poll: HumanDuration = HumanDuration::millis(50),
        /// How often an outbox of a quiet node is looked at.
        pub cold_poll: HumanDuration = HumanDuration::secs(20),
        /// Size at which an inbox segment is full.
        pub segment_bytes: HumanSize = HumanSize::mib(64),
        /// It ends by itself when nobody has used it for this long. Unset: it stays; one that drover starts on the login
        /// host of a cluster ends after 30 minutes.
        pub end_when_idle: Option<HumanDuration> = None,
    }
}

section! {
    /// The worker and the agent it runs.
    pub struct WorkerConfig {
        /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7953, or a free port when that is taken.
        #[serde(deserialize_with = "crate::human::address")]
        pub listen: Option<SocketAddr> = None,
        /// Which agent runs when a launch names none.
        pub agent: AgentKind = AgentKind::Codex,
        /// The native codex binary. Unset: `codex` on PATH.
        pub codex_bin: Option<PathBuf> = None,
        /// Extra arguments for codex, such as `-c` overrides.
        pub codex_args: Vec<String> = Vec::new(),
        /// Environment variables that the agent may see beside the harmless ones; names only, such as `OPENAI_API_KEY`.
        pub agent_env: Vec<String> = vec!["OPENAI_API_KEY".into()],
        /// Codex's own settings directory to take `config.toml` and `auth.json` from. Unset: `$CODEX_HOME` or `~/.codex`.
        pub codex_home: Option<PathBuf> = None,
        /// Where codex's model comes from: `own` for what its own settings say, `pool` for the dispatcher, whose keys, limits
        /// and budget then hold. The node needs no key and no way to the internet.
        pub codex_provider: String = "own".into(),
        /// Model that codex asks the pool for. Unset: the one that the dispatcher is configured with.
        pub codex_model: Option<String> = None,
        /// How requests of a node come to the dispatcher: `grpc` over TLS, `mailbox` through files, or `auto`, which takes
        /// the first where it works.
        pub pool_carriage: String = "auto".into(),
        /// Where nodes reach the dispatcher, as host:port. Unset: where it says in the mailbox that it listens.
        pub pool_address: Option<String> = None,
        /// What `inject` says to a node is a turn of a session of its own, `node-SWARM-INDEX`, which is kept, moves and is taken over like any
        /// other. Nobody can be asked for an approval in it.
        pub own_session: bool = false,
        /// Reads pages for the dispatcher's `fetch` and `extract` tasks on this node.
        pub run_tasks: bool = false,
        /// When codex asks before it acts: `untrusted`, `on-request` or `never`.
        pub approval_policy: String = "on-request".into(),
        /// What codex may touch: `read-only`, `workspace-write` or `danger-full-access`.
        pub sandbox_mode: String = "workspace-write".into(),
        /// Answer yes to every approval by itself, as long as the call stays inside the node's working directory.
        pub auto_approve: bool = false,
        /// An approval that nobody answers for this long is declined.
        pub approval_timeout: HumanDuration = HumanDuration::secs(600),
        /// How often a crashed agent program is started again before the worker gives up.
        pub max_agent_restarts: u32 = 5,
        /// How often a worker that died is started again before its node is given up.
        pub max_restarts: u32 = 5,
        /// Pause before the first restart; it doubles with each, up to 30 s.
        pub restart_delay: HumanDuration = HumanDuration::millis(500),
        /// A worker that ran this long is healthy again: its used-up restarts are forgotten.
        pub healthy_after: HumanDuration = HumanDuration::secs(60),
        /// How long a worker that was told to end may let the running turn go on before it interrupts it.
        pub drain_grace: HumanDuration = HumanDuration::secs(10),
        /// Size at which an outbox segment is full.
        pub segment_bytes: HumanSize = HumanSize::mib(64),
        /// Most prompts that may wait on one node.
        pub max_queue: usize = 10_000,
    }
}

impl WorkerConfig {
    /// Codex asks the dispatcher for its model.
    pub fn codex_asks_pool(&self) -> bool {
        self.codex_provider == "pool"
    }

    /// Agents of nodes ask the dispatcher for their model.
    pub fn nodes_ask_pool(&self) -> bool {
        self.codex_asks_pool() || self.agent == AgentKind::Chat
    }

    /// Nodes come to the dispatcher, for models or for work.
    pub fn nodes_use_dispatcher(&self) -> bool {
        self.nodes_ask_pool() || self.run_tasks
    }
}

/// How long a worker's end takes, step by step. Whoever ends workers counts on the same numbers.
impl WorkerConfig {
    /// How long an interrupted turn may take to end while the worker drains.
    pub const INTERRUPT_GRACE: Duration = Duration::from_secs(5);
    /// How long the last records may take to get to disk.
    pub const LAST_WORDS: Duration = Duration::from_secs(3);
    /// How long an agent may take to end its program.
    pub const AGENT_STOP: Duration = Duration::from_secs(5);

    /// The longest that an orderly end takes from the word to end until the process is gone: the grace of the running
    /// turn, its interrupt, the last records, the agent's own end, and a second for what is none of these.
    pub fn longest_end(&self) -> Duration {
        self.drain_grace.get() + Self::INTERRUPT_GRACE + Self::LAST_WORDS + Self::AGENT_STOP + Duration::from_secs(1)
    }

    /// When a worker that was told to end may be killed: not before the longest orderly end is over.
    pub fn kill_after(&self) -> Duration {
        self.longest_end() + Duration::from_secs(1)
    }
}

section! {
    /// Who may talk to the daemons.
    pub struct SecurityConfig {
        /// Further user ids whose processes may connect, beside the one the daemon runs as.
        pub allow_uids: Vec<u32> = Vec::new(),
        /// User ids whose processes may only ask how a daemon fares (`/healthz`, `/metrics`, `/targets`), such as that of Prometheus.
        pub metrics_uids: Vec<u32> = Vec::new(),
        /// A file, mode 600, with a secret that every caller of the router has to show beside being an allowed user. Unset: none.
        pub token_file: Option<PathBuf> = None,
        /// Users who may do some things only.
        pub roles: RolesConfig = RolesConfig::default(),
        /// Size at which the log of who changed what goes on in another file. None is ever deleted.
        pub audit_file_size: HumanSize = HumanSize::mib(16),
        /// Let nodes gossip in the clear when they have no identity; for closed networks and tests. Each start warns of it.
        pub gossip_plaintext: bool = false,
    }
}

section! {
    /// Who, beside the owner and `security.allow_uids`, may do what. Each role is a list of user ids; a user of a role reaches the
    /// router, with `dispatch` the dispatcher, and no other daemon.
    pub struct RolesConfig {
        /// Who may see swarms, nodes, prompts and events. The JSON-line control plane tells everybody everything and wants this one.
        pub read: Vec<u32> = Vec::new(),
        /// Who may send prompts to swarms, and interrupt turns. Agents carry them out with the owner's rights.
        pub inject: Vec<u32> = Vec::new(),
        /// Who may launch swarms.
        pub launch: Vec<u32> = Vec::new(),
        /// Who may end swarms.
        pub terminate: Vec<u32> = Vec::new(),
        /// Who may see and answer approvals.
        pub approve: Vec<u32> = Vec::new(),
        /// Who may have the dispatcher call models and fetch pages, with the owner's keys and money.
        pub dispatch: Vec<u32> = Vec::new(),
    }
}

section! {
    /// Traces. Nothing leaves the machine unless an endpoint is set.
    pub struct TelemetryConfig {
        /// OTLP gRPC endpoint, such as `http://127.0.0.1:4317`. Unset: no traces are exported.
        pub otlp_endpoint: Option<String> = None,
    }
}
