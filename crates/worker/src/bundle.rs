//! Lays the launch's AGENTS.md and skills into the working directory, before the agent looks there.
//!
//! The bundle is `AGENTS.md` and `.agents/skills/**` (or `skills/**`, which means the same). Only plain files and
//! directories are taken, and nothing is ever written through a link: the working directory belongs to the agent, which may
//! have put one there in an earlier life.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use tracing::warn;

/// Directories deep that skills may nest.
const MAX_DEPTH: usize = 16;
/// Most bytes that one file may have.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// A bundle that could not be laid out.
#[derive(Debug, Error)]
#[error("cannot lay the launch's files into {path}")]
pub(crate) struct BundleError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Copies the bundle, and returns how many files that were. No bundle is fine.
pub(crate) fn lay_out(bundle: &Path, work: &Path) -> Result<usize, BundleError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| BundleError { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(work).map_err(failed(work))?;
    let mut laid = 0;
    if let Some(text) = read_plain(&bundle.join("AGENTS.md")).map_err(failed(bundle))? {
        replace(&work.join("AGENTS.md"), &text).map_err(failed(work))?;
        laid += 1;
    }
    let target = work.join(".agents").join("skills");
    for source in [bundle.join(".agents").join("skills"), bundle.join("skills")] {
        if is_plain_dir(&source) {
            make_plain_dir(&work.join(".agents")).map_err(failed(work))?;
            laid += copy_tree(&source, &target, MAX_DEPTH).map_err(failed(&target))?;
        }
    }
    Ok(laid)
}

fn copy_tree(from: &Path, to: &Path, depth: usize) -> io::Result<usize> {
    if depth == 0 {
        warn!(path = %from.display(), "skills nested too deep are left out");
        return Ok(0);
    }
    make_plain_dir(to)?;
    let mut laid = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            laid += copy_tree(&source, &target, depth - 1)?;
        } else if let Some(text) = read_plain(&source)? {
            replace(&target, &text)?;
            laid += 1;
        }
    }
    Ok(laid)
}

/// The bytes of a plain file of sensible size; nothing for anything else.
fn read_plain(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !meta.is_file() || meta.len() > MAX_FILE_BYTES {
        warn!(path = %path.display(), "left out of the working directory: not a plain file of at most 16 MiB");
        return Ok(None);
    }
    fs::read(path).map(Some)
}

/// Writes a new file in the place of whatever stands there.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text)
}

/// Makes a directory, in the place of a link if there is one.
fn make_plain_dir(path: &Path) -> io::Result<()> {
    if is_plain_dir(path) {
        return Ok(());
    }
    if fs::symlink_metadata(path).is_ok() {
        fs::remove_file(path)?;
    }
    DirBuilder::new().mode(0o700).create(path)
}

fn is_plain_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_land_in_the_working_directory_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, work, outside) = (dir.path().join("bundle"), dir.path().join("work"), dir.path().join("outside"));
        fs::create_dir_all(bundle.join(".agents/skills/fmt")).unwrap();
        fs::create_dir_all(bundle.join("skills/lint")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("secret"), "s").unwrap();
        fs::write(bundle.join("AGENTS.md"), "# Rules").unwrap();
        fs::write(bundle.join(".agents/skills/fmt/SKILL.md"), "fmt").unwrap();
        fs::write(bundle.join("skills/lint/SKILL.md"), "lint").unwrap();
        symlink(outside.join("secret"), bundle.join("skills/stolen")).unwrap();
        // What an agent may have left behind.
        fs::create_dir_all(work.join(".agents")).unwrap();
        symlink(&outside, work.join(".agents/skills")).unwrap();
        symlink(outside.join("AGENTS.md"), work.join("AGENTS.md")).unwrap();

        assert_eq!(lay_out(&bundle, &work).unwrap(), 3);
        assert_eq!(lay_out(&bundle, &work).unwrap(), 3, "again, over the first");
        assert_eq!(fs::read_to_string(work.join("AGENTS.md")).unwrap(), "# Rules");
        assert_eq!(fs::read_to_string(work.join(".agents/skills/fmt/SKILL.md")).unwrap(), "fmt");
        assert_eq!(fs::read_to_string(work.join(".agents/skills/lint/SKILL.md")).unwrap(), "lint");
        assert!(!work.join(".agents/skills/stolen").exists());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "nothing was written through a link");
        assert_eq!(lay_out(&dir.path().join("none"), &work).unwrap(), 0);
    }
}
