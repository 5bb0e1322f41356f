//! The worker of a static host: it waits for an assignment, serves that node, and waits for the next.
//!
//! It runs under a supervisor of its own, such as a systemd unit, and knows no allocator: everything it is told stands in
//! one file, and everything it has to say in another.
//!
//! ```text
//! static/<host>.json ──> decide ──> node::TakenOver, the node served in this process until it is released
//!                          │
//!                          └──> static/workers/<host>.json: the assignment acted upon, the node served
//! ```
//!
//! A process that is started anew takes its node again as the next generation. A node that ends in order stays ended until
//! the assignment is another one; one that fails is tried again as `worker.max_restarts` and its neighbours say.

mod assignment;
mod decide;
mod presence;

use std::collections::BTreeMap;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_config::{Config, Env};
use drover_mailbox::Mailbox;
use drover_service::{Context, ExitWith, Listener, Server};
use drover_types::OutboxId;
use notify::Watcher as _;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

pub(crate) use assignment::HostName;
pub use presence::HostError;

use crate::grpc::{Door, Seat};
use crate::metrics::Metrics;
use crate::node::{Identity, TakenOver};
use crate::shell::Drain;
use assignment::{Assigned, Document, Release};
use decide::{Mine, Step, Task, decide};
use presence::Presence;

/// How often the assignment is looked at where the file system does not tell of changes.
const POLL: Duration = Duration::from_secs(5);
/// The longest pause before a failed node is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Which host this is, and where its things are.
pub(crate) struct StaticHost {
    host: HostName,
    mailbox: Mailbox,
    nodes: PathBuf,
    config: Arc<Config>,
}

impl StaticHost {
    /// Refuses a host that the configuration does not list, and a mailbox that is not there.
    pub(crate) fn of(
        host: Option<HostName>,
        mailbox: Option<PathBuf>,
        nodes: Option<PathBuf>,
        config: &Arc<Config>,
        ctx: &Context,
    ) -> anyhow::Result<Self> {
        let host = HostName::or_this(host);
        let hosts = &config.cluster.hosts;
        if !hosts.is_empty() && !hosts.iter().any(|listed| listed == host.as_str()) {
            let message = format!(
                "host {host} is not in cluster.hosts ({}): add it there, or give the right name with --host",
                hosts.join(", ")
            );
            return Err(ExitWith { code: 78, message }.into());
        }
        let root = mailbox.unwrap_or_else(|| config.mailbox_root(ctx.state().path()));
        let root = std::path::absolute(root).context("the mailbox's name cannot be used")?;
        anyhow::ensure!(
            root.is_dir(),
            "there is no mailbox at {}: mount the shared file system, start the allocator once, or correct \
             cluster.workspace_root (or --mailbox)",
            root.display()
        );
        let nodes = match nodes {
            Some(nodes) => std::path::absolute(nodes).context("the nodes' directory has a name that cannot be used")?,
            None => ctx.state().path().join("nodes"),
        };
        Ok(Self { host, mailbox: Mailbox::new(root), nodes, config: Arc::clone(config) })
    }

    fn identity(&self, assigned: &Assigned) -> Identity {
        let Assigned { swarm_id, node_id, job_id, agent, identity, .. } = assigned.clone();
        Identity {
            node_dir: self.nodes.join(swarm_id.as_str()).join(format!("{:02}", node_id.0)),
            swarm: swarm_id,
            node: node_id,
            generation: None,
            job: job_id,
            mailbox: self.mailbox.clone(),
            agent,
            // An absolute name stays what it is.
            proof: identity.map(|dir| self.mailbox.root().join(dir)),
        }
    }

    /// The configuration with what the launch overrides, checked like any other.
    fn config_for(&self, ctx: &Context, settings: &BTreeMap<String, String>) -> anyhow::Result<Arc<Config>> {
        if settings.is_empty() {
            return Ok(Arc::clone(&self.config));
        }
        let mut env = Env::of_process();
        let named = settings.iter().map(|(key, value)| (format!("DROVER_WORKER__{}", key.to_ascii_uppercase()), value));
        env.vars.extend(named.map(|(variable, value)| (variable, value.clone())));
        let loaded = Config::load(ctx.config_file(), &env).context("the launch's settings cannot be used here")?;
        Ok(Arc::new(loaded.config))
    }
}

/// Tells how the node ended.
type NodeEnd = oneshot::Receiver<anyhow::Result<()>>;

/// Serves one assignment after another until the process is told to end.
pub(crate) async fn serve(host: StaticHost, ctx: &Context, listener: Listener) -> anyhow::Result<()> {
    let dir = assignment::dir(host.mailbox.root());
    let (found, name) = (dir.clone(), host.host.clone());
    let presence = tokio::task::spawn_blocking(move || Presence::take(&found, &name)).await??;
    let (door, seat) = watch::channel(None);
    Server::new(ctx).grpc(Door { seat }.service()).serve(listener)?;
    info!(host = %host.host, assignment = %dir.join(format!("{}.json", host.host)).display(), "waiting for an assignment");
    let changed = Arc::new(Notify::new());
    let _watcher = watch_dir(&dir, &changed);
    let resident = Resident {
        ctx: ctx.clone(),
        metrics: Metrics::register(&ctx.registry()),
        dir,
        host,
        presence,
        door: Arc::new(door),
        mine: Mine::Nothing,
        serving: None,
        revision: 0,
        retry: None,
        failures: 0,
        failing: None,
        since: Instant::now(),
        told: String::new(),
    };
    resident.run(&changed).await
}

/// The worker of the host, between nodes and during one.
struct Resident {
    ctx: Context,
    host: StaticHost,
    dir: PathBuf,
    presence: Presence,
    metrics: Metrics,
    door: Arc<watch::Sender<Option<Seat>>>,
    mine: Mine,
    serving: Option<OutboxId>,
    revision: u64,
    /// When a node that failed may be tried again.
    retry: Option<Instant>,
    failures: u32,
    failing: Option<Task>,
    since: Instant,
    /// The last complaint, so that it is not repeated with every look.
    told: String,
}

impl Resident {
    async fn run(mut self, changed: &Notify) -> anyhow::Result<()> {
        let mut node: Option<NodeEnd> = None;
        loop {
            let asked = self.look().await?;
            match decide(&self.mine, asked.as_ref()) {
                Step::Begin(assigned) if self.retry.is_none_or(|at| at <= Instant::now()) => {
                    node = self.begin(assigned).await;
                }
                Step::End(release) => self.end(release),
                Step::Begin(_) | Step::Stay => {}
            }
            self.say(asked.as_ref());
            let retry = self.retry;
            tokio::select! {
                ended = async { match &mut node { Some(node) => node.await, None => pending().await } } => {
                    node = None;
                    // The sender is gone only when its task panicked, which ends the process.
                    self.ended(ended.context("the node's task ended without a word").flatten())?;
                }
                () = changed.notified() => {}
                () = tokio::time::sleep(POLL) => {}
                () = async { match retry { Some(at) => tokio::time::sleep_until(at).await, None => pending().await } },
                    if retry.is_some_and(|at| at > Instant::now()) => {}
                // A node that runs hears it too, and its end is awaited.
                () = self.ctx.shutdown().cancelled(), if node.is_none() => return Ok(()),
            }
        }
    }

    /// Reads what is asked for; nothing when that cannot be known at the moment.
    async fn look(&mut self) -> anyhow::Result<Option<Document>> {
        let (dir, host) = (self.dir.clone(), self.host.host.clone());
        let read = tokio::task::spawn_blocking(move || assignment::read(&dir, &host)).await?;
        tokio::task::block_in_place(|| self.presence.check())?;
        match read {
            Ok(document) => {
                self.told.clear();
                Ok(document)
            }
            Err(error) => {
                let error = error.to_string();
                if self.told != error {
                    error!(%error, "this host's assignment cannot be used; it is looked at again");
                    self.told = error;
                }
                Ok(None)
            }
        }
    }

    async fn begin(&mut self, assigned: Assigned) -> Option<NodeEnd> {
        let task = Task::of(&assigned);
        self.since = Instant::now();
        self.retry = None;
        match self.take(&assigned).await {
            Ok((taken, config)) => {
                self.serving = Some(taken.id.clone());
                self.mine = Mine::Serving { task, told: None };
                let agent = taken.agent(&config.worker, &self.ctx);
                let (ctx, door, metrics) = (self.ctx.clone(), Arc::clone(&self.door), self.metrics.for_node());
                let (end, ended) = oneshot::channel();
                self.ctx.spawn("node", async move {
                    let _ = end.send(taken.serve(&ctx, &config, agent, metrics, &door, || Ok(())).await);
                });
                Some(ended)
            }
            Err(error) => {
                self.failed(task, &error);
                None
            }
        }
    }

    async fn take(&self, assigned: &Assigned) -> anyhow::Result<(TakenOver, Arc<Config>)> {
        let config = self.host.config_for(&self.ctx, &assigned.settings)?;
        let (identity, settings) = (self.host.identity(assigned), config.worker.clone());
        let taken = tokio::task::spawn_blocking(move || TakenOver::take(identity, &settings)).await??;
        Ok((taken, config))
    }

    fn end(&mut self, release: Release) {
        let seat = self.door.borrow().clone();
        let reason = "the static backend released this host".to_owned();
        // A door that is closed or taken leads to a node that ends already; else this is said again with the next look.
        if let (Some(seat), Mine::Serving { told, .. }) = (seat, &mut self.mine)
            && seat.drains.try_send(Drain { reason, force: release.force }).is_ok()
        {
            info!(swarm_id = %seat.id.swarm, force = release.force, "released");
            *told = Some(release);
        }
    }

    /// The node has ended, by its own word, by ours, or by some trouble.
    fn ended(&mut self, ended: anyhow::Result<()>) -> anyhow::Result<()> {
        self.serving = None;
        let Mine::Serving { task, told } = std::mem::replace(&mut self.mine, Mine::Nothing) else { return ended };
        if self.ctx.shutdown().is_cancelled() {
            self.mine = Mine::Done(task);
            return ended;
        }
        // Superseded by another worker of this host: that one has it now.
        tokio::task::block_in_place(|| self.presence.check())?;
        match ended {
            Err(error) if told.is_none() => self.failed(task, &error),
            ended => {
                if let Err(error) = ended {
                    warn!(error = format!("{error:#}"), "the node did not end in order");
                }
                info!("the node has ended; waiting for the next assignment");
                self.mine = Mine::Done(task);
            }
        }
        Ok(())
    }

    fn failed(&mut self, task: Task, error: &anyhow::Error) {
        let worker = &self.host.config.worker;
        if self.since.elapsed() >= worker.healthy_after.get() || self.failing.as_ref() != Some(&task) {
            self.failures = 0;
        }
        self.failing = Some(task.clone());
        self.failures += 1;
        let (error, failures) = (format!("{error:#}"), self.failures);
        if self.failures > worker.max_restarts {
            error!(error, failures, "the node is given up; waiting for another assignment");
            self.mine = Mine::Done(task);
            return;
        }
        let pause = (worker.restart_delay.get() * 2_u32.saturating_pow(failures - 1)).min(LONGEST_PAUSE);
        error!(error, failures, again_in_ms = pause.as_millis() as u64, "the node failed and is tried again");
        self.mine = Mine::Nothing;
        self.retry = Some(Instant::now() + pause);
    }

    /// Tells the allocator where we are. A mailbox that cannot be written is tried again with the next look.
    fn say(&mut self, asked: Option<&Document>) {
        self.revision = asked.map_or(self.revision, |document| document.revision);
        let (revision, serving) = (self.revision, self.serving.clone());
        let said = tokio::task::block_in_place(|| self.presence.say(revision, serving.as_ref()));
        if let Err(error) = said {
            debug!(%error, "cannot say what this host's worker does");
        }
    }
}

/// A watch on the assignments of all hosts. Without one the clock alone has to do.
fn watch_dir(dir: &Path, changed: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let changed = Arc::clone(changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own look at the file is an access too.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            changed.notify_one();
        }
    });
    let started = watcher.and_then(|mut watcher| {
        watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    started.inspect_err(|error| debug!(dir = %dir.display(), %error, "no inotify on assignments")).ok()
}
