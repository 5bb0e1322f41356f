//! The membership daemon beside this worker: started, kept running, and ended with it.
//!
//! It is a convenience to the agent, never a condition: nothing of the worker waits for it, and a node whose daemon cannot
//! start goes on without.
//!
//! ```text
//! worker's status ──> talk ──> gossip-membership (a child; ends when this process does)
//! ring of an inbox ─>  │  <──  members, who leads, notes
//!                      ├──> seeds    <mailbox>/gossip/<key>.json: where this node can be reached
//!                      └──> words    records for the outbox: members (only of the node that leads), notes, keys
//! ```

mod notes;
pub(crate) mod process;
mod report;
mod seeds;
mod talk;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drover_config::Config;
use drover_service::{Context, now_us, process as processes};
use drover_types::{AgentKind, OutboxId};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::core::Status;
use crate::tasks;
use process::Running;
use talk::Talk;

/// Pause before a daemon that ended is started again; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The agent's first answer comes first: on a busy machine the daemon would take its processor.
const HEAD_START: Duration = Duration::from_millis(400);
/// A daemon that ran for so long is started again at once.
const HEALTHY: Duration = Duration::from_secs(20);
/// So many ends in a row are worth a note; a single one may have had its reasons.
const WORTH_A_NOTE: u32 = 3;
/// How long the end of the worker waits for the daemon's. Its good-bye is on its way by then, and it goes on to its end alone.
const GOOD_BYE: Duration = Duration::from_millis(300);

/// A record for the outbox.
#[derive(Debug)]
pub(crate) struct Word {
    pub(crate) kind: &'static str,
    pub(crate) data: Value,
}

/// What the daemon is to be.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: OutboxId,
    pub(crate) agent: AgentKind,
    /// Directory of the node's key and certificate.
    pub(crate) identity: Option<PathBuf>,
    pub(crate) mailbox: PathBuf,
    pub(crate) node_dir: PathBuf,
    pub(crate) config: Arc<Config>,
}

impl Plan {
    /// Whether there is to be a daemon at all.
    pub(crate) fn is_wanted(&self) -> bool {
        if !self.config.swarm.as_ref().is_none_or(|swarm| swarm.enabled) {
            return false;
        }
        let able = self.identity.is_some() || self.config.security.gossip_plaintext;
        if !able {
            info!("no membership: this node was started without an identity");
        }
        able
    }

    pub(crate) fn node_id(&self) -> String {
        format!("{}/{}", self.id.swarm, self.id.node)
    }

    /// What the node can do.
    fn capabilities(&self) -> String {
        let tasks = if self.config.worker.run_tasks { tasks::CAPABILITY } else { "" };
        format!("agent={}{tasks}", self.agent)
    }

    /// What the record of the node says of it, beside swarm and index.
    fn labels(&self) -> String {
        format!("host={},agent={},generation={}", processes::hostname(), self.agent, self.id.generation)
    }
}

/// What the worker lets its companion know.
#[derive(Debug, Clone)]
pub(crate) struct Ears {
    pub(crate) status: watch::Receiver<Status>,
    /// The newest key ring that came through the inbox.
    pub(crate) ring: watch::Receiver<Option<Arc<str>>>,
    /// What the agent said of itself when it was ready.
    pub(crate) hello: watch::Receiver<Option<Arc<Value>>>,
}

/// The daemon, from the worker's side.
pub(crate) struct Companion {
    leave: CancellationToken,
    ended: Option<oneshot::Receiver<()>>,
}

impl Companion {
    /// Starts it, if there is to be one, and returns at once.
    pub(crate) fn start(plan: Plan, ctx: &Context, ears: Ears, words: mpsc::Sender<Word>) -> Self {
        let leave = CancellationToken::new();
        if !plan.is_wanted() {
            return Self { leave, ended: None };
        }
        let (end, ended) = oneshot::channel();
        let (leaving, mut status) = (leave.child_token(), ears.status.clone());
        let over = leaving.clone();
        ctx.spawn("membership end", async move {
            // As soon as nothing runs here any more: while the agent ends, the others hear of it.
            tokio::select! {
                _ = status.wait_for(|status| status.state == "draining" && status.running.is_none()) => over.cancel(),
                () = over.cancelled() => {}
            }
        });
        let keeper = Keeper { talk: Talk::new(plan.clone(), ctx, ears, words), plan, ctx: ctx.clone() };
        ctx.spawn("membership", async move {
            keeper.keep(&leaving).await;
            let _ = end.send(());
        });
        Self { leave, ended: Some(ended) }
    }

    /// Lets the node leave, and waits until that is said.
    pub(crate) async fn end(self) {
        self.leave.cancel();
        if let Some(ended) = self.ended {
            let _ = tokio::time::timeout(2 * GOOD_BYE, ended).await;
        }
    }
}

/// Keeps the daemon running.
struct Keeper {
    plan: Plan,
    ctx: Context,
    talk: Talk,
}

impl Keeper {
    async fn keep(mut self, leave: &CancellationToken) {
        let (mut pause, mut ends) = (FIRST_PAUSE, 0);
        let _ = tokio::time::timeout(HEAD_START, leave.cancelled()).await;
        while !leave.is_cancelled() {
            let begun = Instant::now();
            let Some(why) = self.run(leave).await else { return };
            if begun.elapsed() >= HEALTHY {
                (pause, ends) = (FIRST_PAUSE, 0);
            }
            ends += 1;
            if ends == WORTH_A_NOTE {
                error!(why, ends, "the membership daemon does not stay up; the agent goes on without it");
            } else {
                warn!(
                    why,
                    ends,
                    again_in_ms = pause.as_millis() as u64,
                    "the membership daemon ended and is started again"
                );
            }
            if ends >= WORTH_A_NOTE {
                self.talk.notes.ended(now_us(), ends, &why);
                self.talk.tell_notes().await;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                () = leave.cancelled() => {}
            }
        }
        self.forget_seed().await;
    }

    /// One life of the daemon. Why it ended, or nothing when it was told to.
    async fn run(&mut self, leave: &CancellationToken) -> Option<String> {
        let name = process::instance(&self.plan);
        tokio::select! {
            () = process::after_predecessor(&name, self.ctx.state()) => {}
            () = leave.cancelled() => return None,
        }
        let (dir, swarm, own) = (seeds::dir(&self.plan.mailbox), self.plan.id.swarm.to_string(), self.plan.node_id());
        let known = BTreeSet::from([seeds::key_of(&own)]);
        let found = tokio::task::spawn_blocking(move || seeds::read(&dir, &swarm, &known)).await.unwrap_or_default();
        debug!(seeds = found.len(), "looked for nodes to ask first");
        if let Some(identity) = self.plan.identity.clone() {
            let mailbox = self.plan.mailbox.clone();
            let _ = tokio::task::spawn_blocking(move || seeds::hand_over_charter(&mailbox, &identity)).await;
        }
        self.talk.keep_ring().await;
        let mut running = match Running::start(&self.plan, &self.ctx, &found) {
            Ok(running) => running,
            Err(why) => return Some(why),
        };
        self.talk.begin(running.pid());
        let status = tokio::select! {
            status = running.ended() => Some(status),
            () = self.talk.talk() => None,
            () = leave.cancelled() => None,
        };
        self.talk.end();
        if let Some(status) = status {
            return Some(process::why(&process::log_file(&self.plan), &status));
        }
        running.ask_to_end();
        self.forget_seed().await;
        if tokio::time::timeout(GOOD_BYE, running.ended()).await.is_err() {
            debug!("membership is still saying good-bye");
        }
        None
    }

    /// Nobody is to ask for this node any more.
    async fn forget_seed(&self) {
        let (dir, own) = (seeds::dir(&self.plan.mailbox), self.plan.node_id());
        let _ = tokio::task::spawn_blocking(move || seeds::remove(&dir, &own)).await;
    }
}
