//! Which agents this node runs.

use std::path::PathBuf;
use std::sync::Arc;

use drover_config::Config;
use drover_service::Context;
use drover_types::{AgentKind, NodeIndex, SwarmId};

use super::Agents;
use super::chat::Chat;
use super::codex::Codex;
use super::echo::Echo;

/// What agents need to know of the node.
#[derive(Clone)]
pub struct Around {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// The daemon.
    pub ctx: Context,
    /// Swarm, index and mailbox; none for a node outside of a swarm.
    pub place: Option<(SwarmId, NodeIndex, PathBuf)>,
    /// Directory of the node's key and certificate.
    pub identity: Option<PathBuf>,
}

impl Agents {
    /// Those that can be run here.
    pub fn installed(around: &Around) -> Self {
        let worker = &around.config.worker;
        let mut agents = Self::default().with(AgentKind::Echo, Echo);
        if drover_worker::codex::find_binary(worker).is_ok() {
            agents = agents.with(AgentKind::Codex, Codex::new(around.clone()));
        }
        if worker.nodes_ask_pool() && around.place.is_some() {
            agents = agents.with(AgentKind::Chat, Chat::new(around.clone()));
        }
        agents
    }
}
