//! Which configuration of dispatching is in force, for the daemon and for those who ask about it, and where keys lie that no
//! configuration names.
//!
//! ```text
//! node_scaling of drover's own file   or else   ~/.config/clawdbot/node-scaling.yaml (or .json)   or else   simulated answers
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use drover_config::{Config, Env, LoadError, ModelPricing, NodeScalingConfig};

/// The directory below that of the user's configurations in which dispatching was configured before there was drover.
const DIRECTORY: &str = "clawdbot";
/// The files in it, the first that is there counts.
const FILES: &[&str] = &["node-scaling.yaml", "node-scaling.json"];

/// What is in force.
#[derive(Debug, Clone)]
pub struct Configured {
    /// The section.
    pub scaling: NodeScalingConfig,
    /// What models cost that the table does not have, or has wrong.
    pub pricing: BTreeMap<String, ModelPricing>,
    /// Where it came from, in words; `None` when nothing is configured and answers are simulated.
    pub source: Option<String>,
}

impl Configured {
    /// Brings the configuration together. `source` is the file that `config` was read from.
    pub fn of(config: &Config, source: Option<&Path>, env: &Env) -> Result<Self, LoadError> {
        let said = |path: &Path| path.display().to_string();
        let mut pricing = config.model_pricing.clone();
        if let Some(scaling) = &config.node_scaling {
            let source = source.map_or_else(|| "the environment".to_owned(), said);
            return Ok(Self { scaling: scaling.clone(), pricing, source: Some(source) });
        }
        let Some(path) = older_file(env) else {
            return Ok(Self { scaling: NodeScalingConfig::default(), pricing, source: None });
        };
        let loaded = Config::load(Some(&path), env)?;
        pricing.extend(loaded.config.model_pricing);
        let source = loaded.config.node_scaling.is_some().then(|| said(&path));
        let mut scaling = loaded.config.node_scaling.unwrap_or_default();
        if let Some(cap) = scaling.cost.max_daily_spend
            && scaling.cost.warn_at >= 1.0
            && cap > 1.0
        {
            // The older setup wrote a dollar here, where a share of the cap is meant now.
            scaling.cost.warn_at = 1.0 / cap;
        }
        Ok(Self { scaling, pricing, source })
    }
}

/// The user's directory of configurations. A relative path in the environment is nobody's intention.
pub fn user_dir(env: &Env) -> Option<PathBuf> {
    let var = |name: &str| env.vars.get(name).filter(|value| value.starts_with('/')).map(PathBuf::from);
    var("XDG_CONFIG_HOME").or_else(|| var("HOME").map(|home| home.join(".config")))
}

/// Where keys lie that no configuration names, and where `drover setup` writes.
pub fn key_dir(env: &Env) -> Option<PathBuf> {
    Some(user_dir(env)?.join(DIRECTORY))
}

/// The file that the key of a provider or a search engine of this name is looked for in when no variable has it.
pub fn key_file(dir: Option<&Path>, name: &str) -> Option<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    // The name is the user's own word; it must not lead out of the directory.
    (!name.is_empty() && name.chars().all(plain)).then(|| Some(dir?.join(format!("{name}-key.txt"))))?
}

/// The configuration that `drover setup` writes.
pub fn setup_file(env: &Env) -> Option<PathBuf> {
    Some(key_dir(env)?.join(FILES[0]))
}

/// The configuration from before there was drover, or of `drover setup`, when there is one.
pub(crate) fn older_file(env: &Env) -> Option<PathBuf> {
    let dir = key_dir(env)?;
    FILES.iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(home: &Path) -> Env {
        let vars = [("HOME".to_owned(), home.display().to_string())].into();
        Env { vars, ..Env::of_process() }
    }

    #[test]
    fn the_own_section_wins_then_the_older_files_in_their_order() {
        let home = tempfile::tempdir().unwrap();
        let env = env(home.path());
        let of = |config: &Config| Configured::of(config, Some(Path::new("/etc/x.yaml")), &env);
        let none = of(&Config::default()).unwrap();
        assert_eq!((none.source, none.scaling.provider.name.as_str()), (None, "sim"));

        let dir = key_dir(&env).unwrap();
        assert_eq!(dir, home.path().join(".config/clawdbot"));
        std::fs::create_dir_all(&dir).unwrap();
        let older = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        older("node-scaling.json", r#"{"node_scaling": {"limits": {"max_nodes": 3}}}"#);
        let found = of(&Config::default()).unwrap();
        assert_eq!(found.scaling.limits.max_nodes, 3);
        assert!(found.source.unwrap().ends_with("node-scaling.json"));
        // As the setup of the older program writes it.
        older(
            "node-scaling.yaml",
            "node_scaling:\n  enabled: true\n  limits: {max_nodes: 7, max_concurrent_api: 5}\n  \
             provider: {name: gemini, model: m, api_key_env: GEMINI_API_KEY}\n  \
             routing: {auto_scale_threshold: 3, enabled_task_types: [research]}\n  \
             web_search: {enabled: true, parallel_default: false}\n  cost: {max_daily_spend: 5.00, warn_at: 1.00}\n",
        );
        let found = of(&Config::default()).unwrap();
        assert_eq!((found.scaling.limits.max_nodes, found.scaling.provider.name.as_str()), (7, "gemini"));
        assert!((found.scaling.cost.warn_at - 0.2).abs() < 1e-9, "a dollar of five");
        let own = Config { node_scaling: Some(NodeScalingConfig::default()), ..Config::default() };
        let own = of(&own).unwrap();
        assert_eq!((own.source.as_deref(), own.scaling.limits.max_nodes), (Some("/etc/x.yaml"), 10));
        older("node-scaling.yaml", "node_scaling: {limits: {max_nodes: none}}\n");
        assert!(of(&Config::default()).unwrap_err().to_string().contains("node-scaling.yaml:1:"));
    }

    #[test]
    fn a_name_does_not_lead_out_of_the_directory_of_keys() {
        let dir = Path::new("/k");
        assert_eq!(key_file(Some(dir), "gemini"), Some("/k/gemini-key.txt".into()));
        for name in ["", "../x", "a/b", "a b", "."] {
            assert_eq!(key_file(Some(dir), name), None, "{name}");
        }
        assert_eq!(key_file(None, "gemini"), None);
    }
}
