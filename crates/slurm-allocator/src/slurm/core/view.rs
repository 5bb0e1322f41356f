//! How a swarm is seen from outside: its state, Slurm's word for it, why and since when.

use drover_types::Generation;

use super::swarm::{Job, Phase, Swarm};
use super::{Controller, Micros};
use crate::allocation::{AllocationState, WorkerState};
use crate::slurm::parse::hosts;
use crate::slurm::state::Class;

/// What the common words mean that Slurm has for "not yet".
const REASONS: &[(&str, &str)] = &[
    ("Resources", "waits for nodes to become free"),
    ("Priority", "jobs of higher priority are before it"),
    ("Dependency", "another job has to end first"),
    ("BeginTime", "it may not begin before its time"),
    ("JobHeldUser", "it is held: `scontrol release` lets it go on"),
    ("JobHeldAdmin", "an administrator holds it"),
    ("ReqNodeNotAvail", "a node that it needs is not available"),
    ("PartitionDown", "the partition is down"),
    ("PartitionInactive", "the partition is inactive"),
    ("PartitionNodeLimit", "it asks for more nodes than the partition gives"),
    ("PartitionTimeLimit", "its time limit is longer than the partition allows"),
    ("PartitionConfig", "it asks for what the partition does not allow"),
    ("AssocGrpNodeLimit", "the account has all the nodes that it may have"),
    ("AssocMaxJobsLimit", "the account has all the jobs that it may have"),
    ("QOSMaxJobsPerUserLimit", "the user has all the jobs that the quality of service allows"),
    ("QOSMaxNodePerUserLimit", "the user has all the nodes that the quality of service allows"),
    ("Reservation", "it waits for its reservation"),
    ("launch failed requeued held", "its start failed on a node; it is held"),
];

/// Of nodes whose workers are to come again.
const PUT_BACK: &str = "its job was put back into the queue";

/// One swarm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    /// Its job, once it has one.
    pub(crate) job: Option<u64>,
    pub(crate) state: AllocationState,
    /// Slurm's word.
    pub(crate) word: String,
    /// Why; may be empty.
    pub(crate) reason: String,
    /// Its nodes, by index.
    pub(crate) nodes: Vec<NodeView>,
    /// Nothing more will happen to it.
    pub(crate) over: bool,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeView {
    pub(crate) host: String,
    pub(crate) generation: Generation,
    pub(crate) state: WorkerState,
    pub(crate) reason: String,
    pub(crate) pid: u32,
}

impl Swarm {
    pub(super) fn view(&self, controller: &Controller) -> View {
        let (state, word, mut reason) = self.state();
        let over = self.is_over();
        if let (false, Some((since, why))) = (over, &controller.down) {
            let last = if self.job.is_some() { format!("; {word} is what was last seen") } else { String::new() };
            let and = if reason.is_empty() { String::new() } else { format!(". {reason}") };
            reason = format!("Slurm cannot be reached since {}: {why}{last}{and}", utc(*since));
        }
        let mut nodes = self.node_views(state);
        let of_all = match (over, &controller.down) {
            (false, Some((since, _))) => format!("Slurm cannot be reached since {}", utc(*since)),
            (false, None) if self.is_in_doubt() => reason.clone(),
            _ => String::new(),
        };
        // Also where only the nodes of a running swarm are looked at.
        for node in nodes.iter_mut().filter(|_| !of_all.is_empty()) {
            match node.reason.as_str() {
                "" => node.reason.clone_from(&of_all),
                PUT_BACK => node.reason = format!("{PUT_BACK}: {of_all}"),
                _ => {}
            }
        }
        View { job: self.job_id(), state, word, reason, nodes, over }
    }

    /// A job that has run, and of which something else is to be said than that it does.
    fn is_in_doubt(&self) -> bool {
        let class = self.job.as_ref().filter(|job| job.ran).map(|job| job.state.class());
        let odd = matches!(class, Some(Class::Waiting | Class::Preparing | Class::Halted | Class::Unknown));
        odd || matches!(self.phase, Phase::Missing { .. })
    }

    fn state(&self) -> (AllocationState, String, String) {
        let pending = |reason: &str| (AllocationState::Pending, "PENDING".to_owned(), reason.to_owned());
        let (state, word, reason) = match (&self.phase, &self.job) {
            (Phase::Over(over), _) => {
                let state = if over.well { AllocationState::Completed } else { AllocationState::Failed };
                return (state, over.word.clone(), over.reason.clone());
            }
            (Phase::Wanted { .. }, _) => pending("not submitted yet: the queue is looked at first"),
            (Phase::Submitting { .. }, _) => pending("being submitted"),
            (Phase::Unsure { why, .. }, _) => pending(&format!(
                "whether there is a job is not known ({why}): the queue and the history are asked before anything is submitted \
                 again"
            )),
            (Phase::Missing { since, .. }, Some(job)) => {
                let (state, word, _) = Self::of_job(job);
                let reason = format!(
                    "the queue no longer has job {} since {}: how it ended is being asked",
                    job.id,
                    utc(*since)
                );
                (state, word, reason)
            }
            (_, Some(job)) => Self::of_job(job),
            (_, None) => pending(""),
        };
        match self.release {
            Some(_) => {
                let how = if reason.is_empty() { String::new() } else { format!("; {reason}") };
                (AllocationState::Completing, word, format!("its end was asked for{how}"))
            }
            None => (state, word, reason),
        }
    }

    fn of_job(job: &Job) -> (AllocationState, String, String) {
        let since = utc(job.since_us);
        let words = job.state.words();
        let slurm_says = if matches!(job.reason.as_str(), "" | "None") { "" } else { job.reason.as_str() };
        let (state, reason) = match job.state.class() {
            Class::Waiting => {
                let known = REASONS.iter().find(|(word, _)| slurm_says.starts_with(word)).map(|(_, words)| *words);
                let why = match (slurm_says.is_empty(), known) {
                    (true, _) => "Slurm gives no reason yet".to_owned(),
                    (false, None) => slurm_says.to_owned(),
                    (false, Some(words)) => format!("{slurm_says}: {words}"),
                };
                let again = if job.ran { "; it ran before and was put back" } else { "" };
                let starts = if job.starts.is_empty() {
                    String::new()
                } else {
                    format!("; Slurm expects its start at {}", job.starts)
                };
                let words = if words.is_empty() { String::new() } else { format!("; {words}") };
                (AllocationState::Pending, format!("waits since {since}: {why}{words}{again}{starts}"))
            }
            Class::Preparing => (AllocationState::Pending, format!("{words} since {since}")),
            Class::Running => (AllocationState::Running, words),
            Class::Halted => (AllocationState::Running, format!("{words}, since {since}")),
            Class::Ending | Class::Over(_) => (AllocationState::Completing, words),
            Class::Unknown if job.ran => (AllocationState::Running, words),
            Class::Unknown => (AllocationState::Pending, words),
        };
        (state, job.state.as_str().to_owned(), reason)
    }

    fn node_views(&self, state: AllocationState) -> Vec<NodeView> {
        // Tasks are laid over the nodes in their order, one each.
        let named = self.job.as_ref().map(|job| hosts::expand(&job.hosts, self.nodes as usize)).unwrap_or_default();
        let ran = self.job.as_ref().is_some_and(|job| job.ran);
        (0..self.nodes)
            .map(|index| {
                let claim = self.claims.iter().find(|claim| claim.node.0 == index);
                let host = claim.map(|claim| claim.host.clone()).or_else(|| named.get(index as usize).cloned());
                let end = claim.and_then(|claim| claim.end.as_ref());
                let ended = end.and_then(|end| {
                    let state = match end.state.as_str() {
                        "restarting" => WorkerState::Restarting,
                        "failed" => WorkerState::Failed,
                        "ended" => WorkerState::Exited,
                        _ => return None,
                    };
                    Some((state, end.reason.as_str()))
                });
                let (state, reason) = match (state, claim) {
                    (AllocationState::Running, Some(_)) if ended.is_some() => {
                        ended.unwrap_or((WorkerState::Running, ""))
                    }
                    (AllocationState::Completed, _) => (WorkerState::Exited, ""),
                    (AllocationState::Failed, _) => (WorkerState::Failed, "its job has failed"),
                    (AllocationState::Pending, Some(_)) if ran => (WorkerState::Restarting, PUT_BACK),
                    (AllocationState::Pending, None) => (WorkerState::Pending, ""),
                    (_, Some(_)) => (WorkerState::Running, ""),
                    (_, None) => (WorkerState::Pending, "its worker has not come up yet"),
                };
                NodeView {
                    host: host.unwrap_or_default(),
                    generation: claim.map_or(Generation(0), |claim| claim.generation),
                    pid: claim.filter(|_| state == WorkerState::Running).map_or(0, |claim| claim.pid),
                    state,
                    reason: reason.to_owned(),
                }
            })
            .collect()
    }
}

/// A time for people.
pub(super) fn utc(at: Micros) -> String {
    let at = i64::try_from(at).ok().and_then(|at| jiff::Timestamp::from_microsecond(at).ok());
    at.map_or_else(String::new, |at| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}
