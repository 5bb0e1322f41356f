//! What the core is set to.

use std::time::Duration;

use super::money::{Money, Price};

/// Everything that the core is set to.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Most workers at once, whatever they do.
    pub max_nodes: u32,
    /// Most calls to providers at once, over all lanes that count as such.
    pub max_concurrent_api: u32,
    /// Most tasks that wait; more are refused.
    pub max_queued: usize,
    /// The most money of a day. Unset: no cap, and no leases are asked for.
    pub max_daily_spend: Option<Money>,
    /// Say so when a day's spending reaches this.
    pub warn_at: Option<Money>,
    /// Calls whose price nobody knows are made even when there is a cap; they then count as free.
    pub allow_unknown_price: bool,
    /// Where calls can go. More can be added later.
    pub lanes: Vec<LaneSettings>,
    /// Trying again.
    pub retry: RetrySettings,
    /// Second tries beside slow ones.
    pub hedge: HedgeSettings,
    /// Finding a width that nobody told.
    pub width: WidthSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_nodes: 10,
            max_concurrent_api: 5,
            max_queued: 1_000_000,
            max_daily_spend: None,
            warn_at: None,
            allow_unknown_price: false,
            lanes: Vec::new(),
            retry: RetrySettings::default(),
            hedge: HedgeSettings::default(),
            width: WidthSettings::default(),
        }
    }
}

/// One provider, key and model.
#[derive(Debug, Clone, PartialEq)]
pub struct LaneSettings {
    /// What it costs. Unset: nobody knows.
    pub price: Option<Price>,
    /// Most calls in a minute. What the provider says itself can lower this, never raise it.
    pub requests_per_minute: Option<f64>,
    /// Most tokens in a minute, likewise.
    pub tokens_per_minute: Option<f64>,
    /// Calls that the provider surely takes at once after a pause. 1 spaces all calls evenly, which is right for every kind
    /// of limit.
    pub burst: u32,
    /// Tokens likewise; 0 lets one call through at a time.
    pub token_burst: u64,
    /// Most calls at once. Unset: found out by trying, below the limits of the whole.
    pub max_in_flight: Option<u32>,
    /// Where finding out begins. Unset: at what the limits of the whole allow.
    pub start_width: Option<u32>,
    /// Its calls count against [`Settings::max_concurrent_api`]; those of a fetch worker do not.
    pub api: bool,
    /// A call that takes longer is broken off.
    pub timeout: Duration,
}

impl Default for LaneSettings {
    fn default() -> Self {
        Self {
            price: None,
            requests_per_minute: None,
            tokens_per_minute: None,
            burst: 1,
            token_burst: 0,
            max_in_flight: None,
            start_width: None,
            api: true,
            timeout: Duration::from_mins(2),
        }
    }
}

/// Trying again what failed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetrySettings {
    /// Most tries of a task that failed by themselves, the first included. Refusals for the number of calls are not failures.
    pub max_attempts: u32,
    /// Most answers of a task that are not of the shape that was asked for: each of them is billed.
    pub max_bad_answers: u32,
    /// Most times that a task is sent again after such refusals.
    pub max_rejections: u32,
    /// The first wait is up to this long, the next up to twice as long, and so on.
    pub base: Duration,
    /// But no longer than this.
    pub max: Duration,
    /// Retries for each first try, in the long run; a retry over that waits.
    pub budget_ratio: f64,
    /// Retries a second that are allowed whatever the ratio, so that a lonely task is not stuck.
    pub budget_floor: f64,
    /// Retries at once that a quiet time saves up.
    pub budget_burst: f64,
    /// A lane that asks for a longer wait than this is passed over for the next of the chain, and a task without a next one fails.
    pub patience: Duration,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            max_attempts: 12,
            max_bad_answers: 3,
            max_rejections: 50,
            base: Duration::from_millis(100),
            max: Duration::from_secs(10),
            budget_ratio: 0.3,
            budget_floor: 5.0,
            budget_burst: 100.0,
            patience: Duration::from_mins(2),
        }
    }
}

/// A second try beside one that is slow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeSettings {
    /// Most hedges of one task; 0 turns hedging off.
    pub max: u32,
    /// A try is slow when it has taken longer than this share of the finished ones did ...
    pub quantile: f64,
    /// ... times this.
    pub stretch: f64,
    /// Nothing is slow before so many have finished.
    pub min_samples: u32,
    /// Hedges for each first try, in the long run.
    pub budget_ratio: f64,
    /// Hedges that a fresh start, or a quiet time, allows beyond that.
    pub budget_burst: f64,
    /// A try that is slow by so many times what counts as slow is given up, as if its connection had broken, where a second try
    /// is allowed and the provider is not slow as a whole. 0: only the time limit of the lane ends it.
    pub stall: f64,
    /// When a greater share than this of the recent tries is slow, it is the provider and no hedge helps.
    pub off_above: f64,
}

impl Default for HedgeSettings {
    fn default() -> Self {
        Self {
            max: 2,
            quantile: 0.9,
            stretch: 1.1,
            min_samples: 10,
            budget_ratio: 0.055,
            budget_burst: 8.0,
            stall: 8.0,
            off_above: 0.25,
        }
    }
}

/// How a width that nobody told is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WidthSettings {
    /// What is left of the width after a refusal that follows another one.
    pub backoff: f64,
    /// Least time between two tries of one more than was refused.
    pub probe_every: Duration,
    /// How many more at a time are added with each answer while nothing is refused.
    pub ramp: f64,
}

impl Default for WidthSettings {
    fn default() -> Self {
        Self { backoff: 0.7, probe_every: Duration::from_secs(1), ramp: 1.0 }
    }
}
