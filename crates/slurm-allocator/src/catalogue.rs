//! What swarms can be launched on: the configuration's catalogue, less what this program cannot do.

use std::fmt;

use drover_config::{Backend as ConfigBackend, Config, ProviderConfig};
use drover_types::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};

/// What runs the workers of an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// Processes on this machine.
    Local,
    /// Workers on listed hosts, under their own supervisor.
    Static,
    /// Jobs of a Slurm cluster.
    Slurm,
}

impl BackendKind {
    /// Its word in configuration and protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Static => "static",
            Self::Slurm => "slurm",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Every entry in order of preference; the first is the default. One that cannot be launched on says why.
pub fn providers(config: &Config) -> Vec<ProviderConfig> {
    let mut catalogue = config.providers();
    for provider in &mut catalogue {
        if provider.disabled_reason.is_none() {
            provider.disabled_reason = why_not(provider);
        }
    }
    catalogue
}

/// The entry that a launch means, and the backend behind it.
pub(crate) fn choose(config: &Config, asked: &str) -> Result<(BackendKind, ProviderConfig), Failure> {
    let catalogue = providers(config);
    let usable: Vec<&str> =
        catalogue.iter().filter(|entry| entry.disabled_reason.is_none()).map(|entry| entry.id.as_str()).collect();
    let hint = if usable.is_empty() {
        "add a provider with backend local, static or slurm to the configuration".to_owned()
    } else {
        format!("launch on one of: {}", usable.join(", "))
    };
    let found = if asked.is_empty() { catalogue.first() } else { catalogue.iter().find(|entry| entry.id == asked) };
    let Some(provider) = found else {
        let message = if asked.is_empty() {
            "the configuration has no provider to launch on".to_owned()
        } else {
            format!("no provider is called {asked:?}")
        };
        return Err(Failure::new(ErrorCode::UnknownProvider, message).hint(hint));
    };
    match (kind_of(provider), &provider.disabled_reason) {
        (Some(kind), None) => Ok((kind, provider.clone())),
        (_, reason) => {
            let reason = reason.as_deref().unwrap_or("it is disabled");
            let message = format!("provider {:?} cannot be used: {reason}", provider.id);
            Err(Failure::new(ErrorCode::ProviderUnavailable, message).hint(hint))
        }
    }
}

/// Why nothing can be launched on an entry that the configuration has nothing against.
fn why_not(provider: &ProviderConfig) -> Option<String> {
    match kind_of(provider) {
        None => Some(format!("this version of drover cannot launch on {}", provider.backend.as_str())),
        Some(_) => None,
    }
}

fn kind_of(provider: &ProviderConfig) -> Option<BackendKind> {
    match provider.backend {
        ConfigBackend::Local => Some(BackendKind::Local),
        ConfigBackend::Static => Some(BackendKind::Static),
        ConfigBackend::Slurm => Some(BackendKind::Slurm),
        ConfigBackend::Foreign(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn config(text: &str) -> Config {
        Config::from_text("test.yaml", text, &BTreeMap::new()).unwrap().0
    }

    #[test]
    fn what_cannot_be_launched_on_is_listed_with_a_reason_and_refused_with_it() {
        let config = config("launch_providers:\n  - {id: s, backend: aws}\n  - {id: here, backend: local}\n");
        let listed = providers(&config);
        let reason = listed[0].disabled_reason.clone().unwrap();
        assert!(reason.contains("aws"), "{reason}");
        assert_eq!(listed[1].disabled_reason, None);
        for asked in ["s", ""] {
            let failure = choose(&config, asked).unwrap_err();
            assert_eq!(failure.code, ErrorCode::ProviderUnavailable);
            assert!(failure.message.contains(&reason) && failure.hint.contains("here"), "{failure:?}");
        }
        assert_eq!(choose(&config, "here").unwrap().0, BackendKind::Local);
        let failure = choose(&config, "hree").unwrap_err();
        assert!(failure.code == ErrorCode::UnknownProvider && failure.hint.contains("here"), "{failure:?}");
    }

    #[test]
    fn slurm_is_launched_on_from_its_login_host_and_from_elsewhere() {
        for way in ["ssh: none", "login_host: h", "login_host: h, ssh: system"] {
            let config = config(&format!("cluster: {{slurm: {{{way}, workspace_root: /w, cluster_subdir: c}}}}"));
            assert_eq!(providers(&config)[0].disabled_reason, None, "{way}");
            assert_eq!(choose(&config, "").unwrap().0, BackendKind::Slurm, "{way}");
        }
    }

    #[test]
    fn without_a_word_it_is_this_machine() {
        assert_eq!(choose(&Config::default(), "").unwrap().0, BackendKind::Local);
    }
}
