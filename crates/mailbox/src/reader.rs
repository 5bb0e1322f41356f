//! A reader of a stream: whole lines, in order, from a cursor on.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::cursor::Cursor;
use crate::record::{Line, decode_line, line_len};
use crate::{MAX_LINE_BYTES, fs, segment_name};

/// Whole lines of one segment, and where to go on behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The segment that `lines` come from.
    pub segment: u32,
    /// Offset of the first byte of `lines` in that segment.
    pub start_offset: u64,
    /// Whole lines, each with its line end; empty when only the position moved. The line that ends a segment is left out.
    pub lines: Bytes,
    /// Where to go on: segment.
    pub next_segment: u32,
    /// Where to go on: offset.
    pub next_offset: u64,
    /// What was wrong before `lines`, when something was. The reader goes on behind it.
    pub damage: Option<String>,
}

/// Reads one stream. Remembers nothing but its cursor and, between looks, one open file.
///
/// On a network file system every look opens the file anew, because only an open asks the server how long it is.
#[derive(Debug)]
pub struct StreamReader {
    dir: PathBuf,
    cursor: Cursor,
    file: Option<File>,
    on_network: Option<bool>,
    /// Up to here the segment holds no line end behind the cursor: a torn line, or one that is still being written.
    barren: u64,
    unread: u64,
    /// Number of the last record handed out; 0 when that is not known.
    last_seq: u64,
    /// Since when it looks as if the segment at the cursor were over without saying so, on a network file system.
    doubt: Option<Instant>,
}

/// The longest that a client of a network file system believes what it knows of a file, by the usual defaults.
const OLD_ATTRIBUTES: Duration = Duration::from_secs(65);
/// How much of a segment is looked at for the number of its first record.
const FIRST_LINE_BYTES: usize = 64 << 10;

impl StreamReader {
    /// A reader that goes on at this cursor. Touches no file yet; the stream need not exist.
    pub fn new(dir: impl Into<PathBuf>, cursor: Cursor) -> Self {
        let cursor = Cursor { segment: cursor.segment.max(1), ..cursor };
        Self {
            dir: dir.into(),
            cursor,
            file: None,
            on_network: None,
            barren: 0,
            unread: 0,
            last_seq: cursor.seq,
            doubt: None,
        }
    }

    /// Where the next look begins. `seq` is what the owner of the reader last set.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Keeps the sequence number of the last record that was taken over in the cursor.
    pub fn set_seq(&mut self, seq: u64) {
        self.cursor.seq = seq;
    }

    /// The stream's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Lets go of the open file; the next look opens it anew.
    pub fn reopen(&mut self) {
        self.file = None;
    }

    /// Whether a file is held open.
    pub fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Bytes that the last look left unread in its segment.
    pub fn unread(&self) -> u64 {
        self.unread
    }

    /// The next whole lines, about `max_bytes` of them (one longer line is returned all the same). `None`: nothing new.
    pub fn next_chunk(&mut self, max_bytes: usize) -> io::Result<Option<Chunk>> {
        match self.look(max_bytes) {
            Err(error) if fs::is_stale(&error) && self.file.is_some() => {
                self.file = None;
                self.look(max_bytes)
            }
            other => other,
        }
    }

    fn look(&mut self, max_bytes: usize) -> io::Result<Option<Chunk>> {
        if self.on_network == Some(true) {
            self.file = None;
            // Opening the directory makes the client forget that a segment was not there a moment ago.
            let _ = File::open(&self.dir);
        }
        let began = self.cursor;
        let mut damage = Vec::new();
        loop {
            // Whoever takes the chunks sees whether one is missing by where each begins: what was passed over is told first.
            if (self.cursor.segment, self.cursor.offset) > (began.segment, began.offset) {
                return Ok(self.moved(began, &damage));
            }
            let Some(size) = self.current_size()? else {
                // Segments are made in order: with the next one there and this one not, this one is gone.
                let Some((next, file)) = self.open_next()? else { return Ok(self.moved(began, &damage)) };
                if self.current_size()?.is_some() {
                    continue;
                }
                if !self.is_over(&file)? {
                    return Ok(self.moved(began, &damage));
                }
                damage.push(format!("segment {} is missing", self.cursor.segment));
                self.enter(next, file);
                continue;
            };
            match self.read_lines(size, max_bytes)? {
                Read::Lines(mut chunk) => {
                    chunk.damage = joined(&damage);
                    return Ok(Some(chunk));
                }
                Read::Damaged(what, to) => {
                    damage.push(what);
                    self.cursor.offset = to;
                    self.barren = to;
                    continue;
                }
                Read::Nothing => {}
            }
            let Some((next, file)) = self.open_next()? else { return Ok(self.moved(began, &damage)) };
            // This segment is final now, but lines may have come between our read and the making of the next one.
            self.file = None;
            let Some(size) = self.current_size()? else { continue };
            match self.read_lines(size, max_bytes)? {
                Read::Lines(mut chunk) => {
                    chunk.damage = joined(&damage);
                    return Ok(Some(chunk));
                }
                Read::Damaged(what, to) => {
                    damage.push(what);
                    self.cursor.offset = to;
                    self.barren = to;
                    continue;
                }
                Read::Nothing if !self.is_over(&file)? => return Ok(self.moved(began, &damage)),
                Read::Nothing if size > self.cursor.offset => damage.push(format!(
                    "segment {} ends in a torn line of {} bytes",
                    self.cursor.segment,
                    size - self.cursor.offset
                )),
                Read::Nothing => {}
            }
            self.enter(next, file);
        }
    }

    /// Size of the current segment, opened when it is not; `None` when it does not exist.
    fn current_size(&mut self) -> io::Result<Option<u64>> {
        if let Some(file) = &self.file {
            let meta = file.metadata()?;
            if meta.nlink() > 0 && meta.len() >= self.cursor.offset {
                return Ok(Some(meta.len()));
            }
            // Removed, or shorter than it was: believe only a fresh look.
            self.file = None;
        }
        let Some(file) = fs::open_read(&self.path(self.cursor.segment))? else { return Ok(None) };
        if self.on_network.is_none() {
            self.on_network = Some(fs::is_on_network(&file));
        }
        let size = file.metadata()?.len();
        self.file = Some(file);
        Ok(Some(size))
    }

    fn open_next(&self) -> io::Result<Option<(u32, File)>> {
        let Some(next) = self.cursor.segment.checked_add(1) else { return Ok(None) };
        Ok(fs::open_read(&self.path(next))?.map(|file| (next, file)))
    }

    /// Whether the segment at the cursor holds nothing more, now that the next one is there and it does not say itself
    /// where the stream goes on. On a local disk that is so. A client of a network file system may still believe that it
    /// is as long as it was, or not there; there the next segment must begin with the number that follows, or time enough
    /// must have passed.
    fn is_over(&mut self, next: &File) -> io::Result<bool> {
        if self.on_network.is_none() {
            self.on_network = Some(fs::is_on_network(next));
        }
        if self.on_network != Some(true) {
            return Ok(true);
        }
        let last = self.last_seq.max(self.cursor.seq);
        let known = last > 0 || (self.cursor.segment, self.cursor.offset) == (1, 0);
        let follows = known && first_seq(next)?.is_some_and(|first| first <= last + 1);
        let over = follows || self.doubt.get_or_insert_with(Instant::now).elapsed() >= OLD_ATTRIBUTES;
        if over {
            self.doubt = None;
        } else {
            // What was read of it in vain is read again.
            self.barren = self.cursor.offset;
        }
        Ok(over)
    }

    fn enter(&mut self, segment: u32, file: File) {
        self.cursor.segment = segment;
        self.cursor.offset = 0;
        self.barren = 0;
        self.unread = 0;
        self.file = Some(file);
    }

    fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(segment_name(segment))
    }

    /// A chunk without lines when the position moved, else nothing.
    fn moved(&self, began: Cursor, damage: &[String]) -> Option<Chunk> {
        let here = self.cursor;
        let news = (began.segment, began.offset) != (here.segment, here.offset) || !damage.is_empty();
        news.then(|| Chunk {
            segment: began.segment,
            start_offset: began.offset,
            lines: Bytes::new(),
            next_segment: here.segment,
            next_offset: here.offset,
            damage: joined(damage),
        })
    }

    /// Reads lines at the cursor from a segment of this size, and moves behind them.
    fn read_lines(&mut self, size: u64, max_bytes: usize) -> io::Result<Read> {
        let Cursor { segment, offset, .. } = self.cursor;
        let Some(file) = &self.file else { return Ok(Read::Nothing) };
        self.unread = size.saturating_sub(offset);
        if size < offset {
            // Records have sequence numbers: whoever reads them twice knows it, whoever misses one does not.
            let what =
                format!("segment {segment} is shorter than what was read of it ({size} < {offset}); reading it again");
            return Ok(Read::Damaged(what, 0));
        }
        if size < self.barren {
            self.barren = offset;
        }
        if size <= self.barren.max(offset) {
            return Ok(Read::Nothing);
        }
        if self.barren.saturating_sub(offset) > MAX_LINE_BYTES as u64 {
            return self.skip_long_line(size);
        }
        // One byte more, in front: it must be the end of the line before.
        let lead = u64::from(offset > 0);
        let mut bytes = Vec::new();
        let mut wanted = (size - offset).min(max_bytes.clamp(1, MAX_LINE_BYTES) as u64);
        let end = loop {
            read_up_to(file, &mut bytes, (lead + wanted) as usize, offset - lead)?;
            if lead == 1 && bytes.first() != Some(&b'\n') {
                let what = format!("offset {offset} of segment {segment} is not the start of a line; reading it again");
                return Ok(Read::Damaged(what, 0));
            }
            let fresh = &bytes[lead as usize..];
            if let Some(at) = fresh.iter().rposition(|byte| *byte == b'\n') {
                break at + 1;
            }
            if (fresh.len() as u64) < wanted {
                return Ok(Read::Nothing);
            }
            if wanted == size - offset {
                self.barren = size;
                return Ok(Read::Nothing);
            }
            if wanted > MAX_LINE_BYTES as u64 {
                self.barren = offset + wanted;
                return self.skip_long_line(size);
            }
            wanted = (size - offset).min(wanted.saturating_mul(4)).min(MAX_LINE_BYTES as u64 + 1);
        };
        let lead = lead as usize;
        let whole = whole_lines(segment, &bytes[lead..lead + end]);
        let lines = Bytes::from(bytes).slice(lead..lead + whole.len);
        self.doubt = None;
        if self.on_network == Some(true)
            && let Some(seq) = lines_backwards(&lines).find_map(seq_of)
        {
            self.last_seq = seq;
        }
        self.cursor.offset = offset + end as u64;
        self.unread = size - self.cursor.offset;
        if whole.rotates
            && let Some(next) = segment.checked_add(1)
        {
            self.cursor.segment = next;
            self.cursor.offset = 0;
            self.unread = 0;
            self.file = None;
        }
        self.barren = self.cursor.offset;
        Ok(Read::Lines(Chunk {
            segment,
            start_offset: offset,
            lines,
            next_segment: self.cursor.segment,
            next_offset: self.cursor.offset,
            damage: None,
        }))
    }

    /// Passes over a line that is too long to hold, once its end is there.
    fn skip_long_line(&mut self, size: u64) -> io::Result<Read> {
        let Some(file) = &self.file else { return Ok(Read::Nothing) };
        let mut block = Vec::new();
        while self.barren < size {
            block.clear();
            let wanted = (size - self.barren).min(1 << 20) as usize;
            read_up_to(file, &mut block, wanted, self.barren)?;
            if let Some(len) = line_len(&block) {
                let end = self.barren + len as u64;
                let what = format!(
                    "a line of {} bytes at offset {} of segment {} is too long and was skipped",
                    end - self.cursor.offset,
                    self.cursor.offset,
                    self.cursor.segment
                );
                return Ok(Read::Damaged(what, end));
            }
            if block.is_empty() {
                break;
            }
            self.barren += block.len() as u64;
        }
        Ok(Read::Nothing)
    }
}

/// The number of a record.
fn seq_of(line: &[u8]) -> Option<u64> {
    match decode_line(line) {
        Ok(Line::Record(record)) => Some(record.seq),
        _ => None,
    }
}

/// The number of the first record of a segment; `None` when it has none yet.
fn first_seq(segment: &File) -> io::Result<Option<u64>> {
    let mut wanted = FIRST_LINE_BYTES;
    loop {
        let mut bytes = Vec::new();
        read_up_to(segment, &mut bytes, wanted, 0)?;
        if let Some(len) = line_len(&bytes) {
            return Ok(seq_of(&bytes[..len]));
        }
        if bytes.len() < wanted || wanted >= MAX_LINE_BYTES {
            return Ok(None);
        }
        wanted = (wanted * 8).min(MAX_LINE_BYTES);
    }
}

/// Whole lines, the last one first.
fn lines_backwards(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.strip_suffix(b"\n").unwrap_or(bytes).rsplit(|byte| *byte == b'\n')
}

enum Read {
    Lines(Chunk),
    /// What is wrong, and the offset to go on at.
    Damaged(String, u64),
    Nothing,
}

fn joined(damage: &[String]) -> Option<String> {
    (!damage.is_empty()).then(|| damage.join("; "))
}

/// Fills `bytes` up to `len` with what the file holds from `offset` on; less when the file ends before.
fn read_up_to(file: &File, bytes: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
    let mut have = bytes.len();
    bytes.resize(len, 0);
    while have < len {
        match file.read_at(&mut bytes[have..], offset + have as u64) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(have);
    Ok(())
}

/// What a reader takes from a piece of a segment that begins at the start of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WholeLines {
    /// How many bytes are whole lines that somebody reads: without a torn line and without the line that ends a segment.
    pub len: usize,
    /// The last whole line says that the stream goes on in the next segment.
    pub rotates: bool,
}

/// Longer than any line that ends a segment.
const ROTATE_LINE_MAX: usize = 64;

/// Finds the whole lines in a piece of segment `segment`. Takes any bytes.
pub fn whole_lines(segment: u32, bytes: &[u8]) -> WholeLines {
    let Some(last) = bytes.iter().rposition(|byte| *byte == b'\n') else {
        return WholeLines { len: 0, rotates: false };
    };
    let window = last.saturating_sub(ROTATE_LINE_MAX);
    let start = match bytes[window..last].iter().rposition(|byte| *byte == b'\n') {
        Some(at) => window + at + 1,
        None if window == 0 => 0,
        None => return WholeLines { len: last + 1, rotates: false },
    };
    // A rotation to anywhere but the next segment is none of ours; whoever decodes it will see it.
    let rotates =
        matches!(decode_line(&bytes[start..last]), Ok(Line::Rotate(next)) if Some(next) == segment.checked_add(1));
    WholeLines { len: if rotates { start } else { last + 1 }, rotates }
}

/// The lines of a chunk, without their line ends.
pub fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let len = line_len(rest).unwrap_or(rest.len());
        let (line, behind) = rest.split_at(len);
        rest = behind;
        Some(line.strip_suffix(b"\n").unwrap_or(line))
    })
}

#[cfg(test)]
mod tests;
