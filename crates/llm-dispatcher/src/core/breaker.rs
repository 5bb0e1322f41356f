//! Leaves a lane alone that only fails, and finds out with single calls when it works again.

use std::time::Duration;

use super::task::AttemptId;
use crate::call::FailureKind;

/// Failures in a row that open it; among many calls at once more of them, because those that fail are often the quickest to end.
const IN_A_ROW: u32 = 10;
const SHARE_OF_CALLS: u32 = 4;

/// Or so many among the last [`WINDOW`].
const OF_WINDOW: u32 = 15;
const WINDOW: u32 = 20;

/// How long it stays open at first; twice as long after each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How long it stays open when the lane cannot work and nobody said until when.
const HARD_PAUSE: Duration = Duration::from_secs(30);

/// What a breaker does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls go.
    Closed,
    /// No calls until then.
    Open {
        /// When one call may find out.
        until: Duration,
    },
    /// One call is finding out.
    HalfOpen {
        /// Which.
        probe: AttemptId,
    },
}

/// The breaker of one lane.
#[derive(Debug, Clone)]
pub struct Breaker {
    state: BreakerState,
    failures: u32,
    in_a_row: u32,
    /// Calls that ended since it closed.
    ended: u32,
    /// How often it opened without closing in between.
    trips: u32,
    /// It was opened because of what the lane is, such as a wrong key, and not because it is down.
    hard: Option<FailureKind>,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: BreakerState::Closed, failures: 0, in_a_row: 0, ended: 0, trips: 0, hard: None }
    }
}

impl Breaker {
    /// A call may go now.
    pub fn allows(&self, now: Duration) -> bool {
        match self.state {
            BreakerState::Closed => true,
            BreakerState::Open { until } => now >= until,
            BreakerState::HalfOpen { .. } => false,
        }
    }

    /// What it does at the moment.
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// Why the lane cannot work at all, when that is known.
    pub fn hard(&self) -> Option<FailureKind> {
        self.hard
    }

    /// A call begins.
    pub fn started(&mut self, attempt: AttemptId) {
        if matches!(self.state, BreakerState::Open { .. }) {
            self.state = BreakerState::HalfOpen { probe: attempt };
        }
    }

    /// The lane did its part. Says whether that closed the breaker.
    pub fn succeeded(&mut self, attempt: AttemptId) -> bool {
        match self.state {
            BreakerState::Closed => {
                self.failures <<= 1;
                self.ended = self.ended.saturating_add(1);
                self.in_a_row = 0;
                false
            }
            BreakerState::HalfOpen { probe } if probe == attempt => {
                *self = Self::default();
                true
            }
            BreakerState::HalfOpen { .. } | BreakerState::Open { .. } => false,
        }
    }

    /// The lane failed, with so many calls under way. Says until when the breaker is open, when that opened it. `luck` in 0..1
    /// spreads the pauses.
    pub fn failed(&mut self, now: Duration, attempt: AttemptId, in_flight: u32, luck: f64) -> Option<Duration> {
        match self.state {
            BreakerState::Closed => {
                self.failures = self.failures << 1 | 1;
                self.in_a_row += 1;
                self.ended = self.ended.saturating_add(1);
                let recent = (self.failures & ((1 << WINDOW) - 1)).count_ones();
                let row = self.in_a_row >= IN_A_ROW.max(in_flight / SHARE_OF_CALLS);
                let most = recent >= OF_WINDOW && self.ended >= in_flight;
                (row || most).then(|| self.open(now, luck))
            }
            BreakerState::HalfOpen { probe } if probe == attempt => Some(self.open(now, luck)),
            BreakerState::HalfOpen { .. } | BreakerState::Open { .. } => None,
        }
    }

    /// The one call that was finding out ended without a word about the lane.
    pub fn ended(&mut self, now: Duration, attempt: AttemptId) {
        if self.state == (BreakerState::HalfOpen { probe: attempt }) {
            self.state = BreakerState::Open { until: now };
        }
    }

    /// The lane cannot work, for a reason that waiting a second does not mend.
    pub fn trip(&mut self, now: Duration, pause: Option<Duration>, why: FailureKind) -> Duration {
        let until = now + pause.unwrap_or(HARD_PAUSE).max(FIRST_PAUSE);
        self.hard = Some(why);
        self.state = BreakerState::Open { until };
        until
    }

    fn open(&mut self, now: Duration, luck: f64) -> Duration {
        let pause = (FIRST_PAUSE * 2_u32.saturating_pow(self.trips.min(16))).min(LONGEST_PAUSE);
        let until = now + pause.mul_f64(0.75 + 0.5 * luck);
        self.trips += 1;
        self.failures = 0;
        self.in_a_row = 0;
        self.ended = 0;
        self.state = BreakerState::Open { until };
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_tries_one_call_and_closes() {
        let mut breaker = Breaker::default();
        let opened = (0..IN_A_ROW).find_map(|call| breaker.failed(Duration::ZERO, AttemptId(call.into()), 1, 0.5));
        assert_eq!(opened, Some(FIRST_PAUSE));
        assert!(!breaker.allows(Duration::from_millis(999)) && breaker.allows(FIRST_PAUSE));
        breaker.started(AttemptId(100));
        assert!(!breaker.allows(FIRST_PAUSE), "only one finds out");
        assert!(!breaker.succeeded(AttemptId(3)), "an old call says nothing");
        assert_eq!(breaker.failed(FIRST_PAUSE, AttemptId(100), 1, 0.5), Some(FIRST_PAUSE + 2 * FIRST_PAUSE));
        breaker.started(AttemptId(101));
        assert!(breaker.succeeded(AttemptId(101)) && breaker.allows(Duration::ZERO));
    }

    #[test]
    fn a_sixth_of_failures_never_opens_it() {
        let mut breaker = Breaker::default();
        for call in 0..100_000_u64 {
            if call % 6 == 0 {
                assert_eq!(breaker.failed(Duration::ZERO, AttemptId(call), 1, 0.5), None);
            } else {
                breaker.succeeded(AttemptId(call));
            }
        }
    }
}
