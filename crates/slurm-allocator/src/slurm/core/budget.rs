//! How many requests per minute the controller gets from us. A call of one of Slurm's programs makes one to three, which is what
//! `sdiag` counts.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::Micros;

const MINUTE: Micros = 60_000_000;
/// The most requests that one call makes.
const DEAREST: u32 = 3;

/// The requests of the last minute.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    per_minute: usize,
    begun: VecDeque<Begun>,
}

/// When a request was made, and for what.
pub(crate) type Begun = (Micros, Purpose);

/// What a call is for. Looks at the queue tell how everything else went, and everything else is what they are for: each leaves the
/// other some room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Purpose {
    Look,
    Other,
}

impl Budget {
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { per_minute: per_minute.max(DEAREST + 1) as usize, begun: VecDeque::new() }
    }

    /// Goes on from the calls of an earlier allocator. A clock that was set back since makes them count from now.
    pub(crate) fn restore(&mut self, now: Micros, begun: &[Begun]) {
        let counts = begun.iter().map(|(at, purpose)| ((*at).min(now), *purpose));
        self.begun.extend(counts.filter(|(at, _)| at + MINUTE > now));
        self.begun.make_contiguous().sort_unstable();
    }

    /// When the requests that still count were made.
    pub(crate) fn begun(&self) -> Vec<Begun> {
        self.begun.iter().copied().collect()
    }

    /// Takes a call that makes so many requests, or says when there may be one again.
    pub(crate) fn take(&mut self, now: Micros, purpose: Purpose, requests: u32) -> Result<(), Micros> {
        let requests = requests.clamp(1, DEAREST) as usize;
        while self.begun.front().is_some_and(|(begun, _)| begun + MINUTE <= now) {
            self.begun.pop_front();
        }
        let own_most = self.per_minute - (self.per_minute / 5).max(1);
        let own: Vec<Micros> = self.begun.iter().filter(|(_, of)| *of == purpose).map(|(at, _)| *at).collect();
        // So many must have left the window that these are within the limit.
        let last_over = |count: usize, most: usize| (count + requests).checked_sub(most + 1);
        let for_all = last_over(self.begun.len(), self.per_minute).and_then(|over| Some(self.begun.get(over)?.0));
        let for_own = last_over(own.len(), own_most).and_then(|over| own.get(over).copied());
        if let Some(leaves) = for_all.max(for_own) {
            return Err(leaves + MINUTE);
        }
        self.begun.extend(std::iter::repeat_n((now, purpose), requests));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_makes_no_room() {
        let mut budget = Budget::new(5);
        for now in [100, 200, 300, 400] {
            budget.take(now, Purpose::Look, 1).unwrap();
        }
        let text = serde_json::to_string(&budget.begun()).unwrap();
        let begun: Vec<Begun> = serde_json::from_str(&text).unwrap();
        let again = |now| {
            let mut budget = Budget::new(5);
            budget.restore(now, &begun);
            budget.take(now, Purpose::Look, 1)
        };
        assert_eq!(again(500), Err(100 + MINUTE));
        assert_eq!(again(50), Err(50 + MINUTE), "nobody knows how long ago they were");
        assert_eq!(again(400 + MINUTE), Ok(()));
    }

    #[test]
    fn no_minute_has_more_calls_than_allowed_and_neither_kind_starves_the_other() {
        for (first, second) in [(Purpose::Look, Purpose::Other), (Purpose::Other, Purpose::Look)] {
            let mut budget = Budget::new(10);
            let taken = (0..20).filter(|now| budget.take(*now, first, 1).is_ok()).count();
            assert_eq!(taken, 8);
            assert!(budget.take(20, second, 1).is_ok() && budget.take(21, second, 1).is_ok());
            assert_eq!(budget.take(22, second, 1), Err(MINUTE), "the first of all must have left");
            assert_eq!(budget.take(22, first, 1), Err(MINUTE), "or the first of its kind");
            assert!(budget.take(MINUTE, second, 1).is_ok());
        }
        // A dear call waits until there is room for all of it.
        let mut budget = Budget::new(10);
        assert!(budget.take(0, Purpose::Look, 3).is_ok() && budget.take(1, Purpose::Look, 3).is_ok());
        assert_eq!(budget.take(2, Purpose::Look, 3), Err(MINUTE), "eight at most are looks");
        assert!(budget.take(2, Purpose::Other, 3).is_ok() && budget.take(3, Purpose::Other, 1).is_ok());
        assert_eq!(budget.take(4, Purpose::Other, 2), Err(MINUTE));
        assert_eq!(budget.take(MINUTE, Purpose::Other, 3), Ok(()));
        assert_eq!(budget.take(MINUTE, Purpose::Other, 1), Err(1 + MINUTE), "three have left, three came");
        let mut least = Budget::new(4);
        assert!(least.take(0, Purpose::Look, 3).is_ok() && least.take(0, Purpose::Other, 1).is_ok());

        let mut times = Vec::new();
        let mut budget = Budget::new(7);
        for now in (0..600_000_000).step_by(450_000) {
            let purpose = if now % 900_000 == 0 { Purpose::Look } else { Purpose::Other };
            if budget.take(now, purpose, 1).is_ok() {
                times.push(now);
            }
        }
        assert!(times.len() >= 7 * 9, "{}", times.len());
        assert!(times.windows(8).all(|eight| eight[7] - eight[0] >= MINUTE));
    }
}
