//! Reads the inbox on a thread of its own: woken by inotify where that works, and by the clock where it does not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use drover_mailbox::{Chunk, Cursor, Line, StreamReader, decode_line, lines};
use drover_types::InjectionId;
use notify::Watcher as _;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::core::{ApprovalAnswer, Delivery, Order, Place};

/// Pause between two looks while something is at work.
const HOT: Duration = Duration::from_millis(50);
/// The longest pause.
const COLD: Duration = Duration::from_secs(2);
/// How much is read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Wakes the reader: for a look at the file, for an end, for another pace.
#[derive(Clone)]
pub(crate) struct InboxControl {
    wake: SyncSender<()>,
    hot: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl InboxControl {
    /// Whether the file is to be looked at often.
    pub(crate) fn set_hot(&self, hot: bool) {
        if self.hot.swap(hot, Ordering::Relaxed) != hot && hot {
            let _ = self.wake.try_send(());
        }
    }

    /// Ends the reader.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.wake.try_send(());
    }
}

/// The reader, not yet running.
pub(crate) struct InboxReader {
    dir: PathBuf,
    reader: StreamReader,
    wakes: Receiver<()>,
    control: InboxControl,
}

impl InboxReader {
    pub(crate) fn new(dir: PathBuf, from: Cursor) -> (Self, InboxControl) {
        // One waiting wake-up is enough: the reader then reads all there is.
        let (wake, wakes) = sync_channel(1);
        let control =
            InboxControl { wake, hot: Arc::new(AtomicBool::new(true)), stop: Arc::new(AtomicBool::new(false)) };
        let reader = StreamReader::new(dir.clone(), from);
        (Self { dir, reader, wakes, control: control.clone() }, control)
    }

    /// Reads until it is stopped or nobody listens any more. Blocks: for a thread of its own.
    pub(crate) fn run(mut self, out: &mpsc::Sender<Vec<Delivery>>) {
        let _watcher = watch(&self.dir, self.control.wake.clone());
        let mut pause = HOT;
        while !self.control.stop.load(Ordering::Relaxed) {
            match self.reader.next_chunk(CHUNK_BYTES) {
                Ok(Some(chunk)) => {
                    pause = HOT;
                    if out.blocking_send(deliveries(&chunk)).is_err() {
                        return;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => warn!(path = %self.dir.display(), %error, "cannot read the inbox; trying again"),
            }
            if self.control.hot.load(Ordering::Relaxed) {
                pause = HOT;
            }
            match self.wakes.recv_timeout(pause) {
                Ok(()) => pause = HOT,
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(COLD),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// A watch on the directory. Without one the clock alone has to do.
fn watch(dir: &Path, wake: SyncSender<()>) -> Option<notify::RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own looks are accesses too, and must not lead to the next one.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _ = wake.try_send(());
        }
    });
    let started = watcher.and_then(|mut watcher| {
        watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    started.inspect_err(|error| debug!(path = %dir.display(), %error, "no inotify on the inbox")).ok()
}

/// The lines of a chunk as deliveries.
fn deliveries(chunk: &Chunk) -> Vec<Delivery> {
    let mut found = Vec::new();
    let mut offset = chunk.start_offset;
    for line in lines(&chunk.lines) {
        let start = Place { segment: chunk.segment, offset };
        // The line end, which `lines` leaves out, counts too.
        offset += line.len() as u64 + 1;
        found.push(delivery(line, start, Place { segment: chunk.segment, offset }));
    }
    let end = Place { segment: chunk.next_segment, offset: chunk.next_offset };
    if let Some(damage) = &chunk.damage {
        // A torn line is one that the follower never acknowledged: it comes again, whole.
        debug!(segment = chunk.segment, damage, "went on behind damage in the inbox");
    }
    if let Some(last) = found.last_mut() {
        last.end = end;
    }
    found
}

fn delivery(line: &[u8], start: Place, end: Place) -> Delivery {
    let unusable =
        |seq, why| Delivery { start, end, seq, injection: None, trace: None, order: Order::Unusable { why } };
    let record = match decode_line(line) {
        Ok(Line::Record(record)) => record,
        Ok(Line::Rotate(_)) => return unusable(0, "a rotation inside a segment".to_owned()),
        Err(error) => return unusable(0, error.to_string()),
    };
    let injection = match record.injection_id.as_deref().map(str::parse::<InjectionId>).transpose() {
        Ok(injection) => injection,
        Err(error) => return unusable(record.seq, error.to_string()),
    };
    let data = record.data.get();
    Delivery {
        start,
        end,
        seq: record.seq,
        injection,
        trace: record.trace.as_deref().map(Arc::from),
        order: order(record.kind.as_ref(), data),
    }
}

#[derive(Deserialize)]
struct InjectData {
    content: String,
    #[serde(default)]
    steer: bool,
}

#[derive(Deserialize)]
struct ApprovalData {
    #[serde(default)]
    call_id: Option<String>,
    #[serde(default)]
    approval_id: Option<String>,
    approved: bool,
    #[serde(default)]
    decision: Option<Value>,
}

#[derive(Deserialize)]
struct KeyringData<'a> {
    #[serde(borrow)]
    ring: &'a RawValue,
}

#[derive(Deserialize)]
struct ShutdownData {
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    ends_swarm: bool,
}

fn order(kind: &str, data: &str) -> Order {
    match kind {
        "inject" => match serde_json::from_str(data) {
            Ok(InjectData { content, steer }) => Order::Inject { content, steer },
            Err(error) => Order::BadInject { why: format!("the prompt cannot be read: {error}") },
        },
        "interrupt" => Order::Interrupt,
        "approval" => match serde_json::from_str(data) {
            Ok(ApprovalData { call_id, approval_id, approved, decision }) => Order::Approval(ApprovalAnswer {
                approval_id: approval_id.unwrap_or_default(),
                call_id: call_id.unwrap_or_default(),
                approved,
                decision,
            }),
            Err(error) => Order::Unusable { why: format!("the approval cannot be read: {error}") },
        },
        "keyring" => match serde_json::from_str::<KeyringData<'_>>(data) {
            Ok(KeyringData { ring }) => Order::Keyring { ring: ring.get().into() },
            // What the parser says may quote it, and it is secret.
            Err(_) => Order::Unusable { why: "the key ring cannot be read".to_owned() },
        },
        "shutdown" => {
            let ShutdownData { reason, ends_swarm } =
                serde_json::from_str(data).unwrap_or(ShutdownData { reason: None, ends_swarm: false });
            Order::Shutdown { reason: reason.unwrap_or_else(|| "shutdown was asked for".to_owned()), ends_swarm }
        }
        other => Order::Unusable { why: format!("records of type {other:?} are not known") },
    }
}
