//! How far a reader has come.

use serde::{Deserialize, Serialize};

/// How far a reader has come in a stream. It stands at the start of a line, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cursor {
    /// Number of the segment, from 1.
    pub segment: u32,
    /// Byte offset in that segment of the first byte not yet read.
    pub offset: u64,
    /// Sequence number of the last record read, 0 before the first.
    pub seq: u64,
}

impl Default for Cursor {
    fn default() -> Self {
        Self { segment: 1, offset: 0, seq: 0 }
    }
}

/// What a record's sequence number says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeqStep {
    /// The one that was expected.
    Next,
    /// It was read before: nothing is to be done.
    Seen,
    /// Records between the last one and this one are missing; this one is still to be taken.
    Gap {
        /// How many are missing.
        missing: u64,
    },
}

impl Cursor {
    /// Compares a record's sequence number with the last one. Does not move the cursor.
    pub fn step(&self, seq: u64) -> SeqStep {
        match seq.checked_sub(self.seq) {
            None | Some(0) => SeqStep::Seen,
            Some(1) => SeqStep::Next,
            Some(ahead) => SeqStep::Gap { missing: ahead - 1 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_number_is_next_seen_or_behind_a_gap() {
        let cursor = Cursor { seq: 4, ..Cursor::default() };
        let steps: Vec<SeqStep> = [0, 4, 5, 6, u64::MAX].iter().map(|seq| cursor.step(*seq)).collect();
        assert_eq!(
            steps,
            [
                SeqStep::Seen,
                SeqStep::Seen,
                SeqStep::Next,
                SeqStep::Gap { missing: 1 },
                SeqStep::Gap { missing: u64::MAX - 5 }
            ]
        );
        assert_eq!(Cursor::default().step(1), SeqStep::Next);
    }
}
