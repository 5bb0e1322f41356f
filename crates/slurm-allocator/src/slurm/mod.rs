//! The Slurm backend: a swarm is one job, its nodes are the tasks of one `srun`.
//!
//! ```text
//! launch ──> order.rs   what is asked for, checked
//!            access.rs  ground.rs: mailbox, bundle and configuration on the shared file system, here or through our program there
//!            Keeper ──> core/  one state machine for all jobs of a cluster, with a budget of calls
//!              │ ^
//!      calls.rs  parse/        sbatch, one squeue for all jobs, scancel, sacct, scontrol; through drover-ssh
//! ```
//!
//! The job's name and comment carry the swarm's id and the number of the submission, so that a job is found again by whoever
//! looks, also when everything here is forgotten. Workers say in the mailbox that they are there; that is faster than the queue,
//! and is what the queue is asked for then.

mod access;
mod calls;
mod core;
pub mod ground;
#[cfg(test)]
mod hostile;
mod keeper;
mod order;
mod parse;
mod rehearse;
mod script;
mod state;
mod tag;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use drover_config::{Backend as ConfigBackend, Config, HumanDuration, SlurmBackend};
use drover_service::Context;
use drover_ssh::{RemotePath, Source, Upload};
use drover_types::{ErrorCode, Failure, SwarmId};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

pub(crate) use self::core::Begun;
pub use self::core::{Claim, WorkerEnd};
use self::core::{Core, JobRecord, SECOND, Settings};
use crate::allocation::{Allocation, LaunchProgress};
use crate::backend::{Backend, Request};
use crate::board::Board;
use crate::catalogue::BackendKind;
use crate::cluster::{Cluster, Clusters, Program, Stage};
use crate::core::SwarmRecord;
use crate::membership::{Membership, NodeFiles};
use crate::metrics::Metrics;
use crate::spec::Spec;
use crate::store::{self, Record, Store};
use access::Access;
use ground::{Furniture, Ground, Request as Errand};
use keeper::{Command, Keeper, Tools};
pub use order::Order;
pub use rehearse::{Rehearsal, rehearse};
use script::{Places, Plan};

/// How long a swarm that is over stays listed.
const KEEP_OVER: Duration = Duration::from_hours(1);
/// How much longer than `sbatch` can live the queue alone must deny a job where there is no history.
const QUIET: Duration = Duration::from_mins(1);
/// How long a launch waits for its job to be in the queue. Then it goes on without its asker.
const PATIENCE: Duration = Duration::from_mins(3);
/// How long what a refused launch left may take to be removed.
const TIDYING: Duration = Duration::from_secs(10);
/// Pause before a cluster that cannot be reached is told again who votes there.
const VOTERS_AGAIN: Duration = Duration::from_secs(15);
/// How often somebody who waits for a cluster to be ready is told how far it is.
const TELLING: Duration = Duration::from_secs(3);
/// The copy of the program goes from disk to disk here.
const PLACING: Duration = Duration::from_mins(5);
/// Below our directory: programs of others that `drover doctor --fix` has installed.
pub const TOOLS: &str = "tools/bin";
/// On a disk of the node on every Linux, kept over restarts, and not where agents refuse to work.
const LOCAL_DIR: &str = "/var/tmp";
const POLL: Duration = Duration::from_secs(30);
const CALLS_PER_MINUTE: u32 = 60;

/// What is remembered of a swarm beside what every backend remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SlurmRecord {
    plan: Plan,
    job: JobRecord,
}

/// The Slurm backend.
pub(crate) struct Slurm {
    ctx: Context,
    board: Board,
    /// By the id of their catalogue entry; entries that share a login host share a site.
    /// Or what is wrong with the entry, for whoever wants to launch on it.
    sites: BTreeMap<String, Result<Arc<Site>, Failure>>,
    worker_config: String,
}

/// One cluster as this backend uses it.
struct Site {
    cluster: Cluster,
    access: Access,
    membership: Arc<Membership>,
    local_dir: String,
    keeper: mpsc::Sender<Command>,
    /// Where the program is, once it was placed.
    program: Mutex<Option<String>>,
}

/// What the sections of the configuration say for one catalogue entry.
struct Knobs {
    poll: Duration,
    calls_per_minute: u32,
    local_dir: String,
}

impl Knobs {
    fn of(config: &Config, profile: Option<&str>) -> Self {
        fn first<'a, T: Clone + 'a>(
            mut sections: impl Iterator<Item = &'a SlurmBackend>,
            key: impl Fn(&'a SlurmBackend) -> &'a Option<T>,
        ) -> Option<T> {
            sections.find_map(|section| key(section).clone())
        }
        let base = &config.cluster.slurm;
        let own = profile.and_then(|name| base.profiles.0.get(name));
        let both = || own.into_iter().chain([base]);
        Self {
            poll: first(both(), |section| &section.poll).map_or(POLL, HumanDuration::get),
            calls_per_minute: first(both(), |section| &section.calls_per_minute).unwrap_or(CALLS_PER_MINUTE),
            local_dir: first(both(), |section| &section.local_dir).unwrap_or_else(|| LOCAL_DIR.to_owned()),
        }
    }
}

impl Slurm {
    /// With these swarms of an earlier allocator, which are on the board when this returns.
    #[expect(clippy::too_many_arguments, reason = "what all backends share, handed over once at the start")]
    pub(crate) fn new(
        ctx: &Context,
        config: &Config,
        clusters: &Clusters,
        board: &Board,
        store: &Store,
        metrics: &Metrics,
        membership: &Arc<Membership>,
        records: Vec<Record>,
    ) -> Self {
        let mut records_of: BTreeMap<String, Vec<Record>> = BTreeMap::new();
        let mut by_cluster: BTreeMap<String, Arc<Site>> = BTreeMap::new();
        let mut sites = BTreeMap::new();
        let mut keepers = Vec::new();
        for provider in config.providers() {
            if provider.backend != ConfigBackend::Slurm || provider.disabled_reason.is_some() {
                continue;
            }
            let cluster = match clusters.get(&provider.id) {
                Ok(cluster) => cluster,
                Err(failure) => {
                    warn!(provider = provider.id, %failure, "this cluster cannot be used");
                    sites.insert(provider.id, Err(failure));
                    continue;
                }
            };
            let name = cluster.settings().name.clone();
            let site = by_cluster.entry(name.clone()).or_insert_with(|| {
                let knobs = Knobs::of(config, provider.profile.as_deref());
                let access = Access::new(&cluster);
                // Nodes with this host's mailbox are of one kind with those that run here.
                let membership = match clusters.providers_of(&cluster) {
                    providers if providers.is_empty() => Arc::clone(membership),
                    providers => membership.of_cluster(&cluster.settings().file_name(), providers),
                };
                let (sender, commands) = mpsc::channel(keeper::QUEUE);
                let tools = Tools {
                    ctx: ctx.clone(),
                    cluster: cluster.clone(),
                    access: access.clone(),
                    membership: Arc::clone(&membership),
                    board: board.clone(),
                    store: store.clone(),
                    metrics: metrics.clone(),
                };
                keepers.push((name.clone(), Keeper::new(tools, settings(&knobs), commands, &sender)));
                let local_dir = knobs.local_dir;
                Arc::new(Site {
                    cluster: cluster.clone(),
                    access,
                    membership,
                    local_dir,
                    keeper: sender,
                    program: Mutex::default(),
                })
            });
            sites.insert(provider.id, Ok(Arc::clone(site)));
        }
        for record in records {
            match sites.get(&record.provider) {
                Some(Ok(site)) => records_of.entry(site.cluster.settings().name.clone()).or_default().push(record),
                _ => lost(board, &record, ctx),
            }
        }
        for (name, mut keeper) in keepers {
            keeper.restore(records_of.remove(&name).unwrap_or_default());
            ctx.spawn("slurm_keeper", keeper.run());
        }
        for site in by_cluster.values().filter(|site| !site.cluster.settings().own_follower) {
            ctx.spawn("voters of a cluster", keep_voters(Arc::clone(site), board.clone(), ctx.clone()));
        }
        let worker_config = ground::worker_config(config);
        Self { ctx: ctx.clone(), board: board.clone(), sites, worker_config }
    }

    fn site(&self, provider: &str) -> Result<Arc<Site>, Failure> {
        self.sites.get(provider).cloned().unwrap_or_else(|| {
            Err(Failure::new(ErrorCode::UnknownProvider, format!("no cluster is called {provider:?}")))
        })
    }

    fn progress(&self, swarm: &SwarmId, stage: &'static str, message: String) {
        self.board.progress(LaunchProgress { swarm: swarm.clone(), stage, message });
    }

    /// Everything that has to be there before there is a job.
    async fn prepare(&self, site: &Site, request: &Request) -> Result<Plan, Failure> {
        let Request { swarm, spec, .. } = request;
        let mut plan = plan_of(site.access.ground(), &site.local_dir, swarm, spec)?;
        // Looked at while the program is placed.
        let ((), program) = tokio::try_join!(self.preflight(site, swarm, &plan), self.place(site, swarm))?;
        plan.places.program = program;
        let (identities, charter) = site.introduce(swarm, spec.node_count, &self.board).await;
        let furniture = Furniture {
            swarm: swarm.clone(),
            nodes: spec.node_count,
            config: self.worker_config.clone(),
            bundle: spec.bundle.clone(),
            identities,
            charter,
        };
        site.access.ask(Errand::Prepare(Box::new(furniture))).await?;
        self.progress(swarm, "config", "directories and bundles are in place".to_owned());
        Ok(plan)
    }

    async fn preflight(&self, site: &Site, swarm: &SwarmId, plan: &Plan) -> Result<(), Failure> {
        let remote = site.cluster.remote().await?;
        let (answer, has_room) = oneshot::channel();
        let asked = site.keeper.send(Command::Room { answer }).await.is_ok();
        let words = if asked && has_room.await.unwrap_or(false) {
            calls::preflight(&*remote, plan).await?
        } else {
            "not checked beforehand: this minute's calls are used up".to_owned()
        };
        self.progress(swarm, "starting", words);
        Ok(())
    }

    /// Sees to it that the program is where compute nodes find it, and the follower at work.
    async fn place(&self, site: &Site, swarm: &SwarmId) -> Result<String, Failure> {
        let settings = site.cluster.settings();
        if settings.own_follower {
            return site.place().await;
        }
        if !matches!(*site.cluster.stage().borrow(), Stage::Ready(_)) {
            self.progress(swarm, "starting", format!("reaching {}, placing the program there", settings.way));
        }
        let mut ready = std::pin::pin!(site.cluster.ready());
        let ready = loop {
            match tokio::time::timeout(TELLING, &mut ready).await {
                Ok(ready) => break ready?,
                // Whoever waits sees for what, also while nothing can be reached.
                Err(_) => self.progress(swarm, "starting", site.cluster.not_yet().message),
            }
        };
        let placed = ready.program;
        // Told apart, since it happens once and takes as long as the line is thin.
        let untold = site.program.lock().unwrap_or_else(PoisonError::into_inner).replace(placed.path.clone()).is_none();
        if placed.sent && untold {
            self.progress(
                swarm,
                "starting",
                format!("the program was uploaded in {:.1?}: {}", placed.took, placed.path),
            );
        }
        Ok(placed.path)
    }
}

impl Site {
    /// What the nodes need to prove to each other who they are.
    async fn introduce(&self, swarm: &SwarmId, nodes: u32, board: &Board) -> (Vec<NodeFiles>, Option<String>) {
        let (membership, swarm) = (Arc::clone(&self.membership), swarm.clone());
        let others_live = membership.others_live(board, &swarm);
        let introduced = tokio::task::spawn_blocking(move || {
            membership.before_launch(&swarm, nodes, others_live);
            membership.furnish(&swarm, nodes)
        });
        introduced.await.unwrap_or_default()
    }

    /// The program on the shared file system, where compute nodes find it.
    async fn place(&self) -> Result<String, Failure> {
        let settings = self.cluster.settings();
        let known = self.program.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(known) = known.filter(|known| std::path::Path::new(known).is_file()) {
            return Ok(known);
        }
        let path = settings.program.clone();
        let read = tokio::task::spawn_blocking({
            let path = path.clone();
            move || Program::read(&path)
        });
        let program = read.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
            settings.unavailable(format!("the program to place, {}, cannot be read: {error}", path.display()))
        })?;
        let place = program.place(&settings.base);
        let to = RemotePath::new(place.clone()).map_err(|error| settings.of_ssh(&error))?;
        let upload = Upload::new(Source::File(path), to).mode(0o700).deadline(PLACING);
        let remote = self.cluster.remote().await?;
        let uploaded = remote.upload(upload).await.map_err(|error| settings.of_ssh(&error))?;
        if uploaded.sent {
            info!(cluster = settings.name, path = place, "program placed on the shared file system");
        }
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = Some(place.clone());
        Ok(place)
    }
}

#[async_trait]
impl Backend for Slurm {
    async fn launch(&self, request: Request) -> Result<Allocation, Failure> {
        let site = self.site(&request.provider)?;
        let swarm = request.swarm.clone();
        let name = &site.cluster.settings().name;
        self.progress(
            &swarm,
            "starting",
            format!("{} nodes on {name}, agent {}", request.spec.node_count, request.spec.agent),
        );
        let plan = match self.prepare(&site, &request).await {
            Err(failure) if failure.code == ErrorCode::BackendUnavailable => {
                // The launch is repeated until that works, and whoever waits for it sees for what.
                self.progress(&swarm, "starting", failure.message.clone());
                return Err(failure);
            }
            prepared => prepared?,
        };
        self.progress(&swarm, "submitting", format!("partition {}, time {}", plan.order.partition, plan.order.time()));
        let Ok(job_id) = format!("drover-{swarm}").parse() else {
            return Err(Failure::new(ErrorCode::InvalidRequest, "the swarm's id is too long for the name of a job"));
        };
        let nodes = plan.order.nodes;
        let record = Record {
            v: store::version(),
            swarm_id: swarm.clone(),
            job_id,
            backend: BackendKind::Slurm,
            provider: request.provider,
            agent: request.spec.agent,
            settings: BTreeMap::new(),
            host: drover_service::process::hostname(),
            boot_id: String::new(),
            hosts: Vec::new(),
            swarm: SwarmRecord { release: None, limit: None, over_us: None, nodes: Vec::new() },
            slurm: Some(SlurmRecord { plan, job: JobRecord::fresh(nodes) }),
        };
        let (answer, answered) = oneshot::channel();
        let command = Command::Launch { record: Box::new(record), answer };
        site.keeper.send(command).await.map_err(|_| keeper::gone(&self.ctx))?;
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(failure))) => {
                // There is no job that would need it. What stays costs room only.
                let _ = tokio::time::timeout(TIDYING, site.access.ask(Errand::Forget { swarm })).await;
                return Err(failure);
            }
            Ok(Err(_)) => return Err(keeper::gone(&self.ctx)),
            // The launch goes on; the board tells how.
            Err(_) => warn!(swarm_id = %swarm, "Slurm takes long over a launch"),
        }
        self.board.get(&swarm).map(|allocation| (*allocation).clone()).ok_or_else(|| {
            Failure::new(ErrorCode::Internal, format!("swarm {swarm} was launched and is not on the board"))
        })
    }

    async fn release(&self, swarm: &SwarmId, force: bool) -> Result<(), Failure> {
        let Some(known) = self.board.get(swarm) else { return Ok(()) };
        let site = self.site(&known.provider)?;
        let (answer, answered) = oneshot::channel();
        let command = Command::Release { swarm: swarm.clone(), force, answer };
        site.keeper.send(command).await.map_err(|_| keeper::gone(&self.ctx))?;
        answered.await.unwrap_or_else(|_| Err(keeper::gone(&self.ctx)))
    }
}

/// What makes the swarm's workers. Where the program is, is known when it was placed.
fn plan_of(ground: &Ground, local_dir: &str, swarm: &SwarmId, spec: &Spec) -> Result<Plan, Failure> {
    let order =
        spec.slurm.clone().ok_or_else(|| Failure::new(ErrorCode::Internal, "a launch on Slurm without an order"))?;
    let as_text = |path: &std::path::Path| path.display().to_string();
    let plan = Plan {
        order,
        places: Places {
            // Any that passes the checks.
            program: format!("{}/bin/drover", ground.base().display()),
            args: vec!["daemon".to_owned(), "worker".to_owned()],
            dir: as_text(&ground.dir(swarm)),
            mailbox: as_text(ground.mailbox()),
            tools: as_text(&ground.base().join(TOOLS)),
            local: local_dir.to_owned(),
        },
        agent: spec.agent,
        settings: spec.settings.clone(),
    };
    plan.places.check()?;
    Ok(plan)
}

/// Sees to it that somebody can vote on a cluster whenever somebody lives there: where the first voters have ended, others are
/// named, and the nodes are told.
async fn keep_voters(site: Arc<Site>, board: Board, ctx: Context) {
    let mut changes = board.bell();
    let mut known = None;
    let mut told = None;
    loop {
        let living = site.membership.living(&board);
        let mut again = None;
        if known.as_ref() != Some(&living) || told.is_none() {
            let (membership, alive) = (Arc::clone(&site.membership), living.clone());
            let looked = tokio::task::spawn_blocking(move || {
                membership.after_end(&alive);
                membership.charter()
            });
            let charter = looked.await.unwrap_or_default();
            if let Some(text) = charter.clone().filter(|_| !living.is_empty() && told != charter) {
                let posted =
                    ctx.shutdown().run_until_cancelled(site.access.ask(Errand::Voters { charter: text })).await;
                match posted {
                    None => return,
                    Some(Ok(_)) => told = charter,
                    Some(Err(_)) => (told, again) = (None, Some(VOTERS_AGAIN)),
                }
            }
        }
        known = Some(living);
        let pause = async {
            match again {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = pause => {}
            () = ctx.shutdown().cancelled() => return,
        }
    }
}

fn settings(knobs: &Knobs) -> Settings {
    let micros = |duration: Duration| duration.as_micros() as u64;
    Settings {
        poll: micros(knobs.poll).max(SECOND),
        calls_per_minute: knobs.calls_per_minute,
        keep_over: micros(KEEP_OVER),
        horizon: micros(calls::SUBMIT_HORIZON),
        quiet: micros(QUIET),
    }
}

/// A swarm whose catalogue entry is gone: shown as it was last seen, and nothing is done about it.
fn lost(board: &Board, record: &Record, ctx: &Context) {
    let Some(part) = &record.slurm else { return };
    warn!(swarm_id = %record.swarm_id, provider = record.provider, "the configuration no longer has the provider of a swarm");
    let mut core = Core::new(settings(&Knobs::of(&Config::default(), None)), drover_service::now_us());
    core.restore(record.swarm_id.clone(), &part.job, drover_service::now_us());
    if let Some(mut view) = core.view(&record.swarm_id) {
        if !view.over {
            view.reason = format!(
                "the configuration no longer has provider {:?}: put it back to see how it fares",
                record.provider
            );
        }
        board.put(keeper::allocation(record, view, &Ground::new(&ctx.state().path().display().to_string(), "mailbox")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knobs_of_a_cluster_are_those_of_its_profile_then_of_the_section() {
        let text = "cluster: {slurm: {ssh: none, workspace_root: /w, cluster_subdir: c, poll: 7s, calls_per_minute: 9,\n\
                    profiles: {a: {local_dir: /scratch, poll: 90s}, b: {}}}}";
        let config = Config::from_text("test.yaml", text, &BTreeMap::new()).unwrap().0;
        let (a, b) = (settings(&Knobs::of(&config, Some("a"))), settings(&Knobs::of(&config, Some("b"))));
        assert_eq!((a.poll, a.calls_per_minute), (90 * SECOND, 9));
        assert_eq!((b.poll, b.calls_per_minute), (7 * SECOND, 9));
        assert_eq!(Knobs::of(&config, Some("a")).local_dir, "/scratch");
        let unset = Knobs::of(&Config::default(), None);
        assert_eq!((unset.poll, unset.calls_per_minute, unset.local_dir.as_str()), (POLL, 60, "/var/tmp"));
    }
}
