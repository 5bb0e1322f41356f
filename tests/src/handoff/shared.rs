//! What all nodes share: ownership records, journals, and a tool that does something outside.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use drover_handoff::core::{Call, ClaimOutcome, Looked, OwnerRecord};
use drover_handoff::session::{LogSum, Record, begins, spans};
use drover_types::{Epoch, SessionId};

/// A part of the protocol that is taken away outside the core, to see that the judge notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Missing {
    /// An owner does not look for a later epoch after it has written.
    LookAfterWriting,
    /// A claim replaces whatever record there is of the epoch.
    ExclusiveClaims,
    /// Who takes over has read the journals before it claims.
    ClaimBeforeReading,
    /// A source that hears nothing takes itself for the owner, without a claim.
    ReclaimByClaim,
    /// Tools do not know keys.
    KeysOfTools,
    /// A journal does not say whom its owner followed: only its first number tells what of the others counts.
    FollowsByName,
}

/// A log: what it adds up to, its bytes and its records.
pub type Whole = (LogSum, Vec<u8>, Vec<Record>);

/// One session on the shared file system.
#[derive(Debug, Default)]
pub struct Files {
    owners: BTreeMap<Epoch, OwnerRecord>,
    journals: BTreeMap<Epoch, Vec<u8>>,
    checkpoints: BTreeMap<Epoch, Arc<Vec<u8>>>,
}

impl Files {
    /// The record of the newest epoch.
    pub fn newest(&self) -> Option<&OwnerRecord> {
        self.owners.values().next_back()
    }

    /// What a look finds.
    pub fn look(&self) -> Looked {
        self.newest().map_or(Looked::Nobody, |record| Looked::Owned(record.clone()))
    }

    /// Makes a record unless there is one of that epoch or a later one.
    pub fn claim(&mut self, record: &OwnerRecord, missing: Option<Missing>) -> ClaimOutcome {
        if missing == Some(Missing::ReclaimByClaim)
            && matches!(record.cause, drover_handoff::core::Cause::Reclaimed { .. })
        {
            return ClaimOutcome::Won;
        }
        if missing == Some(Missing::ExclusiveClaims) {
            self.owners.insert(record.epoch, record.clone());
            return ClaimOutcome::Won;
        }
        match self.newest() {
            Some(newest) if newest == record => ClaimOutcome::Won,
            Some(newest) if newest.epoch >= record.epoch => ClaimOutcome::Lost(newest.clone()),
            _ => {
                self.owners.insert(record.epoch, record.clone());
                ClaimOutcome::Won
            }
        }
    }

    /// Writes lines into an epoch's journal at the place that is due for them, over what is there, as a file is written. Of a write that is
    /// cut off only a part in its middle may come to the disk; what is before it then reads as zeros, unless it was there already.
    pub fn write(&mut self, epoch: Epoch, offset: usize, bytes: &[u8], part: Range<usize>) {
        let journal = self.journals.entry(epoch).or_default();
        let (start, end) = (offset + part.start, offset + part.end);
        if journal.len() < end {
            journal.resize(end, 0);
        }
        journal[start..end].copy_from_slice(&bytes[part]);
    }

    /// An owner puts down all that was said so far, under its epoch.
    pub fn checkpoint(&mut self, epoch: Epoch, log: Arc<Vec<u8>>) {
        self.checkpoints.insert(epoch, log);
    }

    /// Then it removes what that takes the place of.
    pub fn let_go(&mut self, epoch: Epoch) {
        self.checkpoints.retain(|old, _| *old >= epoch);
        self.journals.retain(|old, _| *old >= epoch);
    }

    /// All that counts of the epochs before `below`, as whoever takes over reads it. An error is a session that is lost: what was kept makes no
    /// log any more.
    pub fn read(&self, below: Epoch, missing: Option<Missing>) -> Result<Whole, String> {
        let journals = || self.journals.range(..below);
        let heads = journals().filter_map(|(epoch, bytes)| {
            let mut head = begins(*epoch, bytes.split_inclusive(|b| *b == b'\n').next()?)?;
            head.follows = head.follows.filter(|_| missing != Some(Missing::FollowsByName));
            Some(head)
        });
        let spans = spans(heads.collect());
        let (mut log, mut all, mut records) = (LogSum::default(), Vec::new(), Vec::new());
        let mut take = |line: &[u8]| {
            let record = log.line(line).map_err(|error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                format!("the journals make no log: {error} ({cause}), spans {spans:?}")
            })?;
            records.push(record);
            all.extend_from_slice(line);
            Ok::<_, String>(records.len() as u64 + 1)
        };
        let mut due = 1;
        for line in self.checkpoints.values().next_back().iter().flat_map(|log| log.split_inclusive(|b| *b == b'\n')) {
            due = take(line)?;
        }
        for span in &spans {
            for (seq, line) in (span.first..).zip(self.journals[&span.epoch].split_inclusive(|byte| *byte == b'\n')) {
                if !line.ends_with(b"\n") || line.contains(&0) || !span.counts(seq) {
                    break;
                }
                if seq > due {
                    return Err(format!("records {due} to {} are missing, spans {spans:?}", seq - 1));
                }
                // What the checkpoint had is not taken twice.
                if seq == due {
                    due = take(line)?;
                }
            }
        }
        Ok((log, all, records))
    }
}

/// A tool outside of all nodes. It keeps what it answered under each key, and knows the newest epoch of each session.
#[derive(Debug, Default)]
pub struct Tool {
    newest: BTreeMap<SessionId, Epoch>,
    /// How often each call was carried out.
    pub carried_out: BTreeMap<(SessionId, Call), u32>,
    /// Calls of owners that were not the newest any more.
    pub refused: u64,
}

impl Tool {
    /// What it answers, if it does.
    pub fn call(&mut self, session: &SessionId, epoch: Epoch, call: Call, missing: Option<Missing>) -> Option<String> {
        let newest = self.newest.entry(session.clone()).or_default();
        if epoch < *newest {
            self.refused += 1;
            return None;
        }
        *newest = epoch;
        let count = self.carried_out.entry((session.clone(), call)).or_default();
        if *count == 0 || missing == Some(Missing::KeysOfTools) {
            *count += 1;
        }
        Some(format!("done {}.{}", call.turn.0, call.n))
    }
}

/// Everything that is shared.
#[derive(Debug, Default)]
pub struct Shared {
    /// Sessions by name.
    pub sessions: BTreeMap<SessionId, Files>,
    /// The tool.
    pub tool: Tool,
}

/// Lines of a batch.
pub fn lines(first: u64, records: &Arc<Vec<Record>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (seq, record) in (first..).zip(records.iter()) {
        drover_handoff::session::encode(seq, record, &mut bytes).expect("a record is JSON");
    }
    bytes
}
