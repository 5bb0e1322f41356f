//! The local backend: nodes are processes of this machine that outlive the allocator.
//!
//! ```text
//! launch ──> directories, bundle ──> record ──> Supervisor, one task per swarm
//!                                                 │  core::Swarm decides, the record is synced, then
//!                                                 ├─ launcher.rs   starts processes
//!                                                 ├─ process.rs    signals and watches them
//!                                                 └─ board         tells everybody
//! start of the allocator ──> records ──> recover.rs finds the processes again ──> Supervisor
//! ```

mod launcher;
mod prepare;
mod process;
mod recover;
mod supervisor;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_trait::async_trait;
use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, JobId, NodeIndex, SwarmId};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use uuid::Uuid;

use crate::allocation::{Allocation, LaunchProgress};
use crate::backend::{Backend, Request};
use crate::board::Board;
use crate::catalogue::BackendKind;
use crate::core::{Input, Policy, Swarm, SwarmRecord};
use crate::files::make_dir;
use crate::membership::Membership;
use crate::metrics::Metrics;
use crate::store::{self, Record, Store};
use launcher::Launcher;
pub(crate) use prepare::prepare_mailbox;
use recover::Search;
use supervisor::{Command, Supervisor};

/// How long an allocation that is over stays listed.
const KEEP_OVER: Duration = Duration::from_hours(1);

/// What all supervisors share.
#[derive(Debug)]
struct Shared {
    board: Board,
    store: Store,
    launcher: Launcher,
    policy: Policy,
    metrics: Metrics,
    host: String,
    boot_id: String,
}

/// The local backend.
pub(crate) struct Local {
    ctx: Context,
    shared: Arc<Shared>,
    max_nodes: u32,
    swarms: Arc<Mutex<BTreeMap<SwarmId, mpsc::Sender<Command>>>>,
}

impl Local {
    pub(crate) fn new(
        ctx: &Context,
        config: &Config,
        board: Board,
        store: Store,
        mailbox: Mailbox,
        metrics: Metrics,
        membership: &Arc<Membership>,
    ) -> io::Result<Self> {
        let worker = &config.worker;
        let policy = Policy {
            max_restarts: worker.max_restarts,
            restart_delay: worker.restart_delay.get(),
            healthy_after: worker.healthy_after.get(),
            kill_after: worker.kill_after(),
            keep_over: KEEP_OVER,
        };
        let nodes = ctx.state().join("nodes")?;
        let launcher = Launcher::new(ctx.state().path(), nodes, mailbox, ctx.config_file(), &worker.agent_env);
        let launcher = launcher.with_membership(membership);
        Ok(Self {
            ctx: ctx.clone(),
            shared: Arc::new(Shared {
                board,
                store,
                launcher,
                policy,
                metrics,
                host: drover_service::process::hostname(),
                boot_id: process::boot_id(),
            }),
            max_nodes: config.allocator.max_local_nodes,
            swarms: Arc::default(),
        })
    }

    /// Takes up the swarms of an earlier allocator: finds their workers, and goes on where it stopped.
    pub(crate) async fn restore(&self, records: Vec<Record>) -> anyhow::Result<()> {
        for record in records {
            let swarm = record.swarm_id.clone();
            self.restore_one(record).await.with_context(|| format!("cannot take up swarm {swarm} again"))?;
        }
        Ok(())
    }

    async fn restore_one(&self, mut record: Record) -> anyhow::Result<()> {
        let shared = &self.shared;
        if record.host != shared.host {
            // On a file system that several hosts see, the workers may well live there; on our own disk the host has
            // only been renamed, or was a container that is gone.
            let network = drover_mailbox::is_network_fs(self.ctx.state().path()).unwrap_or(None);
            anyhow::ensure!(
                network.is_none(),
                "its workers are processes of {}, this is {}: start the allocator there, or, when that host is gone for \
                 good, remove allocator/{}.json from the state directory",
                record.host,
                shared.host,
                record.swarm_id
            );
            warn!(swarm_id = %record.swarm_id, host = record.host, "the host had another name: its workers are gone");
        }
        let same_boot = record.host == shared.host && record.boot_id == shared.boot_id;
        record.host.clone_from(&shared.host);
        record.boot_id.clone_from(&shared.boot_id);
        let found = match record.swarm.over_us {
            // Nothing of it can run; its mailbox may be gone by now.
            Some(_) => Vec::new(),
            None => self.look(&record, record.swarm.nodes.len() as u32, same_boot).await?,
        };
        let now = Instant::now();
        let core = Swarm::restore(shared.policy.clone(), &record.swarm, now, drover_service::now_us());
        let alive = found.iter().filter(|f| matches!(f, Input::Found { process: Some(_), .. })).count();
        info!(swarm_id = %record.swarm_id, nodes = record.swarm.nodes.len(), alive, "taking up a swarm again");
        self.supervise(record, core, found).await;
        Ok(())
    }

    /// Looks for the worker of each node.
    async fn look(&self, record: &Record, node_count: u32, same_boot: bool) -> anyhow::Result<Vec<Input>> {
        let shared = Arc::clone(&self.shared);
        let record = record.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let search = Search {
                mailbox: shared.launcher.mailbox(),
                host: &shared.host,
                swarm: &record.swarm_id,
                job: &record.job_id,
                same_boot,
            };
            let mut found = Vec::new();
            for index in 0..node_count {
                let stored = record.swarm.nodes.get(index as usize);
                let input = search.look(NodeIndex(index), stored)?;
                if same_boot
                    && let Input::Found { process: None, .. } = input
                    && let Some(gone) = stored.and_then(|stored| stored.process)
                {
                    process::kill_leftovers(gone);
                }
                found.push(input);
            }
            Ok::<_, io::Error>(found)
        });
        looked.await?.context("cannot read the mailbox")
    }

    /// Starts the task of a swarm and returns when it has taken its first steps.
    async fn supervise(&self, record: Record, core: Swarm, first: Vec<Input>) {
        let (sender, commands) = mpsc::channel(supervisor::QUEUE);
        let swarm = record.swarm_id.clone();
        self.swarms().insert(swarm.clone(), sender.clone());
        let mut supervisor = Supervisor::new(&self.ctx, &self.shared, record, core, commands, &sender);
        supervisor.settle(first).await;
        let swarms = Arc::clone(&self.swarms);
        self.ctx.spawn("supervisor", async move {
            supervisor.run().await;
            swarms.lock().unwrap_or_else(PoisonError::into_inner).remove(&swarm);
        });
    }

    fn swarms(&self) -> MutexGuard<'_, BTreeMap<SwarmId, mpsc::Sender<Command>>> {
        self.swarms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, swarm: &SwarmId, stage: &'static str, message: String) {
        self.shared.board.progress(LaunchProgress { swarm: swarm.clone(), stage, message });
    }
}

#[async_trait]
impl Backend for Local {
    async fn launch(&self, request: Request) -> Result<Allocation, Failure> {
        let Request { swarm, spec, provider } = request;
        let (count, limit) = (spec.node_count, spec.time_limit);
        if count > self.max_nodes {
            let message = format!("{count} nodes are more than the {} that may run on this machine", self.max_nodes);
            return Err(Failure::new(ErrorCode::InvalidRequest, message)
                .hint("launch fewer nodes, or raise allocator.max_local_nodes"));
        }
        Launcher::check().map_err(|why| Failure::new(ErrorCode::LaunchFailed, why))?;
        self.progress(&swarm, "starting", format!("{count} workers on this machine, agent {}", spec.agent));
        let job = new_job_id();
        let record = Record {
            v: store::version(),
            swarm_id: swarm.clone(),
            job_id: job.clone(),
            backend: BackendKind::Local,
            provider,
            agent: spec.agent,
            settings: spec.settings.clone(),
            host: self.shared.host.clone(),
            boot_id: self.shared.boot_id.clone(),
            hosts: Vec::new(),
            slurm: None,
            swarm: SwarmRecord { release: None, limit: None, over_us: None, nodes: Vec::new() },
        };
        let shared = Arc::clone(&self.shared);
        let prepared = {
            let swarm = swarm.clone();
            tokio::task::spawn_blocking(move || {
                prepare::prepare_nodes(&shared.launcher, &swarm, &spec)?;
                shared.launcher.before_launch(&swarm, count, &shared.board);
                Ok(())
            })
            .await
        };
        flatten(prepared).map_err(|error| cannot_prepare(&error))?;
        self.progress(&swarm, "config", "directories and bundles are in place".into());
        // Nothing should be there, but a lost state directory does not end the workers it spoke of.
        let found = self.look(&record, count, true).await.map_err(|error| {
            Failure::new(ErrorCode::StoreUnavailable, format!("{error:#}")).hint("check the mailbox directory")
        })?;
        let core = Swarm::new(self.shared.policy.clone(), count, limit, Instant::now());
        supervisor::save(&self.shared, &record, &core).await.map_err(|error| error.failure())?;
        self.shared.metrics.launches.inc();
        info!(swarm_id = %swarm, job_id = %job, nodes = count, "launching");
        self.supervise(record, core, found).await;
        let allocation = self.shared.board.get(&swarm);
        allocation.map(|allocation| (*allocation).clone()).ok_or_else(|| {
            Failure::new(ErrorCode::Internal, format!("swarm {swarm} was launched and is not on the board"))
        })
    }

    async fn release(&self, swarm: &SwarmId, force: bool) -> Result<(), Failure> {
        let Some(sender) = self.swarms().get(swarm).cloned() else { return Ok(()) };
        let (answer, answered) = oneshot::channel();
        // A supervisor that is gone has nothing left to end, unless the daemon is going down.
        let gone = || {
            if self.ctx.shutdown().is_cancelled() {
                Err(Failure::new(ErrorCode::ShuttingDown, "the allocator is shutting down").hint("repeat the request"))
            } else {
                Ok(())
            }
        };
        if sender.send(Command::Release { force, answer }).await.is_err() {
            return gone();
        }
        answered.await.unwrap_or_else(|_| gone())
    }
}

fn new_job_id() -> JobId {
    let id = Uuid::new_v4().simple().to_string();
    // A UUID has nothing that an id may not have; the fallback is the same UUID unshortened.
    format!("local-{}", &id[..12]).parse().unwrap_or_else(|_| JobId::from(Uuid::new_v4()))
}

fn cannot_prepare(error: &io::Error) -> Failure {
    Failure::new(ErrorCode::StoreUnavailable, format!("the nodes' directories cannot be made: {error}"))
        .hint("make room on that disk or make the directory writable, then launch again")
}

/// A blocking task that panicked or was dropped by a shutdown is one more way in which I/O can fail.
fn flatten<T>(joined: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    joined.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Makes the directories of this backend that must exist before anything else.
pub(crate) fn make_mailbox_root(mailbox: &Mailbox) -> io::Result<()> {
    make_dir(mailbox.root())
}
