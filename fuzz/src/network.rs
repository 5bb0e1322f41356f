//! What comes from other nodes, from providers of models, from pages and from chats.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use drover_dispatcher::fetch::{AGENT, Robots, page_text, sha256};
use drover_dispatcher::provider::{SseDecoder, read_answer};
use drover_handoff::bundle::{Limits, Manifest, restore};
use drover_handoff::session::{SessionState, decode, encode};

use super::pieces;

/// Records of a session, as another node copies them: what is understood says the same when it is written again, and no order
/// of records upsets the state that is made of them.
pub fn session(data: &[u8]) {
    let mut records = Vec::new();
    for (line, due) in data.split(|byte| *byte == b'\n').zip(1..) {
        let Ok(record) = decode(line, due) else { continue };
        let mut again = Vec::new();
        encode(due, &record, &mut again).expect("a record is JSON");
        let text = again.strip_suffix(b"\n").expect("a line ends");
        assert_eq!(decode(text, due).expect("what we wrote"), record);
        records.push(record);
    }
    let id = "fuzz".parse().expect("a name");
    let _ = SessionState::of(&id, &records);
}

/// The list of a session's files, as another node sends it: whatever it says, nothing is made outside of the directory.
pub fn bundle(data: &[u8]) {
    thread_local! {
        static DIR: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(manifest) = serde_json::from_str::<Manifest>(text) else { return };
    let _ = manifest.bytes();
    if manifest.check().is_ok() {
        for entry in &manifest.entries {
            let path = Path::new(&entry.path);
            assert!(
                path.components().all(|part| matches!(part, std::path::Component::Normal(_))),
                "{}",
                path.display()
            );
        }
    }
    DIR.with_borrow_mut(|dir| {
        let dir = dir.get_or_insert_with(|| {
            let dir = tempfile::Builder::new().prefix("drover-fuzz-").tempdir().expect("a temporary directory");
            for name in ["pieces", "parent"] {
                fs::create_dir(dir.path().join(name)).expect("a directory is made");
            }
            keep(dir.path(), "content");
            dir
        });
        let (list, of) = (keep(dir.path(), text), dir.path().join("parent/into"));
        let name = keep(dir.path(), &list);
        let limits = Limits { bytes: 1 << 16, entries: 64 };
        let _ = restore(&dir.path().join("pieces"), &name, &of, limits);
        let _ = fs::remove_dir_all(&of);
        let left = |what: &str| -> Vec<_> {
            let entries = fs::read_dir(dir.path().join(what)).expect("it is there");
            entries.map(|entry| entry.expect("an entry").file_name()).collect()
        };
        assert!(left("parent").is_empty(), "{:?}", left("parent"));
        let mut outside = left(".");
        outside.sort();
        assert_eq!(outside, ["parent", "pieces"]);
        for piece in [&list, &name] {
            let _ = fs::remove_file(dir.path().join("pieces").join(piece));
        }
    });
}

/// Keeps content under the name that its digest gives it.
fn keep(dir: &Path, content: &str) -> String {
    let name = sha256(content);
    fs::write(dir.join("pieces").join(&name), content).expect("a piece is written");
    name
}

/// Steps of a move of a session, as another node sends them.
pub fn transfer(data: &[u8]) {
    if let Some((said, again)) = drover_handoff::understood(data) {
        assert_eq!(drover_handoff::understood(&again).map(|(said, _)| said), Some(said));
    }
}

/// Answers of providers: the same however they are cut into pieces, and so are the events in them.
pub fn http_answer(data: &[u8]) {
    let (step, bytes) = pieces(data);
    let cut = |step: usize| read_answer(bytes.chunks(step));
    let answer = cut(step);
    assert_eq!(answer, cut(1), "pieces change the answer");
    let body = answer.as_ref().map_or(bytes, |(_, body)| body.as_slice());
    let events = |step: usize| {
        const MOST: usize = 4096;
        let mut decoder = SseDecoder::new(MOST);
        let mut seen = Vec::new();
        for piece in body.chunks(step) {
            decoder.push(piece);
            loop {
                match decoder.next_event() {
                    Ok(Some(event)) => seen.push(event),
                    Ok(None) => break,
                    Err(_) => return None,
                }
            }
        }
        Some(seen)
    };
    if let (Some(whole), Some(bytewise)) = (events(body.len().max(1)), events(1)) {
        assert_eq!(whole, bytewise, "pieces change the events");
    }
}

/// Requests of programs to the dispatcher's short way: what was found in a part is found in the whole.
pub fn http_request(data: &[u8]) {
    let whole = drover_dispatcher::framed_request(data);
    for end in 0..data.len() {
        if let Some(found) = drover_dispatcher::framed_request(&data[..end]) {
            assert!(found.0 <= end && whole == Some(found), "more bytes change the request: {found:?}, {whole:?}");
        }
    }
}

/// Pages and the rules of their sites.
pub fn page(data: &[u8]) {
    let robots = Robots::read(data, AGENT);
    for path in ["/", "/a/b?c=d", "/%2e%2e/", "/a*b$"] {
        let _ = robots.allows(path);
    }
    let text = page_text(&String::from_utf8_lossy(&data[..data.len().min(16 << 10)]), "https://a.test/b");
    assert!(!text.contains('\0'), "{text:?}");
}

/// What a chat says.
pub fn telegram(data: &[u8]) {
    if let Some(updates) = drover_telegram::updates_in(data) {
        assert!(updates <= data.len());
    }
}
