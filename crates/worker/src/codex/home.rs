//! The node's own CODEX_HOME, and what of our environment codex may see.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::{CodexSettings, PoolDoor};

/// Marks every process of a node's agent, so that its orphans are found. Children inherit it.
pub(super) const MARK: &str = "DROVER_AGENT_OF";

/// Variables that say nothing secret and that programs expect.
const HARMLESS: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TERM",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// Makes the home ready: a copy of `config.toml`, because codex writes into it, and a link to `auth.json`, so that
/// credentials stay in one place and a refreshed token is seen by all.
pub(super) fn prepare(settings: &CodexSettings) -> io::Result<()> {
    private_dir(&settings.codex_home)?;
    if let Some(source) = &settings.home_source
        && fs::canonicalize(source).ok() != fs::canonicalize(&settings.codex_home).ok()
    {
        copy_config(&source.join("config.toml"), &settings.codex_home.join("config.toml"))?;
        // One that asks the pool needs no credentials, and then has none.
        let credentials = settings.pool.is_none().then(|| source.join("auth.json"));
        link_credentials(credentials.as_deref(), &settings.codex_home.join("auth.json"))?;
    }
    if let Some(dir) = own_temp_dir(settings) {
        private_dir(&dir)?;
    }
    Ok(())
}

/// The whole environment of codex.
pub(super) fn environment(settings: &CodexSettings) -> Vec<(OsString, OsString)> {
    let allowed = |name: &str| {
        // Keys of providers stay with the dispatcher where it is asked.
        let key = settings.pool.is_some() && name.ends_with("_API_KEY");
        let named = settings.env_allow.iter().any(|allow| allow == name) && !key;
        HARMLESS.contains(&name) || name.starts_with("LC_") || named
    };
    let mut vars: Vec<(OsString, OsString)> =
        std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(allowed)).collect();
    vars.push(("CODEX_HOME".into(), settings.codex_home.clone().into()));
    vars.push((MARK.into(), mark(settings)));
    if let Some(pool) = &settings.pool {
        vars.push((PoolDoor::VARIABLE.into(), pool.token.reveal().into()));
    }
    if let Some(dir) = own_temp_dir(settings) {
        vars.push(("TMPDIR".into(), dir.into()));
    }
    vars
}

/// What the mark says: the node's directory, which no two nodes share.
pub(super) fn mark(settings: &CodexSettings) -> OsString {
    fs::canonicalize(&settings.node_dir).unwrap_or_else(|_| settings.node_dir.clone()).into()
}

/// Codex refuses to set up its sandbox when its home lies below the temporary directory, and then every command fails. In
/// that case it gets a temporary directory of its own beside the home.
fn own_temp_dir(settings: &CodexSettings) -> Option<PathBuf> {
    let home = fs::canonicalize(&settings.codex_home).unwrap_or_else(|_| settings.codex_home.clone());
    let temp = std::env::temp_dir();
    let temp = fs::canonicalize(&temp).unwrap_or(temp);
    home.starts_with(temp).then(|| settings.node_dir.join("tmp"))
}

fn private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn copy_config(source: &Path, target: &Path) -> io::Result<()> {
    let bytes = match fs::read(source) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let next = target.with_extension("toml.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    io::Write::write_all(&mut file, &bytes)?;
    fs::rename(next, target)
}

fn link_credentials(source: Option<&Path>, target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        // A file of its own: somebody logged in on this very home.
        Ok(meta) if !meta.is_symlink() => return Ok(()),
        Ok(_) => fs::remove_file(target)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match source.filter(|source| source.exists()) {
        Some(source) => symlink(fs::canonicalize(source)?, target),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn credentials_are_linked_and_settings_copied_in_private() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("user");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("config.toml"), "model = \"m\"\n").unwrap();
        fs::write(source.join("auth.json"), "{}").unwrap();
        let settings = CodexSettings {
            home_source: Some(source.clone()),
            ..CodexSettings::for_node(PathBuf::from("codex"), dir.path().join("node"))
        };
        for _ in 0..2 {
            prepare(&settings).unwrap();
        }
        let home = &settings.codex_home;
        assert_eq!(fs::metadata(home).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(home.join("config.toml")).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::symlink_metadata(home.join("auth.json")).unwrap().is_symlink());
        fs::remove_file(source.join("auth.json")).unwrap();
        prepare(&settings).unwrap();
        assert!(fs::symlink_metadata(home.join("auth.json")).is_err(), "a link to nothing stayed");
    }

    #[test]
    fn who_asks_the_pool_has_a_token_in_its_environment_and_no_credentials() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("auth.json"), "{}").unwrap();
        let config = drover_config::WorkerConfig {
            codex_provider: "pool".to_owned(),
            codex_model: Some("gpt-\"x".to_owned()),
            codex_home: Some(dir.path().to_owned()),
            agent_env: vec!["OPENAI_API_KEY".to_owned(), "CARGO_MANIFEST_DIR".to_owned()],
            ..drover_config::WorkerConfig::default()
        };
        let mut settings = crate::make::codex_settings(PathBuf::from("codex"), &config, &dir.path().join("node"));
        if let Some(pool) = &mut settings.pool {
            pool.token = crate::door::Token::of_test("secret-token");
        }
        prepare(&settings).unwrap();
        assert!(fs::symlink_metadata(settings.codex_home.join("auth.json")).is_err());
        let vars = environment(&settings);
        assert!(vars.iter().any(|(name, value)| name == "DROVER_POOL_TOKEN" && value == "secret-token"));
        assert!(
            vars.iter().any(|(name, _)| name == "CARGO_MANIFEST_DIR")
                && !vars.iter().any(|(name, _)| name == "OPENAI_API_KEY")
        );
        let arguments = settings.pool.as_ref().unwrap().arguments().join(" ");
        assert!(
            arguments.contains("model=\"gpt-\\\"x\"") && arguments.contains("model_provider=\"drover\""),
            "{arguments}"
        );
        assert!(!format!("{arguments} {settings:?}").contains("secret-token"));
    }

    #[test]
    fn codex_sees_only_what_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let settings = CodexSettings {
            env_allow: vec!["CARGO_MANIFEST_DIR".into()],
            ..CodexSettings::for_node(PathBuf::from("codex"), dir.path().join("node"))
        };
        let vars = environment(&settings);
        let has = |name: &str| vars.iter().any(|(key, _)| key == name);
        assert!(has("PATH") && has("CODEX_HOME") && has("CARGO_MANIFEST_DIR") && !has("CARGO_PKG_NAME"));
        // The home of this test lies below the temporary directory.
        let temp = vars.iter().rfind(|(key, _)| key == "TMPDIR").unwrap();
        assert_eq!(Path::new(&temp.1), settings.node_dir.join("tmp"));
    }
}
