//! The strict limits: what comes above them is refused at once, never made to wait.

use std::time::Duration;

use super::settings::Settings;

/// The state of both limits. Times are since the start of the mock.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    /// When the bucket of requests would be full again.
    requests: Duration,
    /// When the bucket of tokens would be full again.
    tokens: Duration,
}

/// Why a call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dimension {
    Requests,
    Tokens,
}

/// A refusal: which limit, and how long until the same call would be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) dimension: Dimension,
    pub(super) wait: Duration,
}

/// One limit as it stands: how much fits, how much is left, and when it is full.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    pub(super) limit: u64,
    pub(super) remaining: u64,
    pub(super) full_after: Duration,
}

fn rate(per_minute: f64) -> f64 {
    (per_minute / 60.0).max(1e-9)
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.max(0.0)).unwrap_or(Duration::MAX / 4)
}

impl Buckets {
    /// Takes a call of so many tokens, or refuses it and takes nothing.
    pub(super) fn take(&mut self, settings: &Settings, now: Duration, tokens: u64) -> Result<(), Rejected> {
        let mut after = (self.requests, self.tokens);
        if let Some(per_minute) = settings.requests_per_minute {
            let each = seconds(1.0 / rate(per_minute));
            let room = each * settings.burst.max(1);
            let full = self.requests.max(now) + each;
            if full > now + room {
                return Err(Rejected { dimension: Dimension::Requests, wait: full.saturating_sub(now + room) });
            }
            after.0 = full;
        }
        if let Some(per_minute) = settings.tokens_per_minute {
            let cost = seconds(tokens as f64 / rate(per_minute));
            // A call larger than the bucket would never be taken: it is when the bucket is full.
            let room = cost.max(Duration::from_secs(1));
            let full = self.tokens.max(now) + cost;
            if full > now + room {
                return Err(Rejected { dimension: Dimension::Tokens, wait: full.saturating_sub(now + room) });
            }
            after.1 = full;
        }
        (self.requests, self.tokens) = after;
        Ok(())
    }

    /// Both limits, for headers; nothing for one that is not set.
    pub(super) fn standing(&self, settings: &Settings, now: Duration) -> [Option<Standing>; 2] {
        let standing = |per_minute: f64, full: Duration, room: f64| {
            let full_after = full.saturating_sub(now);
            let left = room - full_after.as_secs_f64() * rate(per_minute);
            Standing { limit: per_minute as u64, remaining: left.max(0.0) as u64, full_after }
        };
        [
            settings.requests_per_minute.map(|rate| standing(rate, self.requests, f64::from(settings.burst.max(1)))),
            settings.tokens_per_minute.map(|per_minute| standing(per_minute, self.tokens, rate(per_minute))),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_the_burst_and_then_exactly_the_rate_through() {
        let settings = Settings { requests_per_minute: Some(600.0), burst: 3, ..Settings::default() };
        let mut buckets = Buckets::default();
        let mut taken = 0;
        for millis in 0..10_000 {
            taken += usize::from(buckets.take(&settings, Duration::from_millis(millis), 1).is_ok());
        }
        assert_eq!(taken, 2 + 100);
        let now = Duration::from_secs(10);
        let refused = loop {
            if let Err(refused) = buckets.take(&settings, now, 1) {
                break refused;
            }
        };
        assert!(buckets.take(&settings, now + refused.wait.saturating_sub(Duration::from_micros(1)), 1).is_err());
        assert!(buckets.take(&settings, now + refused.wait, 1).is_ok());
    }

    #[test]
    fn tokens_are_limited_beside_requests_and_a_refusal_takes_nothing() {
        let settings = Settings {
            requests_per_minute: Some(6000.0),
            burst: 10,
            tokens_per_minute: Some(6000.0),
            ..Settings::default()
        };
        let mut buckets = Buckets::default();
        assert!(buckets.take(&settings, Duration::ZERO, 60).is_ok());
        let refused = buckets.take(&settings, Duration::ZERO, 60).unwrap_err();
        assert_eq!((refused.dimension, refused.wait), (Dimension::Tokens, Duration::from_millis(200)));
        let [requests, tokens] = buckets.standing(&settings, Duration::ZERO).map(Option::unwrap);
        assert_eq!((requests.remaining, tokens.remaining), (9, 40));
        assert!(buckets.take(&settings, refused.wait, 60).is_ok());
        // Larger than the bucket: taken when that is full.
        assert!(buckets.take(&settings, Duration::from_mins(1), 1000).is_ok());
    }
}
