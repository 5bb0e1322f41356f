//! `codex` in a session: the conversation is a thread of Codex, and it travels with its working directory.
//!
//! ```text
//! <dir>/work            what the agent works on                     travels
//! <dir>/rollout/        the thread's own file, as Codex writes it    travels
//! <private>/codex-home/ settings, credentials, Codex's own database; its `sessions` leads to the rollout
//! ```
//!
//! Codex is started for a turn and ends with it, so that what a turn leaves behind is captured while nobody writes, no process that goes on
//! elsewhere meets an older one, and a hundred sessions that are silent cost nothing. It takes a fraction of a second.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use drover_types::{ErrorCode, Failure, Generation, OutboxId};
use drover_worker::PoolWay;
use drover_worker::codex::{self, CodexAgent, CodexSettings};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::installed::Around;
use super::worker_turn::{self, Ask};
use super::{Agent, Conversation, Start, TurnAsked, TurnDone, TurnOut};

/// Key of the session's context under which the thread is.
const CONTEXT: &str = "codex";

/// Codex, as the worker of this node would run it.
pub(super) struct Codex {
    around: Around,
    /// One way to the pool for all sessions of this node, opened by the first; nothing when Codex has a provider of its own.
    way: Arc<OnceCell<Option<PoolWay>>>,
}

impl Codex {
    pub(super) fn new(around: Around) -> Self {
        Self { around, way: Arc::default() }
    }

    /// Opens the way to the pool, where that is Codex's.
    async fn way(&self) -> Result<(), Failure> {
        let open = || async {
            let around = &self.around;
            let Some((swarm, node, mailbox)) = around.place.clone() else { return Ok(None) };
            let id = OutboxId { swarm, node, generation: Generation(0) };
            PoolWay::open(&id, &mailbox, around.identity.clone(), &around.config.worker, &around.ctx).await
        };
        self.way.get_or_try_init(open).await.map(drop)
    }
}

#[async_trait]
impl Agent for Codex {
    /// A turn may have changed files, and somebody has paid for it.
    fn replayable(&self) -> bool {
        false
    }

    fn travels(&self) -> bool {
        true
    }

    async fn begin(&self, start: Start) -> Result<Box<dyn Conversation>, Failure> {
        let worker = &self.around.config.worker;
        let config = worker.clone();
        let bin = off_thread(move || codex::find_binary(&config)).await??;
        let mut settings = drover_worker::codex_settings(bin, worker, &start.private);
        self.way().await?;
        settings.cwd = start.dir.join("work");
        let thread = start.history.state().await?.context.get(CONTEXT).and_then(thread_of);
        let rollout = start.dir.join("rollout");
        let talk = Talk { settings, approves: worker.auto_approve, way: Arc::clone(&self.way) };
        // What the launch brought stands in a new session's directory, and goes along from there.
        let launch = self.around.place.clone().filter(|_| thread.is_none());
        let laid = off_thread(move || {
            talk.lay_out(&rollout, thread.as_deref()).map_err(|error| unusable(&start.private, &error))?;
            if let Some((swarm, node, mailbox)) = launch {
                drover_worker::lay_out_bundle(&mailbox, &swarm, node, &talk.settings.cwd)?;
            }
            Ok::<_, Failure>(talk)
        });
        Ok(Box::new(laid.await??))
    }
}

fn thread_of(context: &Value) -> Option<String> {
    context["thread"].as_str().map(str::to_owned)
}

fn unusable(dir: &Path, error: &io::Error) -> Failure {
    Failure::new(ErrorCode::StoreUnavailable, format!("cannot set up codex in {}: {error}", dir.display()))
        .hint("check that the node's directory can be written")
}

/// Work on files, off the threads that serve.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::new(ErrorCode::Internal, format!("codex could not be set up: {error}")))
}

/// One session's codex on this node.
#[derive(Debug)]
struct Talk {
    settings: CodexSettings,
    approves: bool,
    way: Arc<OnceCell<Option<PoolWay>>>,
}

impl Talk {
    /// A home of which only the conversation is old: what Codex itself remembers of another state would only mislead it. Blocks.
    fn lay_out(&self, rollout: &Path, thread: Option<&str>) -> io::Result<()> {
        let home = &self.settings.codex_home;
        match std::fs::remove_dir_all(home) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for dir in [home, &self.settings.cwd, &rollout.to_owned()] {
            private_dir(dir)?;
        }
        symlink(std::fs::canonicalize(rollout)?, home.join("sessions"))?;
        codex::go_on_with(&self.settings, thread)
    }
}

fn private_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[async_trait]
impl Conversation for Talk {
    async fn turn(&mut self, asked: TurnAsked, out: &TurnOut) -> TurnDone {
        let ask = Ask { name: asked.request, prompt: asked.prompt, approves: self.approves };
        let mut settings = self.settings.clone();
        if let Some(Some(way)) = self.way.get() {
            way.lead(&mut settings);
        }
        let agent = Box::new(CodexAgent::new(settings));
        let heard = worker_turn::one_turn(agent, ask, out, &asked.stop).await;
        let file: PathBuf = self.settings.thread_file.clone();
        let settings = self.settings.clone();
        let thread = match off_thread(move || codex::thread_of(&settings)).await {
            Ok(Ok(thread)) => thread,
            Ok(Err(error)) => {
                tracing::error!(%error, file = %file.display(), "cannot read which thread the session has; a move would lose the conversation");
                None
            }
            Err(failure) => {
                tracing::error!(error = %failure.message, "cannot read which thread the session has");
                None
            }
        };
        let context = thread.map(|thread| (CONTEXT.to_owned(), Some(json!({ "thread": thread }))));
        TurnDone { outcome: heard.outcome(), context: context.into_iter().collect() }
    }

    /// Nothing runs between turns.
    async fn end(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use drover_config::WorkerConfig;

    use super::*;

    #[test]
    fn a_home_is_laid_out_anew_and_keeps_only_the_conversation() {
        let dir = tempfile::tempdir().unwrap();
        let private = dir.path().join("private");
        let rollout = dir.path().join("dir/rollout");
        let config = WorkerConfig::default();
        let mut settings = drover_worker::codex_settings(PathBuf::from("codex"), &config, &private);
        settings.cwd = dir.path().join("dir/work");
        let talk = Talk { settings, approves: false, way: Arc::default() };
        talk.lay_out(&rollout, None).unwrap();
        assert_eq!(codex::thread_of(&talk.settings).unwrap(), None);
        std::fs::write(talk.settings.codex_home.join("sessions/rollout-1.jsonl"), "{}\n").unwrap();
        std::fs::write(talk.settings.codex_home.join("state.sqlite"), "old").unwrap();
        std::fs::write(talk.settings.cwd.join("kept"), "x").unwrap();

        talk.lay_out(&rollout, Some("0199-thread")).unwrap();
        assert_eq!(codex::thread_of(&talk.settings).unwrap().as_deref(), Some("0199-thread"));
        assert!(!talk.settings.codex_home.join("state.sqlite").exists());
        assert!(talk.settings.codex_home.join("sessions/rollout-1.jsonl").exists(), "the thread's file is gone");
        assert!(talk.settings.cwd.join("kept").exists());
    }
}
