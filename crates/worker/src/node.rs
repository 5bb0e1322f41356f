//! A node in this process: taken over from earlier generations, then served until it ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use drover_config::{Config, WorkerConfig};
use drover_mailbox::{Mailbox, StreamWriter};
use drover_service::{Context, now_us, process};
use drover_types::{AgentKind, ErrorCode, Failure, Generation, JobId, NodeIndex, OutboxId, SwarmId};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::agent::Agent;
use crate::claim::{NodeLock, claim_generation, is_superseded, lock_node};
use crate::core::{Core, Effect, Policy};
use crate::grpc::Seat;
use crate::handoff::Sessions;
use crate::inbox::InboxReader;
use crate::make::{Unusable, make_agent};
use crate::membership::{Companion, Plan};
use crate::metrics::Metrics;
use crate::own_session::OwnSession;
use crate::shell::{Feeds, Shell};
use crate::store::{Disk, KEEP_BYTES, Stamp, Store};
use crate::{bundle, door, journal, tasks};

/// Agent events that may wait for the loop; an agent that is faster waits.
const EVENTS: usize = 4096;
/// Commands that may wait for the agent.
const COMMANDS: usize = 64;
/// Chunks of the inbox that may wait for the loop.
const CHUNKS: usize = 4;
/// Records of the membership that may wait for the loop; it waits when there are more.
const WORDS: usize = 16;
/// The working directory of the agent, below the node's.
pub(crate) const WORK: &str = "work";
/// A journal is small; its segments need not be.
const JOURNAL_SEGMENT_BYTES: u64 = 16 << 20;

/// Which node, and where.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) swarm: SwarmId,
    pub(crate) node: NodeIndex,
    /// Without it the next that is free.
    pub(crate) generation: Option<Generation>,
    pub(crate) job: JobId,
    pub(crate) mailbox: Mailbox,
    pub(crate) node_dir: PathBuf,
    pub(crate) agent: AgentKind,
    /// Directory of its key and certificate.
    pub(crate) proof: Option<PathBuf>,
}

/// A node that is ours, with everything that earlier generations left.
pub(crate) struct TakenOver {
    pub(crate) id: OutboxId,
    mailbox: Mailbox,
    _lock: NodeLock,
    store: Store<Disk>,
    core: (Core, Vec<Effect>),
    inbox_from: drover_mailbox::Cursor,
    laid_out: Result<usize, Failure>,
    node_dir: PathBuf,
    kind: AgentKind,
    proof: Option<PathBuf>,
}

impl TakenOver {
    /// Locks the node, claims the generation, reads the journals. Blocks.
    pub(crate) fn take(identity: Identity, config: &WorkerConfig) -> anyhow::Result<Self> {
        let Identity { swarm, node, generation, job, mailbox, node_dir, agent, proof } = identity;
        let lock = lock_node(&node_dir, &swarm, node)?;
        let id = claim_generation(&mailbox, &swarm, node, generation)?;
        let (memory, earlier) =
            journal::load(&mailbox, &id).context("failed to read the journals of earlier workers")?;
        let lost = journal::find_lost(&mailbox, &id, &earlier, &memory.open)
            .context("failed to read the outboxes of earlier workers")?;
        let open = |dir: PathBuf, bytes| {
            StreamWriter::open(&dir, bytes).with_context(|| format!("failed to open {} for writing", dir.display()))
        };
        let outbox = open(mailbox.outbox_dir(&id), config.segment_bytes.get())?;
        let outbox = Disk::outbox(outbox, mailbox.beacon(&swarm));
        let own_journal = Disk::journal(open(mailbox.journal_dir(&id), JOURNAL_SEGMENT_BYTES)?);
        let stamp = Stamp { job_id: job.to_string(), node_id: node.0, generation: id.generation.0 };
        let mut store = Store::new(outbox, own_journal, stamp, KEEP_BYTES);
        store.begin_journal(&memory, now_us()).context("failed to begin the journal")?;
        journal::forget_earlier(&mailbox, &id, &earlier);
        let laid_out = bundle::lay_out(&mailbox.bundle_dir(&swarm, node), &node_dir.join(WORK)).map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            Failure::new(ErrorCode::StoreUnavailable, format!("{error}: {cause}"))
                .hint("check that the node's directory can be written")
        });
        let mut effects = Vec::new();
        let inbox_from = memory.low;
        let core = Core::start(policy(config, agent), memory.low, memory.taken, memory.history, lost, &mut effects);
        Ok(Self {
            id,
            mailbox,
            _lock: lock,
            store,
            core: (core, effects),
            inbox_from,
            laid_out,
            node_dir,
            kind: agent,
            proof,
        })
    }

    /// The agent for it: the one asked for, or one that says what is wrong with the node's directory.
    pub(crate) fn agent(&self, config: &WorkerConfig, ctx: &Context) -> Box<dyn Agent> {
        let pool = door::Plan::of(&self.id, &self.mailbox, self.proof.clone(), config, ctx);
        match &self.laid_out {
            Ok(_) if config.own_session => Box::new(OwnSession::new(&self.id, self.kind, ctx.state())),
            Ok(_) => make_agent(self.kind, config, &self.node_dir, pool),
            Err(failure) => Box::new(Unusable(failure.clone())),
        }
    }

    /// Serves the node until it has ended, in order or not. `door` leads to it as long; `opened` is called when it does.
    pub(crate) async fn serve(
        self,
        ctx: &Context,
        config: &Arc<Config>,
        agent: Box<dyn Agent>,
        metrics: Metrics,
        door: &watch::Sender<Option<Seat>>,
        opened: impl FnOnce() -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        let Self { id, mailbox, _lock, store, core, inbox_from, node_dir, kind, proof, .. } = self;
        info!(
            swarm_id = %id.swarm, node_id = %id.node, generation = %id.generation, agent = %kind,
            inbox_seq = inbox_from.seq, "serving"
        );
        let (commands, commands_out) = mpsc::channel(COMMANDS);
        let (events_in, events) = mpsc::channel(EVENTS);
        let (chunks_in, inbox) = mpsc::channel(CHUNKS);
        let (drains_in, drains) = mpsc::channel(1);
        let (status_in, status) = watch::channel(core.0.status());

        let inbox_dir = mailbox.inbox_dir(&id.swarm, id.node);
        make_private_dir(&inbox_dir).with_context(|| format!("failed to make {}", inbox_dir.display()))?;
        door.send_replace(Some(Seat { id: id.clone(), agent: kind.to_string(), status, drains: drains_in }));
        opened()?;
        let (reader, control) = InboxReader::new(inbox_dir, inbox_from);
        ctx.spawn("inbox", async move {
            // A panic in it closes the channel, which the loop takes for the end it is.
            let _ = tokio::task::spawn_blocking(move || reader.run(&chunks_in)).await;
        });
        let abandon = CancellationToken::new();
        let abandoned = abandon.clone();
        ctx.spawn("agent", async move {
            tokio::select! {
                () = agent.run(commands_out, events_in) => {}
                () = abandoned.cancelled() => {}
            }
        });
        let config = Arc::clone(config);
        let identity = proof;
        let over = CancellationToken::new();
        if let Some(tasks) = tasks::Tasks::of(&mailbox, identity.as_deref(), &config, ctx) {
            ctx.spawn("tasks", tasks.serve(over.clone()));
        }
        let plan = Plan { id: id.clone(), agent: kind, identity, mailbox: mailbox.root().to_owned(), node_dir, config };
        let (words_in, words) = mpsc::channel(WORDS);
        let fence = {
            let id = id.clone();
            Arc::new(move || is_superseded(&mailbox, &id))
        };
        let shell = Shell::new(id, core, store, commands, fence, control, status_in, metrics);
        // Everything the agent needs is under way; nothing waits for this.
        let companion = Companion::start(plan.clone(), ctx, shell.ears(), words_in.clone());
        let sessions = Sessions::start(plan, ctx, shell.ears().status, words_in);
        let ended = shell.drive(Feeds { events, inbox, drains, words, shutdown: ctx.shutdown().clone() }).await;
        door.send_replace(None);
        over.cancel();
        abandon.cancel();
        sessions.end().await;
        companion.end().await;
        ended
    }
}

fn policy(config: &WorkerConfig, agent: AgentKind) -> Policy {
    let mut hello = serde_json::Map::new();
    hello.insert("host".to_owned(), process::hostname().into());
    hello.insert("pid".to_owned(), std::process::id().into());
    hello.insert("agent".to_owned(), agent.as_str().into());
    hello.insert("version".to_owned(), drover_types::VERSION.into());
    Policy {
        auto_approve: config.auto_approve,
        approval_timeout: config.approval_timeout.get(),
        drain_grace: config.drain_grace.get(),
        max_queue: config.max_queue,
        hello,
    }
}

fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
