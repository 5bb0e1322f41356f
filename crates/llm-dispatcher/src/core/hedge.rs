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

/// So many calls decide whether the provider is slow as a whole.
const WINDOW: u32 = u64::BITS;

/// Beside more calls under way than this it is no matter how many there are.
const MANY: usize = 500;

/// What is known of one kind of work on one lane.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    latencies: Latencies,
    /// The last calls that ended, the newest lowest: a bit is set for a slow one.
    verdicts: u64,
    judged: u32,
    threshold: Option<Duration>,
    since_threshold: u32,
    /// Hedging is off because too many calls are slow.
    pub(super) off: bool,
}

impl Tail {
    /// An answer came after so long.
    pub(super) fn answered(&mut self, settings: &HedgeSettings, took: Duration) {
        self.latencies.record(took);
        self.since_threshold += 1;
        if let Some(threshold) = self.threshold {
            self.judge(took > threshold);
        }
        let enough = self.latencies.total >= settings.min_samples as f32;
        // A threshold is worth renewing when a tenth more is known.
        if enough && (self.threshold.is_none() || self.since_threshold >= 64.min(self.latencies.total as u32 / 8)) {
            self.since_threshold = 0;
            self.threshold = Some(self.latencies.quantile(settings.quantile).mul_f64(settings.stretch));
        }
    }

    /// A slow call was given up before it was answered.
    pub(super) fn given_up(&mut self) {
        self.judge(true);
    }

    /// From when on a call is slow; `None` while that is not known. The first answers of many calls are the quickest of them,
    /// so as many must have come as are still awaited.
    pub(super) fn threshold(&self, under_way: usize) -> Option<Duration> {
        self.threshold.filter(|_| self.latencies.total >= under_way.min(MANY) as f32)
    }

    /// So many of the recent calls are slow that it is the provider. Among them are those under way that are slow by now.
    pub(super) fn all_slow(&self, settings: &HedgeSettings, under_way: u32) -> bool {
        let under_way = under_way.min(WINDOW);
        let ended = self.judged.min(WINDOW - under_way);
        let newest = u64::MAX.checked_shr(WINDOW - ended).unwrap_or(0);
        let slow = under_way + (self.verdicts & newest).count_ones();
        let known = under_way + ended;
        known >= settings.min_samples && f64::from(slow) > settings.off_above * f64::from(known)
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
            tail.answered(&settings, Duration::from_millis(200 + call % 4));
            assert_eq!(tail.threshold(0), None, "too few to say");
        }
        for call in 0..200 {
            tail.answered(&settings, Duration::from_millis(if call % 20 == 0 { 2000 } else { 200 + call % 4 }));
        }
        let threshold = tail.threshold(100).unwrap();
        assert!((Duration::from_millis(205)..Duration::from_millis(245)).contains(&threshold), "{threshold:?}");
        assert_eq!(tail.threshold(300), None, "most of those that were asked together have not answered");
    }

    #[test]
    fn when_most_are_slow_it_is_the_provider_until_that_is_usual() {
        let settings = HedgeSettings::default();
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.answered(&settings, Duration::from_millis(200));
        }
        assert!(!tail.all_slow(&settings, 5) && tail.all_slow(&settings, 20) && tail.all_slow(&settings, 1000));
        assert!(!tail.all_slow(&settings, 5), "those that were late have come after all");
        for _ in 0..20 {
            tail.given_up();
        }
        assert!(tail.all_slow(&settings, 0));
        for _ in 0..300 {
            tail.answered(&settings, Duration::from_secs(2));
        }
        assert!(!tail.all_slow(&settings, 5));
    }
}
