//! Which day it is, where the cap is counted by the day.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use thiserror::Error;

/// One day of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(Date);

impl Day {
    /// The day written as `2026-11-21`.
    pub fn parse(text: &str) -> Option<Self> {
        text.parse().ok().map(Self)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A time zone that is not known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("unknown time zone {0:?}, expected one such as Europe/Berlin or UTC")]
pub struct ZoneError(String);

/// Where days begin.
#[derive(Debug, Clone)]
pub struct Zone(TimeZone);

impl Zone {
    /// The zone of this name; UTC when none is given.
    pub fn named(name: Option<&str>) -> Result<Self, ZoneError> {
        match name {
            None => Ok(Self(TimeZone::UTC)),
            Some(name) => TimeZone::get(name).map(Self).map_err(|_| ZoneError(name.to_owned())),
        }
    }

    /// The one that counts unless another is named.
    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// The day of a moment, given in microseconds of Unix time.
    pub fn day(&self, at_us: u64) -> Day {
        let at = Timestamp::from_microsecond(i64::try_from(at_us).unwrap_or(i64::MAX)).unwrap_or(Timestamp::MAX);
        Day(at.to_zoned(self.0.clone()).date())
    }

    /// The moment at which the day after this one begins, in microseconds of Unix time.
    pub fn next_day_us(&self, at_us: u64) -> u64 {
        let next = self.day(at_us).0.tomorrow().and_then(|date| self.0.to_zoned(date.at(0, 0, 0, 0)));
        next.ok().and_then(|zoned| u64::try_from(zoned.timestamp().as_microsecond()).ok()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(text: &str) -> u64 {
        text.parse::<Timestamp>().unwrap().as_microsecond() as u64
    }

    #[test]
    fn a_day_is_utc_unless_a_timezone_is_given_and_ends_exactly() {
        let utc = Zone::named(None).unwrap();
        assert_eq!(utc.day(us("2026-11-21T23:59:59.999999Z")).to_string(), "2026-11-21");
        assert_eq!(utc.day(us("2026-11-22T00:00:00Z")).to_string(), "2026-11-22");
        assert_eq!(utc.next_day_us(us("2026-11-21T12:00:00Z")), us("2026-11-22T00:00:00Z"));
        let berlin = Zone::named(Some("Europe/Berlin")).unwrap();
        assert_eq!(berlin.day(us("2026-11-21T22:59:59Z")).to_string(), "2026-11-21");
        assert_eq!(berlin.day(us("2026-11-21T23:00:00Z")).to_string(), "2026-11-22");
        // The day on which the clocks are set back has 25 hours.
        assert_eq!(berlin.next_day_us(us("2026-10-24T22:00:00Z")), us("2026-10-25T23:00:00Z"));
        let error = Zone::named(Some("Mars/Olympus")).unwrap_err().to_string();
        assert!(error.contains("Mars/Olympus"), "{error}");
        assert_eq!(Day::parse("2026-11-21"), Some(utc.day(us("2026-11-21T00:00:00Z"))));
    }
}
