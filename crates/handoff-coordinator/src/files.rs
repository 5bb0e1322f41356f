//! What ownership, journals and bundles need of a file system: private files that are whole or not there, also after a crash.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

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
