//! Records on their way to the disks: one batch at a time, in order, sent again until it is known what became of it.

use std::sync::Arc;
use std::time::Duration;

use super::ids::Digest;
use crate::session::Record;

#[derive(Debug)]
pub(crate) struct Journal {
    /// Number of the last record that was pushed, and of the last that is known to be on disk under an epoch that was
    /// still the newest afterwards.
    pub(crate) pushed: u64,
    pub(crate) durable: u64,
    /// Bytes of the durable ones and their digest.
    pub(crate) len: u64,
    pub(crate) digest: Digest,
    under_way: Option<Arc<Vec<Record>>>,
    pending: Vec<Record>,
    /// When the batch under way is sent again; unset while an outcome is to come.
    pub(crate) retry: Option<Duration>,
}

impl Journal {
    pub(crate) fn new(seq: u64, len: u64, digest: Digest) -> Self {
        Self { pushed: seq, durable: seq, len, digest, under_way: None, pending: Vec::new(), retry: None }
    }

    pub(crate) fn push(&mut self, record: Record) {
        self.pushed += 1;
        self.pending.push(record);
    }

    pub(crate) fn idle(&self) -> bool {
        self.under_way.is_none() && self.pending.is_empty()
    }

    /// The next batch with the number of its first record, when none is under way or the one that is has to be sent again.
    pub(crate) fn next(&mut self, now: Duration) -> Option<(u64, Arc<Vec<Record>>)> {
        if self.under_way.is_none() {
            if self.pending.is_empty() {
                return None;
            }
            self.under_way = Some(Arc::new(std::mem::take(&mut self.pending)));
        } else {
            self.retry.take_if(|at| *at <= now)?;
        }
        self.under_way.as_ref().map(|batch| (self.durable + 1, Arc::clone(batch)))
    }

    /// The batch under way is on the disks.
    pub(crate) fn done(&mut self, len: u64, digest: Digest) -> Option<Arc<Vec<Record>>> {
        let batch = self.under_way.take()?;
        self.durable += batch.len() as u64;
        (self.len, self.digest, self.retry) = (len, digest, None);
        Some(batch)
    }
}
