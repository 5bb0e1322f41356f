//! `sbatch`: what it prints when it worked, and what its complaints mean.

/// The id in the answer of `sbatch --parsable`: `4242`, or `4242;cluster`. Sites may print words of their own before it.
pub(crate) fn job_id(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.split(';').next()?.trim().parse().ok().filter(|&id| id > 0))
}

/// What an `sbatch` that failed means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Complaint {
    /// There is no job, and the next attempt would fare the same.
    Refused(String),
    /// There is no job; another time there may be one.
    NotNow(String),
    /// There may be a job.
    Unclear(String),
}

/// Texts behind which the job may have been taken all the same: the answer was lost, not the request.
const UNCLEAR: &[&str] =
    &["timed out", "Timed out", "send/recv", "Zero Bytes", "Connection reset", "Broken pipe", "Unexpected message"];
/// Texts that say that nothing was taken now.
const NOT_NOW: &[&str] = &[
    "connect failure",
    "Connection refused",
    "temporarily unable to accept",
    "Resource temporarily unavailable",
    "in standby mode",
];

/// Reads the complaint of an `sbatch` that ended with another status than 0.
pub(crate) fn complaint(text: &str) -> Complaint {
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("sbatch: error: ")).map(str::trim).collect();
    let said = if lines.is_empty() { text.trim().to_owned() } else { lines.join("; ") };
    let said: String = said.chars().filter(|c| super::is_shown(*c)).take(600).collect();
    let any = |signs: &[&str]| signs.iter().any(|sign| text.contains(sign));
    if any(UNCLEAR) {
        return Complaint::Unclear(said);
    }
    if any(NOT_NOW) {
        return Complaint::NotNow(said);
    }
    // Its own words, and not those of a shell, of a killed process or of nobody.
    if lines.is_empty() {
        let nothing = || "sbatch failed and did not say why".to_owned();
        return Complaint::Unclear(if said.is_empty() { nothing() } else { said });
    }
    let reason = said.rsplit("Batch job submission failed: ").next().unwrap_or(&said).to_owned();
    Complaint::Refused(reason)
}

/// What a person can do about a refusal.
pub(crate) fn hint(reason: &str) -> &'static str {
    let lower = reason.to_lowercase();
    let table = [
        // Before the partition: it is named together with it.
        ("account", "`sacctmgr show associations user=$USER` lists your accounts; choose one with --account"),
        ("partition", "`sinfo` lists the partitions; choose one with --partition"),
        ("qos", "`sacctmgr show qos` lists them; choose one with --qos"),
        ("time limit", "choose a shorter --time; `sinfo -o '%P %l'` shows the limits"),
        ("node count", "launch fewer nodes; `sinfo -o '%P %D'` shows how many there are"),
        (
            "node configuration",
            "no node of the partition has what was asked for; `sinfo -o '%P %D %G %f'` shows what they have",
        ),
        ("invalid feature", "`sinfo -o '%f'` lists the features"),
    ];
    table.iter().find(|(word, _)| lower.contains(word)).map_or("correct the launch and launch again", |(_, hint)| hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_and_nothing_else_is_one() {
        for (text, wanted) in [
            ("4242\n", Some(4242)),
            ("4242;cluster\n", Some(4242)),
            ("site: your quota is fine\n17\n", Some(17)),
            ("", None),
            ("0\n", None),
            ("Submitted batch job x\n", None),
        ] {
            assert_eq!(job_id(text), wanted, "{text:?}");
        }
    }

    #[test]
    fn only_a_plain_refusal_means_that_it_is_no_use_to_try_again() {
        let refused = complaint("sbatch: error: Batch job submission failed: Invalid partition name specified\n");
        assert_eq!(refused, Complaint::Refused("Invalid partition name specified".into()));
        assert!(hint("Invalid partition name specified").contains("--partition"));
        for unclear in [
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n",
            "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
            "",
            "Killed",
            "bash: fork: retry",
        ] {
            assert!(matches!(complaint(unclear), Complaint::Unclear(_)), "{unclear:?}");
        }
        for later in [
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
        ] {
            assert!(matches!(complaint(later), Complaint::NotNow(_)), "{later:?}");
        }
    }
}
