//! Small phrases: ages, sizes, short ids.

use std::collections::BTreeSet;

/// How long ago, as people say it.
pub(crate) fn age(now_ms: u64, then_ms: u64) -> String {
    if then_ms == 0 {
        return "-".to_owned();
    }
    let secs = now_ms.saturating_sub(then_ms) / 1000;
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// A duration with the precision that is worth reading.
pub(crate) fn took(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{:.1} ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", micros / 1000),
        1_000_000..60_000_000 => format!("{:.1} s", micros as f64 / 1e6),
        _ => format!("{} min {} s", micros / 60_000_000, micros / 1_000_000 % 60),
    }
}

/// A size in bytes.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        0x40_0000..0x1_0000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// "1 node", "4 nodes".
pub(crate) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Nothing as a dash.
pub(crate) fn dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// How many characters of these ids tell all of them apart; at least eight.
pub(crate) fn telling_length<'a>(ids: impl IntoIterator<Item = &'a str>) -> usize {
    let ids: BTreeSet<&str> = ids.into_iter().collect();
    let sorted: Vec<&str> = ids.into_iter().collect();
    let common = sorted
        .windows(2)
        .map(|pair| pair[0].chars().zip(pair[1].chars()).take_while(|(a, b)| a == b).count() + 1)
        .max();
    common.unwrap_or(0).max(8)
}

/// The beginning of an id.
pub(crate) fn short(id: &str, length: usize) -> &str {
    id.char_indices().nth(length).map_or(id, |(end, _)| &id[..end]).trim_end_matches('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_ids_tell_apart_what_they_stand_for() {
        let ids = ["0199aaaa-1111-7000", "0199aaaa-1112-7000", "0299aaaa-1111-7000"];
        let length = telling_length(ids);
        let short: BTreeSet<&str> = ids.iter().map(|id| short(id, length)).collect();
        assert_eq!(short.len(), 3, "{short:?}");
        assert_eq!(telling_length(["only-one-of-them"]), 8);
    }

    #[test]
    fn durations_and_ages_read_well() {
        assert_eq!(
            [took(1_500), took(47_000), took(2_340_000), took(61_000_000)],
            ["1.5 ms", "47 ms", "2.3 s", "1 min 1 s"]
        );
        assert_eq!([age(100_000, 41_000), age(7_200_000, 1), age(5, 0)], ["59s", "1h", "-"]);
        assert_eq!(age(1_000, 5_000), "0s", "a clock that went back is no reason for nonsense");
    }
}
