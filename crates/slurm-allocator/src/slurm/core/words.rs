//! The words between the core and its shell: what happens, what is to be done, and what is known of jobs.

use std::collections::BTreeSet;

use drover_types::{Failure, Generation, NodeIndex, SwarmId};
use serde::{Deserialize, Serialize};

use super::Micros;
use crate::slurm::state::JobState;
use crate::slurm::tag::Tag;

/// What the operator chose, and what follows from how calls are made.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// How often the queue is looked at when nothing is expected.
    pub(crate) poll: Micros,
    /// Most calls per minute.
    pub(crate) calls_per_minute: u32,
    /// How long a swarm that is over stays known.
    pub(crate) keep_over: Micros,
    /// After this long an `sbatch` that was started is surely gone.
    pub(crate) horizon: Micros,
    /// How much longer the queue alone must deny a job where there is no history.
    pub(crate) quiet: Micros,
}

/// Names one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CallId(pub(super) u64);

/// One call to Slurm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    /// All jobs of this user.
    Queue,
    /// Submit the job of a swarm.
    Submit(Tag),
    /// End a job; with `kill` without waiting.
    Cancel { job: u64, kill: bool },
    /// What became of jobs, by their names; of some the id is known too.
    History { jobs: Vec<u64>, names: Vec<String> },
    /// What the controller still knows of one job.
    Show { job: u64 },
}

impl Call {
    /// How many requests the controller gets by it, as `sdiag` of 22.05 counts them.
    pub(crate) fn requests(&self) -> u32 {
        match self {
            // The federation, the jobs, the partitions; or the federation, the jobs, the signal.
            Self::Queue | Self::Cancel { kill: true, .. } => 3,
            // The federation, the job. Of the history only that it is called twice where there is none.
            Self::Show { .. } | Self::History { .. } => 2,
            Self::Submit(_) | Self::Cancel { .. } => 1,
        }
    }
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The queue.
    Queue(QueueList),
    /// The job is in the queue.
    Submitted { job: u64 },
    /// Slurm will not take it.
    Rejected(Failure),
    /// What the history has.
    History(Vec<Past>),
    /// What the controller has of the job.
    Shown(Option<Past>),
    /// It was told to end.
    Cancelled,
    /// There is no such job.
    NoSuchJob,
    /// It surely was not done, and tells nothing.
    NotDone(String),
    /// It may have been done.
    Unsure(String),
    /// The cluster cannot do this.
    Unsupported(String),
}

/// The queue as it was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct QueueList {
    /// The jobs in it, ended ones too where Slurm still lists them.
    pub(crate) jobs: Vec<Queued>,
    /// All of it was understood: what is not in it is not in the queue.
    pub(crate) whole: bool,
}

/// One job of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) id: u64,
    /// Whose it is, when it is ours.
    pub(crate) tag: Option<Tag>,
    pub(crate) state: JobState,
    /// Slurm's word for why it is in this state; may be empty.
    pub(crate) reason: String,
    /// Its nodes, as Slurm writes them; may be empty.
    pub(crate) hosts: String,
    /// When Slurm expects it to start, as text; may be empty.
    pub(crate) starts: String,
}

/// One job of the past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Past {
    pub(crate) id: u64,
    pub(crate) tag: Option<Tag>,
    pub(crate) state: JobState,
    /// Exit code and signal as Slurm writes them, or empty.
    pub(crate) exit: String,
}

/// What a node's worker left in the mailbox when it claimed its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its node.
    pub node: NodeIndex,
    /// The generation that it claimed.
    pub generation: Generation,
    /// Where it runs.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What its parent said of its end, when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<WorkerEnd>,
}

/// The end of a worker whose job goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerEnd {
    /// `restarting`, `failed` or `ended`; what is none of these says nothing.
    pub state: String,
    /// Why.
    #[serde(default)]
    pub reason: String,
}

/// What happened.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// A swarm is to have a job of so many nodes, for so long where there is a limit.
    Launch { swarm: SwarmId, nodes: u32, limit: Option<Micros> },
    /// A swarm is to end.
    Release { swarm: SwarmId, force: bool },
    /// Who has claimed the nodes of a swarm.
    Claims { swarm: SwarmId, claims: Vec<Claim> },
    /// Somebody wants to know what is in the queue.
    Look,
    /// What came of a call.
    Answered { call: CallId, answer: Answer },
}

/// What the shell is to do, in this order.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Swarms whose records must be on disk before anything else.
    pub(crate) store: BTreeSet<SwarmId>,
    /// Swarms that look different from outside.
    pub(crate) changed: BTreeSet<SwarmId>,
    /// Words on how launches go.
    pub(crate) progress: Vec<(SwarmId, &'static str, String)>,
    /// Launches whose outcome is known well enough to answer the asker.
    pub(crate) settled: Vec<(SwarmId, Result<(), Failure>)>,
    /// Calls to make.
    pub(crate) calls: Vec<(CallId, Call)>,
    /// Swarms that were over for long.
    pub(crate) forget: Vec<SwarmId>,
}

/// A job with our mark that no swarm of ours has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Orphan {
    pub(crate) tag: Tag,
    pub(crate) state: JobState,
}

/// The controller, as far as it answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Controller {
    /// Since when it does not, and why.
    pub(crate) down: Option<(Micros, String)>,
    pub(super) failures: u32,
}
