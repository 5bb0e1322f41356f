//! Answers that outlive the process: one SQLite file, mode 0600, of a bounded size. It is a convenience and no ledger: what
//! cannot be written is not kept, and a file that cannot be read is made anew.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drover_service::now_us;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params};
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use super::Key;
use super::kept::Kept;

const FILE: &str = "cache.sqlite";
/// Version of the table.
const VERSION: i64 = 1;
/// Looks and answers that may wait for the thread.
const QUEUE: usize = 1024;
/// Answers that are committed together.
const TOGETHER: usize = 256;
/// How long somebody else may hold the file before it is done without.
const HELD: Duration = Duration::from_secs(2);
/// A row takes about so much beside the answer.
const OVERHEAD: u64 = 128;

enum Command {
    Get { key: Key, reply: oneshot::Sender<Option<Kept>> },
    Put { key: Key, at: u64, body: Vec<u8> },
}

/// A handle; the thread ends when it is gone.
pub(super) struct Disk {
    commands: mpsc::Sender<Command>,
    /// Nobody waits for its end but tests, which open the file again.
    _thread: std::thread::JoinHandle<()>,
}

/// Why the file cannot be used.
enum Unusable {
    /// Somebody else holds it now; what is in it is good.
    Held(String),
    /// It is no file of answers, or cannot be made one.
    Broken(String),
}

impl Disk {
    pub(super) fn open(dir: &Path, most: u64, ttl: Duration) -> Result<Self, String> {
        let path = dir.join(FILE);
        let table = match Table::open(&path, most, ttl) {
            Ok(table) => table,
            Err(Unusable::Held(error)) => return Err(error),
            Err(Unusable::Broken(error)) => {
                debug!(%error, "the file of answers is made anew");
                for suffix in ["", "-wal", "-shm"] {
                    let mut name = path.clone().into_os_string();
                    name.push(suffix);
                    let _ = fs::remove_file(PathBuf::from(name));
                }
                Table::open(&path, most, ttl).map_err(|(Unusable::Held(error) | Unusable::Broken(error))| error)?
            }
        };
        let (commands, waiting) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new().name("cache".to_owned()).spawn(move || table.run(waiting));
        let thread = thread.map_err(|error| format!("no thread for {}: {error}", path.display()))?;
        Ok(Self { commands, _thread: thread })
    }

    pub(super) async fn get(&self, key: Key) -> Option<Kept> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Get { key, reply }).await.ok()?;
        answer.await.ok()?
    }

    /// Keeps an answer, unless so many wait already that it is not worth the while.
    pub(super) fn put(&self, key: Key, kept: &Arc<Kept>) {
        let _ = self.commands.try_send(Command::Put { key, at: kept.at, body: kept.to_bytes() });
    }
}

struct Table {
    connection: Connection,
    most: u64,
    bytes: u64,
}

impl Table {
    fn open(path: &Path, most: u64, ttl: Duration) -> Result<Self, Unusable> {
        let said = |error: &dyn std::fmt::Display| format!("cannot use {}: {error}", path.display());
        let of_sqlite = |error: rusqlite::Error| match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Unusable::Held(said(&error)),
            _ => Unusable::Broken(said(&error)),
        };
        // SQLite would make it with the permissions of the umask.
        fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| Unusable::Broken(said(&error)))?;
        let connection = Connection::open(path).map_err(of_sqlite)?;
        let bytes = prepare(&connection, ttl).map_err(of_sqlite)?;
        let mut table = Self { connection, most, bytes };
        table.make_room().map_err(of_sqlite)?;
        Ok(table)
    }

    fn run(mut self, mut waiting: mpsc::Receiver<Command>) {
        let mut batch = Vec::new();
        while let Some(first) = waiting.blocking_recv() {
            batch.push(first);
            while batch.len() < TOGETHER
                && let Ok(next) = waiting.try_recv()
            {
                batch.push(next);
            }
            if let Err(error) = self.carry_out(&mut batch) {
                debug!(%error, "answers were not kept on the disk");
                let _ = self.connection.execute_batch("ROLLBACK");
            }
            batch.clear();
        }
        let _ = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE);");
    }

    fn carry_out(&mut self, batch: &mut Vec<Command>) -> rusqlite::Result<()> {
        // At once for writing: a transaction that becomes one later fails when another program has written meanwhile.
        self.connection.execute_batch("BEGIN IMMEDIATE")?;
        let mut told = Vec::new();
        for command in batch.drain(..) {
            match command {
                Command::Get { key, reply } => told.push((reply, self.get(&key)?)),
                Command::Put { key, at, body } => self.put(&key, at, &body)?,
            }
        }
        self.make_room()?;
        self.connection.execute_batch("COMMIT")?;
        for (reply, kept) in told {
            // Nobody may wait any more.
            let _ = reply.send(kept);
        }
        Ok(())
    }

    fn get(&self, key: &Key) -> rusqlite::Result<Option<Kept>> {
        let mut get = self.connection.prepare_cached("SELECT at, body FROM answers WHERE key = ?1")?;
        let found = get.query_row([key], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))).optional()?;
        Ok(found.and_then(|(at, body)| Kept::from_bytes(&body, u64::try_from(at).ok()?)))
    }

    fn put(&mut self, key: &Key, at: u64, body: &[u8]) -> rusqlite::Result<()> {
        let bytes = body.len() as u64 + OVERHEAD;
        let mut before = self.connection.prepare_cached("SELECT bytes FROM answers WHERE key = ?1")?;
        let before: Option<i64> = before.query_row([key], |row| row.get(0)).optional()?;
        let mut put = self
            .connection
            .prepare_cached("INSERT OR REPLACE INTO answers (key, at, bytes, body) VALUES (?1, ?2, ?3, ?4)")?;
        put.execute(params![key, stored(at), stored(bytes), body])?;
        self.bytes = (self.bytes + bytes).saturating_sub(before.map_or(0, i64::unsigned_abs));
        Ok(())
    }

    /// The oldest go first.
    fn make_room(&mut self) -> rusqlite::Result<()> {
        while self.bytes > self.most {
            let mut oldest =
                self.connection.prepare_cached("SELECT key, bytes FROM answers ORDER BY at, key LIMIT 64")?;
            let rows = oldest.query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, i64>(1)?)))?;
            let rows: Vec<_> = rows.collect::<rusqlite::Result<_>>()?;
            if rows.is_empty() {
                self.bytes = 0;
            }
            for (key, bytes) in rows {
                if self.bytes <= self.most {
                    break;
                }
                self.connection.prepare_cached("DELETE FROM answers WHERE key = ?1")?.execute([key])?;
                self.bytes = self.bytes.saturating_sub(bytes.unsigned_abs());
            }
        }
        Ok(())
    }
}

/// SQLite's integers have a sign.
fn stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Brings the table into being, forgets what is too old, and gives how many bytes are left.
fn prepare(connection: &Connection, ttl: Duration) -> rusqlite::Result<u64> {
    connection.busy_timeout(HELD)?;
    connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "normal")?;
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found != VERSION {
        connection.execute_batch(&format!(
            "DROP TABLE IF EXISTS answers;
             CREATE TABLE answers (key BLOB PRIMARY KEY, at INTEGER NOT NULL, bytes INTEGER NOT NULL, body BLOB NOT NULL);
             CREATE INDEX answers_by_age ON answers (at, key);
             PRAGMA user_version={VERSION};"
        ))?;
    }
    let oldest = (now_us() / 1_000_000).saturating_sub(ttl.as_secs());
    connection.execute("DELETE FROM answers WHERE at <= ?1", [stored(oldest)])?;
    let bytes: i64 = connection.query_row("SELECT coalesce(sum(bytes), 0) FROM answers", [], |row| row.get(0))?;
    Ok(bytes.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::call::{CallAnswer, Finish, ToolCall};

    fn kept(text: &str) -> Arc<Kept> {
        let call = ToolCall { id: "1".into(), name: "f".into(), arguments: "{}".into() };
        let answer = CallAnswer { tool_calls: vec![call], ..CallAnswer::of(text, Finish::ToolCalls) };
        Arc::new(Kept::from_bytes(&Kept { answer, at: 0, bytes: 0 }.to_bytes(), now_us() / 1_000_000).unwrap())
    }

    /// Waits until the file is let go, however slow the machine is.
    fn close(disk: Disk) {
        let Disk { commands, _thread: thread } = disk;
        drop(commands);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn answers_outlive_the_process_within_their_bytes_and_their_time() {
        let dir = tempfile::tempdir().unwrap();
        let day = Duration::from_hours(24);
        let open = |most| Disk::open(dir.path(), most, day).unwrap();
        let disk = open(10_000);
        let answer = kept("kept answer");
        disk.put([1; 32], &answer);
        assert_eq!(disk.get([1; 32]).await.as_ref(), Some(&*answer));
        assert_eq!(disk.get([2; 32]).await, None);
        close(disk);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let disk = open(10_000);
        assert_eq!(disk.get([1; 32]).await.as_ref(), Some(&*answer));
        for n in 10..60 {
            disk.put([n; 32], &kept(&"x".repeat(500)));
            // One after another, as the age of a second does not tell them apart.
            disk.get([n; 32]).await;
        }
        let mut left = 0;
        for n in 10..60 {
            left += u64::from(disk.get([n; 32]).await.is_some());
        }
        assert!((8..20).contains(&left), "{left} of about 700 bytes in 10000");
        close(disk);
        let disk = Disk::open(dir.path(), 10_000, Duration::ZERO).unwrap();
        assert_eq!(disk.get([59; 32]).await, None, "too old");
    }

    #[tokio::test]
    async fn a_file_that_somebody_holds_is_not_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let day = Duration::from_hours(24);
        let disk = Disk::open(dir.path(), 10_000, day).unwrap();
        let answer = kept("worth its money");
        disk.put([1; 32], &answer);
        assert!(disk.get([1; 32]).await.is_some());
        close(disk);
        let other = Connection::open(dir.path().join(FILE)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let refused = Disk::open(dir.path(), 10_000, day).err();
        assert!(refused.as_ref().is_some_and(|error| error.contains("locked")), "{refused:?}");
        other.execute_batch("ROLLBACK").unwrap();
        drop(other);
        let disk = Disk::open(dir.path(), 10_000, day).unwrap();
        assert_eq!(disk.get([1; 32]).await.as_ref(), Some(&*answer));
    }

    #[tokio::test]
    async fn a_file_that_is_none_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "this is no database, whatever its name says".repeat(100)).unwrap();
        let disk = Disk::open(dir.path(), 10_000, Duration::from_hours(24)).unwrap();
        assert_eq!(disk.get([1; 32]).await, None);
        disk.put([1; 32], &kept("x"));
        assert!(disk.get([1; 32]).await.is_some());
    }
}
