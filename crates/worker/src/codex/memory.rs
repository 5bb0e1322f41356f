//! Remembers the thread across restarts of codex and of the worker.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is known of the thread of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ThreadMemory {
    /// Codex's name for it.
    pub(super) thread_id: String,
    /// A prompt was sent to it. Codex writes a thread down only then: one without a prompt cannot be resumed, and nothing
    /// is lost with it.
    pub(super) used: bool,
}

impl ThreadMemory {
    /// What was remembered; none when there is nothing or nothing that can be read.
    pub(super) fn load(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes it down; it is on disk when this returns.
    pub(super) fn save(&self, path: &Path) -> io::Result<()> {
        let next = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&next, path)?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    }
}
