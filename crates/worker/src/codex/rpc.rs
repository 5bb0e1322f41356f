//! The wire format of `codex app-server`: one JSON object per line, JSON-RPC without the `jsonrpc` member.
//!
//! Nothing here trusts the other side: a line may be too long, cut, or no JSON at all. Such a line is skipped and counted,
//! because one bad line must not take down the turns of a node.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Value, json};

/// The longest line that is looked at. A longer one is skipped without keeping it in memory.
pub const MAX_LINE_BYTES: usize = 32 * 1024 * 1024;

/// The answer to a request that this side does not know.
pub const METHOD_NOT_FOUND: i64 = -32601;

/// One message from codex.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The answer to a request of ours.
    Response {
        /// The id that we gave the request.
        id: u64,
        /// What came back.
        result: Result<Value, RpcError>,
    },
    /// A question to us, which waits for an answer. Its id is codex's own and goes back as it came.
    Request {
        /// The id to answer with.
        id: Value,
        /// What is asked.
        method: String,
        /// The details.
        params: Value,
    },
    /// Something that codex tells.
    Notification {
        /// What it is about.
        method: String,
        /// The details.
        params: Value,
    },
}

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// JSON-RPC's number.
    #[serde(default)]
    pub code: i64,
    /// What was wrong.
    #[serde(default)]
    pub message: String,
}

/// How many lines could not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// Longer than the limit.
    pub oversized: u64,
    /// Not JSON, or JSON of no known shape.
    pub malformed: u64,
    /// Cut off by the end of the stream.
    pub cut: u64,
}

impl Faults {
    /// All of them.
    pub fn total(self) -> u64 {
        self.oversized + self.malformed + self.cut
    }
}

/// Turns the bytes that codex writes into messages.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    /// How much of the buffer is known to hold no line end.
    searched: usize,
    /// The rest of an oversized line is still coming.
    skipping: bool,
    limit: usize,
    faults: Faults,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::with_limit(MAX_LINE_BYTES)
    }
}

impl Decoder {
    /// A decoder that skips lines longer than this.
    pub fn with_limit(limit: usize) -> Self {
        Self { buffer: BytesMut::new(), searched: 0, skipping: false, limit, faults: Faults::default() }
    }

    /// Takes in what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or none until more bytes come.
    pub fn next_message(&mut self) -> Option<Message> {
        while let Some(line) = self.next_line() {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            match parse(line) {
                Some(message) => return Some(message),
                None => self.faults.malformed += 1,
            }
        }
        None
    }

    /// The stream has ended: what is left is half a line.
    pub fn finish(&mut self) {
        if !self.buffer.is_empty() && !self.skipping {
            self.faults.cut += 1;
        }
        self.buffer.clear();
        self.searched = 0;
        self.skipping = false;
    }

    /// How many lines were skipped so far.
    pub fn faults(&self) -> Faults {
        self.faults
    }

    fn next_line(&mut self) -> Option<Bytes> {
        loop {
            let Some(found) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') else {
                self.searched = self.buffer.len();
                if self.buffer.len() > self.limit {
                    if !self.skipping {
                        self.faults.oversized += 1;
                        self.skipping = true;
                    }
                    // A new buffer, so that the memory of the long line is given back.
                    self.buffer = BytesMut::new();
                    self.searched = 0;
                } else if self.skipping {
                    self.buffer.clear();
                    self.searched = 0;
                }
                return None;
            };
            let end = self.searched + found;
            let line = self.buffer.split_to(end).freeze();
            self.buffer.advance(1);
            self.searched = 0;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if line.len() > self.limit {
                self.faults.oversized += 1;
                continue;
            }
            return Some(line);
        }
    }
}

#[derive(Deserialize)]
struct Raw {
    id: Option<Value>,
    method: Option<String>,
    #[serde(default)]
    params: Value,
    result: Option<Value>,
    error: Option<RpcError>,
}

/// Reads one line. `method` with `id` is a question to us, `method` alone a notification, and an `id` of ours alone an answer:
/// both sides count their ids from the start, so the number says nothing about whose it is.
pub fn parse(line: &[u8]) -> Option<Message> {
    let raw: Raw = serde_json::from_slice(line).ok()?;
    match (raw.method, raw.id) {
        (Some(method), Some(id)) if !id.is_null() => Some(Message::Request { id, method, params: raw.params }),
        (Some(method), _) => Some(Message::Notification { method, params: raw.params }),
        (None, Some(id)) => {
            let result = match raw.error {
                Some(error) => Err(error),
                None => Ok(raw.result.unwrap_or(Value::Null)),
            };
            Some(Message::Response { id: id.as_u64()?, result })
        }
        (None, None) => None,
    }
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// A request of ours.
pub fn request(id: u64, method: &str, params: &Value) -> Vec<u8> {
    line(&json!({"id": id, "method": method, "params": params}))
}

/// A notification of ours.
pub fn notification(method: &str) -> Vec<u8> {
    line(&json!({"method": method}))
}

/// Our answer to a question of codex.
pub fn answer(id: &Value, result: &Value) -> Vec<u8> {
    line(&json!({"id": id, "result": result}))
}

/// Our refusal of a question of codex.
pub fn refusal(id: &Value, code: i64, message: &str) -> Vec<u8> {
    line(&json!({"id": id, "error": {"code": code, "message": message}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.next_message()).collect()
    }

    fn told(method: &str) -> Message {
        Message::Notification { method: method.into(), params: Value::Null }
    }

    #[test]
    fn bytes_may_be_cut_anywhere() {
        let stream = "{\"method\":\"ä\"}\r\n\n{\"id\":0,\"method\":\"q\",\"params\":[1]}\n{\"id\":0,\"result\":null}\n{\"id\":7,\"error\":{\"code\":-1,\"message\":\"no\"}}\n";
        let expected = [
            told("ä"),
            Message::Request { id: json!(0), method: "q".into(), params: json!([1]) },
            Message::Response { id: 0, result: Ok(Value::Null) },
            Message::Response { id: 7, result: Err(RpcError { code: -1, message: "no".into() }) },
        ];
        for size in 1..stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for chunk in stream.as_bytes().chunks(size) {
                decoder.push(chunk);
                seen.extend(all(&mut decoder));
            }
            assert_eq!(seen, expected, "in chunks of {size}");
            assert_eq!(decoder.faults(), Faults::default());
        }
    }

    #[test]
    fn bad_lines_are_skipped_and_counted() {
        let mut decoder = Decoder::with_limit(40);
        decoder.push(b"\xff\xfe\n[1,2]\n\"text\"\n{}\nlog output\n{\"method\":7}\n{\"id\":\"x\",\"result\":1}\n{\"method\":\"a\"}\n");
        assert_eq!(all(&mut decoder), [told("a")]);
        assert_eq!(decoder.faults().malformed, 7);

        let long = "x".repeat(100);
        decoder.push(long.as_bytes());
        assert_eq!(all(&mut decoder), []);
        decoder.push(long.as_bytes());
        assert_eq!(all(&mut decoder), []);
        decoder.push(b"tail\n{\"method\":\"b\"}\n");
        assert_eq!(all(&mut decoder), [told("b")]);
        decoder.push(format!("{long}\n{{\"method\":\"c\"}}\n{{\"meth").as_bytes());
        assert_eq!(all(&mut decoder), [told("c")]);
        decoder.finish();
        assert_eq!(decoder.faults(), Faults { oversized: 2, malformed: 7, cut: 1 });
    }

    #[test]
    fn an_endless_line_takes_no_memory() {
        let mut decoder = Decoder::with_limit(1024);
        for _ in 0..1000 {
            decoder.push(&[b'x'; 4096]);
            assert!(decoder.next_message().is_none());
            assert!(decoder.buffer.len() <= 1024 + 4096);
        }
        assert_eq!(decoder.faults().oversized, 1);
    }
}
