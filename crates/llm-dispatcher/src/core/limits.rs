//! Requests and tokens per minute, so that a provider which counts strictly never has to refuse.
//!
//! The generic cell rate algorithm: one number per limit, the time at which all that was let through so far has been paid for
//! at the allowed rate. Calls go out evenly, at a little less than the rate, because the provider's clock may be slower
//! than ours and calls may overtake each other on their way. Nothing waits in here: the queue asks when the next call may go,
//! and is woken once for it.

use std::time::Duration;

use crate::call::{LimitHints, Quota};

/// Share of an allowed rate that is used. What is left covers clocks that differ and windows that slide.
const HEADROOM: f64 = 0.99;

/// How much closer together two calls may arrive than they were sent.
const JITTER: Duration = Duration::from_millis(5);

/// How much of the time by which a call is let go late is made up for: timers are that coarse, and machines busy.
const LATE: Duration = Duration::from_millis(4);

/// What is left of the pace after a refusal that nothing explains.
const CUT: f64 = 0.7;

/// A measurement between two refusals counts from so many calls and so much time on.
const MEASURED_CALLS: f64 = 20.0;
const MEASURED_FOR: Duration = Duration::from_secs(1);

/// Where both refusals say to the millisecond when the next call will be taken, so much time between these moments is enough.
const EXACT_FOR: Duration = Duration::from_millis(10);

/// A pace that was lowered goes up by these shares in a second where refusals were seen to begin: after a long measurement, and
/// after one of a few calls.
const CREEP: f64 = 0.002;
const CREEP_AFTER_FEW: f64 = 0.006;

/// So often it is tried whether a limit that had fallen unsaid has been given back; each time in vain the next one is later.
const TRY_EVERY: Duration = Duration::from_millis(4800);
const TRY_LATER: f64 = 1.1;
const TRY_LATEST: Duration = Duration::from_secs(30);
/// What is tried is so many times the pace, for so long: more than what a bucket saves up meanwhile.
const TRY_PACE: f64 = 4.0;
const TRY_FOR: Duration = Duration::from_secs(1);

/// A rate with a burst, in any unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Gcra {
    per_unit: Seconds,
    burst: f64,
    /// When all that was let through is paid for.
    paid_at: Seconds,
}

/// Seconds as a float: a duration that scales. Exact to a nanosecond for a hundred days.
type Seconds = f64;

impl Gcra {
    /// So many units a minute, of which `burst` may go at once after a pause.
    pub fn new(per_minute: f64, burst: f64) -> Self {
        Self { per_unit: 60.0 / (per_minute.max(1e-6) * HEADROOM), burst, paid_at: 0.0 }
    }

    /// When so many units may go. More than the burst go when all before is paid for.
    pub fn ready_at(&self, units: f64) -> Duration {
        let ahead = ((self.burst - units) * self.per_unit - JITTER.as_secs_f64()).max(0.0);
        Duration::from_secs_f64((self.paid_at - ahead).max(0.0))
    }

    /// Lets so many units go.
    pub fn take(&mut self, now: Duration, units: f64) {
        // What was let go late had its turn when it was due: else every late wake would cost some of the rate. But no more of that
        // is made up for than two calls may come closer together.
        let begin = self.paid_at.max(now.as_secs_f64() - LATE.as_secs_f64());
        self.paid_at = begin + units * self.per_unit;
    }

    /// Gives back what was let go and not used.
    pub fn refund(&mut self, units: f64) {
        self.paid_at -= units * self.per_unit;
    }

    /// Another rate from now on; what is not paid for yet is paid at the new one.
    pub fn set_rate(&mut self, now: Duration, per_minute: f64) {
        let now = now.as_secs_f64();
        let per_unit = 60.0 / (per_minute.max(1e-6) * HEADROOM);
        if self.paid_at > now {
            self.paid_at = now + (self.paid_at - now) * per_unit / self.per_unit;
        }
        self.per_unit = per_unit;
    }

    /// The bucket behind the limit is empty at that moment.
    fn empty_at(&mut self, when: Duration) {
        self.paid_at = self.paid_at.max(when.as_secs_f64() + self.burst.max(1.0) * self.per_unit.min(10.0));
    }

    fn per_minute(&self) -> f64 {
        60.0 / (self.per_unit * HEADROOM)
    }
}

/// One dimension: what was configured, what the provider said, and what is made of both.
#[derive(Debug, Clone, Default)]
struct Dimension {
    configured: Option<f64>,
    told: Option<f64>,
    burst: f64,
    gcra: Option<Gcra>,
}

impl Dimension {
    fn new(configured: Option<f64>, burst: f64) -> Self {
        let configured = configured.filter(|rate| rate.is_finite() && *rate > 0.0);
        Self { configured, told: None, burst, gcra: configured.map(|rate| Gcra::new(rate, burst)) }
    }

    fn allowed(&self) -> Option<f64> {
        match (self.configured, self.told) {
            (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
            (ours, theirs) => ours.or(theirs),
        }
    }

    /// Takes over what the provider says; whether it allows less or more than before.
    fn tell(&mut self, now: Duration, quota: &Quota, pace: f64, lower_only: bool) -> bool {
        let Some(limit) = quota.limit.filter(|&limit| limit > 0) else { return false };
        let window = quota.window.unwrap_or(Duration::from_mins(1)).as_secs_f64();
        // A quota of a day says nothing about how fast calls may go; it is waited for when it is used up.
        if !(1.0..=600.0).contains(&window) {
            return false;
        }
        let before = self.allowed();
        let told = limit as f64 * 60.0 / window;
        if lower_only && self.told.is_some_and(|earlier| told > earlier) {
            return false;
        }
        self.told = Some(told);
        let after = self.allowed();
        if after == before {
            return false;
        }
        self.apply(now, pace);
        true
    }

    fn apply(&mut self, now: Duration, pace: f64) {
        let Some(rate) = self.allowed() else { return };
        match &mut self.gcra {
            Some(gcra) => gcra.set_rate(now, rate * pace),
            None => self.gcra = Some(Gcra::new(rate * pace, self.burst)),
        }
    }
}

/// A moment at which the provider's bucket was as good as empty, as a refusal showed. The calls between two of them measure its
/// rate.
#[derive(Debug, Clone, Copy)]
struct Empty {
    /// When exactly one call fitted in, or when the refusal was heard.
    at: Duration,
    /// The provider said when that is, to the millisecond.
    exact: bool,
    /// Calls let through since.
    calls: f64,
}

/// The limits of one lane.
#[derive(Debug, Clone)]
pub struct Limiter {
    requests: Dimension,
    tokens: Dimension,
    /// Share of the allowed rate that is used after refusals which no known limit explains.
    pace: f64,
    /// The pace at which refusals were seen to begin.
    ceiling: Option<f64>,
    paced_at: Duration,
    paused_until: Duration,
    since_refusal: Option<Empty>,
    cut_at: Option<Duration>,
    /// The pace before the present one is being tried, and since when it is.
    trying: Option<(f64, Duration)>,
    next_try: Duration,
    tries_in_vain: i32,
    /// How fast the pace goes up near the ceiling.
    creep: f64,
    /// When the last two calls were let through.
    last: [Duration; 2],
    /// When the provider told of another limit last.
    changed_at: Option<Duration>,
}

impl Limiter {
    /// Limits as configured; unset ones are learnt when the provider tells.
    pub fn new(requests_per_minute: Option<f64>, burst: u32, tokens_per_minute: Option<f64>, token_burst: u64) -> Self {
        Self {
            requests: Dimension::new(requests_per_minute, f64::from(burst.max(1))),
            tokens: Dimension::new(tokens_per_minute, token_burst as f64),
            pace: 1.0,
            ceiling: None,
            paced_at: Duration::ZERO,
            paused_until: Duration::ZERO,
            since_refusal: None,
            cut_at: None,
            trying: None,
            next_try: Duration::ZERO,
            tries_in_vain: 0,
            creep: CREEP,
            last: [Duration::ZERO; 2],
            changed_at: None,
        }
    }

    /// A limit on requests or tokens is known.
    pub fn is_known(&self) -> bool {
        self.requests.gcra.is_some() || self.tokens.gcra.is_some()
    }

    /// When a call of so many tokens may go.
    pub fn ready_at(&self, tokens: u64) -> Duration {
        let requests = self.requests.gcra.as_ref().map_or(Duration::ZERO, |gcra| gcra.ready_at(1.0));
        let tokens = self.tokens.gcra.as_ref().map_or(Duration::ZERO, |gcra| gcra.ready_at(tokens as f64));
        requests.max(tokens).max(self.paused_until)
    }

    /// Lets a call of so many tokens go.
    pub fn take(&mut self, now: Duration, tokens: u64) {
        self.recover(now);
        if let Some(gcra) = &mut self.requests.gcra {
            gcra.take(now, 1.0);
        }
        if let Some(gcra) = &mut self.tokens.gcra {
            gcra.take(now, tokens as f64);
        }
        if let Some(empty) = &mut self.since_refusal {
            empty.calls += 1.0;
        }
        self.last = [self.last[1], now];
    }

    /// A call is over that was let go for `reserved` tokens; what it did not use comes back.
    pub fn settle(&mut self, reserved: u64, used: u64) {
        if let Some(gcra) = &mut self.tokens.gcra {
            gcra.refund(reserved.saturating_sub(used) as f64);
        }
    }

    /// What the provider says with the answer to a call that was started then. An answer to a call from before the last
    /// change may still tell of how it was before.
    pub fn hint(&mut self, now: Duration, started: Duration, hints: &LimitHints) {
        let old = self.changed_at.is_some_and(|at| started <= at);
        let requests = self.requests.tell(now, &hints.requests, 1.0, old);
        let tokens = self.tokens.tell(now, &hints.tokens, 1.0, old);
        if requests || tokens {
            self.changed_at = Some(now);
            self.pace = 1.0;
            self.ceiling = None;
            self.since_refusal = None;
            self.trying = None;
            self.tries_in_vain = 0;
            self.requests.apply(now, 1.0);
            self.tokens.apply(now, 1.0);
        }
    }

    /// No call goes before that.
    pub fn pause(&mut self, until: Duration) {
        self.paused_until = self.paused_until.max(until);
    }

    /// When calls go again, when they do not at all at the moment.
    pub fn paused_until(&self) -> Duration {
        self.paused_until
    }

    /// A call that was started then was refused for the number of calls. Says the new rate when it was lowered.
    pub fn refused(&mut self, now: Duration, started: Duration, hints: &LimitHints) -> Option<u32> {
        let before = self.rate();
        self.hint(now, started, hints);
        let delay = hints.delay();
        if let Some(delay) = delay {
            self.pause(now + delay);
        }
        if !self.is_known() {
            return None;
        }
        // The bucket was empty a moment ago, whatever we believed: the next call is one interval away.
        if let Some(gcra) = &mut self.requests.gcra {
            gcra.empty_at(now);
        }
        if self.rate() != before {
            self.cut_at = Some(now);
            return self.rate().map(|rate| rate as u32);
        }
        // Calls that were under way when the pace was cut say nothing about the new pace.
        if self.cut_at.is_some_and(|cut| started <= cut) {
            return None;
        }
        // Whole seconds are rounded up.
        let exact = delay.filter(|delay| delay.subsec_nanos() != 0);
        let empty = Empty { at: now + exact.unwrap_or_default(), exact: exact.is_some(), calls: 0.0 };
        let earlier = self.since_refusal.replace(empty);
        self.cut_at = Some(now);
        self.paced_at = now;
        if let Some((pace, since)) = self.trying.take_if(|(_, since)| started >= *since) {
            // What was tried is too much, so it goes on as before.
            self.tries_in_vain += 1;
            self.next_try = since + TRY_EVERY.mul_f64(TRY_LATER.powi(self.tries_in_vain)).min(TRY_LATEST);
            // A little slower, because the bucket is empty now, and what was saved up in it hid whether it was too fast.
            self.pace = pace * 0.98;
            self.creep = CREEP;
            self.apply(now);
            return None;
        }
        self.trying = None;
        self.next_try = now + TRY_EVERY;
        let measured = earlier.and_then(|earlier| measured(earlier, empty));
        let allowed = self.requests.allowed().filter(|_| hints.tokens.remaining != Some(0));
        let pace = match (measured, allowed) {
            (Some((rate, long)), Some(allowed)) => {
                self.creep = if long { CREEP } else { CREEP_AFTER_FEW };
                (rate * if long { 0.98 } else { 0.97 } / allowed).min(self.pace * 0.98)
            }
            (None, Some(allowed)) => match exact.and_then(|delay| self.bound(started, delay)) {
                Some(bound) => (bound / allowed).min(self.pace * 0.98),
                None => self.pace * CUT,
            },
            (_, None) => self.pace * CUT,
        };
        self.pace = pace.max(0.01);
        self.ceiling = measured.map(|_| self.pace);
        self.apply(now);
        self.rate().map(|rate| rate as u32)
    }

    /// The most calls a minute that a provider can allow which took the call before the one that was started then, refused
    /// this one, and will take one again after that delay.
    fn bound(&self, started: Duration, delay: Duration) -> Option<f64> {
        let [before, last] = self.last;
        let apart = if last == started { last.saturating_sub(before) } else { Duration::ZERO };
        let own = self.requests.gcra.as_ref().map(|gcra| Duration::from_secs_f64(gcra.per_unit.min(60.0)))?;
        let between = if apart.is_zero() { own } else { apart.min(own * 2) };
        Some(60.0 / (between + delay).as_secs_f64())
    }

    fn apply(&mut self, now: Duration) {
        self.requests.apply(now, self.pace);
        self.tokens.apply(now, self.pace);
    }

    /// Calls a minute that are let through at present, when there is a limit on them.
    pub fn rate(&self) -> Option<f64> {
        self.requests.gcra.as_ref().map(Gcra::per_minute)
    }

    /// How long it takes until so many calls of so many tokens each have gone.
    pub fn time_for(&self, now: Duration, calls: usize, tokens: u64) -> Duration {
        let requests = self.requests.gcra.as_ref().map_or(0.0, |gcra| gcra.per_unit * calls as f64);
        let tokens_time = self.tokens.gcra.as_ref().map_or(0.0, |gcra| gcra.per_unit * calls as f64 * tokens as f64);
        self.ready_at(tokens).saturating_sub(now) + Duration::from_secs_f64(requests.max(tokens_time).min(1e9))
    }

    /// After a cut the pace goes up again: quickly below where refusals were measured to begin, slowly above, and ever faster while
    /// nothing is refused. Now and then far more is tried for a moment, because nobody says when a limit is given back.
    fn recover(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.paced_at);
        if self.pace >= 1.0 && self.trying.is_none() || passed < Duration::from_millis(250) {
            return;
        }
        if let Some((_, since)) = self.trying {
            if now < since + TRY_FOR {
                return;
            }
            // It was taken: so it is the pace, and more may be.
            self.trying = None;
            self.ceiling = None;
            self.tries_in_vain = 0;
            self.next_try = now;
        }
        let near = self.ceiling.is_some_and(|ceiling| self.pace >= ceiling);
        if self.pace < 1.0 && now >= self.next_try && (near || self.ceiling.is_none()) {
            self.trying = Some((self.pace, now));
            self.pace = (self.pace * TRY_PACE).min(1.0);
        } else {
            let quiet = self.cut_at.map_or(Duration::ZERO, |at| now.saturating_sub(at)).as_secs_f64();
            let per_second = if near { (self.creep * (quiet / 10.0).exp2()).min(0.08) } else { 0.08 };
            self.pace = (self.pace * (1.0 + per_second * passed.as_secs_f64().min(1.0))).min(1.0);
        }
        self.paced_at = now;
        self.apply(now);
    }
}

/// Calls a minute that a provider took between two moments at which its bucket was empty, when they are far enough apart to say; and
/// whether there were many. The call that was refused was counted, too.
fn measured(from: Empty, to: Empty) -> Option<(f64, bool)> {
    let (time, calls) = (to.at.saturating_sub(from.at), from.calls - 1.0);
    let long = from.calls >= MEASURED_CALLS && time >= MEASURED_FOR;
    let exact = from.exact && to.exact && calls >= 1.0 && time >= EXACT_FOR;
    (long || exact).then(|| (calls * 60.0 / time.as_secs_f64(), long))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_were_not_used_come_back() {
        let mut limiter = Limiter::new(None, 1, Some(60_000.0), 0);
        limiter.take(Duration::ZERO, 10_000);
        assert!(limiter.ready_at(1) > Duration::from_secs(10));
        limiter.settle(10_000, 1_000);
        let ready = limiter.ready_at(1);
        assert!(ready > Duration::from_secs(1) && ready < Duration::from_millis(1100), "{ready:?}");
    }

    #[test]
    fn the_provider_can_lower_a_limit_and_give_it_back_but_not_raise_it() {
        let mut limiter = Limiter::new(Some(600.0), 1, None, 0);
        let say =
            |limit| LimitHints { requests: Quota { limit: Some(limit), ..Quota::default() }, ..LimitHints::default() };
        for (at, (told, rate)) in (1..).zip([(300, 300.0), (1200, 600.0), (60, 60.0)]) {
            limiter.hint(Duration::from_secs(at), Duration::from_secs(at), &say(told));
            assert!((limiter.rate().unwrap() - rate).abs() < 1e-6);
        }
        let mut day = say(1);
        day.requests.window = Some(Duration::from_hours(24));
        limiter.hint(Duration::from_secs(9), Duration::from_secs(9), &day);
        assert!((limiter.rate().unwrap() - 60.0).abs() < 1e-6, "a quota of a day is no pace");
        limiter.hint(Duration::from_secs(10), Duration::from_secs(2), &say(300));
        assert!((limiter.rate().unwrap() - 60.0).abs() < 1e-6, "an answer to an older call tells of how it was");
    }

    #[test]
    fn calls_that_go_late_lose_nothing_of_the_rate() {
        let mut gcra = Gcra::new(6000.0, 1.0);
        let (mut now, mut went) = (Duration::ZERO, 0);
        while now < Duration::from_secs(10) {
            gcra.take(now, 1.0);
            went += 1;
            // A timer that fires up to two milliseconds late, by turns.
            now = gcra.ready_at(1.0) + Duration::from_micros(700 * (went % 4));
        }
        assert!((985..=992).contains(&went), "{went} calls in ten seconds, 990 are allowed");
        // Even ten times as late as is made up for.
        let slow = (0..50).fold(gcra.clone(), |mut gcra, _| {
            gcra.take(gcra.ready_at(1.0) + LATE * 10, 1.0);
            gcra
        });
        let (from, to) = (gcra.ready_at(1.0), slow.ready_at(1.0));
        let per_call = (to.saturating_sub(from)).as_secs_f64() / 50.0;
        assert!((per_call - 0.0101 - 0.036).abs() < 0.001, "{per_call}");
        gcra.take(Duration::from_secs(20), 1.0);
        assert!(gcra.ready_at(1.0) > Duration::from_secs(20), "a pause is not made up for");
    }

    #[test]
    fn a_burst_leaves_room_for_jitter() {
        let gcra = Gcra::new(6000.0, 10.0);
        let mut full = gcra.clone();
        let mut went = 0;
        while full.ready_at(1.0) <= Duration::from_secs(1) && went < 100 {
            full.take(Duration::from_secs(1), 1.0);
            went += 1;
        }
        assert!((9..=10).contains(&went), "{went} at once");
    }
}
