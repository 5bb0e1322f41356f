//! The one meaning of the cluster sections: a catalogue of places to launch on, in order of preference.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use drover_types::AgentKind;
use serde_json::Value;

use crate::cluster::{LaunchProvider, SlurmBackend};
use crate::{Config, Problem};

/// What runs the workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Processes on this machine.
    Local,
    /// Workers on listed hosts, started there by their own supervisor.
    Static,
    /// Jobs of a Slurm cluster.
    Slurm,
    /// One that an existing file names and drover does not have.
    Foreign(String),
}

impl Backend {
    /// The word in the file and in the protocol.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Local => "local",
            Self::Static => "static",
            Self::Slurm => "slurm",
            Self::Foreign(name) => name,
        }
    }

    fn from_name(name: &str) -> Self {
        match name {
            "local" => Self::Local,
            "static" => Self::Static,
            "slurm" => Self::Slurm,
            other => Self::Foreign(other.to_owned()),
        }
    }
}

/// How a login host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SshWay {
    /// By our own client.
    #[default]
    Builtin,
    /// By the `ssh` of this machine.
    System,
    /// This machine is the login host.
    None,
}

impl SshWay {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "builtin" => Some(Self::Builtin),
            "system" => Some(Self::System),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

/// One place to launch swarms on, with everything about it looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct ProviderConfig {
    /// Id used in launches.
    pub id: String,
    /// Name for people.
    pub label: String,
    /// What runs the workers.
    pub backend: Backend,
    /// The backend, with its profile after a colon when it has one.
    pub provider_ref: String,
    /// Profile of the cluster.
    pub profile: Option<String>,
    /// Launch parameters that a launch does not name.
    pub defaults: BTreeMap<String, String>,
    /// The agent that `defaults` ask for.
    pub agent: Option<AgentKind>,
    /// Name of the login host, as ssh knows it.
    pub login_host: Option<String>,
    /// How the login host is reached.
    pub ssh: SshWay,
    /// The drover program that is placed on the cluster, where this one cannot run.
    pub program: Option<PathBuf>,
    /// Directory on the shared file system.
    pub workspace_root: Option<String>,
    /// Directory below it that is ours.
    pub cluster_subdir: Option<String>,
    /// Hosts of the static backend.
    pub hosts: Vec<String>,
    /// Parameters that a launch form shows.
    pub launch_fields: Vec<LaunchFieldConfig>,
    /// Why it cannot be launched on, when it cannot.
    pub disabled_reason: Option<String>,
}

/// One parameter of a launch form.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LaunchFieldConfig {
    /// Name of the parameter.
    pub key: String,
    /// Name for people.
    pub label: String,
    /// `text`, `number`, `boolean` or `select`.
    pub kind: String,
    /// Default as text; may be empty.
    pub default: String,
    /// Must be given.
    pub required: bool,
    /// Choices of a select.
    pub options: Vec<String>,
}

impl ProviderConfig {
    /// Where the mailbox of its swarms is: on the shared file system, or else below the state directory.
    pub fn mailbox_root(&self, state_dir: &Path) -> PathBuf {
        match &self.workspace_root {
            Some(root) => state_dir.join(root).join(self.cluster_subdir.as_deref().unwrap_or("")).join("mailbox"),
            None => state_dir.join("mailbox"),
        }
    }
}

impl Config {
    /// Every place that swarms can be launched on; the first is the default.
    pub fn providers(&self) -> Vec<ProviderConfig> {
        self.resolve_providers().0
    }

    /// Where the mailbox on this side of the file system is: that of the cluster whose login host this machine is, else that
    /// of the first local or static provider.
    pub fn mailbox_root(&self, state_dir: &Path) -> PathBuf {
        let providers = self.providers();
        let login = |provider: &&ProviderConfig| provider.backend == Backend::Slurm && provider.ssh == SshWay::None;
        let here = |provider: &&ProviderConfig| matches!(provider.backend, Backend::Local | Backend::Static);
        providers
            .iter()
            .find(login)
            .or_else(|| providers.iter().find(here))
            .map_or_else(|| state_dir.join("mailbox"), |provider| provider.mailbox_root(state_dir))
    }

    /// The catalogue, and what is wrong with it.
    pub(crate) fn resolve_providers(&self) -> (Vec<ProviderConfig>, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut seen = BTreeSet::new();
        let mut catalogue = Vec::new();
        if self.launch_providers.is_empty() {
            let backend = self.only_backend();
            if let Backend::Foreign(name) = &backend
                && name != "aws"
            {
                problems.push(Problem::new("cluster.backend", unknown_backend(name)));
            }
            let entry = LaunchProvider {
                id: Some(backend.as_str().to_owned()),
                backend: backend.as_str().to_owned(),
                ..LaunchProvider::default()
            };
            catalogue.push(self.resolve(&entry, 0, "cluster", &mut problems));
        }
        for (index, entry) in self.launch_providers.iter().enumerate() {
            let path = format!("launch_providers[{index}]");
            if entry.backend.is_empty() {
                problems.push(Problem::new(&path, format!("Missing required config field: {path}.backend")));
                continue;
            }
            if let Backend::Foreign(name) = Backend::from_name(&entry.backend)
                && name != "aws"
            {
                problems.push(Problem::new(format!("{path}.backend"), unknown_backend(&name)));
            }
            let provider = self.resolve(entry, index, &path, &mut problems);
            if !seen.insert(provider.id.clone()) {
                problems
                    .push(Problem::new(format!("{path}.id"), format!("provider id {:?} is used twice", provider.id)));
            }
            catalogue.push(provider);
        }
        (catalogue, problems)
    }

    /// The backend of a file without a catalogue.
    fn only_backend(&self) -> Backend {
        match &self.cluster.backend {
            Some(name) => Backend::from_name(name),
            None if self.speaks_of_slurm() => Backend::Slurm,
            None if !self.cluster.hosts.is_empty() => Backend::Static,
            None => Backend::Local,
        }
    }

    fn speaks_of_slurm(&self) -> bool {
        self.ssh.is_some() || self.slurm.is_some() || self.cluster.slurm != SlurmBackend::default()
    }

    fn resolve(&self, entry: &LaunchProvider, index: usize, path: &str, problems: &mut Vec<Problem>) -> ProviderConfig {
        let backend = Backend::from_name(&entry.backend);
        let id = entry.id.clone().unwrap_or_else(|| format!("{}-{}", entry.backend, index + 1));
        let mut provider = ProviderConfig {
            label: entry.label.clone().unwrap_or_else(|| id.clone()),
            id,
            provider_ref: entry.backend.clone(),
            profile: None,
            defaults: entry.defaults.iter().filter_map(|(key, value)| Some((key.clone(), plain(value)?))).collect(),
            agent: None,
            login_host: None,
            ssh: SshWay::default(),
            program: None,
            workspace_root: self.cluster.workspace_root.clone(),
            cluster_subdir: self.cluster.cluster_subdir.clone(),
            hosts: Vec::new(),
            launch_fields: Vec::new(),
            disabled_reason: None,
            backend: backend.clone(),
        };
        match &backend {
            Backend::Local => self.resolve_local(&mut provider),
            Backend::Static => self.resolve_static(&mut provider, problems),
            Backend::Slurm => self.resolve_slurm(&mut provider, entry.cluster_profile.as_deref(), path, problems),
            Backend::Foreign(name) => provider.disabled_reason = Some(format!("drover has no {name} backend")),
        }
        // Codex has given up this policy; it asked after a command had failed in the sandbox, which `on-request` does too.
        if let Some(policy) = provider.defaults.get_mut("approval_policy").filter(|policy| *policy == "on-failure") {
            "on-request".clone_into(policy);
        }
        for key in ["worker_mode", "agent_runtime", "agent"] {
            let Some(word) = provider.defaults.get(key) else { continue };
            match agent_of(word) {
                Some(agent) => provider.agent = Some(agent),
                None => provider.disabled_reason = Some(format!("drover has no agent {word:?}")),
            }
        }
        provider.launch_fields = match &entry.launch_fields {
            Some(fields) => fields.iter().filter_map(launch_field).collect(),
            None => default_fields(&provider),
        };
        provider
    }

    fn resolve_local(&self, provider: &mut ProviderConfig) {
        let local = &self.cluster.local;
        if local.workspace_root.is_some() {
            provider.workspace_root.clone_from(&local.workspace_root);
        }
        default_to(&mut provider.defaults, "sandbox_mode", local.default_sandbox_mode.as_ref());
    }

    fn resolve_static(&self, provider: &mut ProviderConfig, problems: &mut Vec<Problem>) {
        provider.hosts.clone_from(&self.cluster.hosts);
        if self.cluster.hosts.is_empty() {
            problems.push(Problem::missing("cluster", "hosts"));
        }
        if self.cluster.workspace_root.is_none() {
            problems.push(Problem::missing("cluster", "workspace_root"));
        }
    }

    fn resolve_slurm(
        &self,
        provider: &mut ProviderConfig,
        profile: Option<&str>,
        path: &str,
        problems: &mut Vec<Problem>,
    ) {
        let base = &self.cluster.slurm;
        let profiles = &base.profiles.0;
        let chosen = match profile {
            Some(name) => Some(name.to_owned()),
            None if profiles.contains_key("default") => Some("default".to_owned()),
            None => profiles.keys().next().cloned(),
        };
        let empty = SlurmBackend::default();
        let named = chosen.as_ref().and_then(|name| profiles.get(name));
        if let (Some(name), None) = (&chosen, named) {
            let known = profiles.keys().cloned().collect::<Vec<_>>().join(", ");
            problems.push(Problem::new(
                format!("{path}.cluster_profile"),
                format!(
                    "cluster.slurm.profiles has no {name:?}, it has: {}",
                    if known.is_empty() { "none" } else { &known }
                ),
            ));
            return;
        }
        let own = named.unwrap_or(&empty);
        if let Some(name) = chosen {
            provider.provider_ref = format!("slurm:{name}");
            provider.profile = Some(name);
        }
        let first = |candidates: [&Option<String>; 3]| candidates.into_iter().flatten().next().cloned();
        let alias = self.ssh.as_ref().and_then(|ssh| ssh.login_alias.clone());
        provider.login_host = first([&own.login_host, &base.login_host, &alias]);
        provider.workspace_root = first([&own.workspace_root, &base.workspace_root, &self.cluster.workspace_root]);
        provider.cluster_subdir = first([&own.cluster_subdir, &base.cluster_subdir, &self.cluster.cluster_subdir]);
        provider.program = first([&own.program, &base.program, &None]).map(PathBuf::from);
        if let Some(name) = first([&own.ssh, &base.ssh, &None]) {
            match SshWay::from_name(&name) {
                Some(way) => provider.ssh = way,
                None => problems.push(Problem::new(
                    "cluster.slurm.ssh",
                    format!("unknown value {name:?}, expected one of builtin, system, none"),
                )),
            }
        }
        let old = self.slurm.clone().unwrap_or_default();
        for (key, value) in [
            ("partition", first([&own.partition, &base.partition, &old.default_partition])),
            ("time_limit", first([&own.time_limit, &base.time_limit, &old.default_time])),
            ("account", first([&own.account, &base.account, &old.default_account])),
            ("qos", first([&own.qos, &base.qos, &old.default_qos])),
            ("approval_policy", first([&own.approval_policy, &base.approval_policy, &None])),
        ] {
            default_to(&mut provider.defaults, key, value.as_ref());
        }
        if provider.login_host.is_none() && provider.ssh != SshWay::None {
            problems.push(if *base == empty {
                Problem::missing("ssh", "login_alias")
            } else {
                Problem::missing("cluster.slurm", "login_host")
            });
        }
        for (key, value) in [("workspace_root", &provider.workspace_root), ("cluster_subdir", &provider.cluster_subdir)]
        {
            if value.is_none() {
                problems.push(Problem::missing("cluster", key));
            }
        }
    }
}

fn unknown_backend(name: &str) -> String {
    format!("unknown value {name:?}, expected one of local, static, slurm")
}

/// A parameter as text; nothing for `null`.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn default_to(defaults: &mut BTreeMap<String, String>, key: &str, value: Option<&String>) {
    if let Some(value) = value {
        defaults.entry(key.to_owned()).or_insert_with(|| value.clone());
    }
}

/// The agent that an existing file means by a worker mode.
fn agent_of(word: &str) -> Option<AgentKind> {
    match word {
        "mock" => Some(AgentKind::Echo),
        other => other.parse().ok(),
    }
}

fn launch_field(value: &Value) -> Option<LaunchFieldConfig> {
    let text = |key: &str| value.get(key).and_then(plain).unwrap_or_default();
    let key = value.get("key")?.as_str()?.to_owned();
    let label = text("label");
    let options = value.get("options").and_then(Value::as_array).into_iter().flatten();
    Some(LaunchFieldConfig {
        label: if label.is_empty() { key.clone() } else { label },
        kind: match text("type") {
            kind if kind.is_empty() => "text".to_owned(),
            kind => kind,
        },
        default: text("default"),
        required: value.get("required").and_then(Value::as_bool).unwrap_or(false),
        options: options.filter_map(|option| plain(option.get("value").unwrap_or(option))).collect(),
        key,
    })
}

/// What a launch form shows when the file does not say.
fn default_fields(provider: &ProviderConfig) -> Vec<LaunchFieldConfig> {
    let field = |key: &str, label: &str, options: &[&str]| LaunchFieldConfig {
        key: key.to_owned(),
        label: label.to_owned(),
        kind: if options.is_empty() { "text" } else { "select" }.to_owned(),
        default: provider.defaults.get(key).cloned().unwrap_or_default(),
        required: false,
        options: options.iter().map(|&option| option.to_owned()).collect(),
    };
    let mut fields = match provider.backend {
        Backend::Slurm => vec![
            field("partition", "Partition", &[]),
            field("time_limit", "Time limit", &[]),
            field("account", "Account", &[]),
            field("qos", "QoS", &[]),
        ],
        Backend::Local | Backend::Static => Vec::new(),
        Backend::Foreign(_) => return Vec::new(),
    };
    let agents: Vec<&str> = AgentKind::ALL.iter().map(|agent| agent.as_str()).collect();
    fields.push(field("worker_mode", "Agent", &agents));
    fields.push(field("approval_policy", "Approval policy", crate::validate::APPROVAL_POLICIES));
    fields.push(field("sandbox_mode", "Sandbox", crate::validate::SANDBOX_MODES));
    fields
}
