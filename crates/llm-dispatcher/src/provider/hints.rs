//! What providers say about their limits, in headers and in the bodies of their refusals.

use std::time::Duration;

use jiff::Timestamp;

use super::wire::Fields;
use crate::call::{LimitHints, Quota};

const MINUTE: Duration = Duration::from_mins(1);
const DAY: Duration = Duration::from_hours(24);

/// How a provider counts, where that is known and its headers do not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counting {
    /// Nothing is known.
    Unknown,
    /// Requests by the day, tokens by the minute.
    RequestsDailyTokensByMinute,
}

/// Reads the head of an answer. `now` is for providers that name a time instead of a duration.
pub(super) fn from_fields(fields: &Fields, counting: Counting, now: impl Fn() -> Timestamp) -> LimitHints {
    // Most answers say nothing at all.
    let mut says = (false, false);
    for (name, _) in fields.iter() {
        let has = |word: &[u8]| name.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word));
        says.0 |= has(b"retry-after");
        says.1 |= has(b"ratelimit");
    }
    let mut hints = LimitHints::default();
    if says == (false, false) {
        return hints;
    }
    let now = now();
    let text = |name: &str| fields.get(name);
    hints.retry_after = retry_after(fields, now);
    if !says.1 {
        return hints;
    }
    let number = |name: &str| text(name).and_then(|value| value.parse::<f64>().ok()).map(|value| value.max(0.0) as u64);
    let quota = |dimension: &str| Quota {
        limit: number(&format!("x-ratelimit-limit-{dimension}")),
        remaining: number(&format!("x-ratelimit-remaining-{dimension}")),
        reset_after: text(&format!("x-ratelimit-reset-{dimension}")).and_then(duration),
        window: None,
    };
    hints.requests = quota("requests");
    hints.tokens = quota("tokens");
    if counting == Counting::RequestsDailyTokensByMinute {
        hints.requests.window = Some(DAY);
        hints.tokens.window = Some(MINUTE);
    }
    let anthropic = |dimension: &str| Quota {
        limit: number(&format!("anthropic-ratelimit-{dimension}-limit")),
        remaining: number(&format!("anthropic-ratelimit-{dimension}-remaining")),
        reset_after: text(&format!("anthropic-ratelimit-{dimension}-reset")).and_then(|value| until(value, now)),
        window: Some(MINUTE),
    };
    if text("anthropic-ratelimit-requests-limit").is_some() {
        hints.requests = anthropic("requests");
    }
    // The whole, or the one of its parts that is nearest to its end.
    let tokens = ["tokens", "input-tokens", "output-tokens"].map(anthropic);
    if let Some(nearest) = tokens.into_iter().filter(|quota| quota.remaining.is_some()).min_by_key(|q| q.remaining) {
        hints.tokens = nearest;
    }
    hints
}

/// `retry-after-ms`, or else `retry-after` in seconds or as a date.
fn retry_after(fields: &Fields, now: Timestamp) -> Option<Duration> {
    let text = |name: &str| fields.get(name);
    let milliseconds =
        text("retry-after-ms").and_then(|value| value.parse::<f64>().ok()).and_then(|ms| seconds(ms / 1e3));
    milliseconds.or_else(|| {
        let value = text("retry-after")?;
        if let Ok(value) = value.parse::<f64>() {
            return seconds(value);
        }
        let at = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
        Some(Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO))
    })
}

fn until(value: &str, now: Timestamp) -> Option<Duration> {
    let at: Timestamp = value.parse().ok()?;
    Some(Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO))
}

fn seconds(value: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(value).ok()
}

/// A duration as providers write it: `2m59.56s`, `1h`, `100ms`, `7.66s`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    if let Ok(value) = rest.parse::<f64>() {
        return seconds(value);
    }
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let scale = match &rest[digits..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        sum = sum.checked_add(seconds(value * scale)?)?;
        rest = &rest[unit_end..];
    }
    Some(sum)
}

/// The wait that a message for people names: "Please retry in 2.5s", "Please try again in 1m2.3s".
pub(super) fn from_message(message: &str) -> Option<Duration> {
    let at = ["retry in ", "try again in "].iter().find_map(|words| Some(message.find(words)? + words.len()))?;
    let word = message[at..].split(|c: char| c.is_whitespace() || c == ',').next()?;
    duration(word.trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(headers: &[(&'static str, &str)], counting: Counting) -> LimitHints {
        from_fields(&Fields::from_pairs(headers), counting, || "2026-11-21T12:00:00Z".parse().unwrap())
    }

    #[test]
    fn durations_are_read_as_providers_write_them() {
        for (text, millis) in [
            ("2m59.56s", 179_560),
            ("7.66s", 7660),
            ("6m0s", 360_000),
            ("1s", 1000),
            ("100ms", 100),
            ("1h2m3s", 3_723_000),
            ("1m500ms", 60_500),
            ("12", 12_000),
            ("0.5", 500),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "soon", "5x", "-1", "s", "1e400", "..s", "1.2.3s", "NaN", "99999999999999999999999h"] {
            assert_eq!(duration(text), None, "{text}");
        }
        let groq = "Rate limit reached for model `x` on tokens per minute (TPM): Limit 15000, Used 11972, Requested 4351. \
                    Please try again in 5.289s. Visit a page";
        assert_eq!(from_message(groq), Some(Duration::from_millis(5289)));
        assert_eq!(from_message("Quota exceeded.\nPlease retry in 2.5s."), Some(Duration::from_millis(2500)));
        assert_eq!(from_message("try again later"), None);
    }

    #[test]
    fn the_wait_comes_from_the_most_exact_header() {
        let wait = |headers: &[(&'static str, &str)]| hints(headers, Counting::Unknown).delay();
        assert_eq!(wait(&[("retry-after", "3")]), Some(Duration::from_secs(3)));
        assert_eq!(wait(&[("retry-after", "3"), ("retry-after-ms", "2750")]), Some(Duration::from_millis(2750)));
        assert_eq!(wait(&[("retry-after", "Sat, 21 Nov 2026 12:00:07 GMT")]), Some(Duration::from_secs(7)));
        assert_eq!(wait(&[("retry-after", "Sat, 21 Nov 2026 11:00:00 GMT")]), Some(Duration::ZERO));
        assert_eq!(wait(&[("retry-after", "-5")]), None);
        assert_eq!(wait(&[("retry-after", "whenever")]), None);
        let exhausted = [
            ("x-ratelimit-remaining-requests", "12"),
            ("x-ratelimit-reset-requests", "2m"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "7.66s"),
        ];
        assert_eq!(wait(&exhausted), Some(Duration::from_millis(7660)));
    }

    #[test]
    fn both_families_of_headers_are_read() {
        let groq = hints(
            &[
                ("x-ratelimit-limit-requests", "14400"),
                ("x-ratelimit-remaining-requests", "14370"),
                ("x-ratelimit-reset-requests", "2m59.56s"),
                ("x-ratelimit-limit-tokens", "18000"),
                ("x-ratelimit-remaining-tokens", "17997"),
                ("x-ratelimit-reset-tokens", "7.66s"),
            ],
            Counting::RequestsDailyTokensByMinute,
        );
        assert_eq!((groq.requests.limit, groq.requests.window), (Some(14_400), Some(DAY)));
        assert_eq!((groq.tokens.remaining, groq.tokens.window), (Some(17_997), Some(MINUTE)));

        let anthropic = hints(
            &[
                ("anthropic-ratelimit-requests-limit", "50"),
                ("anthropic-ratelimit-requests-remaining", "49"),
                ("anthropic-ratelimit-requests-reset", "2026-11-21T12:00:01Z"),
                ("anthropic-ratelimit-input-tokens-limit", "50000"),
                ("anthropic-ratelimit-input-tokens-remaining", "40000"),
                ("anthropic-ratelimit-output-tokens-limit", "10000"),
                ("anthropic-ratelimit-output-tokens-remaining", "0"),
                ("anthropic-ratelimit-output-tokens-reset", "2026-11-21T12:00:09.5Z"),
            ],
            Counting::Unknown,
        );
        assert_eq!(anthropic.requests.reset_after, Some(Duration::from_secs(1)));
        assert_eq!((anthropic.tokens.limit, anthropic.tokens.remaining), (Some(10_000), Some(0)));
        assert_eq!(anthropic.delay(), Some(Duration::from_millis(9500)));
    }
}
