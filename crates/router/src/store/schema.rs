//! The database file: how it is opened, and what tables it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use thiserror::Error;

/// Version of the tables. 1: first. 2: events know when they happened beside when they were stored. 3: members. 4: leftovers
/// know whose files they are.
const VERSION: i64 = 4;

const TABLES: &str = "
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE words (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, name INTEGER NOT NULL, swarm INTEGER, job INTEGER, node INTEGER,
    injection, data BLOB NOT NULL, happened INTEGER);
CREATE TABLE requests (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, launch INTEGER NOT NULL, swarm INTEGER NOT NULL,
    content TEXT NOT NULL, steer INTEGER NOT NULL, trace TEXT NOT NULL, created INTEGER NOT NULL);
CREATE INDEX requests_by_swarm ON requests (swarm);
CREATE TABLE swarms (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, request INTEGER NOT NULL, spec BLOB NOT NULL,
    facts TEXT NOT NULL);
CREATE TABLE nodes (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, facts TEXT NOT NULL, PRIMARY KEY (swarm, node)) WITHOUT ROWID;
CREATE TABLE streams (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, generation INTEGER NOT NULL, segment INTEGER NOT NULL,
    offset INTEGER NOT NULL, seq INTEGER NOT NULL, closed INTEGER NOT NULL, superseded INTEGER NOT NULL,
    PRIMARY KEY (swarm, node, generation)) WITHOUT ROWID;
CREATE TABLE injections (
    id TEXT PRIMARY KEY, swarm INTEGER NOT NULL, node INTEGER NOT NULL, request INTEGER NOT NULL, state TEXT NOT NULL,
    inbox_seq INTEGER NOT NULL, spoken INTEGER NOT NULL, ack_seq INTEGER NOT NULL, delivered_seq INTEGER NOT NULL,
    end_seq INTEGER NOT NULL, error TEXT NOT NULL, assistant_seen INTEGER NOT NULL, last_usage INTEGER,
    created INTEGER NOT NULL, since INTEGER NOT NULL);
CREATE INDEX injections_by_request ON injections (request);
CREATE INDEX injections_open ON injections (swarm, node) WHERE end_seq = 0;
CREATE TABLE controls (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, seq INTEGER NOT NULL, injection TEXT, kind TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (swarm, node, seq)) WITHOUT ROWID;
CREATE TABLE approvals (id TEXT PRIMARY KEY, swarm INTEGER NOT NULL, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leftovers (swarm_id TEXT PRIMARY KEY, side TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE TABLE members (id TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
";

/// From version 1 to 2. An event without this column's value happened when it was stored.
const TO_2: &str = "ALTER TABLE events ADD COLUMN happened INTEGER;";

/// From version 2 to 3.
const TO_3: &str = "CREATE TABLE members (id TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;";

/// From version 3 to 4. Until then all files were on the router's own side.
const TO_4: &str = "ALTER TABLE leftovers ADD COLUMN side TEXT NOT NULL DEFAULT '';";

/// Something is wrong with the database.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    /// SQLite refused.
    #[error("failed to {what} {path}: {source}", path = path.display())]
    Sqlite {
        /// What was tried.
        what: &'static str,
        /// The database file.
        path: PathBuf,
        /// What SQLite said. Its text is all there is to know, so it is part of the message.
        source: rusqlite::Error,
    },
    /// A later version wrote it.
    #[error(
        "{path} was written by a later version of drover (tables of version {found}, this one knows {VERSION}): \
         run that version, or choose another state directory with DROVER_STATE_DIR", path = path.display()
    )]
    Newer {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// A row makes no sense.
    #[error("{path} has a row of {table} that makes no sense: {why}", path = path.display())]
    BadRow {
        /// The database file.
        path: PathBuf,
        /// Which table.
        table: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Whether the file can be read while it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Local disk: a write-ahead log; readers have connections of their own.
    Wal,
    /// Network file system, where neither shared memory nor locks can be relied on: one connection, and nobody else.
    Exclusive,
}

/// Where the database is and how it may be used.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) sharing: Sharing,
    /// Most pages the file may have, looked at whenever it is opened: how tests fill a disk.
    pub(crate) max_pages: Arc<AtomicU32>,
}

impl Place {
    pub(crate) fn error(&self, what: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
        let path = self.path.clone();
        move |source| StoreError::Sqlite { what, path: path.clone(), source }
    }

    /// Opens the writer's connection and makes the tables when they are missing.
    pub(crate) fn open(&self) -> Result<Connection, StoreError> {
        let error = self.error("open");
        let conn = self.connect(OpenFlags::default()).map_err(&error)?;
        self.prepare(&conn).map_err(&error)?;
        let found: i64 = conn.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(&error)?;
        if found > VERSION {
            return Err(StoreError::Newer { path: self.path.clone(), found });
        }
        let change = match found {
            0 => TABLES.to_owned(),
            1 => format!("{TO_2} {TO_3} {TO_4}"),
            2 => format!("{TO_3} {TO_4}"),
            3 => TO_4.to_owned(),
            _ => return Ok(conn),
        };
        conn.execute_batch(&format!("BEGIN IMMEDIATE; {change} PRAGMA user_version = {VERSION}; COMMIT;"))
            .map_err(&error)?;
        Ok(conn)
    }

    /// On a local disk all connections are this process's own, so what they share can lie in its memory. Shared through a
    /// file, as SQLite does it otherwise, it would take the whole process down with SIGBUS when the disk turns read-only.
    fn connect(&self, flags: OpenFlags) -> rusqlite::Result<Connection> {
        match self.sharing {
            Sharing::Wal => Connection::open_with_flags_and_vfs(&self.path, flags, c"unix-excl"),
            Sharing::Exclusive => Connection::open_with_flags(&self.path, flags),
        }
    }

    fn prepare(&self, conn: &Connection) -> rusqlite::Result<()> {
        conn.busy_timeout(Duration::from_secs(5))?;
        conn.set_prepared_statement_cache_capacity(64);
        conn.pragma_update(None, "page_size", 8192)?;
        match self.sharing {
            Sharing::Wal => {
                conn.pragma_update(None, "journal_mode", "WAL")?;
                // A longer log lets bursts of events through without a pause; it is cut back afterwards.
                conn.pragma_update(None, "wal_autocheckpoint", 4000)?;
                conn.pragma_update(None, "journal_size_limit", 64 << 20)?;
            }
            Sharing::Exclusive => {
                conn.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
                conn.pragma_update(None, "journal_mode", "DELETE")?;
            }
        }
        // A commit that was answered for must survive a power cut.
        conn.pragma_update(None, "synchronous", "FULL")?;
        conn.pragma_update(None, "cache_size", -8192)?;
        conn.pragma_update(None, "temp_store", "MEMORY")?;
        match self.max_pages.load(Ordering::Relaxed) {
            0 => {}
            pages => conn.pragma_update(None, "max_page_count", pages)?,
        }
        Ok(())
    }

    /// Opens a connection that only reads, beside the writer's.
    pub(crate) fn open_reader(&self) -> Result<Connection, StoreError> {
        let error = self.error("read");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = self.connect(flags).map_err(&error)?;
        conn.busy_timeout(Duration::from_secs(5)).map_err(&error)?;
        conn.pragma_update(None, "cache_size", -1024).map_err(&error)?;
        Ok(conn)
    }
}

/// The database of a router directory, shared or not as its file system allows.
pub(crate) fn place(dir: &Path) -> Place {
    let sharing = match drover_mailbox::is_network_fs(dir) {
        Ok(Some(kind)) => {
            tracing::warn!(
                path = %dir.display(), file_system = kind,
                "the router's state is on a network file system: commits are slower, and past events are read by the \
                 writer itself; set DROVER_STATE_DIR to a local disk to avoid that"
            );
            Sharing::Exclusive
        }
        Ok(None) => Sharing::Wal,
        Err(error) => {
            tracing::warn!(path = %dir.display(), %error, "cannot tell the file system; taking it for a local disk");
            Sharing::Wal
        }
    };
    Place { path: dir.join("router.sqlite"), sharing, max_pages: Arc::default() }
}
