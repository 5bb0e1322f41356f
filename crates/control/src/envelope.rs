//! The frame of every line that goes out.

use bytes::Bytes;

use crate::json::{Object, push_number, push_text};
use crate::line::PROTOCOL;

/// Ends what [`begin_line`] began.
pub(crate) const LINE_END: &[u8] = b"}\n";

/// Appends a line up to where the value of `data` belongs. `seq` is the event's place in the log, for lines that have one.
pub(crate) fn begin_line(out: &mut Vec<u8>, event: &str, timestamp_us: u64, seq: Option<u64>) {
    out.extend_from_slice(b"{\"protocol\":\"");
    out.extend_from_slice(PROTOCOL.as_bytes());
    out.extend_from_slice(b"\",\"type\":\"event\",\"timestamp\":\"");
    push_timestamp(out, timestamp_us);
    out.extend_from_slice(b"\",\"event\":");
    push_text(out, event);
    if let Some(seq) = seq {
        out.extend_from_slice(b",\"seq\":");
        push_number(out, i64::try_from(seq).unwrap_or(i64::MAX));
    }
    out.extend_from_slice(b",\"data\":");
}

/// A whole line of the present moment, whose `data` the closure fills.
pub(crate) fn line(event: &str, fill: impl FnOnce(&mut Object<'_>)) -> Bytes {
    let mut out = Vec::with_capacity(256);
    begin_line(&mut out, event, drover_service::now_us(), None);
    let mut data = Object::begin(&mut out);
    fill(&mut data);
    data.end();
    out.extend_from_slice(LINE_END);
    out.into()
}

/// ISO 8601 in UTC with microseconds and `+00:00`.
fn push_timestamp(out: &mut Vec<u8>, timestamp_us: u64) {
    let moment = i64::try_from(timestamp_us)
        .ok()
        .and_then(|us| jiff::Timestamp::from_microsecond(us).ok())
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let civil = jiff::tz::Offset::UTC.to_datetime(moment);
    push_digits(out, civil.year().unsigned_abs().into(), 4);
    for (separator, part) in [
        (b'-', civil.month()),
        (b'-', civil.day()),
        (b'T', civil.hour()),
        (b':', civil.minute()),
        (b':', civil.second()),
    ] {
        out.push(separator);
        push_digits(out, part.unsigned_abs().into(), 2);
    }
    out.push(b'.');
    push_digits(out, civil.subsec_nanosecond().unsigned_abs() / 1000, 6);
    out.extend_from_slice(b"+00:00");
}

fn push_digits(out: &mut Vec<u8>, value: u32, width: u32) {
    for place in (0..width).rev() {
        out.push(b'0' + (value / 10_u32.pow(place) % 10) as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timestamp_has_the_upstream_form() {
        let mut out = Vec::new();
        push_timestamp(&mut out, 1_772_063_938_123_456);
        assert_eq!(String::from_utf8(out).unwrap(), "2026-02-25T23:58:58.123456+00:00");
        let mut out = Vec::new();
        push_timestamp(&mut out, u64::MAX);
        assert_eq!(String::from_utf8(out).unwrap(), "1970-01-01T00:00:00.000000+00:00");
    }
}
