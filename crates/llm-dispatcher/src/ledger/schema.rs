//! The file: how it is opened, and what tables it has.

use std::fs::OpenOptions;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use super::{LedgerError, unusable};

/// Version of the tables. 1: first.
const VERSION: i64 = 1;

/// Amounts are in millionths of a millionth of a US dollar. A lease is what one start of the dispatcher has set aside for one
/// day, and how much of that was charged. An answer's key is its run's key and the position of its task.
const TABLES: &str = "
CREATE TABLE leases (
    start INTEGER NOT NULL, day TEXT NOT NULL, set_aside INTEGER NOT NULL, charged INTEGER NOT NULL, open INTEGER NOT NULL,
    PRIMARY KEY (day, start)) WITHOUT ROWID;
CREATE TABLE charges (
    day TEXT NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL, calls INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, cost INTEGER NOT NULL, estimated INTEGER NOT NULL,
    PRIMARY KEY (day, provider, model)) WITHOUT ROWID;
CREATE TABLE runs (
    key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, source TEXT NOT NULL, began_ms INTEGER NOT NULL,
    ended_ms INTEGER, answered INTEGER NOT NULL);
CREATE TABLE answers (key INTEGER PRIMARY KEY, digest BLOB NOT NULL, body BLOB NOT NULL);
";

/// How long another program that reads the file may hold us up.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens the file and makes it, readable by its owner only, when it is missing.
pub(super) fn open(path: &Path) -> Result<(Connection, Arc<PathBuf>), LedgerError> {
    let shared = Arc::new(path.to_owned());
    let error = unusable("open", &shared);
    let io =
        |source: std::io::Error| LedgerError::Unusable { what: "open", path: path.to_owned(), why: source.to_string() };
    // SQLite would make it with the permissions of the umask, and gives its log the permissions of the file.
    let file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.permissions().mode();
    if mode & 0o077 != 0 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    }
    drop(file);
    let connection = Connection::open(path).map_err(&error)?;
    prepare(&connection).map_err(&error)?;
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(&error)?;
    match found {
        0 => {
            let script = format!("BEGIN IMMEDIATE;{TABLES}PRAGMA user_version={VERSION};COMMIT;");
            connection.execute_batch(&script).map_err(&error)?;
        }
        VERSION => {}
        found => return Err(LedgerError::Newer { path: path.to_owned(), found }),
    }
    Ok((connection, shared))
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(PATIENCE)?;
    connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "full")?;
    // A run that was forgotten leaves room that the next one takes; the file need not shrink.
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(())
}

/// Which writes wait for the disk.
pub(super) fn wait_for_disk(connection: &Connection, wait: bool) -> rusqlite::Result<()> {
    connection.pragma_update(None, "synchronous", if wait { "full" } else { "normal" })
}
