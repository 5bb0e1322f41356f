//! One node of an allocation.

use std::time::Instant;

use drover_types::{Generation, NodeIndex};
use serde::{Deserialize, Serialize};

use super::backoff::{delay, human};
use super::{Effect, KILL_AGAIN, Kill, Policy};
use crate::allocation::{AllocatedNode, WorkerState};

/// A process that cannot be mistaken for a later one of the same pid on this host and boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Process {
    /// The pid.
    pub(crate) pid: u32,
    /// Clock ticks between boot and its start.
    pub(crate) start_time: u64,
}

/// Where a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// No process; the next start is due at this time.
    Waiting { due: Instant },
    /// A start was decided; whether a process came of it is not known yet.
    Starting,
    /// Its process runs as far as is known.
    Running { process: Process, since: Instant, term: Term, kill_again: Option<Instant> },
    /// No process any more, as asked.
    Exited,
    /// No process any more: given up.
    Failed,
}

/// Whether a running process was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Term {
    No,
    /// The shell was told to; a crash now loses that, and it is told again.
    Asked,
    /// It has reached the process. Never sent twice: the second one would cut the drain short.
    Sent,
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) index: NodeIndex,
    /// The highest generation that was ever started.
    pub(super) generation: Generation,
    pub(super) phase: Phase,
    pub(super) restarts: u32,
    /// A process of it ran at some time.
    pub(super) ran: bool,
    pub(super) reason: String,
}

impl Node {
    pub(super) fn new(index: NodeIndex, now: Instant) -> Self {
        Self {
            index,
            generation: Generation(0),
            phase: Phase::Waiting { due: now },
            restarts: 0,
            ran: false,
            reason: String::new(),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Exited | Phase::Failed)
    }

    pub(super) fn spawned(&mut self, now: Instant, process: Process) {
        self.phase = Phase::Running { process, since: now, term: Term::No, kill_again: None };
        self.ran = true;
        self.reason.clear();
    }

    pub(super) fn exited(&mut self, reason: String) {
        self.phase = Phase::Exited;
        self.reason = reason;
    }

    pub(super) fn wait(&mut self, due: Instant, reason: String) {
        self.phase = Phase::Waiting { due };
        self.reason = reason;
    }

    /// Compares what was remembered with what is there. True when something changed.
    pub(super) fn found(
        &mut self,
        policy: &Policy,
        now: Instant,
        jitter: f64,
        generation: Generation,
        process: Option<Process>,
        released: bool,
    ) -> bool {
        let newer = generation > self.generation;
        self.generation = self.generation.max(generation);
        match (&self.phase, process) {
            (Phase::Running { process: known, .. }, Some(process)) if *known == process => newer,
            (Phase::Waiting { .. } | Phase::Starting | Phase::Running { .. }, Some(process)) => {
                self.spawned(now, process);
                true
            }
            (Phase::Running { .. }, None) => {
                self.ended(policy, now, jitter, "ended while no allocator was running", "", released);
                true
            }
            (Phase::Starting, None) => {
                // The allocator ended between the decision and the start. Nobody failed.
                self.wait(now, "the allocator was restarted before the worker was".into());
                true
            }
            (Phase::Waiting { .. }, None) | (Phase::Exited | Phase::Failed, _) => newer,
        }
    }

    pub(super) fn ended(&mut self, policy: &Policy, now: Instant, jitter: f64, how: &str, tail: &str, released: bool) {
        if released {
            self.exited(format!("worker {how}"));
            return;
        }
        if let Phase::Running { since, .. } = self.phase
            && now.saturating_duration_since(since) >= policy.healthy_after
        {
            self.restarts = 0;
        }
        self.failed_once(policy, now, jitter, how, tail);
    }

    /// One more failure in a row: a restart after a pause, or the end.
    pub(super) fn failed_once(&mut self, policy: &Policy, now: Instant, jitter: f64, how: &str, tail: &str) {
        if self.restarts >= policy.max_restarts {
            let tail = if tail.is_empty() { String::new() } else { format!("; {tail}") };
            self.phase = Phase::Failed;
            self.reason = match policy.max_restarts {
                0 => format!("worker {how}; worker.max_restarts allows no restart{tail}"),
                max => format!("worker {how}; given up after {max} restarts{tail}"),
            };
            return;
        }
        self.restarts += 1;
        let pause = delay(policy.restart_delay, self.restarts, jitter);
        let reason = format!("worker {how}; restart {} of {} in {}", self.restarts, policy.max_restarts, human(pause));
        self.wait(now + pause, reason);
    }

    /// Does what is due. True when the record changed.
    pub(super) fn advance(
        &mut self,
        policy: &Policy,
        now: Instant,
        release: Option<(bool, Instant)>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let (node, generation) = (self.index, self.generation);
        match (&mut self.phase, release) {
            (Phase::Waiting { .. }, Some(_)) => {
                self.exited("no worker was running when the swarm was released".into());
                true
            }
            (Phase::Waiting { due }, None) if *due <= now => {
                self.generation = generation.next();
                self.phase = Phase::Starting;
                effects.push(Effect::Spawn { node, generation: self.generation });
                true
            }
            (Phase::Running { process, term, kill_again, .. }, Some((force, kill_at))) => {
                let process = *process;
                if force || kill_at <= now {
                    if kill_again.is_none_or(|again| again <= now) {
                        *kill_again = Some(now + KILL_AGAIN);
                        effects.push(Effect::Signal { node, generation, process, kill: Kill::Kill });
                    }
                } else if *term == Term::No {
                    *term = Term::Asked;
                    effects.push(Effect::Signal { node, generation, process, kill: Kill::Term });
                }
                false
            }
            (Phase::Running { since, .. }, None)
                if self.restarts > 0 && now.saturating_duration_since(*since) >= policy.healthy_after =>
            {
                self.restarts = 0;
                true
            }
            _ => false,
        }
    }

    pub(super) fn deadline(&self, policy: &Policy, kill_at: Option<Instant>) -> Option<Instant> {
        match (&self.phase, kill_at) {
            (Phase::Waiting { due }, _) => Some(*due),
            (Phase::Running { kill_again, .. }, Some(kill_at)) => Some(kill_again.unwrap_or(kill_at)),
            (Phase::Running { since, .. }, None) if self.restarts > 0 => Some(*since + policy.healthy_after),
            _ => None,
        }
    }

    pub(super) fn view(&self, host: &str) -> AllocatedNode {
        let state = match self.phase {
            Phase::Waiting { .. } | Phase::Starting if self.restarts == 0 && !self.ran => WorkerState::Pending,
            Phase::Waiting { .. } | Phase::Starting => WorkerState::Restarting,
            Phase::Running { .. } => WorkerState::Running,
            Phase::Exited => WorkerState::Exited,
            Phase::Failed => WorkerState::Failed,
        };
        let pid = if let Phase::Running { process, .. } = self.phase { process.pid } else { 0 };
        AllocatedNode {
            node: self.index,
            host: host.to_owned(),
            generation: self.generation,
            state,
            reason: self.reason.clone(),
            pid,
            restarts: self.restarts,
        }
    }
}
