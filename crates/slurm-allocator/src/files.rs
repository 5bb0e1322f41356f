//! Small private files that are replaced whole.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Makes a directory and what is missing above it, private to the user.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces a file so that after a crash either the old or the new content is there, and tells the disk to keep it.
/// `fresh` is the name of the file while it is written, in the same directory.
pub(crate) fn replace(dir: &Path, name: &str, fresh: &str, content: &[u8]) -> io::Result<()> {
    let fresh = dir.join(fresh);
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&fresh, dir.join(name))
    })();
    if let Err(error) = written {
        // On a full disk the unfinished file would only take more of what is missing.
        let _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    sync_dir(dir)
}

/// Writes a private file anew. It may be lost in a crash.
pub(crate) fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?.write_all(content)
}

/// Removes a file for good; one that is not there is fine.
pub(crate) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match std::fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_dir(dir),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
