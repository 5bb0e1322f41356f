//! Where swarms run, in every shape that existing files have. `Config::providers` gives the one meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::human::HumanDuration;
use crate::schema::{Entry, Key, Kind, section};

section! {
    /// Where swarms run. Existing files say this in several ways; all of them are read.
    pub struct ClusterConfig {
        /// The one backend of a file without `launch_providers`: `local`, `static` or `slurm`. Unset: `slurm` when the
        /// file speaks of a login host or of Slurm, else `static` when it lists hosts, else `local`.
        pub backend: Option<String> = None,
        /// Directory on the file system that login and compute nodes share. A relative one is below the state directory.
        pub workspace_root: Option<String> = None,
        /// Directory below it that is ours.
        pub cluster_subdir: Option<String> = None,
        /// Hosts of the `static` backend: workers run there under their own supervisor.
        pub hosts: Vec<String> = Vec::new(),
        /// The local backend.
        pub local: LocalBackend = LocalBackend::default(),
        /// The Slurm backend.
        pub slurm: SlurmBackend = SlurmBackend::default(),
    }
}

section! {
    /// The local backend: every node is a process on this machine.
    pub struct LocalBackend {
        /// Overrides `cluster.workspace_root` for this backend.
        pub workspace_root: Option<String> = None,
        /// What codex may touch on this backend; overrides `worker.sandbox_mode`.
        pub default_sandbox_mode: Option<String> = None,
    }
}

section! {
    /// The Slurm backend. A key of a profile wins over the same key here, a key here over `cluster` and `slurm`.
    pub struct SlurmBackend {
        /// Name of the login host, as ssh knows it.
        pub login_host: Option<String> = None,
        /// How the login host is reached: `builtin` is our own SSH client, `system` the `ssh` of this machine (for one-time
        /// passwords and Kerberos), `none` says that this machine is the login host. Unset: `builtin`.
        pub ssh: Option<String> = None,
        /// The drover program that is placed on the cluster, where this one cannot run. Unset: this one.
        pub program: Option<String> = None,
        /// Overrides `cluster.workspace_root` for this backend.
        pub workspace_root: Option<String> = None,
        /// Overrides `cluster.cluster_subdir` for this backend.
        pub cluster_subdir: Option<String> = None,
        /// Partition of a launch that names none.
        pub partition: Option<String> = None,
        /// Time limit of a launch that names none, such as `00:20:00`.
        pub time_limit: Option<String> = None,
        /// Account of a launch that names none.
        pub account: Option<String> = None,
        /// Quality of service of a launch that names none.
        pub qos: Option<String> = None,
        /// When codex asks before it acts on this backend; overrides `worker.approval_policy`.
        pub approval_policy: Option<String> = None,
        /// How often the queue is looked at when nothing is expected of it. Unset: 30 s.
        pub poll: Option<HumanDuration> = None,
        /// Most requests per minute to the cluster's controller, whatever happens, as `sdiag` counts them: a look at the queue is
        /// three. Unset: 60.
        pub calls_per_minute: Option<u32> = None,
        /// Directory that every compute node has on a disk of its own; workers keep theirs below it. Unset: /var/tmp.
        pub local_dir: Option<String> = None,
        /// Named variants of this section: each may set any of the keys above.
        pub profiles: Profiles = Profiles::default(),
    }
}

/// The named variants of the Slurm backend.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Profiles(pub BTreeMap<String, SlurmBackend>);

impl Kind for Profiles {
    fn kind() -> String {
        "map from name to the keys of `cluster.slurm`".to_owned()
    }

    fn describe(path: &str, doc: &str, _default: &Value, out: &mut Vec<Entry>) {
        out.push(Entry::Key(Key {
            path: path.to_owned(),
            kind: Self::kind(),
            default: "{}".to_owned(),
            doc: doc.to_owned(),
        }));
    }
}

section! {
    /// How the login host is reached, in the older shape of the file.
    pub struct SshConfig {
        /// Name of the login host, as ssh knows it; `cluster.slurm.login_host` wins.
        pub login_alias: Option<String> = None,
    }
}

section! {
    /// What a launch that names nothing asks Slurm for, in the older shape of the file; `cluster.slurm` wins.
    pub struct SlurmDefaults {
        /// Partition.
        pub default_partition: Option<String> = None,
        /// Time limit, such as `00:20:00`.
        pub default_time: Option<String> = None,
        /// Account.
        pub default_account: Option<String> = None,
        /// Quality of service.
        pub default_qos: Option<String> = None,
    }
}

section! {
    /// The catalogue of places to launch swarms on: a list, or a map keyed by id. The first entry is the default.
    pub struct LaunchProvider {
        /// Id used in launches. Unset: the backend and the position, such as `slurm-1`.
        pub id: Option<String> = None,
        /// Name for people. Unset: the id.
        pub label: Option<String> = None,
        /// `local`, `static` or `slurm`. An entry with a backend that drover does not have is listed as disabled.
        pub backend: String = String::new(),
        /// Which entry of `cluster.slurm.profiles` it uses. Unset: `default`, or else the first.
        pub cluster_profile: Option<String> = None,
        /// Launch parameters that a launch does not name; `worker_mode` chooses the agent.
        pub defaults: BTreeMap<String, Value> = BTreeMap::new(),
        /// Parameters that a launch form shows. Unset: those of the backend.
        pub launch_fields: Option<Vec<Value>> = None,
    }
}

section! {
    /// What the tokens of a model cost.
    pub struct ModelPricing {
        /// US dollars for a million input tokens.
        pub input_tokens_usd_per_m: f64 = 0.0,
        /// US dollars for a million input tokens that were cached.
        pub cached_input_tokens_usd_per_m: f64 = 0.0,
        /// US dollars for a million output tokens.
        pub output_tokens_usd_per_m: f64 = 0.0,
        /// US dollars for a million output tokens of reasoning.
        pub reasoning_output_tokens_usd_per_m: f64 = 0.0,
    }
}
