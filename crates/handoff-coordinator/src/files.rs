//! What ownership, journals and bundles need of a file system: private files that are whole or not there, also after a crash.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

/// Makes a directory and what is missing above it, private to the user, and has the disk keep it.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_dir(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync_dir)
}

/// Has the disk keep the entries of a directory.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Opens a file that must be there and be no link, for reading and, when asked, writing.
pub(crate) fn open(path: &Path, write: bool) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags.bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}

/// Reads a file of at most `most` bytes that belongs to this user; nothing when it is not there.
pub(crate) fn read_small(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match open(path, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let meta = file.metadata()?;
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "belongs to another user"));
    }
    if meta.len() > most {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("has {} bytes, at most {most} are ours", meta.len()),
        ));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    file.take(most).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// A name in this directory that no other process of any host uses.
pub(crate) fn scratch(dir: &Path, tag: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".{tag}-{:016x}-{}-{count}", rand::random::<u64>(), std::process::id()))
}

/// Has a network file system's client forget what it remembers of a directory, by making and removing a name there. False: there is no such
/// directory.
///
/// A file system of this host remembers nothing wrongly, and there a name that comes and goes would wait for every sync that is under way.
pub(crate) fn look_anew(dir: &Path) -> io::Result<bool> {
    let touched = match is_local(dir) {
        Ok(true) => return Ok(true),
        Ok(false) => scratch(dir, "look"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => scratch(dir, "look"),
        Err(error) => return Err(error),
    };
    match DirBuilder::new().create(&touched) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        made => made.and_then(|()| std::fs::remove_dir(&touched)).map(|()| true),
    }
}

/// File systems that only this host changes, by the number that statfs(2) gives: ext2 to ext4, XFS, btrfs, tmpfs, F2FS, ZFS, bcachefs.
const LOCAL: [u64; 7] = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0xF2F5_2010, 0x2FC1_2FC1, 0xCA45_1A4E];

/// Whether only this host changes what is in a directory. One that we do not know counts as shared.
fn is_local(dir: &Path) -> io::Result<bool> {
    // A device that was found to be shared counts as that for good: there the question itself would cost a request each time.
    static SHARED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());
    let shared = || SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let device = std::fs::metadata(dir)?.dev();
    if shared().contains(&device) {
        return Ok(false);
    }
    let local = LOCAL.contains(&(rustix::fs::statfs(dir)?.f_type as u64));
    if !local {
        shared().insert(device);
    }
    Ok(local)
}

/// Writes a new private file whole and has the disk keep its content; its name it keeps after [`sync_dir`].
pub(crate) fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Gives a name to content that is whole on the disk, unless the name is taken. False: it is.
///
/// Some network file systems answer a repeated request with "it is there" although the first one made it: whoever must know reads.
pub(crate) fn publish(dir: &Path, name: &str, content: &[u8]) -> io::Result<bool> {
    Unnamed::write(dir, content)?.publish(dir, name)
}

/// Content that is whole on the disk and has no name yet that anybody looks for. Removed when it is dropped; left behind only by a crash,
/// and then its name says what it is.
#[derive(Debug)]
pub(crate) struct Unnamed {
    path: PathBuf,
}

impl Unnamed {
    /// Writes it into the directory in which it is to have its name.
    pub(crate) fn write(dir: &Path, content: &[u8]) -> io::Result<Self> {
        let unnamed = Self { path: scratch(dir, "new") };
        write_new(&unnamed.path, content)?;
        Ok(unnamed)
    }

    /// The second half of [`publish`].
    pub(crate) fn publish(self, dir: &Path, name: &str) -> io::Result<bool> {
        let made = match std::fs::hard_link(&self.path, dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            other => {
                other?;
                true
            }
        };
        drop(self);
        sync_dir(dir)?;
        Ok(made)
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        let _ = remove(&self.path);
    }
}

/// Replaces a file so that after a crash either the old or the new content is there.
pub(crate) fn replace(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let fresh = scratch(dir, "new");
    let written = write_new(&fresh, content).and_then(|()| std::fs::rename(&fresh, dir.join(name)));
    if written.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    written?;
    sync_dir(dir)
}

/// Removes a file; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_other_hosts_change_is_touched_to_look_at_it() {
        let dir = tempfile::tempdir().unwrap();
        // Long ago, so that a change shows whatever the clock of the file system.
        File::open(dir.path()).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(look_anew(dir.path()).unwrap());
        let touched = std::fs::metadata(dir.path()).unwrap().mtime() != 0;
        assert_eq!(touched, !is_local(dir.path()).unwrap());
        assert!(!look_anew(&dir.path().join("missing")).unwrap());
        assert!(!is_local(Path::new("/proc")).unwrap(), "one that is not known to be local counts as shared");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
