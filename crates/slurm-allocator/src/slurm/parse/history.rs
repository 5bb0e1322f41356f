//! `sacct`.

use crate::slurm::core::Past;
use crate::slurm::state::JobState;
use crate::slurm::tag::Tag;

/// Raw job id, state, exit code, name. The name is chosen by people and comes last.
pub(crate) const FORMAT: &str = "JobIDRaw,State,ExitCode,JobName";

/// Reads the allocations of a history; steps and what is not understood are left out.
pub(crate) fn read(text: &str) -> Vec<Past> {
    let row = |line: &str| {
        let fields: Vec<&str> = line.splitn(4, '|').collect();
        let [id, state, exit, name] = fields[..] else { return None };
        Some(Past {
            id: id.parse().ok()?,
            tag: Tag::of(name.trim(), ""),
            state: JobState::parse(state),
            exit: super::tame(exit),
        })
    };
    text.lines().filter_map(row).collect()
}

/// What it says when the cluster keeps no history.
pub(crate) fn is_switched_off(complaint: &str) -> bool {
    complaint.contains("accounting storage is disabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_read_and_steps_are_not() {
        let rows = read("12|CANCELLED by 1000|0:15|drover-s.1\n12.batch|CANCELLED|0:15|batch\n13|FAILED|1:0|a|b\n?\n");
        assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [12, 13]);
        assert_eq!((rows[0].state.as_str(), rows[0].exit.as_str()), ("CANCELLED", "0:15"));
        assert_eq!(rows[0].tag.as_ref().unwrap().name(), "drover-s.1");
        assert!(is_switched_off("Slurm accounting storage is disabled\n") && !is_switched_off("sacct: error"));
    }
}
