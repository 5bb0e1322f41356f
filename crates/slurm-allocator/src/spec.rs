//! What is to be started, checked once at the door and trusted afterwards.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_config::{Backend, ProviderConfig};
use drover_proto::common::LaunchSpec;
use drover_types::{AgentKind, ErrorCode, Failure, UnknownName};
use serde::{Deserialize, Serialize};

use crate::slurm::Order;
use crate::walltime;

/// One file of a skills bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skill {
    /// Relative path below `.agents/skills/`; never leaves it.
    pub path: String,
    /// The text.
    pub content: String,
}

/// What is laid into the working directory of every node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// `AGENTS.md`; may be empty.
    pub agents_md: String,
    /// The skills.
    pub skills: Vec<Skill>,
}

/// What is to be started, the same for every backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Number of nodes, at least 1.
    pub node_count: u32,
    /// Which agent the workers run.
    pub agent: AgentKind,
    /// Settings of the worker that this launch overrides: `approval_policy`, `sandbox_mode`.
    pub settings: BTreeMap<String, String>,
    /// What the nodes find in their directories.
    pub bundle: Bundle,
    /// How long the allocation may last; no limit when absent.
    pub time_limit: Option<Duration>,
    /// What is asked of Slurm; only for a launch there.
    pub slurm: Option<Order>,
}

/// The most nodes a swarm may have on any backend; a typing error must not fill a disk with directories.
const MAX_NODES: u32 = 100_000;
/// Launch parameters that name the agent, in order of preference.
const AGENT_KEYS: [&str; 3] = ["agent", "agent_runtime", "worker_mode"];
/// Launch parameters that override a key of the worker's section, of the same name.
/// Launch parameter for the time limit, where the request has none of its own.
const TIME_KEY: &str = "time_limit";
const SETTING_KEYS: [&str; 2] = ["approval_policy", "sandbox_mode"];

impl Spec {
    /// Checks what was asked for against the catalogue entry it is launched on. `default_agent` runs when neither names
    /// one. Parameters that mean nothing to a worker are for other backends and are passed over.
    pub fn parse(asked: &LaunchSpec, provider: &ProviderConfig, default_agent: AgentKind) -> Result<Self, Failure> {
        if asked.node_count == 0 || asked.node_count > MAX_NODES {
            return Err(invalid(format!("a swarm has 1 to {MAX_NODES} nodes, not {}", asked.node_count)));
        }
        for field in provider.launch_fields.iter().filter(|field| !field.options.is_empty()) {
            if let Some(value) = asked.params.get(&field.key)
                && !value.is_empty()
                && !field.options.contains(value)
                && !(AGENT_KEYS.contains(&field.key.as_str()) && agent_of(value).is_ok())
            {
                let options = field.options.join(", ");
                return Err(invalid(format!("{} cannot be {value:?}, expected one of {options}", field.key)));
            }
        }
        let param = |key: &str| asked.params.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let named = Some(asked.agent.as_str()).filter(|name| !name.is_empty());
        let agent = match named.or_else(|| AGENT_KEYS.into_iter().find_map(param)) {
            Some(name) => agent_of(name)?,
            None => provider.agent.unwrap_or(default_agent),
        };
        let time = Some(asked.time.as_str()).filter(|time| !time.is_empty()).or_else(|| param(TIME_KEY));
        let time = time.or_else(|| provider.defaults.get(TIME_KEY).map(String::as_str)).unwrap_or_default();
        let settings = SETTING_KEYS.into_iter().filter_map(|key| {
            let value = param(key).or_else(|| provider.defaults.get(key).map(String::as_str))?;
            Some((key.to_owned(), value.to_owned()))
        });
        let skills = asked.skills.iter().map(|file| {
            check_path(&file.path).map_err(|why| {
                invalid(format!("skill path {:?} {why}", file.path))
                    .hint("skill paths are relative to .agents/skills/, such as fmt/SKILL.md")
            })?;
            Ok(Skill { path: file.path.clone(), content: file.content.clone() })
        });
        let time_limit = walltime::parse(time)?;
        let slurm = match provider.backend {
            Backend::Slurm => Some(Order::parse(asked, provider, time_limit)?),
            _ => None,
        };
        Ok(Self {
            slurm,
            node_count: asked.node_count,
            agent,
            settings: settings.collect(),
            bundle: Bundle { agents_md: asked.agents_md.clone(), skills: skills.collect::<Result<_, Failure>>()? },
            time_limit,
        })
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(ErrorCode::InvalidRequest, message)
}

fn agent_of(name: &str) -> Result<AgentKind, Failure> {
    // Existing launch forms call the agent that needs no model "mock".
    if name == "mock" {
        return Ok(AgentKind::Echo);
    }
    name.parse().map_err(|error: UnknownName| invalid(error.to_string()))
}

/// A path that stays below the directory it is put in, whatever it is joined to.
pub(crate) fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("is empty");
    }
    if path.len() > 1024 {
        return Err("is longer than 1024 bytes");
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return Err("has a control character or a backslash");
    }
    if path.starts_with('/') {
        return Err("is absolute");
    }
    for part in path.split('/') {
        match part {
            "" => return Err("has an empty part"),
            "." | ".." => return Err("has a \".\" or \"..\" part"),
            part if part.len() > 255 => return Err("has a part longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_config::Config;
    use drover_proto::common::SkillFile;

    fn asked() -> LaunchSpec {
        LaunchSpec { node_count: 2, agent: "echo".into(), ..LaunchSpec::default() }
    }

    fn parse(asked: &LaunchSpec) -> Result<Spec, Failure> {
        parse_with("{}", asked)
    }

    fn parse_with(config: &str, asked: &LaunchSpec) -> Result<Spec, Failure> {
        let config = Config::from_text("test", config, &BTreeMap::new()).unwrap().0;
        Spec::parse(asked, &config.providers()[0], config.worker.agent)
    }

    #[test]
    fn a_skill_cannot_leave_its_directory() {
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "a\\..\\b", "a\nb", "a\0b"] {
            let skills = vec![SkillFile { path: bad.into(), content: String::new() }];
            let failure = parse(&LaunchSpec { skills, ..asked() }).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidRequest, "{bad:?}");
        }
        let skills = vec![SkillFile { path: "fmt/SKILL.md".into(), content: "x".into() }];
        assert_eq!(parse(&LaunchSpec { skills, ..asked() }).unwrap().bundle.skills.len(), 1);
    }

    #[test]
    fn the_agent_is_the_one_named_closest_to_the_launch() {
        let with = |agent: &str, mode: &str| LaunchSpec {
            agent: agent.into(),
            params: [("worker_mode".to_owned(), mode.to_owned())].into(),
            ..asked()
        };
        let file = "worker: {agent: codex}\nlaunch_providers: [{backend: local, defaults: {worker_mode: mock}}]";
        assert_eq!(parse_with(file, &with("codex", "echo")).unwrap().agent, AgentKind::Codex);
        assert_eq!(parse_with(file, &with("", "codex")).unwrap().agent, AgentKind::Codex);
        assert_eq!(parse_with(file, &with("", "")).unwrap().agent, AgentKind::Echo);
        assert_eq!(parse_with("worker: {agent: codex}", &with("", "mock")).unwrap().agent, AgentKind::Echo);
        assert_eq!(parse_with("worker: {agent: codex}", &with("", "")).unwrap().agent, AgentKind::Codex);
        for wrong in [with("cluade", ""), with("", "cluade")] {
            let failure = parse(&wrong).unwrap_err();
            assert!(failure.message.contains("cluade") && failure.message.contains("codex"), "{failure}");
        }
        for count in [0, MAX_NODES + 1] {
            assert!(parse(&LaunchSpec { node_count: count, ..asked() }).is_err());
        }
    }

    #[test]
    fn a_time_limit_is_checked_wherever_it_comes_from() {
        let with = |time: &str, param: &str| LaunchSpec {
            time: time.into(),
            params: [("time_limit".to_owned(), param.to_owned())].into(),
            ..asked()
        };
        let limit = |asked: &LaunchSpec| parse(asked).map(|spec| spec.time_limit.map(|limit| limit.as_secs()));
        assert_eq!(limit(&with("", "")), Ok(None));
        assert_eq!(limit(&with("00:10:00", "5")), Ok(Some(600)));
        assert_eq!(limit(&with("", "5")), Ok(Some(300)));
        for wrong in [with("soon", ""), with("", "soon")] {
            assert_eq!(limit(&wrong).unwrap_err().code, ErrorCode::InvalidRequest);
        }
    }

    #[test]
    fn a_launch_overrides_the_provider_and_wrong_words_are_refused() {
        let file = "cluster: {local: {default_sandbox_mode: read-only}}";
        let params = |key: &str, value: &str| LaunchSpec {
            params: [(key.to_owned(), value.to_owned()), ("partition".to_owned(), "x".to_owned())].into(),
            ..asked()
        };
        let settings = |asked: &LaunchSpec| parse_with(file, asked).unwrap().settings;
        assert_eq!(settings(&asked())["sandbox_mode"], "read-only");
        assert_eq!(settings(&params("sandbox_mode", "workspace-write"))["sandbox_mode"], "workspace-write");
        assert_eq!(settings(&params("approval_policy", "never"))["approval_policy"], "never");
        let failure = parse_with(file, &params("sandbox_mode", "none")).unwrap_err();
        assert!(failure.message.contains("workspace-write"), "{failure}");
    }
}
