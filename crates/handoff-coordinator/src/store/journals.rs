//! The journals of one session on the shared file system, and how a new owner reads them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use drover_types::{Epoch, SessionId};

use super::checkpoint::Checkpoint;
use super::log::{LogReader, MAX_LINE, SessionLog};
use super::{StoreError, failed};
use crate::files;
use crate::session::{Head, Span, begins, spans};

/// One session's directory on the shared file system.
#[derive(Debug)]
pub struct Journals {
    session: SessionId,
    dir: PathBuf,
    /// The journal that this process writes, and how many of its bytes are known to be whole.
    open: Option<(Epoch, File, u64)>,
}

impl Journals {
    /// Of a session below the root.
    pub fn new(root: &Path, session: SessionId) -> Self {
        let dir = root.join(session.as_str());
        Self { session, dir, open: None }
    }

    /// The same ones, to be read and tidied by somebody else.
    pub(super) fn again(&self) -> Self {
        Self { session: self.session.clone(), dir: self.dir.clone(), open: None }
    }

    /// Whose they are.
    pub fn session(&self) -> &SessionId {
        &self.session
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, epoch: Epoch) -> PathBuf {
        self.dir.join("journal").join(format!("{:020}.jsonl", epoch.0))
    }

    /// Adds lines to the journal of an epoch that this process owns, and has the disk keep them. After an error the same lines are written
    /// to the same place again.
    pub(super) fn append(&mut self, epoch: Epoch, lines: &[u8]) -> Result<(), StoreError> {
        let path = self.path(epoch);
        if self.open.as_ref().is_none_or(|(open, ..)| *open != epoch) {
            let dir = self.dir.join("journal");
            files::make_dir(&dir).map_err(failed("make", &dir))?;
            // A process claims anew when it starts, so nobody has written in this epoch before.
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
            let file = file.map_err(failed("make", &path))?;
            self.open = Some((epoch, file, 0));
        }
        let Some((_, file, whole)) = &mut self.open else { return Ok(()) };
        // Written again, they are written over what is there and nothing is cut off: a later owner may have read it by then.
        file.write_all_at(lines, *whole).map_err(failed("write", &path))?;
        if *whole == 0 {
            // The first lines and the name of the file are brought to the disk at the same time.
            let dir = self.dir.join("journal");
            let (named, kept) = std::thread::scope(|scope| {
                let named = scope.spawn(|| files::sync_dir(&dir));
                let kept = file.sync_data();
                (named.join(), kept)
            });
            named.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(failed("keep", &dir))?;
            kept.map_err(failed("sync", &path))?;
        } else {
            file.sync_data().map_err(failed("sync", &path))?;
        }
        *whole += lines.len() as u64;
        Ok(())
    }

    /// Reads everything that counts of the epochs before `below` into a log of this node. Whoever calls this has claimed `below`.
    pub fn read(&self, below: Epoch, into: &Path) -> Result<SessionLog, StoreError> {
        // An owner that was overtaken may let go of old journals at this very moment; then a checkpoint says what they said.
        let mut tries = 0;
        loop {
            match self.try_read(below, into) {
                Err(StoreError::Files { source, .. }) if source.kind() == io::ErrorKind::NotFound && tries < 3 => {
                    tries += 1;
                }
                Err(StoreError::Missing { .. } | StoreError::Mismatch { .. }) if tries < 3 => tries += 1,
                other => return other,
            }
        }
    }

    fn try_read(&self, below: Epoch, into: &Path) -> Result<SessionLog, StoreError> {
        let mut log = SessionLog::create(into)?;
        if let Some(checkpoint) = Checkpoint::newest(&self.dir)? {
            checkpoint.read_into(&self.dir, &mut log)?;
        }
        let heads =
            self.epochs()?.into_iter().filter(|epoch| *epoch < below).filter_map(|epoch| self.head(epoch).transpose());
        for span in spans(heads.collect::<Result<_, _>>()?) {
            self.read_span(span, &mut log)?;
        }
        log.sync()?;
        Ok(log)
    }

    /// Epochs of which there is a journal.
    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let dir = self.dir.join("journal");
        // A journal that was begun a moment ago on another host is to be in the list.
        if !files::look_anew(&dir).map_err(failed("look into", &dir))? {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&dir).map_err(failed("list", &dir))?;
        let mut epochs = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &dir))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".jsonl")).filter(|number| number.len() == 20);
            epochs.extend(number.and_then(|number| number.parse().ok()).map(Epoch));
        }
        epochs.sort_unstable();
        Ok(epochs)
    }

    fn head(&self, epoch: Epoch) -> Result<Option<Head>, StoreError> {
        let path = self.path(epoch);
        let file = files::open(&path, false).map_err(failed("open", &path))?;
        let mut line = Vec::new();
        BufReader::new(file).take(4096).read_until(b'\n', &mut line).map_err(failed("read", &path))?;
        Ok(begins(epoch, &line))
    }

    fn read_span(&self, span: Span, log: &mut SessionLog) -> Result<(), StoreError> {
        let path = self.path(span.epoch);
        let file = files::open(&path, false).map_err(failed("open", &path))?;
        let mut reader = BufReader::with_capacity(256 << 10, file);
        let (mut line, mut seq) = (Vec::new(), span.first);
        loop {
            line.clear();
            reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed("read", &path))?;
            // Of a write that was cut off, a file system may keep a later part without an earlier one, which then reads as zeros.
            if !line.ends_with(b"\n") || line.contains(&0) || !span.counts(seq) {
                break;
            }
            let due = log.sum().outline.seq() + 1;
            if seq > due {
                return Err(StoreError::Missing { session: self.session.clone(), from: due, path });
            }
            // What the checkpoint had is not written twice.
            if seq == due {
                log.write(&line)?;
            }
            seq += 1;
        }
        // Its owner may have been killed between writing and having it kept. What follows from it is about to be kept, so it is kept first.
        if span.end.is_none() {
            reader.get_ref().sync_data().map_err(failed("sync", &path))?;
        }
        Ok(())
    }

    /// Puts a log into pieces, and then lets go of the journals of earlier epochs, whose records are all in it.
    pub(super) fn checkpoint(&self, epoch: Epoch, log: &LogReader) -> Result<Checkpoint, StoreError> {
        let checkpoint = Checkpoint::write(&self.dir, epoch, log)?;
        for old in self.epochs()?.into_iter().filter(|old| *old < epoch) {
            let path = self.path(old);
            files::remove(&path).map_err(failed("remove", &path))?;
        }
        Ok(checkpoint)
    }
}
