//! Who owns the router's directory. On one host a lock says so; between hosts, whose locks and pids mean nothing to each
//! other, a file does, and a person decides when its writer is gone for good.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use drover_service::process::{self, ProcessId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

/// What the owner writes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OwnerFile {
    pub(crate) host: String,
    pub(crate) pid: u32,
    pub(crate) start_time: u64,
    /// When it took the directory, for people.
    pub(crate) since: String,
    /// Where it answers, once it does.
    #[serde(default)]
    pub(crate) listen: String,
}

impl OwnerFile {
    fn describe(&self) -> String {
        let at = if self.listen.is_empty() { String::new() } else { format!(", listening on {}", self.listen) };
        format!("pid {} on host {} since {}{at}", self.pid, self.host, self.since)
    }
}

/// Somebody else owns it.
#[derive(Debug, Error)]
pub(crate) enum OwnerError {
    /// A router of this host runs.
    #[error("another router already uses {dir}: {owner}; use that one, or stop it first")]
    Here {
        /// The directory.
        dir: PathBuf,
        /// Who.
        owner: String,
    },
    /// A router of another host used it last and has not signed off.
    #[error(
        "the router of {dir} runs on another host: {owner}; run drover there, or, if it is certain that it no longer \
         runs, start this one once with --take-over"
    )]
    Elsewhere {
        /// The directory.
        dir: PathBuf,
        /// Who.
        owner: String,
    },
    /// The directory cannot be used.
    #[error("failed to take {dir}: {source}; check that it can be written, or set DROVER_STATE_DIR")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said; it is all there is to know, so it is part of the message.
        source: io::Error,
    },
}

/// Holds the directory; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Owner {
    dir: PathBuf,
    me: OwnerFile,
    _lock: File,
}

impl Owner {
    /// Takes the directory.
    pub(crate) fn take(dir: &Path, host: &str, take_over: bool) -> Result<Self, OwnerError> {
        let failed = |source| OwnerError::Io { dir: dir.to_owned(), source };
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(dir.join("owner.lock"))
            .map_err(failed)?;
        let locked = match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => true,
            Err(rustix::io::Errno::WOULDBLOCK) => false,
            Err(error) => {
                warn!(%error, "this file system knows no locks; owner.json alone says whose the directory is");
                true
            }
        };
        let found = read(dir);
        match &found {
            Some(owner) if owner.host != host => {
                if !take_over || !locked {
                    return Err(OwnerError::Elsewhere { dir: dir.to_owned(), owner: owner.describe() });
                }
                warn!(owner = owner.describe(), "taking the directory over, as told");
            }
            Some(owner) => {
                // Where locks do not work, the process itself says whether it lives; on this host that can be believed.
                let alive = process::is_alive(&ProcessId { pid: owner.pid, start_time: owner.start_time })
                    && owner.pid != std::process::id();
                if !locked || alive {
                    return Err(OwnerError::Here { dir: dir.to_owned(), owner: owner.describe() });
                }
            }
            None if !locked => {
                return Err(OwnerError::Here { dir: dir.to_owned(), owner: "it has just begun to start".to_owned() });
            }
            None => {}
        }
        let id = ProcessId::current();
        let me = OwnerFile {
            host: host.to_owned(),
            pid: id.pid,
            start_time: id.start_time,
            since: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            listen: String::new(),
        };
        let owner = Self { dir: dir.to_owned(), me, _lock: lock };
        owner.write().map_err(failed)?;
        Ok(owner)
    }

    /// Adds where the router answers.
    pub(crate) fn set_listen(&mut self, addr: SocketAddr) -> io::Result<()> {
        self.me.listen = addr.to_string();
        self.write()
    }

    fn write(&self) -> io::Result<()> {
        // Written aside and renamed: whoever reads it sees a whole one.
        let fresh = self.dir.join("owner.json.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(&self.me)?)?;
        file.sync_all()?;
        fs::rename(fresh, self.dir.join("owner.json"))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Only our own word: with --take-over somebody else's may stand there by now.
        if read(&self.dir).is_some_and(|found| found.host == self.me.host && found.pid == self.me.pid) {
            let _ = fs::remove_file(self.dir.join("owner.json"));
        }
    }
}

fn read(dir: &Path) -> Option<OwnerFile> {
    serde_json::from_slice(&fs::read(dir.join("owner.json")).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Owner::take(dir.path(), "here", false).unwrap();
        first.set_listen("127.0.0.1:7950".parse().unwrap()).unwrap();
        let refused = Owner::take(dir.path(), "here", true).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("pid {}", std::process::id())) && refused.contains("127.0.0.1:7950"),
            "{refused}"
        );
        drop(first);
        assert!(!dir.path().join("owner.json").exists());
        drop(Owner::take(dir.path(), "here", false).unwrap());
    }

    #[test]
    fn a_pid_of_another_host_is_not_looked_up() {
        let dir = tempfile::tempdir().unwrap();
        // A pid that certainly does not live here.
        let other = OwnerFile {
            host: "login-2".into(),
            pid: 4_194_305,
            start_time: 1,
            since: "2026-01-01T00:00:00Z".into(),
            listen: "127.0.0.1:7950".into(),
        };
        fs::write(dir.path().join("owner.json"), serde_json::to_vec(&other).unwrap()).unwrap();
        let refused = Owner::take(dir.path(), "login-1", false).unwrap_err().to_string();
        assert!(refused.contains("login-2") && refused.contains("--take-over"), "{refused}");
        drop(Owner::take(dir.path(), "login-1", true).unwrap());

        // The same from this host: it crashed, and nobody needs to be asked.
        fs::write(
            dir.path().join("owner.json"),
            serde_json::to_vec(&OwnerFile { host: "login-1".into(), ..other }).unwrap(),
        )
        .unwrap();
        drop(Owner::take(dir.path(), "login-1", false).unwrap());
    }
}
