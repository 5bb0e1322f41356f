//! Old events make room, a few at a time, oldest first.

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::core::effects::Micros;

/// Most events deleted in one transaction; the writer has other things to do.
const MOST_AT_ONCE: u64 = 20_000;

/// Which events are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retention {
    /// How long.
    pub(crate) age: Micros,
    /// How many at most.
    pub(crate) count: u64,
}

/// The number of the first event in the file; one past `last` when there is none.
pub(crate) fn first_kept(conn: &Connection, last: u64) -> rusqlite::Result<u64> {
    let first: Option<i64> = conn.query_row("SELECT min(seq) FROM events", [], |row| row.get(0))?;
    Ok(first.map_or(last + 1, i64::cast_unsigned))
}

/// Deletes some of what need not be kept. Returns the first kept event and whether more can go.
pub(crate) fn delete_some(
    conn: &Connection,
    keep: Retention,
    now: Micros,
    first: u64,
    last: u64,
) -> rusqlite::Result<(u64, bool)> {
    // The last event stays: it is what says which number comes next.
    let by_count = (last + 1).saturating_sub(keep.count.max(1));
    let by_age = first_younger(conn, now.saturating_sub(keep.age), first, last)?;
    let wanted = by_count.max(by_age).min(last);
    if wanted <= first {
        return Ok((first, false));
    }
    let upto = wanted.min(first + MOST_AT_ONCE);
    conn.execute_batch("BEGIN IMMEDIATE")?;
    let deleted = conn
        .prepare_cached("DELETE FROM events WHERE seq < ?1")
        .and_then(|mut delete| delete.execute([upto.cast_signed()]))
        .and_then(|_| {
            conn.execute(
                "INSERT OR REPLACE INTO meta (name, value) VALUES ('last_seq', ?1)",
                params![last.cast_signed()],
            )
        })
        .and_then(|_| conn.execute_batch("COMMIT"));
    if let Err(error) = deleted {
        let _ = conn.execute_batch("ROLLBACK");
        return Err(error);
    }
    Ok((upto, upto < wanted))
}

/// The first event that is not older than `since`: times grow with numbers, so halving finds it.
fn first_younger(conn: &Connection, since: Micros, first: u64, last: u64) -> rusqlite::Result<u64> {
    let (mut low, mut high) = (first, last + 1);
    let mut select = conn.prepare_cached("SELECT seq, at FROM events WHERE seq >= ?1 ORDER BY seq LIMIT 1")?;
    while low < high {
        let middle = low + (high - low) / 2;
        let found: Option<(i64, i64)> =
            select.query_row([middle.cast_signed()], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        match found {
            Some((seq, at)) if at.cast_unsigned() < since => low = seq.cast_unsigned() + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}
