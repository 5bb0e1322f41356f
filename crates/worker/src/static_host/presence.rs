//! What this host's worker says of itself, in a file that only it writes; and that there is one such worker.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use drover_service::process::{self, ProcessId};
use drover_types::OutboxId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{debug, warn};

use super::assignment::HostName;

const VERSION: u32 = 1;

/// A host that this process cannot be the worker of.
#[derive(Debug, Error)]
pub enum HostError {
    /// Another process is.
    #[error("host {host} already has a worker: pid {pid} on {machine}; end that one, or give this host its own --host")]
    Taken {
        /// The host.
        host: HostName,
        /// The machine that the other one runs on.
        machine: String,
        /// Its process there.
        pid: u32,
    },
    /// The files of workers cannot be used.
    #[error("cannot use {path}: check that the mailbox can be written from this host")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    v: u32,
    host: String,
    machine: String,
    pid: u32,
    start_time: u64,
    revision: u64,
    serving: Option<Serving>,
}

/// The node that the worker has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Serving {
    swarm_id: String,
    node_id: u32,
    generation: u32,
}

impl Said {
    fn is_by(&self, other: &Self) -> bool {
        (&self.machine, self.pid, self.start_time) == (&other.machine, other.pid, other.start_time)
    }
}

/// Being the worker of a host.
#[derive(Debug)]
pub(crate) struct Presence {
    dir: PathBuf,
    host: HostName,
    said: Said,
    /// None where the file system has no locks.
    _lock: Option<File>,
}

impl Presence {
    /// Becomes the host's worker, unless there is one. Blocks.
    pub(crate) fn take(static_dir: &Path, host: &HostName) -> Result<Self, HostError> {
        let dir = static_dir.join("workers");
        let failed = |path: &Path, source| HostError::Io { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|error| failed(&dir, error))?;
        let me = ProcessId::current();
        let said = Said {
            v: VERSION,
            host: host.to_string(),
            machine: process::hostname(),
            pid: me.pid,
            start_time: me.start_time,
            revision: 0,
            serving: None,
        };
        let path = dir.join(format!("{host}.lock"));
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(&path).map_err(|error| failed(&path, error))?;
        let lock = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Some(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let (machine, pid) =
                    find(&dir, host).map_or(("an unknown machine".to_owned(), 0), |s| (s.machine, s.pid));
                return Err(HostError::Taken { host: host.clone(), machine, pid });
            }
            Err(error) => {
                debug!(%error, path = %path.display(), "no locks here");
                None
            }
        };
        if let Some(other) = find(&dir, host).filter(|other| !other.is_by(&said)) {
            if other.machine != said.machine {
                // Of another machine nothing can be known, and one that is gone must not keep its host for ever. Should
                // it be alive, it finds its file replaced and gives way.
                warn!(%host, machine = other.machine, pid = other.pid, "taking over from a worker on another machine");
            } else if process::is_alive(&ProcessId { pid: other.pid, start_time: other.start_time }) {
                return Err(HostError::Taken { host: host.clone(), machine: other.machine, pid: other.pid });
            }
        }
        let presence = Self { dir, host: host.clone(), said, _lock: lock };
        presence.write().map_err(|error| failed(&presence.dir, error))?;
        Ok(presence)
    }

    /// Says which assignment was acted upon and which node is served. Blocks.
    pub(crate) fn say(&mut self, revision: u64, serving: Option<&OutboxId>) -> io::Result<()> {
        let serving = serving.map(|id| Serving {
            swarm_id: id.swarm.to_string(),
            node_id: id.node.0,
            generation: id.generation.0,
        });
        if (self.said.revision, &self.said.serving) == (revision, &serving) {
            return Ok(());
        }
        let said = Said { revision, serving, ..self.said.clone() };
        let before = std::mem::replace(&mut self.said, said);
        let written = self.write();
        if written.is_err() {
            // So that it is said again.
            self.said = before;
        }
        written
    }

    /// Fails when another process has become this host's worker. Blocks.
    pub(crate) fn check(&self) -> Result<(), HostError> {
        match find(&self.dir, &self.host).filter(|found| !found.is_by(&self.said)) {
            Some(other) => Err(HostError::Taken { host: self.host.clone(), machine: other.machine, pid: other.pid }),
            None => Ok(()),
        }
    }

    /// The allocator sees the old file or the new one. Nothing rests on its being on disk: what is missing says nothing.
    fn write(&self) -> io::Result<()> {
        let fresh = self.dir.join(format!(".{}.new", self.host));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(&self.said)?)?;
        fs::rename(&fresh, self.dir.join(format!("{}.json", self.host)))
    }
}

fn find(dir: &Path, host: &HostName) -> Option<Said> {
    serde_json::from_slice(&fs::read(dir.join(format!("{host}.json"))).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_one_worker_and_a_dead_one_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let host: HostName = "n1".parse().unwrap();
        let first = Presence::take(dir.path(), &host).unwrap();
        let error = Presence::take(dir.path(), &host).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())) && error.contains("--host"), "{error}");
        Presence::take(dir.path(), &"n2".parse().unwrap()).unwrap();

        // Where locks do not work, the file itself is looked at.
        let file = dir.path().join("workers/n1.json");
        let mut said = first.said.clone();
        drop(first);
        let put = |said: &Said| fs::write(&file, serde_json::to_vec(said).unwrap()).unwrap();
        let init = process::of(1).unwrap();
        (said.pid, said.start_time) = (init.pid, init.start_time);
        put(&said);
        assert!(matches!(Presence::take(dir.path(), &host), Err(HostError::Taken { pid: 1, .. })));
        said.start_time += 1;
        put(&said);
        let mut third = Presence::take(dir.path(), &host).unwrap();

        let id = OutboxId {
            swarm: "s".parse().unwrap(),
            node: drover_types::NodeIndex(2),
            generation: drover_types::Generation(3),
        };
        third.say(7, Some(&id)).unwrap();
        let told: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(told["revision"], 7);
        assert_eq!(told["serving"], serde_json::json!({"swarm_id": "s", "node_id": 2, "generation": 3}));
        third.check().unwrap();
        said.machine = "elsewhere".into();
        put(&said);
        assert!(third.check().unwrap_err().to_string().contains("elsewhere"), "whoever was replaced gives way");
    }
}
