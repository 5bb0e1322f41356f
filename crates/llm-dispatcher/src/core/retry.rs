//! How long to wait before trying again, and how often that is allowed at all.

use std::time::Duration;

use super::settings::RetrySettings;

/// Keeps retries in proportion to first tries, so that a provider in trouble is not buried under them.
#[derive(Debug, Clone)]
pub(super) struct RetryBudget {
    ratio: f64,
    floor: f64,
    burst: f64,
    saved: f64,
    counted_at: Duration,
}

impl RetryBudget {
    pub(super) fn new(settings: &RetrySettings) -> Self {
        Self {
            ratio: settings.budget_ratio,
            floor: settings.budget_floor,
            burst: settings.budget_burst.max(1.0),
            saved: settings.budget_burst.max(1.0),
            counted_at: Duration::ZERO,
        }
    }

    /// A first try was made.
    pub(super) fn first_try(&mut self) {
        self.saved = (self.saved + self.ratio).min(self.burst);
    }

    /// Takes one retry out of the budget, or says when to ask again.
    pub(super) fn take(&mut self, now: Duration) -> Result<(), Duration> {
        let passed = now.saturating_sub(self.counted_at).as_secs_f64();
        self.counted_at = self.counted_at.max(now);
        self.saved = (self.saved + passed * self.floor).min(self.burst);
        if self.saved >= 1.0 {
            self.saved -= 1.0;
            return Ok(());
        }
        let missing = (1.0 - self.saved) / self.floor.max(0.01);
        // First tries may fill it sooner.
        Err(now + Duration::from_secs_f64(missing.clamp(0.001, 0.25)))
    }
}

/// The wait before try number `failed` + 1, where `luck` in 0..1 spreads tries that failed together.
pub(super) fn backoff(settings: &RetrySettings, failed: u32, luck: f64) -> Duration {
    let longest =
        settings.base.saturating_mul(2_u32.saturating_pow(failed.saturating_sub(1).min(20))).min(settings.max);
    longest.mul_f64(0.5 + 0.5 * luck)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_in_proportion_but_a_lonely_task_gets_on() {
        let settings = RetrySettings::default();
        let mut budget = RetryBudget::new(&settings);
        let mut allowed = 0;
        for _ in 0..1000 {
            budget.first_try();
            allowed += u32::from(budget.take(Duration::ZERO).is_ok());
        }
        assert!((300..=401).contains(&allowed), "{allowed} retries for 1000 first tries");
        let again = budget.take(Duration::ZERO).unwrap_err();
        assert!(again > Duration::ZERO);
        assert!(budget.take(Duration::from_secs(1)).is_ok());
    }

    #[test]
    fn waits_grow_and_end() {
        let settings = RetrySettings::default();
        assert_eq!(backoff(&settings, 1, 1.0), Duration::from_millis(100));
        assert_eq!(backoff(&settings, 3, 0.0), Duration::from_millis(200));
        assert_eq!(backoff(&settings, 90, 1.0), settings.max);
    }
}
