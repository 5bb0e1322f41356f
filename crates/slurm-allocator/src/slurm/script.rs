//! The batch script: options for people to read, the environment of the workers, and one `srun` line.
//!
//! Slurm gets the same options as arguments, which win over whatever `SBATCH_…` the account's environment has. No shell ever
//! interprets a value: those of options are checked to have no character that means anything, all others stand in single quotes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use drover_types::{AgentKind, ErrorCode, Failure};
use serde::{Deserialize, Serialize};

use super::order::Order;
use super::tag::Tag;

/// Where everything of a swarm is on the cluster, as its compute nodes see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Places {
    /// The program that holds the worker.
    pub(crate) program: String,
    /// Its arguments before `--slurm`.
    pub(crate) args: Vec<String>,
    /// Directory of the swarm: its script, its output, its configuration.
    pub(crate) dir: String,
    /// Root of the mailbox.
    pub(crate) mailbox: String,
    /// Where `drover doctor --fix` puts programs of others; empty in records of earlier versions.
    #[serde(default)]
    pub(crate) tools: String,
    /// A directory that every compute node has on a disk of its own.
    pub(crate) local: String,
}

/// What makes a swarm's workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) order: Order,
    pub(crate) places: Places,
    pub(crate) agent: AgentKind,
    /// Keys of the configuration's `worker` section that the launch overrides.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) settings: BTreeMap<String, String>,
}

/// How long before the end of a job its workers are told, in seconds.
const WARNING: u32 = 60;

impl Places {
    /// Refuses what Slurm or a shell would read as something else.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        for (what, path) in [
            ("the program", &self.program),
            ("the swarm's directory", &self.dir),
            ("the mailbox", &self.mailbox),
            ("the directory of tools", if self.tools.is_empty() { &self.local } else { &self.tools }),
            ("local_dir", &self.local),
        ] {
            let fits = path.starts_with('/')
                && path.len() <= 1024
                && path.chars().all(|c| !c.is_control() && !c.is_whitespace() && !"%'\"\\#".contains(c));
            if !fits {
                let shown: String = path.chars().take(200).collect();
                let message = format!("{what} cannot be at {shown:?} on a Slurm cluster");
                return Err(Failure::new(ErrorCode::InvalidRequest, message).hint(
                    "choose a workspace_root, cluster_subdir and local_dir that are absolute and have no blanks, quotes, backslashes, \
                     # or %",
                ));
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The options of `sbatch`.
    pub(crate) fn options(&self, tag: &Tag) -> Vec<String> {
        let Order { nodes, partition, options, .. } = &self.order;
        let dir = &self.places.dir;
        let mut all = vec![
            format!("--job-name={}", tag.name()),
            format!("--comment={}", tag.comment()),
            format!("--partition={partition}"),
            format!("--nodes={nodes}"),
            format!("--ntasks={nodes}"),
            "--ntasks-per-node=1".to_owned(),
            format!("--time={}", self.order.time()),
            format!("--signal=TERM@{WARNING}"),
            format!("--output={dir}/job-%j.log"),
            format!("--error={dir}/job-%j.log"),
            // A job that was put back goes on where it was: its workers take the next generation.
            "--requeue".to_owned(),
            "--open-mode=append".to_owned(),
        ];
        all.extend(
            options
                .iter()
                .map(|(key, value)| if value.is_empty() { format!("--{key}") } else { format!("--{key}={value}") }),
        );
        all
    }

    /// The whole script.
    pub(crate) fn script(&self, tag: &Tag) -> String {
        let Places { program, args, dir, mailbox, tools, local } = &self.places;
        let mut text = format!("#!/bin/sh\n# The workers of swarm {}, submission {}.\n", tag.swarm, tag.submission);
        for option in self.options(tag) {
            let _ = writeln!(text, "#SBATCH {option}");
        }
        text.push_str("\n# What the environment of sbatch says of another node is not meant for these.\n");
        text.push_str(
            "unset DROVER_NODE_ID DROVER_NODE_DIR DROVER_GENERATION DROVER_JOB_ID DROVER_IDENTITY DROVER_JOB_ENDS\n",
        );
        let mut export = |name: &str, value: &str| {
            let _ = writeln!(text, "export {name}={value}");
        };
        export("DROVER_SWARM_ID", &quoted(tag.swarm.as_str()));
        export("DROVER_MAILBOX", &quoted(mailbox));
        export("DROVER_AGENT", &quoted(self.agent.as_str()));
        export("DROVER_CONFIG", &quoted(&format!("{dir}/drover.yaml")));
        export("DROVER_SLURM_DIR", &quoted(dir));
        if let Some(seconds) = self.order.seconds {
            // Put back into the queue, the job has all of its time again, and this is run again.
            export("DROVER_JOB_ENDS", &format!("\"$(($(date +%s) + {seconds}))\""));
        }
        // On a disk of the node, where locks work; nobody else's directory is used.
        export("DROVER_STATE_DIR", &format!("{}/drover-\"$(id -u)\"", quoted(local)));
        if !tools.is_empty() {
            // Behind everything that the site provides.
            export("PATH", &format!("\"$PATH\":{}", quoted(tools)));
        }
        for (key, value) in &self.settings {
            export(&format!("DROVER_WORKER__{}", key.to_ascii_uppercase()), &quoted(value));
        }
        let words: Vec<String> = [program].into_iter().chain(args).map(|word| quoted(word)).collect();
        // One task that ends early ends no other; whatever Slurm's own defaults are.
        let _ = writeln!(
            text,
            "\nexec srun --export=ALL --label --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=1 {} --slurm",
            words.join(" ")
        );
        text
    }
}

/// A word that a shell takes as it stands.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            order: Order {
                nodes: 4,
                seconds: Some(600),
                partition: "mi2508x".into(),
                options: [("account".to_owned(), "lab".to_owned()), ("exclusive".to_owned(), String::new())].into(),
            },
            places: Places {
                program: "/work1/drover/codeswarm/bin/0123456789abcdef/drover".into(),
                args: vec!["daemon".into(), "worker".into()],
                dir: "/work1/drover/codeswarm/swarms/s-1".into(),
                mailbox: "/work1/drover/codeswarm/mailbox".into(),
                tools: "/work1/drover/codeswarm/tools/bin".into(),
                local: "/var/tmp".into(),
            },
            agent: AgentKind::Echo,
            settings: [("sandbox_mode".to_owned(), "read-only".to_owned())].into(),
        }
    }

    fn tag() -> Tag {
        Tag { swarm: "s-1".parse().unwrap(), submission: 2 }
    }

    #[test]
    fn the_script_of_four_nodes() {
        assert_eq!(plan().script(&tag()), include_str!("script.sample.sh"));
        plan().places.check().unwrap();
    }

    #[test]
    fn a_shell_gives_every_value_to_the_worker_as_it_was() {
        let hostile = "a'b\"c\n#SBATCH --wrap=x\n$(touch /nonexistent/x) `id` \\ %j -x ä";
        let mut plan = plan();
        plan.settings.insert("codex_args".into(), hostile.into());
        plan.agent = AgentKind::Codex;
        let dir = tempfile::tempdir().unwrap();
        let srun = dir.path().join("srun");
        std::fs::write(&srun, "#!/bin/sh\nprintf '%s' \"$DROVER_WORKER__CODEX_ARGS\"\nprintf '|%s' \"$@\"\n").unwrap();
        std::fs::set_permissions(&srun, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("{}:/usr/bin:/bin", dir.path().display());
        let script = plan.script(&tag());
        let output =
            std::process::Command::new("/bin/sh").args(["-c", &script]).env_clear().env("PATH", path).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let (value, args) = said.split_once("|--export=ALL|").unwrap_or_else(|| panic!("{said}"));
        assert_eq!(value, hostile);
        assert!(args.ends_with("|/work1/drover/codeswarm/bin/0123456789abcdef/drover|daemon|worker|--slurm"), "{args}");
        // Slurm reads options up to the first line that is none.
        let options = script.lines().skip(2).take_while(|line| line.starts_with("#SBATCH")).count();
        assert_eq!(options, plan.options(&tag()).len());
    }

    #[test]
    fn places_that_slurm_or_a_shell_would_read_otherwise_are_refused() {
        for bad in ["relative", "/a b", "/a'b", "/a\"b", "/a\nb", "/a\\b", "/a%jb", "/a#b", "", "/a\0b"] {
            for change in [
                |places: &mut Places, bad: &str| places.dir = bad.into(),
                |places: &mut Places, bad: &str| places.program = bad.into(),
                |places: &mut Places, bad: &str| places.mailbox = bad.into(),
                |places: &mut Places, bad: &str| places.local = bad.into(),
            ] {
                let mut places = plan().places;
                change(&mut places, bad);
                assert!(places.check().unwrap_err().hint.contains("workspace_root"), "{bad:?}");
            }
        }
    }
}
