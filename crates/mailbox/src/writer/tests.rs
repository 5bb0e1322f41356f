use std::cell::{Cell, RefCell};
use std::os::unix::fs::MetadataExt as _;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::{Cursor, StreamReader, lines};

/// What a test can do to a disk while a writer uses it.
#[derive(Debug, Default)]
struct Faults {
    /// Bytes until the disk is full.
    space: Cell<Option<u64>>,
    /// Bytes until the writer's process is killed in the middle of a write: from then on nothing it does has an effect.
    life: Cell<Option<u64>>,
    dead: Cell<bool>,
    sync_fails: Cell<bool>,
    cut_fails: Cell<bool>,
    /// The file system cannot reserve space, as an older NFS cannot.
    no_reserve: Cell<bool>,
    /// What of the last append reached the file.
    landed: RefCell<Vec<u8>>,
}

#[derive(Debug, Clone, Default)]
struct Faulty(Rc<Faults>);

fn errno(errno: Errno) -> io::Error {
    errno.into()
}

impl Faulty {
    fn alive(&self) -> io::Result<()> {
        if self.0.dead.get() { Err(errno(Errno::IO)) } else { Ok(()) }
    }
}

impl Storage for Faulty {
    fn create(&mut self, path: &Path) -> io::Result<File> {
        self.alive()?;
        Disk.create(path)
    }

    fn write(&mut self, file: &File, bytes: &[u8]) -> io::Result<usize> {
        self.alive()?;
        let mut take = bytes.len() as u64;
        if let Some(space) = self.0.space.get() {
            take = take.min(space);
            self.0.space.set(Some(space - take));
            if take == 0 {
                return Err(errno(Errno::NOSPC));
            }
        }
        if let Some(life) = self.0.life.get() {
            take = take.min(life);
            self.0.life.set(Some(life - take));
            self.0.dead.set(life == take);
            if take == 0 {
                return Err(errno(Errno::IO));
            }
        }
        let taken = &bytes[..take as usize];
        Disk.write(file, taken)?;
        if !bytes.starts_with(b"{\"v\":1,\"rotate\"") {
            self.0.landed.borrow_mut().extend_from_slice(taken);
        }
        Ok(taken.len())
    }

    fn reserve(&mut self, _: &File, _: u64, len: u64) -> io::Result<()> {
        self.alive()?;
        match self.0.space.get() {
            _ if self.0.no_reserve.get() => Err(errno(Errno::OPNOTSUPP)),
            Some(space) if space < len => Err(errno(Errno::NOSPC)),
            _ => Ok(()),
        }
    }

    fn cut(&mut self, file: &File, len: u64) -> io::Result<()> {
        self.alive()?;
        if self.0.cut_fails.get() {
            return Err(errno(Errno::IO));
        }
        Disk.cut(file, len)
    }

    fn sync(&mut self, _: &File) -> io::Result<()> {
        self.alive()?;
        if self.0.sync_fails.get() { Err(errno(Errno::IO)) } else { Ok(()) }
    }

    fn sync_dir(&mut self, _: &Path) -> io::Result<()> {
        self.alive()
    }
}

fn open(dir: &Path, segment_bytes: u64, faults: &Faulty) -> Writer<Faulty> {
    Writer::open(dir.to_owned(), segment_bytes, faults.clone()).unwrap()
}

/// Every line of a stream from a cursor on, and what the reader found wrong.
fn read_from(dir: &Path, cursor: Cursor) -> (Vec<String>, Vec<String>) {
    let (mut found, mut damage) = (Vec::new(), Vec::new());
    let mut reader = StreamReader::new(dir, cursor);
    while let Some(chunk) = reader.next_chunk(50).unwrap() {
        found.extend(lines(&chunk.lines).map(|line| String::from_utf8(line.to_vec()).unwrap()));
        damage.extend(chunk.damage);
    }
    (found, damage)
}

fn read_all(dir: &Path) -> (Vec<String>, Vec<String>) {
    read_from(dir, Cursor::default())
}

fn segments(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_stream_rotates_by_size_and_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let stream = dir.path().join("a/inbox");
    let mut writer = StreamWriter::open(&stream, 100).unwrap();
    assert_eq!(writer.position(), (1, 0));
    for n in 0..10 {
        writer.append(format!("{{\"n\":{n},\"pad\":\"{}\"}}\n", "x".repeat(20)).as_bytes()).unwrap();
    }
    writer.sync().unwrap();
    let (found, damage) = read_all(&stream);
    assert_eq!(found.len(), 10);
    assert_eq!(damage, [""; 0]);
    assert_eq!(writer.position().0, 5, "two lines of 37 bytes fit a segment");
    let first = std::fs::read_to_string(stream.join("00000001.jsonl")).unwrap();
    assert!(first.ends_with("\n{\"v\":1,\"rotate\":2}\n"), "{first}");
    assert_eq!(std::fs::metadata(stream.join("00000005.jsonl")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&stream).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_line_longer_than_a_segment_gets_one_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = StreamWriter::open(dir.path(), 10).unwrap();
    let long = format!("\"{}\"\n", "x".repeat(100));
    for _ in 0..2 {
        writer.append(long.as_bytes()).unwrap();
    }
    assert_eq!(writer.position(), (2, 103));
    assert_eq!(read_all(dir.path()).0.len(), 2);
}

#[test]
fn only_whole_lines_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = StreamWriter::open(dir.path(), 1000).unwrap();
    assert_eq!(writer.append(b"{}\n{}").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let mut long = vec![b'x'; MAX_LINE_BYTES];
    long.push(b'\n');
    assert_eq!(writer.append(&long).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(writer.append(b"{\"v\":1,\"rotate\":2}\n").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    writer.append(b"").unwrap();
    writer.append(b"{}\n").unwrap();
    assert_eq!(read_all(dir.path()).0, ["{}"]);
}

#[test]
fn a_writer_goes_on_where_the_last_one_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let put = |line: &str| StreamWriter::open(dir.path(), 1000).unwrap().append(line.as_bytes()).unwrap();
    put("\"a\"\n");
    put("\"b\"\n");
    assert_eq!(segments(dir.path()), 1);
    // Killed in the middle of a line, and in the middle of going to the next segment.
    append_raw(dir.path(), 1, b"\"torn");
    put("\"c\"\n");
    append_raw(dir.path(), 2, b"{\"v\":1,\"rotate\":3}\n");
    put("\"d\"\n");
    // A line of data that only ends like a rotation is data.
    append_raw(dir.path(), 3, b"\"{\"v\":1,\"rotate\":4}\n");
    put("\"e\"\n");
    // Bytes that a crash of the host left instead of the line.
    append_raw(dir.path(), 3, &[0; 100]);
    put("\"f\"\n");
    assert_eq!(segments(dir.path()), 4);
    let (found, damage) = read_all(dir.path());
    assert_eq!(found, ["\"a\"", "\"b\"", "\"c\"", "\"d\"", "\"{\"v\":1,\"rotate\":4}", "\"e\"", "\"f\""]);
    assert_eq!(damage, ["segment 1 ends in a torn line of 5 bytes", "segment 3 ends in a torn line of 100 bytes"]);
}

fn append_raw(dir: &Path, segment: u32, bytes: &[u8]) {
    let path = dir.join(segment_name(segment));
    io::Write::write_all(&mut std::fs::OpenOptions::new().append(true).open(path).unwrap(), bytes).unwrap();
}

#[test]
fn a_full_disk_takes_nothing_or_all_and_the_stream_recovers() {
    for (cut_fails, no_reserve) in [(false, false), (true, false), (false, true), (true, true)] {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faulty::default();
        faults.0.cut_fails.set(cut_fails);
        faults.0.no_reserve.set(no_reserve);
        let mut writer = open(dir.path(), 1 << 20, &faults);
        writer.append(b"\"a\"\n").unwrap();
        faults.0.space.set(Some(2));
        for _ in 0..20 {
            assert_eq!(writer.append(b"\"lost\"\n").unwrap_err().raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        }
        writer.sync().unwrap();
        faults.0.space.set(None);
        writer.append(b"\"b\"\n").unwrap();
        writer.sync().unwrap();
        assert_eq!(read_all(dir.path()).0, ["\"a\"", "\"b\""], "cut fails: {cut_fails}, no reserve: {no_reserve}");
        assert_eq!(segments(dir.path()), 2, "a full disk must not cost a segment per try");
    }
}

#[test]
fn lines_that_could_not_be_synced_are_reported_and_the_rest_goes_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faulty::default();
    let mut writer = open(dir.path(), 1 << 20, &faults);
    writer.append(b"\"a\"\n").unwrap();
    faults.0.sync_fails.set(true);
    writer.sync().unwrap_err();
    faults.0.sync_fails.set(false);
    writer.sync().unwrap();
    writer.append(b"\"b\"\n").unwrap();
    writer.sync().unwrap();
    assert_eq!(writer.position(), (2, 4));

    // Also when the segment was left before anybody asked.
    let mut writer = open(dir.path(), 8, &faults);
    writer.append(b"\"c\"\n").unwrap();
    faults.0.sync_fails.set(true);
    writer.append(b"\"d\"\n").unwrap();
    faults.0.sync_fails.set(false);
    writer.sync().unwrap_err();
    writer.sync().unwrap();
    assert_eq!(read_all(dir.path()).0, ["\"a\"", "\"b\"", "\"c\"", "\"d\""]);
}

#[test]
fn a_segment_that_is_there_already_is_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = StreamWriter::open(dir.path(), 8).unwrap();
    writer.append(b"\"a\"\n").unwrap();
    std::fs::write(dir.path().join("00000002.jsonl"), b"\"x\"\n\"torn").unwrap();
    std::fs::write(dir.path().join("00000003.jsonl"), b"\"y\"\n").unwrap();
    writer.append(b"\"bbb\"\n").unwrap();
    assert_eq!(read_all(dir.path()).0, ["\"a\"", "\"x\"", "\"y\"", "\"bbb\""]);
}

/// What happens to a stream, in any order.
#[derive(Debug, Clone)]
enum Step {
    /// So many lines of so many bytes, in one append.
    Append(Vec<usize>),
    /// The same, but the writer is killed after so many bytes; another one takes over.
    Crash(Vec<usize>, u64),
    /// The same, but the disk is full after so many bytes; space comes back afterwards.
    Full(Vec<usize>, u64),
    Sync,
    /// The writer ends in order; another one takes over.
    Restart,
    /// One look.
    Read(usize),
    /// The reader is killed; another one goes on at its cursor.
    Resume,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = || proptest::collection::vec(1usize..40, 1..5);
    let step = prop_oneof![
        4 => batch().prop_map(Step::Append),
        2 => (batch(), 0u64..120).prop_map(|(batch, at)| Step::Crash(batch, at)),
        2 => (batch(), 0u64..120).prop_map(|(batch, at)| Step::Full(batch, at)),
        1 => Just(Step::Sync),
        1 => Just(Step::Restart),
        4 => (1usize..200).prop_map(Step::Read),
        1 => Just(Step::Resume),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #[test]
    fn exactly_the_whole_lines_are_read_once_and_in_order(steps in steps(), segment_bytes in 1u64..300) {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faulty::default();
        let mut writer = open(dir.path(), segment_bytes, &faults);
        let mut reader = StreamReader::new(dir.path(), Cursor::default());
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        let mut number = 0;
        let mut make = |sizes: &[usize]| -> Vec<u8> {
            sizes.iter().flat_map(|size| { number += 1; format!("[{number},\"{}\"]\n", "x".repeat(*size)).into_bytes() }).collect()
        };
        for step in steps {
            faults.0.landed.borrow_mut().clear();
            match step {
                Step::Append(sizes) => {
                    let batch = make(&sizes);
                    writer.append(&batch).unwrap();
                    expected.extend(lines(&batch).map(<[u8]>::to_vec));
                }
                Step::Crash(sizes, life) => {
                    faults.0.life.set(Some(life));
                    let _ = writer.append(&make(&sizes));
                    let landed = faults.0.landed.borrow().clone();
                    let whole = landed.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
                    expected.extend(lines(&landed[..whole]).map(<[u8]>::to_vec));
                    faults.0.life.set(None);
                    faults.0.dead.set(false);
                    writer = open(dir.path(), segment_bytes, &faults);
                }
                Step::Full(sizes, space) => {
                    let batch = make(&sizes);
                    faults.0.space.set(Some(space));
                    if writer.append(&batch).is_ok() {
                        expected.extend(lines(&batch).map(<[u8]>::to_vec));
                    }
                    faults.0.space.set(None);
                }
                Step::Sync => writer.sync().unwrap(),
                Step::Restart => writer = open(dir.path(), segment_bytes, &faults),
                Step::Read(max) => {
                    if let Some(chunk) = reader.next_chunk(max).unwrap() {
                        found.extend(lines(&chunk.lines).map(<[u8]>::to_vec));
                    }
                }
                Step::Resume => reader = StreamReader::new(dir.path(), reader.cursor()),
            }
        }
        while let Some(chunk) = reader.next_chunk(64).unwrap() {
            prop_assert_eq!((chunk.next_segment, chunk.next_offset), (reader.cursor().segment, reader.cursor().offset));
            found.extend(lines(&chunk.lines).map(<[u8]>::to_vec));
        }
        prop_assert_eq!(found, expected);
    }
}

/// The real thing: a small tmpfs that runs full. It is mounted in a mount namespace of a child's own.
#[test]
fn a_full_file_system_loses_nothing() {
    const INSIDE: &str = "DROVER_TEST_SMALL_DISK";
    if let Some(disk) = std::env::var_os(INSIDE) {
        return fill_and_recover(Path::new(&disk));
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=512k tmpfs \"$0\" || exit 77; exec \"$@\"";
    let name = "writer::tests::a_full_file_system_loses_nothing";
    for namespace in [&["-m"][..], &["-r", "-m"][..]] {
        let child = std::process::Command::new("unshare")
            .args(namespace)
            .args(["sh", "-c", script])
            .arg(dir.path())
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(INSIDE, dir.path())
            .output();
        let output = match child {
            Ok(output) if output.status.code() != Some(77) && !output.stderr.starts_with(b"unshare:") => output,
            _ => continue,
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    assert!(std::env::var_os("CI").is_none(), "cannot mount a tmpfs, and with CI set nothing may be skipped");
    eprintln!("not run: neither root nor a user namespace could mount a tmpfs");
}

/// Takes all the space but a little.
fn fill(ballast: &Path) {
    let mut file = File::create(ballast).unwrap();
    let mut len = 0;
    while let Ok(written) = io::Write::write(&mut file, &[0; 4096]) {
        len += written as u64;
    }
    file.set_len(len - 10_000).unwrap();
}

fn fill_and_recover(disk: &Path) {
    let ballast = disk.join("ballast");
    let stream = disk.join("stream");
    let mut writer = StreamWriter::open(&stream, 1 << 20).unwrap();
    let mut expected = Vec::new();
    let line = |number: usize| format!("[{number},\"{}\"]\n", "x".repeat(1000));
    for round in 0..3 {
        fill(&ballast);
        let failure = loop {
            assert!(expected.len() < 1000, "the disk never ran full");
            let next = line(expected.len());
            match writer.append(next.as_bytes()) {
                Ok(()) => expected.push(next.trim_end().to_owned()),
                Err(error) => break error,
            }
        };
        assert_eq!(failure.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        for _ in 0..10 {
            writer.append(line(9999).as_bytes()).unwrap_err();
        }
        writer.sync().unwrap();
        assert_eq!(read_all(&stream).0, expected, "round {round}");
        std::fs::remove_file(&ballast).unwrap();
        if round == 1 {
            // A writer that starts on the full disk, too, finds its way.
            fill(&ballast);
            writer = StreamWriter::open(&stream, 1 << 20).unwrap();
            std::fs::remove_file(&ballast).unwrap();
        }
        for _ in 0..10 {
            let next = line(expected.len());
            writer.append(next.as_bytes()).unwrap();
            expected.push(next.trim_end().to_owned());
        }
        assert_eq!(read_all(&stream).0, expected, "round {round}");
    }
    assert!(segments(&stream) <= 4, "at most one segment per full disk");
}

#[test]
fn modes_do_not_depend_on_the_umask() {
    const INSIDE: &str = "DROVER_TEST_UMASK";
    if let Some(dir) = std::env::var_os(INSIDE) {
        let stream = Path::new(&dir).join("swarm/inbox");
        let mut writer = StreamWriter::open(&stream, 100).unwrap();
        writer.append(b"{}\n").unwrap();
        writer.sync().unwrap();
        assert_eq!(std::fs::metadata(stream.join("00000001.jsonl")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(&stream).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(stream.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        return;
    }
    for umask in ["000", "277", "777"] {
        let dir = tempfile::tempdir().unwrap();
        let output = std::process::Command::new("sh")
            .args(["-c", "umask \"$0\"; exec \"$@\"", umask])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "writer::tests::modes_do_not_depend_on_the_umask", "--nocapture"])
            .env(INSIDE, dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "umask {umask}: {text}");
    }
}
