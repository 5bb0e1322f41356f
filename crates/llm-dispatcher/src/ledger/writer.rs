//! The thread that owns the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use super::runs::{self, NoRun};
use super::{Answered, Charge, Day, Digest, Granted, LedgerError, Run, RunKey, SpentDay, schema, spend, unusable};
use crate::core::Money;

/// Most commands that are committed together.
const TOGETHER: usize = 256;

type Reply<T> = oneshot::Sender<Result<T, LedgerError>>;

/// What the thread is asked for.
#[derive(Debug)]
pub(super) enum Command {
    Counted { day: Day, reply: Reply<Money> },
    SetAside { day: Day, amount: Money, cap: Money, reply: Reply<Granted> },
    GiveBack { day: Day, amount: Money },
    Charge(Charge),
    Settle { reply: Reply<()> },
    Spent { days: u32, reply: Reply<Vec<SpentDay>> },
    Begin { run: Run, reply: Reply<RunKey> },
    Find { name: String, reply: Reply<(RunKey, Run)> },
    Runs { most: u32, reply: Reply<Vec<Run>> },
    End { run: RunKey, now_ms: u64, reply: Reply<()> },
    Keep { run: RunKey, answers: Vec<Answered>, reply: Reply<()> },
    Kept { run: RunKey, first: u32, count: u32, reply: Reply<Vec<Answered>> },
    KeptFor { run: RunKey, digest: Digest, reply: Reply<Option<Bytes>> },
}

impl Command {
    /// Its effect must be on the disk before anybody acts on it.
    fn waits_for_disk(&self) -> bool {
        matches!(self, Self::SetAside { .. } | Self::Settle { .. } | Self::Begin { .. } | Self::End { .. })
    }
}

/// Tells an asker, once everything is committed or none of it.
type Told = Box<dyn FnOnce(Result<(), LedgerError>)>;

pub(super) struct Writer {
    connection: Connection,
    path: Arc<PathBuf>,
    /// Which start of the dispatcher this is.
    start: i64,
    waits: bool,
    /// A charge could not be written. It still counts, because it was set aside; so that must not be given back.
    broken: Option<LedgerError>,
}

impl Writer {
    pub(super) fn open(path: &Path) -> Result<Self, LedgerError> {
        let (connection, path) = schema::open(path)?;
        let (start, lost) = spend::begin(&connection).map_err(unusable("read", &path))?;
        if !lost.is_zero() {
            warn!(usd = %lost, "the dispatcher ended without order: what it had set aside counts as spent");
        }
        Ok(Self { connection, path, start, waits: true, broken: None })
    }

    /// Works until nobody can ask any more.
    pub(super) fn run(mut self, mut waiting: mpsc::Receiver<Command>) {
        let mut batch = Vec::new();
        while let Some(first) = waiting.blocking_recv() {
            batch.push(first);
            while batch.len() < TOGETHER
                && let Ok(next) = waiting.try_recv()
            {
                batch.push(next);
            }
            self.carry_out(&mut batch);
        }
        let _ = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE);");
    }

    /// Carries commands out in one transaction and tells their askers when it is committed.
    fn carry_out(&mut self, batch: &mut Vec<Command>) {
        let wait = batch.iter().any(Command::waits_for_disk);
        let money = batch.iter().any(|command| matches!(command, Command::Charge(_) | Command::GiveBack { .. }));
        let begun = self.begin(wait);
        let mut told: Vec<Told> = Vec::with_capacity(batch.len());
        match begun {
            Ok(()) => {
                let mut failed = None;
                for command in batch.drain(..) {
                    match self.perform(command) {
                        Ok(tell) => told.extend(tell),
                        Err(error) => {
                            failed = Some(error);
                            break;
                        }
                    }
                }
                let committed = match failed {
                    None => self.connection.execute_batch("COMMIT"),
                    Some(error) => Err(error),
                };
                let outcome = committed.map_err(unusable("write", &self.path));
                if let Err(error) = &outcome {
                    let _ = self.connection.execute_batch("ROLLBACK");
                    self.complain(error, money);
                }
                for tell in told {
                    tell(outcome.clone());
                }
            }
            Err(error) => {
                let error = unusable("write", &self.path)(error);
                self.complain(&error, money);
            }
        }
        // Those behind the one that failed get no answer, and their handle knows what that means.
        batch.clear();
    }

    fn begin(&mut self, wait: bool) -> rusqlite::Result<()> {
        if wait != self.waits {
            schema::wait_for_disk(&self.connection, wait)?;
            self.waits = wait;
        }
        self.connection.execute_batch("BEGIN IMMEDIATE")
    }

    fn complain(&mut self, error: &LedgerError, money: bool) {
        error!(%error, "the ledger cannot be written");
        if money {
            self.broken.get_or_insert_with(|| error.clone());
        }
    }

    /// Carries out one command; what it gives is told after the commit.
    fn perform(&self, command: Command) -> rusqlite::Result<Option<Told>> {
        let connection = &self.connection;
        let told = match command {
            Command::Counted { day, reply } => later(reply, spend::counted(connection, day)?),
            Command::SetAside { day, amount, cap, reply } => {
                later(reply, spend::set_aside(connection, self.start, day, amount, cap)?)
            }
            Command::GiveBack { day, amount } => {
                spend::give_back(connection, self.start, day, amount)?;
                return Ok(None);
            }
            Command::Charge(charge) => {
                spend::charge(connection, self.start, &charge)?;
                return Ok(None);
            }
            Command::Settle { reply } => match &self.broken {
                Some(error) => refuse(reply, error.clone()),
                None => later(reply, spend::settle(connection, self.start)?),
            },
            Command::Spent { days, reply } => later(reply, spend::spent(connection, days)?),
            Command::Begin { run, reply } => match runs::begin(connection, &run) {
                Ok(key) => later(reply, key),
                Err(NoRun::Plain(error)) => refuse(reply, error),
                Err(NoRun::Sqlite(error)) => return Err(error),
            },
            Command::Find { name, reply } => match runs::find(connection, &name) {
                Ok(found) => later(reply, found),
                Err(NoRun::Plain(error)) => refuse(reply, error),
                Err(NoRun::Sqlite(error)) => return Err(error),
            },
            Command::Runs { most, reply } => later(reply, runs::latest(connection, most)?),
            Command::End { run, now_ms, reply } => later(reply, runs::end(connection, run, now_ms)?),
            Command::Keep { run, answers, reply } => later(reply, runs::keep(connection, run, &answers)?),
            Command::Kept { run, first, count, reply } => later(reply, runs::kept(connection, run, first, count)?),
            Command::KeptFor { run, digest, reply } => later(reply, runs::kept_for(connection, run, &digest)?),
        };
        Ok(Some(told))
    }
}

fn later<T: 'static>(reply: Reply<T>, value: T) -> Told {
    Box::new(move |outcome| {
        let _ = reply.send(outcome.map(|()| value));
    })
}

fn refuse<T: 'static>(reply: Reply<T>, error: LedgerError) -> Told {
    Box::new(move |_| {
        let _ = reply.send(Err(error));
    })
}
