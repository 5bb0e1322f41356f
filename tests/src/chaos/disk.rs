//! What the files say at this moment: turns begun and not ended, and records behind the cursors in the router's database.
//!
//! Nothing here asks drover. Outboxes are read as they grow, so that a look is cheap however long the proof runs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use drover_mailbox::{Cursor, Line, Mailbox, StreamReader, decode_line, lines};
use drover_service::process::{self, ProcessId};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};

use super::{Place, Swarm};

/// Bytes of whole records by outbox.
pub(crate) type Appended = HashMap<OutboxId, u64>;

/// How often each event of each injection stands in the outboxes, by injection and event name.
pub(crate) type Written = HashMap<(String, String), u32>;

/// A reader of the outboxes and of the router's database.
pub(crate) struct Disk {
    mailbox: Mailbox,
    database: PathBuf,
    nodes: Vec<(Place, Inbox)>,
    outboxes: BTreeMap<Place, BTreeMap<Generation, Outbox>>,
}

struct Inbox {
    reader: StreamReader,
    /// Prompts delivered to the node whose turns have not ended.
    waiting: HashSet<String>,
}

struct Outbox {
    id: OutboxId,
    path: PathBuf,
    owner: Option<ProcessId>,
    /// Bytes of whole records so far.
    appended: u64,
    /// Turns begun and not ended.
    open: HashSet<String>,
    written: Written,
    /// Its worker was dead before the last look, so it grows no more.
    sealed: bool,
}

/// A node whose worker lives.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) worker: ProcessId,
    /// Whether a turn is in flight on it.
    pub(crate) busy: bool,
    /// Whether every prompt that was delivered to it has ended. A worker may have begun a prompt and not said so yet, so
    /// this is less than not being busy.
    pub(crate) idle: bool,
}

impl Disk {
    pub(crate) fn new(state: &Path, swarms: &[Swarm]) -> anyhow::Result<Self> {
        let mailbox = Mailbox::new(state.join("mailbox"));
        let mut nodes = Vec::new();
        for place in swarms.iter().flat_map(Swarm::places) {
            let dir = mailbox.inbox_dir(&place.swarm.parse()?, NodeIndex(place.node));
            let reader = StreamReader::new(dir, Cursor::default());
            nodes.push((place, Inbox { reader, waiting: HashSet::new() }));
        }
        Ok(Self { mailbox, database: state.join("router/router.sqlite"), nodes, outboxes: BTreeMap::new() })
    }

    /// Reads what is new. The nodes whose worker lives: a turn of a dead worker is not in flight.
    pub(crate) fn look(&mut self) -> anyhow::Result<Vec<Node>> {
        let mut nodes = Vec::new();
        for (place, inbox) in &mut self.nodes {
            let swarm: SwarmId = place.swarm.parse()?;
            let node = NodeIndex(place.node);
            let outboxes = self.outboxes.entry(place.clone()).or_default();
            for generation in self.mailbox.generations(&swarm, node)? {
                let id = OutboxId { swarm: swarm.clone(), node, generation };
                outboxes.entry(generation).or_insert_with(|| Outbox::new(&self.mailbox, id)).read(&self.mailbox)?;
            }
            // Read behind the outboxes, so that a prompt that waits is never missed.
            inbox.read()?;
            inbox.waiting.retain(|injection| {
                let end = (injection.clone(), "turn_complete".to_owned());
                outboxes.values().all(|outbox| !outbox.written.contains_key(&end))
            });
            if let Some(newest) = outboxes.values().next_back()
                && let Some(worker) = newest.owner.filter(process::is_alive)
            {
                let (busy, idle) = (!newest.open.is_empty(), inbox.waiting.is_empty());
                nodes.push(Node { place: place.clone(), worker, busy, idle });
            }
        }
        Ok(nodes)
    }

    /// Whether a turn has ended on this node.
    pub(crate) fn has_worked(&self, place: &Place) -> bool {
        let written =
            self.outboxes.get(place).into_iter().flat_map(BTreeMap::values).flat_map(|out| out.written.keys());
        written.into_iter().any(|(_, event)| event == "turn_complete")
    }

    /// Takes away what the workers of this node remember of the prompts they began.
    pub(crate) fn forget(&self, place: &Place) -> anyhow::Result<()> {
        for outbox in self.outboxes.get(place).into_iter().flat_map(BTreeMap::values) {
            let journal = self.mailbox.journal_dir(&outbox.id);
            if journal.exists() {
                std::fs::remove_dir_all(journal)?;
            }
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Outbox> {
        self.outboxes.values().flat_map(BTreeMap::values)
    }

    /// What had been appended at the last look.
    pub(crate) fn appended(&self) -> Appended {
        self.all().map(|outbox| (outbox.id.clone(), outbox.appended)).collect()
    }

    /// How many bytes of records were appended after `before` and are not committed.
    pub(crate) fn uncommitted_since(&self, before: &Appended) -> anyhow::Result<u64> {
        let committed = committed_cursors(&self.database)?;
        let of = |map: &Appended, outbox: &Outbox| map.get(&outbox.id).copied().unwrap_or(0);
        let open = |outbox| outbox_rest(outbox, of(before, outbox).max(of(&committed, outbox)));
        Ok(self.all().map(open).sum())
    }

    /// What the workers wrote, all in all.
    pub(crate) fn written(&self) -> Written {
        let mut written = Written::new();
        for (key, count) in self.all().flat_map(|outbox| &outbox.written) {
            *written.entry(key.clone()).or_default() += count;
        }
        written
    }
}

fn outbox_rest(outbox: &Outbox, from: u64) -> u64 {
    outbox.appended.saturating_sub(from)
}

impl Inbox {
    /// Takes in the prompts that are new.
    fn read(&mut self) -> anyhow::Result<()> {
        while let Some(chunk) = self.reader.next_chunk(1 << 20)? {
            for line in lines(&chunk.lines) {
                let Ok(Line::Record(record)) = decode_line(line) else { continue };
                if record.kind == "inject" {
                    self.waiting.extend(record.injection_id.map(std::borrow::Cow::into_owned));
                }
            }
        }
        Ok(())
    }
}

impl Outbox {
    fn new(mailbox: &Mailbox, id: OutboxId) -> Self {
        let path = mailbox.outbox_dir(&id).join("00000001.jsonl");
        Self { id, path, owner: None, appended: 0, open: HashSet::new(), written: Written::new(), sealed: false }
    }

    /// Takes in the records that are new.
    fn read(&mut self, mailbox: &Mailbox) -> anyhow::Result<()> {
        if self.sealed {
            return Ok(());
        }
        if self.owner.is_none() {
            self.owner =
                mailbox.owner(&self.id)?.map(|owner| ProcessId { pid: owner.pid, start_time: owner.start_time });
        }
        // Asked before the file is read: what a dead worker wrote is all there.
        let sealed = self.owner.is_some_and(|owner| !process::is_alive(&owner));
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        let rotated = self.path.with_file_name("00000002.jsonl").exists();
        ensure!(!rotated, "{} was rotated; this proof counts on one segment", self.path.display());
        file.seek(SeekFrom::Start(self.appended))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        self.take(&bytes);
        self.sealed = sealed;
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) {
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        self.appended += whole as u64;
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let Ok(Line::Record(record)) = decode_line(line) else { continue };
            let Some(injection) = record.injection_id.as_deref() else { continue };
            match record.kind.as_ref() {
                "turn_started" => _ = self.open.insert(injection.to_owned()),
                "turn_complete" => _ = self.open.remove(injection),
                _ => {}
            }
            *self.written.entry((injection.to_owned(), record.kind.into_owned())).or_default() += 1;
        }
    }
}

/// The router's committed cursors, read as any other program would read its database.
fn committed_cursors(database: &Path) -> anyhow::Result<Appended> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    // The router keeps every other program out with a lock; a look that writes nothing needs none.
    let connection = rusqlite::Connection::open_with_flags_and_vfs(database, flags, c"unix-none")?;
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    let mut query = connection
        .prepare("SELECT swarms.id, node, generation, offset FROM streams JOIN swarms ON swarms.key = streams.swarm")?;
    let mut rows = query.query([])?;
    let mut committed = Appended::new();
    while let Some(row) = rows.next()? {
        let swarm: String = row.get(0)?;
        let id = OutboxId {
            swarm: swarm.parse().context("a swarm id in the database")?,
            node: NodeIndex(row.get(1)?),
            generation: Generation(row.get(2)?),
        };
        committed.insert(id, row.get::<_, i64>(3)?.unsigned_abs());
    }
    Ok(committed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seq: u64, kind: &str, injection: &str) -> String {
        format!(
            r#"{{"v":1,"seq":{seq},"ts":1,"job_id":"j","node_id":0,"gen":1,"injection_id":"{injection}","type":"{kind}","data":{{}}}}"#
        ) + "\n"
    }

    #[test]
    fn a_turn_is_open_from_its_start_to_its_end_and_a_torn_line_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let id = OutboxId { swarm: "s".parse().unwrap(), node: NodeIndex(0), generation: Generation(1) };
        let mut outbox = Outbox::new(&Mailbox::new(dir.path()), id);
        // The end of a turn that an earlier generation began must not hide the next turn.
        outbox.take(record(1, "turn_complete", "lost").as_bytes());
        outbox.take(record(2, "turn_started", "next").as_bytes());
        assert_eq!(outbox.open.len(), 1);

        let end = record(3, "turn_complete", "next");
        let (before, begun) = (outbox.appended, &end.as_bytes()[..20]);
        outbox.take(begun);
        assert_eq!((outbox.appended, outbox.open.len()), (before, 1), "half a record is none");
        outbox.take(end.as_bytes());
        assert_eq!((outbox.appended, outbox.open.len()), (before + end.len() as u64, 0));
        assert_eq!(outbox.written[&("next".to_owned(), "turn_complete".to_owned())], 1);
        assert_eq!(outbox_rest(&outbox, before), end.len() as u64);
    }
}
