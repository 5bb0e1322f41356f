//! The state directory: private, ours, and locked per daemon.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// A state directory that must not or cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// Neither `DROVER_STATE_DIR`, `XDG_STATE_HOME` nor `HOME` says where it is.
    #[error("no state directory: set DROVER_STATE_DIR or HOME")]
    Nowhere,
    /// Another user owns it, and could read or change what we keep there.
    #[error("state directory {path} belongs to uid {owner}, not to uid {me}: choose another with DROVER_STATE_DIR")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        me: u32,
    },
    /// It cannot be made or read.
    #[error("cannot use state directory {path}: check that it exists and can be written, or set DROVER_STATE_DIR")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A directory of mode 0700 that belongs to this user.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The one that the environment names.
    pub fn from_env() -> Result<Self, StateDirError> {
        Self::open(&Self::path_from_env()?)
    }

    /// Where the environment says it is; nothing is looked at or made.
    pub fn path_from_env() -> Result<PathBuf, StateDirError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        set("DROVER_STATE_DIR")
            .or_else(|| set("XDG_STATE_HOME").map(|dir| dir.join("drover")))
            .or_else(|| set("HOME").map(|dir| dir.join(".local/state/drover")))
            .ok_or(StateDirError::Nowhere)
    }

    /// Makes the directory when it is missing, and refuses one of another user.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let io = |source| StateDirError::Io { path: path.to_owned(), source };
        make_private(path).map_err(io)?;
        let path = fs::canonicalize(path).map_err(io)?;
        let meta = fs::metadata(&path).map_err(io)?;
        let me = rustix::process::geteuid().as_raw();
        if meta.uid() != me {
            return Err(StateDirError::Foreign { path, owner: meta.uid(), me });
        }
        if meta.mode() & 0o077 != 0 {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(io)?;
        }
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory below it, made private when it is missing.
    pub fn join(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        make_private(&path)?;
        Ok(path)
    }

    /// Takes the lock of `name`; `None` when another process holds it. The lock lives as long as the file.
    pub(crate) fn lock(&self, name: &str) -> io::Result<Option<File>> {
        let path = self.join("run")?.join(format!("{name}.lock"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_private_whatever_it_was_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let state = StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(state.path()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(state.join("run").unwrap()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn one_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return; // Only root can make a directory that belongs to somebody else.
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("65534") && error.contains("DROVER_STATE_DIR"), "{error}");
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let held = state.lock("router").unwrap();
        assert!(held.is_some());
        assert!(state.lock("router").unwrap().is_none());
        drop(held);
        assert!(state.lock("router").unwrap().is_some());
    }
}
