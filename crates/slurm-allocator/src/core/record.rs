//! What of an allocation is remembered on disk, and back.
//!
//! Times are Unix microseconds there: an `Instant` means nothing to the next process.

use std::time::{Duration, Instant};

use drover_types::{Generation, NodeIndex};
use serde::{Deserialize, Serialize};

use super::node::{Node, Phase, Process, Term};
use super::{Limit, Policy, Release, Swarm};

/// How long a node that waited for its next start goes on waiting after a restart of the allocator; what was left of its
/// pause is not remembered.
const RESTORED_PAUSE: Duration = Duration::from_millis(100);

/// The part of a stored allocation that the supervisor owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SwarmRecord {
    /// Its end, once asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) release: Option<ReleaseRecord>,
    /// How long it may last, where that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limit: Option<LimitRecord>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) over_us: Option<u64>,
    /// Its nodes, by index.
    pub(crate) nodes: Vec<NodeRecord>,
}

/// The end of an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReleaseRecord {
    /// Without waiting for turns to end.
    pub(crate) force: bool,
    /// When the workers that still run are killed.
    pub(crate) kill_at_us: u64,
}

/// A time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LimitRecord {
    /// As asked for.
    pub(crate) seconds: u64,
    /// When it is reached.
    pub(crate) at_us: u64,
    /// It was what ended the swarm.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) reached: bool,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    /// The highest generation that was ever decided on.
    pub(crate) generation: Generation,
    /// What it was doing.
    pub(crate) phase: PhaseRecord,
    /// Its process, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<Process>,
    /// The request to end has reached the process.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) term_sent: bool,
    /// Restarts used up.
    pub(crate) restarts: u32,
    /// A process of it ran at some time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) ran: bool,
    /// Why it is in this phase.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
}

/// The phases of a node, without their times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PhaseRecord {
    Waiting,
    Starting,
    Running,
    Exited,
    Failed,
}

impl Swarm {
    /// What is to be remembered.
    pub(crate) fn record(&self, now: Instant, now_us: u64) -> SwarmRecord {
        let unix = |at: Instant| {
            let ahead = at.saturating_duration_since(now).as_micros() as u64;
            let behind = now.saturating_duration_since(at).as_micros() as u64;
            (now_us + ahead).saturating_sub(behind)
        };
        SwarmRecord {
            release: self.release.map(|r| ReleaseRecord { force: r.force, kill_at_us: unix(r.kill_at) }),
            limit: self.limit.map(|limit| LimitRecord {
                seconds: limit.length.as_secs(),
                at_us: unix(limit.at),
                reached: limit.reached,
            }),
            over_us: self.over.map(unix),
            nodes: self.nodes.iter().map(record_of).collect(),
        }
    }

    /// A swarm as it was remembered. [`Input::Found`](super::Input::Found) must follow for each node before the first
    /// step.
    pub(crate) fn restore(policy: Policy, record: &SwarmRecord, now: Instant, now_us: u64) -> Self {
        let nodes: Vec<Node> =
            record.nodes.iter().zip(0..).map(|(node, index)| node_of(NodeIndex(index), node, now)).collect();
        let release = record.release.map(|release| {
            // A clock that was set back must not prolong the wait.
            let left = Duration::from_micros(release.kill_at_us.saturating_sub(now_us)).min(policy.kill_after);
            Release { force: release.force, kill_at: now + left }
        });
        let limit = record.limit.and_then(|limit| {
            let length = Duration::from_secs(limit.seconds);
            // Likewise.
            let left = Duration::from_micros(limit.at_us.saturating_sub(now_us)).min(length);
            Some(Limit { length, at: now.checked_add(left)?, reached: limit.reached })
        });
        let over = record.over_us.map(|over_us| {
            let age = Duration::from_micros(now_us.saturating_sub(over_us)).min(policy.keep_over);
            // Shortly after boot there may be no instant that long ago; then it is kept a little longer.
            now.checked_sub(age).unwrap_or(now)
        });
        let announced = nodes.iter().any(|node| node.ran);
        Self { policy, nodes, release, limit, over, announced, dirty: false, progress: Vec::new() }
    }
}

fn record_of(node: &Node) -> NodeRecord {
    let (phase, process, term_sent) = match node.phase {
        Phase::Waiting { .. } => (PhaseRecord::Waiting, None, false),
        Phase::Starting => (PhaseRecord::Starting, None, false),
        Phase::Running { process, term, .. } => (PhaseRecord::Running, Some(process), term == Term::Sent),
        Phase::Exited => (PhaseRecord::Exited, None, false),
        Phase::Failed => (PhaseRecord::Failed, None, false),
    };
    NodeRecord {
        generation: node.generation,
        phase,
        process,
        term_sent,
        restarts: node.restarts,
        ran: node.ran,
        reason: node.reason.clone(),
    }
}

fn node_of(index: NodeIndex, record: &NodeRecord, now: Instant) -> Node {
    let phase = match (record.phase, record.process) {
        (PhaseRecord::Running, Some(process)) => {
            let term = if record.term_sent { Term::Sent } else { Term::No };
            Phase::Running { process, since: now, term, kill_again: None }
        }
        // A record without a process where one is said to run: look for it as after a start.
        (PhaseRecord::Starting | PhaseRecord::Running, _) => Phase::Starting,
        (PhaseRecord::Waiting, _) => Phase::Waiting { due: now + RESTORED_PAUSE },
        (PhaseRecord::Exited, _) => Phase::Exited,
        (PhaseRecord::Failed, _) => Phase::Failed,
    };
    Node {
        index,
        generation: record.generation,
        phase,
        restarts: record.restarts,
        ran: record.ran,
        reason: record.reason.clone(),
    }
}
