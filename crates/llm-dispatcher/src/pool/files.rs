//! Where exchanges lie in the mailbox, and how both sides handle those files.
//!
//! ```text
//! <mailbox>/pool/asks/<node>.<id>.json      one request, put there whole by the node, removed by it when it is done with it
//! <mailbox>/pool/answers/<node>.<id>/       a stream of frames, written and removed by the dispatcher
//! <mailbox>/pool/dispatcher.json            where the dispatcher is
//! ```
//!
//! A node says that it still waits by touching its request now and then. Everything here blocks.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Ask;

/// The pool's directory below the mailbox root.
pub fn pool_dir(root: &Path) -> PathBuf {
    root.join("pool")
}

const ENDING: &str = ".json";
/// Files that are being written begin with it; nobody else reads them.
const UNFINISHED: char = '.';

/// The requests.
#[derive(Debug, Clone)]
pub struct Asks {
    dir: PathBuf,
}

impl Asks {
    /// Those of the mailbox at this root.
    pub fn of(root: &Path) -> Self {
        Self { dir: pool_dir(root).join("asks") }
    }

    /// The name of an exchange among all nodes': a node's id may hold slashes.
    pub fn key(node: &str, id: &str) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '+' };
        format!("{}.{}", node.chars().map(plain).collect::<String>(), id.chars().map(plain).collect::<String>())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}{ENDING}"))
    }

    /// Makes the directory.
    pub fn make(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }

    /// Puts a request there, whole or not at all. One that is there stays as it is.
    pub fn put(&self, key: &str, ask: &Ask) -> io::Result<()> {
        let path = self.path(key);
        if path.exists() {
            return self.touch(key);
        }
        self.make()?;
        let fresh = self.dir.join(format!("{UNFINISHED}{key}"));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&serde_json::to_vec(ask)?)?;
            // Others on a network file system see what has reached the server.
            file.sync_all()?;
            fs::rename(&fresh, &path)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        written
    }

    /// Says that the request is still wanted.
    pub fn touch(&self, key: &str) -> io::Result<()> {
        File::options().append(true).open(self.path(key))?.set_modified(SystemTime::now())
    }

    /// Takes a request away.
    pub fn remove(&self, key: &str) -> io::Result<()> {
        gone(fs::remove_file(self.path(key)))
    }

    /// Every request that is there, with when it was last touched, by the clock of whoever did.
    pub(super) fn list(&self) -> io::Result<BTreeMap<String, SystemTime>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(error),
        };
        let mut all = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(key) = name.to_str().and_then(|name| name.strip_suffix(ENDING)) else { continue };
            if key.starts_with(UNFINISHED) {
                continue;
            }
            // One that has gone meanwhile is not listed.
            if let Ok(touched) = entry.metadata().and_then(|meta| meta.modified()) {
                all.insert(key.to_owned(), touched);
            }
        }
        Ok(all)
    }

    /// Reads a request, of at most so many bytes.
    pub(super) fn read(&self, key: &str, most: u64) -> io::Result<Ask> {
        let file = File::open(self.path(key))?;
        if file.metadata()?.len() > most {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the request is too large"));
        }
        let ask: Ask = serde_json::from_reader(io::BufReader::new(file))?;
        if ask.v != Ask::VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the node is of another version of drover"));
        }
        if Self::key(&ask.node, &ask.id) != key {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not the request that its name says"));
        }
        Ok(ask)
    }
}

/// The answers.
#[derive(Debug, Clone)]
pub struct Answers {
    dir: PathBuf,
}

impl Answers {
    /// Those of the mailbox at this root.
    pub fn of(root: &Path) -> Self {
        Self { dir: pool_dir(root).join("answers") }
    }

    /// The directory of one answer, a stream of the mailbox.
    pub fn dir(&self, key: &str) -> PathBuf {
        self.dir.join(key)
    }

    /// Every answer that is there.
    pub(super) fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Takes an answer away.
    pub(super) fn remove(&self, key: &str) -> io::Result<()> {
        gone(fs::remove_dir_all(self.dir(key)))
    }
}

/// What is not there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(node: &str, id: &str) -> Ask {
        Ask {
            v: Ask::VERSION,
            id: id.to_owned(),
            node: node.to_owned(),
            method: "POST".to_owned(),
            path: "/v1/responses".to_owned(),
            headers: Vec::new(),
            body: "{}".to_owned(),
        }
    }

    #[test]
    fn a_request_is_there_whole_or_not_and_under_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let asks = Asks::of(dir.path());
        assert!(asks.list().unwrap().is_empty());
        let key = Asks::key("sw-1/3", "ab12");
        assert_eq!(key, "sw-1+3.ab12");
        asks.put(&key, &ask("sw-1/3", "ab12")).unwrap();
        fs::write(asks.dir.join(".sw-1+3.cd"), b"{").unwrap();
        assert_eq!(asks.list().unwrap().into_keys().collect::<Vec<_>>(), [key.as_str()]);
        assert_eq!(asks.read(&key, 1000).unwrap(), ask("sw-1/3", "ab12"));
        assert_eq!(asks.read(&key, 10).unwrap_err().kind(), io::ErrorKind::FileTooLarge);

        // Whoever renames a request makes it nobody's.
        fs::copy(asks.path(&key), asks.path("sw-2+0.ab12")).unwrap();
        assert_eq!(asks.read("sw-2+0.ab12", 1000).unwrap_err().kind(), io::ErrorKind::InvalidData);
        asks.remove(&key).unwrap();
        asks.remove(&key).unwrap();
        assert!(asks.touch(&key).is_err());
    }
}
