//! What is in a working directory.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::BundleError;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A directory.
    Dir {
        /// Its permissions.
        mode: u32,
    },
    /// A file.
    File {
        /// Its permissions.
        mode: u32,
        /// Its bytes.
        size: u64,
        /// When it was changed, in nanoseconds of Unix time: git and build tools look at it.
        changed_ns: i64,
        /// Its pieces in their order.
        pieces: Vec<String>,
    },
    /// A symbolic link.
    Link {
        /// Where it leads, as written.
        target: String,
    },
}

/// One file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path from the working directory, with `/`.
    pub path: String,
    /// What it is.
    #[serde(flatten)]
    pub kind: Kind,
}

/// Everything in a working directory; a directory stands before what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version.
    pub v: u32,
    /// The entries.
    pub entries: Vec<Entry>,
}

impl Manifest {
    pub(crate) const VERSION: u32 = 1;

    /// Refuses what would leave the directory that it is restored into.
    pub fn check(&self) -> Result<(), BundleError> {
        if self.v != Self::VERSION {
            return Err(BundleError::Damaged(format!("format version {} is not known here", self.v)));
        }
        let plain = |path: &str| {
            let mut parts = Path::new(path).components();
            !path.is_empty() && !path.contains('\0') && parts.all(|part| matches!(part, Component::Normal(_)))
        };
        match self.entries.iter().find(|entry| !plain(&entry.path)) {
            Some(entry) => Err(BundleError::Damaged(format!("the path {:?} leads elsewhere", entry.path))),
            None => Ok(()),
        }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        let sizes = self.entries.iter().map(|entry| match entry.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        });
        // Whoever says that a file is as large as numbers go must not make the sum small.
        sizes.fold(0, u64::saturating_add)
    }
}
