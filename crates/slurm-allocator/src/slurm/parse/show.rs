//! `scontrol show job -o`.

use crate::slurm::core::Past;
use crate::slurm::state::JobState;
use crate::slurm::tag::Tag;

/// Reads one job. What stands behind `JobName=` may have anything in it, so each field is looked for by its own name, and those
/// that people can fill are not believed in.
pub(crate) fn read(text: &str, id: u64) -> Option<Past> {
    let line = text.lines().find(|line| field(line, "JobId=").is_some_and(|found| found == id.to_string()))?;
    // Behind the name, which stands early, so that a name cannot stand in for the state.
    let after_name = line.split_once(" UserId=").map_or(line, |(_, rest)| rest);
    Some(Past {
        id,
        tag: Tag::of(field(line, "JobName=").unwrap_or_default(), ""),
        state: JobState::parse(field(after_name, "JobState=")?),
        exit: super::tame(field(after_name, "ExitCode=").unwrap_or_default()),
    })
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split(' ').find_map(|word| word.strip_prefix(name))
}

/// What it says of a job that it does not know.
pub(crate) fn is_unknown_job(complaint: &str) -> bool {
    complaint.contains("Invalid job id specified")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_job_is_read_and_its_name_stands_in_for_nothing() {
        let line = "JobId=7 JobName=x JobState=COMPLETED UserId=lab(1000) GroupId=lab(1000) JobState=FAILED Reason=None ExitCode=1:0";
        let past = read(line, 7).unwrap();
        assert_eq!((past.state.as_str(), past.exit.as_str()), ("FAILED", "1:0"));
        assert_eq!(read(line, 8), None);
        assert_eq!(read("", 7), None);
        assert!(is_unknown_job("slurm_load_jobs error: Invalid job id specified"));
    }
}
