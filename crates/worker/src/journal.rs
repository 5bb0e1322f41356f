//! The worker's memory across its own deaths: one stream per generation, read by the next one.
//!
//! A generation's journal begins with a snapshot of what the earlier ones said, closed by a `complete` record. A worker
//! that starts reads the newest journal that has one, and those after it, which died while they were copying; reading the
//! same fact twice changes nothing.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use drover_mailbox::{Cursor, Line, Mailbox, StreamReader, decode_line, lines};
use drover_types::{ErrorCode, Generation, InjectionId, OutboxId};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use tracing::{debug, warn};

use crate::agent::{TurnOutcome, TurnStatus};
use crate::core::{Entry, History, LostTurn, OpenTurn, kind};

/// A place in the outboxes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct OutboxPlace {
    #[serde(rename = "gen")]
    pub(crate) generation: u32,
    pub(crate) segment: u32,
    pub(crate) offset: u64,
}

/// Closes the snapshot at the beginning of a journal.
pub(crate) const COMPLETE: &str = "complete";

/// How much is read at a time.
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
struct BegunData {
    seq: u64,
    place: OutboxPlace,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outcome: Option<OutcomeData>,
}

#[derive(Serialize, Deserialize)]
struct OutcomeData {
    status: Cow<'static, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<Cow<'static, str>>,
}

#[derive(Serialize, Deserialize)]
struct EndedData {
    seq: u64,
}

#[derive(Serialize, Deserialize)]
struct MarkData {
    low: Cursor,
    taken: u64,
}

/// The parts of a journal record: injection, trace, type, data.
pub(crate) type Parts<'a> = (Option<&'a InjectionId>, Option<&'a Arc<str>>, &'static str, Box<RawValue>);

/// An entry as the parts of a record. `place` is where the outbox stands now: what the turn
/// writes comes behind it.
pub(crate) fn encode(entry: &Entry, place: OutboxPlace) -> serde_json::Result<Parts<'_>> {
    Ok(match entry {
        Entry::Begun { injection, seq, trace } => {
            let data = BegunData { seq: *seq, place, outcome: None };
            (Some(injection), trace.as_ref(), "begun", to_raw_value(&data)?)
        }
        Entry::Ending { injection, seq, trace, outcome } => {
            let outcome = OutcomeData {
                status: outcome.status.as_str().into(),
                error: outcome.error.clone(),
                code: outcome.code.map(|code| code.as_str().into()),
            };
            let data = BegunData { seq: *seq, place, outcome: Some(outcome) };
            (Some(injection), trace.as_ref(), "begun", to_raw_value(&data)?)
        }
        Entry::Returned { injection } => (Some(injection), None, "returned", to_raw_value(&serde_json::json!({}))?),
        Entry::Ended { injection, seq } => (Some(injection), None, "ended", to_raw_value(&EndedData { seq: *seq })?),
        Entry::Mark { low, taken } => (None, None, "mark", to_raw_value(&MarkData { low: *low, taken: *taken })?),
    })
}

/// What the journals of earlier generations add up to.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) low: Cursor,
    pub(crate) taken: u64,
    pub(crate) history: History,
    pub(crate) open: Vec<(OpenTurn, OutboxPlace)>,
}

/// Reads the journals of all generations before this one. Also says which there are, ascending.
pub(crate) fn load(mailbox: &Mailbox, id: &OutboxId) -> io::Result<(Memory, Vec<Generation>)> {
    let mut earlier = mailbox.generations(&id.swarm, id.node)?;
    earlier.retain(|generation| *generation < id.generation);
    let mut journals = Vec::new();
    for &generation in earlier.iter().rev() {
        let outbox = OutboxId { generation, ..id.clone() };
        let mut journal = Journal::default();
        for_each_line(StreamReader::new(mailbox.journal_dir(&outbox), Cursor::default()), |line| journal.read(line))?;
        if journal.unreadable > 0 {
            warn!(outbox = %outbox, records = journal.unreadable, "skipped journal records that cannot be read");
        }
        let complete = journal.complete;
        journals.push(journal);
        if complete {
            break;
        }
    }
    Ok((Memory::of(journals), earlier))
}

/// One generation's journal, read back.
#[derive(Default)]
pub(crate) struct Journal {
    facts: Vec<Fact>,
    /// Its snapshot is whole: what stands in earlier journals stands in this one.
    pub(crate) complete: bool,
    unreadable: u64,
}

impl Journal {
    /// Takes the next line.
    pub(crate) fn read(&mut self, line: &[u8]) {
        match read_fact(line) {
            Some(Fact::Complete) => self.complete = true,
            Some(fact) => self.facts.push(fact),
            None => self.unreadable += 1,
        }
    }
}

/// One journal record, read back.
enum Fact {
    Open(OpenTurn, OutboxPlace),
    Returned(InjectionId),
    Ended(InjectionId, u64),
    Mark { low: Cursor, taken: u64 },
    Complete,
}

fn read_fact(line: &[u8]) -> Option<Fact> {
    let Ok(Line::Record(record)) = decode_line(line) else { return None };
    let injection = || record.injection_id.as_deref()?.parse::<InjectionId>().ok();
    let data = record.data.get();
    Some(match record.kind.as_ref() {
        "begun" => {
            let BegunData { seq, place, outcome } = serde_json::from_str(data).ok()?;
            let outcome = match outcome {
                Some(outcome) => Some(read_outcome(outcome)?),
                None => None,
            };
            let trace = record.trace.as_deref().map(Arc::from);
            Fact::Open(OpenTurn { injection: injection()?, seq, trace, outcome }, place)
        }
        "returned" => Fact::Returned(injection()?),
        "ended" => Fact::Ended(injection()?, serde_json::from_str::<EndedData>(data).ok()?.seq),
        "mark" => {
            let MarkData { low, taken } = serde_json::from_str(data).ok()?;
            Fact::Mark { low, taken }
        }
        COMPLETE => Fact::Complete,
        _ => return None,
    })
}

fn read_outcome(data: OutcomeData) -> Option<TurnOutcome> {
    let all = [TurnStatus::Completed, TurnStatus::Failed, TurnStatus::Interrupted];
    let status = all.into_iter().find(|status| status.as_str() == data.status)?;
    let code = data.code.as_deref().and_then(ErrorCode::from_name);
    Some(TurnOutcome { status, error: data.error, code, text: String::new() })
}

impl Memory {
    /// What journals add up to, the newest given first; all behind the first complete one are superfluous.
    pub(crate) fn of(newest_first: Vec<Journal>) -> Self {
        let mut memory = Self::default();
        for fact in newest_first.into_iter().rev().flat_map(|journal| journal.facts) {
            memory.learn(fact);
        }
        memory
    }

    fn learn(&mut self, fact: Fact) {
        match fact {
            Fact::Open(turn, place) => {
                self.close(&turn.injection);
                if !self.history.contains(&turn.injection) {
                    self.open.push((turn, place));
                }
            }
            Fact::Returned(injection) => self.close(&injection),
            Fact::Ended(injection, seq) => {
                self.close(&injection);
                if !self.history.contains(&injection) {
                    self.history.ended(seq, injection, self.low.seq);
                }
            }
            Fact::Mark { low, taken } => {
                self.low = low;
                self.taken = self.taken.max(taken);
            }
            Fact::Complete => {}
        }
    }

    fn close(&mut self, injection: &InjectionId) {
        self.open.retain(|(turn, _)| turn.injection != *injection);
    }

    /// The entries of a snapshot, in an order in which they can be learnt again, each with the place it keeps.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Entry, Option<OutboxPlace>)> {
        let mark = Entry::Mark { low: self.low, taken: self.taken };
        let ended = self.history.ended_prompts();
        let ended = ended.map(|(seq, id)| (Entry::Ended { injection: id.clone(), seq: *seq }, None));
        let open = self.open.iter().map(|(turn, place)| {
            let OpenTurn { injection, seq, trace, outcome } = turn.clone();
            let entry = match outcome {
                Some(outcome) => Entry::Ending { injection, seq, trace, outcome },
                None => Entry::Begun { injection, seq, trace },
            };
            (entry, Some(*place))
        });
        std::iter::once((mark, None)).chain(ended).chain(open)
    }
}

/// Looks up in the outboxes of earlier generations how far each open turn came.
pub(crate) fn find_lost(
    mailbox: &Mailbox,
    id: &OutboxId,
    earlier: &[Generation],
    open: &[(OpenTurn, OutboxPlace)],
) -> io::Result<Vec<LostTurn>> {
    let mut search = Search::new(open);
    for &generation in earlier {
        if let Some(cursor) = search.begins_in(generation) {
            let dir = mailbox.outbox_dir(&OutboxId { generation, ..id.clone() });
            sync_all(&dir)?;
            for_each_line(StreamReader::new(dir, cursor), |line| search.see(line))?;
        }
    }
    Ok(search.lost)
}

/// Brings an earlier worker's outbox to disk. It may have died before it could, and what is found there is relied on.
fn sync_all(dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(dir)?.sync_all()
}

/// A search for the traces of open turns.
pub(crate) struct Search {
    pub(crate) lost: Vec<LostTurn>,
    index: HashMap<String, usize>,
    from: Option<OutboxPlace>,
}

impl Search {
    pub(crate) fn new(open: &[(OpenTurn, OutboxPlace)]) -> Self {
        let name = |(index, (turn, _)): (usize, &(OpenTurn, OutboxPlace))| (turn.injection.as_str().to_owned(), index);
        let lost = |(turn, _): &(OpenTurn, OutboxPlace)| LostTurn {
            open: turn.clone(),
            ended: false,
            answered: false,
            approvals: Vec::new(),
        };
        Self {
            lost: open.iter().map(lost).collect(),
            index: open.iter().enumerate().map(name).collect(),
            from: open.iter().map(|(_, place)| *place).min(),
        }
    }

    /// Where to read the outbox of a generation from; `None` when nothing can be in it.
    pub(crate) fn begins_in(&self, generation: Generation) -> Option<Cursor> {
        let from = self.from.filter(|from| from.generation <= generation.0)?;
        let here = Cursor { segment: from.segment, offset: from.offset, seq: 0 };
        Some(if from.generation == generation.0 { here } else { Cursor::default() })
    }

    /// Takes the next line of an outbox.
    pub(crate) fn see(&mut self, line: &[u8]) {
        let Ok(Line::Record(record)) = decode_line(line) else { return };
        let found = record.injection_id.as_deref().and_then(|id| self.index.get(id));
        let Some(turn) = found.and_then(|index| self.lost.get_mut(*index)) else { return };
        match record.kind.as_ref() {
            kind::TURN_COMPLETE => turn.ended = true,
            kind::ASSISTANT => turn.answered = true,
            kind::APPROVAL_REQUIRED => turn.approvals.extend(approval_of(record.data)),
            kind::APPROVAL_RESOLVED => {
                if let Some(resolved) = approval_of(record.data) {
                    turn.approvals.retain(|approval| *approval != resolved);
                }
            }
            _ => {}
        }
    }
}

fn approval_of(data: &RawValue) -> Option<(String, String)> {
    #[derive(Deserialize)]
    struct Names {
        approval_id: String,
        #[serde(default)]
        call_id: String,
    }
    let Names { approval_id, call_id } = serde_json::from_str(data.get()).ok()?;
    Some((approval_id, call_id))
}

/// Removes the journals that the snapshot of this generation has made superfluous.
pub(crate) fn forget_earlier(mailbox: &Mailbox, id: &OutboxId, earlier: &[Generation]) {
    for &generation in earlier {
        let dir = mailbox.journal_dir(&OutboxId { generation, ..id.clone() });
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                debug!(path = %dir.display(), %error, "an old journal stays");
            }
            _ => {}
        }
    }
}

fn for_each_line(mut reader: StreamReader, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    while let Some(chunk) = reader.next_chunk(CHUNK_BYTES)? {
        if let Some(damage) = &chunk.damage {
            debug!(segment = chunk.segment, damage, "went on behind damage");
        }
        for line in lines(&chunk.lines) {
            each(line);
        }
    }
    Ok(())
}
