//! The audit log: who changed what, when, and what became of it. One line when a command is taken, before anything comes of
//! it, and one when its answer is known; a command that cannot be written down is not carried out, and its answer waits until the
//! disk has the line. The process may be killed at any moment: what was begun stands there.
//!
//! Lines are JSON. A file that is full is given a number and kept; nothing is ever deleted here. Prompts are no part of it.
//!
//! ```text
//! callers ──lines──> writer (thread): append ──> "go on"          callers: carry it out
//!                        └──file──> syncer (thread): fsync ──> "on disk"        └──> answer
//! ```

mod files;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc as threads;
use std::time::Duration;

use arc_swap::ArcSwap;
use drover_types::{ErrorCode, Failure};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::error;

use files::Files;

/// Lines that may wait to be written; whoever has one more waits.
const ROOM: usize = 1024;
/// Writes that may wait for the disk; then the next one waits.
const UNSYNCED: usize = 64;
/// Bytes of answers that are kept for later while nothing can be written; more are given up, and said in the daemon's log.
const MOST_OWED: usize = 4 << 20;
/// Longest value of a field: callers choose names, and one could put a prompt there.
const LONGEST: usize = 200;
/// How often it is tried whether the log can be written again.
const TRY_AGAIN: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 5000 });

/// A line that waits.
enum Line {
    /// Of a command that is not carried out before this is written. Told is which write it was part of.
    Taken(Vec<u8>, oneshot::Sender<Result<u64, String>>),
    /// That nobody waits for: an answer, or a refusal.
    Said(Vec<u8>),
    /// None: whether one could be written.
    Try,
    /// Nothing follows; says when all is written.
    End(oneshot::Sender<()>),
}

/// Where lines go. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Audit {
    lines: mpsc::Sender<Line>,
    /// Why nothing could be written the last time; empty when it could.
    trouble: Arc<ArcSwap<String>>,
    /// The last write that the disk has.
    synced: watch::Receiver<u64>,
}

impl Audit {
    /// Opens the log of a directory, which is made when it is missing. Threads of its own write it: a disk that hangs
    /// holds up commands and nothing else.
    pub(super) fn open(dir: &Path, name: &'static str, file_size: u64) -> io::Result<Self> {
        let files = Files::open(dir, name, file_size)?;
        let (lines, waiting) = mpsc::channel(ROOM);
        let (written, to_sync) = threads::sync_channel(UNSYNCED);
        let (on_disk, synced) = watch::channel(0);
        let trouble = Arc::<ArcSwap<String>>::default();
        let writer = Writer { files, to_sync: written, trouble: Arc::clone(&trouble), writes: 0, owed: Vec::new() };
        std::thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run(waiting))?;
        let told = Arc::clone(&trouble);
        std::thread::Builder::new().name("audit sync".to_owned()).spawn(move || sync(&to_sync, &on_disk, &told))?;
        Ok(Self { lines, trouble, synced })
    }

    /// Where it is said why nothing could be written the last time.
    pub(super) fn trouble(&self) -> Arc<ArcSwap<String>> {
        Arc::clone(&self.trouble)
    }

    /// Writes down that a command is taken. An error means that it must not be carried out; else it is told for
    /// [`Audit::on_disk`] which write it was.
    pub(super) async fn taken(&self, line: &Value) -> Result<u64, Failure> {
        let (said, told) = oneshot::channel();
        self.lines.send(Line::Taken(encoded(line), said)).await.map_err(|_| over())?;
        match told.await {
            Ok(Ok(written)) => Ok(written),
            Ok(Err(why)) => Err(Failure::new(
                ErrorCode::StoreUnavailable,
                format!("{why}; nothing is done that does not stand in the audit log"),
            )
            .hint("make room on its disk or make it writable, then repeat the request; the daemon goes on by itself")),
            Err(_) => Err(over()),
        }
    }

    /// Returns when the disk has that write, or has failed to take it, which is then said as trouble.
    pub(super) async fn on_disk(&self, written: u64) {
        // After the end everything is there.
        let _ = self.synced.clone().wait_for(|synced| *synced >= written).await;
    }

    /// Writes down what became of it.
    pub(super) async fn answered(&self, line: &Value) {
        // After the end nobody is answered any more.
        let _ = self.lines.send(Line::Said(encoded(line))).await;
    }

    /// Writes down that a command was refused, when there is room for it. Nobody waits for that.
    pub(super) fn refused(&self, line: &Value) {
        let _ = self.lines.try_send(Line::Said(encoded(line)));
    }

    /// Finds out again and again whether the log can be written, while it cannot: people are told no longer than it is true.
    pub(super) async fn mend(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(TRY_AGAIN) => {}
                () = stop.cancelled() => return,
            }
            if !self.trouble.load().is_empty() {
                let _ = self.lines.try_send(Line::Try);
            }
        }
    }

    /// Returns when everything is written.
    pub(super) async fn close(&self) {
        let (said, told) = oneshot::channel();
        if self.lines.send(Line::End(said)).await.is_ok() {
            let _ = told.await;
        }
    }
}

fn over() -> Failure {
    Failure::new(ErrorCode::ShuttingDown, "the daemon is stopping").hint("repeat the request in a moment")
}

fn encoded(line: &Value) -> Vec<u8> {
    let mut text = line.to_string().into_bytes();
    text.push(b'\n');
    text
}

/// A field of a line: nothing when there is nothing to say, and never longer than a name should be.
pub fn put(fields: &mut Map<String, Value>, name: &str, value: &str) {
    if !value.is_empty() {
        let end = value.char_indices().nth(LONGEST).map(|(at, _)| at);
        let kept = end.map_or_else(|| value.to_owned(), |end| format!("{}…", &value[..end]));
        fields.insert(name.to_owned(), kept.into());
    }
}

/// Appends lines, those together that have come together.
struct Writer {
    files: Files,
    to_sync: threads::SyncSender<(u64, Arc<File>)>,
    trouble: Arc<ArcSwap<String>>,
    writes: u64,
    /// Lines of commands that were carried out, which could not be written yet.
    owed: Vec<u8>,
}

impl Writer {
    fn run(mut self, mut waiting: mpsc::Receiver<Line>) {
        let mut batch = Vec::new();
        while waiting.blocking_recv_many(&mut batch, ROOM) > 0 {
            if let Some(asker) = self.write(&mut batch) {
                // What was not waited for is on disk too when the daemon says that it has ended.
                let _ = self.files.sync();
                let _ = asker.send(());
                return;
            }
        }
    }

    /// Writes what has come, and returns who waits for the end.
    fn write(&mut self, batch: &mut Vec<Line>) -> Option<oneshot::Sender<()>> {
        let mut bytes = std::mem::take(&mut self.owed);
        let mut said = bytes.clone();
        let (mut askers, mut end) = (Vec::new(), None);
        for line in batch.drain(..) {
            match line {
                Line::Taken(line, asker) => {
                    bytes.extend(line);
                    askers.push(asker);
                }
                Line::Said(line) => {
                    bytes.extend(&line);
                    said.extend(line);
                }
                // An empty line is none to those who read.
                Line::Try if bytes.is_empty() => bytes.push(b'\n'),
                Line::Try => {}
                Line::End(asker) => end = Some(asker),
            }
        }
        let written = self.files.append(&bytes);
        let written = written.map_err(|error| format!("failed to write {}: {error}", self.files.path().display()));
        self.trouble.store(Arc::new(written.as_ref().err().cloned().unwrap_or_default()));
        match &written {
            Ok(()) if !askers.is_empty() => {
                self.writes += 1;
                let _ = self.to_sync.send((self.writes, self.files.current()));
            }
            Ok(()) => {}
            Err(why) => {
                error!(error = why, "the audit log cannot be written");
                // Their commands were carried out. The others' are not, and are told so.
                self.owed = said;
                if self.owed.len() > MOST_OWED {
                    error!(
                        bytes = self.owed.len(),
                        "lines of the audit log are lost: it could not be written for too long"
                    );
                    self.owed.clear();
                }
            }
        }
        for asker in askers {
            let _ = asker.send(written.clone().map(|()| self.writes));
        }
        end
    }
}

/// Puts what was written on disk, all together that has come meanwhile.
fn sync(written: &threads::Receiver<(u64, Arc<File>)>, on_disk: &watch::Sender<u64>, trouble: &ArcSwap<String>) {
    while let Ok(next) = written.recv() {
        // A file that is full is on disk before the next one is begun.
        let (number, file) = written.try_iter().last().unwrap_or(next);
        if let Err(error) = file.sync_data() {
            error!(%error, "the disk does not take the audit log");
            trouble.store(Arc::new(format!("failed to put the audit log on disk: {error}")));
        }
        on_disk.send_replace(number);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use futures::StreamExt as _;
    use serde_json::json;

    use super::files::numbered;
    use super::*;

    const CURRENT: &str = "audit.jsonl";

    fn lines(dir: &Path) -> Vec<Value> {
        let mut files: Vec<PathBuf> = numbered(dir, "audit").unwrap().into_iter().map(|(_, path)| path).collect();
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
            let audit = Audit::open(&at, "audit", audit_file_size).unwrap();
            let each = (0..100_u64).map(|n| {
                let audit = audit.clone();
                async move {
                    let written = audit.taken(&json!({"run": run, "n": n})).await.unwrap();
                    audit.on_disk(written).await;
                    assert!(*audit.synced.borrow() >= written);
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
        drop(Files::open(&at, "audit", 1024).unwrap());
        let mut found: Vec<Value> =
            lines(&at).iter().map(|line| json!([line["run"], line["n"], line["result"]])).collect();
        let key = |value: &Value| value.to_string();
        found.sort_by_key(key);
        expected.sort_by_key(key);
        assert_eq!(found, expected);
        let files = numbered(&at, "audit").unwrap();
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
        let audit = Audit::open(&at, "audit", 64).unwrap();
        audit.taken(&json!({"n": 0, "long": "x".repeat(60)})).await.unwrap();
        // The next line needs another file, and none can be made: even root cannot write into a file that stands for the directory.
        fs::rename(&at, dir.path().join("away")).unwrap();
        fs::write(&at, "").unwrap();
        let failure = audit.taken(&json!({"n": 1})).await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::StoreUnavailable);
        audit.answered(&json!({"n": 0, "result": "ok"})).await;
        assert!(audit.taken(&json!({"n": 2})).await.is_err());
        assert!(!audit.trouble().load().is_empty());
        fs::remove_file(&at).unwrap();
        fs::rename(dir.path().join("away"), &at).unwrap();
        // Nobody has to command something for it to be found out that it works again.
        let found_out = async {
            while !audit.trouble().load().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = found_out => {}
            () = audit.clone().mend(CancellationToken::new()) => {}
        }
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
