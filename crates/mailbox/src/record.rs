//! One record, one line.

use std::borrow::Cow;
use std::io::{self, BufRead as _};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::{FORMAT_VERSION, MAX_LINE_BYTES};

/// A record, borrowed from its line.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    /// Counts up by one per record in its stream, from 1.
    pub seq: u64,
    /// Microseconds of Unix time.
    pub ts: u64,
    /// The allocation it is from or for.
    pub job_id: Cow<'a, str>,
    /// The node it is from or for.
    pub node_id: u32,
    /// Which incarnation of the node's worker it is from or for; `gen` on disk.
    pub generation: u32,
    /// The injection it belongs to.
    pub injection_id: Option<Cow<'a, str>>,
    /// W3C traceparent.
    pub trace: Option<Cow<'a, str>>,
    /// What it is; `type` on disk.
    pub kind: Cow<'a, str>,
    /// The fields of that kind, an object.
    pub data: &'a RawValue,
}

/// What a whole line of a segment can be.
#[derive(Debug, Clone)]
pub enum Line<'a> {
    /// A record.
    Record(Record<'a>),
    /// The segment is full; the stream goes on in this one.
    Rotate(u32),
}

/// A line that is no record. The reader goes on with the next line.
#[derive(Debug, Error)]
pub enum RecordError {
    /// Nothing before the line end.
    #[error("empty line")]
    Empty,
    /// More than anybody should hold in memory.
    #[error("line of {bytes} bytes is longer than {MAX_LINE_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A line end in the middle.
    #[error("more than one line")]
    NotOneLine,
    /// Not JSON, or not an object with the fields of a record.
    #[error("not a record")]
    Malformed {
        /// What was expected where.
        #[source]
        source: serde_json::Error,
    },
    /// Written by a later version of us.
    #[error("record of format version {got}, but this program reads version {FORMAT_VERSION}; upgrade it")]
    WrongVersion {
        /// The version it claims.
        got: u64,
    },
    /// `data` is there but no object.
    #[error("data is not an object")]
    DataNotObject,
}

#[derive(Serialize, Deserialize)]
struct RecordLine<'a> {
    v: u64,
    seq: u64,
    ts: u64,
    #[serde(borrow)]
    job_id: Text<'a>,
    node_id: u32,
    #[serde(rename = "gen")]
    generation: u32,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    injection_id: Option<Text<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    trace: Option<Text<'a>>,
    #[serde(rename = "type", borrow)]
    kind: Text<'a>,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// A string that is borrowed unless it has escapes; serde borrows no `Option<Cow<str>>` by itself.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Text<'a> {
    fn borrow(text: &'a str) -> Self {
        Self(Cow::Borrowed(text))
    }
}

/// What is left of a line that is no record of ours: enough to say what it is instead.
#[derive(Deserialize)]
struct OtherLine {
    v: Option<u64>,
    rotate: Option<u32>,
}

#[derive(Serialize)]
struct RotateLine {
    v: u32,
    rotate: u32,
}

const ROTATE_PREFIX: &[u8] = br#"{"v":1,"rotate":"#;

/// Reads one line, with or without its line end. Never panics, whatever the bytes.
pub fn decode_line(line: &[u8]) -> Result<Line<'_>, RecordError> {
    if line.len() > MAX_LINE_BYTES {
        return Err(RecordError::TooLong { bytes: line.len() });
    }
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    if line.trim_ascii().is_empty() {
        return Err(RecordError::Empty);
    }
    if has_line_end(line) {
        return Err(RecordError::NotOneLine);
    }
    if is_rotate(line) {
        return decode_other(line, None);
    }
    let record: RecordLine<'_> = match serde_json::from_slice(line) {
        Ok(record) => record,
        Err(error) => return decode_other(line, Some(error)),
    };
    if record.v != u64::from(FORMAT_VERSION) {
        return Err(RecordError::WrongVersion { got: record.v });
    }
    if !record.data.get().starts_with('{') {
        return Err(RecordError::DataNotObject);
    }
    Ok(Line::Record(Record {
        seq: record.seq,
        ts: record.ts,
        job_id: record.job_id.0,
        node_id: record.node_id,
        generation: record.generation,
        injection_id: record.injection_id.map(|text| text.0),
        trace: record.trace.map(|text| text.0),
        kind: record.kind.0,
        data: record.data,
    }))
}

/// A line that is no record: a rotation, a record of another version, or nothing of ours.
fn decode_other(line: &[u8], why: Option<serde_json::Error>) -> Result<Line<'_>, RecordError> {
    match serde_json::from_slice::<OtherLine>(line) {
        Ok(OtherLine { v: Some(got), .. }) if got != u64::from(FORMAT_VERSION) => {
            Err(RecordError::WrongVersion { got })
        }
        Ok(OtherLine { v: Some(_), rotate: Some(next) }) if why.is_none() => Ok(Line::Rotate(next)),
        Ok(_) => Err(RecordError::Malformed {
            source: why.unwrap_or_else(|| serde::de::Error::custom("a rotation without a segment number")),
        }),
        Err(source) => Err(RecordError::Malformed { source: why.unwrap_or(source) }),
    }
}

/// Appends one record as a line, its line end included.
pub fn encode_line(record: &Record<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    let line = RecordLine {
        v: u64::from(FORMAT_VERSION),
        seq: record.seq,
        ts: record.ts,
        job_id: Text::borrow(&record.job_id),
        node_id: record.node_id,
        generation: record.generation,
        injection_id: record.injection_id.as_deref().map(Text::borrow),
        trace: record.trace.as_deref().map(Text::borrow),
        kind: Text::borrow(&record.kind),
        data: record.data,
    };
    write_json(&line, out);
    // Raw JSON may hold line ends, but only between its tokens: inside a string they are always escaped.
    for byte in &mut out[start..] {
        if *byte == b'\n' || *byte == b'\r' {
            *byte = b' ';
        }
    }
    out.push(b'\n');
}

/// Whether a line looks like one that ends a segment.
pub(crate) fn is_rotate(line: &[u8]) -> bool {
    line.starts_with(ROTATE_PREFIX)
}

/// Appends the line that ends a full segment.
pub(crate) fn encode_rotate(next: u32, out: &mut Vec<u8>) {
    write_json(&RotateLine { v: FORMAT_VERSION, rotate: next }, out);
    out.push(b'\n');
}

fn write_json(value: &impl Serialize, out: &mut Vec<u8>) {
    // Numbers and strings into memory: neither the serializer nor the writer has a way to fail.
    let written = serde_json::to_writer(&mut *out, value);
    debug_assert!(written.is_ok(), "{written:?}");
}

fn has_line_end(bytes: &[u8]) -> bool {
    line_len(bytes).is_some()
}

/// Length of the first line, its line end included; `None` when there is no line end.
pub(crate) fn line_len(bytes: &[u8]) -> Option<usize> {
    // The standard library searches with wide words here, which a closure over bytes does not.
    let mut rest = bytes;
    let skipped: io::Result<usize> = rest.skip_until(b'\n');
    skipped.ok().filter(|len| *len > 0 && bytes[*len - 1] == b'\n')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(data: &RawValue) -> Record<'_> {
        Record {
            seq: 7,
            ts: 1_700_000_000_000_000,
            job_id: "local-1".into(),
            node_id: 3,
            generation: 2,
            injection_id: Some("i-1".into()),
            trace: None,
            kind: "assistant_delta".into(),
            data,
        }
    }

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    fn decoded(line: &[u8]) -> Record<'_> {
        match decode_line(line).unwrap() {
            Line::Record(record) => record,
            Line::Rotate(next) => panic!("rotate {next}"),
        }
    }

    #[test]
    fn the_format_on_disk_is_fixed() {
        let mut line = Vec::new();
        encode_line(&record(&raw(r#"{"content":"hi"}"#)), &mut line);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            concat!(
                r#"{"v":1,"seq":7,"ts":1700000000000000,"job_id":"local-1","node_id":3,"gen":2,"#,
                r#""injection_id":"i-1","type":"assistant_delta","data":{"content":"hi"}}"#,
                "\n"
            )
        );
        let mut rotate = Vec::new();
        encode_rotate(2, &mut rotate);
        assert_eq!(rotate, b"{\"v\":1,\"rotate\":2}\n");
        assert!(rotate.starts_with(ROTATE_PREFIX));
        assert!(matches!(decode_line(&rotate), Ok(Line::Rotate(2))));
    }

    #[test]
    fn fields_are_borrowed_and_later_fields_are_ignored() {
        let line =
            br#"{"v":1,"seq":1,"ts":2,"job_id":"j","node_id":0,"gen":1,"trace":"00-a","new":[1],"type":"x","data":{}}"#;
        let record = decoded(line);
        assert!(matches!(record.job_id, Cow::Borrowed("j")));
        assert!(matches!(record.trace, Some(Cow::Borrowed("00-a"))));
        assert!(record.injection_id.is_none());
        let escaped = br#"{"v":1,"seq":1,"ts":2,"job_id":"j","node_id":0,"gen":1,"type":"a\"b","data":{}}"#;
        assert_eq!(decoded(escaped).kind, "a\"b");
    }

    #[test]
    fn what_is_no_record_is_said_clearly() {
        let valid = r#"{"v":1,"seq":1,"ts":2,"job_id":"j","node_id":0,"gen":1,"type":"x","data":{}}"#;
        let cases: &[(Vec<u8>, &str)] = &[
            (b"".to_vec(), "empty line"),
            (b"  \n".to_vec(), "empty line"),
            (vec![b'x'; MAX_LINE_BYTES + 1], "line of 67043329 bytes is longer than 67043328"),
            (format!("{valid}\n{valid}\n").into_bytes(), "more than one line"),
            (b"hello".to_vec(), "not a record"),
            (b"\0\0\0\0".to_vec(), "not a record"),
            (b"[1]".to_vec(), "not a record"),
            (b"{\"v\":1,\"seq\":\xff}".to_vec(), "not a record"),
            (valid.replace("\"x\"", "\"x\0\"").into_bytes(), "not a record"),
            (valid.replace("\"seq\":1,", "").into_bytes(), "not a record"),
            (valid.replace("\"seq\":1", "\"seq\":-1").into_bytes(), "not a record"),
            (valid.replace("{}", "[]").into_bytes(), "data is not an object"),
            (valid.replace("\"v\":1", "\"v\":2").into_bytes(), "record of format version 2"),
            (br#"{"v":3,"what":"ever"}"#.to_vec(), "record of format version 3"),
            (br#"{"v":1,"rotate":-2}"#.to_vec(), "not a record"),
            (valid.as_bytes()[..valid.len() - 4].to_vec(), "not a record"),
            (format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes(), "not a record"),
        ];
        for (line, expected) in cases {
            let error = decode_line(line).unwrap_err().to_string();
            let shown = String::from_utf8_lossy(&line[..line.len().min(60)]);
            assert!(error.starts_with(expected), "{shown:?}: {error}");
        }
    }

    #[test]
    fn data_with_line_ends_becomes_one_line() {
        let mut line = Vec::new();
        encode_line(&record(&raw("{\n  \"text\": \"a\\nb\"\r\n}")), &mut line);
        assert_eq!(line_len(&line), Some(line.len()));
        let value: serde_json::Value = serde_json::from_str(decoded(&line).data.get()).unwrap();
        assert_eq!(value["text"], "a\nb");
    }

    #[test]
    fn a_line_ends_at_its_line_end() {
        assert_eq!(line_len(b""), None);
        assert_eq!(line_len(b"abc"), None);
        assert_eq!(line_len(b"\n"), Some(1));
        assert_eq!(line_len(b"ab\ncd\n"), Some(3));
    }

    proptest! {
        #[test]
        fn every_record_survives(seq: u64, node: u32, job in any::<String>(), kind in any::<String>(),
                                 injection in any::<Option<String>>(), text in any::<String>()) {
            let data = serde_json::value::to_raw_value(&serde_json::json!({ "text": text })).unwrap();
            let before = Record {
                seq, node_id: node, job_id: job.into(), kind: kind.into(), injection_id: injection.map(Into::into),
                ..record(&data)
            };
            let mut line = Vec::new();
            encode_line(&before, &mut line);
            let after = decoded(&line);
            prop_assert_eq!(after.seq, before.seq);
            prop_assert_eq!(after.node_id, before.node_id);
            prop_assert_eq!(after.job_id, before.job_id);
            prop_assert_eq!(after.kind, before.kind);
            prop_assert_eq!(after.injection_id, before.injection_id);
            prop_assert_eq!(after.data.get(), before.data.get());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0usize..90, byte: u8) {
            let _ = decode_line(&bytes);
            let mut line = Vec::new();
            encode_line(&record(&raw(r#"{"content":"hi"}"#)), &mut line);
            line[at] = byte;
            let _ = decode_line(&line);
        }
    }
}
