//! Every state that Slurm has for a job, and what it means to us.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a state means. A state that we have never heard of says only that the job is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// It has no nodes yet, or no longer.
    Waiting,
    /// It has nodes, which are not ready yet.
    Preparing,
    /// It runs.
    Running,
    /// It has its nodes and does not run on them.
    Halted,
    /// It is being ended.
    Ending,
    /// It is over.
    Over(Ending),
    /// It is there; more is not known.
    Unknown,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By itself, in order.
    Completed,
    /// Somebody cancelled it.
    Cancelled,
    /// Its time was up.
    TimeUp,
    /// Something failed.
    Failed,
}

/// Long name, short name, meaning, and what it says to people where the word alone says too little.
const STATES: &[(&str, &str, Class, &str)] = &[
    ("PENDING", "PD", Class::Waiting, ""),
    ("REQUEUED", "RQ", Class::Waiting, "it was put back into the queue"),
    ("REQUEUE_FED", "RF", Class::Waiting, "another cluster of the federation is to take it"),
    (
        "REQUEUE_HOLD",
        "RH",
        Class::Waiting,
        "it was put back into the queue and is held there: `scontrol release` lets it go on",
    ),
    ("SPECIAL_EXIT", "SE", Class::Waiting, "it was put back into the queue after a special exit and is held there"),
    ("RESV_DEL_HOLD", "RD", Class::Waiting, "it is held, because its reservation was deleted"),
    ("CONFIGURING", "CF", Class::Preparing, "its nodes are being made ready"),
    ("POWER_UP_NODE", "PU", Class::Preparing, "its nodes are being powered up"),
    ("RUNNING", "R", Class::Running, ""),
    ("RESIZING", "RS", Class::Running, "its size is being changed"),
    ("UPDATE_DB", "UD", Class::Running, ""),
    ("SUSPENDED", "S", Class::Halted, "it is suspended: its nodes were given to another job for a while"),
    ("STOPPED", "ST", Class::Halted, "it is stopped, and keeps its nodes"),
    ("COMPLETING", "CG", Class::Ending, ""),
    ("SIGNALING", "SI", Class::Ending, "it is being signalled"),
    ("STAGE_OUT", "SO", Class::Ending, "its files are being staged out"),
    ("COMPLETED", "CD", Class::Over(Ending::Completed), ""),
    ("CANCELLED", "CA", Class::Over(Ending::Cancelled), "it was cancelled from outside"),
    ("TIMEOUT", "TO", Class::Over(Ending::TimeUp), "its time limit was reached"),
    ("DEADLINE", "DL", Class::Over(Ending::TimeUp), "its deadline was reached"),
    ("FAILED", "F", Class::Over(Ending::Failed), "it failed"),
    ("NODE_FAIL", "NF", Class::Over(Ending::Failed), "a node of it failed"),
    ("BOOT_FAIL", "BF", Class::Over(Ending::Failed), "a node of it could not be started"),
    ("LAUNCH_FAILED", "LF", Class::Over(Ending::Failed), "it could not be started on its nodes"),
    ("RECONFIG_FAIL", "RC", Class::Over(Ending::Failed), "its nodes could not be made ready"),
    ("OUT_OF_MEMORY", "OOM", Class::Over(Ending::Failed), "it used more memory than it had"),
    ("PREEMPTED", "PR", Class::Over(Ending::Failed), "it had to make room for a job of higher priority"),
    ("REVOKED", "RV", Class::Over(Ending::Failed), "another cluster of the federation has taken it"),
];

/// A job's state, in Slurm's own long word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct JobState(String);

impl JobState {
    /// Reads the long or the short name, with what `sacct` puts behind it (`CANCELLED by 1000`, `FAILED+`).
    pub(crate) fn parse(text: &str) -> Self {
        let word = text.split_whitespace().next().unwrap_or_default().trim_end_matches('+');
        let known = STATES.iter().find(|(long, short, ..)| word.eq_ignore_ascii_case(long) || word == *short);
        // What is shown to people and sent on has no surprises in it.
        let unknown = || word.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(64).collect();
        Self(known.map_or_else(unknown, |(long, ..)| (*long).to_owned()))
    }

    /// What it means.
    pub(crate) fn class(&self) -> Class {
        self.entry().map_or(Class::Unknown, |(_, _, class, _)| *class)
    }

    /// What it says to people; may be empty.
    pub(crate) fn words(&self) -> String {
        match self.entry() {
            Some((.., words)) => (*words).to_owned(),
            None => format!("Slurm calls its state {:?}, which this drover does not know", self.0),
        }
    }

    /// Slurm's word.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    fn entry(&self) -> Option<&'static (&'static str, &'static str, Class, &'static str)> {
        STATES.iter().find(|(long, ..)| *long == self.0)
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_mean_the_same_and_an_unknown_state_never_means_gone() {
        for (long, short, class, _) in STATES {
            for text in [*long, *short, &long.to_lowercase()] {
                let state = JobState::parse(text);
                assert_eq!((state.as_str(), state.class()), (*long, *class), "{text}");
            }
        }
        assert_eq!(JobState::parse("CANCELLED by 1000").class(), Class::Over(Ending::Cancelled));
        assert_eq!(JobState::parse("CANCELLED+").as_str(), "CANCELLED");
        for unknown in ["", "HIBERNATING", "r", "PD2", "$(reboot)\n"] {
            let state = JobState::parse(unknown);
            assert_eq!(state.class(), Class::Unknown, "{unknown:?}");
            assert!(!state.as_str().contains(['$', '\n', '(']));
        }
    }

    #[test]
    fn the_states_that_are_easily_forgotten_are_there() {
        let classes = "BOOT_FAIL DEADLINE NODE_FAIL OUT_OF_MEMORY PREEMPTED REQUEUED REQUEUE_HOLD SPECIAL_EXIT STOPPED \
                       SUSPENDED CONFIGURING COMPLETING REVOKED RESV_DEL_HOLD SIGNALING STAGE_OUT";
        for word in classes.split_whitespace() {
            assert_ne!(JobState::parse(word).class(), Class::Unknown, "{word}");
        }
    }
}
