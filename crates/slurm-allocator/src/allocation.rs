//! What watchers are told of an allocation: the same words for every backend.

use drover_types::{Generation, JobId, NodeIndex, SwarmId};

use crate::catalogue::BackendKind;

/// State of an allocation, in the words of Slurm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocationState {
    /// No worker has run yet.
    Pending,
    /// It has its resources; single workers may be down.
    Running,
    /// Its end was asked for, some workers still run.
    Completing,
    /// Over, as asked.
    Completed,
    /// Over, because every worker was given up.
    Failed,
}

impl AllocationState {
    /// The word that Slurm has for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Running => "RUNNING",
            Self::Completing => "COMPLETING",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
        }
    }
}

/// What one node's worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerState {
    /// Waits for its first start.
    Pending,
    /// Runs.
    Running,
    /// Ended and will be started again.
    Restarting,
    /// Ended as asked.
    Exited,
    /// Given up.
    Failed,
}

/// One node of an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocatedNode {
    /// Its index.
    pub node: NodeIndex,
    /// Where its worker runs, or is to run.
    pub host: String,
    /// Incarnation of its worker; 0 before the first.
    pub generation: Generation,
    /// What the worker is doing.
    pub state: WorkerState,
    /// Why; may be empty.
    pub reason: String,
    /// Its process, while there is one; else 0.
    pub pid: u32,
    /// Starts used up after failures.
    pub restarts: u32,
}

/// One allocation as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The swarm it belongs to.
    pub swarm: SwarmId,
    /// The backend's name for it.
    pub job: JobId,
    /// Its state.
    pub state: AllocationState,
    /// The backend's own word for the state.
    pub backend_state: String,
    /// Why; may be empty.
    pub reason: String,
    /// Its nodes, by index.
    pub nodes: Vec<AllocatedNode>,
    /// Which backend has it.
    pub backend: BackendKind,
    /// The catalogue entry it was launched on.
    pub provider: String,
}

/// One line on how a launch goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchProgress {
    /// The swarm.
    pub swarm: SwarmId,
    /// Short stage name: `starting`, `config`, `submitting`, `slurm_setup` or `ready`.
    pub stage: &'static str,
    /// One line for people.
    pub message: String,
}
