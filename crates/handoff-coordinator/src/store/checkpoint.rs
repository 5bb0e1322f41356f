//! A checkpoint: a session's records so far, in pieces named by their content. A log only grows, so from one checkpoint to the next
//! only its last piece and what comes after it are written.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use drover_types::Epoch;
use serde::{Deserialize, Serialize};

use super::log::{LogReader, SessionLog};
use super::pieces::{PIECE, keep_piece, read_piece};
use super::{StoreError, failed};
use crate::files;

/// A checkpoint of the longest session is shorter.
const MAX_BYTES: u64 = 16 << 20;

/// How far a session's pieces go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    v: u32,
    /// Whose owner made it.
    pub epoch: Epoch,
    /// Records in it.
    pub records: u64,
    /// Their bytes.
    pub len: u64,
    /// Their digest.
    pub digest: String,
    /// The pieces in their order.
    pub pieces: Vec<String>,
}

impl Checkpoint {
    fn pieces_dir(dir: &Path) -> PathBuf {
        dir.join("pieces")
    }

    fn path(dir: &Path, epoch: Epoch) -> PathBuf {
        dir.join("checkpoints").join(format!("{:020}.json", epoch.0))
    }

    /// The epochs of which there is one, in their order.
    fn epochs(dir: &Path) -> Result<Vec<Epoch>, StoreError> {
        let dir = dir.join("checkpoints");
        if !files::look_anew(&dir).map_err(failed("look into", &dir))? {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&dir).map_err(failed("list", &dir))?;
        let mut epochs = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &dir))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".json")).filter(|number| number.len() == 20);
            epochs.extend(number.and_then(|number| number.parse().ok()).map(Epoch));
        }
        epochs.sort_unstable();
        Ok(epochs)
    }

    /// The newest of a session; nothing when there is none.
    pub fn newest(dir: &Path) -> Result<Option<Self>, StoreError> {
        let Some(epoch) = Self::epochs(dir)?.pop() else { return Ok(None) };
        let path = Self::path(dir, epoch);
        let bytes = files::read_small(&path, MAX_BYTES).map_err(failed("read", &path))?;
        // Gone since it was listed: there is a newer one.
        let bytes = bytes.ok_or_else(|| failed("read", &path)(ErrorKind::NotFound.into()))?;
        let read: Result<Self, _> = serde_json::from_slice(&bytes);
        let why = match read {
            Ok(checkpoint) if checkpoint.v == 1 && checkpoint.epoch == epoch => return Ok(Some(checkpoint)),
            Ok(checkpoint) => format!("version {} of epoch {} is not due there", checkpoint.v, checkpoint.epoch),
            Err(error) => error.to_string(),
        };
        Err(StoreError::Mismatch { path, why })
    }

    /// Writes the pieces that are not there, then the checkpoint of this epoch, and only then removes what it replaces.
    ///
    /// Each owner has a file of its own and the newest epoch's counts, so an owner that was overtaken while it does this spoils
    /// nothing: of the pieces it removes only its own last one, which was not full; the next owner's log is longer.
    pub(super) fn write(dir: &Path, epoch: Epoch, log: &LogReader) -> Result<Self, StoreError> {
        let (pieces_dir, own) = (Self::pieces_dir(dir), Self::path(dir, epoch));
        for needed in [Some(pieces_dir.as_path()), own.parent()].into_iter().flatten() {
            files::make_dir(needed).map_err(failed("make", needed))?;
        }
        let before = Self::newest(dir)?.filter(|before| before.epoch <= epoch);
        let (len, mut pieces, mut offset) = (log.len(), Vec::new(), 0);
        // Full pieces of the one before are the same: a log only grows.
        if let Some(before) = before.as_ref().filter(|before| before.len <= len) {
            let full = (before.len as usize / PIECE).min(before.pieces.len());
            pieces.extend_from_slice(&before.pieces[..full]);
            offset = (full * PIECE) as u64;
        }
        while offset < len {
            let piece = log.read_at(offset, PIECE)?;
            offset += piece.len() as u64;
            pieces.push(keep_piece(&pieces_dir, &piece).map_err(failed("write a piece in", &pieces_dir))?.0);
        }
        files::sync_dir(&pieces_dir).map_err(failed("keep", &pieces_dir))?;
        let checkpoint = Self { v: 1, epoch, records: log.records(), len, digest: log.digest().to_string(), pieces };
        let mut text = serde_json::to_vec(&checkpoint).map_err(std::io::Error::from).map_err(failed("write", dir))?;
        text.push(b'\n');
        let (parent, name) = (dir.join("checkpoints"), format!("{:020}.json", epoch.0));
        files::replace(&parent, &name, &text).map_err(failed("write the checkpoint in", &parent))?;
        for old in before.iter().flat_map(|before| &before.pieces).filter(|old| !checkpoint.pieces.contains(old)) {
            let path = pieces_dir.join(old);
            files::remove(&path).map_err(failed("remove", &path))?;
        }
        for old in Self::epochs(dir)?.into_iter().filter(|old| *old < epoch) {
            let path = Self::path(dir, old);
            files::remove(&path).map_err(failed("remove", &path))?;
        }
        Ok(checkpoint)
    }

    /// Reads its records into an empty log.
    pub(super) fn read_into(&self, dir: &Path, log: &mut SessionLog) -> Result<(), StoreError> {
        let pieces_dir = Self::pieces_dir(dir);
        let mut rest = Vec::new();
        for name in &self.pieces {
            rest.extend(read_piece(&pieces_dir, name)?);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            log.write(&rest[..whole])?;
            rest.drain(..whole);
        }
        let sum = log.sum();
        if (sum.len, sum.outline.seq(), sum.digest.to_string()) != (self.len, self.records, self.digest.clone()) {
            let why = "its pieces do not add up to what it says".to_owned();
            return Err(StoreError::Mismatch { path: Self::path(dir, self.epoch), why });
        }
        Ok(())
    }
}
