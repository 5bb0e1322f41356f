//! How many calls a provider takes at once, where it does not say.
//!
//! While nothing is refused the width grows by one with each answer, which doubles it in one answer's time. A refusal says
//! where the limit is: it is what was under way at that moment. The width stays there, and now and then one call more is
//! tried; when that one is answered, the growth begins again. A refusal right after another means that the limit has fallen far, so
//! the width is cut by a factor until a call gets through.

use std::time::Duration;

use super::settings::WidthSettings;
use super::task::AttemptId;

/// The longest pause that a provider asked for counts so many times in the time between two tries of one more.
const PAUSES_BETWEEN_PROBES: u32 = 20;

/// Growth by less than this was not worth its refusals.
const WORTHWHILE: f64 = 1.1;

/// So many calls more must be taken, one after the other, before the width grows freely after growth that was not worth it.
const CAREFUL_STEPS: u32 = 3;

/// The width of one lane.
#[derive(Debug, Clone)]
pub struct Width {
    settings: WidthSettings,
    level: f64,
    max: f64,
    /// At this width calls were refused.
    ceiling: Option<f64>,
    /// The one call more that is being tried.
    probe: Option<AttemptId>,
    next_probe: Duration,
    /// Calls up to this one were started before the last cut.
    cut_before: Option<AttemptId>,
    /// A call that was started after the last cut has been answered.
    settled: bool,
    /// The last cut was to what was under way.
    exact: bool,
    /// The width before the growth that is under way, or was the last.
    grew_from: Option<f64>,
    /// The last growth led to nothing but refusals, so the next begins with steps of one.
    careful: bool,
    steps: u32,
}

impl Width {
    /// Begins with `start` calls at once and never goes above `max`.
    pub fn new(settings: WidthSettings, start: u32, max: u32) -> Self {
        Self {
            settings,
            level: f64::from(start.clamp(1, max.max(1))),
            max: f64::from(max.max(1)),
            ceiling: None,
            probe: None,
            next_probe: Duration::ZERO,
            cut_before: None,
            settled: true,
            exact: false,
            grew_from: None,
            careful: false,
            steps: 0,
        }
    }

    /// How many calls may be under way.
    pub fn limit(&self, now: Duration) -> u32 {
        let held = self.ceiling.is_some_and(|ceiling| self.level >= ceiling);
        let probe = held && self.probe.is_none() && now >= self.next_probe && self.level + 1.0 <= self.max;
        self.current() + u32::from(probe)
    }

    /// The width without tries of one more.
    pub fn current(&self) -> u32 {
        self.level as u32
    }

    /// A call begins; with it so many are under way.
    pub fn started(&mut self, attempt: AttemptId, in_flight: u32) {
        if in_flight > self.current() && self.probe.is_none() {
            self.probe = Some(attempt);
            // What became of the last growth is known by now.
            if let Some(from) = self.grew_from.take() {
                self.careful = self.level <= from * WORTHWHILE;
            }
        }
    }

    /// A call was taken by the provider, whatever came of it. With it so many were under way.
    pub fn answered(&mut self, attempt: AttemptId, in_flight: u32) {
        if self.cut_before.is_none_or(|cut| attempt > cut) {
            self.settled = true;
        }
        if self.probe == Some(attempt) {
            self.probe = None;
            if self.careful && self.steps < CAREFUL_STEPS {
                self.steps += 1;
                self.level = (self.level + 1.0).min(self.max);
                self.ceiling = Some(self.level);
                self.next_probe = Duration::ZERO;
                return;
            }
            self.steps = 0;
            self.grew_from = self.ceiling.take();
        }
        let used = in_flight + 1 >= self.current();
        if used && self.ceiling.is_none_or(|ceiling| self.level < ceiling) {
            let top = self.ceiling.map_or(self.max, |ceiling| ceiling.min(self.max));
            self.level = (self.level + self.settings.ramp).min(top).max(1.0);
        }
    }

    /// A call was broken off or came to nothing without a word of the provider.
    pub fn ended(&mut self, attempt: AttemptId) {
        if self.probe == Some(attempt) {
            self.probe = None;
        }
    }

    /// A call was refused. Without it so many are under way; `newest` is the last that was started. Says whether the width
    /// was lowered.
    pub fn refused(
        &mut self,
        now: Duration,
        attempt: AttemptId,
        in_flight: u32,
        newest: AttemptId,
        pause: Duration,
    ) -> bool {
        let before = self.current();
        let late = self.cut_before.is_some_and(|cut| attempt <= cut) && self.probe != Some(attempt);
        let mut seen = f64::from(in_flight.max(1));
        if self.probe == Some(attempt) {
            // The limit is where it was.
            self.probe = None;
            self.cut_before = Some(newest);
            self.level = self.level.min(seen);
        } else if late {
            // One of those that were on their way when the first was refused, and were counted as taken then.
            if self.exact {
                self.level = (self.level - 1.0).max(1.0);
            }
            seen = self.level;
        } else {
            self.level = self.level.min(seen);
            self.exact = self.settled;
            if !self.settled {
                self.level = (self.level * self.settings.backoff).max(1.0);
            }
            self.settled = false;
            self.cut_before = Some(newest);
            self.probe = None;
        }
        self.ceiling = Some(match self.ceiling {
            // Those that come late say nothing new about where a width that was cut by a factor may grow to.
            Some(ceiling) if late && !self.exact => ceiling,
            _ => seen.max(self.level),
        });
        self.steps = 0;
        self.next_probe = now + self.settings.probe_every.max(pause * PAUSES_BETWEEN_PROBES);
        self.current() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_shows_the_limit_and_one_more_is_tried_later() {
        let mut width = Width::new(WidthSettings::default(), 50, 1000);
        assert!(width.refused(Duration::ZERO, AttemptId(50), 20, AttemptId(50), Duration::ZERO));
        assert_eq!(width.limit(Duration::from_millis(900)), 20);
        assert_eq!(width.limit(Duration::from_secs(1)), 21);
        width.started(AttemptId(51), 21);
        assert_eq!(width.limit(Duration::from_secs(1)), 20, "one at a time");
        width.answered(AttemptId(51), 21);
        assert_eq!(width.current(), 21);
        width.answered(AttemptId(52), 21);
        assert_eq!(width.current(), 22, "there was room, so it grows");
    }

    #[test]
    fn a_limit_that_falls_far_costs_few_refusals() {
        let mut width = Width::new(WidthSettings::default(), 500, 500);
        let mut newest = 1000;
        let mut refusals = 0;
        for in_flight in (0..500).rev() {
            while in_flight < width.current() {
                newest += 1;
                if in_flight < 5 {
                    break;
                }
                refusals += 1;
                width.refused(Duration::ZERO, AttemptId(newest), in_flight, AttemptId(newest), Duration::ZERO);
            }
        }
        assert!(refusals <= 16, "{refusals} refusals");
        assert!((3..=5).contains(&width.current()), "{}", width.current());
    }
}
