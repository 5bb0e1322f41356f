//! From bytes to commands: cuts lines, and reads what a line asks for.
//!
//! Pure. Whatever a client sends, the outcome is one of [`Inbound`]; nothing panics and nothing ends the router.

use serde_json::{Map, Value};
use thiserror::Error;

/// The protocol's name, which every command carries.
pub const PROTOCOL: &str = "codeswarm.router.v1";

/// Buffers larger than this are given back once they are empty, so that an idle connection holds no memory.
const KEEP_BYTES: usize = 4096;

/// A line that is longer than a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("line is longer than {limit} bytes")]
pub struct LineTooLong {
    /// The most a line may have.
    pub limit: usize,
}

/// Cuts a stream of bytes into lines, however it arrives in pieces.
#[derive(Debug)]
pub struct LineDecoder {
    buffer: Vec<u8>,
    /// Where the first unread line begins.
    start: usize,
    /// Up to here there is no line end in the unread part.
    scanned: usize,
    limit: usize,
}

impl LineDecoder {
    /// A decoder for lines of at most `limit` bytes, the line end not counted.
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, scanned: 0, limit }
    }

    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its line end; `None` when more bytes are needed.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>, LineTooLong> {
        let too_long = LineTooLong { limit: self.limit };
        let Some(length) = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n') else {
            self.scanned = self.buffer.len();
            if self.scanned - self.start > self.limit {
                return Err(too_long);
            }
            self.forget_read_bytes();
            return Ok(None);
        };
        let end = self.scanned + length;
        let start = std::mem::replace(&mut self.start, end + 1);
        self.scanned = self.start;
        if end - start > self.limit {
            return Err(too_long);
        }
        Ok(Some(&self.buffer[start..end]))
    }

    /// Bytes taken and not yet given out as lines.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn forget_read_bytes(&mut self) {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.scanned = 0;
            self.buffer.clear();
            if self.buffer.capacity() > KEEP_BYTES {
                self.buffer = Vec::new();
            }
        }
    }
}

/// A command as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    /// The command's name.
    pub name: String,
    /// What answers are marked with; null when the asker gave nothing.
    pub request_id: RequestId,
    /// The command's fields.
    pub payload: Map<String, Value>,
}

impl Command {
    /// Reads the payload: what is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        crate::request::read(&self.name, &self.payload).map(drop).map_err(|refusal| refusal.reason)
    }
}

/// The asker's mark for the answers, kept as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestId(Value);

/// Text that stands for a mark that is no text: the router knows ids as text only, and the asker gets its own back.
const AS_JSON: &str = "json:";

impl RequestId {
    /// Of no request.
    pub fn none() -> Self {
        Self(Value::Null)
    }

    /// The mark as the text that the router knows it by; none is empty. A mark of another type is its JSON behind
    /// `json:`, so that the number 7 and the text "7" are two marks. [`RequestId::of_text`] undoes it.
    pub fn as_text(&self) -> String {
        match &self.0 {
            Value::String(text) if !text.starts_with(AS_JSON) => text.clone(),
            Value::Null => String::new(),
            other => format!("{AS_JSON}{other}"),
        }
    }

    /// The mark that the router knows by this text.
    pub fn of_text(text: &str) -> Self {
        let json = text.strip_prefix(AS_JSON).and_then(|json| serde_json::from_str(json).ok());
        Self(json.unwrap_or_else(|| Value::String(text.to_owned())))
    }

    /// The mark as JSON.
    pub fn to_json(&self) -> String {
        self.0.to_string()
    }
}

impl From<&str> for RequestId {
    fn from(text: &str) -> Self {
        Self(Value::String(text.to_owned()))
    }
}

/// What a line turned out to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Inbound {
    /// Nothing that could be answered: not JSON, not an object, another protocol, empty.
    Ignored,
    /// Meant for us, but not to be understood.
    Unusable {
        /// What the answer is marked with.
        request_id: RequestId,
        /// What is wrong with it.
        reason: String,
    },
    /// A command.
    Command(Command),
    /// The secret that a connection begins with where one is wanted. It shows itself as `***`.
    Token(ShownToken),
}

/// A token as it was sent.
#[derive(Clone, PartialEq, Eq)]
pub struct ShownToken(String);

impl ShownToken {
    /// The token itself, to compare.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for ShownToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Reads one line.
pub fn decode(line: &[u8]) -> Inbound {
    let line = line.trim_ascii();
    if line.is_empty() {
        return Inbound::Ignored;
    }
    let (text, damaged) = match std::str::from_utf8(line) {
        Ok(text) => (std::borrow::Cow::Borrowed(text), false),
        Err(_) => (String::from_utf8_lossy(line), true),
    };
    let parsed = serde_json::from_str(&text)
        .or_else(|error| replace_lone_surrogates(&text).map_or(Err(error), |mended| serde_json::from_str(&mended)));
    let Ok(Value::Object(mut fields)) = parsed else {
        return Inbound::Ignored;
    };
    if fields.get("protocol").and_then(Value::as_str) != Some(PROTOCOL) {
        return Inbound::Ignored;
    }
    if let (Some("token"), Some(Value::String(token))) =
        (fields.get("type").and_then(Value::as_str), fields.get("token"))
    {
        return Inbound::Token(ShownToken(token.clone()));
    }
    let request_id = RequestId(fields.remove("request_id").unwrap_or(Value::Null));
    let unusable = |request_id, reason: &str| Inbound::Unusable { request_id, reason: reason.to_owned() };
    if damaged {
        return unusable(request_id, "the line is not valid UTF-8");
    }
    let payload = match fields.remove("payload") {
        None => Map::new(),
        Some(Value::Object(payload)) => payload,
        Some(_) => return unusable(request_id, "payload must be an object"),
    };
    match fields.remove("command") {
        Some(Value::String(name)) => Inbound::Command(Command { name, request_id, payload }),
        _ => unusable(request_id, "command must be text"),
    }
}

/// JavaScript writes half of a surrogate pair as an escape of its own when a text was cut in the middle of a character.
/// Rust strings cannot hold it, so it becomes the replacement character. `None` when there is no such escape.
fn replace_lone_surrogates(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let unit_at = |at: usize| -> Option<u16> {
        let escape = bytes.get(at..at + 6)?;
        let digits = escape.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let mut mended = String::new();
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b'\\' {
            at += 1;
            continue;
        }
        match unit_at(at) {
            Some(0xd800..=0xdbff) if matches!(unit_at(at + 6), Some(0xdc00..=0xdfff)) => at += 12,
            Some(0xd800..=0xdfff) => {
                mended.push_str(&text[copied..at]);
                mended.push_str("\\ufffd");
                at += 6;
                copied = at;
            }
            Some(_) => at += 6,
            // The byte after the backslash is part of the escape, also when it is a backslash.
            None => at += 2,
        }
    }
    if copied == 0 {
        return None;
    }
    mended.push_str(&text[copied..]);
    Some(mended)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines_of(decoder: &mut LineDecoder) -> Result<Vec<Vec<u8>>, LineTooLong> {
        let mut lines = Vec::new();
        while let Some(line) = decoder.next_line()? {
            lines.push(line.to_vec());
        }
        Ok(lines)
    }

    fn decode_in_chunks(stream: &[u8], chunks: &[usize], limit: usize) -> (Vec<Vec<u8>>, bool) {
        let mut decoder = LineDecoder::new(limit);
        let mut lines = Vec::new();
        let mut rest = stream;
        let mut sizes = chunks.iter().copied().cycle();
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(1).clamp(1, rest.len());
            decoder.push(&rest[..size]);
            rest = &rest[size..];
            loop {
                match decoder.next_line() {
                    Ok(Some(line)) => lines.push(line.to_vec()),
                    Ok(None) => break,
                    Err(_) => return (lines, true),
                }
            }
        }
        (lines, false)
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_lines(
            stream in proptest::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n')], 0..400),
            chunks in proptest::collection::vec(1..50_usize, 1..10),
            limit in 1..60_usize,
        ) {
            let whole = decode_in_chunks(&stream, &[stream.len().max(1)], limit);
            prop_assert_eq!(decode_in_chunks(&stream, &chunks, limit), whole);
        }

        #[test]
        fn nothing_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&line);
        }

        #[test]
        fn nearly_valid_lines_do_not_panic(
            junk in "[\\\\u0-9a-fdD\"{}:,\\[\\]nul]*",
            command in ".*",
            cut in 0..200_usize,
        ) {
            let line = format!(
                r#"{{"protocol":"codeswarm.router.v1","request_id":"{junk}","command":"{command}","payload":{{"a":"{junk}"}}}}"#
            );
            if let Inbound::Command(command) = decode(line.as_bytes()) {
                let _ = command.check();
            }
            let _ = decode(&line.as_bytes()[..cut.min(line.len())]);
        }
    }

    #[test]
    fn long_lines_are_scanned_once_and_limited() {
        let mut decoder = LineDecoder::new(5 << 20);
        let line = vec![b'x'; 5 << 20];
        for chunk in line.chunks(4096) {
            decoder.push(chunk);
            assert_eq!(decoder.next_line(), Ok(None));
        }
        decoder.push(b"\nshort\r\n");
        assert_eq!(lines_of(&mut decoder).unwrap(), [line, b"short\r".to_vec()]);
        assert_eq!((decoder.pending_bytes(), decoder.buffer.capacity()), (0, 0));

        let mut decoder = LineDecoder::new(10);
        decoder.push(b"0123456789\n01234567890");
        assert_eq!(decoder.next_line().unwrap(), Some(&b"0123456789"[..]));
        assert_eq!(decoder.next_line(), Err(LineTooLong { limit: 10 }));
    }

    #[test]
    fn what_is_not_a_command_is_told_apart_from_what_cannot_be_answered() {
        let ignored: &[&[u8]] = &[
            b"",
            b"  \r",
            b"\"str\"",
            b"[]",
            b"7",
            b"null",
            b"{",
            b"\0",
            b"{\"protocol\":\"codeswarm.router.v2\",\"command\":\"swarm_list\",\"request_id\":\"r\"}",
            b"{\"protocol\":7,\"command\":\"swarm_list\"}",
            b"{\"command\":\"swarm_list\"}",
            b"{\"protocol\":\"codeswarm.router.v1\",\"command\":\"swarm_list\",\"request_id\":\"r\"",
            b"\xff\xfe",
        ];
        for line in ignored {
            assert_eq!(decode(line), Inbound::Ignored, "{}", String::from_utf8_lossy(line));
        }
        for (line, reason) in [
            (
                &br#"{"protocol":"codeswarm.router.v1","command":"inject","request_id":"r","payload":null}"#[..],
                "payload",
            ),
            (br#"{"protocol":"codeswarm.router.v1","command":"inject","request_id":"r","payload":[1]}"#, "payload"),
            (br#"{"protocol":"codeswarm.router.v1","command":7,"request_id":"r"}"#, "command"),
            (b"{\"protocol\":\"codeswarm.router.v1\",\"command\":\"\xff\",\"request_id\":\"r\"}", "UTF-8"),
        ] {
            match decode(line) {
                Inbound::Unusable { request_id, reason: given } => {
                    assert_eq!(request_id, RequestId::from("r"));
                    assert!(given.contains(reason), "{given}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_token_is_a_line_of_its_own_and_hides_itself() {
        let line = br#"{"protocol":"codeswarm.router.v1","type":"token","token":"abc"}"#;
        let token = decode(line);
        assert!(matches!(&token, Inbound::Token(token) if token.as_str() == "abc"), "{token:?}");
        assert!(!format!("{token:?}").contains("abc"));
        let number = br#"{"protocol":"codeswarm.router.v1","type":"token","token":7}"#;
        assert!(matches!(decode(number), Inbound::Unusable { .. }));
    }

    #[test]
    fn type_and_payload_may_be_absent_and_the_last_of_two_equal_keys_counts() {
        let line = br#" {"request_id":"a","protocol":"codeswarm.router.v1","command":"swarm_list","request_id":"b"} "#;
        let Inbound::Command(command) = decode(line) else { panic!() };
        assert_eq!((command.name.as_str(), command.request_id.as_text().as_str()), ("swarm_list", "b"));
        assert!(command.payload.is_empty());
    }

    #[test]
    fn half_a_surrogate_pair_is_replaced_and_not_dropped() {
        for (sent, read) in [
            (r"cut \ud83d", "cut \u{fffd}"),
            (r"\ude00 tail \ud83d\ude00", "\u{fffd} tail \u{1f600}"),
            (r"\\ud83d \ud83d", "\\ud83d \u{fffd}"),
        ] {
            let line =
                format!(r#"{{"protocol":"codeswarm.router.v1","command":"inject","payload":{{"content":"{sent}"}}}}"#);
            let Inbound::Command(command) = decode(line.as_bytes()) else { panic!("{sent}") };
            assert_eq!(command.payload["content"], read);
        }
    }
}
