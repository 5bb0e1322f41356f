//! The records of sessions: on this node, and on the file system that all nodes reach.
//!
//! ```text
//! <node>/<session>/log.jsonl                  all records that count; a copy that can be made again
//! <node>/<session>/copy.jsonl                 what comes in at a handoff, until the claim
//! <shared>/<session>/journal/<epoch>.jsonl    what each owner wrote; one writer each
//! <shared>/<session>/checkpoints/<epoch>.json how far the pieces go: bytes, records, digest, pieces; one writer each
//! <shared>/<session>/pieces/<sha-256>         1 MiB each, the last one shorter
//! ```
//!
//! **Written, then looked, then said:** [`SessionStore::append`] brings records to both disks and then looks for a later epoch. Only its
//! `Done` lets the core say what they say.

mod checkpoint;
mod copy;
mod journals;
mod log;
pub(crate) mod pieces;
mod recall;

use std::io;
use std::path::{Path, PathBuf};

use drover_types::{Epoch, SessionId};
use thiserror::Error;

pub use checkpoint::Checkpoint;
pub use copy::IncomingCopy;
pub use journals::Journals;
pub use log::{LogReader, SessionLog, records};
pub use recall::{Prompt, Recall};

use crate::core::{Appended, Digest};
use crate::ownership::Ownership;
use crate::session::{CodecError, LogSum, Record, encode};

/// A session's records cannot be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file system failed.
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
    /// Records that cannot be.
    #[error("{} holds what is no record that is due there; move it away to go on without it", path.display())]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: CodecError,
    },
    /// The journals do not make one log.
    #[error("records {from} and on of session {session} are missing in {}", path.display())]
    Missing {
        /// The session.
        session: SessionId,
        /// The first that is missing.
        from: u64,
        /// Where they should be.
        path: PathBuf,
    },
    /// A piece or checkpoint is not what its name or digest says.
    #[error("{} is damaged ({why})", path.display())]
    Mismatch {
        /// Which.
        path: PathBuf,
        /// In words.
        why: String,
    },
    /// It would be larger than a session may be.
    #[error("session {session} would have {bytes} bytes, at most {most} are allowed; begin a new session")]
    TooLarge {
        /// The session.
        session: SessionId,
        /// Its size.
        bytes: u64,
        /// The bound.
        most: u64,
    },
}

pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Files { what, path, source }
}

/// One session that this node owns: its log here and this epoch's journal there.
#[derive(Debug)]
pub struct SessionStore {
    session: SessionId,
    epoch: Epoch,
    log: SessionLog,
    journals: Journals,
    most: u64,
    /// The last append was still of the newest epoch.
    said: bool,
    /// Number of the last record that is in a journal, this epoch's or one before.
    journaled: u64,
    /// Writing the log failed, so what it says of itself is not to be believed.
    broken: bool,
}

impl SessionStore {
    /// Begins an epoch on top of a log that counts: an empty one, one that came in whole, or one that was read from the journals.
    pub fn begin(log: SessionLog, journals: Journals, epoch: Epoch, most: u64) -> Self {
        let (session, journaled) = (journals.session().clone(), log.sum().outline.seq());
        Self { session, epoch, log, journals, most, said: false, journaled, broken: false }
    }

    /// The log on this node.
    pub fn log(&self) -> &SessionLog {
        &self.log
    }

    /// The epoch that it writes.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Goes on in another epoch, with the same log.
    #[must_use]
    pub fn next_epoch(self, epoch: Epoch) -> Self {
        Self { epoch, said: false, journaled: self.log.sum().outline.seq(), ..self }
    }

    /// Brings records to both disks, then looks whether the epoch is still the newest. Safe to repeat.
    pub fn append(
        &mut self,
        first: u64,
        records: &[Record],
        ownership: &impl Ownership,
    ) -> Result<Appended, StoreError> {
        self.said = false;
        if self.broken {
            self.log = SessionLog::open(self.log.path())?;
            self.broken = false;
        }
        let (logged, journaled) = (self.log.sum().outline.seq(), self.journaled);
        // What one of the two has from a try that failed at the other stands there once.
        let from = logged.min(journaled).saturating_add(1).max(first);
        let records = records.get((from - first) as usize..).unwrap_or_default();
        let (mut bytes, mut to_journal, mut to_log) = (Vec::new(), 0, 0);
        for (seq, record) in (from..).zip(records) {
            encode(seq, record, &mut bytes).map_err(io::Error::from).map_err(failed("write", self.log.path()))?;
            if seq <= journaled {
                to_journal = bytes.len();
            }
            if seq <= logged {
                to_log = bytes.len();
            }
        }
        let total = self.log.sum().len + (bytes.len() - to_log) as u64;
        if total > self.most {
            return Err(StoreError::TooLarge { session: self.session.clone(), bytes: total, most: self.most });
        }
        self.write(&bytes[to_journal..], &bytes[to_log..])?;
        self.journaled = journaled.max(from + records.len() as u64 - 1);
        let newest = ownership.newest(&self.session).map_err(|error| {
            let path = self.journals.dir().to_owned();
            failed("look for a later epoch of", &path)(io::Error::other(error))
        })?;
        Ok(match newest {
            Some(newest) if newest.epoch > self.epoch => Appended::Fenced(newest),
            _ => {
                self.said = true;
                Appended::Done { len: self.log.sum().len, digest: self.log.sum().digest }
            }
        })
    }

    /// Brings lines to both disks at the same time.
    fn write(&mut self, to_journal: &[u8], to_log: &[u8]) -> Result<(), StoreError> {
        let (journals, log, epoch) = (&mut self.journals, &mut self.log, self.epoch);
        self.broken = !to_log.is_empty();
        let (journal, log) = std::thread::scope(|scope| {
            let log = scope.spawn(|| if to_log.is_empty() { Ok(()) } else { log.append(to_log) });
            let journal = if to_journal.is_empty() { Ok(()) } else { journals.append(epoch, to_journal) };
            (journal, log.join())
        });
        let log = log.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.broken &= log.is_err();
        journal.and(log)
    }

    /// What puts all records so far into pieces and lets go of what earlier owners wrote. It may be done at any later time, by anybody and
    /// while this one goes on. Nothing when the last append was not `Done`: a checkpoint counts whoever owns the session later, so only what
    /// may be said may be in it.
    pub fn checkpoint(&self) -> Result<Option<DueCheckpoint>, StoreError> {
        let due = || Ok(DueCheckpoint { journals: self.journals.again(), epoch: self.epoch, log: self.log.reader()? });
        self.said.then(due).transpose()
    }

    /// What all its bytes add up to.
    pub fn digest(&self) -> (u64, Digest) {
        (self.log.sum().len, self.log.sum().digest)
    }

    /// What the core has to know of it.
    pub fn sum(&self) -> &LogSum {
        self.log.sum()
    }
}

/// A checkpoint that is to be made.
#[derive(Debug)]
pub struct DueCheckpoint {
    journals: Journals,
    epoch: Epoch,
    log: LogReader,
}

impl DueCheckpoint {
    /// Makes it.
    pub fn make(self) -> Result<Checkpoint, StoreError> {
        self.journals.checkpoint(self.epoch, &self.log)
    }
}

#[cfg(test)]
mod tests;
