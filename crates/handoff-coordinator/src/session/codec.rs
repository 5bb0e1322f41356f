//! Records as lines. A line is one JSON object with the format version and the record's number; whoever reads a log checks that
//! the numbers count up by one.
//!
//! Version 1: the first.

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::record::Record;
use crate::core::{Digest, Outline, OutlineError};

const VERSION: u32 = 1;

#[derive(Serialize)]
struct Written<'a> {
    v: u32,
    seq: u64,
    #[serde(flatten)]
    record: &'a Record,
}

#[derive(Deserialize)]
struct Read {
    v: u32,
    seq: u64,
    #[serde(flatten)]
    record: Record,
}

/// A line that is no record of ours, or not the one that is due.
#[derive(Debug, Error)]
pub enum CodecError {
    /// No JSON, or none of our shapes.
    #[error("record {due} cannot be read")]
    Malformed {
        /// The number that was due.
        due: u64,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error(
        "record {due} has format version {version}, this program reads {VERSION}; use the version that wrote it or a later one"
    )]
    Version {
        /// The number that was due.
        due: u64,
        /// Its version.
        version: u32,
    },
    /// Something is missing or twice.
    #[error("record {found} stands where {due} is due")]
    OutOfOrder {
        /// The number that was due.
        due: u64,
        /// What stands there.
        found: u64,
    },
    /// It does not follow from those before.
    #[error("record {due} does not follow from those before it")]
    Inconsistent {
        /// Its number.
        due: u64,
        /// What is wrong.
        #[source]
        source: OutlineError,
    },
}

/// Adds the line of a record, with its end, to a buffer.
pub fn encode(seq: u64, record: &Record, into: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    serde_json::to_writer(&mut *into, &Written { v: VERSION, seq, record })?;
    into.push(b'\n');
    Ok(())
}

/// Reads one line, without its end.
pub fn decode(line: &[u8], due: u64) -> Result<Record, CodecError> {
    let read: Read = serde_json::from_slice(line).map_err(|source| CodecError::Malformed { due, source })?;
    if read.v != VERSION {
        return Err(CodecError::Version { due, version: read.v });
    }
    if read.seq != due {
        return Err(CodecError::OutOfOrder { due, found: read.seq });
    }
    Ok(read.record)
}

/// A log read so far: how many bytes, what they add up to, and what the core has to know of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogSum {
    /// Bytes of whole records.
    pub len: u64,
    /// The digest of those bytes: of each line together with the digest before it.
    pub digest: Digest,
    /// What they say.
    pub outline: Outline,
}

impl LogSum {
    /// Takes the next line, with its end.
    pub fn line(&mut self, line: &[u8]) -> Result<Record, CodecError> {
        let due = self.outline.seq() + 1;
        let record = decode(line.strip_suffix(b"\n").unwrap_or(line), due)?;
        self.outline.apply(&record).map_err(|source| CodecError::Inconsistent { due, source })?;
        self.add(line);
        Ok(record)
    }

    /// Counts a line in whose record the outline has already.
    pub fn add(&mut self, line: &[u8]) {
        let mut hash = Context::new(&SHA256);
        hash.update(&self.digest.0);
        hash.update(line);
        self.digest.0.copy_from_slice(hash.finish().as_ref());
        self.len += line.len() as u64;
    }

    /// Takes whole lines; what is left over at the end of `bytes` is the beginning of a line. Says how many bytes it took.
    pub fn lines(&mut self, bytes: &[u8]) -> Result<usize, CodecError> {
        let mut taken = 0;
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if line.ends_with(b"\n") {
                self.line(line)?;
                taken += line.len();
            }
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use drover_types::Epoch;

    use super::*;
    use crate::core::{NodeId, Owner};

    fn first() -> Record {
        Record::Epoch { epoch: Epoch(1), owner: Owner { node: NodeId::new("swarm/0"), boot: 7 }, follows: None }
    }

    #[test]
    fn a_line_reads_as_it_was_written_and_nothing_else_does() {
        let mut line = Vec::new();
        encode(1, &first(), &mut line).unwrap();
        assert_eq!(
            String::from_utf8(line.clone()).unwrap(),
            "{\"v\":1,\"seq\":1,\"type\":\"epoch\",\"epoch\":1,\"owner\":{\"node\":\"swarm/0\",\"boot\":7}}\n"
        );
        let mut log = LogSum::default();
        assert_eq!(log.line(&line).unwrap(), first());
        assert_eq!(log.len, line.len() as u64);
        assert!(matches!(log.line(&line), Err(CodecError::OutOfOrder { due: 2, found: 1 })));
        let later = String::from_utf8(line.clone()).unwrap().replace("\"v\":1", "\"v\":2");
        assert!(matches!(decode(later.as_bytes(), 1), Err(CodecError::Version { version: 2, .. })));
        assert!(matches!(decode(&line[..20], 1), Err(CodecError::Malformed { .. })));
    }

    #[test]
    fn the_digest_tells_every_order_and_every_cut_apart() {
        let mut sums = Vec::new();
        for lines in [&[b"a\n".as_slice(), b"b\n"][..], &[b"b\n", b"a\n"], &[b"a\nb\n"], &[b"a\n"]] {
            let mut log = LogSum::default();
            for line in lines {
                log.add(line);
            }
            sums.push(log.digest);
        }
        sums.dedup();
        assert_eq!(sums.len(), 4);
    }

    #[test]
    fn half_a_line_waits_for_its_other_half() {
        let mut line = Vec::new();
        encode(1, &first(), &mut line).unwrap();
        let mut log = LogSum::default();
        assert_eq!(log.lines(&line[..line.len() - 1]).unwrap(), 0);
        assert_eq!(log, LogSum::default());
        assert_eq!(log.lines(&line).unwrap(), line.len());
    }
}
