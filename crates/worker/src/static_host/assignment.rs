//! The assignment file of this host, which the static backend writes and only it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use drover_types::{AgentKind, JobId, NodeIndex, SwarmId};
use serde::Deserialize;
use thiserror::Error;

/// The newest format that is understood.
const VERSION: u32 = 1;

/// A name that can be part of a file's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostName(String);

/// A name that is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no host name: expected letters, digits, '-', '_' and '.', beginning with a letter or a digit")]
pub struct HostNameError(String);

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let harmless = text.len() <= 253 && text.chars().all(is_harmless);
        if !harmless || text.is_empty() || text.starts_with(['.', '-']) {
            return Err(HostNameError(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl HostName {
    /// The name given, or that of this machine.
    pub(crate) fn or_this(given: Option<Self>) -> Self {
        given.unwrap_or_else(|| {
            let system = drover_service::process::hostname();
            // The kernel takes any name; one that no file can have is in no list of hosts either.
            system.parse().unwrap_or_else(|_| Self(system.chars().filter(|&c| is_harmless(c)).collect()))
        })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_harmless(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// What this host's worker is to be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Assigned {
    pub(crate) swarm_id: SwarmId,
    pub(crate) node_id: NodeIndex,
    pub(crate) job_id: JobId,
    pub(crate) agent: AgentKind,
    /// Keys of the `worker` section that the launch overrides.
    #[serde(default)]
    pub(crate) settings: BTreeMap<String, String>,
    /// Directory of the node's key and certificate, as such or below the mailbox.
    #[serde(default)]
    pub(crate) identity: Option<PathBuf>,
    #[serde(default)]
    pub(crate) release: Option<Release>,
}

/// The node is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Release {
    /// Without waiting for the running turn.
    pub(crate) force: bool,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Document {
    v: u32,
    host: String,
    pub(crate) revision: u64,
    pub(crate) assignment: Option<Assigned>,
}

/// What every format has.
#[derive(Deserialize)]
struct Version {
    v: u32,
}

/// A file that says nothing that could be acted upon.
#[derive(Debug, Error)]
pub(crate) enum AssignmentError {
    #[error("{path} cannot be read: {source}; check that the shared file system is mounted")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path} is no assignment: {why}; when no swarm uses this host, remove it and launch again")]
    Damaged { path: PathBuf, why: String },
    #[error("{path} has format version {found}, this drover knows {VERSION}: update drover on this host")]
    TooNew { path: PathBuf, found: u32 },
    #[error("{path} is the assignment of host {found:?}, not of {host}; it is left alone")]
    OtherHost { path: PathBuf, found: String, host: HostName },
}

/// Where the assignments are.
pub(crate) fn dir(mailbox: &Path) -> PathBuf {
    mailbox.join("static")
}

/// Reads the host's assignment; `None` when there never was one. The file is opened anew each time, because a shared file
/// system may show an open one as it was.
pub(crate) fn read(dir: &Path, host: &HostName) -> Result<Option<Document>, AssignmentError> {
    let path = dir.join(format!("{host}.json"));
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(AssignmentError::Unreadable { path, source }),
    };
    // A later format may have other fields; that it is later is what has to be said.
    if let Ok(Version { v }) = serde_json::from_slice(&bytes)
        && v > VERSION
    {
        return Err(AssignmentError::TooNew { path, found: v });
    }
    let document: Document = match serde_json::from_slice(&bytes) {
        Ok(document) => document,
        Err(error) => return Err(AssignmentError::Damaged { path, why: error.to_string() }),
    };
    if document.host != host.as_str() {
        return Err(AssignmentError::OtherHost { path, found: document.host, host: host.clone() });
    }
    Ok(Some(document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_understood_or_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let host: HostName = "n1".parse().unwrap();
        assert_eq!(read(dir.path(), &host).unwrap(), None);
        // As the allocator writes it.
        let text = r#"{"v":1,"host":"n1","revision":7,"assignment":{"swarm_id":"s","node_id":1,"job_id":"static-1","agent":"echo","settings":{"sandbox_mode":"read-only"},"release":{"force":true}}}"#;
        fs::write(dir.path().join("n1.json"), text).unwrap();
        let document = read(dir.path(), &host).unwrap().unwrap();
        let assigned = document.assignment.unwrap();
        assert_eq!((document.revision, assigned.node_id, assigned.agent), (7, NodeIndex(1), AgentKind::Echo));
        assert_eq!(assigned.settings["sandbox_mode"], "read-only");
        assert_eq!(assigned.release, Some(Release { force: true }));
        fs::write(dir.path().join("n1.json"), r#"{"v":1,"host":"n1","revision":8,"assignment":null}"#).unwrap();
        assert_eq!(read(dir.path(), &host).unwrap().unwrap().assignment, None);

        for (text, words) in [
            (&text[..40], "is no assignment"),
            ("", "is no assignment"),
            (r#"{"v":2,"host":"n1","more":[]}"#, "format version 2"),
            (r#"{"v":1,"host":"n2","revision":1,"assignment":null}"#, "of host \"n2\", not of n1"),
        ] {
            fs::write(dir.path().join("n1.json"), text).unwrap();
            let error = read(dir.path(), &host).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("n1.json"), "{error}");
        }
        for bad in ["", "..", "a/b", "-n", "a b"] {
            assert!(bad.parse::<HostName>().unwrap_err().to_string().contains("is no host name"), "{bad:?}");
        }
    }
}
