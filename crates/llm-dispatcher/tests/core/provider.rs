//! A provider as numbers: how fast it answers, what it refuses, and how it fails.

use std::collections::VecDeque;
use std::time::Duration;

use drover_llm_dispatcher::call::{LimitHints, Quota};
use drover_llm_dispatcher::core::{LaneSettings, Money, Price};

use crate::sim::ms;

/// A bucket that a provider counts with: what is not in it is refused.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    pub(crate) per_second: f64,
    pub(crate) size: f64,
    pub(crate) level: f64,
    at: Duration,
}

impl Bucket {
    pub(crate) fn new(per_minute: f64, size: f64) -> Self {
        Self { per_second: per_minute / 60.0, size, level: size, at: Duration::ZERO }
    }

    pub(crate) fn fill(&mut self, now: Duration) {
        self.level = (self.level + now.saturating_sub(self.at).as_secs_f64() * self.per_second).min(self.size);
        self.at = now;
    }

    fn take(&mut self, now: Duration, units: f64) -> bool {
        self.fill(now);
        let enough = self.level >= units - 1e-9;
        if enough {
            self.level -= units;
        }
        enough
    }
}

/// What the provider says of its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Says {
    /// Nothing at all.
    Nothing,
    /// How long to wait, in a refusal.
    RetryAfter,
    /// Its limit and how long to wait, in a refusal.
    LimitInRefusal,
    /// Its limit, in every answer.
    Always,
}

/// A provider behind one lane.
#[derive(Debug, Clone)]
pub(crate) struct SimLane {
    pub(crate) settings: LaneSettings,
    pub(crate) usual: Duration,
    /// Answer times vary by that share up and down.
    pub(crate) spread: f64,
    /// Logarithmic spread instead, when it is more than nothing.
    pub(crate) sigma: f64,
    pub(crate) slow_share: f64,
    pub(crate) slow: Duration,
    /// One way through the network, at least and at most.
    pub(crate) network: (Duration, Duration),
    pub(crate) requests: Option<Bucket>,
    pub(crate) tokens: Option<Bucket>,
    /// Requests in any minute.
    pub(crate) window: Option<usize>,
    pub(crate) width: Option<u32>,
    pub(crate) says: Says,
    pub(crate) errors: f64,
    pub(crate) resets: f64,
    pub(crate) hung: f64,
    pub(crate) garbage: f64,
    pub(crate) down: bool,
    /// The provider's clock runs that many times as fast as ours.
    pub(crate) clock: f64,
    /// Share of the worst case that a call uses.
    pub(crate) uses: (f64, f64),
    // Its own count.
    pub(crate) in_flight: u32,
    pub(crate) most_in_flight: u32,
    pub(crate) accepted: Vec<Duration>,
    pub(crate) refused: Vec<Duration>,
    pub(crate) charged: Money,
    pub(crate) recent: VecDeque<Duration>,
    /// Least time between two answers that are heard: one after the other is read, by us or on the way.
    pub(crate) serial: Duration,
    pub(crate) heard: Duration,
}

impl Default for SimLane {
    fn default() -> Self {
        Self {
            settings: LaneSettings {
                price: Some(Price::default()),
                timeout: Duration::from_secs(30),
                ..LaneSettings::default()
            },
            usual: ms(200),
            spread: 0.01,
            sigma: 0.0,
            slow_share: 0.0,
            slow: ms(2000),
            network: (ms(1), ms(3)),
            requests: None,
            tokens: None,
            window: None,
            width: None,
            says: Says::Nothing,
            errors: 0.0,
            resets: 0.0,
            hung: 0.0,
            garbage: 0.0,
            down: false,
            clock: 1.0,
            uses: (0.2, 1.0),
            in_flight: 0,
            most_in_flight: 0,
            accepted: Vec::new(),
            refused: Vec::new(),
            charged: Money::ZERO,
            recent: VecDeque::new(),
            serial: Duration::ZERO,
            heard: Duration::ZERO,
        }
    }
}

impl SimLane {
    pub(crate) fn hints(&self, refused: bool, wait: Duration) -> LimitHints {
        let mut hints = LimitHints::default();
        let tell = match self.says {
            Says::Nothing => return hints,
            Says::RetryAfter => false,
            Says::LimitInRefusal => refused,
            Says::Always => true,
        };
        if refused {
            // To the millisecond, rounded up.
            hints.retry_after = Some(ms(wait.as_millis() as u64 + 1));
        }
        if tell {
            let quota = |bucket: &Bucket| Quota {
                limit: Some((bucket.per_second * 60.0).round() as u64),
                remaining: Some(bucket.level.max(0.0) as u64),
                reset_after: None,
                window: Some(Duration::from_mins(1)),
            };
            hints.requests = self.requests.as_ref().map(quota).unwrap_or_default();
            hints.tokens = self.tokens.as_ref().map(quota).unwrap_or_default();
        }
        hints
    }

    /// Takes a call or says how long to wait.
    pub(crate) fn admit(&mut self, now: Duration, tokens: f64) -> Result<(), Duration> {
        let theirs = now.mul_f64(self.clock);
        if self.width.is_some_and(|width| self.in_flight >= width) {
            return Err(ms(100));
        }
        if let Some(limit) = self.window {
            while self.recent.front().is_some_and(|&at| at + Duration::from_mins(1) <= theirs) {
                self.recent.pop_front();
            }
            if self.recent.len() >= limit {
                return Err(ms(500));
            }
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.fill(theirs);
            if bucket.level < tokens.min(bucket.size) - 1e-9 {
                return Err(Duration::from_secs_f64((tokens - bucket.level) / bucket.per_second));
            }
        }
        if let Some(bucket) = &mut self.requests
            && !bucket.take(theirs, 1.0)
        {
            return Err(Duration::from_secs_f64((1.0 - bucket.level) / bucket.per_second));
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.level -= tokens;
        }
        self.recent.push_back(theirs);
        Ok(())
    }
}
