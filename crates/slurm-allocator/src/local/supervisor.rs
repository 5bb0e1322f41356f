//! The shell of one swarm: feeds the core, keeps its record on disk, and carries out what it decides.
//!
//! One task owns everything of the swarm. What happens outside reaches it through one bounded channel; a full one makes
//! the sender wait, and nobody but this task waits for it.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_service::Context;
use drover_types::{Failure, Generation, NodeIndex};
use rustix::process::Signal;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::Shared;
use super::launcher::Order;
use super::process::{self, Handle};
use super::recover::Search;
use crate::allocation::{Allocation, LaunchProgress};
use crate::core::{Effect, Input, Kill, Process, Step, Swarm};
use crate::store::{Record, StoreError};

/// Words that may wait for one swarm's task.
pub(super) const QUEUE: usize = 256;
/// Pause before a record that could not be written is tried again.
const STORE_AGAIN: Duration = Duration::from_secs(2);
/// A worker that finds another one on its node ends with this.
const NODE_TAKEN: i32 = 75;

/// What reaches a swarm's task.
#[derive(Debug)]
pub(super) enum Command {
    /// Something happened.
    Input(Input),
    /// The end is asked for; answered when that is on disk.
    Release { force: bool, answer: oneshot::Sender<Result<(), Failure>> },
}

pub(super) struct Supervisor {
    ctx: Context,
    shared: Arc<Shared>,
    /// The record but for its nodes, which are the core's.
    record: Record,
    core: Swarm,
    commands: mpsc::Receiver<Command>,
    /// For the tasks that watch processes; weak, so that the swarm's entry alone keeps the channel open.
    sender: mpsc::WeakSender<Command>,
    handles: BTreeMap<NodeIndex, Arc<Handle>>,
    store_again: Option<Instant>,
    forgotten: bool,
}

impl Supervisor {
    pub(super) fn new(
        ctx: &Context,
        shared: &Arc<Shared>,
        record: Record,
        core: Swarm,
        commands: mpsc::Receiver<Command>,
        sender: &mpsc::Sender<Command>,
    ) -> Self {
        Self {
            ctx: ctx.clone(),
            shared: Arc::clone(shared),
            record,
            core,
            commands,
            sender: sender.downgrade(),
            handles: BTreeMap::new(),
            store_again: None,
            forgotten: false,
        }
    }

    /// Runs until the swarm is forgotten or the daemon ends. The workers go on either way.
    pub(super) async fn run(mut self) {
        while !self.forgotten {
            let mut wake = self.core.next_deadline();
            if let Some(again) = self.store_again {
                wake = Some(wake.map_or(again, |wake| wake.min(again)));
            }
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let command = tokio::select! {
                () = self.ctx.shutdown().cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(command) => Some(command),
                    None => return,
                },
                () = timer => None,
            };
            let mut inputs = Vec::new();
            let mut next = command;
            // What else is waiting goes into the same step, and so into one write of the record.
            while let Some(command) = next {
                match command {
                    Command::Input(input) => inputs.push(input),
                    Command::Release { force, answer } => {
                        self.settle(std::mem::take(&mut inputs)).await;
                        let released = self.release(force).await;
                        let _ = answer.send(released);
                    }
                }
                next = if inputs.len() < QUEUE { self.commands.try_recv().ok() } else { None };
            }
            self.settle(inputs).await;
        }
    }

    /// Takes note of what happened and does what follows, until nothing follows any more.
    pub(super) async fn settle(&mut self, mut inputs: Vec<Input>) {
        loop {
            self.adopt(&inputs);
            let now = Instant::now();
            for input in inputs.drain(..) {
                note(&self.record, &self.shared, &input);
                self.core.apply(now, jitter(), input);
            }
            let step = self.core.advance(now);
            inputs = self.perform(step).await;
            if inputs.is_empty() {
                return;
            }
        }
    }

    /// Begins the end. The answer is a promise, so a record that cannot be written refuses it and nothing has changed.
    async fn release(&mut self, force: bool) -> Result<(), Failure> {
        let now = Instant::now();
        let mut trial = self.core.clone();
        trial.apply(now, jitter(), Input::Release { force });
        let step = trial.advance(now);
        if step.store {
            self.record.swarm = trial.record(now, drover_service::now_us());
            save_record(&self.shared, &self.record).await.map_err(|error| error.failure())?;
        }
        info!(swarm_id = %self.record.swarm_id, force, "releasing");
        self.core = trial;
        let inputs = self.perform(Step { store: false, effects: step.effects }).await;
        if !inputs.is_empty() {
            self.settle(inputs).await;
        }
        Ok(())
    }

    /// Stores, tells everybody, then carries out; returns what came of it.
    async fn perform(&mut self, step: Step) -> Vec<Input> {
        let mut trouble = None;
        if step.store {
            match save(&self.shared, &self.record, &self.core).await {
                Ok(()) => self.store_again = None,
                Err(error) => {
                    self.shared.metrics.store_failures.inc();
                    warn!(swarm_id = %self.record.swarm_id, error = error.failure().message, "cannot store, trying again");
                    self.core.not_stored();
                    self.store_again = Some(Instant::now() + STORE_AGAIN);
                    trouble = Some(error.failure().message);
                }
            }
        } else if self.store_again.is_some_and(|again| again <= Instant::now()) {
            self.store_again = None;
        }
        self.publish();
        let mut inputs = Vec::new();
        let mut orders = Vec::new();
        for effect in step.effects {
            match effect {
                Effect::Spawn { node, generation } => match &trouble {
                    // A start that is not on disk would be a worker that nobody finds again.
                    Some(why) => {
                        inputs.push(Input::NotStarted { node, generation, why: why.clone(), counts: false });
                    }
                    None => orders.push(self.order(node, generation)),
                },
                Effect::Signal { node, generation, process, kill } => {
                    inputs.extend(self.signal(node, generation, process, kill).await);
                }
                Effect::Progress { stage, message } => {
                    let swarm = self.record.swarm_id.clone();
                    self.shared.board.progress(LaunchProgress { swarm, stage, message });
                }
                Effect::Forget => self.forget().await,
            }
        }
        if !orders.is_empty() {
            inputs.extend(self.start(orders).await);
        }
        inputs
    }

    fn order(&self, node: NodeIndex, generation: Generation) -> Order {
        Order {
            swarm: self.record.swarm_id.clone(),
            job: self.record.job_id.clone(),
            agent: self.record.agent,
            settings: self.record.settings.clone(),
            node,
            generation,
        }
    }

    async fn start(&mut self, orders: Vec<Order>) -> Vec<Input> {
        let shared = Arc::clone(&self.shared);
        let asked: Vec<_> = orders.iter().map(|order| (order.node, order.generation)).collect();
        let started = tokio::task::spawn_blocking(move || {
            let start = |order: Order| {
                let started = shared.launcher.start(&order).and_then(|mut child| match Handle::of_child(&child) {
                    Ok(handle) => Ok((child, handle)),
                    Err(error) => {
                        // A process that cannot be watched must not run.
                        let _ = child.kill();
                        let _ = child.wait();
                        Err(format!("its process cannot be watched: {error}"))
                    }
                });
                (order.node, order.generation, started)
            };
            orders.into_iter().map(start).collect::<Vec<_>>()
        });
        let started = started.await.unwrap_or_else(|error| {
            let why = format!("the start was interrupted: {error}");
            asked.into_iter().map(|(node, generation)| (node, generation, Err(why.clone()))).collect()
        });
        let mut inputs = Vec::new();
        for (node, generation, started) in started {
            match started {
                Ok((child, handle)) => {
                    self.shared.metrics.worker_starts.inc();
                    let process = handle.process();
                    info!(swarm_id = %self.record.swarm_id, node_id = %node, %generation, pid = process.pid, "worker started");
                    self.watch(node, generation, handle, Some(child));
                    inputs.push(Input::Spawned { node, generation, process });
                }
                Err(why) => {
                    self.shared.metrics.worker_start_failures.inc();
                    warn!(swarm_id = %self.record.swarm_id, node_id = %node, why, "worker cannot be started");
                    inputs.push(Input::NotStarted { node, generation, why, counts: true });
                }
            }
        }
        inputs
    }

    /// Watches the processes that were found and not started by us.
    fn adopt(&mut self, inputs: &[Input]) {
        for input in inputs {
            let Input::Found { node, generation, process: Some(process) } = *input else { continue };
            match Handle::adopt(process) {
                Ok(Some(handle)) => self.watch(node, generation, handle, None),
                // It ended between the look and now.
                Ok(None) => self.later(Input::Ended {
                    node,
                    generation,
                    how: "ended while it was taken up again".into(),
                    tail: String::new(),
                }),
                Err(error) => self.ctx.fail(anyhow::Error::new(error).context("a worker cannot be watched")),
            }
        }
    }

    /// Reports the end of a process when it comes.
    fn watch(&mut self, node: NodeIndex, generation: Generation, handle: Handle, child: Option<Child>) {
        let handle = Arc::new(handle);
        self.handles.insert(node, Arc::clone(&handle));
        let shared = Arc::clone(&self.shared);
        let record = self.record.clone();
        let sender = self.sender.clone();
        let shutdown = self.ctx.shutdown().clone();
        self.ctx.spawn("worker_watch", async move {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = handle.ended() => {}
            }
            let process = handle.process();
            let explained =
                tokio::task::spawn_blocking(move || post_mortem(&shared, &record, node, generation, process, child));
            let Ok((how, tail)) = explained.await else { return };
            if let Some(sender) = sender.upgrade() {
                let _ = sender.send(Command::Input(Input::Ended { node, generation, how, tail })).await;
            }
        });
    }

    /// Puts a word into our own queue without waiting for room, which only we could make.
    fn later(&self, input: Input) {
        let sender = self.sender.clone();
        self.ctx.spawn("supervisor_word", async move {
            if let Some(sender) = sender.upgrade() {
                let _ = sender.send(Command::Input(input)).await;
            }
        });
    }

    async fn signal(&self, node: NodeIndex, generation: Generation, process: Process, kill: Kill) -> Option<Input> {
        let handle = self.handles.get(&node).filter(|handle| handle.process() == process)?;
        let swarm = &self.record.swarm_id;
        match kill {
            Kill::Term => match handle.signal(Signal::TERM) {
                Ok(true) => {
                    debug!(swarm_id = %swarm, node_id = %node, pid = process.pid, "worker asked to drain");
                    return Some(Input::TermSent { node, generation });
                }
                Ok(false) => {}
                Err(error) => warn!(swarm_id = %swarm, node_id = %node, %error, "worker cannot be asked to end"),
            },
            Kill::Kill => {
                self.shared.metrics.worker_kills.inc();
                info!(swarm_id = %swarm, node_id = %node, pid = process.pid, "killing a worker");
                match super::flatten(tokio::task::spawn_blocking(move || process::kill_tree(process)).await) {
                    Ok(()) => {}
                    Err(error) => warn!(swarm_id = %swarm, node_id = %node, %error, "worker cannot be killed"),
                }
            }
        }
        None
    }

    async fn forget(&mut self) {
        let shared = Arc::clone(&self.shared);
        let swarm = self.record.swarm_id.clone();
        let nodes = self.record.swarm.nodes.len() as u32;
        let removed = tokio::task::spawn_blocking(move || {
            shared.launcher.withdraw(&swarm, nodes);
            shared.store.remove(&swarm)
        });
        let removed = removed.await;
        if let Ok(Err(error)) = removed {
            // It is over all the same; the next start reads the record once more and tries again.
            warn!(swarm_id = %self.record.swarm_id, error = error.failure().message, "a record cannot be removed");
        }
        self.shared.board.forget(&self.record.swarm_id);
        self.forgotten = true;
    }

    fn publish(&mut self) {
        let running: Vec<Process> = self.core.running().map(|(_, _, process)| process).collect();
        self.handles.retain(|_, handle| running.contains(&handle.process()));
        let (state, reason) = self.core.state();
        self.shared.board.put(Allocation {
            swarm: self.record.swarm_id.clone(),
            job: self.record.job_id.clone(),
            state,
            backend_state: state.word().to_owned(),
            reason,
            nodes: self.core.nodes(&self.shared.host),
            backend: self.record.backend,
            provider: self.record.provider.clone(),
        });
    }
}

/// Writes the record of a swarm and returns when the disk has it.
pub(super) async fn save(shared: &Arc<Shared>, record: &Record, core: &Swarm) -> Result<(), StoreError> {
    let swarm = core.record(Instant::now(), drover_service::now_us());
    save_record(shared, &Record { swarm, ..record.clone() }).await
}

async fn save_record(shared: &Arc<Shared>, record: &Record) -> Result<(), StoreError> {
    let shared = Arc::clone(shared);
    let record = record.clone();
    let saved = tokio::task::spawn_blocking(move || shared.store.save(&record)).await;
    saved
        .unwrap_or_else(|error| Err(StoreError::Io { path: "the record".into(), source: std::io::Error::other(error) }))
}

/// Says how a process ended and clears away what it left. An own child is reaped last: until then its pid, and with it
/// the name of its process group, belongs to nobody else.
fn post_mortem(
    shared: &Shared,
    record: &Record,
    node: NodeIndex,
    generation: Generation,
    process: Process,
    child: Option<Child>,
) -> (String, String) {
    let leftovers = process::kill_leftovers(process);
    if leftovers > 0 {
        info!(swarm_id = %record.swarm_id, node_id = %node, leftovers, "killed what a worker had left running");
    }
    let mut how = "ended; an earlier allocator had started it, so nothing more is known".to_owned();
    if let Some(mut child) = child {
        match child.wait() {
            Ok(status) => {
                how = match status.code() {
                    Some(NODE_TAKEN) => "found another worker on its node".into(),
                    _ => describe(status),
                };
                // One that ended by itself may have done so because a worker that nobody supervises is in its way.
                if status.code().is_some_and(|code| code != 0)
                    && let Ok(Some(evicted)) = search(shared, record).evict(node, generation)
                {
                    how = format!("{how}; {evicted}");
                }
            }
            Err(error) => how = format!("ended, and the system does not say how: {error}"),
        }
    }
    (how, shared.launcher.log_words(&record.swarm_id, node))
}

fn search<'a>(shared: &'a Shared, record: &'a Record) -> Search<'a> {
    Search {
        mailbox: shared.launcher.mailbox(),
        host: &shared.host,
        swarm: &record.swarm_id,
        job: &record.job_id,
        same_boot: true,
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("ended with signal {signal}"),
        (None, Some(0)) => "ended with exit code 0".into(),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended in a way that the system does not explain".into(),
    }
}

fn note(record: &Record, shared: &Shared, input: &Input) {
    if let Input::Ended { node, generation, how, .. } = input {
        if record.swarm.release.is_none() {
            shared.metrics.worker_deaths.inc();
        }
        info!(swarm_id = %record.swarm_id, node_id = %node, %generation, "worker {how}");
    }
}

/// A number in 0..1 that differs between restarts.
fn jitter() -> f64 {
    (Uuid::new_v4().as_u128() >> 64) as u64 as f64 / u64::MAX as f64
}
