//! What goes over connections, between the protos and the core.

use std::sync::Arc;

use bytes::Bytes;
use drover_proto::gossip as pb;
use thiserror::Error;

use crate::core::{BOUNDS, Entry, Load, Record, RecordError, SignedRecord, State};

/// A message over a connection that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A record is missing where one belongs.
    #[error("a record is missing")]
    NoRecord,
    /// The bytes are no record.
    #[error("not a record")]
    Record(#[source] RecordError),
    /// A signature or certificate of the wrong length.
    #[error("a signature or certificate of the wrong length")]
    Length,
    /// A state or load that nobody has.
    #[error("a state or load that nobody has")]
    State,
}

/// For sending. Fails only for a record that its own node should not have made.
pub fn record_to(record: &SignedRecord) -> Result<pb::SignedRecord, Malformed> {
    Ok(pb::SignedRecord {
        record: record.record.encode().map_err(Malformed::Record)?.into(),
        signature: Bytes::copy_from_slice(&record.signature),
        certificate: Bytes::copy_from_slice(&record.cert),
    })
}

/// As received; the signature has yet to be checked.
pub fn record_from(message: Option<pb::SignedRecord>) -> Result<SignedRecord, Malformed> {
    let message = message.ok_or(Malformed::NoRecord)?;
    let record = Record::decode(&message.record).map_err(Malformed::Record)?;
    let signature = message.signature.as_ref().try_into().map_err(|_| Malformed::Length)?;
    if message.certificate.len() > BOUNDS.cert {
        return Err(Malformed::Length);
    }
    Ok(SignedRecord::new(record, signature, Arc::from(message.certificate.as_ref())))
}

/// For sending, in parts of at most `part` entries. A member whose record cannot be encoded is left out.
pub fn entries_to(entries: &[Entry], part: usize) -> Vec<Vec<pb::Entry>> {
    let encoded: Vec<pb::Entry> = entries
        .iter()
        .filter_map(|entry| {
            let state = match entry.state {
                State::Alive => pb::EntryState::Alive,
                State::Suspect => pb::EntryState::Suspect,
                State::Dead => pb::EntryState::Dead,
                State::Left => pb::EntryState::Left,
            };
            Some(pb::Entry {
                record: Some(record_to(&entry.record).ok()?),
                state: state.into(),
                age_ms: entry.age_ms,
                load_score: u32::from(entry.load.score),
                overloaded: entry.load.overloaded,
                load_seq: u32::from(entry.load.seq),
            })
        })
        .collect();
    encoded.chunks(part.max(1)).map(<[pb::Entry]>::to_vec).collect()
}

/// As received.
pub fn entries_from(entries: Vec<pb::Entry>) -> Result<Vec<Entry>, Malformed> {
    let read = |entry: pb::Entry| {
        let state = match entry.state() {
            pb::EntryState::Alive => State::Alive,
            pb::EntryState::Suspect => State::Suspect,
            pb::EntryState::Dead => State::Dead,
            pb::EntryState::Left => State::Left,
            pb::EntryState::Unspecified => return Err(Malformed::State),
        };
        let score = u8::try_from(entry.load_score).ok().filter(|score| *score <= 200).ok_or(Malformed::State)?;
        let seq = u16::try_from(entry.load_seq).map_err(|_| Malformed::State)?;
        let load = Load { score, overloaded: entry.overloaded, seq };
        Ok(Entry { record: Arc::new(record_from(entry.record)?), state, age_ms: entry.age_ms, load })
    };
    entries.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::record;
    use super::*;

    #[test]
    fn entries_come_back_as_they_were() {
        let entry = |id: &str, state| Entry {
            record: Arc::new(record(id, [("a".to_owned(), "b".to_owned())].into(), b"cert")),
            state,
            age_ms: 7,
            load: Load { score: 200, overloaded: true, seq: 65_535 },
        };
        let entries = vec![entry("a", State::Alive), entry("b", State::Left), entry("c", State::Dead)];
        let parts = entries_to(&entries, 2);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
        let mut message = parts.concat();
        assert_eq!(entries_from(message.clone()).unwrap(), entries);
        message[0].state = 0;
        assert_eq!(entries_from(message.clone()), Err(Malformed::State));
        message[0].state = 1;
        message[1].load_score = 201;
        assert_eq!(entries_from(message.clone()), Err(Malformed::State));
        message[1].load_score = 0;
        message[2].record.as_mut().unwrap().signature.truncate(63);
        assert_eq!(entries_from(message.clone()), Err(Malformed::Length));
        message[2].record = None;
        assert_eq!(entries_from(message), Err(Malformed::NoRecord));
    }
}
