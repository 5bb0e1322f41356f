//! Events as rows: names and ids that repeat are numbers of the table `words`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use drover_types::{InjectionId, SwarmId};
use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, OptionalExtension as _, Row, ToSql, params};
use uuid::Uuid;

use crate::core::effects::{Event, Word};

/// Most words that are remembered: swarms come and go, and each brings names of its own.
const MOST_WORDS: usize = 4096;

/// Writes events; remembers which words have numbers.
#[derive(Debug, Default)]
pub(crate) struct EventWriter {
    words: HashMap<Arc<str>, i64>,
    last_injection: Option<(InjectionId, Injection)>,
}

/// An injection id as a column: 16 bytes when it is a UUID, which ours are.
#[derive(Debug, Clone)]
enum Injection {
    Uuid([u8; 16]),
    Text(InjectionId),
}

impl ToSql for Injection {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Uuid(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
            Self::Text(id) => ToSqlOutput::Borrowed(ValueRef::Text(id.as_str().as_bytes())),
        })
    }
}

fn pack(id: &InjectionId) -> Injection {
    match Uuid::try_parse(id.as_str()) {
        // Only the one spelling comes back from the bytes.
        Ok(uuid) if uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == id.as_str() => {
            Injection::Uuid(*uuid.as_bytes())
        }
        _ => Injection::Text(id.clone()),
    }
}

impl EventWriter {
    /// Forgets the numbers of words: a transaction that gave some was rolled back.
    pub(crate) fn forget(&mut self) {
        self.words.clear();
    }

    fn number(&mut self, conn: &Connection, word: &str) -> rusqlite::Result<i64> {
        if let Some(&number) = self.words.get(word) {
            return Ok(number);
        }
        let known = conn
            .prepare_cached("SELECT id FROM words WHERE text = ?1")?
            .query_row([word], |row| row.get(0))
            .optional()?;
        let number = if let Some(number) = known {
            number
        } else {
            conn.prepare_cached("INSERT INTO words (text) VALUES (?1)")?.execute([word])?;
            conn.last_insert_rowid()
        };
        if self.words.len() >= MOST_WORDS {
            self.words.clear();
        }
        self.words.insert(word.into(), number);
        Ok(number)
    }

    /// Writes events; the caller has begun a transaction.
    pub(crate) fn write(&mut self, conn: &Connection, events: &[Event]) -> rusqlite::Result<()> {
        let mut insert = conn.prepare_cached(
            "INSERT INTO events (seq, at, name, swarm, job, node, injection, data, happened)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        for event in events {
            let name = self.number(conn, &event.name)?;
            let swarm = event.swarm.as_ref().map(|id| self.number(conn, id.as_str())).transpose()?;
            let job = if event.job.is_empty() { None } else { Some(self.number(conn, &event.job)?) };
            let injection = event.injection.as_ref().map(|id| match &self.last_injection {
                Some((last, packed)) if last == id => packed.clone(),
                _ => {
                    let packed = pack(id);
                    self.last_injection = Some((id.clone(), packed.clone()));
                    packed
                }
            });
            insert.execute(params![
                event.seq.cast_signed(),
                event.at.cast_signed(),
                name,
                swarm,
                job,
                event.node,
                injection,
                &event.data[..],
                (event.happened != event.at).then_some(event.happened.cast_signed()),
            ])?;
        }
        Ok(())
    }
}

/// Some past events.
#[derive(Debug, Default)]
pub(crate) struct Page {
    pub(crate) events: Vec<Event>,
    /// How far has been looked: every wanted event up to here is in `events` or no longer kept.
    pub(crate) upto: u64,
}

/// What past events are wanted.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) after: u64,
    /// The last event there is.
    pub(crate) last: u64,
    pub(crate) swarm: Option<SwarmId>,
}

/// Most rows that one read looks at; it must not hold a thread for long.
const MOST_LOOKED_AT: u64 = 20_000;
/// Most events of a page.
const MOST_EVENTS: usize = 512;
/// Most bytes of a page.
const MOST_BYTES: usize = 256 << 10;

/// Reads events; remembers words by number.
#[derive(Debug, Default)]
pub(crate) struct EventReader {
    words: HashMap<i64, Arc<str>>,
}

impl EventReader {
    fn word(&mut self, conn: &Connection, number: Option<i64>) -> rusqlite::Result<Arc<str>> {
        let Some(number) = number else { return Ok("".into()) };
        if let Some(word) = self.words.get(&number) {
            return Ok(Arc::clone(word));
        }
        let word: String =
            conn.prepare_cached("SELECT text FROM words WHERE id = ?1")?.query_row([number], |row| row.get(0))?;
        let word: Arc<str> = word.into();
        if self.words.len() >= MOST_WORDS {
            self.words.clear();
        }
        self.words.insert(number, Arc::clone(&word));
        Ok(word)
    }

    /// Reads the next events.
    pub(crate) fn read(&mut self, conn: &Connection, wanted: &Wanted) -> rusqlite::Result<Page> {
        let upto = wanted.last.min(wanted.after.saturating_add(MOST_LOOKED_AT));
        let mut page = Page { events: Vec::new(), upto };
        let swarm: Option<i64> = match &wanted.swarm {
            None => None,
            Some(id) => {
                let number = conn
                    .prepare_cached("SELECT id FROM words WHERE text = ?1")?
                    .query_row([id.as_str()], |row| row.get(0))
                    .optional()?;
                let Some(number) = number else { return Ok(page) };
                Some(number)
            }
        };
        let mut select = conn.prepare_cached(
            "SELECT seq, at, name, swarm, job, node, injection, data, happened FROM events
             WHERE seq > ?1 AND seq <= ?2 AND (?3 IS NULL OR swarm = ?3) ORDER BY seq",
        )?;
        let mut rows = select.query(params![wanted.after.cast_signed(), upto.cast_signed(), swarm])?;
        let mut bytes = 0;
        while let Some(row) = rows.next()? {
            let event = self.event(conn, row)?;
            bytes += event.data.len() + 128;
            let seq = event.seq;
            page.events.push(event);
            if page.events.len() >= MOST_EVENTS || bytes >= MOST_BYTES {
                page.upto = seq;
                break;
            }
        }
        Ok(page)
    }

    fn event(&mut self, conn: &Connection, row: &Row<'_>) -> rusqlite::Result<Event> {
        let swarm = match row.get::<_, Option<i64>>(3)? {
            None => None,
            some => self.word(conn, some)?.parse().ok(),
        };
        let injection = match row.get::<_, Value>(6)? {
            Value::Blob(bytes) => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Uuid::from_bytes(bytes).into()),
            Value::Text(text) => text.parse().ok(),
            _ => None,
        };
        let at: i64 = row.get(1)?;
        Ok(Event {
            seq: row.get::<_, i64>(0)?.cast_unsigned(),
            at: at.cast_unsigned(),
            happened: row.get::<_, Option<i64>>(8)?.unwrap_or(at).cast_unsigned(),
            name: Word::Other(self.word(conn, row.get(2)?)?),
            swarm,
            job: self.word(conn, row.get(4)?)?,
            node: row.get(5)?,
            injection,
            data: Bytes::from(row.get::<_, Vec<u8>>(7)?),
        })
    }
}
