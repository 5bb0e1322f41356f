//! The book on disk: what it says is there before anybody acts on it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::book::Book;

const FILE: &str = "book.json";

/// Keeps the book. One per state directory: the daemon's name is locked.
#[derive(Debug)]
pub(crate) struct Keeper {
    dir: PathBuf,
    book: Book,
}

impl Keeper {
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(FILE);
        let book = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!("{} cannot be read; move it away to go on without what was not answered", path.display())
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Book::default(),
            Err(error) => return Err(error).with_context(|| format!("failed to read {}", path.display())),
        };
        Ok(Self { dir: dir.to_owned(), book })
    }

    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    /// Changes the book, and has the disk keep it. When that fails the book is as it was. Blocks, for a small file.
    pub(crate) fn change<T>(&mut self, change: impl FnOnce(&mut Book) -> T) -> io::Result<T> {
        let mut book = self.book.clone();
        let result = change(&mut book);
        if book != self.book {
            self.write(&book)?;
            self.book = book;
        }
        Ok(result)
    }

    fn write(&self, book: &Book) -> io::Result<()> {
        let fresh = self.dir.join("book.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(book)?)?;
        file.sync_all()?;
        fs::rename(&fresh, self.dir.join(FILE))?;
        File::open(&self.dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_is_there_after_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::open(dir.path()).unwrap();
        keeper.change(|book| book.next = 7).unwrap();
        assert_eq!(Keeper::open(dir.path()).unwrap().book().next, 7);
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Keeper::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("move it away"), "{error}");
    }
}
