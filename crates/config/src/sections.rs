//! The sections of the configuration file. A doc comment on a field is its entry in the reference page.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use drover_types::AgentKind;
use serde::{Deserialize, Serialize};

use crate::human::{HumanDuration, HumanSize};

/// The router and its JSON-line control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7950, or a free port when that is taken.
    pub listen: Option<SocketAddr>,
    /// Address of the JSON-line control plane. Unset: 127.0.0.1:8765, or a free port when that is taken.
    pub control_listen: Option<SocketAddr>,
    /// Longest line that a JSON-line client may send; a longer one closes its connection.
    pub max_line_bytes: HumanSize,
    /// Bytes of events that may wait for one subscriber before it is cut off.
    pub subscriber_max_bytes: HumanSize,
    /// How long events are kept.
    pub keep_events_for: HumanDuration,
    /// How many events are kept at most.
    pub keep_events: u64,
    /// How long a swarm that has ended stays listed.
    pub keep_ended_swarms_for: HumanDuration,
    /// A launch with some nodes still missing after this long goes on as degraded.
    pub launch_soft_timeout: HumanDuration,
    /// A launch whose allocation runs and of which no node is up after this long has failed.
    pub launch_hard_timeout: HumanDuration,
    /// How long a termination waits for turns to end before it kills.
    #[serde(alias = "graceful_terminate_timeout_seconds")]
    pub graceful_terminate_timeout: HumanDuration,
    /// Accepted for old files, as is the rest below; has no effect.
    pub inject_timeout_seconds: Option<f64>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            listen: None,
            control_listen: None,
            max_line_bytes: HumanSize::mib(16),
            subscriber_max_bytes: HumanSize::mib(64),
            keep_events_for: HumanDuration::days(30),
            keep_events: 10_000_000,
            keep_ended_swarms_for: HumanDuration::days(1),
            launch_soft_timeout: HumanDuration::secs(60),
            launch_hard_timeout: HumanDuration::secs(180),
            graceful_terminate_timeout: HumanDuration::secs(20),
            inject_timeout_seconds: None,
        }
    }
}

/// Which backend swarms are launched on, and how the allocator behaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AllocatorConfig {
    /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7951, or a free port when that is taken.
    pub listen: Option<SocketAddr>,
    /// Most nodes that the local backend starts for one swarm.
    pub max_local_nodes: u32,
}

impl Default for AllocatorConfig {
    fn default() -> Self {
        Self { listen: None, max_local_nodes: 64 }
    }
}

/// The outbox follower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FollowerConfig {
    /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7952, or a free port when that is taken.
    pub listen: Option<SocketAddr>,
    /// How often an outbox of a node at work is looked at where the file system does not tell of changes.
    pub hot_poll: HumanDuration,
    /// How often an outbox of a quiet node is looked at.
    pub cold_poll: HumanDuration,
    /// Size at which an inbox segment is full.
    pub segment_bytes: HumanSize,
}

impl Default for FollowerConfig {
    fn default() -> Self {
        Self {
            listen: None,
            hot_poll: HumanDuration::millis(50),
            cold_poll: HumanDuration::secs(20),
            segment_bytes: HumanSize::mib(64),
        }
    }
}

/// The worker and the agent it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// Address for gRPC, `/healthz` and `/metrics`. Unset: 127.0.0.1:7953, or a free port when that is taken.
    pub listen: Option<SocketAddr>,
    /// Which agent runs when a launch names none.
    pub agent: AgentKind,
    /// The native codex binary. Unset: `codex` on PATH.
    pub codex_bin: Option<PathBuf>,
    /// Extra arguments for codex, such as `-c` overrides.
    pub codex_args: Vec<String>,
    /// Environment variables that the agent may see beside the harmless ones; names only, such as `OPENAI_API_KEY`.
    pub agent_env: Vec<String>,
    /// Codex's own settings directory to take `config.toml` and `auth.json` from. Unset: `$CODEX_HOME` or `~/.codex`.
    pub codex_home: Option<PathBuf>,
    /// When codex asks before it acts: `untrusted`, `on-request` or `never`.
    pub approval_policy: String,
    /// What codex may touch: `read-only`, `workspace-write` or `danger-full-access`.
    pub sandbox_mode: String,
    /// Answer yes to every approval by itself, as long as the call stays inside the node's working directory.
    pub auto_approve: bool,
    /// An approval that nobody answers for this long is declined.
    pub approval_timeout: HumanDuration,
    /// How often a crashed agent program is started again before the worker gives up.
    pub max_agent_restarts: u32,
    /// How often a worker that died is started again before its node is given up.
    pub max_restarts: u32,
    /// Pause before the first restart; it doubles with each, up to 30 s.
    pub restart_delay: HumanDuration,
    /// A worker that ran this long is healthy again: its used-up restarts are forgotten.
    pub healthy_after: HumanDuration,
    /// How long a worker that was told to end may let the running turn go on before it interrupts it.
    pub drain_grace: HumanDuration,
    /// Size at which an outbox segment is full.
    pub segment_bytes: HumanSize,
    /// Most prompts that may wait on one node.
    pub max_queue: usize,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            listen: None,
            agent: AgentKind::Codex,
            codex_bin: None,
            codex_args: Vec::new(),
            agent_env: vec!["OPENAI_API_KEY".into()],
            codex_home: None,
            approval_policy: "on-request".into(),
            sandbox_mode: "workspace-write".into(),
            auto_approve: false,
            approval_timeout: HumanDuration::secs(600),
            max_agent_restarts: 5,
            max_restarts: 5,
            restart_delay: HumanDuration::millis(500),
            healthy_after: HumanDuration::secs(60),
            drain_grace: HumanDuration::secs(10),
            segment_bytes: HumanSize::mib(64),
            max_queue: 10_000,
        }
    }
}

/// Who may talk to the daemons.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecurityConfig {
    /// Further user ids whose processes may connect, beside the one the daemon runs as.
    pub allow_uids: Vec<u32>,
}

/// Traces. Nothing leaves the machine unless an endpoint is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// OTLP gRPC endpoint, such as `http://127.0.0.1:4317`. Unset: no traces are exported.
    pub otlp_endpoint: Option<String>,
}

/// Where swarms run. Old files say this in several ways; `Config::providers` gives the one meaning.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// The one backend of a file without `launch_providers`: `local`, `static` or `slurm`.
    pub backend: Option<String>,
    /// Directory on the file system that login and compute nodes share.
    pub workspace_root: Option<String>,
    /// Directory below it that is ours.
    pub cluster_subdir: Option<String>,
    /// Hosts of the `static` backend: workers run there under their own supervisor.
    pub hosts: Vec<String>,
    /// Further settings of the local backend, by name.
    pub local: BTreeMap<String, serde_json::Value>,
    /// Further settings of the slurm backend, by name.
    pub slurm: BTreeMap<String, serde_json::Value>,
}
