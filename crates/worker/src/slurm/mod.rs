//! A node that is one task of a Slurm job: all tasks have the same environment, but for what Slurm adds to each.

mod parent;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drover_service::ExitWith;
use drover_types::NodeIndex;

use crate::run::WorkerArgs;

pub(crate) use parent::{Parent, addresses};

/// Number of the task in its job, from 0.
const TASK: &str = "SLURM_PROCID";
/// The job.
const JOB: &str = "SLURM_JOB_ID";

/// When the time of the job is up, in seconds of Unix time; the word of its script, by the clock of the host on which that began.
const ENDS: &str = "DROVER_JOB_ENDS";
/// Slurm gives its word a minute before the end, and may be early with it by another one.
const NEAR: Duration = Duration::from_secs(130);

/// Directory of the swarm on the shared file system; the allocator's word, not Slurm's.
pub(crate) const DIR: &str = "DROVER_SLURM_DIR";

/// The node that this task is.
pub(crate) fn node(variable: impl Fn(&str) -> Option<String>) -> Option<NodeIndex> {
    variable(TASK)?.parse().ok()
}

/// Why a process has been told to end by a signal. The clock says it, and nobody has to read logs.
pub(crate) fn why_told(variable: impl Fn(&str) -> Option<String>, now: SystemTime) -> &'static str {
    let ends = || variable(ENDS)?.parse().ok().and_then(|ends| UNIX_EPOCH.checked_add(Duration::from_secs(ends)));
    if ends().is_some_and(|ends| now + NEAR >= ends) {
        return "the time limit of its job is near";
    }
    "the process was told to end by a signal"
}

/// What is not said otherwise is what Slurm says. The generation is never said: a job that was put back into the queue has the same
/// environment once more, and its workers are the next.
pub(crate) fn fill(
    args: WorkerArgs,
    variable: impl Fn(&str) -> Option<String>,
    state: &Path,
) -> Result<WorkerArgs, ExitWith> {
    let wrong = |name: &str| ExitWith {
        code: 64,
        message: format!("{name} is missing or makes no sense: --slurm is for tasks that srun starts"),
    };
    let node = args.node_id.or_else(|| node(&variable)).ok_or_else(|| wrong(TASK))?;
    let job = match args.job_id {
        Some(job) => job,
        None => variable(JOB).and_then(|job| job.parse().ok()).ok_or_else(|| wrong(JOB))?,
    };
    // On a disk of the compute node, which nobody else has.
    let own = |swarm: &drover_types::SwarmId| state.join("nodes").join(swarm.as_str()).join(format!("{:02}", node.0));
    let node_dir = args.node_dir.or_else(|| args.swarm_id.as_ref().map(own));
    Ok(WorkerArgs { node_id: Some(node), job_id: Some(job), node_dir, generation: None, ..args })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_near_the_end_of_the_jobs_time_is_about_that() {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_262_407);
        for (ends, near) in [
            (Some("1795262460"), true),
            (Some("1795262529"), true),
            (Some("1795262300"), true),
            (Some("1795262600"), false),
            (Some("soon"), false),
            (Some("18446744073709551615"), false),
            (None, false),
        ] {
            let said = why_told(|_| ends.map(str::to_owned), now);
            assert_eq!(said.contains("time limit"), near, "{ends:?}: {said}");
        }
    }

    #[test]
    fn a_task_is_the_node_of_its_number_in_the_next_generation() {
        let variable = |name: &str| match name {
            TASK => Some("7".to_owned()),
            JOB => Some("4242".to_owned()),
            _ => None,
        };
        let args = WorkerArgs { swarm_id: "s".parse().ok(), generation: "3".parse().ok(), ..WorkerArgs::default() };
        let filled = fill(args.clone(), variable, Path::new("/state")).unwrap();
        assert_eq!(filled.node_id, Some(NodeIndex(7)));
        assert_eq!(filled.job_id.unwrap().as_str(), "4242");
        assert_eq!(filled.node_dir.unwrap(), Path::new("/state/nodes/s/07"));
        assert_eq!(filled.generation, None);
        for (name, value) in [(TASK, ""), (TASK, "-1"), (TASK, "x"), (JOB, ""), (JOB, "../x")] {
            let broken = |asked: &str| if asked == name { Some(value.to_owned()) } else { variable(asked) };
            let refused = fill(args.clone(), broken, Path::new("/state")).unwrap_err();
            assert!(refused.code == 64 && refused.message.contains(name), "{}", refused.message);
        }
    }
}
