//! Keeps what codex writes to its standard error, within bounds.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Size at which the file is put aside as `.1` and begun anew.
const MAX_BYTES: u64 = 1024 * 1024;
/// How much of the last line goes into an error message.
const MAX_LINE: usize = 300;

/// The file, and its last line in memory.
#[derive(Debug)]
pub(super) struct StderrLog {
    path: PathBuf,
    file: File,
    size: u64,
    last: Vec<u8>,
}

impl StderrLog {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, last: Vec::new() })
    }

    /// Appends. A full disk must not end the agent, so a failure is dropped: the text is for people, nothing rests on it.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        if self.size > MAX_BYTES
            && std::fs::rename(&self.path, self.path.with_extension("log.1")).is_ok()
            && let Ok(new) = Self::open(&self.path)
        {
            self.file = new.file;
            self.size = new.size;
        }
        if self.file.write_all(bytes).is_ok() {
            self.size += bytes.len() as u64;
        }
        let line = bytes.trim_ascii().rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
        if !line.is_empty() {
            self.last.clear();
            self.last.extend_from_slice(&line[..line.len().min(MAX_LINE)]);
        }
    }

    /// The last line of this codex, without colours.
    pub(super) fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.last);
        let mut plain = String::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            if c == '\u{1b}' {
                // An escape sequence ends with a letter.
                chars.by_ref().find(char::is_ascii_alphabetic);
            } else if !c.is_control() {
                plain.push(c);
            }
        }
        (!plain.is_empty()).then_some(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_stays_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("codex.stderr.log");
        let mut log = StderrLog::open(&path).unwrap();
        for _ in 0..80 {
            log.append(&vec![b'x'; 64 * 1024]);
        }
        log.append(b"one\n\x1b[31mlast\x1b[0m words\n");
        assert_eq!(log.last_line().as_deref(), Some("last words"));
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        let total = size(&path) + size(&path.with_extension("log.1"));
        assert!(total <= 2 * (MAX_BYTES + 64 * 1024), "{total}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
