//! Durations and sizes as people write them: `30s`, `5m`, `64MiB`. A bare number is seconds, or bytes.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Text that is no duration or size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("invalid {what} {got:?}, expected {expected}")]
pub struct HumanError {
    what: &'static str,
    got: String,
    expected: &'static str,
}

/// A duration such as `250ms`, `30s`, `5m`, `2h` or `30d`; a bare number is seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(pub Duration);

/// A size in bytes such as `4096`, `64KiB`, `16MiB` or `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanSize(pub u64);

impl HumanDuration {
    /// So many milliseconds.
    pub const fn millis(n: u64) -> Self {
        Self(Duration::from_millis(n))
    }

    /// So many seconds.
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// So many days.
    pub const fn days(n: u64) -> Self {
        Self(Duration::from_secs(n * 86_400))
    }

    /// The duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl HumanSize {
    /// So many mebibytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

const DURATION_UNITS: &[(&str, u64)] =
    &[("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("min", 60_000), ("s", 1_000), ("ms", 1), ("", 1_000)];
const SIZE_UNITS: &[(&str, u64)] = &[
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
    ("", 1),
];

/// Reads a number and a unit; the result is in the units' base, rounded down.
fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = units.iter().find(|(name, _)| *name == unit.trim())?.1;
    let value: f64 = number.parse().ok()?;
    let total = value * factor as f64;
    (total.is_finite() && total <= u64::MAX as f64 / 2.0).then_some(total as u64)
}

fn print(value: u64, units: &[(&str, u64)]) -> String {
    let (unit, factor) = units
        .iter()
        .filter(|(name, _)| !name.is_empty())
        .find(|(_, f)| value >= *f && value.is_multiple_of(*f))
        .unwrap_or(units.iter().rev().find(|(name, _)| !name.is_empty()).unwrap_or(&("", 1)));
    format!("{}{unit}", value / factor)
}

impl FromStr for HumanDuration {
    type Err = HumanError;
    fn from_str(text: &str) -> Result<Self, HumanError> {
        parse(text, DURATION_UNITS).map(Self::millis).ok_or_else(|| HumanError {
            what: "duration",
            got: text.to_owned(),
            expected: "a number with ms, s, m, h or d, such as 30s",
        })
    }
}

impl FromStr for HumanSize {
    type Err = HumanError;
    fn from_str(text: &str) -> Result<Self, HumanError> {
        parse(text, SIZE_UNITS).map(Self).ok_or_else(|| HumanError {
            what: "size",
            got: text.to_owned(),
            expected: "a number with B, KiB, MiB or GiB, such as 64MiB",
        })
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self.0.as_millis() as u64, DURATION_UNITS))
    }
}

impl fmt::Display for HumanSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self.0, SIZE_UNITS))
    }
}

macro_rules! human_serde {
    ($name:ident, $expected:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                    fn visit_f64<E: serde::de::Error>(self, n: f64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }
    };
}

human_serde!(HumanDuration, "a duration such as 30s");
human_serde!(HumanSize, "a size such as 64MiB");

/// Reads a socket address, and says what one looks like when it is none.
pub(crate) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        serde::de::Error::custom(format_args!("invalid address {text:?}, expected one such as 127.0.0.1:7950"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_durations_in_many_ways() {
        for (text, millis) in [("30", 30_000), ("0.5", 500), ("250ms", 250), ("5m", 300_000), ("30d", 2_592_000_000)] {
            assert_eq!(text.parse::<HumanDuration>().unwrap(), HumanDuration::millis(millis), "{text}");
        }
        for bad in ["", "s", "-1", "1 fortnight", "1e99d", "NaN"] {
            assert!(bad.parse::<HumanDuration>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for text in ["0ms", "250ms", "30s", "90s", "5m", "2h", "30d"] {
            assert_eq!(text.parse::<HumanDuration>().unwrap().to_string(), text);
        }
        for text in ["0B", "17B", "64KiB", "16MiB", "1GiB"] {
            assert_eq!(text.parse::<HumanSize>().unwrap().to_string(), text);
        }
    }
}
