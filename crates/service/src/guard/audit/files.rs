//! The files of the audit log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files of the log.
pub(super) struct Files {
    dir: PathBuf,
    name: &'static str,
    file: Arc<File>,
    size: u64,
    most: u64,
}

impl Files {
    pub(super) fn open(dir: &Path, name: &'static str, most: u64) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let (file, size) = open_current(&current(dir, name))?;
        Ok(Self { dir: dir.to_owned(), name, file: Arc::new(file), size, most })
    }

    /// The file that is being written.
    pub(super) fn current(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Its name.
    pub(super) fn path(&self) -> PathBuf {
        current(&self.dir, self.name)
    }

    /// Returns when the disk has all of it.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Appends whole lines, or nothing.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + lines.len() as u64 > self.most {
            self.make_room()?;
        }
        let written = (&*self.file).write_all(lines);
        if written.is_err() {
            // Half a line would spoil the next one.
            self.file.set_len(self.size)?;
        } else {
            self.size += lines.len() as u64;
        }
        written
    }

    /// Gives the file the next number and begins another.
    fn make_room(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        let next = numbered(&self.dir, self.name)?.last().map_or(1, |(number, _)| number + 1);
        match fs::rename(self.path(), self.dir.join(format!("{}-{next:06}.jsonl", self.name))) {
            // An attempt before this one got no further.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        let (file, size) = open_current(&self.path())?;
        (self.file, self.size) = (Arc::new(file), size);
        Ok(())
    }
}

/// The current file, ending with a whole line.
fn open_current(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)?;
    // Whoever made the file made its name, which is on disk only when its directory is.
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    let size = file.metadata()?.len();
    if size == 0 {
        return Ok((file, 0));
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(size - 1))?;
    file.read_exact(&mut last)?;
    if last == [b'\n'] {
        return Ok((file, size));
    }
    // A writer was killed in the middle. What it had begun stays, as a line that is none.
    file.write_all(b"\n")?;
    Ok((file, size + 1))
}

fn current(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.jsonl"))
}

/// The files that are full, in their order.
pub(super) fn numbered(dir: &Path, called: &str) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(called)?.strip_prefix('-')?.strip_suffix(".jsonl")?.parse().ok());
        found.extend(number.map(|number: u64| (number, entry.path())));
    }
    found.sort();
    Ok(found)
}
