//! Where things are below the mailbox root, and who owns an outbox.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fs;

/// A mailbox root. Knows paths and claims; holds nothing open.
#[derive(Debug, Clone)]
pub struct Mailbox {
    root: PathBuf,
}

/// Who writes an outbox: a process that cannot be mistaken for a later one of the same pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The host's name.
    pub host: String,
    /// The process id on that host.
    pub pid: u32,
    /// Clock ticks between that host's boot and the process's start.
    pub start_time: u64,
}

/// A generation that could not be claimed.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another worker has it.
    #[error("outbox {outbox} already belongs to {}", describe(owner.as_ref()))]
    Taken {
        /// Which outbox.
        outbox: OutboxId,
        /// Who has it; unknown when that worker died before it said so.
        owner: Option<Owner>,
    },
    /// A later worker of this node has begun.
    #[error("outbox {outbox} is superseded by generation {by}: this worker must not start")]
    Superseded {
        /// Which outbox.
        outbox: OutboxId,
        /// The later generation.
        by: Generation,
    },
    /// The directory could not be made.
    #[error("cannot claim outbox {outbox} in {path}: check that the mailbox can be written")]
    Io {
        /// Which outbox.
        outbox: OutboxId,
        /// Its directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn describe(owner: Option<&Owner>) -> String {
    owner.map_or_else(|| "an unknown process".to_owned(), |owner| format!("pid {} on {}", owner.pid, owner.host))
}

impl Mailbox {
    /// The mailbox below this directory; it need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Everything of one swarm.
    pub fn swarm_dir(&self, swarm: &SwarmId) -> PathBuf {
        self.root.join(swarm.as_str())
    }

    /// Everything of one node.
    pub fn node_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.swarm_dir(swarm).join(format!("{:02}", node.0))
    }

    /// The stream from the router to the node.
    pub fn inbox_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.node_dir(swarm, node).join("inbox")
    }

    /// The stream from one generation of the node's worker to the router.
    pub fn outbox_dir(&self, id: &OutboxId) -> PathBuf {
        self.outboxes_dir(&id.swarm, id.node).join(id.generation.to_string())
    }

    /// What one generation of the node's worker remembers for the next.
    pub fn journal_dir(&self, id: &OutboxId) -> PathBuf {
        self.node_dir(&id.swarm, id.node).join("journal").join(id.generation.to_string())
    }

    /// AGENTS.md and skills of the launch.
    pub fn bundle_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.node_dir(swarm, node).join("bundle")
    }

    /// Calls that go to the node through the mailbox.
    pub fn post_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.node_dir(swarm, node).join("post")
    }

    fn outboxes_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.node_dir(swarm, node).join("outbox")
    }

    /// Makes the outbox directory of a generation, which is the claim on it: mkdir succeeds once, on every file system.
    /// A generation below one that exists is refused, so that a late start cannot speak for the node.
    pub fn claim(&self, id: &OutboxId, owner: &Owner) -> Result<(), ClaimError> {
        let path = self.outbox_dir(id);
        let failed = |source| ClaimError::Io { outbox: id.clone(), path: path.clone(), source };
        let mut changed = fs::make_dir(&self.outboxes_dir(&id.swarm, id.node)).map_err(failed)?;
        self.refuse_superseded(id)?;
        match fs::make_one_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let owner = self.owner(id).map_err(failed)?;
                return Err(ClaimError::Taken { outbox: id.clone(), owner });
            }
            Err(error) => return Err(failed(error)),
        }
        changed.extend(path.parent().map(Path::to_owned));
        write_owner(&path, owner).map_err(failed)?;
        for dir in changed {
            fs::sync_dir(&dir).map_err(failed)?;
        }
        // A later generation that began meanwhile did not see this one; it wins.
        self.refuse_superseded(id)
    }

    fn refuse_superseded(&self, id: &OutboxId) -> Result<(), ClaimError> {
        let generations = self.generations(&id.swarm, id.node).map_err(|source| ClaimError::Io {
            outbox: id.clone(),
            path: self.outboxes_dir(&id.swarm, id.node),
            source,
        })?;
        match generations.last() {
            Some(&by) if by > id.generation => Err(ClaimError::Superseded { outbox: id.clone(), by }),
            _ => Ok(()),
        }
    }

    /// Who claimed a generation. `None` when nobody did, or when that worker died before it had said who it is.
    pub fn owner(&self, id: &OutboxId) -> io::Result<Option<Owner>> {
        match std::fs::read(self.outbox_dir(id).join(OWNER_FILE)) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if fs::is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The generations of a node so far, ascending. Reads a directory: for starts only.
    pub fn generations(&self, swarm: &SwarmId, node: NodeIndex) -> io::Result<Vec<Generation>> {
        let entries = match std::fs::read_dir(self.outboxes_dir(swarm, node)) {
            Ok(entries) => entries,
            Err(error) if fs::is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            // Only the one spelling that `outbox_dir` makes; "01" or "+1" is nobody's outbox.
            let generation =
                name.to_str().and_then(|name| name.parse().ok().filter(|g: &Generation| g.to_string() == name));
            found.extend(generation);
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Removes everything of a swarm. False when there was nothing.
    pub fn remove_swarm(&self, swarm: &SwarmId) -> io::Result<bool> {
        match std::fs::remove_dir_all(self.swarm_dir(swarm)) {
            Ok(()) => {}
            Err(error) if fs::is_missing(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        fs::sync_dir(&self.root)?;
        Ok(true)
    }
}

const OWNER_FILE: &str = "owner.json";

fn write_owner(dir: &Path, owner: &Owner) -> io::Result<()> {
    let mut file = fs::create_new(&dir.join(OWNER_FILE))?;
    file.write_all(&serde_json::to_vec(owner)?)?;
    file.sync_all()?;
    fs::sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn outbox(generation: u32) -> OutboxId {
        OutboxId { swarm: "s".parse().unwrap(), node: NodeIndex(3), generation: Generation(generation) }
    }

    fn owner(pid: u32) -> Owner {
        Owner { host: "h".to_owned(), pid, start_time: 1 }
    }

    #[test]
    fn a_generation_is_claimed_once_and_never_below_a_later_one() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path().join("mailbox"));
        assert_eq!(mailbox.generations(&outbox(1).swarm, NodeIndex(3)).unwrap(), []);

        mailbox.claim(&outbox(2), &owner(7)).unwrap();
        assert!(mailbox.outbox_dir(&outbox(2)).ends_with("s/03/outbox/2"));
        match mailbox.claim(&outbox(2), &owner(8)) {
            Err(ClaimError::Taken { owner: Some(by), .. }) => assert_eq!(by, owner(7)),
            other => panic!("{other:?}"),
        }
        match mailbox.claim(&outbox(1), &owner(8)) {
            Err(ClaimError::Superseded { by, .. }) => assert_eq!(by, Generation(2)),
            other => panic!("{other:?}"),
        }
        mailbox.claim(&outbox(10), &owner(8)).unwrap();
        std::fs::create_dir(mailbox.outbox_dir(&outbox(10)).with_file_name("011")).unwrap();
        assert_eq!(mailbox.generations(&outbox(1).swarm, NodeIndex(3)).unwrap(), [Generation(2), Generation(10)]);
        assert_eq!(mailbox.owner(&outbox(11)).unwrap(), None);
    }

    #[test]
    fn one_of_many_claims_wins() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path());
        let wins = std::thread::scope(|scope| {
            let mailbox = &mailbox;
            let claims: Vec<_> =
                (0..8).map(|pid| scope.spawn(move || mailbox.claim(&outbox(1), &owner(pid)).is_ok())).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(wins, 1);
    }

    #[test]
    fn everything_is_private_and_a_swarm_goes_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path().join("a/b"));
        mailbox.claim(&outbox(1), &owner(1)).unwrap();
        let mut at = mailbox.outbox_dir(&outbox(1));
        assert_eq!(std::fs::metadata(at.join(OWNER_FILE)).unwrap().mode() & 0o777, 0o600);
        while at != dir.path() {
            assert_eq!(std::fs::metadata(&at).unwrap().mode() & 0o777, 0o700, "{}", at.display());
            at.pop();
        }
        let swarm = outbox(1).swarm;
        assert!(mailbox.remove_swarm(&swarm).unwrap());
        assert!(!mailbox.remove_swarm(&swarm).unwrap());
        assert!(mailbox.root().is_dir());
    }

    #[test]
    fn a_half_written_owner_is_an_unknown_one() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path());
        mailbox.claim(&outbox(1), &owner(1)).unwrap();
        std::fs::write(mailbox.outbox_dir(&outbox(1)).join(OWNER_FILE), b"{\"host\":").unwrap();
        assert_eq!(mailbox.owner(&outbox(1)).unwrap(), None);
        let text = mailbox.claim(&outbox(1), &owner(2)).unwrap_err().to_string();
        assert_eq!(text, "outbox s/3/1 already belongs to an unknown process");
    }
}
