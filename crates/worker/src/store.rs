//! What the worker writes: its outbox and its journal, in one order, through one door.
//!
//! Whatever cannot be written now stays here, in order, until it can. Past a limit only what a reader cannot do without
//! is kept: the begin and end of turns, answers, approvals and the worker's own words.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use drover_mailbox::{Beacon, MAX_LINE_BYTES, Record, StreamWriter, encode_line};
use drover_types::InjectionId;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use thiserror::Error;
use tracing::debug;

use crate::core::{Entry, kind};
use crate::journal::{self, Memory, OutboxPlace};

/// Bytes of records that may wait for a disk that takes them again.
pub(crate) const KEEP_BYTES: usize = 64 << 20;
/// Bytes since the last sync that are kept to be appended again when it fails.
const RESEND_BYTES: usize = 4 << 20;
/// Room that the fields around `data` may take in a line.
const FRAME_BYTES: usize = 64 << 10;

/// A stream that can be appended to.
pub(crate) trait Sink: Send + 'static {
    /// Appends whole lines, all or nothing.
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;
    /// Brings everything appended to disk.
    fn sync(&mut self) -> io::Result<()>;
    /// Where the next line comes to stand.
    fn position(&self) -> (u32, u64);
}

/// A stream of the mailbox. What comes into an outbox the beacon of the swarm says too, for those whom no system tells.
pub(crate) struct Disk {
    stream: StreamWriter,
    beacon: Option<Beacon>,
}

impl Disk {
    pub(crate) fn journal(stream: StreamWriter) -> Self {
        Self { stream, beacon: None }
    }

    pub(crate) fn outbox(stream: StreamWriter, beacon: Beacon) -> Self {
        Self { stream, beacon: Some(beacon) }
    }
}

impl Sink for Disk {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.stream.append(lines)?;
        // The record is there; without the beacon it is found all the same, later.
        if let Some(Err(error)) = self.beacon.as_mut().map(Beacon::flash) {
            debug!(%error, "the beacon of the swarm cannot be flashed");
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.stream.sync()
    }

    fn position(&self) -> (u32, u64) {
        self.stream.position()
    }
}

/// A stream that cannot be written at the moment.
#[derive(Debug, Error)]
#[error("the worker's {what} cannot be written")]
pub(crate) struct StoreError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// The fields that are the same in every record of this worker.
#[derive(Debug, Clone)]
pub(crate) struct Stamp {
    pub(crate) job_id: String,
    pub(crate) node_id: u32,
    pub(crate) generation: u32,
}

impl Stamp {
    fn line(
        &self,
        (seq, ts): (u64, u64),
        injection: Option<&InjectionId>,
        trace: Option<&Arc<str>>,
        kind: &str,
        data: &RawValue,
        out: &mut Vec<u8>,
    ) {
        let record = Record {
            seq,
            ts,
            job_id: Cow::Borrowed(&self.job_id),
            node_id: self.node_id,
            generation: self.generation,
            injection_id: injection.map(|id| Cow::Borrowed(id.as_str())),
            trace: trace.map(|trace| Cow::Borrowed(trace.as_ref())),
            kind: Cow::Borrowed(kind),
            data,
        };
        encode_line(&record, out);
    }
}

#[derive(Debug)]
enum Op {
    Outbox(Vec<u8>),
    SyncOutbox,
    Journal(Entry),
    SyncJournal,
}

/// Totals since the start, for metrics and messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    /// Records given up while the disk took nothing.
    pub(crate) dropped: u64,
}

/// The writer of both streams.
#[derive(Debug)]
pub(crate) struct Store<S> {
    outbox: S,
    journal: S,
    stamp: Stamp,
    pending: VecDeque<Op>,
    /// Bytes of outbox lines in `pending`.
    kept: usize,
    keep_at_most: usize,
    outbox_seq: u64,
    journal_seq: u64,
    outbox_unsynced: Unsynced,
    journal_unsynced: Unsynced,
    written: Written,
    /// A buffer to use again.
    spare: Vec<u8>,
}

/// What was appended since the last sync. After a failed sync nobody knows which of it will survive, so it is appended
/// again: readers know records that they have seen by their numbers.
#[derive(Debug, Default)]
struct Unsynced {
    lines: Vec<u8>,
    dirty: bool,
    failed: bool,
}

impl Unsynced {
    fn add(&mut self, lines: &[u8]) {
        self.dirty = true;
        if self.lines.len() + lines.len() > RESEND_BYTES {
            // Long streams of deltas; what matters comes right before a sync.
            self.lines.clear();
        }
        if lines.len() <= RESEND_BYTES {
            self.lines.extend_from_slice(lines);
        }
    }

    fn clear(&mut self) {
        self.dirty = false;
        self.failed = false;
        self.lines.clear();
    }
}

impl<S: Sink> Store<S> {
    pub(crate) fn new(outbox: S, journal: S, stamp: Stamp, keep_at_most: usize) -> Self {
        Self {
            outbox,
            journal,
            stamp,
            pending: VecDeque::new(),
            kept: 0,
            keep_at_most,
            outbox_seq: 0,
            journal_seq: 0,
            outbox_unsynced: Unsynced::default(),
            journal_unsynced: Unsynced::default(),
            written: Written::default(),
            spare: Vec::new(),
        }
    }

    /// Begins the journal with what earlier generations left, and syncs it.
    pub(crate) fn begin_journal(&mut self, memory: &Memory, ts: u64) -> Result<(), StoreError> {
        let mut lines = Vec::new();
        let here = self.place();
        for (entry, place) in memory.entries() {
            self.encode_entry(&entry, place.unwrap_or(here), ts, &mut lines);
            if lines.len() >= 1 << 20 {
                self.journal.append(&lines).map_err(|source| StoreError { what: "journal", source })?;
                lines.clear();
            }
        }
        if let Ok(data) = to_raw_value(&serde_json::json!({})) {
            self.journal_seq += 1;
            self.stamp.line((self.journal_seq, ts), None, None, journal::COMPLETE, &data, &mut lines);
        }
        let written = self.journal.append(&lines).and_then(|()| self.journal.sync());
        written.map_err(|source| StoreError { what: "journal", source })
    }

    /// Takes a record for the outbox. It is written by the next `flush`.
    pub(crate) fn write(
        &mut self,
        ts: u64,
        injection: Option<&InjectionId>,
        trace: Option<&Arc<str>>,
        kind: &str,
        data: &Value,
    ) {
        if self.kept > self.keep_at_most && !is_needed(kind) {
            self.written.dropped += 1;
            return;
        }
        let Some(data) = raw(data) else { return };
        self.outbox_seq += 1;
        let Self { stamp, pending, spare, .. } = self;
        if !matches!(pending.back(), Some(Op::Outbox(_))) {
            pending.push_back(Op::Outbox(std::mem::take(spare)));
        }
        if let Some(Op::Outbox(lines)) = pending.back_mut() {
            let before = lines.len();
            stamp.line((self.outbox_seq, ts), injection, trace, kind, &data, lines);
            self.kept += lines.len() - before;
        }
        self.written.records += 1;
    }

    /// Brings the outbox to disk, in its turn.
    pub(crate) fn sync_outbox(&mut self) {
        self.pending.push_back(Op::SyncOutbox);
    }

    /// Takes an entry for the journal.
    pub(crate) fn journal(&mut self, entry: Entry) {
        self.pending.push_back(Op::Journal(entry));
    }

    /// Brings the journal to disk, in its turn.
    pub(crate) fn sync_journal(&mut self) {
        self.pending.push_back(Op::SyncJournal);
    }

    /// Something waits to be written.
    pub(crate) fn is_behind(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Totals since the start.
    pub(crate) fn written(&self) -> Written {
        self.written
    }

    /// Carries out everything that waits, in order. What fails stays, with all that follows it.
    pub(crate) fn flush(&mut self, ts: u64) -> Result<(), StoreError> {
        while let Some(op) = self.pending.pop_front() {
            if let Err((op, error)) = self.perform(op, ts) {
                self.pending.push_front(op);
                return Err(error);
            }
        }
        Ok(())
    }

    fn perform(&mut self, op: Op, ts: u64) -> Result<(), (Op, StoreError)> {
        let outbox = |source| StoreError { what: "outbox", source };
        let journal = |source| StoreError { what: "journal", source };
        match op {
            Op::Outbox(mut lines) => {
                if let Err(error) = self.outbox.append(&lines) {
                    return Err((Op::Outbox(lines), outbox(error)));
                }
                self.kept -= lines.len();
                self.written.bytes += lines.len() as u64;
                self.outbox_unsynced.add(&lines);
                lines.clear();
                if lines.capacity() <= 1 << 20 {
                    self.spare = lines;
                }
            }
            Op::Journal(entry) => {
                let mut line = Vec::new();
                self.encode_entry(&entry, self.place(), ts, &mut line);
                if let Err(error) = self.journal.append(&line) {
                    return Err((Op::Journal(entry), journal(error)));
                }
                self.journal_unsynced.add(&line);
            }
            Op::SyncOutbox => {
                sync(&mut self.outbox, &mut self.outbox_unsynced).map_err(|error| (Op::SyncOutbox, outbox(error)))?;
            }
            Op::SyncJournal => sync(&mut self.journal, &mut self.journal_unsynced)
                .map_err(|error| (Op::SyncJournal, journal(error)))?,
        }
        Ok(())
    }

    fn place(&self) -> OutboxPlace {
        let (segment, offset) = self.outbox.position();
        OutboxPlace { generation: self.stamp.generation, segment, offset }
    }

    fn encode_entry(&mut self, entry: &Entry, place: OutboxPlace, ts: u64, out: &mut Vec<u8>) {
        self.journal_seq += 1;
        if let Ok((injection, trace, kind, data)) = journal::encode(entry, place) {
            self.stamp.line((self.journal_seq, ts), injection, trace, kind, &data, out);
        }
    }
}

/// Syncs a stream when there is something to sync. What an earlier, failed sync may have lost goes first.
fn sync(stream: &mut impl Sink, unsynced: &mut Unsynced) -> io::Result<()> {
    if !unsynced.dirty {
        return Ok(());
    }
    if unsynced.failed {
        stream.append(&unsynced.lines)?;
    }
    unsynced.failed = true;
    stream.sync()?;
    unsynced.clear();
    Ok(())
}

/// Records without which a reader is left with a wrong picture. The text of deltas comes again with `assistant`.
fn is_needed(kind: &str) -> bool {
    kind::HANDOFFS.contains(&kind)
        || matches!(
            kind,
            kind::ASSISTANT
                | kind::APPROVAL_REQUIRED
                | kind::APPROVAL_RESOLVED
                | kind::KEYRING_STATE
                | kind::MEMBERSHIP_NOTES
                | kind::TURN_COMPLETE
                | kind::TURN_STARTED
                | kind::WORKER_BYE
                | kind::WORKER_ERROR
                | kind::WORKER_HELLO
        )
}

/// The fields of a record as text; what no reader could hold is replaced by a word on its size.
fn raw(data: &Value) -> Option<Box<RawValue>> {
    let text = to_raw_value(data).ok()?;
    let bytes = text.get().len();
    if bytes <= MAX_LINE_BYTES - FRAME_BYTES {
        return Some(text);
    }
    to_raw_value(&serde_json::json!({ "content": "", "dropped_bytes": bytes })).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use drover_mailbox::{Line, decode_line};
    use serde_json::json;

    use super::*;

    /// A disk that takes only so many bytes.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Disk {
        fn room(&self, bytes: usize) {
            self.0.lock().unwrap().1 = bytes;
        }

        fn kinds(&self) -> Vec<(u64, String)> {
            let disk = self.0.lock().unwrap();
            let record = |line| match decode_line(line) {
                Ok(Line::Record(record)) => (record.seq, record.kind.into_owned()),
                other => panic!("{other:?}"),
            };
            disk.0.split_inclusive(|byte| *byte == b'\n').map(record).collect()
        }
    }

    impl Sink for Disk {
        fn append(&mut self, lines: &[u8]) -> io::Result<()> {
            let mut disk = self.0.lock().unwrap();
            if disk.1 < lines.len() {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            disk.1 -= lines.len();
            disk.0.extend_from_slice(lines);
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn position(&self) -> (u32, u64) {
            (1, self.0.lock().unwrap().0.len() as u64)
        }
    }

    #[test]
    fn a_full_disk_delays_records_and_costs_only_those_that_nobody_needs() {
        let (outbox, journal) = (Disk::default(), Disk::default());
        journal.room(usize::MAX);
        let stamp = Stamp { job_id: "j".into(), node_id: 0, generation: 1 };
        let mut store = Store::new(outbox.clone(), journal.clone(), stamp, 2_000);
        let id: InjectionId = "i".parse().unwrap();
        store.write(1, Some(&id), None, kind::TURN_STARTED, &json!({}));
        store.sync_outbox();
        assert!(store.flush(1).is_err());
        for _ in 0..100 {
            store.write(1, Some(&id), None, "assistant_delta", &json!({ "content": "x".repeat(300) }));
            let _ = store.flush(1);
        }
        store.write(1, Some(&id), None, kind::ASSISTANT, &json!({ "content": "whole" }));
        store.write(1, Some(&id), None, kind::TURN_COMPLETE, &json!({ "status": "completed" }));
        store.journal(Entry::Ended { injection: id, seq: 1 });
        let error = store.flush(1).unwrap_err();
        assert!(error.to_string().contains("outbox"), "{error}");
        assert!(outbox.kinds().is_empty() && journal.kinds().is_empty(), "nothing overtakes what waits");

        outbox.room(usize::MAX);
        store.flush(1).unwrap();
        assert!(!store.is_behind());
        let kinds = outbox.kinds();
        let deltas = kinds.iter().filter(|(_, kind)| kind == "assistant_delta").count() as u64;
        assert!((2..20).contains(&deltas), "{deltas}");
        assert_eq!(store.written().dropped, 100 - deltas);
        let numbers: Vec<u64> = kinds.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(numbers, (1..=deltas + 3).collect::<Vec<_>>(), "no gap: what is dropped has no number");
        assert_eq!(kinds.first().map(|(_, kind)| kind.as_str()), Some(kind::TURN_STARTED));
        assert_eq!(kinds.last().map(|(_, kind)| kind.as_str()), Some(kind::TURN_COMPLETE));
        assert_eq!(journal.kinds(), [(1, "ended".to_owned())]);
    }
}
