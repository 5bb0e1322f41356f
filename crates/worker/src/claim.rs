//! Makes sure that this process is the only worker of its node, and that no later one has begun.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use drover_mailbox::{ClaimError, Mailbox, Owner};
use drover_service::process::{self, ProcessId};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// A node that this process must not serve.
#[derive(Debug, Error)]
pub enum NodeError {
    /// Another worker on this host has it.
    #[error("node {node} of swarm {swarm} is already served by {holder}; end that worker first")]
    Held {
        /// The swarm.
        swarm: SwarmId,
        /// The node.
        node: NodeIndex,
        /// Who has it, in words.
        holder: String,
    },
    /// Its directory cannot be used.
    #[error("cannot use node directory {path}: check that it can be written, or set DROVER_NODE_DIR")]
    Dir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The generation cannot be ours.
    #[error(
        "cannot serve node {node} of swarm {swarm} as generation {generation}; start it with a generation of its own"
    )]
    Claim {
        /// The swarm.
        swarm: SwarmId,
        /// The node.
        node: NodeIndex,
        /// The generation.
        generation: Generation,
        /// Why not.
        #[source]
        source: ClaimError,
    },
}

/// The node directory's lock. Holds as long as this lives; the kernel lets go of it when the process dies.
#[derive(Debug)]
pub(crate) struct NodeLock {
    _file: File,
}

/// Makes the node directory and locks it.
pub(crate) fn lock_node(dir: &Path, swarm: &SwarmId, node: NodeIndex) -> Result<NodeLock, NodeError> {
    let failed = |source| NodeError::Dir { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut file = options.open(dir.join("worker.lock")).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            let pid = text.trim();
            let holder = if pid.is_empty() {
                "another worker on this host".to_owned()
            } else {
                format!("the worker of pid {pid} on this host")
            };
            return Err(NodeError::Held { swarm: swarm.clone(), node, holder });
        }
        Err(error) => return Err(failed(error.into())),
    }
    // Only for the message above; what counts is the lock.
    let told = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    told.map_err(failed)?;
    Ok(NodeLock { _file: file })
}

/// Claims a generation of the node: the given one, or the next that is free.
pub(crate) fn claim_generation(
    mailbox: &Mailbox,
    swarm: &SwarmId,
    node: NodeIndex,
    wanted: Option<Generation>,
) -> Result<OutboxId, NodeError> {
    let me = ProcessId::current();
    let owner = Owner { host: process::hostname(), pid: me.pid, start_time: me.start_time };
    loop {
        let generation = match wanted {
            Some(generation) => generation,
            None => next_generation(mailbox, swarm, node)?,
        };
        let id = OutboxId { swarm: swarm.clone(), node, generation };
        match mailbox.claim(&id, &owner) {
            Ok(()) => return Ok(id),
            // Somebody was faster; ours is the one after.
            Err(ClaimError::Taken { .. } | ClaimError::Superseded { .. }) if wanted.is_none() => {}
            Err(source) => return Err(NodeError::Claim { swarm: swarm.clone(), node, generation, source }),
        }
    }
}

fn next_generation(mailbox: &Mailbox, swarm: &SwarmId, node: NodeIndex) -> Result<Generation, NodeError> {
    let known = mailbox.generations(swarm, node);
    let known = known.map_err(|source| NodeError::Dir { path: mailbox.node_dir(swarm, node), source })?;
    Ok(known.last().copied().unwrap_or_default().next())
}

/// Whether a later worker of this node has begun. One look for the next generation, for use before every turn.
pub(crate) fn is_superseded(mailbox: &Mailbox, id: &OutboxId) -> bool {
    let next = OutboxId { generation: id.generation.next(), ..id.clone() };
    fs::symlink_metadata(mailbox.outbox_dir(&next)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_worker_and_a_generation_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let (swarm, node): (SwarmId, _) = ("s".parse().unwrap(), NodeIndex(3));
        let held = lock_node(&dir.path().join("node"), &swarm, node).unwrap();
        let error = lock_node(&dir.path().join("node"), &swarm, node).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()) && error.contains("node 3 of swarm s"), "{error}");
        drop(held);
        lock_node(&dir.path().join("node"), &swarm, node).unwrap();

        let mailbox = Mailbox::new(dir.path().join("mailbox"));
        let first = claim_generation(&mailbox, &swarm, node, None).unwrap();
        assert_eq!(first.generation, Generation(1));
        assert!(!is_superseded(&mailbox, &first));
        assert_eq!(claim_generation(&mailbox, &swarm, node, None).unwrap().generation, Generation(2));
        assert!(is_superseded(&mailbox, &first));
        let error = claim_generation(&mailbox, &swarm, node, Some(Generation(1))).unwrap_err();
        assert!(matches!(&error, NodeError::Claim { source: ClaimError::Superseded { .. }, .. }), "{error:?}");
        let error = claim_generation(&mailbox, &swarm, node, Some(Generation(2))).unwrap_err();
        assert!(matches!(&error, NodeError::Claim { source: ClaimError::Taken { .. }, .. }), "{error:?}");
    }
}
