//! An exchange as it travels: a request, and the frames of its answer; as messages of gRPC and as lines of the mailbox.

use std::borrow::Cow;

use bytes::Bytes;
use drover_mailbox::{Line, Record, RecordError, decode_line, encode_line};
use drover_proto::pool as pb;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;

/// One request of an agent on a node.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Version of the form in files.
    pub v: u32,
    /// Names the exchange among those of its node.
    pub id: String,
    /// The node, in files; over TLS its certificate says it.
    pub node: String,
    /// `POST` or `GET`.
    pub method: String,
    /// Path of the front.
    pub path: String,
    /// Headers that mean something to the front, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body; requests of this interface are JSON text.
    pub body: String,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ask({} of {}: {} {}, {} bytes)", self.id, self.node, self.method, self.path, self.body.len())
    }
}

impl Ask {
    /// The version of the form that is written.
    pub const VERSION: u32 = 1;

    /// As a message, for a node that has so many frames already.
    pub fn to_message(&self, have: u64) -> pb::AskRequest {
        pb::AskRequest {
            exchange_id: self.id.clone(),
            method: self.method.clone(),
            path: self.path.clone(),
            headers: headers_out(&self.headers),
            body: Bytes::copy_from_slice(self.body.as_bytes()),
            have,
        }
    }

    /// From a message of this node.
    pub(super) fn of_message(message: pb::AskRequest, node: &str) -> Result<Self, BadFrame> {
        Ok(Self {
            v: Self::VERSION,
            id: message.exchange_id,
            node: node.to_owned(),
            method: message.method,
            path: message.path,
            headers: headers_in(message.headers),
            body: String::from_utf8(message.body.into()).map_err(|_| BadFrame::NotText)?,
        })
    }
}

/// A part of an answer.
#[derive(Clone, PartialEq, Eq)]
pub enum Frame {
    /// First, and once.
    Head {
        /// HTTP status.
        status: u16,
        /// Headers, names in lower case.
        headers: Vec<(String, String)>,
    },
    /// A piece of the body.
    Body(Bytes),
    /// Last, and once.
    End {
        /// Why the answer is not whole; empty when it is.
        error: String,
    },
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Head { status, .. } => write!(f, "Head({status})"),
            Self::Body(bytes) => write!(f, "Body({} bytes)", bytes.len()),
            Self::End { error } => write!(f, "End({error:?})"),
        }
    }
}

/// What came is no frame.
#[derive(Debug, Error)]
pub enum BadFrame {
    /// A line that is no record.
    #[error("it is no record")]
    Record(#[from] RecordError),
    /// Its fields are not those of its type.
    #[error("its fields cannot be read")]
    Fields(#[from] serde_json::Error),
    /// A type, or an empty message, that nobody here knows.
    #[error("unknown kind of frame {0:?}: the other side is of another version")]
    Unknown(String),
    /// A body that is no text.
    #[error("a body that is not UTF-8 text is not carried")]
    NotText,
}

#[derive(Serialize, Deserialize)]
struct HeadFields {
    status: u16,
    headers: Vec<(String, String)>,
}

#[derive(Serialize, Deserialize)]
struct BodyFields<'a> {
    text: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct EndFields {
    error: String,
}

/// The record that says only that the answer is still being waited for.
const WAIT: &str = "wait";

impl Frame {
    /// Bytes that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Head { headers, .. } => {
                64 + headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
            }
            Self::Body(bytes) => bytes.len(),
            Self::End { error } => error.len(),
        }
    }

    /// As a message.
    pub(super) fn to_message(&self) -> pb::AskResponse {
        use pb::ask_response::Frame as F;
        let frame = match self {
            Self::Head { status, headers } => {
                F::Head(pb::AnswerHead { status: u32::from(*status), headers: headers_out(headers) })
            }
            Self::Body(bytes) => F::Body(bytes.clone()),
            Self::End { error } => F::End(pb::AnswerEnd { error: error.clone() }),
        };
        pb::AskResponse { frame: Some(frame) }
    }

    /// From a message.
    pub fn of_message(message: pb::AskResponse) -> Result<Self, BadFrame> {
        use pb::ask_response::Frame as F;
        match message.frame {
            Some(F::Head(head)) => {
                Ok(Self::Head { status: u16::try_from(head.status).unwrap_or(502), headers: headers_in(head.headers) })
            }
            Some(F::Body(bytes)) => Ok(Self::Body(bytes)),
            Some(F::End(end)) => Ok(Self::End { error: end.error }),
            None => Err(BadFrame::Unknown(String::new())),
        }
    }

    /// Appends the line of a frame; `seq` counts the frames of an exchange from 1.
    pub(super) fn write(&self, seq: u64, out: &mut Vec<u8>) -> Result<(), BadFrame> {
        match self {
            Self::Head { status, headers } => {
                line(seq, "head", &HeadFields { status: *status, headers: headers.clone() }, out)
            }
            Self::Body(bytes) => {
                let text = std::str::from_utf8(bytes).map_err(|_| BadFrame::NotText)?;
                line(seq, "body", &BodyFields { text: text.into() }, out)
            }
            Self::End { error } => line(seq, "end", &EndFields { error: error.clone() }, out),
        }
    }

    /// Appends the line that says that nothing has come yet. It counts as no frame: its number is that of the last one.
    pub(super) fn write_wait(seq: u64, out: &mut Vec<u8>) -> Result<(), BadFrame> {
        line(seq, WAIT, &serde_json::json!({}), out)
    }

    /// Reads a line: the number of the frame, and the frame; none when the line only says that nothing has come yet.
    pub fn read(bytes: &[u8]) -> Result<Option<(u64, Self)>, BadFrame> {
        let Line::Record(record) = decode_line(bytes)? else { return Ok(None) };
        let data = record.data.get();
        let frame = match &*record.kind {
            "head" => {
                let HeadFields { status, headers } = serde_json::from_str(data)?;
                Self::Head { status, headers }
            }
            "body" => {
                let fields: BodyFields<'_> = serde_json::from_str(data)?;
                Self::Body(Bytes::from(fields.text.into_owned()))
            }
            "end" => {
                let EndFields { error } = serde_json::from_str(data)?;
                Self::End { error }
            }
            WAIT => return Ok(None),
            other => return Err(BadFrame::Unknown(other.chars().take(40).collect())),
        };
        Ok(Some((record.seq, frame)))
    }
}

fn line(seq: u64, kind: &str, fields: &impl Serialize, out: &mut Vec<u8>) -> Result<(), BadFrame> {
    let data: Box<RawValue> = serde_json::value::to_raw_value(fields)?;
    let record = Record {
        seq,
        ts: drover_service::now_us(),
        job_id: Cow::Borrowed(""),
        node_id: 0,
        generation: 0,
        injection_id: None,
        trace: None,
        kind: Cow::Borrowed(kind),
        data: &data,
    };
    encode_line(&record, out);
    Ok(())
}

fn headers_out(headers: &[(String, String)]) -> Vec<pb::Header> {
    headers.iter().map(|(name, value)| pb::Header { name: name.clone(), value: value.clone() }).collect()
}

fn headers_in(headers: Vec<pb::Header>) -> Vec<(String, String)> {
    headers.into_iter().map(|header| (header.name, header.value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_both_ways_of_travel() {
        let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
        let frames = [
            Frame::Head { status: 200, headers },
            Frame::Body(Bytes::from_static("data: {\"é\":\"\u{2028}\\n\"}\n\n".as_bytes())),
            Frame::End { error: String::new() },
        ];
        for (index, frame) in frames.iter().enumerate() {
            assert_eq!(&Frame::of_message(frame.to_message()).unwrap(), frame);
            let mut bytes = Vec::new();
            frame.write(index as u64 + 1, &mut bytes).unwrap();
            let line = bytes.strip_suffix(b"\n").unwrap();
            assert!(!line.contains(&b'\n'));
            assert_eq!(Frame::read(line).unwrap(), Some((index as u64 + 1, frame.clone())));
        }
        let mut bytes = Vec::new();
        Frame::write_wait(7, &mut bytes).unwrap();
        assert_eq!(Frame::read(bytes.trim_ascii_end()).unwrap(), None);
        let torn = Frame::Body(Bytes::from_static(b"\xff"));
        assert!(matches!(torn.write(1, &mut bytes), Err(BadFrame::NotText)));
        assert!(Frame::read(b"{\"v\":1}").is_err());
    }
}
