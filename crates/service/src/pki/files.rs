//! Files that hold secrets or decide whom we trust.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use super::PkiError;

/// None of these files is anywhere near this long.
const LONGEST: u64 = 16 << 20;

pub(super) fn failed(path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::Io { path, source }
}

pub(super) fn damaged(path: &Path, what: impl Into<String>) -> PkiError {
    PkiError::Damaged { path: path.to_owned(), what: what.into() }
}

/// Makes a directory that only we can enter, and refuses one of another user.
pub(super) fn private_dir(path: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
    let meta = fs::metadata(path).map_err(failed(path))?;
    ours(path, meta.uid())?;
    if meta.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed(path))?;
    }
    Ok(())
}

/// Reads a file whose content others may know but must not choose.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let file = File::open(path).map_err(failed(path))?;
    let meta = file.metadata().map_err(failed(path))?;
    // What root put there is as good as ours.
    if meta.uid() != 0 {
        ours(path, meta.uid())?;
    }
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).map_err(failed(path))?;
    Ok(bytes)
}

/// The same for a file that may be missing.
pub(super) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, PkiError> {
    match read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(PkiError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a secret; one that others could have read is refused.
pub(super) fn read_secret(path: &Path) -> Result<Vec<u8>, PkiError> {
    let meta = fs::metadata(path).map_err(failed(path))?;
    if meta.mode() & 0o077 != 0 {
        return Err(PkiError::Exposed { path: path.to_owned() });
    }
    read(path)
}

/// Replaces a file whole: a reader sees the old content or the new, also after a crash.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}.new", std::process::id()));
    let fresh = Path::new(&fresh);
    let written = (|| {
        let _ = fs::remove_file(fresh);
        // 0600 for all: the certificates are no secret, but nobody else needs them here.
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(fresh, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(fresh);
    }
    written.map_err(failed(path))
}

/// Adds one line to a file; concurrent writers do not mix.
pub(super) fn append_line(path: &Path, line: &str) -> Result<(), PkiError> {
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(failed(path))?;
    file.write_all(format!("{line}\n").as_bytes()).map_err(failed(path))
}

fn ours(path: &Path, owner: u32) -> Result<(), PkiError> {
    let me = rustix::process::geteuid().as_raw();
    if owner == me { Ok(()) } else { Err(PkiError::Foreign { path: path.to_owned(), owner, me }) }
}
