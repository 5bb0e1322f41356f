//! Makes the agent that a node is to run.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use drover_config::WorkerConfig;
use drover_types::{AgentKind, Failure};
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentCommand, AgentEvent};
use crate::codex::{self, CodexAgent, CodexSettings};
use crate::echo::EchoAgent;
use crate::node::WORK;

/// The agent of this kind, or one that only says why it cannot be.
pub(crate) fn make_agent(kind: AgentKind, config: &WorkerConfig, node_dir: &Path) -> Box<dyn Agent> {
    match kind {
        AgentKind::Echo => Box::new(EchoAgent::new(node_dir)),
        AgentKind::Codex => match codex::find_binary(config) {
            Ok(bin) => Box::new(CheckedCodex(codex_settings(bin, config, node_dir))),
            Err(failure) => Box::new(Unusable(failure)),
        },
    }
}

/// How codex would be set up for a node that works in `node_dir`; also for those who only want to know whether it would.
pub fn codex_settings(bin: PathBuf, config: &WorkerConfig, node_dir: &Path) -> CodexSettings {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = config.codex_home.clone().or_else(|| set("CODEX_HOME")).or_else(|| Some(set("HOME")?.join(".codex")));
    CodexSettings {
        args: config.codex_args.clone(),
        home_source: home,
        cwd: node_dir.join(WORK),
        approval_policy: config.approval_policy.clone(),
        sandbox_mode: config.sandbox_mode.clone(),
        env_allow: config.agent_env.clone(),
        max_restarts: config.max_agent_restarts,
        ..CodexSettings::for_node(bin, node_dir.to_owned())
    }
}

/// Codex, once it is known that it can do anything at all.
struct CheckedCodex(CodexSettings);

#[async_trait]
impl Agent for CheckedCodex {
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        match codex::preflight(&self.0).await {
            Ok(()) => Box::new(CodexAgent::new(self.0)).run(commands, events).await,
            Err(failure) => Box::new(Unusable(failure)).run(commands, events).await,
        }
    }
}

/// An agent that cannot be: says why, so that it stands in the outbox and not only in a log.
pub(crate) struct Unusable(pub(crate) Failure);

#[async_trait]
impl Agent for Unusable {
    async fn run(self: Box<Self>, _commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        // When nobody listens there is nobody to tell.
        let _ = events.send(AgentEvent::GaveUp { failure: self.0 }).await;
    }
}
