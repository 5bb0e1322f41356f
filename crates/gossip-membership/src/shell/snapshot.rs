//! What a restarted node starts from: the boot that it must go above, and where the others were.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use drover_service::{Context, now_us};
use serde::{Deserialize, Serialize};

use super::notes::Notes;
use crate::core::Snapshot;
use crate::metrics::Metrics;

const VERSION: u32 = 1;
/// Nobody's cluster makes a longer file; a wrong one must not be read into memory.
const MAX_BYTES: u64 = 8 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct File {
    v: u32,
    node_id: String,
    boot: u64,
    members: Vec<Known>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Known {
    node_id: String,
    addr: SocketAddr,
}

/// The last snapshot of this node; `None` when there is none that can be used.
pub(super) fn read(path: &Path, node_id: &str) -> Option<Snapshot> {
    let size = fs::metadata(path).ok()?.len();
    if size > MAX_BYTES {
        return None;
    }
    let file: File = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let members = file.members.into_iter().map(|known| (known.node_id, known.addr)).collect();
    (file.v == VERSION && file.node_id == node_id).then_some(Snapshot { boot: file.boot, members })
}

/// Writes whole files in the blocking pool, one at a time and always the newest: a slow disk holds up nobody.
#[derive(Clone)]
pub(super) struct Writer {
    path: PathBuf,
    node_id: String,
    next: Arc<Mutex<Pending>>,
    ctx: Context,
    notes: Notes,
    metrics: Metrics,
}

#[derive(Default)]
struct Pending {
    snapshot: Option<Snapshot>,
    writing: bool,
}

impl Writer {
    pub(super) fn new(path: PathBuf, node_id: &str, ctx: &Context, notes: &Notes, metrics: &Metrics) -> Self {
        Self {
            path,
            node_id: node_id.to_owned(),
            next: Arc::default(),
            ctx: ctx.clone(),
            notes: notes.clone(),
            metrics: metrics.clone(),
        }
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a snapshot to write; never waits.
    pub(super) fn put(&self, snapshot: Snapshot) {
        let mut pending = self.pending();
        pending.snapshot = Some(snapshot);
        if std::mem::replace(&mut pending.writing, true) {
            return;
        }
        drop(pending);
        let writer = self.clone();
        self.ctx.spawn("snapshot", async move {
            let _ = tokio::task::spawn_blocking(move || writer.work()).await;
        });
    }

    fn work(&self) {
        loop {
            let snapshot = {
                let mut pending = self.pending();
                let Some(snapshot) = pending.snapshot.take() else {
                    pending.writing = false;
                    return;
                };
                snapshot
            };
            match write(&self.path, &self.node_id, snapshot) {
                Ok(()) => self.notes.over("snapshot"),
                Err(error) => {
                    self.metrics.snapshot_errors.inc();
                    let message = format!("cannot write {}: {error}", self.path.display());
                    self.notes.holds(now_us(), "snapshot", message);
                }
            }
        }
    }
}

/// Makes a directory that only this user may enter.
pub(super) fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn write(path: &Path, node_id: &str, snapshot: Snapshot) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        make_private(dir)?;
    }
    let members = snapshot.members.into_iter().map(|(node_id, addr)| Known { node_id, addr }).collect();
    let file = File { v: VERSION, node_id: node_id.to_owned(), boot: snapshot.boot, members };
    replace(path, &serde_json::to_vec(&file)?, false)
}

/// Puts a whole file in the place of another, or leaves that as it is.
pub(super) fn replace(path: &Path, bytes: &[u8], sync: bool) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    drop(file);
    fs::rename(&fresh, path)?;
    if let (true, Some(dir)) = (sync, path.parent()) {
        fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_this_nodes_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/snapshot.json");
        assert_eq!(read(&path, "s/1"), None);
        let snapshot = Snapshot { boot: 7, members: vec![("s/2".to_owned(), ([127, 0, 0, 1], 5).into())] };
        write(&path, "s/1", snapshot.clone()).unwrap();
        assert_eq!(read(&path, "s/1"), Some(snapshot));
        assert_eq!(read(&path, "s/2"), None, "another node's");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert_eq!(read(&path, "s/1"), None, "torn");
    }
}
