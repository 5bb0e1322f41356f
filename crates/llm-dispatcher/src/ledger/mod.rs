//! What outlives the process: money that was set aside and spent, runs, and what came of their tasks. One SQLite file, mode
//! 0600, that people may read with any tool.
//!
//! Money is set aside before the first byte of a call leaves, and that is on the disk, through every cache, before the caller
//! hears of it. What a crashed process had set aside and not accounted for counts as spent, because nobody can know better. So
//! the sum errs on the safe side only.
//!
//! ```text
//! counted against the cap of a day  =  charges of that day  +  what was set aside and not accounted for
//! ```
//!
//! Answers are written without waiting for the disk: they survive the death of the process, and of the machine most of the time.
//!
//! One thread owns the file. Whoever asks it waits in a bounded queue, and what waits together is committed together.

mod day;
mod outside;
mod runs;
mod schema;
mod spend;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::core::Money;

pub use day::{Day, Zone, ZoneError};
pub use outside::Outside;
pub use runs::{Answered, Run, RunKey};
pub use spend::{Charge, SpentDay, SpentOn};

use writer::{Command, Writer};

/// Commands that may wait for the thread.
const QUEUE: usize = 1024;
/// The file in the dispatcher's directory.
const FILE: &str = "ledger.sqlite";

/// The ledger cannot be used. Then nothing is spent.
#[derive(Debug, Clone, Error)]
pub enum LedgerError {
    /// The file cannot be made, read or written.
    #[error("failed to {what} the ledger {path}: {why}", path = path.display())]
    Unusable {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system or SQLite said.
        why: String,
    },
    /// A later version wrote it.
    #[error(
        "the ledger {path} was written by a later version of drover (tables of version {found}): run that version, or \
         choose another state directory with DROVER_STATE_DIR", path = path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// There is no such run.
    #[error(
        "there is no run {0:?}; `drover dispatch` prints the id of a run when it begins, and runs are kept for 30 days"
    )]
    UnknownRun(String),
    /// A name can be given once.
    #[error("there is a run {0:?} already; continue it with --resume, or leave the name out")]
    RunExists(String),
    /// The thread is gone: the daemon is stopping.
    #[error("the ledger is closed, because the dispatcher is stopping")]
    Closed,
}

/// A handle. Clones share the file; it is closed when the last one is gone.
#[derive(Debug, Clone)]
pub struct Ledger {
    commands: mpsc::Sender<Command>,
    path: Arc<PathBuf>,
}

/// Resolves when the thread has written everything and closed the file.
#[derive(Debug)]
pub struct Closed(oneshot::Receiver<()>);

impl Closed {
    /// Waits for it.
    pub async fn wait(self) {
        // A sender that was dropped means the same: the thread is gone.
        let _ = self.0.await;
    }
}

impl Ledger {
    /// Opens the ledger in a directory, makes it when it is missing, and writes off what a crashed process had set aside.
    pub fn open(dir: &Path) -> Result<(Self, Closed), LedgerError> {
        let path = dir.join(FILE);
        let writer = Writer::open(&path)?;
        let (commands, waiting) = mpsc::channel(QUEUE);
        let (closing, closed) = oneshot::channel();
        let shared = Arc::new(path.clone());
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || {
                writer.run(waiting);
                let _ = closing.send(());
            })
            .map_err(|error| LedgerError::Unusable { what: "start a thread for", path, why: error.to_string() })?;
        Ok((Self { commands, path: shared }, Closed(closed)))
    }

    /// What counts against the cap of this day.
    pub async fn counted(&self, day: Day) -> Result<Money, LedgerError> {
        self.ask(|reply| Command::Counted { day, reply }).await
    }

    /// Sets money aside, when the day's cap allows it. When this returns `Granted::Yes` it is on the disk.
    pub async fn set_aside(&self, day: Day, amount: Money, cap: Money) -> Result<Granted, LedgerError> {
        self.ask(|reply| Command::SetAside { day, amount, cap, reply }).await
    }

    /// Gives back what was set aside and is not needed.
    pub async fn give_back(&self, day: Day, amount: Money) -> Result<(), LedgerError> {
        self.commands.send(Command::GiveBack { day, amount }).await.map_err(|_| LedgerError::Closed)
    }

    /// Writes down what calls cost, taken from what was set aside when there was something.
    pub async fn charge(&self, charge: Charge) -> Result<(), LedgerError> {
        self.commands.send(Command::Charge(charge)).await.map_err(|_| LedgerError::Closed)
    }

    /// Nothing is under way any more: what was set aside and not charged is free again. For an orderly end.
    pub async fn settle(&self) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Settle { reply }).await
    }

    /// The last days on which something was spent, the latest first.
    pub async fn spent(&self, days: u32) -> Result<Vec<SpentDay>, LedgerError> {
        self.ask(|reply| Command::Spent { days, reply }).await
    }

    /// Begins a run.
    pub async fn begin(&self, run: Run) -> Result<RunKey, LedgerError> {
        self.ask(|reply| Command::Begin { run, reply }).await
    }

    /// Finds a run by its name.
    pub async fn find(&self, name: String) -> Result<(RunKey, Run), LedgerError> {
        self.ask(|reply| Command::Find { name, reply }).await
    }

    /// The latest runs, the latest first.
    pub async fn runs(&self, most: u32) -> Result<Vec<Run>, LedgerError> {
        self.ask(|reply| Command::Runs { most, reply }).await
    }

    /// Marks a run as whole.
    pub async fn end(&self, run: RunKey, now_ms: u64) -> Result<(), LedgerError> {
        self.ask(|reply| Command::End { run, now_ms, reply }).await
    }

    /// Keeps answers, all or none.
    pub async fn keep(&self, run: RunKey, answers: Vec<Answered>) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Keep { run, answers, reply }).await
    }

    /// Answers that were kept, by the position of their task in the input: those of `count` positions from `first`.
    pub async fn kept(&self, run: RunKey, first: u32, count: u32) -> Result<Vec<Answered>, LedgerError> {
        self.ask(|reply| Command::Kept { run, first, count, reply }).await
    }

    /// An answer that was kept, by what its task was. For tasks that have moved in the input.
    pub async fn kept_for(&self, run: RunKey, digest: Digest) -> Result<Option<Bytes>, LedgerError> {
        self.ask(|reply| Command::KeptFor { run, digest, reply }).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, LedgerError>>) -> Command,
    ) -> Result<T, LedgerError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| LedgerError::Closed)?;
        answer.await.unwrap_or_else(|_| {
            if self.commands.is_closed() {
                return Err(LedgerError::Closed);
            }
            let why = "what was written together with it failed; the log says why".to_owned();
            Err(LedgerError::Unusable { what: "write", path: self.path.to_path_buf(), why })
        })
    }
}

/// Whether money was set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granted {
    /// It was.
    Yes,
    /// The cap does not allow it; so much is left of the day.
    No {
        /// What is left.
        left: Money,
    },
}

/// Everything that decides what a call asks for, in 16 bytes: equal tasks are one task, and a changed one is another.
pub type Digest = [u8; 16];

/// Turns SQLite's error into ours.
fn unusable(what: &'static str, path: &Arc<PathBuf>) -> impl Fn(rusqlite::Error) -> LedgerError + use<> {
    let path = Arc::clone(path);
    move |error| LedgerError::Unusable { what, path: path.to_path_buf(), why: error.to_string() }
}
