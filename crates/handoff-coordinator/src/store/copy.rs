//! What comes in at a handoff: a log that grows by pieces, checked while it comes, and inert until the claim.

use std::path::Path;

use super::log::SessionLog;
use super::{StoreError, failed};
use crate::core::Digest;
use crate::files;

/// A copy on its way in.
#[derive(Debug)]
pub struct IncomingCopy {
    log: SessionLog,
    /// The beginning of a line whose end is still to come.
    rest: Vec<u8>,
    most: u64,
    /// Bytes that the disk has for good.
    synced: u64,
    /// Bytes that were announced: those behind them come while nobody is served.
    announced: u64,
}

/// Bytes that may wait for the disk: at the end, while nobody can be served, there is little left to wait for.
const UNSYNCED: u64 = 8 << 20;

impl IncomingCopy {
    /// Goes on from what an earlier attempt left, unless it is to be `fresh`. A copy that cannot be read is begun anew.
    pub fn begin(path: &Path, fresh: bool, announced: u64, most: u64) -> Result<Self, StoreError> {
        let log = if fresh { None } else { SessionLog::open(path).ok() };
        let log = match log {
            Some(log) => log,
            None => SessionLog::create(path)?,
        };
        Ok(Self { log, rest: Vec::new(), most, synced: 0, announced })
    }

    /// Bytes that are there; the next piece begins behind them.
    pub fn len(&self) -> u64 {
        self.log.sum().len + self.rest.len() as u64
    }

    /// Nothing has come.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the piece at an offset. An error means that what came cannot be a session: begin afresh.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let path = self.log.path().to_owned();
        if offset != self.len() {
            let why = format!("a piece at {offset} does not follow {} bytes", self.len());
            return Err(StoreError::Mismatch { path, why });
        }
        if self.len() + bytes.len() as u64 > self.most {
            let why = format!("it would have more than {} bytes", self.most);
            return Err(StoreError::Mismatch { path, why });
        }
        self.rest.extend_from_slice(bytes);
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole > 0 {
            self.log.write(&self.rest[..whole])?;
            self.rest.drain(..whole);
        }
        let len = self.log.sum().len;
        if len >= self.synced + UNSYNCED || (len >= self.announced && self.synced < self.announced) {
            self.log.sync()?;
            self.synced = len;
        }
        Ok(self.len())
    }

    /// Checks that it is what the source has, and has the disk keep it. Nothing when it is not.
    pub fn whole(&self, len: u64, digest: Digest) -> Result<bool, StoreError> {
        if !self.rest.is_empty() || (self.log.sum().len, self.log.sum().digest) != (len, digest) {
            return Ok(false);
        }
        if self.synced < len {
            self.log.sync()?;
        }
        Ok(true)
    }

    /// What it says.
    pub fn log(&self) -> &SessionLog {
        &self.log
    }

    /// The claim is won: from now on it is the session's log. A crash may take the name back, and then the journals say it all again.
    pub fn adopt(self, path: &Path) -> Result<SessionLog, StoreError> {
        self.log.rename(path)
    }

    /// It is of no use.
    pub fn discard(self) -> Result<(), StoreError> {
        files::remove(self.log.path()).map_err(failed("remove", self.log.path()))
    }
}
