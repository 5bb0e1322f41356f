//! The daemon of sessions beside this worker: started, kept running, and ended with it. What it tells of handoffs goes into the outbox.
//!
//! Like the membership it is never a condition: nothing of the worker waits for it until the end, when its sessions are to find other
//! nodes.

use std::path::PathBuf;
use std::time::Duration;

use drover_mailbox::Mailbox;
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::{DrainRequest, GetStatusRequest, WatchEventsRequest};
use drover_service::{Context, Target, address_book, connect, programs};
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{debug, error, info, warn};

use crate::core::{Status, kind};
use crate::membership::process::{Running, after_predecessor, open_log, why};
use crate::membership::{Plan, Word};

/// The daemon, by its name among our programs.
const NAME: &str = "handoff-coordinator";
/// The agent's first answer comes first, and then the membership.
const HEAD_START: Duration = Duration::from_millis(700);
/// Pause before a daemon that ended is started again; it doubles up to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// A daemon that ran for so long is started again at once.
const HEALTHY: Duration = Duration::from_secs(20);
/// So many ends in a row are an error; a single one may have had its reasons.
const WORTH_AN_ERROR: u32 = 3;
/// Longest time for its sessions to find other nodes when this one ends. Those that stay are taken over by the others.
const EMPTYING: Duration = Duration::from_secs(4);
/// How long its orderly end is waited for.
const GOOD_BYE: Duration = Duration::from_millis(300);
/// Longest wait for an answer of the daemon, which is on this host.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks for its address.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

type Client = HandoffServiceClient<Channel>;

/// The daemon, from the worker's side.
pub(crate) struct Sessions {
    leave: CancellationToken,
    ended: Option<oneshot::Receiver<()>>,
}

impl Sessions {
    /// Starts it, if there is to be one, and returns at once.
    pub(crate) fn start(
        plan: Plan,
        ctx: &Context,
        mut status: watch::Receiver<Status>,
        words: mpsc::Sender<Word>,
    ) -> Self {
        let leave = CancellationToken::new();
        if !plan.is_wanted() {
            return Self { leave, ended: None };
        }
        let (end, ended) = oneshot::channel();
        let keeper = Keeper { plan, ctx: ctx.clone(), words };
        let (leaving, over) = (leave.child_token(), leave.child_token());
        let leaving_too = leaving.clone();
        ctx.spawn("sessions end", async move {
            // While the agent ends, its sessions set out.
            tokio::select! {
                _ = status.wait_for(|status| status.state == "draining") => leaving_too.cancel(),
                () = over.cancelled() => {}
            }
        });
        ctx.spawn("sessions", async move {
            keeper.keep(&leaving).await;
            let _ = end.send(());
        });
        Self { leave, ended: Some(ended) }
    }

    /// Lets its sessions go elsewhere, and ends it.
    pub(crate) async fn end(self) {
        self.leave.cancel();
        if let Some(ended) = self.ended {
            let _ = timeout(EMPTYING + PATIENCE + GOOD_BYE, ended).await;
        }
    }
}

/// Keeps the daemon running.
struct Keeper {
    plan: Plan,
    ctx: Context,
    words: mpsc::Sender<Word>,
}

impl Keeper {
    /// Its name in the address book.
    fn instance(&self) -> String {
        format!("{NAME}-{}+{}", self.plan.id.swarm, self.plan.id.node)
    }

    fn log(&self) -> PathBuf {
        self.plan.node_dir.join("sessions.log")
    }

    async fn keep(self, leave: &CancellationToken) {
        let (mut pause, mut ends) = (PAUSE.0, 0);
        let _ = timeout(HEAD_START, leave.cancelled()).await;
        while !leave.is_cancelled() {
            let begun = Instant::now();
            let Some(why) = self.run(leave).await else { return };
            if begun.elapsed() >= HEALTHY {
                (pause, ends) = (PAUSE.0, 0);
            }
            ends += 1;
            let again_in_ms = pause.as_millis() as u64;
            if ends == WORTH_AN_ERROR {
                error!(why, ends, again_in_ms, "the daemon of sessions does not stay up; the agent goes on without it");
            } else {
                warn!(why, ends, again_in_ms, "the daemon of sessions ended and is started again");
            }
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = leave.cancelled() => {}
            }
        }
    }

    /// One life of the daemon. Why it ended, or nothing when it was told to.
    async fn run(&self, leave: &CancellationToken) -> Option<String> {
        let name = self.instance();
        tokio::select! {
            () = after_predecessor(&name, self.ctx.state()) => {}
            () = leave.cancelled() => return None,
        }
        let mut running = match self.begin() {
            Ok(running) => running,
            Err(why) => return Some(why),
        };
        let pid = running.pid();
        let status = tokio::select! {
            status = running.ended() => Some(status),
            () = self.listen(pid) => None,
            () = leave.cancelled() => None,
        };
        if let Some(status) = status {
            return Some(why(&self.log(), &status));
        }
        let mut client = self.client();
        tokio::select! {
            emptied = timeout(EMPTYING, empty(&mut client)) => {
                if !matches!(emptied, Ok(Ok(()))) {
                    info!("sessions of this node stay for others to take over");
                }
            }
            _ = running.ended() => return None,
        }
        running.ask_to_end();
        if timeout(GOOD_BYE, running.ended()).await.is_err() {
            debug!("the daemon of sessions is still ending");
        }
        None
    }

    fn begin(&self) -> Result<Running, String> {
        let plan = &self.plan;
        let program = programs::find(NAME)?;
        let log = open_log(&self.log()).map_err(|error| format!("its log cannot be opened: {error}"))?;
        let mut command = Command::new(&program.path);
        command.args(&program.args).args(["--node-id", &plan.node_id()]);
        if let Some(dir) = &plan.identity {
            command.arg("--identity").arg(dir);
        }
        command
            .env("DROVER_SWARM_ID", plan.id.swarm.as_str())
            .env("DROVER_NODE_ID", plan.id.node.to_string())
            .env("DROVER_STATE_DIR", self.ctx.state().path())
            .env("DROVER_SESSIONS_DIR", plan.node_dir.join("sessions"))
            .env("DROVER_SHARED_SESSIONS", plan.mailbox.join("sessions"))
            .env("DROVER_POST_DIR", Mailbox::new(&plan.mailbox).post_dir(&plan.id.swarm, plan.id.node));
        Running::spawn(command, &self.ctx, log)
    }

    fn client(&self) -> Client {
        let target = Target::Daemon { state: self.ctx.state().clone(), name: self.instance() };
        HandoffServiceClient::new(connect(target))
    }

    /// Brings the events of this life of the daemon into the outbox. Ends only by being dropped.
    async fn listen(&self, pid: Option<u32>) {
        let (mut since, mut pause) = (0, AGAIN.0);
        loop {
            let entry = address_book::read(self.ctx.state(), &self.instance());
            if entry.is_some_and(|entry| Some(entry.pid) == pid)
                && let Err(status) = self.follow(&mut since).await
            {
                debug!(error = status.message(), "the talk with the daemon of sessions broke off");
            }
            sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    async fn follow(&self, since: &mut u64) -> Result<(), tonic::Status> {
        let mut events = self.client().watch_events(WatchEventsRequest { since: *since }).await?.into_inner();
        while let Some(event) = events.message().await? {
            *since = event.seq;
            let Some(kind) = kind::HANDOFFS.into_iter().find(|kind| *kind == event.event) else { continue };
            let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
            // Without a reader the worker is at its end.
            let _ = self.words.send(Word { kind, data }).await;
        }
        Ok(())
    }
}

/// Has the daemon's sessions go elsewhere.
async fn empty(client: &mut Client) -> Result<(), tonic::Status> {
    let silent = |_| tonic::Status::unavailable("no answer");
    let status = timeout(PATIENCE, client.get_status(GetStatusRequest {})).await.map_err(silent)??.into_inner();
    if status.held == 0 {
        return Ok(());
    }
    let mut far = client.drain(DrainRequest::default()).await?.into_inner();
    while let Some(told) = far.message().await? {
        debug!(moved = told.moved, left = told.left, "sessions go to other nodes");
    }
    Ok(())
}
