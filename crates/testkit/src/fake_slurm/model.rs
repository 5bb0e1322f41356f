//! What the fake cluster consists of. Plain data that is stored as one JSON document; who changes it holds the lock.

use std::collections::BTreeMap;

use drover_service::process::ProcessId;
use serde::{Deserialize, Serialize};

/// Milliseconds since 1970 on the clock of the cluster, which may go faster than real time.
pub type Moment = i64;

/// Seconds in milliseconds.
pub(crate) fn ms(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX / 1000).saturating_mul(1000)
}

/// The whole cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cluster {
    /// Who made it; when that process is gone, the cluster ends by itself.
    pub owner: Option<ProcessId>,
    /// It has been ended: nothing starts any more.
    pub stopped: bool,
    /// How the clock of the cluster follows the real one.
    pub clock: Clock,
    /// The next job's id.
    pub next_job: u32,
    /// The hosts that jobs run on.
    pub nodes: Vec<Node>,
    /// Groups of nodes that jobs are submitted to.
    pub partitions: Vec<Partition>,
    /// Accounts that jobs may name; the first is the default.
    pub accounts: Vec<String>,
    /// Qualities of service; the first is the default.
    pub qos: Vec<Qos>,
    /// Every job there ever was.
    pub jobs: BTreeMap<u32, Job>,
}

/// A clock that goes as many times faster than the real one as `speed` says, from the moment that it was made.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Clock {
    /// When it was made, in real milliseconds since 1970.
    pub made_ms: i64,
    /// Seconds of the cluster per real second.
    pub speed: f64,
}

impl Clock {
    /// What this clock shows at a moment of the real one.
    pub fn at(&self, real_ms: i64) -> Moment {
        self.made_ms + ((real_ms - self.made_ms) as f64 * self.speed) as i64
    }
}

/// A host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Node {
    /// Its name, such as `n1`.
    pub name: String,
    /// How it really is.
    pub truth: Truth,
    /// Since when it is so.
    pub since: Moment,
    /// The controller has given it up.
    pub down: bool,
    /// What an administrator has set: `drain` or `down`, and why.
    pub admin: Option<(Admin, String)>,
}

/// How a host really is, whatever the controller has noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Truth {
    /// Answers.
    Fine,
    /// Has lost its power: what ran there is dead.
    Lost,
    /// Does not answer; what runs there goes on.
    Cut,
}

/// What an administrator has set a node to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Admin {
    /// No new jobs.
    Drain,
    /// Not in use.
    Down,
}

/// A group of nodes. Its jobs get whole nodes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Partition {
    /// Its name.
    pub name: String,
    /// Jobs that name none go here.
    pub default: bool,
    /// Whether jobs start.
    pub up: bool,
    /// The longest time limit, in seconds; `None` for no limit.
    pub max_seconds: Option<u64>,
    /// The time limit of a job that names none.
    pub default_seconds: Option<u64>,
    /// Names of its nodes.
    pub nodes: Vec<String>,
}

/// Limits on a user's jobs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Qos {
    /// Its name.
    pub name: String,
    /// How many jobs of a user run at once.
    pub max_jobs: Option<usize>,
    /// The longest time limit, in seconds.
    pub max_seconds: Option<u64>,
}

/// A job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub id: u32,
    /// What was asked for.
    pub asked: Asked,
    /// When it was accepted.
    pub submitted: Moment,
    /// When it may start.
    pub eligible: Moment,
    /// Where it stands.
    pub phase: Phase,
    /// How often it was put back into the queue.
    pub restarts: u32,
    /// Programs of the steps that srun has started in the present run.
    pub steps: Vec<String>,
    /// The accounting database has heard of it: it does when a job could start for the first time.
    pub counted: bool,
    /// Runs that ended in the queue again.
    pub earlier: Vec<(Run, Moment)>,
    /// A state that the commands show instead of the real one.
    pub shown: Option<String>,
}

/// What sbatch was asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Asked {
    /// Name.
    pub name: String,
    /// Comment; empty for none.
    pub comment: String,
    /// Who submitted it.
    pub user: String,
    /// The same as a number.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Account.
    pub account: String,
    /// Quality of service.
    pub qos: String,
    /// Partition.
    pub partition: String,
    /// Number of nodes.
    pub nodes: u32,
    /// Number of tasks; without it one per node.
    pub tasks: Option<u32>,
    /// Tasks on each node.
    pub tasks_per_node: Option<u32>,
    /// Time limit in seconds; `None` for no limit.
    pub seconds: Option<u64>,
    /// `--signal`.
    pub signal: Option<EarlySignal>,
    /// Put back into the queue when a node fails.
    pub requeue: bool,
    /// Starts only when released.
    pub hold: bool,
    /// Node names that it must have.
    pub node_list: Vec<String>,
    /// Jobs that must have ended well before.
    pub after_ok: Vec<u32>,
    /// Generic resources, as they were asked for.
    pub gres: Option<String>,
    /// Features, as they were asked for.
    pub constraint: Option<String>,
    /// `--export`.
    pub export: Option<String>,
    /// File for standard output, with its patterns.
    pub output: Option<String>,
    /// File for standard error, with its patterns.
    pub error: Option<String>,
    /// Append to these files.
    pub append: bool,
    /// Directory that it runs in.
    pub directory: String,
    /// The script's path; empty when it came on standard input.
    pub command: String,
    /// Name of the host and pid of the session that submitted it.
    pub from: (String, u32),
}

/// A signal that is sent before the time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlySignal {
    /// To the batch shell, not to the steps.
    pub batch: bool,
    /// Its number.
    pub number: i32,
    /// How many seconds before the limit.
    pub seconds: u64,
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// In the queue.
    Waiting {
        /// Why it does not start, in Slurm's word.
        reason: String,
        /// It needs somebody's word to start.
        held: Option<Held>,
    },
    /// On its nodes.
    Running(Run),
    /// Its processes are being ended.
    Ending {
        /// The run that ends.
        run: Run,
        /// What it will be then.
        then: Then,
        /// Since when.
        since: Moment,
        /// They have been told so, by SIGTERM at first.
        told: bool,
        /// They are ended by SIGKILL.
        killed: bool,
    },
    /// Over. Without a run it never started.
    Over {
        /// The last run.
        run: Option<Run>,
        /// How it ended.
        end: End,
    },
}

/// Why a job needs a word to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// Submitted with `--hold`, or held by its user.
    User,
    /// Requeued and held.
    Requeued,
    /// Requeued, held and marked.
    Special,
}

/// One time that a job is on nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// How many there were before.
    pub number: u32,
    /// When it started.
    pub started: Moment,
    /// Names of its nodes.
    pub nodes: Vec<String>,
    /// The early signal has been sent.
    pub warned: bool,
    /// Since when it is suspended, by an administrator.
    pub suspended: Option<Moment>,
}

/// What becomes of a job whose processes are being ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Then {
    /// It is over.
    Over(End),
    /// It waits again, perhaps for somebody's word.
    Again(Option<Held>),
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// The state that is shown.
    pub state: Final,
    /// The reason that is shown.
    pub reason: String,
    /// Exit status of the script.
    pub status: i32,
    /// The signal that ended it.
    pub signal: i32,
    /// When.
    pub at: Moment,
    /// Who cancelled it.
    pub by: Option<u32>,
}

/// States that a job of the fake can end in. Others can be shown, see [`Job::shown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "Slurm's own words")]
pub enum Final {
    Completed,
    Failed,
    Cancelled,
    Timeout,
    NodeFail,
}

impl Final {
    /// Slurm's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::Timeout => "TIMEOUT",
            Self::NodeFail => "NODE_FAIL",
        }
    }
}

impl Job {
    /// The state in Slurm's word.
    pub fn state(&self) -> &str {
        if let Some(shown) = &self.shown {
            return shown;
        }
        match &self.phase {
            Phase::Waiting { held: Some(Held::Special), .. } => "SPECIAL_EXIT",
            Phase::Waiting { .. } => "PENDING",
            Phase::Running(run) if run.suspended.is_some() => "SUSPENDED",
            Phase::Running(_) => "RUNNING",
            Phase::Ending { .. } => "COMPLETING",
            Phase::Over { end, .. } => end.state.word(),
        }
    }

    /// Why it is in this state, in Slurm's words.
    pub fn reason(&self) -> &str {
        match &self.phase {
            Phase::Waiting { reason, .. } => reason,
            Phase::Running(_) => "None",
            Phase::Ending { then: Then::Over(end), .. } | Phase::Over { end, .. } => &end.reason,
            Phase::Ending { then: Then::Again(_), .. } => "BeginTime",
        }
    }

    /// The present or last time on nodes.
    pub fn run(&self) -> Option<&Run> {
        match &self.phase {
            Phase::Running(run) | Phase::Ending { run, .. } => Some(run),
            Phase::Over { run, .. } => run.as_ref(),
            Phase::Waiting { .. } => None,
        }
    }

    /// How it ended, if it did.
    pub fn end(&self) -> Option<&End> {
        match &self.phase {
            Phase::Over { end, .. } | Phase::Ending { then: Then::Over(end), .. } => Some(end),
            _ => None,
        }
    }

    /// Whether nothing will become of it any more.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over { .. })
    }

    /// When the present run must be over.
    pub fn limit(&self) -> Option<Moment> {
        Some(self.run()?.started + ms(self.asked.seconds?))
    }

    /// Seconds that it has run, or ran in the end.
    pub fn ran(&self, now: Moment) -> u64 {
        let Some(run) = self.run() else { return 0 };
        let until = self.end().map_or(now, |end| end.at);
        u64::try_from((until - run.started) / 1000).unwrap_or(0)
    }

    /// Tasks of a step that asks for nothing else.
    pub fn tasks(&self) -> u32 {
        self.asked.tasks.unwrap_or(self.asked.nodes * self.asked.tasks_per_node.unwrap_or(1)).max(1)
    }
}

impl Cluster {
    /// The partition of that name.
    pub fn partition(&self, name: &str) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.name == name)
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Jobs that the controller still knows: one that is over is forgotten after a while.
    pub fn known(&self, now: Moment, min_age_s: u64) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(move |job| match &job.phase {
            Phase::Over { end, .. } => now - end.at < ms(min_age_s),
            _ => true,
        })
    }

    /// The job that is on a node.
    pub fn on_node(&self, name: &str) -> Option<&Job> {
        self.jobs
            .values()
            .find(|job| !job.is_over() && job.run().is_some_and(|run| run.nodes.iter().any(|on| on == name)))
    }
}
