//! What of a swarm's job is remembered on disk, and back.

use serde::{Deserialize, Serialize};

use super::Micros;
use super::swarm::{Job, Over, Phase, Release, Swarm};

/// The part of a stored allocation that this core owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobRecord {
    nodes: u32,
    /// The time limit; none, and in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limit_us: Option<Micros>,
    submission: u32,
    phase: PhaseRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    job: Option<Job>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    release: Option<Release>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PhaseRecord {
    Wanted,
    /// Written before `sbatch` runs. Whoever reads it does not know what came of that.
    Submitting,
    Held,
    Over(Over),
}

impl JobRecord {
    /// That of a swarm that is to have a job of so many nodes.
    pub(crate) fn fresh(nodes: u32) -> Self {
        Self { nodes, limit_us: None, submission: 1, phase: PhaseRecord::Wanted, job: None, release: None }
    }

    /// Id of the job, once known.
    pub(crate) fn job_id(&self) -> Option<u64> {
        self.job.as_ref().map(|job| job.id)
    }
}

impl Swarm {
    pub(super) fn record(&self) -> JobRecord {
        let phase = match &self.phase {
            Phase::Wanted { .. } => PhaseRecord::Wanted,
            Phase::Submitting { .. } | Phase::Unsure { .. } => PhaseRecord::Submitting,
            Phase::Held { .. } | Phase::Missing { .. } => PhaseRecord::Held,
            Phase::Over(over) => PhaseRecord::Over(over.clone()),
        };
        JobRecord {
            nodes: self.nodes,
            limit_us: self.limit,
            submission: self.submission,
            phase,
            job: self.job.clone(),
            release: self.release,
        }
    }

    pub(super) fn restore(record: &JobRecord, now: Micros) -> Self {
        let phase = match (&record.phase, &record.job) {
            (PhaseRecord::Wanted, _) => Phase::Wanted { since: now, looked: false },
            (PhaseRecord::Over(over), _) => {
                // A clock that was set back must not keep it for ever.
                Phase::Over(Over { at_us: over.at_us.min(now), ..over.clone() })
            }
            (PhaseRecord::Held, Some(_)) => Phase::Held { since: now },
            // An `sbatch` of the earlier allocator may still be at work.
            (PhaseRecord::Submitting | PhaseRecord::Held, _) => Phase::Unsure {
                begun: now,
                why: "the allocator ended while sbatch ran".to_owned(),
                denied: false,
                asked: 0,
            },
        };
        let job = record.job.clone();
        let mut swarm = Self::new(record.nodes, record.limit_us, now);
        (swarm.submission, swarm.phase, swarm.job, swarm.release) = (record.submission, phase, job, record.release);
        swarm
    }
}
