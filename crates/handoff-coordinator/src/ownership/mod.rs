//! Who owns a session: the one thing that all nodes agree on.
//!
//! The owners of a session are numbered by epochs. An epoch's record is made once and never changed, so whoever made it first
//! owns the session until there is a record of the next epoch.

mod shared_files;

use std::io;
use std::path::PathBuf;

use drover_types::{Epoch, SessionId};
use thiserror::Error;

pub(crate) use shared_files::Ready;
pub use shared_files::SharedFiles;

use crate::core::{ClaimOutcome, Looked, NodeId, OwnerRecord};

/// What became of a claim that could be decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// The record of that epoch is this one, and there is none of a later epoch.
    Won,
    /// It is another's, or a later epoch has begun: the newest.
    Lost(OwnerRecord),
}

/// Who owns what. Every answer is as new as the moment of the question: no copy is ever asked instead.
pub trait Ownership {
    /// The record of the newest epoch; nothing when the session has never been claimed.
    fn newest(&self, session: &SessionId) -> Result<Option<OwnerRecord>, OwnershipError>;

    /// Makes a record, unless there is one of its epoch or of a later one. Safe to repeat with the same record. After an error nobody knows
    /// whether it was made, and only asking again tells.
    fn claim(&self, record: &OwnerRecord) -> Result<Claimed, OwnershipError>;

    /// Every session whose newest owner is a process of this node: what a node that starts goes on with.
    fn owned_by(&self, node: &NodeId) -> Result<Vec<OwnerRecord>, OwnershipError>;
}

/// Ownership cannot be read or written.
#[derive(Debug, Error)]
pub enum OwnershipError {
    /// The file system failed.
    #[error("cannot {what} {}", path.display())]
    Files {
        /// What was to be done.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// What the file system says.
        #[source]
        source: io::Error,
    },
    /// A file that is no record of ours stands among them.
    #[error("{} is no ownership record ({why}); nothing is decided about this session until it is moved away", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Epochs follow each other without a gap.
    #[error("epoch {epoch} of session {session} cannot be claimed: the newest is {newest}")]
    Gap {
        /// The session.
        session: SessionId,
        /// What was to be claimed.
        epoch: Epoch,
        /// The newest that there is; 0 for none.
        newest: Epoch,
    },
}

/// What the core is told about a claim.
pub fn claim_outcome(result: &Result<Claimed, OwnershipError>) -> ClaimOutcome {
    match result {
        Ok(Claimed::Won) => ClaimOutcome::Won,
        Ok(Claimed::Lost(newest)) => ClaimOutcome::Lost(newest.clone()),
        Err(_) => ClaimOutcome::Unknown,
    }
}

/// What the core is told about a look.
pub fn look_outcome(result: &Result<Option<OwnerRecord>, OwnershipError>) -> Looked {
    match result {
        Ok(Some(newest)) => Looked::Owned(newest.clone()),
        Ok(None) => Looked::Nobody,
        Err(_) => Looked::Unknown,
    }
}
