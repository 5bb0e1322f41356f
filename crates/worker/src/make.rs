//! Makes the agent that a node is to run.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use drover_config::WorkerConfig;
use drover_mailbox::Mailbox;
use drover_service::Context;
use drover_types::{AgentKind, ErrorCode, Failure, NodeIndex, OutboxId, SwarmId};
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentCommand, AgentEvent};
use crate::bundle;
use crate::chat::{self, ChatAgent};
use crate::codex::{self, CodexAgent, CodexSettings, PoolDoor};
use crate::door::{self, Token};
use crate::echo::EchoAgent;
use crate::node::WORK;

/// What the pool takes for the model that the dispatcher is configured with.
const POOL_MODEL: &str = "drover";

/// The agent of this kind, or one that only says why it cannot be.
pub(crate) fn make_agent(
    kind: AgentKind,
    config: &WorkerConfig,
    node_dir: &Path,
    pool: Option<door::Plan>,
) -> Box<dyn Agent> {
    match kind {
        AgentKind::Echo => Box::new(EchoAgent::new(node_dir)),
        AgentKind::Chat => match pool {
            Some(plan) => Box::new(ChatAgent::new(plan, config, node_dir)),
            None => Box::new(Unusable(chat::not_open())),
        },
        AgentKind::Codex => match codex::find_binary(config) {
            Ok(bin) => Box::new(CheckedCodex { settings: codex_settings(bin, config, node_dir), pool }),
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
        // The door itself is opened when codex is started.
        pool: config.codex_asks_pool().then(|| PoolDoor {
            url: "http://127.0.0.1:9/v1".to_owned(),
            token: Token::none(),
            model: config.codex_model.clone().unwrap_or_else(|| POOL_MODEL.to_owned()),
        }),
        ..CodexSettings::for_node(bin, node_dir.to_owned())
    }
}

/// The way to the dispatcher's pool for codex that no worker runs, such as that of a session. Open until it is dropped.
#[derive(Debug)]
pub struct PoolWay(door::Door);

impl PoolWay {
    /// Opens it, when codex gets its model from the pool.
    pub async fn open(
        id: &OutboxId,
        mailbox: &Path,
        identity: Option<PathBuf>,
        config: &WorkerConfig,
        ctx: &Context,
    ) -> Result<Option<Self>, Failure> {
        if !config.codex_asks_pool() {
            return Ok(None);
        }
        match door::Plan::of(id, &Mailbox::new(mailbox.to_owned()), identity, config, ctx) {
            Some(plan) => plan.open().await.map(|door| Some(Self(door))),
            None => Ok(None),
        }
    }

    /// Has codex go it.
    pub fn lead(&self, settings: &mut CodexSettings) {
        if let Some(way) = &mut settings.pool {
            (way.url, way.token) = (self.0.url(), self.0.token());
        }
    }
}

/// Lays AGENTS.md and the skills of a node's launch into a working directory; how many files that were. Blocks.
pub fn lay_out_bundle(mailbox: &Path, swarm: &SwarmId, node: NodeIndex, work: &Path) -> Result<usize, Failure> {
    let laid = bundle::lay_out(&Mailbox::new(mailbox.to_owned()).bundle_dir(swarm, node), work);
    laid.map_err(|error| Failure::new(ErrorCode::StoreUnavailable, error.to_string()))
}

/// Codex, once it is known that it can do anything at all.
struct CheckedCodex {
    settings: CodexSettings,
    pool: Option<door::Plan>,
}

#[async_trait]
impl Agent for CheckedCodex {
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        let Self { mut settings, pool } = *self;
        // Open as long as codex runs.
        let mut door = None;
        if let Some(plan) = pool {
            match plan.open().await {
                Ok(open) => {
                    if let Some(way) = &mut settings.pool {
                        (way.url, way.token) = (open.url(), open.token());
                    }
                    door = Some(open);
                }
                Err(failure) => return Box::new(Unusable(failure)).run(commands, events).await,
            }
        }
        match codex::preflight(&settings).await {
            Ok(()) => Box::new(CodexAgent::new(settings)).run(commands, events).await,
            Err(failure) => Box::new(Unusable(failure)).run(commands, events).await,
        }
        drop(door);
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
