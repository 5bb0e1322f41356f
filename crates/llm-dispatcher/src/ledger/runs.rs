//! Runs and answers in the tables.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Digest, LedgerError};

/// A run and its answers are kept for so long after it was begun.
const KEPT_MS: u64 = 30 * 24 * 3600 * 1000;
/// An answer's key: the run above, the position of the task below. Answers of a run lie beside each other, in the order of the
/// input, which is nearly the order in which they come.
const POSITION_BITS: u32 = 32;

/// The ledger's name for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunKey(pub(super) i64);

impl RunKey {
    /// The key of no run.
    pub(crate) const NONE: Self = Self(0);

    fn answer(self, position: u32) -> i64 {
        (self.0 << POSITION_BITS) | i64::from(position)
    }
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Where its tasks came from.
    pub source: String,
    /// When it began, in milliseconds of Unix time.
    pub began_ms: u64,
    /// When it ended; unset when it was broken off, or goes on.
    pub ended_ms: Option<u64>,
    /// Answers that are kept.
    pub answered: u64,
}

/// An answer to one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// Number of the task in the input, from 0.
    pub position: u32,
    /// What the task was.
    pub digest: Digest,
    /// The answer, as its writer wrote it.
    pub body: Bytes,
}

/// Why a run cannot be begun or found.
pub(super) enum NoRun {
    Sqlite(rusqlite::Error),
    Plain(LedgerError),
}

impl From<rusqlite::Error> for NoRun {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

pub(super) fn begin(connection: &Connection, run: &Run) -> Result<RunKey, NoRun> {
    forget_old(connection, run.began_ms)?;
    let taken: Option<i64> =
        connection.query_row("SELECT key FROM runs WHERE name = ?1", [&run.name], |row| row.get(0)).optional()?;
    if taken.is_some() {
        return Err(NoRun::Plain(LedgerError::RunExists(run.name.clone())));
    }
    let mut add =
        connection.prepare_cached("INSERT INTO runs (name, source, began_ms, answered) VALUES (?1, ?2, ?3, 0)")?;
    add.execute(params![run.name, run.source, i64::try_from(run.began_ms).unwrap_or(i64::MAX)])?;
    Ok(RunKey(connection.last_insert_rowid()))
}

/// Forgets runs of long ago with their answers.
fn forget_old(connection: &Connection, now_ms: u64) -> rusqlite::Result<()> {
    let before = i64::try_from(now_ms.saturating_sub(KEPT_MS)).unwrap_or(0);
    let mut old = connection.prepare_cached("SELECT key FROM runs WHERE began_ms < ?1")?;
    let old: Vec<i64> = old.query_map([before], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for key in old {
        let run = RunKey(key);
        let all = params![run.answer(0), run.answer(u32::MAX)];
        connection.execute("DELETE FROM answers WHERE key BETWEEN ?1 AND ?2", all)?;
        connection.execute("DELETE FROM runs WHERE key = ?1", [key])?;
    }
    Ok(())
}

pub(super) fn find(connection: &Connection, name: &str) -> Result<(RunKey, Run), NoRun> {
    let mut find = connection
        .prepare_cached("SELECT name, source, began_ms, ended_ms, answered, key FROM runs WHERE name = ?1")?;
    let found = find.query_row([name], |row| Ok((RunKey(row.get(5)?), run_of(row)?))).optional()?;
    found.ok_or_else(|| NoRun::Plain(LedgerError::UnknownRun(name.to_owned())))
}

pub(super) fn latest(connection: &Connection, most: u32) -> rusqlite::Result<Vec<Run>> {
    let mut latest = connection
        .prepare_cached("SELECT name, source, began_ms, ended_ms, answered FROM runs ORDER BY key DESC LIMIT ?1")?;
    latest.query_map([most], run_of)?.collect()
}

fn run_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Run> {
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(Run {
        name: row.get(0)?,
        source: row.get(1)?,
        began_ms: number(row.get(2)?),
        ended_ms: row.get::<_, Option<i64>>(3)?.map(number),
        answered: number(row.get(4)?),
    })
}

pub(super) fn end(connection: &Connection, run: RunKey, now_ms: u64) -> rusqlite::Result<()> {
    let mut end = connection.prepare_cached("UPDATE runs SET ended_ms = ?2 WHERE key = ?1")?;
    end.execute(params![run.0, i64::try_from(now_ms).unwrap_or(i64::MAX)]).map(|_| ())
}

pub(super) fn keep(connection: &Connection, run: RunKey, answers: &[Answered]) -> rusqlite::Result<()> {
    let mut add =
        connection.prepare_cached("INSERT OR REPLACE INTO answers (key, digest, body) VALUES (?1, ?2, ?3)")?;
    for answer in answers {
        add.execute(params![run.answer(answer.position), answer.digest.as_slice(), answer.body.as_ref()])?;
    }
    let mut count = connection.prepare_cached("UPDATE runs SET answered = answered + ?2 WHERE key = ?1")?;
    count.execute(params![run.0, i64::try_from(answers.len()).unwrap_or(i64::MAX)]).map(|_| ())
}

pub(super) fn kept(connection: &Connection, run: RunKey, first: u32, count: u32) -> rusqlite::Result<Vec<Answered>> {
    let last = first.saturating_add(count.saturating_sub(1));
    let mut select =
        connection.prepare_cached("SELECT key, digest, body FROM answers WHERE key BETWEEN ?1 AND ?2 ORDER BY key")?;
    let rows = select.query_map(params![run.answer(first), run.answer(last)], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, Digest>(1)?, row.get::<_, Vec<u8>>(2)?))
    })?;
    rows.map(|row| {
        let (key, digest, body) = row?;
        Ok(Answered { position: key as u32, digest, body: body.into() })
    })
    .collect()
}

/// Finds an answer whose task has moved. The index is made when this is asked for the first time, since most runs never need it.
pub(super) fn kept_for(connection: &Connection, run: RunKey, digest: &Digest) -> rusqlite::Result<Option<Bytes>> {
    connection.execute_batch("CREATE INDEX IF NOT EXISTS answers_by_digest ON answers (digest)")?;
    let mut select =
        connection.prepare_cached("SELECT body FROM answers WHERE digest = ?1 AND key BETWEEN ?2 AND ?3 LIMIT 1")?;
    let all = params![digest.as_slice(), run.answer(0), run.answer(u32::MAX)];
    select.query_row(all, |row| row.get::<_, Vec<u8>>(0)).optional().map(|body| body.map(Bytes::from))
}
