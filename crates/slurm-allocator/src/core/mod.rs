//! The supervisor of one allocation as a state machine: no clock, no files, no processes, no randomness.
//!
//! The shell reports what happened with [`Swarm::apply`] and then calls [`Swarm::advance`], which decides everything that
//! is due. The answer is a [`Step`]: first the record must be on disk when `store` says so, then the effects are carried
//! out and their outcome is reported back.
//!
//! ```text
//! Waiting ── due: generation + 1, store ──> Starting ── Spawned ──> Running ── Ended ──> Waiting | Failed
//!    ^                                         │ NotStarted                      │ released
//!    └─────────────────────────────────────────┘                                 └──────> Exited
//! ```
//!
//! Two rules make a second worker of one node impossible as far as it depends on us: a start is stored before it is
//! carried out, and a node leaves `Starting` or `Running` only when its process is known not to be there.

mod backoff;
mod node;
mod record;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use drover_types::{Generation, NodeIndex};

use crate::allocation::{AllocatedNode, AllocationState, WorkerState};
use crate::walltime;

pub(crate) use node::Process;
use node::{Node, Phase, Term};
pub(crate) use record::{NodeRecord, PhaseRecord, ReleaseRecord, SwarmRecord};

/// The settings of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Restarts in a row before a node is given up.
    pub(crate) max_restarts: u32,
    /// Pause before the first restart; doubles with each.
    pub(crate) restart_delay: Duration,
    /// A worker that ran this long has its restarts forgiven.
    pub(crate) healthy_after: Duration,
    /// From the request to end until the kill.
    pub(crate) kill_after: Duration,
    /// How long an allocation that is over stays known.
    pub(crate) keep_over: Duration,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// A look at the mailbox and the process table before the first step: the highest generation that ever was, and the
    /// process of it that lives.
    Found { node: NodeIndex, generation: Generation, process: Option<Process> },
    /// A start was carried out.
    Spawned { node: NodeIndex, generation: Generation, process: Process },
    /// A start was not carried out. One that counts is a failure of the node, else the trouble is ours.
    NotStarted { node: NodeIndex, generation: Generation, why: String, counts: bool },
    /// The process of a node is gone. `how` reads on after "worker ", `tail` is where its log is and what that ended with.
    Ended { node: NodeIndex, generation: Generation, how: String, tail: String },
    /// The request to end has reached the process.
    TermSent { node: NodeIndex, generation: Generation },
    /// The swarm's end is asked for.
    Release { force: bool },
}

/// Which signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kill {
    /// The worker is to drain and end.
    Term,
    /// The worker and what it started are to be gone.
    Kill,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Start a worker process. Comes only in a step that stores.
    Spawn { node: NodeIndex, generation: Generation },
    /// Send a signal to exactly this process.
    Signal { node: NodeIndex, generation: Generation, process: Process, kill: Kill },
    /// Say how the launch goes.
    Progress { stage: &'static str, message: String },
    /// The allocation has been over for long enough: remove its record.
    Forget,
}

/// Outcome of [`Swarm::advance`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// The record changed and must be on disk before the effects.
    pub(crate) store: bool,
    /// What to do, in order.
    pub(crate) effects: Vec<Effect>,
}

/// The end of a swarm, once asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Release {
    force: bool,
    kill_at: Instant,
}

/// The time limit of a swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit {
    length: Duration,
    at: Instant,
    /// It was what ended the swarm.
    reached: bool,
}

/// How long after a kill it is repeated; a process in uninterruptible sleep takes its time.
const KILL_AGAIN: Duration = Duration::from_secs(5);
/// Pause before a start that failed for a reason of ours, such as a full disk, is tried again.
const OUR_TROUBLE_DELAY: Duration = Duration::from_secs(2);

/// The supervisor of one allocation.
#[derive(Debug, Clone)]
pub(crate) struct Swarm {
    policy: Policy,
    nodes: Vec<Node>,
    release: Option<Release>,
    limit: Option<Limit>,
    over: Option<Instant>,
    /// "Ready" was said.
    announced: bool,
    /// Something changed that the record holds.
    dirty: bool,
    progress: Vec<Effect>,
}

impl Swarm {
    /// A swarm none of whose nodes ever ran; it ends by itself after `limit`.
    pub(crate) fn new(policy: Policy, node_count: u32, limit: Option<Duration>, now: Instant) -> Self {
        let limit = limit.and_then(|length| Some(Limit { length, at: now.checked_add(length)?, reached: false }));
        let nodes = (0..node_count).map(|index| Node::new(NodeIndex(index), now)).collect();
        Self { policy, nodes, release: None, limit, over: None, announced: false, dirty: true, progress: Vec::new() }
    }

    /// Takes note of what happened. Words about a generation that is no longer the node's are void.
    pub(crate) fn apply(&mut self, now: Instant, jitter: f64, input: Input) {
        let Self { policy, nodes, release, dirty, .. } = self;
        let released = release.is_some();
        match input {
            Input::Found { node, generation, process } => {
                if let Some(found) = nodes.get_mut(node.0 as usize) {
                    *dirty |= found.found(policy, now, jitter, generation, process, released);
                }
            }
            Input::Spawned { node, generation, process } => {
                if let Some(found) = find(nodes, node, generation)
                    && found.phase == Phase::Starting
                {
                    found.spawned(now, process);
                    *dirty = true;
                    self.say_running(node, process);
                }
            }
            Input::NotStarted { node, generation, why, counts } => {
                if let Some(found) = find(nodes, node, generation)
                    && found.phase == Phase::Starting
                {
                    if released {
                        found.exited("not started: the swarm was released first".into());
                    } else if counts {
                        found.failed_once(policy, now, jitter, &format!("could not be started: {why}"), "");
                    } else {
                        found.wait(now + OUR_TROUBLE_DELAY, format!("not started: {why}; tried again"));
                    }
                    *dirty = true;
                }
            }
            Input::Ended { node, generation, how, tail } => {
                if let Some(found) = find(nodes, node, generation)
                    && matches!(found.phase, Phase::Running { .. })
                {
                    found.ended(policy, now, jitter, &how, &tail, released);
                    *dirty = true;
                }
            }
            Input::TermSent { node, generation } => {
                if let Some(found) = find(nodes, node, generation)
                    && let Phase::Running { term, .. } = &mut found.phase
                {
                    *term = Term::Sent;
                    *dirty = true;
                }
            }
            Input::Release { force } => self.begin_release(now, force),
        }
    }

    /// Decides everything that is due.
    pub(crate) fn advance(&mut self, now: Instant) -> Step {
        self.end_at_limit(now);
        let mut effects = std::mem::take(&mut self.progress);
        let release = self.release;
        for node in &mut self.nodes {
            self.dirty |= node.advance(&self.policy, now, release.map(|r| (r.force, r.kill_at)), &mut effects);
        }
        if self.over.is_none() && self.nodes.iter().all(Node::is_over) {
            self.over = Some(now);
            self.dirty = true;
        }
        self.announce(&mut effects);
        if self.over.is_some_and(|over| over + self.policy.keep_over <= now) {
            effects.push(Effect::Forget);
        }
        Step { store: std::mem::take(&mut self.dirty), effects }
    }

    /// When [`Self::advance`] has something to do even if nothing happens.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let kill_at = self.release.map(|release| release.kill_at);
        let nodes = self.nodes.iter().filter_map(|node| node.deadline(&self.policy, kill_at));
        let limit = self.limit.filter(|_| self.release.is_none() && self.over.is_none()).map(|limit| limit.at);
        nodes.chain(self.over.map(|over| over + self.policy.keep_over)).chain(limit).min()
    }

    /// Its state and, when there is something to say, why.
    pub(crate) fn state(&self) -> (AllocationState, String) {
        let failed = self.nodes.iter().filter(|node| matches!(node.phase, Phase::Failed)).count();
        let first_failure =
            || self.nodes.iter().find(|n| matches!(n.phase, Phase::Failed)).map_or("", |n| n.reason.as_str());
        if self.over.is_some() {
            return if failed == self.nodes.len() {
                (AllocationState::Failed, format!("every node was given up, the first: {}", first_failure()))
            } else {
                let how = if self.release.is_some_and(|r| r.force) { "released at once" } else { "released" };
                (AllocationState::Completed, self.limit_words().unwrap_or_else(|| how.into()))
            };
        }
        if let Some(release) = self.release {
            let how = if release.force { "workers are being killed" } else { "workers are draining" };
            let reason = self.limit_words().map_or_else(|| how.into(), |limit| format!("{limit}; {how}"));
            return (AllocationState::Completing, reason);
        }
        let reason = if failed == 0 {
            String::new()
        } else {
            format!("{failed} of {} nodes given up, the first: {}", self.nodes.len(), first_failure())
        };
        let any_ran = self.nodes.iter().any(|node| node.ran);
        (if any_ran { AllocationState::Running } else { AllocationState::Pending }, reason)
    }

    /// Its nodes as watchers are told of them.
    pub(crate) fn nodes(&self, host: &str) -> Vec<AllocatedNode> {
        self.nodes.iter().map(|node| node.view(host)).collect()
    }

    /// The processes that run as far as is known.
    pub(crate) fn running(&self) -> impl Iterator<Item = (NodeIndex, Generation, Process)> {
        self.nodes.iter().filter_map(|node| match node.phase {
            Phase::Running { process, .. } => Some((node.index, node.generation, process)),
            _ => None,
        })
    }

    /// The record could not be written: the next step stores again.
    pub(crate) fn not_stored(&mut self) {
        self.dirty = true;
    }

    fn begin_release(&mut self, now: Instant, force: bool) {
        if self.over.is_some() {
            return;
        }
        let asked = self.release.get_or_insert_with(|| {
            self.dirty = true;
            Release { force, kill_at: now + self.policy.kill_after }
        });
        if force && !asked.force {
            asked.force = true;
            self.dirty = true;
        }
    }

    /// Its time is up: its workers drain as for a release that was asked for.
    fn end_at_limit(&mut self, now: Instant) {
        if self.release.is_none()
            && self.over.is_none()
            && let Some(limit) = self.limit.as_mut().filter(|limit| limit.at <= now)
        {
            limit.reached = true;
            self.begin_release(now, false);
        }
    }

    fn limit_words(&self) -> Option<String> {
        let limit = self.limit.filter(|limit| limit.reached)?;
        Some(format!("its time limit of {} was reached", walltime::words(limit.length)))
    }

    fn say_running(&mut self, node: NodeIndex, process: Process) {
        if self.announced {
            return;
        }
        let running = self.running().count();
        let message = format!("node {node} is process {}; {running} of {} run", process.pid, self.nodes.len());
        self.progress.push(Effect::Progress { stage: "submitting", message });
    }

    /// Says once how the launch went, when each node has either run or been given up.
    fn announce(&mut self, effects: &mut Vec<Effect>) {
        if self.announced || !self.nodes.iter().all(|node| node.ran || node.is_over()) {
            return;
        }
        self.announced = true;
        let views = self.nodes("");
        let count = |state| views.iter().filter(|node| node.state == state).count();
        let (running, failed) = (count(WorkerState::Running), count(WorkerState::Failed));
        let given_up = if failed > 0 { format!(", {failed} given up") } else { String::new() };
        let message = format!("{running} of {} workers run{given_up}", views.len());
        effects.push(Effect::Progress { stage: "ready", message });
    }
}

/// The node, when this is still its generation.
fn find(nodes: &mut [Node], node: NodeIndex, generation: Generation) -> Option<&mut Node> {
    nodes.get_mut(node.0 as usize).filter(|found| found.generation == generation)
}
