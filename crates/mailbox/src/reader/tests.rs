use proptest::prelude::*;

use super::*;
use crate::StreamWriter;

fn put(dir: &Path, segment: u32, bytes: &[u8]) {
    std::fs::write(dir.join(segment_name(segment)), bytes).unwrap();
}

fn at(segment: u32, offset: u64) -> Cursor {
    Cursor { segment, offset, seq: 0 }
}

/// Lines, damage and the last position.
fn drain(reader: &mut StreamReader) -> (String, Vec<String>, (u32, u64)) {
    let (mut text, mut damage) = (Vec::new(), Vec::new());
    let mut place = (reader.cursor().segment, reader.cursor().offset);
    for _ in 0..1000 {
        let Some(chunk) = reader.next_chunk(16).unwrap() else {
            let cursor = reader.cursor();
            return (String::from_utf8_lossy(&text).into_owned(), damage, (cursor.segment, cursor.offset));
        };
        // Else whoever takes the chunks believes that one is missing, and asks for it for ever.
        assert!((chunk.segment, chunk.start_offset) <= place, "{chunk:?} does not go on at {place:?}");
        place = (chunk.next_segment, chunk.next_offset);
        text.extend_from_slice(&chunk.lines);
        damage.extend(chunk.damage);
    }
    panic!("the reader never comes to an end");
}

#[test]
fn a_stream_that_is_not_there_yet_is_simply_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let stream = dir.path().join("x/outbox/1");
    let mut reader = StreamReader::new(&stream, Cursor { segment: 0, offset: 0, seq: 0 });
    assert_eq!(reader.next_chunk(100).unwrap(), None);
    std::fs::create_dir_all(&stream).unwrap();
    assert_eq!(reader.next_chunk(100).unwrap(), None);
    put(&stream, 1, b"");
    assert_eq!(reader.next_chunk(100).unwrap(), None);
    put(&stream, 1, b"a\n");
    assert_eq!(reader.next_chunk(100).unwrap().unwrap().lines, "a\n");
    assert_eq!(reader.next_chunk(100).unwrap(), None);
}

#[test]
fn a_line_is_given_out_when_its_end_is_there() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\nbb\nhal");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    assert_eq!(drain(&mut reader).0, "a\nbb\n");
    assert_eq!(reader.unread(), 3);
    put(dir.path(), 1, b"a\nbb\nhalf\n");
    let chunk = reader.next_chunk(100).unwrap().unwrap();
    assert_eq!((chunk.segment, chunk.start_offset, chunk.next_offset), (1, 5, 10));
    assert_eq!(chunk.lines, "half\n");
}

#[test]
fn the_end_of_a_segment_is_no_line() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\n{\"v\":1,\"rotate\":2}\n");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    let chunk = reader.next_chunk(100).unwrap().unwrap();
    assert_eq!(chunk.lines, "a\n");
    assert_eq!((chunk.next_segment, chunk.next_offset), (2, 0));
    assert_eq!(reader.next_chunk(100).unwrap(), None, "the next segment is not there yet");
    put(dir.path(), 2, b"b\n");
    assert_eq!(drain(&mut reader), ("b\n".to_owned(), vec![], (2, 2)));
    // Read on its own it moves the cursor without lines.
    let chunk = StreamReader::new(dir.path(), at(1, 2)).next_chunk(100).unwrap().unwrap();
    assert_eq!((chunk.lines.len(), chunk.next_segment, chunk.next_offset), (0, 2, 0));
}

#[test]
fn a_rotation_to_elsewhere_is_left_to_the_decoder() {
    assert_eq!(whole_lines(1, b"a\n{\"v\":1,\"rotate\":9}\n"), WholeLines { len: 21, rotates: false });
    assert_eq!(whole_lines(1, b"{\"v\":1,\"rotate\":2}\n"), WholeLines { len: 0, rotates: true });
    assert_eq!(whole_lines(1, b"{\"v\":1,\"rotate\":2}\nxx"), WholeLines { len: 0, rotates: true });
    assert_eq!(whole_lines(1, b"xx"), WholeLines { len: 0, rotates: false });
}

#[test]
fn a_segment_left_without_a_word_is_final_when_the_next_one_exists() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\n");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    assert_eq!(drain(&mut reader).2, (1, 2));
    put(dir.path(), 2, b"");
    let chunk = reader.next_chunk(100).unwrap().unwrap();
    assert_eq!((chunk.lines.len(), chunk.next_segment, chunk.next_offset, chunk.damage), (0, 2, 0, None));
    put(dir.path(), 3, b"b\n");
    assert_eq!(drain(&mut reader), ("b\n".to_owned(), vec![], (3, 2)));
}

#[test]
fn a_file_that_is_shorter_than_its_cursor_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\nb\nc\n");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    assert_eq!(drain(&mut reader).2, (1, 6));
    put(dir.path(), 1, b"a\nB\n");
    let (text, damage, position) = drain(&mut reader);
    assert_eq!((text.as_str(), position), ("a\nB\n", (1, 4)));
    assert_eq!(damage, ["segment 1 is shorter than what was read of it (4 < 6); reading it again"]);
    assert_eq!(reader.next_chunk(100).unwrap(), None, "said once");
}

#[test]
fn a_cursor_in_the_middle_of_a_line_never_yields_half_of_it() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"first\nsecond\n");
    let (text, damage, _) = drain(&mut StreamReader::new(dir.path(), at(1, 3)));
    assert_eq!(text, "first\nsecond\n");
    assert_eq!(damage, ["offset 3 of segment 1 is not the start of a line; reading it again"]);
}

#[test]
fn a_missing_segment_is_passed_over_when_a_later_one_exists() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 3, b"c\n");
    let (text, damage, position) = drain(&mut StreamReader::new(dir.path(), at(2, 50)));
    assert_eq!((text.as_str(), position), ("c\n", (3, 2)));
    assert_eq!(damage, ["segment 2 is missing"]);
    assert_eq!(drain(&mut StreamReader::new(dir.path(), at(1, 0))).2, (1, 0), "waits for segments 1 and 2");
    let mut last = StreamReader::new(dir.path(), at(u32::MAX, 0));
    assert_eq!(last.next_chunk(10).unwrap(), None);
}

#[test]
fn a_removed_and_remade_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\n");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    assert_eq!(drain(&mut reader).0, "a\n");
    std::fs::remove_file(dir.path().join(segment_name(1))).unwrap();
    assert_eq!(reader.next_chunk(10).unwrap(), None);
    put(dir.path(), 1, b"a\nb\n");
    assert_eq!(drain(&mut reader).0, "b\n");
}

#[test]
fn one_long_line_is_read_and_a_too_long_one_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = b"a\n".to_vec();
    bytes.extend_from_slice(&vec![b'x'; 100_000]);
    bytes.push(b'\n');
    put(dir.path(), 1, &bytes);
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    assert_eq!(drain(&mut reader).0.len(), bytes.len());

    // A sparse file is as long as one likes.
    let path = dir.path().join(segment_name(1));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let end = MAX_LINE_BYTES as u64 + 200_000;
    file.set_len(end).unwrap();
    assert_eq!(drain(&mut reader).2, (1, bytes.len() as u64), "its end is not there yet");
    file.write_all_at(b"\nb\n", end).unwrap();
    let (text, damage, _) = drain(&mut reader);
    assert_eq!(text, "b\n");
    let what = format!(
        "a line of {} bytes at offset {} of segment 1 is too long and was skipped",
        end + 1 - bytes.len() as u64,
        bytes.len()
    );
    assert_eq!(damage, [what]);

    // The longest that is allowed.
    let mut line = vec![b'y'; MAX_LINE_BYTES - 1];
    line.push(b'\n');
    put(dir.path(), 2, &line);
    assert_eq!(drain(&mut reader).0.len(), MAX_LINE_BYTES);
}

#[test]
fn a_reader_keeps_up_with_a_writer_in_another_thread() {
    const LINES: usize = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let mut writer = StreamWriter::open(dir.path(), 5_000).unwrap();
    let writing = std::thread::spawn(move || {
        for number in 0..LINES {
            writer.append(format!("{number} {}\n", "x".repeat(number % 97)).as_bytes()).unwrap();
        }
    });
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    let mut next = 0;
    let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while next < LINES {
        assert!(std::time::Instant::now() < deadline, "stuck at line {next}, {:?}", reader.cursor());
        let Some(chunk) = reader.next_chunk(1000).unwrap() else { continue };
        assert_eq!(chunk.damage, None);
        for line in lines(&chunk.lines) {
            let text = std::str::from_utf8(line).unwrap();
            assert_eq!(text, format!("{next} {}", "x".repeat(next % 97)));
            next += 1;
        }
    }
    writing.join().unwrap();
}

#[test]
fn a_stream_on_a_network_file_system_is_opened_at_every_look() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), 1, b"a\n");
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    reader.on_network = Some(true);
    assert_eq!(reader.next_chunk(10).unwrap().unwrap().lines, "a\n");
    // A client that keeps its file open would go on in the old one.
    std::fs::remove_file(dir.path().join(segment_name(1))).unwrap();
    put(dir.path(), 1, b"a\nb\n");
    assert_eq!(reader.next_chunk(10).unwrap().unwrap().lines, "b\n");
}

#[test]
fn lines_are_split_at_their_ends() {
    let split = |bytes: &'static [u8]| lines(bytes).collect::<Vec<_>>();
    assert_eq!(split(b"a\n\nbc\n"), [&b"a"[..], b"", b"bc"]);
    assert_eq!(split(b"a\nb"), [&b"a"[..], b"b"]);
    assert!(split(b"").is_empty());
}

proptest! {
    #[test]
    fn any_bytes_come_to_an_end(segments in proptest::collection::vec(
        proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a'), any::<u8>()], 0..60), 0..4),
        segment in 0u32..4, offset in 0u64..70) {
        let dir = tempfile::tempdir().unwrap();
        for (number, bytes) in segments.iter().enumerate() {
            put(dir.path(), number as u32 + 1, bytes);
            let whole = whole_lines(number as u32 + 1, bytes);
            prop_assert!(whole.len <= bytes.len());
        }
        drain(&mut StreamReader::new(dir.path(), at(segment, offset)));
    }
}

/// A client whose attributes are old sees the next segment before it sees the end of the one before.
#[test]
fn on_a_network_file_system_a_segment_is_left_only_when_it_is_certain_to_be_over() {
    let line = |seq: u64| {
        format!(r#"{{"v":1,"seq":{seq},"ts":1,"job_id":"j","node_id":0,"gen":1,"type":"x","data":{{}}}}"#) + "\n"
    };
    let dir = tempfile::tempdir().unwrap();
    let mut reader = StreamReader::new(dir.path(), Cursor::default());
    reader.on_network = Some(true);
    put(dir.path(), 1, line(1).as_bytes());
    assert_eq!(drain(&mut reader).0, line(1));
    // The writer has gone on long since: records 2 and 3 here, the rest there.
    put(dir.path(), 2, line(4).as_bytes());
    assert_eq!(drain(&mut reader), (String::new(), vec![], (1, line(1).len() as u64)), "nothing is passed over");
    put(dir.path(), 1, (line(1) + &line(2)[..30]).as_bytes());
    assert_eq!(drain(&mut reader).0, "");
    put(dir.path(), 1, (line(1) + &line(2) + &line(3)).as_bytes());
    assert_eq!(drain(&mut reader).0, line(2) + &line(3) + &line(4), "it goes on where the numbers do");

    // A segment that was never seen is no other case.
    put(dir.path(), 4, line(6).as_bytes());
    assert_eq!(drain(&mut reader).0, "");
    put(dir.path(), 3, line(5).as_bytes());
    assert_eq!(drain(&mut reader), (line(5) + &line(6), vec![], (4, line(6).len() as u64)));

    // What is really lost is waited for only as long as a client may be wrong.
    put(dir.path(), 5, line(9).as_bytes());
    assert_eq!(drain(&mut reader).0, "");
    reader.doubt = Instant::now().checked_sub(OLD_ATTRIBUTES);
    assert_eq!(drain(&mut reader).0, line(9));
}
