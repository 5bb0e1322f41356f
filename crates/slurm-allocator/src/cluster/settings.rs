//! Which clusters the configuration speaks of, and how each is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drover_config::{Backend, Config, ProviderConfig, SshWay};
use drover_service::Context;
use drover_ssh::{Local, Remote, RemotePath, Russh, Settings, SshError, System, Terminal};
use drover_types::{ErrorCode, Failure, shortened};
use serde_json::json;

use super::shared::Cluster;

/// A follower on a login host that nobody has used for so long ends, unless the configuration says otherwise.
const END_WHEN_IDLE: Duration = Duration::from_mins(30);

/// How a login host is reached.
#[derive(Clone)]
pub enum Way {
    /// By our own client.
    Builtin(Box<Settings>),
    /// By the `ssh` of this machine.
    System(Box<Settings>),
    /// This host is the login host.
    Here,
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin(settings) => write!(f, "Builtin({})", settings.host),
            Self::System(settings) => write!(f, "System({})", settings.host),
            Self::Here => f.write_str("Here"),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin(settings) => write!(f, "ssh to {}", settings.host),
            Self::System(settings) => write!(f, "this machine's ssh to {}", settings.host),
            Self::Here => f.write_str("this machine, which is the login host,"),
        }
    }
}

/// One cluster: a login host and a directory on the file system that it shares with its compute nodes.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// Its name: id of the first entry of the catalogue that launches on it.
    pub name: String,
    /// How its login host is reached.
    pub way: Way,
    /// Our directory on the shared file system.
    pub base: String,
    /// The file that is placed there.
    pub program: PathBuf,
    /// Settings of the follower there, as JSON.
    pub follower: String,
    /// This machine is the login host, and its own follower serves the mailbox: nothing has to be started or carried.
    pub own_follower: bool,
}

impl ClusterSettings {
    /// The cluster that an entry of the catalogue launches on.
    pub fn of(config: &Config, provider: &ProviderConfig) -> Result<Self, Failure> {
        let wrong = |message: String, hint: &str| Failure::new(ErrorCode::InvalidRequest, message).hint(hint);
        let name = &provider.id;
        let (Some(root), Some(subdir)) = (&provider.workspace_root, &provider.cluster_subdir) else {
            let message = format!("{name} has no workspace_root and cluster_subdir");
            return Err(wrong(message, "set both: they name our directory on the shared file system"));
        };
        let base = format!("{}/{}", root.trim_end_matches('/'), subdir.trim_matches('/'));
        RemotePath::new(format!("{base}/x")).map_err(|_| {
            wrong(
                format!("{:?} cannot be our directory on {name}", shortened(&base, 200)),
                "workspace_root must be an absolute path, as it is seen from the login host",
            )
        })?;
        let host = provider.login_host.clone().unwrap_or_default();
        let way = match provider.ssh {
            SshWay::None => Way::Here,
            _ if host.is_empty() => {
                let hint = "set login_host, or `ssh: none` when this machine is the login host";
                return Err(wrong(format!("{name} has no login host"), hint));
            }
            SshWay::Builtin => Way::Builtin(Box::new(Settings::from_env(host))),
            SshWay::System => Way::System(Box::new(Settings::from_env(host))),
        };
        let program = match &provider.program {
            Some(path) => path.clone(),
            None => drover_service::programs::whole()
                .map_err(|why| wrong(why, "name the file with cluster.slurm.program"))?,
        };
        // Whatever the state directory is: both are below it, or neither.
        let state = Path::new("/");
        let own_follower = matches!(way, Way::Here) && config.mailbox_root(state) == provider.mailbox_root(state);
        Ok(Self { name: name.clone(), way, base, program, follower: follower_settings(config), own_follower })
    }

    /// A person who sits at a terminal can say yes to a host that is not known yet; daemons ask nobody.
    pub fn ask_on_a_terminal(&mut self) {
        if let Way::Builtin(settings) | Way::System(settings) = &mut self.way
            && std::io::stdin().is_terminal()
            && !settings.prompt.interactive()
        {
            settings.prompt = Arc::new(Terminal);
        }
    }

    /// Name of its follower in the address book.
    pub fn follower_name(&self) -> String {
        format!("outbox-follower@{}", self.file_name())
    }

    /// Its name as part of the name of a file.
    pub(crate) fn file_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        self.name.chars().map(plain).collect()
    }

    /// Where the mailbox of its swarms is.
    pub fn mailbox(&self) -> String {
        format!("{}/mailbox", self.base)
    }

    /// Begins to connect. `bridge` stands in where the host forbids forwarding. Must be called within a tokio runtime.
    pub(crate) fn connect(&self, bridge: &str) -> Result<Arc<dyn Remote>, SshError> {
        let with_bridge = |settings: &Settings| Settings {
            bridge: settings.bridge.clone().or_else(|| Some(vec![bridge.into(), "connect".into()])),
            ..settings.clone()
        };
        Ok(match &self.way {
            Way::Builtin(settings) => Arc::new(Russh::new(with_bridge(settings))?),
            Way::System(settings) => Arc::new(System::new(Settings {
                // Only where it was asked for: the bridge is a session of its own, `ssh -W` is not.
                bridge: settings.bridge.clone(),
                ..(**settings).clone()
            })?),
            Way::Here => Arc::new(Local::new()),
        })
    }
}

fn follower_settings(config: &Config) -> String {
    let follower = &config.follower;
    let idle = follower.end_when_idle.map_or(END_WHEN_IDLE, drover_config::HumanDuration::get);
    let millis = |duration: Duration| format!("{}ms", duration.as_millis());
    json!({ "follower": {
        "hot_poll": millis(follower.hot_poll.get()), "cold_poll": millis(follower.cold_poll.get()),
        "segment_bytes": follower.segment_bytes.get(), "end_when_idle": millis(idle),
    }})
    .to_string()
}

/// All clusters of a configuration, by the catalogue entries that launch on them. Entries with the same login host and the same
/// directory share one cluster: one connection, one follower.
#[derive(Debug, Clone, Default)]
pub struct Clusters {
    by_provider: BTreeMap<String, Result<Cluster, Failure>>,
}

impl Clusters {
    /// The clusters of this configuration. Nothing is connected to yet.
    pub fn new(ctx: &Context, config: &Config) -> Self {
        let mut known: BTreeMap<(String, String), Cluster> = BTreeMap::new();
        let mut by_provider = BTreeMap::new();
        for provider in config.providers() {
            if provider.backend != Backend::Slurm || provider.disabled_reason.is_some() {
                continue;
            }
            let cluster = ClusterSettings::of(config, &provider).map(|settings| {
                let place = (format!("{:?}", settings.way), settings.base.clone());
                known.entry(place).or_insert_with(|| Cluster::new(ctx, settings)).clone()
            });
            by_provider.insert(provider.id, cluster);
        }
        Self { by_provider }
    }

    /// The cluster behind an entry of the catalogue.
    pub fn get(&self, provider: &str) -> Result<Cluster, Failure> {
        self.by_provider.get(provider).cloned().unwrap_or_else(|| {
            Err(Failure::new(ErrorCode::UnknownProvider, format!("no cluster is called {provider:?}")))
        })
    }

    /// Name in the address book of the follower for each entry of the catalogue that launches on a cluster with one of its own.
    pub fn followers(&self) -> BTreeMap<String, String> {
        let named = self
            .by_provider
            .iter()
            .filter_map(|(id, cluster)| Some((id, cluster.as_ref().ok()?.settings())))
            .filter(|(_, settings)| !settings.own_follower)
            .map(|(id, settings)| (id.clone(), settings.follower_name()));
        named.collect()
    }

    /// The entries of the catalogue that launch on this cluster, when it has a mailbox that is not this host's.
    pub(crate) fn providers_of(&self, cluster: &Cluster) -> BTreeSet<String> {
        let settings = cluster.settings();
        if settings.own_follower {
            return BTreeSet::new();
        }
        let on_it =
            |other: &Result<Cluster, Failure>| other.as_ref().is_ok_and(|other| other.settings().name == settings.name);
        self.by_provider.iter().filter(|(_, other)| on_it(other)).map(|(id, _)| id.clone()).collect()
    }

    /// Each cluster once.
    pub fn all(&self) -> Vec<Cluster> {
        let mut all: Vec<Cluster> = Vec::new();
        for cluster in self.by_provider.values().flatten() {
            if all.iter().all(|other| other.settings().name != cluster.settings().name) {
                all.push(cluster.clone());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::from_text("test.yaml", text, &BTreeMap::new()).unwrap().0
    }

    fn of(text: &str) -> Result<ClusterSettings, Failure> {
        let config = config(text);
        ClusterSettings::of(&config, &config.providers()[0])
    }

    #[test]
    fn a_cluster_is_reached_and_furnished_as_configured() {
        let file = |more: &str| {
            format!(
                "cluster: {{slurm: {{login_host: hpc, workspace_root: /shared/, cluster_subdir: me, program: /p{more}}}}}"
            )
        };
        let settings = of(&file("")).unwrap();
        assert_eq!(format!("{:?}", settings.way), "Builtin(hpc)");
        assert_eq!((settings.base.as_str(), settings.program), ("/shared/me", PathBuf::from("/p")));
        assert_eq!(format!("{:?}", of(&file(", ssh: system")).unwrap().way), "System(hpc)");
        assert_eq!(format!("{:?}", of(&file(", ssh: none")).unwrap().way), "Here");
        let error = Config::from_text("test.yaml", &file(", ssh: telnet"), &BTreeMap::new()).unwrap_err();
        assert!(error.to_string().contains("builtin, system, none"), "{error}");
        assert!(settings.follower.contains("\"end_when_idle\":\"1800000ms\""), "{}", settings.follower);
        let relative = file("").replace("/shared/", "shared");
        assert!(of(&relative).unwrap_err().hint.contains("absolute"));
    }

    #[test]
    fn the_settings_that_a_follower_gets_are_a_configuration_of_its_own() {
        let ours = "follower: {hot_poll: 70ms, cold_poll: 3s, segment_bytes: 1MiB, end_when_idle: 5m}\n\
                    cluster: {slurm: {login_host: h, workspace_root: /s, cluster_subdir: c, program: /p}}";
        let theirs = config(&of(ours).unwrap().follower).follower;
        let ours = config(ours).follower;
        assert_eq!((theirs.hot_poll, theirs.cold_poll), (ours.hot_poll, ours.cold_poll));
        assert_eq!((theirs.segment_bytes, theirs.end_when_idle), (ours.segment_bytes, ours.end_when_idle));
    }

    #[tokio::test]
    async fn entries_of_one_place_share_one_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let ctx = Context::for_test("slurm-allocator", dir.path());
        let config = config(
            "cluster: {slurm: {login_host: one, workspace_root: /s, cluster_subdir: c, program: /p, profiles: {\n\
               a: {partition: x}, b: {partition: long}, far: {login_host: two}}}}\n\
             launch_providers:\n  - {id: a, backend: slurm, cluster_profile: a}\n  - {id: b, backend: slurm, cluster_profile: b}\n  \
               - {id: far, backend: slurm, cluster_profile: far}\n  - {id: here, backend: local}\n",
        );
        let clusters = Clusters::new(&ctx, &config);
        let name = |provider: &str| clusters.get(provider).map(|cluster| cluster.settings().name.clone());
        assert_eq!(
            (name("a").unwrap(), name("b").unwrap(), name("far").unwrap()),
            ("a".into(), "a".into(), "far".into())
        );
        assert_eq!(name("here").unwrap_err().code, ErrorCode::UnknownProvider);
        assert_eq!(clusters.all().len(), 2);
    }
}
