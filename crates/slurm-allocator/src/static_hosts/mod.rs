//! The static backend: a list of hosts whose workers run under their own supervisor, such as a systemd unit.
//!
//! The allocator starts and kills nothing here. It gives each node of a swarm to a free host by writing that host's
//! assignment file, and learns from the mailbox which worker has taken it. A host carries one swarm at a time.
//!
//! ```text
//! launch  ──> <mailbox>/static/<host>.json ──> drover-worker --static on that host claims outbox/<generation>
//! poll    <── <mailbox>/<swarm>/<NN>/outbox/<generation>/owner.json
//! release ──> the same file with "release" ──> the worker drains and idles
//! ```
//!
//! # The assignment file
//!
//! `<mailbox>/static/<host>.json`, replaced whole by the allocator and written by nobody else:
//!
//! ```json
//! {"v":1,"host":"n1","revision":7,"assignment":{"swarm_id":"…","node_id":0,"job_id":"static-…","agent":"echo",
//!  "settings":{"sandbox_mode":"read-only"},"release":null}}
//! ```
//!
//! | field | meaning |
//! | --- | --- |
//! | `v` | format version, 1 |
//! | `host` | the host the file is for; a worker on another host leaves it alone |
//! | `revision` | grows with each write |
//! | `assignment` | what the host's worker is to be, or `null`: nothing |
//! | `assignment.settings` | keys of the configuration's `worker` section that this launch overrides |
//! | `assignment.identity` | directory of the node's identity for the gossip, below the mailbox root; absent: none |
//! | `assignment.release` | `null`, or `{"force":false}`: drain and end; with `force` without waiting for the turn |
//!
//! A worker opens the file anew at least every [`FILE_POLL`], because a shared file system may show an open one as it
//! was. It takes an assignment by claiming the generation after the highest one of its node, each time it starts.
//!
//! # The worker's own file
//!
//! `<mailbox>/static/workers/<host>.json`, replaced whole by that host's worker and written by nobody else:
//!
//! ```json
//! {"v":1,"host":"n1","machine":"node-17","pid":4711,"start_time":99,"revision":7,
//!  "serving":{"swarm_id":"…","node_id":0,"generation":1}}
//! ```
//!
//! `revision` is that of the assignment it last acted upon and `serving` the node it has, or `null`. A released node has
//! ended when its worker says so, or when its process is seen to be gone. A worker of another host that says nothing is
//! given the longest time that an orderly end takes, and a margin, before the host counts as free.

mod file;
mod keeper;
mod plan;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, Generation, JobId, NodeIndex, SwarmId};
use notify::Watcher as _;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info};
use uuid::Uuid;

use crate::allocation::{Allocation, LaunchProgress};
use crate::backend::{Backend, Request};
use crate::board::Board;
use crate::catalogue::BackendKind;
use crate::core::{NodeRecord, PhaseRecord, SwarmRecord};
use crate::files;
use crate::local::prepare_mailbox;
use crate::membership::Membership;
use crate::metrics::Metrics;
use crate::store::{self, Record, Store};
use file::{Assigned, Files};
use keeper::{Command, Keeper};

/// How often, at least, a worker looks at its assignment file.
const FILE_POLL: Duration = Duration::from_secs(5);

/// What all swarms on static hosts share.
#[derive(Debug)]
struct Shared {
    board: Board,
    store: Store,
    mailbox: Mailbox,
    files: Files,
    host: String,
    /// From the request to end until a worker that cannot be seen counts as gone.
    end_after: Duration,
    membership: Arc<Membership>,
    /// Rings when a worker said something, where the file system tells of it.
    said: watch::Receiver<()>,
}

impl Shared {
    /// Lays the identity of a node where its host finds it; its path below the mailbox root.
    fn identity(&self, record: &Record, node: usize) -> Option<PathBuf> {
        let below = Files::identity(record.hosts.get(node)?);
        let dir = self.mailbox.root().join(&below);
        self.membership.identity(&dir, &record.swarm_id, NodeIndex(node as u32)).map(|_| below)
    }

    /// The same as long as it lies there.
    fn identity_there(&self, host: &str) -> Option<PathBuf> {
        Some(Files::identity(host)).filter(|below| self.mailbox.root().join(below).is_dir())
    }
}

/// The static backend.
pub(crate) struct StaticHosts {
    ctx: Context,
    shared: Arc<Shared>,
    hosts: Vec<String>,
    metrics: Metrics,
    swarms: Arc<Mutex<Swarms>>,
    /// Watches as long as it lives.
    _watcher: Option<notify::RecommendedWatcher>,
}

/// The swarms that are there, and which hosts they have.
#[derive(Debug, Default)]
struct Swarms {
    keepers: BTreeMap<SwarmId, mpsc::Sender<Command>>,
    busy: BTreeMap<String, SwarmId>,
}

impl StaticHosts {
    pub(crate) fn new(
        ctx: &Context,
        config: &Config,
        board: Board,
        store: Store,
        mailbox: Mailbox,
        metrics: Metrics,
        membership: &Arc<Membership>,
    ) -> Self {
        let files = Files::new(mailbox.root().join("static"));
        let (rings, said) = watch::channel(());
        let watcher = (!config.cluster.hosts.is_empty()).then(|| watch_dir(&files.workers(), rings)).flatten();
        Self {
            ctx: ctx.clone(),
            shared: Arc::new(Shared {
                board,
                store,
                files,
                said,
                membership: Arc::clone(membership),
                mailbox,
                host: drover_service::process::hostname(),
                end_after: config.worker.kill_after() + FILE_POLL * 2,
            }),
            hosts: plan::distinct(&config.cluster.hosts),
            metrics,
            swarms: Arc::default(),
            _watcher: watcher,
        }
    }

    /// Takes up the swarms of an earlier allocator.
    pub(crate) async fn restore(&self, records: Vec<Record>) -> anyhow::Result<()> {
        for record in records {
            let swarm = record.swarm_id.clone();
            anyhow::ensure!(
                record.hosts.len() == record.swarm.nodes.len(),
                "the record of swarm {swarm} has {} hosts for {} nodes",
                record.hosts.len(),
                record.swarm.nodes.len()
            );
            self.keep(record).await.with_context(|| format!("cannot take up swarm {swarm} again"))?;
        }
        Ok(())
    }

    /// Gives hosts to a swarm, or says which are not free.
    async fn reserve(&self, swarm: &SwarmId, count: u32) -> Result<Vec<String>, Failure> {
        let shared = Arc::clone(&self.shared);
        let hosts = self.hosts.clone();
        // What another allocator wrote counts too.
        let written = tokio::task::spawn_blocking(move || {
            hosts
                .into_iter()
                .map(|host| shared.files.read(&host).map(|found| (host, found)))
                .collect::<Result<Vec<_>, _>>()
        });
        let written = written.await.map_err(|error| Failure::new(ErrorCode::Internal, error.to_string()))?;
        let written = written.map_err(|error| unusable(&error))?;
        let mut swarms = self.swarms();
        let mut busy = swarms.busy.clone();
        for (host, assigned) in written {
            if let Some(assigned) = assigned {
                busy.entry(host).or_insert(assigned.swarm_id);
            }
        }
        // The swarm's own files of a launch that was interrupted may be written over.
        busy.retain(|_, by| by != swarm);
        let chosen = plan::choose(&self.hosts, &busy, count)?;
        swarms.busy.extend(chosen.iter().map(|host| (host.clone(), swarm.clone())));
        Ok(chosen)
    }

    /// Starts the task of a swarm, after its first look at the mailbox.
    async fn keep(&self, record: Record) -> anyhow::Result<()> {
        let swarm = record.swarm_id.clone();
        let (sender, commands) = mpsc::channel(8);
        let mut keeper = Keeper::new(&self.ctx, &self.shared, record, commands);
        keeper.look().await?;
        {
            let mut swarms = self.swarms();
            swarms.keepers.insert(swarm.clone(), sender);
            if !keeper.is_over() {
                swarms.busy.extend(keeper.hosts().iter().map(|host| (host.clone(), swarm.clone())));
            }
        }
        let free = Arc::clone(&self.swarms);
        let freed = swarm.clone();
        let on_over = move || {
            let mut swarms = free.lock().unwrap_or_else(PoisonError::into_inner);
            swarms.busy.retain(|_, by| *by != freed);
        };
        let all = Arc::clone(&self.swarms);
        self.ctx.spawn("static_keeper", async move {
            keeper.run(on_over).await;
            all.lock().unwrap_or_else(PoisonError::into_inner).keepers.remove(&swarm);
        });
        Ok(())
    }

    fn swarms(&self) -> MutexGuard<'_, Swarms> {
        self.swarms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, swarm: &SwarmId, stage: &'static str, message: String) {
        self.shared.board.progress(LaunchProgress { swarm: swarm.clone(), stage, message });
    }

    async fn begin(&self, request: Request, hosts: Vec<String>) -> Result<Allocation, Failure> {
        let Request { swarm, spec, provider } = request;
        let id = Uuid::new_v4();
        let node = NodeRecord {
            generation: Generation(0),
            phase: PhaseRecord::Starting,
            process: None,
            term_sent: false,
            restarts: 0,
            ran: false,
            reason: String::new(),
        };
        let record = Record {
            v: store::version(),
            swarm_id: swarm.clone(),
            job_id: format!("static-{}", id.simple()).parse().unwrap_or_else(|_| JobId::from(id)),
            backend: BackendKind::Static,
            provider,
            agent: spec.agent,
            settings: spec.settings.clone(),
            host: self.shared.host.clone(),
            boot_id: String::new(),
            slurm: None,
            swarm: SwarmRecord { release: None, limit: None, over_us: None, nodes: vec![node; hosts.len()] },
            hosts,
        };
        let shared = Arc::clone(&self.shared);
        let written = {
            let record = record.clone();
            let others_live = shared.membership.others_live(&shared.board, &record.swarm_id);
            tokio::task::spawn_blocking(move || {
                shared.membership.before_launch(&record.swarm_id, record.hosts.len() as u32, others_live);
                prepare_mailbox(&shared.mailbox, &record.swarm_id, spec.node_count, &spec.bundle)
                    .map_err(|error| unusable(&error))?;
                // The record first: a file that nobody remembers would keep its host busy for ever.
                shared.store.save(&record).map_err(|error| error.failure())?;
                for (node, host) in record.hosts.iter().enumerate() {
                    let assigned =
                        Assigned { identity: shared.identity(&record, node), ..Assigned::of(&record, node, None) };
                    shared.files.write(host, Some(&assigned)).map_err(|error| unusable(&error))?;
                }
                Ok::<_, Failure>(())
            })
        };
        written.await.unwrap_or_else(|error| Err(Failure::new(ErrorCode::Internal, error.to_string())))?;
        self.metrics.launches.inc();
        let hosts = record.hosts.join(", ");
        info!(swarm_id = %swarm, job_id = %record.job_id, hosts, "assigned to static hosts");
        self.progress(&swarm, "submitting", format!("assigned to {hosts}; their workers take over by themselves"));
        self.keep(record).await.map_err(|error| Failure::new(ErrorCode::StoreUnavailable, format!("{error:#}")))?;
        self.shared.board.get(&swarm).map(|allocation| (*allocation).clone()).ok_or_else(|| {
            Failure::new(ErrorCode::Internal, format!("swarm {swarm} was launched and is not on the board"))
        })
    }
}

#[async_trait]
impl Backend for StaticHosts {
    async fn launch(&self, request: Request) -> Result<Allocation, Failure> {
        let swarm = request.swarm.clone();
        self.progress(&swarm, "starting", format!("looking for {} free hosts", request.spec.node_count));
        let hosts = self.reserve(&swarm, request.spec.node_count).await?;
        let begun = self.begin(request, hosts).await;
        if begun.is_err() {
            self.undo(&swarm).await;
        }
        begun
    }

    async fn release(&self, swarm: &SwarmId, force: bool) -> Result<(), Failure> {
        let Some(sender) = self.swarms().keepers.get(swarm).cloned() else { return Ok(()) };
        let (answer, answered) = oneshot::channel();
        let stopping =
            || Failure::new(ErrorCode::ShuttingDown, "the allocator is shutting down").hint("repeat the request");
        sender.send(Command::Release { force, answer }).await.map_err(|_| stopping())?;
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }
}

impl StaticHosts {
    /// Takes back what a failed launch has written, as far as the disk lets us; hosts stay busy only while a file says so.
    async fn undo(&self, swarm: &SwarmId) {
        let hosts: Vec<String> = {
            let swarms = self.swarms();
            swarms.busy.iter().filter(|(_, by)| *by == swarm).map(|(host, _)| host.clone()).collect()
        };
        let shared = Arc::clone(&self.shared);
        let undone = swarm.clone();
        let _ = tokio::task::spawn_blocking(move || {
            for host in hosts {
                if shared.files.read(&host).is_ok_and(|found| found.is_some_and(|found| found.swarm_id == undone)) {
                    let _ = shared.files.write(&host, None);
                }
            }
            let _ = shared.store.remove(&undone);
        })
        .await;
        self.swarms().busy.retain(|_, by| by != swarm);
    }
}

/// A watch on the files of all workers. Without one the clock alone has to do.
fn watch_dir(dir: &Path, rings: watch::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let ring = move |event: notify::Result<notify::Event>| {
        // Our own look at a file is an access too.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            rings.send_replace(());
        }
    };
    let started = files::make_dir(dir).map_err(notify::Error::io).and_then(|()| {
        let mut watcher = notify::recommended_watcher(ring)?;
        watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    started.inspect_err(|error| debug!(dir = %dir.display(), %error, "no inotify on the words of workers")).ok()
}

fn unusable(error: &std::io::Error) -> Failure {
    Failure::new(ErrorCode::StoreUnavailable, format!("the mailbox cannot be used: {error}"))
        .hint("check cluster.workspace_root: the file system must be mounted, writable and not full")
}
