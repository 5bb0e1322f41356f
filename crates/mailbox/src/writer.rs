//! The one writer of a stream.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use tracing::{debug, warn};

use crate::record::{Line, decode_line, encode_rotate, is_rotate, line_len};
use crate::{MAX_LINE_BYTES, fs, segment_name, segment_number};

/// Appends whole lines to a stream. A stream has one of these at a time; who that is, others decide.
#[derive(Debug)]
pub struct StreamWriter(Writer<Disk>);

impl StreamWriter {
    /// Opens a stream for appending, and makes its directory when it is missing. A torn line that an earlier writer left
    /// is never added to: the stream goes on in the next segment. A segment that reaches `segment_bytes` is full.
    pub fn open(dir: impl Into<PathBuf>, segment_bytes: u64) -> io::Result<Self> {
        Writer::open(dir.into(), segment_bytes, Disk).map(Self)
    }

    /// Appends whole lines, all or none. After an error no reader that comes later sees any of them, and the writer can be
    /// used again: when space has come back, the next call succeeds. Nothing is durable before [`StreamWriter::sync`].
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.0.append(lines)
    }

    /// Makes everything appended so far durable. After an error it is unknown which of the lines since the last sync will
    /// survive a crash of the host; later lines go to a new segment.
    pub fn sync(&mut self) -> io::Result<()> {
        self.0.sync()
    }

    /// Segment and offset behind the last line.
    pub fn position(&self) -> (u32, u64) {
        self.0.position()
    }

    /// The stream's directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }
}

/// What a writer does to the disk; tests put a failing one in its place.
trait Storage {
    fn create(&mut self, path: &Path) -> io::Result<File>;
    fn write(&mut self, file: &File, bytes: &[u8]) -> io::Result<usize>;
    fn reserve(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()>;
    fn cut(&mut self, file: &File, len: u64) -> io::Result<()>;
    fn sync(&mut self, file: &File) -> io::Result<()>;
    fn sync_dir(&mut self, path: &Path) -> io::Result<()>;
}

#[derive(Debug)]
struct Disk;

impl Storage for Disk {
    fn create(&mut self, path: &Path) -> io::Result<File> {
        fs::create_new(path)
    }

    fn write(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut file, bytes)
    }

    fn reserve(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(file, FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    fn cut(&mut self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        fs::sync_dir(path)
    }
}

#[derive(Debug)]
struct Writer<S> {
    storage: S,
    dir: PathBuf,
    segment_bytes: u64,
    segment: u32,
    len: u64,
    /// `None`: this segment is done with, and the next line goes to the next one.
    file: Option<File>,
    /// Lines since the last sync.
    unsynced: bool,
    /// Directories with entries that may not be durable yet. They are synced behind the lines: by then one commit of the
    /// file system's journal has usually covered all of them.
    dirs_unsynced: Vec<PathBuf>,
    /// A full segment could not be synced when it was left; the next `sync` says so.
    lost: Option<io::Error>,
    /// The last write failed: make sure of the space before the next, so that a full disk does not eat a segment per try.
    cautious: bool,
}

/// The end of a segment file.
enum Tail {
    /// Whole lines, this many bytes.
    Whole(u64),
    /// The last line has no end.
    Torn,
    /// The last line says that the stream goes on elsewhere.
    Rotated,
}

impl<S: Storage> Writer<S> {
    fn open(dir: PathBuf, segment_bytes: u64, storage: S) -> io::Result<Self> {
        let mut dirs_unsynced = fs::make_dir(&dir)?;
        // A writer before us may have died between making a segment and syncing the directory.
        dirs_unsynced.push(dir.clone());
        // The only look at the directory: afterwards the writer knows which segment is the last.
        let mut last = 0;
        for entry in std::fs::read_dir(&dir)? {
            last = last.max(entry?.file_name().to_str().and_then(segment_number).unwrap_or(0));
        }
        let mut writer = Self {
            storage,
            dir,
            segment_bytes: segment_bytes.max(1),
            segment: last,
            len: 0,
            file: None,
            unsynced: false,
            dirs_unsynced,
            lost: None,
            cautious: false,
        };
        if last == 0 {
            writer.next_segment()?;
        } else {
            writer.adopt()?;
            if writer.file.is_none() {
                writer.next_segment()?;
            }
        }
        Ok(writer)
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        check_lines(lines)?;
        if lines.is_empty() {
            return Ok(());
        }
        if self.file.is_some() && self.len > 0 && self.len + lines.len() as u64 > self.segment_bytes {
            self.finish_segment();
        }
        if self.file.is_none() {
            self.next_segment()?;
        }
        if self.cautious {
            self.reserve(lines.len() as u64)?;
        }
        self.write_all(lines)
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(error) = self.lost.take() {
            return Err(error);
        }
        if self.unsynced
            && let Some(file) = &self.file
        {
            self.unsynced = false;
            if let Err(error) = self.storage.sync(file) {
                // What the kernel could not write it may have forgotten; only a new file is known to be what we think.
                self.abandon("sync failed");
                return Err(error);
            }
        }
        while let Some(dir) = self.dirs_unsynced.last() {
            self.storage.sync_dir(dir)?;
            self.dirs_unsynced.pop();
        }
        Ok(())
    }

    fn position(&self) -> (u32, u64) {
        (self.segment, self.len)
    }

    fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(segment_name(segment))
    }

    /// Says in a full segment that the next one follows, and leaves it.
    fn finish_segment(&mut self) {
        let mut line = Vec::new();
        encode_rotate(self.segment.saturating_add(1), &mut line);
        // The line only saves readers a look; without space for it the next segment alone says the same.
        if let Err(error) = self.write_all(&line) {
            debug!(dir = %self.dir.display(), segment = self.segment, %error, "segment left without its last line");
        }
        if let Some(file) = self.file.take()
            && std::mem::take(&mut self.unsynced)
            && let Err(error) = self.storage.sync(&file)
        {
            self.lost = Some(error);
        }
    }

    /// Goes to the next segment; one that is there already was made by an earlier writer of this stream.
    fn next_segment(&mut self) -> io::Result<()> {
        loop {
            let next = self.segment.checked_add(1).ok_or_else(|| io::Error::other("no segment numbers left"))?;
            match self.storage.create(&self.path(next)) {
                Ok(file) => {
                    self.segment = next;
                    self.len = 0;
                    self.file = Some(file);
                    if !self.dirs_unsynced.contains(&self.dir) {
                        self.dirs_unsynced.push(self.dir.clone());
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.segment = next;
                    self.adopt()?;
                    if self.file.is_some() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Goes on in an existing segment, unless its end forbids it.
    fn adopt(&mut self) -> io::Result<()> {
        let file = fs::open_append(&self.path(self.segment))?;
        match tail(&file)? {
            Tail::Whole(len) => {
                self.len = len;
                self.file = Some(file);
            }
            Tail::Torn => {
                self.len = file.metadata()?.len();
                self.file = None;
                warn!(dir = %self.dir.display(), segment = self.segment, "an earlier writer left a torn line; going on in the next segment");
            }
            Tail::Rotated => {
                self.len = file.metadata()?.len();
                self.file = None;
            }
        }
        Ok(())
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        match self.storage.reserve(file, self.len, len) {
            Err(error) if cannot_reserve(&error) => Ok(()),
            other => other,
        }
    }

    fn write_all(&mut self, lines: &[u8]) -> io::Result<()> {
        let Some(file) = &self.file else { return Err(io::Error::other("no segment is open")) };
        let mut rest = lines;
        let error = loop {
            match self.storage.write(file, rest) {
                Ok(0) => break io::Error::new(io::ErrorKind::WriteZero, "the file system took nothing of a write"),
                Ok(written) => {
                    rest = &rest[written..];
                    if rest.is_empty() {
                        self.len += lines.len() as u64;
                        self.unsynced = true;
                        self.cautious = false;
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
        };
        self.cautious = true;
        let untouched = rest.len() == lines.len() && file.metadata().is_ok_and(|meta| meta.len() == self.len);
        if !untouched {
            self.undo((lines.len() - rest.len()) as u64);
        }
        Err(error)
    }

    /// Takes a part of a write back and leaves the segment. The space is never written again: a reader may have half of
    /// the old bytes in its hands, and must not find the other half of something else behind them.
    fn undo(&mut self, written: u64) {
        if let Some(file) = &self.file
            && file.metadata().is_ok_and(|meta| meta.len() == self.len + written)
            && let Err(error) = self.storage.cut(file, self.len)
        {
            warn!(dir = %self.dir.display(), segment = self.segment, %error, "a part of a line stays behind");
        }
        self.abandon("write failed");
    }

    fn abandon(&mut self, why: &'static str) {
        debug!(dir = %self.dir.display(), segment = self.segment, why, "segment abandoned");
        // Lines before the failed one still wait for their sync.
        if let Some(file) = self.file.take()
            && std::mem::take(&mut self.unsynced)
            && let Err(error) = self.storage.sync(&file)
        {
            self.lost = Some(error);
        }
    }
}

fn check_lines(lines: &[u8]) -> io::Result<()> {
    let mut rest = lines;
    while !rest.is_empty() {
        match line_len(rest) {
            None => return Err(invalid("only whole lines can be appended: the last has no line end")),
            Some(len) if len > MAX_LINE_BYTES => return Err(invalid("line is too long for a stream")),
            // It would send readers on to a segment that nobody writes.
            Some(len) if is_rotate(&rest[..len]) => return Err(invalid("only the writer itself ends a segment")),
            Some(len) => rest = &rest[len..],
        }
    }
    Ok(())
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn cannot_reserve(error: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Longer than any line that ends a segment.
const TAIL_BYTES: u64 = 64;

fn tail(file: &File) -> io::Result<Tail> {
    let len = file.metadata()?.len();
    let mut bytes = vec![0; len.min(TAIL_BYTES) as usize];
    let from = len - bytes.len() as u64;
    file.read_exact_at(&mut bytes, from)?;
    let Some(whole) = bytes.strip_suffix(b"\n") else {
        return Ok(if len == 0 { Tail::Whole(0) } else { Tail::Torn });
    };
    let start = whole.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let starts_here = start > 0 || bytes.len() as u64 == len;
    match decode_line(&whole[start..]) {
        Ok(Line::Rotate(_)) if starts_here => Ok(Tail::Rotated),
        _ => Ok(Tail::Whole(len)),
    }
}

#[cfg(test)]
mod tests;
