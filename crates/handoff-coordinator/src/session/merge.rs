//! One log out of the journals of all epochs.
//!
//! Each owner writes a journal of its own, and may have written records at its end that no later owner counted: it was late, and
//! never said what they say. The first record of a journal tells whom its owner followed, and from where: there the earlier one ends.
//!
//! Which journals count is read backwards from the newest one, each naming the one before it. Their numbers alone would not say it: an
//! owner that was overtaken before it had written anything may begin its journal long after a later owner has read and begun its own. Such a
//! journal begins at a number that the later owner took from somebody else's, and nobody follows it.

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

/// How a journal begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Head {
    /// Number of its first record.
    #[serde(rename = "seq")]
    pub first: u64,
    /// Whose journal it is.
    pub epoch: Epoch,
    /// Whose records come before it; unset when there are none, and in journals of programs that did not say so.
    #[serde(default)]
    pub follows: Option<Epoch>,
}

/// Reads how a journal begins, from its first line. Nothing when its owner never came to write it: then it counts for nothing.
pub fn begins(epoch: Epoch, first_line: &[u8]) -> Option<Head> {
    let head: Head = serde_json::from_slice(first_line.strip_suffix(b"\n")?).ok()?;
    (head.epoch == epoch).then_some(head)
}

/// What counts of each journal that counts, in the order of their epochs. When one that is followed is not there the spans begin behind it:
/// whoever reads them has a checkpoint of what came before, or sees that something is missing.
pub fn spans(mut heads: Vec<Head>) -> Vec<Span> {
    heads.sort_unstable_by_key(|head| head.epoch);
    let (mut spans, mut end) = (Vec::new(), None);
    let mut next = heads.last();
    while let Some(Head { epoch, first, follows }) = next.copied() {
        spans.push(Span { epoch, first, end });
        end = Some(first);
        let mut before = heads.iter().rev().filter(|head| head.epoch < epoch && head.first < first);
        next = match follows {
            Some(followed) => before.find(|head| head.epoch == followed),
            None => before.next(),
        };
    }
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

    fn head(epoch: u64, first: u64, follows: Option<u64>) -> Head {
        Head { first, epoch: Epoch(epoch), follows: follows.map(Epoch) }
    }

    fn span(epoch: u64, first: u64, end: Option<u64>) -> Span {
        Span { epoch: Epoch(epoch), first, end }
    }

    #[test]
    fn a_later_owner_decides_where_the_earlier_ones_end() {
        let got = spans(vec![head(1, 1, None), head(4, 6, Some(1)), head(2, 8, Some(1))]);
        assert_eq!(got, [span(1, 1, Some(6)), span(4, 6, None)], "the owner of 2 was overtaken before it counted");
        assert!(got[0].counts(5) && !got[0].counts(6) && got[1].counts(600));
    }

    #[test]
    fn a_journal_that_was_begun_after_a_later_owner_had_read_counts_for_nothing() {
        // The owner of 2 read five records of 1 and was stopped. That of 1, not knowing of it, wrote four more; that of 3 read all nine and
        // went on. Only then the first record of 2 came to the disk.
        let got = spans(vec![head(1, 1, None), head(2, 6, Some(1)), head(3, 10, Some(1))]);
        assert_eq!(got, [span(1, 1, Some(10)), span(3, 10, None)]);
        // When the owner of 3 never came to write anything, whoever reads next follows 2, for good.
        let got = spans(vec![head(1, 1, None), head(2, 6, Some(1)), head(4, 8, Some(2))]);
        assert_eq!(got, [span(1, 1, Some(6)), span(2, 6, Some(8)), span(4, 8, None)]);
    }

    #[test]
    fn journals_that_do_not_say_whom_they_follow_are_read_by_their_numbers() {
        let got = spans(vec![head(1, 1, None), head(4, 6, None), head(2, 8, None), head(5, 9, Some(4))]);
        assert_eq!(got, [span(1, 1, Some(6)), span(4, 6, Some(9)), span(5, 9, None)]);
    }

    #[test]
    fn what_a_checkpoint_has_taken_in_need_not_be_there() {
        assert_eq!(spans(vec![head(7, 40, Some(6)), head(9, 44, Some(7))]), [span(7, 40, Some(44)), span(9, 44, None)]);
        assert_eq!(spans(Vec::new()), []);
        // One that claims to follow itself or a later one is damaged; the reader then finds that records are missing.
        assert_eq!(spans(vec![head(1, 1, None), head(2, 5, Some(2))]), [span(2, 5, None)]);
    }

    #[test]
    fn a_journal_that_was_never_begun_counts_for_nothing() {
        let line = b"{\"v\":1,\"seq\":9,\"type\":\"epoch\",\"epoch\":3,\"owner\":{\"node\":\"a/0\",\"boot\":1},\"follows\":2}\n";
        assert_eq!(begins(Epoch(3), line), Some(head(3, 9, Some(2))));
        let older = b"{\"v\":1,\"seq\":9,\"type\":\"epoch\",\"epoch\":3,\"owner\":{\"node\":\"a/0\",\"boot\":1}}\n";
        assert_eq!(begins(Epoch(3), older), Some(head(3, 9, None)));
        for none in [&line[..line.len() - 1], b"", b"{\"v\":1,\"seq\":9}\n"] {
            assert_eq!(begins(Epoch(3), none), None);
        }
        assert_eq!(begins(Epoch(2), line), None);
    }
}
