//! The codex agent: drives the real `codex app-server` over its standard input and output.
//!
//! ```text
//!  worker ──AgentCommand──▶ run.rs ◀──Effect/Input──▶ session.rs   decides; no clock, files or processes
//!         ◀──AgentEvent───    │                       translate.rs codex's messages -> event names
//!                             │                       approval.rs  questions and answers
//!                             ▼
//!                         process.rs  pipes, end, what codex has started     rpc.rs  lines <-> messages
//! ```
//!
//! The protocol is marked experimental by its vendor. What is built on here was observed with [`TESTED_VERSION`], and the
//! tests drive that very binary.

mod approval;
mod binary;
mod home;
mod memory;
mod preflight;
mod process;
pub mod rpc;
mod run;
mod session;
mod stderr_log;
pub mod translate;
mod workspace;

use std::path::PathBuf;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentCommand, AgentEvent};
use crate::door::Token;

pub use binary::{TESTED_VERSION, find_binary};
pub use preflight::preflight;

/// Everything that the codex agent of one node is set up with.
#[derive(Debug, Clone)]
pub struct CodexSettings {
    /// The native codex binary; see [`find_binary`].
    pub bin: PathBuf,
    /// Extra arguments in front of `app-server`, such as `-c` overrides.
    pub args: Vec<String>,
    /// Codex's own settings directory, to take `config.toml` and `auth.json` from.
    pub home_source: Option<PathBuf>,
    /// A directory of this node alone: the log of codex's standard error lies there.
    pub node_dir: PathBuf,
    /// The CODEX_HOME of this node; is made when it is missing.
    pub codex_home: PathBuf,
    /// Where the agent works.
    pub cwd: PathBuf,
    /// When codex asks: `untrusted`, `on-request` or `never`.
    pub approval_policy: String,
    /// What codex may touch: `read-only`, `workspace-write` or `danger-full-access`.
    pub sandbox_mode: String,
    /// Environment variables that codex may see beside the harmless ones.
    pub env_allow: Vec<String>,
    /// How often codex may end in a row without a completed turn in between.
    pub max_restarts: u32,
    /// Remembers the thread across restarts of the worker.
    pub thread_file: PathBuf,
    /// Where its model comes from, when that is the dispatcher and not what its own settings say.
    pub pool: Option<PoolDoor>,
}

/// The way from codex to the dispatcher's pool.
#[derive(Debug, Clone)]
pub struct PoolDoor {
    /// Address, as of a model provider.
    pub url: String,
    /// What codex shows there; it gets it by its environment.
    pub token: Token,
    /// The model that it asks for.
    pub model: String,
}

impl PoolDoor {
    /// The variable that holds the token.
    const VARIABLE: &str = "DROVER_POOL_TOKEN";

    /// Codex's own settings that lead there. A command line can be read by others, so the token is not in it.
    fn arguments(&self) -> Vec<String> {
        let text = |text: &str| serde_json::Value::from(text).to_string();
        let provider = format!(
            "model_providers.drover={{name=\"drover\",base_url={},wire_api=\"responses\",env_key=\"{}\",\
             request_max_retries=5,stream_max_retries=8,stream_idle_timeout_ms=1800000,supports_websockets=false}}",
            text(&self.url),
            Self::VARIABLE
        );
        let model = format!("model={}", text(&self.model));
        ["-c", "model_provider=\"drover\"", "-c", &provider, "-c", &model].map(str::to_owned).to_vec()
    }
}

impl CodexSettings {
    /// The usual places below a node's directory, and the defaults of the configuration.
    pub fn for_node(bin: PathBuf, node_dir: PathBuf) -> Self {
        Self {
            bin,
            args: Vec::new(),
            home_source: None,
            codex_home: node_dir.join("codex-home"),
            cwd: node_dir.clone(),
            approval_policy: "on-request".into(),
            sandbox_mode: "workspace-write".into(),
            env_allow: Vec::new(),
            max_restarts: 5,
            thread_file: node_dir.join("codex-thread.json"),
            pool: None,
            node_dir,
        }
    }
}

/// The thread that an agent set up like this goes on with; nothing when nothing was ever asked in one.
pub fn thread_of(settings: &CodexSettings) -> std::io::Result<Option<String>> {
    let memory = memory::ThreadMemory::load(&settings.thread_file)?;
    Ok(memory.filter(|memory| memory.used).map(|memory| memory.thread_id))
}

/// Has an agent set up like this go on with a thread that was begun elsewhere, whose files are in its home; or begin a new one.
pub fn go_on_with(settings: &CodexSettings, thread: Option<&str>) -> std::io::Result<()> {
    match thread {
        Some(thread) => memory::ThreadMemory { thread_id: thread.to_owned(), used: true }.save(&settings.thread_file),
        None => match std::fs::remove_file(&settings.thread_file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    }
}

/// The agent.
#[derive(Debug)]
pub struct CodexAgent {
    settings: CodexSettings,
}

impl CodexAgent {
    /// An agent that starts codex when it is run.
    pub fn new(settings: CodexSettings) -> Self {
        Self { settings }
    }
}

#[async_trait]
impl Agent for CodexAgent {
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        run::run(self.settings, commands, events).await;
    }
}
