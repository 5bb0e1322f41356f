//! How long to wait before a restart.

use std::time::Duration;

/// The longest pause between two starts.
const CAP: Duration = Duration::from_secs(30);

/// The pause before the n-th restart in a row, n from 1: doubles from `first` up to the cap, then is moved by up to a
/// quarter either way so that workers that died together do not come back together. `jitter` is in 0..1.
pub(super) fn delay(first: Duration, n: u32, jitter: f64) -> Duration {
    let doublings = n.saturating_sub(1).min(20);
    let nominal = first.saturating_mul(1 << doublings).min(CAP);
    nominal.mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0))
}

/// A duration for people: `0.4s`, `12s`.
pub(super) fn human(duration: Duration) -> String {
    if duration < Duration::from_secs(10) {
        let tenths = duration.as_millis().div_ceil(100);
        if tenths.is_multiple_of(10) {
            format!("{}s", tenths / 10)
        } else {
            format!("{}.{}s", tenths / 10, tenths % 10)
        }
    } else {
        format!("{}s", duration.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_stays_below_the_cap_and_never_overflows() {
        let first = Duration::from_millis(500);
        let nominal: Vec<u64> = (1..=9).map(|n| delay(first, n, 0.5).as_millis() as u64).collect();
        assert_eq!(nominal, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        assert_eq!(delay(first, u32::MAX, 0.5), CAP);
        assert_eq!(delay(first, 2, 0.0), Duration::from_millis(750));
        assert_eq!(delay(first, 2, 1.0), Duration::from_millis(1250));
        assert_eq!(delay(Duration::ZERO, 3, 1.0), Duration::ZERO);
    }

    #[test]
    fn people_read_short_pauses_with_one_decimal() {
        for (millis, text) in [(0, "0s"), (420, "0.5s"), (500, "0.5s"), (1000, "1s"), (1250, "1.3s"), (30_000, "30s")] {
            assert_eq!(human(Duration::from_millis(millis)), text);
        }
    }
}
