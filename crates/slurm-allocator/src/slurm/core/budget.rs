//! How many calls per minute the controller gets from us.

use std::collections::VecDeque;

use super::Micros;

const MINUTE: Micros = 60_000_000;

/// The calls of the last minute.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    per_minute: usize,
    begun: VecDeque<Micros>,
}

/// What a call is for. Looks at the queue tell how everything else went, so some room is always left to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Look,
    Other,
}

impl Budget {
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { per_minute: per_minute.max(2) as usize, begun: VecDeque::new() }
    }

    /// Takes one call, or says when there may be one again.
    pub(crate) fn take(&mut self, now: Micros, purpose: Purpose) -> Result<(), Micros> {
        while self.begun.front().is_some_and(|&begun| begun + MINUTE <= now) {
            self.begun.pop_front();
        }
        let reserve = if purpose == Purpose::Look { 0 } else { (self.per_minute / 5).max(1) };
        let most = self.per_minute - reserve;
        if self.begun.len() < most {
            self.begun.push_back(now);
            return Ok(());
        }
        // So many must have left the window that one more is below the limit.
        let waits_for = self.begun.len() - most;
        Err(self.begun.get(waits_for).map_or(now, |begun| begun + MINUTE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_minute_has_more_calls_than_allowed_and_looks_have_room_left() {
        let mut budget = Budget::new(10);
        let taken = (0..20).filter(|n| budget.take(*n, Purpose::Other).is_ok()).count();
        assert_eq!(taken, 8);
        assert!(budget.take(20, Purpose::Look).is_ok() && budget.take(21, Purpose::Look).is_ok());
        let again = budget.take(22, Purpose::Look).unwrap_err();
        assert_eq!(again, MINUTE);
        assert_eq!(budget.take(22, Purpose::Other), Err(MINUTE + 2), "two more must have left");
        assert!(budget.take(again, Purpose::Look).is_ok());
        let mut times = Vec::new();
        let mut budget = Budget::new(7);
        for now in (0..600_000_000).step_by(900_000) {
            if budget.take(now, Purpose::Look).is_ok() {
                times.push(now);
            }
        }
        assert!(times.len() >= 7 * 9, "{}", times.len());
        assert!(times.windows(8).all(|eight| eight[7] - eight[0] >= MINUTE));
    }
}
