//! Append-only streams of JSON lines on a file system that several hosts may share: layout, format, cursors, torn lines.
//!
//! This is the log that everything else reads: an inbox and an outbox per node, each with one writer. The crate knows
//! files and lines; it does not know what a record means, and it runs no thread and no timer. Who reads when is the
//! business of the outbox follower and of the worker.
//!
//! ```text
//! StreamWriter --append--> 00000001.jsonl  ...{"v":1,"rotate":2}\n      (full)
//!              --append--> 00000002.jsonl  ...{"v":1,"seq":7,"ty       (torn: a crash, a full disk)
//!              --append--> 00000003.jsonl  ...                         (the writer goes on behind it)
//! StreamReader <--whole lines, in order, from a cursor (segment, offset, seq)
//! ```
//!
//! Two rules carry the rest. A byte that was part of a whole line never changes and is never followed by anything but
//! another whole line; and a segment is final once the next one exists.

mod beacon;
mod cursor;
mod fs;
mod layout;
mod post;
mod reader;
mod record;
mod writer;

pub use beacon::{Beacon, Flash, PAUSE as FLASH_PAUSE};
pub use cursor::{Cursor, SeqStep};
pub use fs::{is_network_fs, is_surely_local};
pub use layout::{ClaimError, Mailbox, Owner};
pub use post::{BadFrame, Pairs, Post, PostedCall, PostedFrame};
pub use reader::{Chunk, StreamReader, WholeLines, lines, whole_lines};
pub use record::{Line, Record, RecordError, decode_line, encode_line};
pub use writer::StreamWriter;

/// The longest line, its line end included: a little under 64 MiB, so that one fits a gRPC message with its frame.
pub const MAX_LINE_BYTES: usize = (64 << 20) - (64 << 10);

/// Version of the record format. History: 1, the first.
pub const FORMAT_VERSION: u32 = 1;

/// The file name of a segment.
pub(crate) fn segment_name(segment: u32) -> String {
    format!("{segment:08}.jsonl")
}

/// The number in a segment's file name.
pub(crate) fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".jsonl")?;
    let plain = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if plain { digits.parse().ok().filter(|number| *number > 0) } else { None }
}
