//! What calls cost, summed up until it is written down.
//!
//! Waking the ledger's thread for every single call would cost more than all else that the ledger does. What is not written down
//! yet is on the safe side: under a cap it was set aside before, and counts until it is charged.

use tokio::time::{Duration, Instant};

use crate::call::Usage;
use crate::core::{LaneId, Money};

/// No charge waits for others for longer than this.
const LONGEST: Duration = Duration::from_millis(20);

/// Calls of one lane on one day, of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) lane: LaneId,
    pub(super) day: u32,
    /// The provider did not say what they cost.
    pub(super) estimated: bool,
    pub(super) calls: u64,
    pub(super) amount: Money,
    pub(super) usage: Usage,
}

/// Charges that are not written down yet.
#[derive(Debug, Default)]
pub(super) struct Charges {
    sums: Vec<Sum>,
    due: Option<Instant>,
}

impl Charges {
    /// Adds a call.
    pub(super) fn add(&mut self, lane: LaneId, day: u32, amount: Money, estimated: bool, usage: Option<Usage>) {
        let usage = usage.unwrap_or_default();
        self.due.get_or_insert_with(|| Instant::now() + LONGEST);
        let same = |sum: &&mut Sum| (sum.lane, sum.day, sum.estimated) == (lane, day, estimated);
        let Some(sum) = self.sums.iter_mut().find(same) else {
            self.sums.push(Sum { lane, day, estimated, calls: 1, amount, usage });
            return;
        };
        sum.calls += 1;
        sum.amount += amount;
        sum.usage.input_tokens = sum.usage.input_tokens.saturating_add(usage.input_tokens);
        sum.usage.cached_input_tokens = sum.usage.cached_input_tokens.saturating_add(usage.cached_input_tokens);
        sum.usage.output_tokens = sum.usage.output_tokens.saturating_add(usage.output_tokens);
        sum.usage.reasoning_tokens = sum.usage.reasoning_tokens.saturating_add(usage.reasoning_tokens);
    }

    /// When they must be written down at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// All of them; none are left.
    pub(super) fn take(&mut self) -> Vec<Sum> {
        self.due = None;
        std::mem::take(&mut self.sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn equal_calls_are_one_sum_and_nothing_is_lost() {
        let mut charges = Charges::default();
        assert_eq!(charges.due(), None);
        let usage = Some(Usage { input_tokens: 3, output_tokens: 5, ..Usage::default() });
        for call in 0..10 {
            charges.add(LaneId(1), 0, Money::from_pico(7), call == 9, usage);
        }
        charges.add(LaneId(2), 0, Money::from_pico(1), false, None);
        charges.add(LaneId(1), 1, Money::from_pico(1), false, usage);
        assert!(charges.due().is_some());
        let sums = charges.take();
        let seen: Vec<_> = sums.iter().map(|sum| (sum.lane.0, sum.day, sum.estimated, sum.calls)).collect();
        assert_eq!(seen, [(1, 0, false, 9), (1, 0, true, 1), (2, 0, false, 1), (1, 1, false, 1)]);
        assert_eq!((sums[0].amount, sums[0].usage.output_tokens), (Money::from_pico(63), 45));
        assert_eq!((charges.due(), charges.take()), (None, Vec::new()));
    }
}
