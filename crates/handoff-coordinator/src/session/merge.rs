//! One log out of the journals of all epochs.
//!
//! Each owner writes a journal of its own, and may have written records at its end that no later owner counted: it was late, and
//! never said what they say. The first record of a journal tells where its owner began, and that is where those before it end.

use drover_types::Epoch;
use serde::Deserialize;

/// What of one epoch's journal counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The epoch.
    pub epoch: Epoch,
    /// Number of its first record.
    pub first: u64,
    /// Number of the first record that does not count; unset for the last owner's.
    pub end: Option<u64>,
}

#[derive(Deserialize)]
struct Head {
    seq: u64,
    epoch: Epoch,
}

/// Reads where a journal begins, from its first line. Nothing when its owner never came to write it: then it counts for nothing.
pub fn begins(epoch: Epoch, first_line: &[u8]) -> Option<(Epoch, u64)> {
    let head: Head = serde_json::from_slice(first_line.strip_suffix(b"\n")?).ok()?;
    (head.epoch == epoch).then_some((epoch, head.seq))
}

/// What counts of each journal, in the order of their epochs.
pub fn spans(mut begins: Vec<(Epoch, u64)>) -> Vec<Span> {
    begins.sort_unstable();
    let mut end = None::<u64>;
    let mut spans: Vec<Span> = begins
        .into_iter()
        .rev()
        .map(|(epoch, first)| {
            let span = Span { epoch, first, end };
            end = Some(end.map_or(first, |end| end.min(first)));
            span
        })
        .collect();
    spans.reverse();
    spans
}

impl Span {
    /// Whether a record of this number counts.
    pub fn counts(&self, seq: u64) -> bool {
        seq >= self.first && self.end.is_none_or(|end| seq < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_owner_decides_where_the_earlier_ones_end() {
        let got = spans(vec![(Epoch(1), 1), (Epoch(4), 6), (Epoch(2), 8)]);
        let want = [(1, 1, Some(6)), (2, 8, Some(6)), (4, 6, None)];
        let want = want.map(|(epoch, first, end)| Span { epoch: Epoch(epoch), first, end });
        assert_eq!(got, want);
        assert!(!(0..20).any(|seq| got[1].counts(seq)), "its owner was overtaken before it counted");
        assert!(got[0].counts(5) && !got[0].counts(6) && got[2].counts(600));
    }

    #[test]
    fn a_journal_that_was_never_begun_counts_for_nothing() {
        let line = b"{\"v\":1,\"seq\":9,\"type\":\"epoch\",\"epoch\":3,\"owner\":{\"node\":\"a/0\",\"boot\":1}}\n";
        assert_eq!(begins(Epoch(3), line), Some((Epoch(3), 9)));
        for none in [&line[..line.len() - 1], b"", b"{\"v\":1,\"seq\":9}\n"] {
            assert_eq!(begins(Epoch(3), none), None);
        }
        assert_eq!(begins(Epoch(2), line), None);
    }
}
