//! What a test may change while the fake cluster runs: how it answers, and what goes wrong.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How the fake answers. A file of its own, so that a person may edit it too.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whose outputs are imitated.
    pub dialect: Dialect,
    /// Real milliseconds that a command takes, by its name; `*` for every other.
    pub latency_ms: BTreeMap<String, u64>,
    /// What goes wrong, the first that fits a call.
    pub faults: Vec<Fault>,
    /// Whether there is an accounting database.
    pub accounting: Accounting,
    /// Comments of jobs are lost, as a site's submit plugin may do.
    pub drop_comments: bool,
    /// While it is set no job starts, and this is the reason that is shown.
    pub blocked: Option<String>,
    /// Seconds that a job waits in the queue at least.
    pub queue_s: u64,
    /// Seconds without an answer after which a node is given up (SlurmdTimeout).
    pub slurmd_timeout_s: u64,
    /// Seconds that a requeued job waits.
    pub requeue_delay_s: u64,
    /// Seconds between SIGTERM and SIGKILL (KillWait).
    pub kill_wait_s: u64,
    /// Seconds that a job is remembered after its end (MinJobAge).
    pub min_job_age_s: u64,
    /// Seconds that what a returned node still runs of an ended job lives on.
    pub stray_s: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dialect: Dialect::default(),
            latency_ms: BTreeMap::new(),
            faults: Vec::new(),
            accounting: Accounting::On { lag_s: 0 },
            drop_comments: false,
            blocked: None,
            queue_s: 0,
            slurmd_timeout_s: 10,
            requeue_delay_s: 6,
            kill_wait_s: 5,
            min_job_age_s: 300,
            stray_s: 10,
        }
    }
}

/// A version of Slurm whose outputs are imitated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dialect {
    /// Debian 11.
    #[serde(rename = "20.11")]
    V20,
    /// Debian 12.
    #[default]
    #[serde(rename = "22.05")]
    V22,
    /// Debian 13.
    #[serde(rename = "24.11")]
    V24,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V20, Self::V22, Self::V24];

    /// The version as the folders of the recordings are called.
    pub fn name(self) -> &'static str {
        match self {
            Self::V20 => "20.11",
            Self::V22 => "22.05",
            Self::V24 => "24.11",
        }
    }

    /// What `--version` prints.
    pub fn version_line(self) -> &'static str {
        match self {
            Self::V20 => "slurm-wlm 20.11.4",
            Self::V22 => "slurm-wlm 22.05.8",
            Self::V24 => "slurm-wlm 24.11.5",
        }
    }
}

/// The accounting database behind `sacct`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accounting {
    /// There is none.
    Off,
    /// It knows of a job's changes so many seconds late.
    On {
        /// How late.
        lag_s: u64,
    },
    /// It does not answer.
    Unreachable,
}

/// Something that goes wrong with calls of one command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The command, `*` for every one.
    pub command: String,
    /// What happens.
    pub kind: Kind,
    /// Calls that pass unharmed before.
    #[serde(default)]
    pub after: u32,
    /// How many calls it happens to; `None` for as long as the fault stands.
    #[serde(default)]
    pub times: Option<u32>,
}

/// What goes wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The controller cannot be reached. It takes so many real milliseconds to find out.
    Unreachable {
        /// Real milliseconds.
        after_ms: u64,
    },
    /// The command says that it waited in vain for an answer.
    Timeout {
        /// The controller has done what was asked all the same.
        done: bool,
    },
    /// The command is killed before it says anything.
    Dies {
        /// The controller has done what was asked all the same.
        done: bool,
    },
    /// The command is killed while the state is being written: nothing has happened.
    DiesWriting,
    /// It takes so long before anything happens.
    Slow {
        /// Real milliseconds.
        ms: u64,
    },
    /// Its output ends after so many bytes, and the command claims success.
    Truncated {
        /// Bytes of standard output that come through.
        bytes: usize,
    },
    /// It does nothing and says this.
    Says {
        /// On standard output.
        #[serde(default)]
        stdout: String,
        /// On standard error.
        #[serde(default)]
        stderr: String,
        /// Exit status.
        #[serde(default)]
        status: u8,
    },
    /// It prints this before its own output, as a login script may do.
    Banner {
        /// The text.
        text: String,
    },
}

impl Settings {
    /// The fault of this call, which is counted.
    pub fn fault(&mut self, command: &str) -> Option<Kind> {
        for fault in &mut self.faults {
            if fault.command != "*" && fault.command != command {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return None;
            }
            match &mut fault.times {
                Some(0) => continue,
                Some(left) => *left -= 1,
                None => {}
            }
            return Some(fault.kind.clone());
        }
        None
    }

    /// How long a command takes.
    pub fn latency_ms(&self, command: &str) -> u64 {
        self.latency_ms.get(command).or_else(|| self.latency_ms.get("*")).copied().unwrap_or(0)
    }
}
