//! Which calls are slow, learnt from those that were answered; and how many second tries that is worth.

use std::time::Duration;

use super::settings::HedgeSettings;

/// Answer times from a millisecond to ten minutes, in steps of six percent.
const BUCKETS: usize = 230;
const STEP: f64 = 1.06;
const SHORTEST: f64 = 0.001;

/// So many answers are remembered fully; older ones fade.
const MEMORY: f32 = 2000.0;

/// How answer times of one kind of work on one lane are spread.
#[derive(Debug, Clone)]
pub(super) struct Latencies {
    buckets: Box<[f32; BUCKETS]>,
    total: f32,
    sum: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: Box::new([0.0; BUCKETS]), total: 0.0, sum: 0.0 }
    }
}

impl Latencies {
    fn record(&mut self, took: Duration) {
        let steps = (took.as_secs_f64() / SHORTEST).max(1.0).ln() / STEP.ln();
        self.buckets[(steps as usize).min(BUCKETS - 1)] += 1.0;
        self.total += 1.0;
        self.sum += took.as_secs_f64();
        if self.total >= MEMORY {
            for bucket in self.buckets.iter_mut() {
                *bucket *= 0.5;
            }
            self.total *= 0.5;
            self.sum *= 0.5;
        }
    }

    /// At most so long took that share of the answers.
    fn quantile(&self, share: f64) -> Duration {
        let wanted = f64::from(self.total) * share;
        let mut seen = 0.0;
        let index = self.buckets.iter().position(|&count| {
            seen += f64::from(count);
            seen >= wanted
        });
        Duration::from_secs_f64(SHORTEST * STEP.powf(index.unwrap_or(BUCKETS - 1) as f64 + 1.0))
    }
}

/// What is known of one kind of work on one lane.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    latencies: Latencies,
    /// The last 64 calls of which it is known: a bit is set for a slow one.
    verdicts: u64,
    judged: u32,
    threshold: Option<Duration>,
    since_threshold: u32,
    /// Hedging is off because too many calls are slow.
    pub(super) off: bool,
}

impl Tail {
    /// An answer came after so long. A call that was found slow before is not judged again.
    pub(super) fn answered(&mut self, settings: &HedgeSettings, took: Duration, found_slow: bool) {
        self.latencies.record(took);
        self.since_threshold += 1;
        if !found_slow && self.threshold.is_some() {
            self.judge(false);
        }
        let enough = self.latencies.total >= settings.min_samples as f32;
        // A threshold is worth renewing when a tenth more is known.
        if enough && (self.threshold.is_none() || self.since_threshold >= 64.min(self.latencies.total as u32 / 8)) {
            self.since_threshold = 0;
            self.threshold = Some(self.latencies.quantile(settings.quantile).mul_f64(settings.stretch));
        }
    }

    /// A call has gone on for longer than the threshold.
    pub(super) fn slow(&mut self) {
        self.judge(true);
    }

    /// From when on a call is slow; `None` while that is not known.
    pub(super) fn threshold(&self) -> Option<Duration> {
        self.threshold
    }

    /// So many of the recent calls are slow that it is the provider.
    pub(super) fn all_slow(&self, settings: &HedgeSettings) -> bool {
        let known = self.judged.min(64);
        known >= settings.min_samples && f64::from(self.verdicts.count_ones()) > settings.off_above * f64::from(known)
    }

    /// How long an answer takes on average.
    pub(super) fn mean(&self) -> Option<Duration> {
        (self.latencies.total >= 1.0)
            .then(|| Duration::from_secs_f64(self.latencies.sum / f64::from(self.latencies.total)))
    }

    /// How long nine of ten answers take at most.
    pub(super) fn usual(&self) -> Option<Duration> {
        (self.latencies.total >= 1.0).then(|| self.latencies.quantile(0.9))
    }

    fn judge(&mut self, slow: bool) {
        self.verdicts = self.verdicts << 1 | u64::from(slow);
        self.judged = self.judged.saturating_add(1);
    }
}

/// Keeps hedges in proportion to first tries.
#[derive(Debug, Clone)]
pub(super) struct HedgeBudget {
    ratio: f64,
    burst: f64,
    saved: f64,
}

impl HedgeBudget {
    pub(super) fn new(settings: &HedgeSettings) -> Self {
        Self { ratio: settings.budget_ratio, burst: settings.budget_burst, saved: settings.budget_burst }
    }

    pub(super) fn first_try(&mut self) {
        // What is saved up may exceed the burst while a batch goes out whose slow calls are not known yet.
        self.saved = (self.saved + self.ratio).min(4.0 * self.burst);
    }

    pub(super) fn take(&mut self) -> bool {
        let enough = self.saved >= 1.0;
        if enough {
            self.saved -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_lies_just_above_the_usual_answer() {
        let settings = HedgeSettings::default();
        let mut tail = Tail::default();
        for call in 0..9 {
            tail.answered(&settings, Duration::from_millis(200 + call % 4), false);
            assert_eq!(tail.threshold(), None, "too few to say");
        }
        for call in 0..200 {
            let took = if call % 20 == 0 { 2000 } else { 200 + call % 4 };
            tail.answered(&settings, Duration::from_millis(took), took == 2000);
        }
        let threshold = tail.threshold().unwrap();
        assert!((Duration::from_millis(205)..Duration::from_millis(245)).contains(&threshold), "{threshold:?}");
    }

    #[test]
    fn when_most_are_slow_it_is_the_provider_until_that_is_usual() {
        let settings = HedgeSettings::default();
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.answered(&settings, Duration::from_millis(200), false);
        }
        for _ in 0..5 {
            tail.slow();
        }
        assert!(!tail.all_slow(&settings));
        for _ in 0..15 {
            tail.slow();
        }
        assert!(tail.all_slow(&settings));
        for _ in 0..100 {
            tail.answered(&settings, Duration::from_secs(2), false);
        }
        assert!(!tail.all_slow(&settings));
    }
}
