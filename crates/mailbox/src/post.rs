//! Calls that go through the mailbox, to a node that nobody reaches over the network.
//!
//! ```text
//! <mailbox>/<swarm>/<NN>/post/asks/<id>.call    one call, put there whole by the follower, and removed by it when nobody waits any more
//! <mailbox>/<swarm>/<NN>/post/answers/<id>/     a stream of frames, written by the node, and removed by it once the call is gone
//! ```
//!
//! A call is what HTTP makes of it: a path, headers and a body; its answer is a head, pieces of a body, and an end. Whoever waits says so
//! by touching the call now and then. Calls are not repeated here: whoever loses one asks anew what may be asked twice. Everything blocks.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use thiserror::Error;

use crate::fs::{is_missing, make_dir};
use crate::record::{Line, Record, RecordError, decode_line, encode_line};

const ENDING: &str = ".call";
/// Files that are being written begin with it; nobody else reads them.
const UNFINISHED: char = '.';
/// Longest name of a call.
const LONGEST_NAME: usize = 64;
/// Version of the form of a call. History: 1, the first.
const VERSION: u32 = 1;

/// The post of one node.
#[derive(Debug, Clone)]
pub struct Post {
    asks: PathBuf,
    answers: PathBuf,
}

impl Post {
    /// The post in this directory; it need not exist yet.
    pub fn new(dir: &Path) -> Self {
        Self { asks: dir.join("asks"), answers: dir.join("answers") }
    }

    /// Whether this can be the name of a call: it becomes part of paths.
    pub fn is_name(id: &str) -> bool {
        (1..=LONGEST_NAME).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    }

    fn path(&self, id: &str) -> PathBuf {
        self.asks.join(format!("{id}{ENDING}"))
    }

    /// Makes the directory of calls.
    pub fn make(&self) -> io::Result<()> {
        make_dir(&self.asks).map(drop)
    }

    /// Puts a call there, whole or not at all.
    pub fn put(&self, id: &str, call: &[u8]) -> io::Result<()> {
        self.make()?;
        let fresh = self.asks.join(format!("{UNFINISHED}{id}"));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(call)?;
            // Others on a network file system see what has reached the server.
            file.sync_all()?;
            fs::rename(&fresh, self.path(id))
        })();
        if written.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        written
    }

    /// Says that somebody still waits for the answer.
    pub fn touch(&self, id: &str) -> io::Result<()> {
        File::options().append(true).open(self.path(id))?.set_modified(SystemTime::now())
    }

    /// Takes a call away.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        gone(fs::remove_file(self.path(id)))
    }

    /// Every call that is there, with when it was last touched, by the clock of whoever did.
    pub fn list(&self) -> io::Result<BTreeMap<String, SystemTime>> {
        let entries = match fs::read_dir(&self.asks) {
            Ok(entries) => entries,
            Err(error) if is_missing(&error) => return Ok(BTreeMap::new()),
            Err(error) => return Err(error),
        };
        let mut all = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(ENDING)) else { continue };
            // One that has gone meanwhile is not listed.
            if Self::is_name(id)
                && let Ok(touched) = entry.metadata().and_then(|meta| meta.modified())
            {
                all.insert(id.to_owned(), touched);
            }
        }
        Ok(all)
    }

    /// Reads a call of at most so many bytes.
    pub fn read(&self, id: &str, most: u64) -> io::Result<PostedCall> {
        let file = crate::fs::open_read(&self.path(id))?.ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = Vec::new();
        file.take(most + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the call is too large"));
        }
        PostedCall::decode(&bytes)
    }

    /// The directory of one answer, a stream of the mailbox.
    pub fn answer(&self, id: &str) -> PathBuf {
        self.answers.join(id)
    }

    /// Every answer that is there.
    pub fn answers(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.answers).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Takes an answer away.
    pub fn remove_answer(&self, id: &str) -> io::Result<()> {
        gone(fs::remove_dir_all(self.answer(id)))
    }
}

/// What is not there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if is_missing(&error) => Ok(()),
        other => other,
    }
}

/// Names and values.
pub type Pairs = Vec<(String, String)>;

/// One call.
#[derive(Clone, PartialEq, Eq)]
pub struct PostedCall {
    /// Path of the method.
    pub path: String,
    /// Headers, names in lower case.
    pub headers: Pairs,
    /// The body.
    pub body: Vec<u8>,
}

/// What is said may be private.
impl std::fmt::Debug for PostedCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PostedCall({}, {} bytes)", self.path, self.body.len())
    }
}

#[derive(Serialize, Deserialize)]
struct Head<'a> {
    v: u32,
    path: Cow<'a, str>,
    headers: Cow<'a, [(String, String)]>,
}

impl PostedCall {
    /// As bytes: a line of JSON, then the body as it is.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let head = Head { v: VERSION, path: (&self.path).into(), headers: (&self.headers).into() };
        let mut bytes = serde_json::to_vec(&head)?;
        bytes.push(b'\n');
        bytes.extend_from_slice(&self.body);
        Ok(bytes)
    }

    /// Reads what [`PostedCall::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| invalid("it is no call"))?;
        let head: Head<'_> = serde_json::from_slice(&bytes[..end])?;
        if head.v != VERSION {
            return Err(invalid("whoever calls is of another version of drover"));
        }
        let (path, headers) = (head.path.into_owned(), head.headers.into_owned());
        Ok(Self { path, headers, body: bytes[end + 1..].to_vec() })
    }
}

/// A part of an answer.
#[derive(Clone, PartialEq, Eq)]
pub enum PostedFrame {
    /// First, and once.
    Head {
        /// HTTP status.
        status: u16,
        /// Headers, names in lower case.
        headers: Pairs,
    },
    /// A piece of the body.
    Body(Vec<u8>),
    /// Last, and once.
    End {
        /// What comes behind the body.
        trailers: Pairs,
    },
    /// Last: there will be no whole answer.
    Lost {
        /// Why.
        why: String,
    },
    /// Nothing has come yet; the node is at work.
    Wait,
}

impl std::fmt::Debug for PostedFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Head { status, .. } => write!(f, "Head({status})"),
            Self::Body(bytes) => write!(f, "Body({} bytes)", bytes.len()),
            Self::End { .. } => f.write_str("End"),
            Self::Lost { why } => write!(f, "Lost({why:?})"),
            Self::Wait => f.write_str("Wait"),
        }
    }
}

/// A line that is no frame.
#[derive(Debug, Error)]
pub enum BadFrame {
    /// It is no record.
    #[error("it is no record")]
    Record(#[from] RecordError),
    /// Its fields are not those of its type.
    #[error("its fields cannot be read")]
    Fields(#[from] serde_json::Error),
    /// A type that nobody here knows.
    #[error("unknown kind of frame {0:?}: the node is of another version of drover")]
    Unknown(String),
    /// A body with characters that stand for no byte.
    #[error("its body cannot be read")]
    Body,
}

#[derive(Serialize, Deserialize)]
struct HeadFields {
    status: u16,
    headers: Pairs,
}

/// Bytes as text: each is the character of the same number, so what people say stays nearly as long as it is.
#[derive(Serialize, Deserialize)]
struct BodyFields {
    bytes: String,
}

#[derive(Serialize, Deserialize)]
struct EndFields {
    trailers: Pairs,
}

#[derive(Serialize, Deserialize)]
struct LostFields {
    why: String,
}

impl PostedFrame {
    /// Appends its line. `seq` counts lines from 1; `ts` is in microseconds of Unix time.
    pub fn write(&self, seq: u64, ts: u64, out: &mut Vec<u8>) -> Result<(), BadFrame> {
        let (kind, data) = match self {
            Self::Head { status, headers } => {
                ("head", to_raw_value(&HeadFields { status: *status, headers: headers.clone() })?)
            }
            Self::Body(bytes) => {
                ("body", to_raw_value(&BodyFields { bytes: bytes.iter().map(|byte| char::from(*byte)).collect() })?)
            }
            Self::End { trailers } => ("end", to_raw_value(&EndFields { trailers: trailers.clone() })?),
            Self::Lost { why } => ("lost", to_raw_value(&LostFields { why: why.clone() })?),
            Self::Wait => ("wait", RawValue::from_string("{}".to_owned())?),
        };
        let record = Record {
            seq,
            ts,
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

    /// Reads a line: its number, and the frame.
    pub fn read(line: &[u8]) -> Result<(u64, Self), BadFrame> {
        let Line::Record(record) = decode_line(line)? else { return Err(BadFrame::Unknown("rotate".to_owned())) };
        let data = record.data.get();
        let frame = match &*record.kind {
            "head" => {
                let HeadFields { status, headers } = serde_json::from_str(data)?;
                Self::Head { status, headers }
            }
            "body" => {
                let fields: BodyFields = serde_json::from_str(data)?;
                let bytes = fields.bytes.chars().map(|c| u8::try_from(u32::from(c)));
                Self::Body(bytes.collect::<Result<_, _>>().map_err(|_| BadFrame::Body)?)
            }
            "end" => Self::End { trailers: serde_json::from_str::<EndFields>(data)?.trailers },
            "lost" => Self::Lost { why: serde_json::from_str::<LostFields>(data)?.why },
            "wait" => Self::Wait,
            other => return Err(BadFrame::Unknown(other.chars().take(40).collect())),
        };
        Ok((record.seq, frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(body: &[u8]) -> PostedCall {
        let headers = vec![("traceparent".to_owned(), "00-é-01".to_owned())];
        PostedCall { path: "/drover.handoff.v1.HandoffService/Send".to_owned(), headers, body: body.to_vec() }
    }

    #[test]
    fn a_call_is_there_whole_or_not_and_under_a_harmless_name() {
        let dir = tempfile::tempdir().unwrap();
        let post = Post::new(dir.path());
        assert!(post.list().unwrap().is_empty());
        let said = call(b"\0\n{}\xff");
        post.put("a1-b", &said.encode().unwrap()).unwrap();
        fs::write(post.asks.join(".c2"), b"{").unwrap();
        fs::write(post.asks.join("no name.call"), b"{").unwrap();
        assert_eq!(post.list().unwrap().into_keys().collect::<Vec<_>>(), ["a1-b"]);
        assert_eq!(post.read("a1-b", 1000).unwrap(), said);
        assert_eq!(post.read("a1-b", 10).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        post.touch("a1-b").unwrap();
        post.remove("a1-b").unwrap();
        post.remove("a1-b").unwrap();
        assert!(post.touch("a1-b").is_err(), "one that is gone does not come back");
        for name in ["", "..", "a/b", "a.b", &"x".repeat(65)] {
            assert!(!Post::is_name(name), "{name:?}");
        }
        assert!(PostedCall::decode(b"{\"v\":2,\"path\":\"/x\",\"headers\":[]}\n").is_err());
        assert!(PostedCall::decode(b"{\"v\":1").is_err());
    }

    proptest! {
        #[test]
        fn a_frame_reads_as_it_was_written(bytes in prop::collection::vec(any::<u8>(), 0..200), seq in 1_u64..1000) {
            let pairs = vec![("grpc-status".to_owned(), "0".to_owned())];
            for frame in [
                PostedFrame::Head { status: 200, headers: pairs.clone() },
                PostedFrame::Body(bytes.clone()),
                PostedFrame::End { trailers: pairs.clone() },
                PostedFrame::Lost { why: "\"\n\u{2028}".to_owned() },
                PostedFrame::Wait,
            ] {
                let mut line = Vec::new();
                frame.write(seq, 7, &mut line).unwrap();
                let line = line.strip_suffix(b"\n").unwrap();
                prop_assert!(!line.contains(&b'\n'));
                prop_assert_eq!(PostedFrame::read(line).unwrap(), (seq, frame));
            }
        }

        #[test]
        fn whatever_stands_there_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = PostedCall::decode(&bytes);
            let _ = PostedFrame::read(&bytes);
        }
    }
}
