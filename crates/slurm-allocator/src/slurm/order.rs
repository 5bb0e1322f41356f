//! What a launch asks Slurm for, checked once at the door: every value is refused or reaches Slurm as it stands.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_config::ProviderConfig;
use drover_proto::common::LaunchSpec;
use drover_types::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};

use crate::walltime;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Number of nodes.
    pub(crate) nodes: u32,
    /// Time limit in seconds; none for a launch that asked for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seconds: Option<u64>,
    /// Partition, or several with commas between them.
    pub(crate) partition: String,
    /// Further options of `sbatch`, without their dashes. An empty value is an option without one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) options: BTreeMap<String, String>,
}

/// What a value may be made of.
#[derive(Debug, Clone, Copy)]
enum Grammar {
    /// Names, lists of names, numbers with units.
    Words,
    /// The same with the signs that combine features.
    Features,
    /// A switch.
    Switch,
}

/// Launch parameter, option of `sbatch`, grammar. Nothing else is passed on.
const OPTIONS: &[(&str, &str, Grammar)] = &[
    ("account", "account", Grammar::Words),
    ("qos", "qos", Grammar::Words),
    ("constraint", "constraint", Grammar::Features),
    ("gres", "gres", Grammar::Words),
    ("gpus_per_node", "gpus-per-node", Grammar::Words),
    ("cpus_per_task", "cpus-per-task", Grammar::Words),
    ("mem", "mem", Grammar::Words),
    ("reservation", "reservation", Grammar::Words),
    ("licenses", "licenses", Grammar::Words),
    ("nodelist", "nodelist", Grammar::Features),
    ("exclude", "exclude", Grammar::Features),
    ("exclusive", "exclusive", Grammar::Switch),
];
/// Options of `sbatch` that people may try and that a launch must not set: we set them, or they would change what runs.
const NOT_OURS: &[&str] = &[
    "array",
    "begin",
    "chdir",
    "cluster_constraint",
    "clusters",
    "comment",
    "dependency",
    "error",
    "export",
    "export_file",
    "get_user_env",
    "job_name",
    "mail_type",
    "mail_user",
    "nice",
    "nodes",
    "ntasks",
    "ntasks_per_node",
    "output",
    "prolog",
    "requeue",
    "signal",
    "uid",
    "wrap",
];
const LONGEST: usize = 255;

impl Order {
    /// Reads what was asked for, with what the catalogue entry has for what was not.
    pub(crate) fn parse(
        asked: &LaunchSpec,
        provider: &ProviderConfig,
        time: Option<Duration>,
    ) -> Result<Self, Failure> {
        let given = |own: &str, key: &str| -> Option<String> {
            let param = || asked.params.get(key).map(String::as_str).filter(|value| !value.is_empty());
            let default = || provider.defaults.get(key).map(String::as_str).filter(|value| !value.is_empty());
            Some(own).filter(|own| !own.is_empty()).or_else(param).or_else(default).map(str::to_owned)
        };
        let partition = given(&asked.partition, "partition")
            .ok_or_else(|| required("partition", "P", "cluster.slurm.partition"))?;
        check("partition", &partition, Grammar::Words)?;
        if given(&asked.time, "time_limit").is_none() {
            return Err(required("time", "T", "cluster.slurm.time_limit"));
        }
        if let Some(key) = asked.params.keys().find(|key| NOT_OURS.contains(&key.replace('-', "_").as_str())) {
            let may: Vec<&str> = OPTIONS.iter().map(|(key, ..)| *key).collect();
            return Err(Failure::new(ErrorCode::InvalidRequest, format!("a launch cannot set {key:?} of its job"))
                .hint(format!("what it may set is partition, time and {}", may.join(", "))));
        }
        let mut options = BTreeMap::new();
        for &(key, option, grammar) in OPTIONS {
            let own = match key {
                "account" => asked.account.as_str(),
                "qos" => asked.qos.as_str(),
                _ => "",
            };
            let Some(value) = given(own, key) else { continue };
            match grammar {
                Grammar::Switch => match value.as_str() {
                    "true" | "yes" | "1" => drop(options.insert(option.to_owned(), String::new())),
                    "false" | "no" | "0" => {}
                    "user" | "mcs" => drop(options.insert(option.to_owned(), value)),
                    _ => {
                        let shown = brief(&value);
                        return Err(invalid(format!("{key} cannot be {shown:?}, expected true, false, user or mcs")));
                    }
                },
                grammar => {
                    check(key, &value, grammar)?;
                    options.insert(option.to_owned(), value);
                }
            }
        }
        Ok(Self { nodes: asked.node_count, seconds: time.map(|time| time.as_secs()), partition, options })
    }

    /// The time limit as Slurm takes it.
    pub(crate) fn time(&self) -> String {
        self.seconds.map_or_else(|| "UNLIMITED".to_owned(), |seconds| walltime::words(Duration::from_secs(seconds)))
    }
}

/// The words that clients of the existing router know.
fn required(what: &str, placeholder: &str, key: &str) -> Failure {
    invalid(format!("{what} is required")).hint(format!("launch with --{what} {placeholder}, or set {key}"))
}

fn invalid(message: String) -> Failure {
    Failure::new(ErrorCode::InvalidRequest, message)
}

/// So much of a wrong value as a message needs.
fn brief(value: &str) -> String {
    value.chars().take(80).collect()
}

fn check(key: &str, value: &str, grammar: Grammar) -> Result<(), Failure> {
    let extra = match grammar {
        Grammar::Words => "_-.,:@+=/",
        Grammar::Features | Grammar::Switch => "_-.,:@+=/&|*()[]!",
    };
    let fits = value.len() <= LONGEST
        && !value.starts_with('-')
        && value.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c));
    if fits {
        return Ok(());
    }
    Err(invalid(format!("{key} cannot be {:?}", brief(value)))
        .hint(format!("it may have letters, digits and {extra}, at most {LONGEST} of them, and no dash in front")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_config::Config;

    fn provider(more: &str) -> ProviderConfig {
        let text = format!("cluster: {{slurm: {{login_host: h, workspace_root: /w, cluster_subdir: c{more}}}}}");
        Config::from_text("test.yaml", &text, &BTreeMap::new()).unwrap().0.providers().remove(0)
    }

    fn asked() -> LaunchSpec {
        LaunchSpec { node_count: 4, partition: "mi2508x".into(), time: "00:10:00".into(), ..LaunchSpec::default() }
    }

    fn parse(asked: &LaunchSpec, more: &str) -> Result<Order, Failure> {
        Order::parse(asked, &provider(more), walltime::parse(&asked.time).unwrap())
    }

    #[test]
    fn partition_and_time_are_required_in_the_words_that_clients_know() {
        for (wrong, message, flag) in [
            (LaunchSpec { partition: String::new(), ..asked() }, "partition is required", "--partition P"),
            (LaunchSpec { time: String::new(), ..asked() }, "time is required", "--time T"),
        ] {
            let failure = parse(&wrong, "").unwrap_err();
            assert_eq!((failure.code, failure.message.as_str()), (ErrorCode::InvalidRequest, message));
            assert!(failure.hint.contains(flag), "{failure}");
        }
        let bare = LaunchSpec { partition: String::new(), time: String::new(), ..asked() };
        let order = parse(&bare, ", partition: p, time_limit: '5', account: a, qos: q").unwrap();
        assert_eq!(order.partition, "p");
        assert_eq!(order.options, BTreeMap::from([("account".into(), "a".into()), ("qos".into(), "q".into())]));
        assert_eq!(parse(&asked(), ", partition: p").unwrap().partition, "mi2508x", "a launch wins");
    }

    #[test]
    fn only_listed_options_pass_and_only_with_harmless_values() {
        let with =
            |key: &str, value: &str| LaunchSpec { params: [(key.to_owned(), value.to_owned())].into(), ..asked() };
        let order = parse(&with("constraint", "[rack1|rack2]&mi250"), "").unwrap();
        assert_eq!(order.options["constraint"], "[rack1|rack2]&mi250");
        assert_eq!(parse(&with("exclusive", "true"), "").unwrap().options["exclusive"], "");
        assert!(parse(&with("exclusive", "no"), "").unwrap().options.is_empty());
        assert!(parse(&with("sandbox_mode", "read-only"), "").unwrap().options.is_empty(), "that is the worker's");
        for key in ["wrap", "export", "output", "job-name", "mail_user", "dependency"] {
            let failure = parse(&with(key, "x"), "").unwrap_err();
            assert!(failure.message.contains(key) && failure.hint.contains("constraint"), "{failure}");
        }
        let hostile = [
            "a b", "a'b", "a\"b", "$(x)", "`x`", "a;b", "-x", "--wrap=x", "a\nb", "a\0b", "a\\b", "ä", "#x", "%j",
            "~x", "<x",
        ];
        for value in hostile.into_iter().map(str::to_owned).chain(["x".repeat(1 << 20)]) {
            for key in ["constraint", "gres", "account", "qos", "nodelist", "mem", "exclusive"] {
                let failure = parse(&with(key, &value), "").unwrap_err();
                assert_eq!(failure.code, ErrorCode::InvalidRequest, "{key}");
                assert!(failure.message.len() < 300, "{key}: a message stays short");
            }
            let mine = |change: fn(&mut LaunchSpec, String)| {
                let mut spec = asked();
                change(&mut spec, value.clone());
                spec
            };
            for wrong in
                [mine(|spec, v| spec.partition = v), mine(|spec, v| spec.account = v), mine(|spec, v| spec.qos = v)]
            {
                assert!(parse(&wrong, "").is_err());
            }
        }
    }

    #[test]
    fn time_is_written_as_slurm_takes_it() {
        assert_eq!(parse(&asked(), "").unwrap().time(), "00:10:00");
        let days = LaunchSpec { time: "1-12".into(), ..asked() };
        assert_eq!(parse(&days, "").unwrap().time(), "1-12:00:00");
        let unlimited = LaunchSpec { time: "UNLIMITED".into(), ..asked() };
        assert_eq!(parse(&unlimited, "").unwrap().time(), "UNLIMITED");
    }
}
