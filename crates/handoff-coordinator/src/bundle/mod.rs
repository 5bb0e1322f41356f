//! A session's working directory as it travels: everything in it, git's own files included, in pieces that are named by their content.
//!
//! ```text
//! <shared>/<session>/files/<sha-256>     a piece of a file, or a manifest
//! ```
//!
//! Git state is files: the index, the refs and the objects below `.git` go along like any other, so that the repository
//! over there is the same to the last staged line, and no git is needed to move it. What git ignores goes along as well: to the
//! agent it is a file like the others. A file that is as it was at the last capture is not read again, and a piece that is
//! there is not written again. Sockets, devices and pipes stay behind; a lock file of git that a killed one left does too.

mod capture;
mod manifest;
mod restore;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use capture::{Captured, Capturer};
pub use manifest::{Entry, Kind, Manifest};
pub use restore::restore;

use crate::store::StoreError;

/// How much a working directory may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 1 << 30, entries: 200_000 }
    }
}

/// A working directory cannot be captured or restored.
#[derive(Debug, Error)]
pub enum BundleError {
    /// A file system failed.
    #[error("cannot {what} {}", path.display())]
    Files {
        /// What was to be done.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// What the file system says.
        #[source]
        source: io::Error,
    },
    /// It has too much in it.
    #[error("the working directory {} has more than {most} {of}; most of it is in {largest}: remove it, or keep it elsewhere", dir.display())]
    TooLarge {
        /// Which.
        dir: PathBuf,
        /// The bound.
        most: u64,
        /// Of what: "bytes" or "files".
        of: &'static str,
        /// The entry at the top that has most of it.
        largest: String,
    },
    /// A file changed while it was read; the agent must not run then.
    #[error("{} changes while it is read; end the agent first", path.display())]
    Changing {
        /// Which.
        path: PathBuf,
    },
    /// A name that is no text cannot travel.
    #[error("{} has a name that is no UTF-8", path.display())]
    Name {
        /// Which.
        path: PathBuf,
    },
    /// A piece or a manifest is not what its name says, or names what it must not.
    #[error("a damaged or foreign bundle ({0})")]
    Damaged(String),
    /// A piece cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::Files { what, path, source }
}

#[cfg(test)]
mod tests;
