//! The log of one session on this node.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::recall::Recall;
use super::{StoreError, failed};
use crate::core::Digest;
use crate::files;
use crate::session::{LogSum, Record};

/// A log file whose lines all count.
#[derive(Debug)]
pub struct SessionLog {
    path: PathBuf,
    file: File,
    sum: LogSum,
    recall: Recall,
}

impl SessionLog {
    /// A new, empty log in place of whatever is there.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        if let Some(dir) = path.parent() {
            files::make_dir(dir).map_err(failed("make", dir))?;
        }
        files::remove(path).map_err(failed("replace", path))?;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed("make", path))?;
        if let Some(dir) = path.parent() {
            files::sync_dir(dir).map_err(failed("keep", dir))?;
        }
        Ok(Self { path: path.to_owned(), file, sum: LogSum::default(), recall: Recall::default() })
    }

    /// Opens a log that is there. What is torn at its end, by a crash in the middle of a write, is cut off.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = files::open(path, true).map_err(failed("open", path))?;
        let (mut sum, mut recall) = (LogSum::default(), Recall::default());
        read_lines(&file, path, &mut sum, |record| recall.take(record))?;
        file.set_len(sum.len).map_err(failed("cut", path))?;
        Ok(Self { path: path.to_owned(), file, sum, recall })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it.
    pub fn sum(&self) -> &LogSum {
        &self.sum
    }

    /// What is at hand of its texts.
    pub fn recall(&self) -> &Recall {
        &self.recall
    }

    /// Adds whole lines and has the disk keep them. After an error the file is as long as before, or is cut when it is opened again.
    pub fn append(&mut self, lines: &[u8]) -> Result<(), StoreError> {
        self.write(lines)?;
        self.sync()
    }

    /// Adds whole lines that [`Self::sync`] has the disk keep.
    pub fn write(&mut self, lines: &[u8]) -> Result<(), StoreError> {
        // An error leaves the sum wrong, and the log is not used any more after one.
        let before = self.sum.len;
        for line in lines.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            let taken = self.sum.line(line);
            let record = taken.map_err(|source| StoreError::Damaged { path: self.path.clone(), source })?;
            self.recall.take(record);
        }
        let taken = (self.sum.len - before) as usize;
        self.file.write_all_at(&lines[..taken], before).map_err(failed("write", &self.path))
    }

    /// Has the disk keep everything.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(failed("sync", &self.path))
    }

    /// Bytes from an offset, at most so many.
    pub fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        read_at(&self.file, &self.path, offset, len.min(self.sum.len.saturating_sub(offset) as usize))
    }

    /// The log as it is now, to be read elsewhere while this one grows, moves or is removed.
    pub fn reader(&self) -> Result<LogReader, StoreError> {
        let file = files::open(&self.path, false).map_err(failed("open", &self.path))?;
        let LogSum { len, digest, outline } = &self.sum;
        Ok(LogReader { path: self.path.clone(), file, len: *len, digest: *digest, records: outline.seq() })
    }

    /// The same log under another name, which the disk keeps when it gets to it.
    pub fn rename(mut self, path: &Path) -> Result<Self, StoreError> {
        std::fs::rename(&self.path, path).map_err(failed("rename", &self.path))?;
        path.clone_into(&mut self.path);
        Ok(self)
    }
}

/// A log as it was at some moment: from there on it has only grown.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: File,
    len: u64,
    digest: Digest,
    records: u64,
}

impl LogReader {
    /// Its bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Nothing was in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they add up to.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many records they are.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Bytes from an offset, at most so many.
    pub fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        read_at(&self.file, &self.path, offset, len.min(self.len.saturating_sub(offset) as usize))
    }

    /// Every record, one after the other.
    pub fn for_each(self, mut take: impl FnMut(Record)) -> Result<(), StoreError> {
        let mut sum = LogSum::default();
        read_lines(self.file.take(self.len), &self.path, &mut sum, &mut take)
    }
}

fn read_at(file: &File, path: &Path, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).map_err(failed("read", path))?;
    Ok(bytes)
}

/// All records of a log.
pub fn records(log: &SessionLog) -> Result<Vec<Record>, StoreError> {
    let mut all = Vec::new();
    log.reader()?.for_each(|record| all.push(record))?;
    Ok(all)
}

/// Reads whole lines to the end; what is behind the last one is left.
fn read_lines(file: impl Read, path: &Path, sum: &mut LogSum, mut take: impl FnMut(Record)) -> Result<(), StoreError> {
    let mut reader = BufReader::with_capacity(256 << 10, file);
    let mut line = Vec::new();
    loop {
        line.clear();
        reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed("read", path))?;
        if !line.ends_with(b"\n") {
            return Ok(());
        }
        take(sum.line(&line).map_err(|source| StoreError::Damaged { path: path.to_owned(), source })?);
    }
}

/// A line with the longest text and every character escaped is shorter.
pub(super) const MAX_LINE: u64 = 64 << 20;
