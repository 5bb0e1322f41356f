//! Time limits as Slurm writes them, for every backend.

use std::time::Duration;

use drover_types::{ErrorCode, Failure};

/// A day, an hour, a minute.
const DAY: u64 = 24 * HOUR;
const HOUR: u64 = 60 * MINUTE;
const MINUTE: u64 = 60;

/// How long an allocation may last, and how that was written. `None` for no limit, which is also what Slurm makes of 0.
pub(crate) fn parse(text: &str) -> Result<Option<Duration>, Failure> {
    let text = text.trim();
    if text.is_empty() || text.eq_ignore_ascii_case("unlimited") || text.eq_ignore_ascii_case("infinite") {
        return Ok(None);
    }
    let seconds = seconds(text).ok_or_else(|| {
        Failure::new(ErrorCode::InvalidRequest, format!("{text:?} is no time limit"))
            .hint("write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as 00:10:00")
    })?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

fn seconds(text: &str) -> Option<u64> {
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let parts: Vec<u64> = clock.split(':').map(number).collect::<Option<_>>()?;
    // Behind days the first number is hours, else the last one is seconds unless it stands alone.
    let units: &[u64] = match (days.is_some(), parts.len()) {
        (true, 1..=3) | (false, 3) => &[HOUR, MINUTE, 1],
        (false, 1..=2) => &[MINUTE, 1],
        _ => return None,
    };
    let mut sum = days.unwrap_or(0).checked_mul(DAY)?;
    for (part, unit) in parts.into_iter().zip(units) {
        sum = sum.checked_add(part.checked_mul(*unit)?)?;
    }
    // A hundred years: beyond it no clock can be set.
    (sum <= 36_500 * DAY).then_some(sum)
}

/// Digits only: `parse` alone would take a sign.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) { None } else { text.parse().ok() }
}

/// The limit in words that `--time` would take.
pub(crate) fn words(limit: Duration) -> String {
    let seconds = limit.as_secs();
    let clock = format!("{:02}:{:02}:{:02}", seconds % DAY / HOUR, seconds % HOUR / MINUTE, seconds % MINUTE);
    if seconds >= DAY { format!("{}-{clock}", seconds / DAY) } else { clock }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_that_slurm_takes_is_taken_and_nothing_else() {
        for (text, wanted) in [
            ("10", 600),
            ("1:30", 90),
            ("00:10:00", 600),
            ("2:00:01", 7201),
            ("1-0", DAY),
            ("1-12", DAY + 12 * HOUR),
            ("1-12:30", DAY + 12 * HOUR + 30 * MINUTE),
            ("2-03:04:05", 2 * DAY + 3 * HOUR + 4 * MINUTE + 5),
            (" 5 ", 300),
        ] {
            let limit = parse(text).unwrap().unwrap();
            assert_eq!(limit, Duration::from_secs(wanted), "{text}");
            assert_eq!(parse(&words(limit)).unwrap(), Some(limit), "{text}");
        }
        for none in ["", "0", "00:00:00", "UNLIMITED", "infinite"] {
            assert_eq!(parse(none).unwrap(), None, "{none}");
        }
        for bad in [
            "soon",
            "10m",
            "-5",
            "+5",
            "1:2:3:4",
            "1-",
            "-1",
            "1-2-3",
            ":",
            "1:",
            "1.5",
            "1-1:1:1:1",
            "99999999999999999999",
            "99999999-0",
            "10 00",
        ] {
            let failure = parse(bad).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidRequest, "{bad}");
            assert!(failure.message.contains(bad) && failure.hint.contains("HH:MM:SS"), "{failure}");
        }
    }
}
