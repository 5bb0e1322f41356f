//! How Slurm writes times and lists of hosts, and how its column formats are read.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::model::Moment;

/// `5:03`, `1:05:03`, `2-01:05:03`, as squeue and sinfo write it.
pub(crate) fn span(seconds: u64) -> String {
    let (days, hours, minutes, rest) = split(seconds);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{rest:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{rest:02}"),
        _ => format!("{days}-{hours:02}:{minutes:02}:{rest:02}"),
    }
}

/// `00:05:03`, `2-01:05:03`, as scontrol and sacct write it.
pub(crate) fn long_span(seconds: u64) -> String {
    let (days, hours, minutes, rest) = split(seconds);
    if days == 0 { format!("{hours:02}:{minutes:02}:{rest:02}") } else { span(seconds) }
}

fn split(seconds: u64) -> (u64, u64, u64, u64) {
    (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

/// A moment as every command writes it: local time, or seconds since 1970 with `SLURM_TIME_FORMAT=%s`.
pub(crate) fn moment(at: Moment) -> String {
    if std::env::var("SLURM_TIME_FORMAT").as_deref() == Ok("%s") {
        return at.div_euclid(1000).to_string();
    }
    let timestamp = Timestamp::from_millisecond(at).unwrap_or_default();
    timestamp.to_zoned(TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S").to_string()
}

/// A line that says what day and time it is.
pub(crate) fn day(at: Moment) -> String {
    let timestamp = Timestamp::from_millisecond(at).unwrap_or_default();
    timestamp.to_zoned(TimeZone::system()).strftime("%a %b %d %H:%M:%S %Y\n").to_string()
}

/// Seconds of a time limit; `None` for no limit.
pub(crate) type Limit = Option<u64>;

/// Reads a time limit: `10`, `5:30`, `1:00:00`, `1-12`, `1-12:30`, `UNLIMITED`. `None` when it is none.
pub(crate) fn limit(text: &str) -> Option<Limit> {
    if text.eq_ignore_ascii_case("unlimited") || text.eq_ignore_ascii_case("infinite") || text == "-1" {
        return Some(None);
    }
    let (days, clock) = text.split_once('-').map_or((None, text), |(days, clock)| (Some(days), clock));
    let parts: Vec<u64> = clock.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let units: &[u64] = match (days.is_some(), parts.len()) {
        (true, 1..=3) | (false, 3) => &[3600, 60, 1],
        (false, 1..=2) => &[60, 1],
        _ => return None,
    };
    let days: u64 = days.unwrap_or("0").parse().ok()?;
    let seconds = parts
        .iter()
        .zip(units)
        .try_fold(days.checked_mul(86_400)?, |sum: u64, (part, unit)| sum.checked_add(part.checked_mul(*unit)?))?;
    // Slurm counts in minutes, upwards; nothing means no limit.
    Some((seconds > 0).then(|| seconds.div_ceil(60) * 60))
}

/// `n[1-2,4]` for `n1`, `n2`, `n4`.
pub(crate) fn compress(names: &[String]) -> String {
    let mut groups: Vec<(String, Vec<u64>)> = Vec::new();
    for name in names {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (prefix, number) = name.split_at(name.len() - digits);
        let number = number.parse().unwrap_or(0);
        match groups.iter_mut().find(|(known, _)| known == prefix) {
            Some((_, numbers)) if digits > 0 => numbers.push(number),
            _ if digits > 0 => groups.push((prefix.to_owned(), vec![number])),
            _ => groups.push((name.clone(), Vec::new())),
        }
    }
    let shown = groups.into_iter().map(|(prefix, mut numbers)| {
        numbers.sort_unstable();
        match numbers.as_slice() {
            [] => prefix,
            [one] => format!("{prefix}{one}"),
            many => format!("{prefix}[{}]", ranges(many)),
        }
    });
    shown.collect::<Vec<_>>().join(",")
}

fn ranges(numbers: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let shown = parts
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
    shown.collect::<Vec<_>>().join(",")
}

/// The hosts of `n[1-2,4],login`.
pub(crate) fn expand(list: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let cut = rest.find([',', '[']).unwrap_or(rest.len());
        let prefix = &rest[..cut];
        if rest[cut..].starts_with('[') {
            let close = rest.find(']').unwrap_or(rest.len());
            for part in rest[cut + 1..close].split(',') {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
                names.extend((first..=last).map(|number| format!("{prefix}{number}")));
            }
            rest = rest.get(close + 1..).unwrap_or("").trim_start_matches(',');
        } else {
            names.push(prefix.to_owned());
            rest = rest[cut..].trim_start_matches(',');
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// One piece of a format such as `%.18i|%T`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    Field { letter: char, width: usize, right: bool },
}

/// Takes a format apart.
pub(crate) fn pieces(format: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let right = chars.next_if_eq(&'.').is_some();
        let mut width = 0;
        while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
            width = width * 10 + digit as usize;
            chars.next();
        }
        match chars.next() {
            Some(letter) if letter != '%' => {
                if !text.is_empty() {
                    pieces.push(Piece::Text(std::mem::take(&mut text)));
                }
                pieces.push(Piece::Field { letter, width, right });
            }
            _ => text.push('%'),
        }
    }
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
    pieces
}

/// A value in its column: cut or filled to the width, if there is one.
pub(crate) fn column(value: &str, width: usize, right: bool) -> String {
    let cut: String = if width == 0 { value.to_owned() } else { value.chars().take(width).collect() };
    if right { format!("{cut:>width$}") } else { format!("{cut:<width$}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_limits_are_slurms() {
        assert_eq!(["0:05", "1:01:05", "1-01:01:05"], [5, 3665, 90_065].map(span).each_ref().map(String::as_str));
        assert_eq!(long_span(5), "00:00:05");
        for (text, seconds) in [("10", 600), ("0:30", 60), ("1:00:00", 3600), ("1-12", 129_600), ("1-12:30", 131_400)] {
            assert_eq!(limit(text), Some(Some(seconds)), "{text}");
        }
        assert_eq!(
            (limit("UNLIMITED"), limit("0"), limit("soon"), limit("1:2:3:4")),
            (Some(None), Some(None), None, None)
        );
    }

    #[test]
    fn host_lists_go_there_and_back() {
        for list in ["n1", "n[1-4]", "n[1-2,4]", "login,n[1-2,9-12]", "a1,b[2-3]"] {
            assert_eq!(compress(&expand(list)), list);
        }
        assert_eq!(expand("n[1-2,4]"), ["n1", "n2", "n4"]);
    }

    #[test]
    fn formats_are_taken_apart() {
        let field = |letter, width, right| Piece::Field { letter, width, right };
        assert_eq!(pieces("%.18i %%|%T"), [field('i', 18, true), Piece::Text(" %|".to_owned()), field('T', 0, false)]);
        assert_eq!(column("RUNNING", 4, true), "RUNN");
        assert_eq!(column("ab", 4, true) + "|" + &column("ab", 3, false), "  ab|ab ");
    }
}
