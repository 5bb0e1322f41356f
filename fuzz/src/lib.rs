//! One function for each thing that reads bytes from elsewhere. Each takes any bytes, must not panic, and checks what must
//! hold whatever the bytes are: that the outcome does not depend on how they arrive in pieces, and that what was understood
//! says the same when it is written and read again.
//!
//! The fuzz targets call these functions, and so does an ordinary test over the corpus and mutations of it.

mod gossip;
pub mod network;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;

use drover_config::Config;
use drover_control::{Inbound, LineDecoder};
use drover_mailbox::{Cursor, Line, StreamReader, decode_line, encode_line, lines, whole_lines};
use drover_worker::codex::rpc::{self, Decoder, Message};
use drover_worker::codex::translate::Translator;
use serde_json::Value;

/// Takes any bytes; panics when something does not hold.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("json_line", json_line),
    ("mailbox", mailbox),
    ("codex_rpc", codex_rpc),
    ("config", config),
    ("gossip", gossip),
    ("session", network::session),
    ("bundle", network::bundle),
    ("transfer", network::transfer),
    ("http_answer", network::http_answer),
    ("http_request", network::http_request),
    ("page", network::page),
    ("telegram", network::telegram),
];

/// Datagrams of the gossip.
pub fn gossip(data: &[u8]) {
    gossip::datagram(data);
}

/// Cuts the first byte off, which says how large the pieces are in which the rest arrives.
fn pieces(data: &[u8]) -> (usize, &[u8]) {
    match data.split_first() {
        Some((first, rest)) => (usize::from(*first) % 61 + 1, rest),
        None => (1, data),
    }
}

/// The JSON-line control plane: what a client sends.
pub fn json_line(data: &[u8]) {
    const LIMIT: usize = 600;
    let (step, bytes) = pieces(data);
    let cut = |step: usize| {
        let mut decoder = LineDecoder::new(LIMIT);
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for piece in bytes.chunks(step.max(1)) {
            decoder.push(piece);
            loop {
                match decoder.next_line() {
                    Ok(Some(line)) => seen.push(line.to_vec()),
                    Ok(None) => break,
                    // The connection ends here.
                    Err(_) => return (seen, true),
                }
            }
            assert!(decoder.pending_bytes() <= LIMIT, "an unread line grows without limit");
        }
        (seen, false)
    };
    let (seen, too_long) = cut(step);
    assert_eq!((seen.clone(), too_long), cut(1), "pieces change the lines");
    for line in seen {
        assert!(line.len() <= LIMIT && !line.contains(&b'\n'));
        match drover_control::decode(&line) {
            Inbound::Ignored | Inbound::Token(_) => {}
            Inbound::Unusable { request_id, reason } => {
                assert!(!reason.is_empty());
                id_is_json(&request_id);
            }
            Inbound::Command(command) => {
                id_is_json(&command.request_id);
                serde_json::to_string(&command.payload).expect("a payload is JSON");
            }
        }
    }
}

fn id_is_json(id: &drover_control::RequestId) {
    let json = id.to_json();
    assert!(serde_json::from_str::<Value>(&json).is_ok(), "{json}");
    let _ = id.as_text();
}

/// Segments of a stream in the mailbox, as any other writer or a broken disk could leave them.
pub fn mailbox(data: &[u8]) {
    thread_local! {
        static DIR: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
    }
    let (step, bytes) = pieces(data);
    for line in bytes.split(|byte| *byte == b'\n') {
        record(line);
    }
    let segments: Vec<&[u8]> = bytes.split(|byte| *byte == 0x1e).take(4).collect();
    DIR.with_borrow_mut(|dir| {
        let dir = dir.get_or_insert_with(|| {
            tempfile::Builder::new().prefix("drover-fuzz-").tempdir().expect("a temporary directory")
        });
        for number in 1..=4_usize {
            let path = dir.path().join(format!("{number:08}.jsonl"));
            match segments.get(number - 1) {
                Some(bytes) => fs::write(path, bytes).expect("a segment is written"),
                None => drop(fs::remove_file(path)),
            }
        }
        read_segments(dir.path(), &segments, step);
    });
}

/// A line that is a record says the same when it is written again.
fn record(line: &[u8]) {
    let Ok(Line::Record(first)) = decode_line(line) else { return };
    let mut written = Vec::new();
    encode_line(&first, &mut written);
    assert_eq!(written.iter().position(|byte| *byte == b'\n'), Some(written.len() - 1), "a record is one line");
    let line = written.strip_suffix(b"\n").expect("a line ends");
    let Ok(Line::Record(again)) = decode_line(line) else { panic!("a written record cannot be read") };
    assert_eq!(format!("{first:?}"), format!("{again:?}"));
}

fn read_segments(dir: &std::path::Path, segments: &[&[u8]], step: usize) {
    let mut expected: Vec<u8> = Vec::new();
    for (number, bytes) in (1..).zip(segments) {
        let whole = whole_lines(number, bytes);
        expected.extend_from_slice(&bytes[..whole.len]);
    }
    let is_rotation = |line: &[u8]| matches!(decode_line(line), Ok(Line::Rotate(_)));
    let ends_early = |bytes: &&[u8]| {
        let all: Vec<&[u8]> = lines(bytes).collect();
        all.split_last().is_some_and(|(_, others)| others.iter().any(|line| is_rotation(line)))
    };
    for fresh in [false, true] {
        let mut reader = StreamReader::new(dir, Cursor::default());
        let mut got: Vec<u8> = Vec::new();
        // Every look moves the cursor or is the last one.
        let mut looks = 0;
        while let Some(chunk) = reader.next_chunk(step).expect("a local file can be read") {
            assert!(chunk.lines.is_empty() || chunk.lines.ends_with(b"\n"), "only whole lines");
            assert!((chunk.next_segment, chunk.next_offset) >= (chunk.segment, chunk.start_offset), "backwards");
            got.extend_from_slice(&chunk.lines);
            looks += 1;
            assert!(looks < 100_000, "the reader does not come to an end");
            if fresh {
                reader = StreamReader::new(dir, reader.cursor());
            }
        }
        // Nobody writes behind the line that ends a segment; where that line is taken for the end depends on the pieces.
        if !segments.iter().any(ends_early) {
            assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&expected), "lines were lost or doubled");
        }
    }
}

/// What the Codex app-server writes.
pub fn codex_rpc(data: &[u8]) {
    const LIMIT: usize = 600;
    let (step, bytes) = pieces(data);
    let decode = |step: usize| {
        let mut decoder = Decoder::with_limit(LIMIT);
        let mut seen = Vec::new();
        for piece in bytes.chunks(step.max(1)) {
            decoder.push(piece);
            while let Some(message) = decoder.next_message() {
                seen.push(message);
            }
        }
        decoder.finish();
        (seen, decoder.faults())
    };
    let (messages, faults) = decode(step);
    let (whole, whole_faults) = decode(bytes.len());
    assert_eq!(messages, whole, "pieces change the messages");
    assert_eq!((faults.oversized, faults.malformed), (whole_faults.oversized, whole_faults.malformed));

    let mut translator = Translator::default();
    translator.open_thread("t", None, false);
    translator.begin_turn();
    for message in messages {
        match message {
            Message::Notification { method, params } => {
                let _ = translator.translate(&method, &params);
                let _ = (translator.text(), translator.has_open_commands());
            }
            Message::Request { id, .. } => {
                for line in [rpc::answer(&id, &Value::Null), rpc::refusal(&id, rpc::METHOD_NOT_FOUND, "no")] {
                    assert!(line.ends_with(b"\n") && serde_json::from_slice::<Value>(&line).is_ok());
                }
            }
            Message::Response { .. } => {}
        }
    }
}

/// The configuration file.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::from_text("file", text, &BTreeMap::new()) {
        Ok((config, warnings)) => {
            assert!(warnings.iter().all(|line| line.starts_with("file:")), "{warnings:?}");
            assert!(config.validate().is_empty(), "an accepted file has problems");
            let _ = config.providers();
            let shown = config.dump();
            // What hides a secret can be no value for its key.
            if !shown.contains("***") {
                let (again, _) = Config::from_text("shown", &shown, &BTreeMap::new())
                    .unwrap_or_else(|error| panic!("what is shown does not load: {error}\n{shown}"));
                assert_eq!(again, config, "what is shown says something else\n{shown}");
            }
        }
        Err(error) => {
            assert!(!error.faults.is_empty());
            for fault in &error.faults {
                assert!(fault.position.is_some() && !fault.message.contains('\n'), "{error}");
            }
        }
    }
}
