//! The shell of one cluster: feeds the core, keeps its records on disk, makes its calls, and tells everybody.
//!
//! One task owns everything of the cluster's jobs. What happens outside reaches it through one bounded channel; a full one makes
//! the sender wait, and nobody but this task waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drover_service::{Context, now_us};
use drover_types::{ErrorCode, Failure, JobId, SwarmId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::access::Access;
use super::calls;
use super::core::{Call, CallId, Core, Input, Micros, SECOND, Step, View};
use super::ground::{Answer as Told, Ground, Request};
use super::tag::Tag;
use crate::allocation::{AllocatedNode, Allocation, AllocationState, LaunchProgress};
use crate::board::Board;
use crate::catalogue::BackendKind;
use crate::cluster::{Cluster, Report};
use crate::membership::Membership;
use crate::metrics::Metrics;
use crate::store::{Record, Store, StoreError};

/// Words that may wait for the task.
pub(super) const QUEUE: usize = 256;
/// Pause before a record that could not be written is tried again.
const STORE_AGAIN: Duration = Duration::from_secs(2);
/// How often the mailbox is looked at for workers that are expected, at first.
const EXPECTED: Duration = Duration::from_millis(500);
/// And for workers that do not come for long, or may be replaced. A look costs a few operations for each node, and few of them a
/// second are to be felt.
const SELDOM: Duration = Duration::from_secs(10);
const SELDOM_PER_NODE: Duration = Duration::from_millis(150);
/// Pause before what a swarm left on a cluster that cannot be reached is tried to be taken away again.
const FORGET_AGAIN: Duration = Duration::from_mins(5);

/// What reaches the task.
pub(super) enum Command {
    /// A swarm is to have a job. Answered when it has one, when it is refused, or when that takes longer than a caller waits.
    Launch { record: Box<Record>, answer: oneshot::Sender<Result<(), Failure>> },
    /// A swarm is to end. Answered when that is on disk.
    Release { swarm: SwarmId, force: bool, answer: oneshot::Sender<Result<(), Failure>> },
    /// Something happened.
    Input(Input),
    /// What a look at the mailbox came to.
    Looked { claims: Vec<(SwarmId, Vec<super::core::Claim>)> },
    /// May another call be made now?
    Room { answer: oneshot::Sender<bool> },
}

/// What the keeper works with.
pub(super) struct Tools {
    pub(super) ctx: Context,
    pub(super) cluster: Cluster,
    pub(super) access: Access,
    pub(super) membership: Arc<Membership>,
    pub(super) board: Board,
    pub(super) store: Store,
    pub(super) metrics: Metrics,
}

pub(super) struct Keeper {
    tools: Arc<Tools>,
    core: Core,
    clock: Clock,
    records: BTreeMap<SwarmId, Record>,
    waiting: BTreeMap<SwarmId, Vec<oneshot::Sender<Result<(), Failure>>>>,
    unsaved: BTreeSet<SwarmId>,
    store_again: Option<Instant>,
    look_at: Instant,
    /// Somebody looks at the mailbox.
    looking: bool,
    /// Swarms whose workers are expected, and whether their jobs run; since when it is these.
    expected: BTreeMap<SwarmId, bool>,
    expected_since: Instant,
    /// Orphans that were told of.
    told: BTreeSet<u64>,
    /// The controller was said to be away.
    said_down: bool,
    commands: mpsc::Receiver<Command>,
    /// For the tasks that make calls.
    sender: mpsc::WeakSender<Command>,
}

/// Unix time that goes on evenly whatever is done to the host's clock.
#[derive(Debug, Clone, Copy)]
struct Clock {
    started: Instant,
    started_us: Micros,
}

impl Clock {
    fn now(self) -> Micros {
        self.started_us + self.started.elapsed().as_micros() as Micros
    }

    fn instant(self, at: Micros) -> Instant {
        self.started + Duration::from_micros(at.saturating_sub(self.started_us))
    }
}

impl Keeper {
    pub(super) fn new(
        tools: Tools,
        settings: super::core::Settings,
        commands: mpsc::Receiver<Command>,
        sender: &mpsc::Sender<Command>,
    ) -> Self {
        let clock = Clock { started: Instant::now(), started_us: now_us() };
        Self {
            tools: Arc::new(tools),
            core: Core::new(settings, clock.now()),
            clock,
            records: BTreeMap::new(),
            waiting: BTreeMap::new(),
            unsaved: BTreeSet::new(),
            store_again: None,
            look_at: clock.started,
            looking: false,
            expected: BTreeMap::new(),
            expected_since: clock.started,
            told: BTreeSet::new(),
            said_down: false,
            commands,
            sender: sender.downgrade(),
        }
    }

    /// Takes up the swarms of an earlier allocator and what it used of this minute's calls, and puts the swarms on the board.
    pub(super) fn restore(&mut self, records: Vec<Record>) {
        let begun = self.tools.store.calls(&self.tools.cluster.settings().file_name());
        self.core.restore_budget(self.clock.now(), &begun);
        for record in records {
            let Some(part) = &record.slurm else { continue };
            info!(swarm_id = %record.swarm_id, job_id = ?part.job.job_id(), "taking up a swarm again");
            self.core.restore(record.swarm_id.clone(), &part.job, self.clock.now());
            let swarm = record.swarm_id.clone();
            self.records.insert(swarm.clone(), record);
            self.publish(&swarm);
        }
    }

    /// Runs until the daemon ends. The jobs go on.
    pub(super) async fn run(mut self) {
        loop {
            self.settle().await;
            let wake = self.core.next_deadline().map(|at| self.clock.instant(at));
            self.expect();
            let watched = !self.looking && self.records.values().any(|record| self.is_watched(record));
            let look = watched.then_some(self.look_at);
            let wake = [wake, look, self.store_again].into_iter().flatten().min();
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let command = tokio::select! {
                () = self.tools.ctx.shutdown().cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(command) => Some(command),
                    None => return,
                },
                () = self.tools.cluster.asked() => Some(Command::Input(Input::Look)),
                () = timer => None,
            };
            if let Some(command) = command {
                self.take(command).await;
            }
            if !self.looking && self.look_at <= Instant::now() {
                self.look_at_mailbox();
            }
        }
    }

    async fn take(&mut self, command: Command) {
        let now = self.clock.now();
        match command {
            Command::Input(input) => self.core.apply(now, input),
            Command::Looked { claims } => {
                self.looking = false;
                for (swarm, claims) in claims {
                    self.core.apply(now, Input::Claims { swarm, claims });
                }
            }
            Command::Room { answer } => {
                let _ = answer.send(self.core.take_call(now, calls::PREFLIGHT));
                self.keep_budget().await;
            }
            Command::Launch { record, answer } => {
                let swarm = record.swarm_id.clone();
                if self.records.contains_key(&swarm) {
                    let _ = answer.send(Ok(()));
                    return;
                }
                let order = record.slurm.as_ref().map(|part| &part.plan.order);
                let nodes = order.map_or(1, |order| order.nodes);
                let limit = order.and_then(|order| order.seconds).map(|seconds| seconds.saturating_mul(SECOND));
                self.records.insert(swarm.clone(), *record);
                self.core.apply(now, Input::Launch { swarm: swarm.clone(), nodes, limit });
                // A launch that is not on disk is none: nobody would find its job again.
                if let Err(error) = self.save(&swarm).await {
                    self.core.discard(&swarm);
                    self.records.remove(&swarm);
                    let _ = answer.send(Err(error.failure()));
                    return;
                }
                self.tools.metrics.launches.inc();
                self.look_at = Instant::now();
                self.waiting.entry(swarm).or_default().push(answer);
            }
            Command::Release { swarm, force, answer } => {
                self.core.apply(now, Input::Release { swarm: swarm.clone(), force });
                let saved = if self.records.contains_key(&swarm) { self.save(&swarm).await } else { Ok(()) };
                if saved.is_err() {
                    self.keep_unsaved(&swarm);
                }
                info!(swarm_id = %swarm, force, "releasing");
                let _ = answer.send(saved.map_err(|error| error.failure()));
            }
        }
    }

    /// Does what is due, until nothing is.
    async fn settle(&mut self) {
        loop {
            let now = self.clock.now();
            let step = self.core.advance(now);
            let done = self.perform(now, step).await;
            if done {
                break;
            }
        }
        self.tell_of_the_cluster();
    }

    /// Stores, tells, then makes calls. False when something was not done and the core is to be asked again.
    async fn perform(&mut self, now: Micros, step: Step) -> bool {
        let retry = self.store_again.is_none_or(|again| again <= Instant::now());
        let mut to_store = step.store;
        if retry {
            self.store_again = None;
            to_store.append(&mut self.unsaved);
        }
        for swarm in to_store {
            if self.records.contains_key(&swarm)
                && let Err(error) = self.save(&swarm).await
            {
                self.tools.metrics.store_failures.inc();
                warn!(swarm_id = %swarm, error = error.failure().message, "cannot store, trying again");
                self.keep_unsaved(&swarm);
            }
        }
        for swarm in &step.changed {
            self.publish(swarm);
        }
        for (swarm, stage, message) in step.progress {
            self.tools.board.progress(LaunchProgress { swarm, stage, message });
        }
        for (swarm, outcome) in step.settled {
            self.answer(&swarm, outcome).await;
        }
        for swarm in step.forget {
            self.forget(&swarm);
        }
        if !step.calls.is_empty() {
            self.keep_budget().await;
        }
        let mut done = true;
        for (id, call) in step.calls {
            match &call {
                // A submission that is not on disk would be a job that nobody finds again.
                Call::Submit(tag) if self.unsaved.contains(&tag.swarm) => {
                    self.core.not_made(now, id, "the record of the swarm cannot be written");
                    done = false;
                }
                _ => self.make(id, call),
            }
        }
        done
    }

    /// Notes the calls of this minute, so that an allocator that is restarted again and again makes no more of them.
    async fn keep_budget(&self) {
        let (tools, begun) = (Arc::clone(&self.tools), self.core.calls_begun());
        let kept =
            tokio::task::spawn_blocking(move || tools.store.keep_calls(&tools.cluster.settings().file_name(), &begun));
        if let Ok(Err(error)) = kept.await {
            debug!(%error, "the calls of this minute cannot be noted");
        }
    }

    fn make(&self, id: CallId, call: Call) {
        self.tools.metrics.slurm_calls.inc_by(u64::from(call.requests()));
        let plan = match &call {
            Call::Submit(tag) => self.plan_of(tag),
            _ => None,
        };
        let (tools, sender) = (Arc::clone(&self.tools), self.sender.clone());
        self.tools.ctx.spawn("slurm_call", async move {
            let work = async {
                match tools.cluster.remote().await {
                    Ok(remote) => calls::make(&*remote, &call, plan.as_ref()).await,
                    Err(failure) => super::core::Answer::NotDone(failure.message),
                }
            };
            let Some(answer) = tools.ctx.shutdown().run_until_cancelled(work).await else { return };
            debug!(?call, ?answer, "slurm call");
            if let Some(sender) = sender.upgrade() {
                let _ = sender.send(Command::Input(Input::Answered { call: id, answer })).await;
            }
        });
    }

    fn plan_of(&self, tag: &Tag) -> Option<super::script::Plan> {
        Some(self.records.get(&tag.swarm)?.slurm.as_ref()?.plan.clone())
    }

    async fn answer(&mut self, swarm: &SwarmId, outcome: Result<(), Failure>) {
        let Some(waiting) = self.waiting.remove(swarm) else { return };
        // The asker hears of it, so nobody has to find it in the list.
        if outcome.is_err() {
            self.core.discard(swarm);
            let record = self.drop_record(swarm);
            remove(&self.tools, swarm, record).await;
        }
        for answer in waiting {
            let _ = answer.send(outcome.clone());
        }
    }

    async fn save(&mut self, swarm: &SwarmId) -> Result<(), StoreError> {
        let (Some(record), Some(job)) = (self.records.get_mut(swarm), self.core.record(swarm)) else { return Ok(()) };
        if let Some(part) = &mut record.slurm {
            part.job = job;
        }
        record.job_id = job_id(record, self.core.view(swarm).and_then(|view| view.job));
        let (tools, record) = (Arc::clone(&self.tools), record.clone());
        let saved = tokio::task::spawn_blocking(move || tools.store.save(&record)).await;
        saved.unwrap_or_else(|error| {
            Err(StoreError::Io { path: "the record".into(), source: std::io::Error::other(error) })
        })
    }

    fn keep_unsaved(&mut self, swarm: &SwarmId) {
        self.unsaved.insert(swarm.clone());
        self.store_again = Some(Instant::now() + STORE_AGAIN);
    }

    fn drop_record(&mut self, swarm: &SwarmId) -> Option<Record> {
        let record = self.records.remove(swarm);
        self.unsaved.remove(swarm);
        self.tools.board.forget(swarm);
        record
    }

    /// A swarm has been over for long. Its record stays on disk until the cluster has nothing of it any more, so that a later
    /// allocator goes on with that.
    fn forget(&mut self, swarm: &SwarmId) {
        let record = self.drop_record(swarm);
        let (tools, swarm) = (Arc::clone(&self.tools), swarm.clone());
        self.tools.ctx.spawn("forget a swarm", async move {
            let shutdown = tools.ctx.shutdown().clone();
            let clean = async {
                while let Err(failure) = tools.access.ask(Request::Forget { swarm: swarm.clone() }).await {
                    debug!(swarm_id = %swarm, %failure, "what a swarm left cannot be removed yet");
                    tokio::time::sleep(FORGET_AGAIN).await;
                }
            };
            if shutdown.run_until_cancelled(clean).await.is_some() {
                remove(&tools, &swarm, record).await;
            }
        });
    }

    fn publish(&self, swarm: &SwarmId) {
        let (Some(record), Some(view)) = (self.records.get(swarm), self.core.view(swarm)) else { return };
        self.tools.board.put(allocation(record, view, self.tools.access.ground()));
    }

    /// Says once what concerns the cluster and no swarm of ours.
    fn tell_of_the_cluster(&mut self) {
        let name = &self.tools.cluster.settings().name;
        let orphans = self.core.orphans();
        for (job, orphan) in orphans {
            if self.told.insert(*job) {
                warn!(
                    cluster = name, job_id = job, swarm_id = %orphan.tag.swarm, state = %orphan.state,
                    "a job of ours belongs to no swarm of this instance; it is left alone: `scancel` ends it if nobody needs it"
                );
            }
        }
        self.told.retain(|job| orphans.contains_key(job));
        self.tools.metrics.slurm_orphans.set(i64::try_from(orphans.len()).unwrap_or(i64::MAX));
        match (&self.core.controller().down, self.said_down) {
            (Some((_, why)), false) => warn!(cluster = name, why, "Slurm cannot be reached"),
            (None, true) => info!(cluster = name, "Slurm can be reached again"),
            _ => {}
        }
        self.said_down = self.core.controller().down.is_some();
        self.tools.cluster.put_report(Report {
            trouble: self.core.trouble().unwrap_or_default(),
            orphans: orphans
                .iter()
                .map(|(job, orphan)| (*job, orphan.tag.swarm.clone(), orphan.state.to_string()))
                .collect(),
        });
    }

    /// Workers are expected, or may be replaced.
    fn is_watched(&self, record: &Record) -> bool {
        self.core.view(&record.swarm_id).is_some_and(|view| !view.over && view.job.is_some())
    }

    /// Notes whose workers are expected. Whoever is new among them is looked for often.
    fn expect(&mut self) {
        let expected = self.core.expected();
        if expected != self.expected {
            let now = Instant::now();
            if expected.iter().any(|(swarm, runs)| self.expected.get(swarm).is_none_or(|before| !before && *runs)) {
                self.expected_since = now;
                self.look_at = self.look_at.min(now + EXPECTED);
            }
            self.expected = expected;
        }
    }

    /// In a task of its own: a cluster that cannot be reached must not hold up anything else.
    fn look_at_mailbox(&mut self) {
        let watched: Vec<(SwarmId, u32)> = self
            .records
            .values()
            .filter(|record| self.is_watched(record))
            .filter_map(|record| Some((record.swarm_id.clone(), record.slurm.as_ref()?.plan.order.nodes)))
            .collect();
        let (now, nodes) = (Instant::now(), watched.iter().map(|(_, nodes)| *nodes).sum::<u32>());
        let seldom = SELDOM.max(SELDOM_PER_NODE * nodes);
        let pause = if self.expected.is_empty() { seldom } else { (now - self.expected_since) / 4 };
        self.look_at = now + pause.clamp(EXPECTED, seldom);
        if watched.is_empty() {
            return;
        }
        self.looking = true;
        let (tools, sender) = (Arc::clone(&self.tools), self.sender.clone());
        self.tools.ctx.spawn("look for workers", async move {
            let asked = tools.access.ask(Request::Claims { swarms: watched });
            let Some(answer) = tools.ctx.shutdown().run_until_cancelled(asked).await else { return };
            // What cannot be seen says nothing.
            let claims = match answer {
                Ok(Told::Claims { swarms }) => swarms,
                other => {
                    debug!(?other, "the mailbox cannot be looked at");
                    Vec::new()
                }
            };
            if let Some(sender) = sender.upgrade() {
                let _ = sender.send(Command::Looked { claims }).await;
            }
        });
    }
}

/// Takes a swarm off this host's disk.
async fn remove(tools: &Arc<Tools>, swarm: &SwarmId, record: Option<Record>) {
    let (tools, swarm) = (Arc::clone(tools), swarm.clone());
    let nodes = record.and_then(|record| Some(record.slurm?.plan.order.nodes)).unwrap_or_default();
    let removed = tokio::task::spawn_blocking(move || {
        tools.membership.withdraw_sent(&swarm, nodes);
        tools.store.remove(&swarm)
    });
    if let Ok(Err(error)) = removed.await {
        warn!(error = error.failure().message, "a record cannot be removed");
    }
}

fn job_id(record: &Record, job: Option<u64>) -> JobId {
    job.and_then(|job| job.to_string().parse().ok()).unwrap_or_else(|| record.job_id.clone())
}

/// A swarm as watchers are told of it.
pub(super) fn allocation(record: &Record, view: View, ground: &Ground) -> Allocation {
    let View { job, state, word, mut reason, nodes, over } = view;
    if over && state == AllocationState::Failed {
        reason = format!("{reason}; what it said is in {}", ground.dir(&record.swarm_id).display());
    }
    let nodes = (0..).map(drover_types::NodeIndex).zip(nodes).map(|(node, seen)| AllocatedNode {
        node,
        host: seen.host,
        restarts: seen.generation.0.saturating_sub(1),
        generation: seen.generation,
        state: seen.state,
        reason: seen.reason,
        pid: seen.pid,
    });
    Allocation {
        swarm: record.swarm_id.clone(),
        job: job_id(record, job),
        state,
        backend_state: word,
        reason,
        nodes: nodes.collect(),
        backend: BackendKind::Slurm,
        provider: record.provider.clone(),
    }
}

/// A cluster whose task has ended.
pub(super) fn gone(ctx: &Context) -> Failure {
    let message =
        if ctx.shutdown().is_cancelled() { "the allocator is shutting down" } else { "the cluster's task has ended" };
    Failure::new(ErrorCode::ShuttingDown, message).hint("repeat the request")
}
