//! The audit log: who changed what, when, and what became of it. One line when a command is taken, before anything comes of
//! it, and one when its answer is known; a command that cannot be written down is not carried out. The process may be killed
//! at any moment: what was begun stands there.
//!
//! Lines are JSON. A file that is full is given a number and kept; nothing is ever deleted here. Prompts are no part of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use drover_types::{ErrorCode, Failure};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};
use tracing::error;

/// The file that is being written.
const CURRENT: &str = "audit.jsonl";
/// Lines that may wait to be written; whoever has one more waits.
const ROOM: usize = 1024;
/// Bytes of answers that are kept for later while nothing can be written; more are given up, and said in the daemon's log.
const MOST_OWED: usize = 4 << 20;
/// Longest value of a field: callers choose names, and one could put a prompt there.
const LONGEST: usize = 200;

/// A line that waits.
enum Line {
    /// Of a command that is not carried out before this is written.
    Taken(Vec<u8>, oneshot::Sender<Result<(), String>>),
    /// Of its answer.
    Answered(Vec<u8>),
    /// Nothing follows; says when all is written.
    End(oneshot::Sender<()>),
}

/// Where lines go. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Audit {
    lines: mpsc::Sender<Line>,
    /// Why nothing could be written the last time; empty when it could.
    trouble: Arc<ArcSwap<String>>,
}

impl Audit {
    /// Opens the log of a directory, which is made when it is missing. A thread of its own writes it: a disk that hangs
    /// holds up commands and nothing else.
    pub(crate) fn open(dir: &Path, file_size: u64) -> io::Result<Self> {
        let mut files = Files::open(dir, file_size)?;
        let (lines, waiting) = mpsc::channel(ROOM);
        let trouble = Arc::<ArcSwap<String>>::default();
        let told = Arc::clone(&trouble);
        std::thread::Builder::new().name("audit".to_owned()).spawn(move || write_lines(&mut files, waiting, &told))?;
        Ok(Self { lines, trouble })
    }

    /// Where it is said why nothing could be written the last time.
    pub(crate) fn trouble(&self) -> Arc<ArcSwap<String>> {
        Arc::clone(&self.trouble)
    }

    /// Writes down that a command is taken. An error means that it must not be carried out.
    pub(crate) async fn taken(&self, line: &Value) -> Result<(), Failure> {
        let (said, told) = oneshot::channel();
        self.lines.send(Line::Taken(encoded(line), said)).await.map_err(|_| over())?;
        match told.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(Failure::new(
                ErrorCode::StoreUnavailable,
                format!("{why}; nothing is done that does not stand in the audit log"),
            )
            .hint("make room on its disk or make it writable, then repeat the request; the router goes on by itself")),
            Err(_) => Err(over()),
        }
    }

    /// Writes down what became of it.
    pub(crate) async fn answered(&self, line: &Value) {
        // After the end nobody is answered any more.
        let _ = self.lines.send(Line::Answered(encoded(line))).await;
    }

    /// Returns when everything is written.
    pub(crate) async fn close(&self) {
        let (said, told) = oneshot::channel();
        if self.lines.send(Line::End(said)).await.is_ok() {
            let _ = told.await;
        }
    }
}

fn over() -> Failure {
    crate::store::stopping()
}

fn encoded(line: &Value) -> Vec<u8> {
    let mut text = line.to_string().into_bytes();
    text.push(b'\n');
    text
}

/// A field of a line: nothing when there is nothing to say, and never longer than a name should be.
pub(crate) fn put(fields: &mut Map<String, Value>, name: &str, value: &str) {
    if !value.is_empty() {
        let end = value.char_indices().nth(LONGEST).map(|(at, _)| at);
        let kept = end.map_or_else(|| value.to_owned(), |end| format!("{}…", &value[..end]));
        fields.insert(name.to_owned(), kept.into());
    }
}

fn write_lines(files: &mut Files, mut waiting: mpsc::Receiver<Line>, trouble: &ArcSwap<String>) {
    let (mut batch, mut owed) = (Vec::new(), Vec::new());
    while waiting.blocking_recv_many(&mut batch, ROOM) > 0 {
        let (mut bytes, mut askers, mut end) = (std::mem::take(&mut owed), Vec::new(), None);
        let mut answers = bytes.clone();
        for line in batch.drain(..) {
            match line {
                Line::Taken(line, asker) => {
                    bytes.extend(line);
                    askers.push(asker);
                }
                Line::Answered(line) => {
                    bytes.extend(&line);
                    answers.extend(line);
                }
                Line::End(asker) => end = Some(asker),
            }
        }
        let written = files
            .append(&bytes)
            .map_err(|error| format!("failed to write {}: {error}", files.dir.join(CURRENT).display()));
        trouble.store(Arc::new(written.as_ref().err().cloned().unwrap_or_default()));
        if let Err(why) = &written {
            error!(error = why, "the audit log cannot be written");
            // Their commands were carried out. The others' are not, and are told so.
            owed = answers;
            if owed.len() > MOST_OWED {
                error!(bytes = owed.len(), "lines of the audit log are lost: it could not be written for too long");
                owed.clear();
            }
        }
        for asker in askers {
            let _ = asker.send(written.clone());
        }
        if let Some(asker) = end {
            let _ = asker.send(());
            return;
        }
    }
}

/// The files of the log.
struct Files {
    dir: PathBuf,
    file: File,
    size: u64,
    most: u64,
}

impl Files {
    fn open(dir: &Path, most: u64) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let (file, size) = open_current(dir)?;
        Ok(Self { dir: dir.to_owned(), file, size, most })
    }

    /// Appends whole lines, or nothing.
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + lines.len() as u64 > self.most {
            self.make_room()?;
        }
        let written = self.file.write_all(lines);
        if written.is_err() {
            // Half a line would spoil the next one.
            self.file.set_len(self.size)?;
        } else {
            self.size += lines.len() as u64;
        }
        written
    }

    /// Gives the file the next number and begins another.
    fn make_room(&mut self) -> io::Result<()> {
        let next = numbered(&self.dir)?.last().map_or(1, |(number, _)| number + 1);
        match fs::rename(self.dir.join(CURRENT), self.dir.join(format!("audit-{next:06}.jsonl"))) {
            // An attempt before this one got no further.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        (self.file, self.size) = open_current(&self.dir)?;
        Ok(())
    }
}

/// The current file, ending with a whole line.
fn open_current(dir: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(dir.join(CURRENT))?;
    let size = file.metadata()?.len();
    if size == 0 {
        return Ok((file, 0));
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(size - 1))?;
    file.read_exact(&mut last)?;
    if last == [b'\n'] {
        return Ok((file, size));
    }
    // A writer was killed in the middle. What it had begun stays, as a line that is none.
    file.write_all(b"\n")?;
    Ok((file, size + 1))
}

/// The files that are full, in their order.
fn numbered(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl")?.parse().ok());
        found.extend(number.map(|number: u64| (number, entry.path())));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use futures::StreamExt as _;
    use serde_json::json;

    use super::*;

    fn lines(dir: &Path) -> Vec<Value> {
        let mut files: Vec<PathBuf> = numbered(dir).unwrap().into_iter().map(|(_, path)| path).collect();
        files.push(dir.join(CURRENT));
        let text: String = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    #[tokio::test]
    async fn a_full_file_makes_room_and_no_line_is_lost_or_torn() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("audit");
        let audit_file_size = 1024;
        let mut expected = Vec::new();
        // Twice: the second writer goes on behind the first, which left half a line.
        for run in 0..2_u64 {
            let audit = Audit::open(&at, audit_file_size).unwrap();
            let each = (0..100_u64).map(|n| {
                let audit = audit.clone();
                async move {
                    audit.taken(&json!({"run": run, "n": n})).await.unwrap();
                    audit.answered(&json!({"run": run, "n": n, "result": "ok"})).await;
                }
            });
            // A few at a time: those that come together are written together.
            futures::stream::iter(each).buffer_unordered(4).for_each(|()| async {}).await;
            audit.close().await;
            assert!(audit.taken(&json!({})).await.is_err(), "the log is closed");
            OpenOptions::new().append(true).open(at.join(CURRENT)).unwrap().write_all(b"{\"half").unwrap();
            expected.extend((0..100_u64).flat_map(|n| [json!([run, n, null]), json!([run, n, "ok"])]));
        }
        drop(Files::open(&at, 1024).unwrap());
        let mut found: Vec<Value> =
            lines(&at).iter().map(|line| json!([line["run"], line["n"], line["result"]])).collect();
        let key = |value: &Value| value.to_string();
        found.sort_by_key(key);
        expected.sort_by_key(key);
        assert_eq!(found, expected);
        let files = numbered(&at).unwrap();
        assert!(files.len() > 5, "{files:?}");
        for (_, path) in &files {
            let meta = fs::metadata(path).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, 0o600);
            // Askers that come together are written together, in one file.
            assert!(meta.len() <= 8192, "{} bytes", meta.len());
        }
        assert_eq!(fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn what_cannot_be_written_down_is_refused_and_answers_are_made_up_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("audit");
        let audit = Audit::open(&at, 64).unwrap();
        audit.taken(&json!({"n": 0, "long": "x".repeat(60)})).await.unwrap();
        // The next line needs another file, and none can be made: even root cannot write into a file that stands for the directory.
        fs::rename(&at, dir.path().join("away")).unwrap();
        fs::write(&at, "").unwrap();
        let failure = audit.taken(&json!({"n": 1})).await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::StoreUnavailable);
        audit.answered(&json!({"n": 0, "result": "ok"})).await;
        assert!(audit.taken(&json!({"n": 2})).await.is_err());
        fs::remove_file(&at).unwrap();
        fs::rename(dir.path().join("away"), &at).unwrap();
        audit.taken(&json!({"n": 3})).await.unwrap();
        audit.close().await;
        let found: Vec<(u64, bool)> =
            lines(&at).iter().map(|line| (line["n"].as_u64().unwrap(), line["result"] == "ok")).collect();
        assert_eq!(found, [(0, false), (0, true), (3, false)]);
    }

    #[test]
    fn long_values_are_cut_and_empty_ones_left_out() {
        let mut fields = Map::new();
        put(&mut fields, "a", "");
        put(&mut fields, "b", &"ü".repeat(LONGEST + 1));
        put(&mut fields, "c", "line\nline");
        assert_eq!(fields.len(), 2);
        assert_eq!(fields["b"].as_str().unwrap().chars().count(), LONGEST + 1);
        assert!(!Value::Object(fields).to_string().contains('\n'));
    }
}
