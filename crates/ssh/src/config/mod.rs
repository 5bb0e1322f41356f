//! What the user's ssh configuration says about a host.
//!
//! Only the keys that matter here are read; all others are ignored, as are `Match` blocks whose condition is not `all`. As in
//! OpenSSH the first value wins, except where values add up (identities, certificates).

mod expand;
mod parse;
mod pattern;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use pattern::{list_matches, matches};

use crate::{Settings, SshError};

/// A host as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// As the user named it.
    pub alias: String,
    /// Where to connect.
    pub host_name: String,
    /// The port.
    pub port: u16,
    /// Who to log in as.
    pub user: String,
    /// Private keys, most wanted first.
    pub identities: Vec<PathBuf>,
    /// Whether only those may be offered.
    pub identities_only: bool,
    /// Certificates for them.
    pub certificates: Vec<PathBuf>,
    /// The agent's socket.
    pub agent: Option<PathBuf>,
    /// How to get there.
    pub proxy: Proxy,
    /// How often a silent server is asked whether it is there.
    pub alive_interval: Option<Duration>,
    /// How many such questions may stay unanswered.
    pub alive_count: Option<usize>,
    /// How long a connection may take to be made.
    pub connect_timeout: Option<Duration>,
    /// Files of known hosts; the first is the one that is written to.
    pub known_hosts: Vec<PathBuf>,
    /// The name to look up in them.
    pub host_key_alias: Option<String>,
}

/// The way to a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proxy {
    /// Straight.
    None,
    /// Through other hosts, nearest first.
    Jump(Vec<Hop>),
    /// Through a command of this host.
    Command(String),
}

/// A host on the way, as `ProxyJump` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Looked up in the configuration like any host.
    pub host: String,
    /// Wins over the configuration.
    pub user: Option<String>,
    /// Wins over the configuration.
    pub port: Option<u16>,
}

/// Reads the configuration for the host of these settings.
pub fn resolve(settings: &Settings) -> Result<HostConfig, SshError> {
    let files = match &settings.config_file {
        Some(file) => vec![(file.clone(), true)],
        None => vec![(settings.home.join(".ssh/config"), false), (PathBuf::from("/etc/ssh/ssh_config"), false)],
    };
    let wrong = |why: String| SshError::Settings { host: settings.host.clone(), why };
    let mut found = parse::Found::new(&settings.host, &settings.home);
    for (key, value) in &settings.options {
        found.set(key, value).map_err(|why| wrong(format!("option {key}: {why}")))?;
    }
    for (file, must) in files {
        found.read(&file, must).map_err(wrong)?;
    }
    build(settings, &found).map_err(wrong)
}

fn build(settings: &Settings, found: &parse::Found) -> Result<HostConfig, String> {
    let home = &settings.home;
    let host_name = match found.one("hostname") {
        Some(name) => name.replace("%%", "%").replace("%h", &settings.host),
        None => settings.host.clone(),
    };
    safe("host name", &host_name)?;
    let user = found.one("user").unwrap_or(&settings.local_user).to_owned();
    safe("user", &user)?;
    let port = match found.one("port") {
        Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or(format!("`{port}` is not a port"))?,
        None => 22,
    };
    let tokens = expand::Tokens {
        alias: &settings.host,
        host: &host_name,
        port,
        user: &user,
        local_user: &settings.local_user,
        home,
    };
    let paths = |key: &str| -> Result<Vec<PathBuf>, String> {
        found.all(key).filter(|value| !value.eq_ignore_ascii_case("none")).map(|value| tokens.path(value)).collect()
    };
    let mut identities = paths("identityfile")?;
    if found.one("identityfile").is_none() {
        identities = ["id_ed25519", "id_ecdsa", "id_rsa"].map(|name| home.join(".ssh").join(name)).into();
    }
    let agent = match found.one("identityagent") {
        None | Some("SSH_AUTH_SOCK") => settings.agent.clone(),
        Some(value) if value.eq_ignore_ascii_case("none") => None,
        Some(value) => Some(tokens.path(value)?),
    };
    Ok(HostConfig {
        identities,
        agent,
        identities_only: found.flag("identitiesonly")?,
        certificates: paths("certificatefile")?,
        proxy: proxy(found, &tokens)?,
        alive_interval: found.seconds("serveraliveinterval")?.filter(|interval| !interval.is_zero()),
        alive_count: found
            .one("serveralivecountmax")
            .map(|value| value.parse().map_err(|_| format!("`{value}` is not a count")))
            .transpose()?,
        connect_timeout: found.seconds("connecttimeout")?.filter(|timeout| !timeout.is_zero()),
        known_hosts: known_hosts(found, &tokens)?,
        host_key_alias: found.one("hostkeyalias").map(str::to_owned),
        alias: settings.host.clone(),
        host_name,
        port,
        user,
    })
}

fn known_hosts(found: &parse::Found, tokens: &expand::Tokens<'_>) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for (key, default) in [
        ("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2"),
        ("globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"),
    ] {
        for word in parse::words(found.one(key).unwrap_or(default))? {
            if !word.eq_ignore_ascii_case("none") {
                files.push(tokens.path(&word)?);
            }
        }
    }
    Ok(files)
}

fn proxy(found: &parse::Found, tokens: &expand::Tokens<'_>) -> Result<Proxy, String> {
    // Whichever of the two stands first in the configuration counts.
    match found.first_of(&["proxyjump", "proxycommand"]) {
        None => Ok(Proxy::None),
        Some((_, value)) if value.eq_ignore_ascii_case("none") => Ok(Proxy::None),
        Some(("proxyjump", value)) => {
            value.split(',').map(|hop| Hop::parse(hop.trim())).collect::<Result<_, _>>().map(Proxy::Jump)
        }
        Some((_, value)) => Ok(Proxy::Command(tokens.command(value)?)),
    }
}

impl Hop {
    fn parse(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix("ssh://").unwrap_or(text).trim_end_matches('/');
        let (user, rest) = match bare.rsplit_once('@') {
            Some((user, rest)) => (Some(user.to_owned()), rest),
            None => (None, bare),
        };
        let (host, port) = if let Some(inside) = rest.strip_prefix('[') {
            let (host, after) = inside.split_once(']').ok_or(format!("`{text}` has no closing bracket"))?;
            (host, after.strip_prefix(':'))
        } else {
            match rest.split_once(':') {
                // More than one colon without brackets is a bare IPv6 address.
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                _ => (rest, None),
            }
        };
        let port = port.map(|port| port.parse().map_err(|_| format!("`{text}` has no valid port"))).transpose()?;
        safe("jump host", host)?;
        if let Some(user) = &user {
            safe("user of the jump host", user)?;
        }
        Ok(Self { host: host.to_owned(), user, port })
    }
}

/// Names go into command lines of proxies and into messages with commands to copy, so they may hold nothing that a shell
/// or an option parser would read.
fn safe(what: &str, name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_alphanumeric() || "._:%@+-\\".contains(c);
    if name.is_empty() || name.starts_with('-') || !name.chars().all(plain) {
        return Err(format!("the {what} `{}` is empty or has characters that no name has", name.escape_debug()));
    }
    Ok(())
}

/// The path with `~` for the home directory.
fn tilde(path: &str, home: &Path) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => home.join(rest),
        None if path == "~" => home.to_owned(),
        None => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests;
