//! The one configuration file: a section per daemon, defaults, validation, human durations. The only user of `serde_yaml`.

mod human;
mod sections;

pub use human::{HumanDuration, HumanError, HumanSize};
pub use sections::{
    AllocatorConfig, ClusterConfig, FollowerConfig, RouterConfig, SecurityConfig, TelemetryConfig, WorkerConfig,
};

use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The router and its JSON-line control plane.
    pub router: RouterConfig,
    /// The allocator.
    pub allocator: AllocatorConfig,
    /// The outbox follower.
    pub follower: FollowerConfig,
    /// The worker and its agent.
    pub worker: WorkerConfig,
    /// Where swarms run.
    pub cluster: ClusterConfig,
    /// Who may talk to the daemons.
    pub security: SecurityConfig,
    /// Traces.
    pub telemetry: TelemetryConfig,
}

// PROVISIONAL (lead): so that drover-service compiles until the real loader lands; replace.
pub struct Loaded { pub config: Config, pub source: String, pub warnings: Vec<String> }
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(pub String);
pub fn load(explicit: Option<&std::path::Path>) -> Result<Loaded, LoadError> {
    let Some(path) = explicit else { return Ok(Loaded { config: Config::default(), source: "built-in".into(), warnings: vec![] }) };
    let text = std::fs::read_to_string(path).map_err(|e| LoadError(format!("{}: {e}", path.display())))?;
    let config = serde_yaml::from_str(&text).map_err(|e| LoadError(format!("{}: {e}", path.display())))?;
    Ok(Loaded { config, source: path.display().to_string(), warnings: vec![] })
}
impl Config { pub fn dump(&self) -> String { serde_yaml::to_string(self).unwrap_or_default() } }
