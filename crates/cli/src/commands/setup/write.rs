//! What `setup` leaves behind: a configuration, and a key in a file of its own that only its owner can read.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::Chosen;
use crate::fault::Fault;

/// How a file of `setup` begins.
const OURS: &str = "# Written by `drover setup`";
/// Longest key.
const LONGEST_KEY: usize = 8 << 10;

/// Whether a file was written by an earlier `setup`.
pub(super) fn is_ours(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.starts_with(OURS))
}

/// A key as it was handed in, without what is around it. Whatever is wrong, the key is not in the message.
pub(super) fn clean_key(text: &str) -> Result<String, Fault> {
    let key = text.trim();
    if key.is_empty() || key.len() > LONGEST_KEY || key.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Fault::failed("what was handed in is no key: one word is expected")
            .hint("hand in the key and nothing else, such as: drover setup --provider gemini --key-stdin < FILE"));
    }
    Ok(key.to_owned())
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> Fault {
    let path = path.display().to_string();
    move |error| Fault::failed(format!("cannot write {path}: {error}")).hint("name another file with --to FILE")
}

fn directory_of(path: &Path) -> Result<(), Fault> {
    let Some(dir) = path.parent() else { return Ok(()) };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unwritable(dir))
}

/// Puts a text in place of a file, whole or not at all.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), Fault> {
    directory_of(path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written.map_err(unwritable(path))
}

/// Keeps a key where only its owner can read it.
pub(super) fn key(path: &Path, key: &str) -> Result<(), Fault> {
    replace(path, &format!("{key}\n"), 0o600)
}

/// Writes the configuration; gives where the one is that was there, when it is kept.
pub(super) fn configuration(path: &Path, text: &str, keep: bool) -> Result<Option<PathBuf>, Fault> {
    let mut backup = None;
    if keep && path.exists() {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".bak");
        let kept = path.with_file_name(name);
        fs::copy(path, &kept).map_err(unwritable(&kept))?;
        backup = Some(kept);
    }
    replace(path, text, 0o644)?;
    Ok(backup)
}

/// A text as YAML reads it whatever is in it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    if text.chars().all(plain) && text.starts_with(|c: char| c.is_ascii_alphabetic()) && !is_word_of_yaml(text) {
        text.to_owned()
    } else {
        serde_json::Value::from(text).to_string()
    }
}

fn is_word_of_yaml(text: &str) -> bool {
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    words.contains(&text.to_ascii_lowercase().as_str())
}

/// The configuration as text.
pub(super) fn yaml(chosen: &Chosen, today: &str) -> String {
    let Chosen { provider, pricing, max_nodes, max_concurrent_api, cap, .. } = chosen;
    let mut text = format!("{OURS} on {today}. `drover setup` again replaces it.\n");
    let mut line = |indent: usize, key: &str, value: &str| {
        let _ = writeln!(text, "{:indent$}{key}:{}{value}", "", if value.is_empty() { "" } else { " " });
    };
    line(0, "node_scaling", "");
    line(2, "enabled", "true");
    line(2, "limits", "");
    line(4, "max_nodes", &max_nodes.to_string());
    line(4, "max_concurrent_api", &max_concurrent_api.to_string());
    line(2, "provider", "");
    line(4, "name", &quoted(&provider.name));
    if let Some(model) = &provider.model {
        line(4, "model", &quoted(model));
    }
    if let Some(url) = &provider.base_url {
        line(4, "base_url", &quoted(url));
    }
    if let Some(variable) = &provider.api_key_env {
        line(4, "api_key_env", &quoted(variable));
    }
    if let Some(file) = &provider.api_key_file {
        line(4, "api_key_file", &quoted(&file.display().to_string()));
    }
    if let Some(cap) = cap {
        line(2, "cost", "");
        // Less than a cent is an amount too.
        let whole_cents = (cap * 100.0).fract() == 0.0;
        line(4, "max_daily_spend", &if whole_cents { format!("{cap:.2}") } else { cap.to_string() });
    }
    if !pricing.is_empty() {
        line(0, "model_pricing", "");
    }
    for (model, price) in pricing {
        line(2, &quoted(model), "");
        line(4, "input_tokens_usd_per_m", &price.input_tokens_usd_per_m.to_string());
        line(4, "output_tokens_usd_per_m", &price.output_tokens_usd_per_m.to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt as _;

    use drover_config::{Config, ModelPricing, ProviderSettings};

    use super::*;

    #[test]
    fn what_is_written_is_read_as_it_was_meant() {
        let provider = ProviderSettings {
            name: "my: own\n#".into(),
            model: Some("org/model:1 \"x\"".into()),
            base_url: Some("http://127.0.0.1:8000/v1".into()),
            api_key_file: Some("/a b/c: d".into()),
            ..ProviderSettings::default()
        };
        let price =
            ModelPricing { input_tokens_usd_per_m: 0.1, output_tokens_usd_per_m: 2.0, ..ModelPricing::default() };
        let chosen = Chosen {
            pricing: BTreeMap::from([("org/model:1 \"x\"".to_owned(), price.clone())]),
            provider: provider.clone(),
            max_nodes: 7,
            why_nodes: String::new(),
            max_concurrent_api: 3,
            cap: Some(2.5),
        };
        let text = yaml(&chosen, "2026-11-21");
        assert!(text.starts_with(OURS));
        let (config, warnings) = Config::from_text("x", &text, &BTreeMap::new()).unwrap();
        let scaling = config.node_scaling.unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!((scaling.provider, scaling.limits.max_nodes, scaling.limits.max_concurrent_api), (provider, 7, 3));
        assert_eq!(scaling.cost.max_daily_spend, Some(2.5));
        assert_eq!(config.model_pricing["org/model:1 \"x\""], price);
        for word in ["off", "1e3", "", "-x", "No"] {
            assert!(quoted(word).starts_with('"'), "{word}");
        }
    }

    #[test]
    fn a_key_file_is_its_owners_alone_and_a_key_is_one_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/gemini-key.txt");
        key(&path, "k-e-y").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        key(&path, "k-e-y-2").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&path).unwrap(), "k-e-y-2\n");
        assert_eq!(fs::metadata(dir.path().join("new")).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(clean_key(" k-e-y\n").unwrap(), "k-e-y");
        for text in ["", "two words", "a\u{1}b", &"x".repeat(9000)] {
            let fault = clean_key(text).unwrap_err();
            assert!(text.is_empty() || !fault.message.contains(text), "{fault:?}");
        }
    }
}
