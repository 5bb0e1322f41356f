//! From lines of an outbox to records, away from the writer's thread.

use std::sync::Arc;

use bytes::Bytes;
use drover_mailbox::{Line, decode_line};
use drover_proto::mailbox as pb;
use drover_types::{ErrorCode, Failure, Generation, InjectionId, NodeIndex, OutboxId};
use serde::Deserialize;
use serde_json::Value;
use tracing::{debug_span, warn};

use crate::core::effects::Word;
use crate::core::input::{OutRecord, RecordBody, RecordChunk};
use crate::core::members::{Ballot, MemberWord, MembersWord};
use crate::core::ring::{NoteWord, RingSaid};
use crate::metrics::Metrics;

/// Most names of events that are remembered; a worker that makes up new ones for ever gets them all the same.
const MOST_NAMES: usize = 256;

/// Decodes chunks; remembers what repeats.
#[derive(Debug)]
pub(crate) struct Decoder {
    names: Vec<Arc<str>>,
    injection: Option<InjectionId>,
    metrics: Metrics,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Hello {
    host: String,
    pid: u32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WorkerError {
    code: String,
    message: String,
    hint: String,
    fatal: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TurnComplete {
    status: Option<String>,
    error: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Usage {
    total_tokens: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Approval {
    approval_id: Option<String>,
    call_id: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Report {
    complete: bool,
    epoch: u64,
    term: u64,
    members: Vec<Value>,
}

/// One member that makes no sense must not hide the others; a snapshot of which a part is lost is none.
fn members(said: Report) -> MembersWord {
    let count = said.members.len();
    let members: Vec<MemberWord> =
        said.members.into_iter().filter_map(|member| serde_json::from_value(member).ok()).collect();
    if members.len() < count {
        warn!(lost = count - members.len(), "members of a report make no sense");
    }
    let ballot = Ballot { epoch: said.epoch, term: said.term };
    MembersWord { complete: said.complete && members.len() == count, ballot, members }
}

/// Key ids are numbers, or two hexadecimal digits.
#[derive(Deserialize)]
#[serde(untagged)]
enum KeyName {
    Number(u8),
    Text(String),
}

impl KeyName {
    fn id(&self) -> Option<u8> {
        match self {
            Self::Number(id) => Some(*id),
            Self::Text(text) => u8::from_str_radix(text, 16).ok(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RingState {
    ids: Vec<KeyName>,
    primary: Option<KeyName>,
}

impl RingState {
    fn said(&self) -> Option<RingSaid> {
        Some(RingSaid { ids: self.ids.iter().filter_map(KeyName::id).collect(), primary: self.primary.as_ref()?.id()? })
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Notes {
    notes: Vec<NoteWord>,
}

impl Decoder {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { names: Vec::new(), injection: None, metrics }
    }

    /// Decodes a chunk; `None` when it does not say which outbox it is of.
    pub(crate) fn chunk(&mut self, response: pb::FollowResponse) -> Option<RecordChunk> {
        let outbox = response.outbox?;
        let outbox = OutboxId {
            swarm: outbox.swarm_id.parse().ok()?,
            node: NodeIndex(outbox.node_id),
            generation: Generation(outbox.generation),
        };
        let lines = response.lines;
        // Deltas of this system are a few hundred bytes.
        let mut records = Vec::with_capacity(lines.len() / 256);
        let mut damage = response.damage;
        let mut start = 0;
        while start < lines.len() {
            let end = lines[start..].iter().position(|&byte| byte == b'\n').map_or(lines.len(), |at| start + at + 1);
            match decode_line(&lines[start..end]) {
                Ok(Line::Record(record)) => records.push(self.record(&lines, &record)),
                Ok(Line::Rotate(_)) => {}
                Err(error) => {
                    self.metrics.bad_records.inc();
                    warn!(%outbox, offset = response.start_offset + start as u64, %error, "skipped a line that is no record");
                    if damage.is_empty() {
                        damage = format!("a line is no record: {error}");
                    }
                }
            }
            start = end;
        }
        Some(RecordChunk {
            outbox,
            segment: response.segment,
            start_offset: response.start_offset,
            next_segment: response.next_segment,
            next_offset: response.next_offset,
            records,
            damage,
        })
    }

    fn record(&mut self, lines: &Bytes, record: &drover_mailbox::Record<'_>) -> OutRecord {
        let injection = record.injection_id.as_deref().and_then(|text| match &self.injection {
            Some(last) if last.as_str() == text => Some(last.clone()),
            _ => {
                self.injection = text.parse().ok();
                self.injection.clone()
            }
        });
        let data = record.data.get();
        if matches!(record.kind.as_ref(), "turn_started" | "turn_complete") {
            note_arrival(record);
        }
        OutRecord {
            seq: record.seq,
            ts: record.ts,
            injection,
            name: self.name(&record.kind),
            // The data stays where it arrived: no copy per record.
            data: lines.slice_ref(data.as_bytes()),
            body: body(&record.kind, data),
        }
    }

    fn name(&mut self, name: &str) -> Word {
        if let Some(known) = self.names.iter().find(|known| ***known == *name) {
            return Word::Other(Arc::clone(known));
        }
        let name: Arc<str> = name.into();
        if self.names.len() < MOST_NAMES {
            self.names.push(Arc::clone(&name));
        }
        Word::Other(name)
    }
}

/// The last link of a prompt's trace: where the begin and the end of its turn became known here. Not for every delta.
fn note_arrival(record: &drover_mailbox::Record<'_>) {
    let Some(trace) = record.trace.as_deref() else { return };
    let injection_id = record.injection_id.as_deref().unwrap_or_default();
    let span = debug_span!(
        parent: None, "event", event = %record.kind, job_id = %record.job_id, node_id = record.node_id, injection_id
    );
    if !span.is_disabled() {
        drover_service::remote_parent(&span, trace);
    }
}

/// What the router acts on. Fields that are missing or of another kind count as absent: a worker's slip must not keep a
/// turn from ending.
fn body(kind: &str, data: &str) -> RecordBody {
    match kind {
        "worker_hello" => {
            let hello: Hello = parse(data);
            RecordBody::Hello { host: hello.host, pid: hello.pid }
        }
        "worker_bye" => RecordBody::Bye,
        "worker_error" => {
            let error: WorkerError = parse(data);
            let code = ErrorCode::from_name(&error.code).unwrap_or(ErrorCode::LaunchFailed);
            let message = if error.message.is_empty() {
                "the worker failed without saying why".to_owned()
            } else {
                error.message
            };
            RecordBody::Error { failure: Failure::new(code, message).hint(error.hint), fatal: error.fatal }
        }
        "turn_started" => RecordBody::TurnStarted,
        "turn_complete" => {
            let turn: TurnComplete = parse(data);
            RecordBody::TurnComplete {
                status: turn.status.unwrap_or_else(|| "completed".to_owned()),
                error: turn.error.unwrap_or_default(),
            }
        }
        "assistant" => RecordBody::Assistant,
        "usage" => RecordBody::Usage(parse::<Usage>(data).total_tokens),
        "members" => RecordBody::Members(Box::new(members(parse(data)))),
        "keyring_state" => parse::<RingState>(data).said().map_or(RecordBody::Other, RecordBody::RingSaid),
        "membership_notes" => RecordBody::Notes(parse::<Notes>(data).notes),
        "exec_approval_required" => {
            let approval: Approval = parse(data);
            RecordBody::ApprovalRequired {
                approval_id: approval.approval_id.unwrap_or_default(),
                call_id: approval.call_id.unwrap_or_default(),
            }
        }
        "exec_approval_resolved" => {
            let approval: Approval = parse(data);
            RecordBody::ApprovalResolved {
                approval_id: approval.approval_id.unwrap_or_default(),
                call_id: approval.call_id.unwrap_or_default(),
            }
        }
        _ => RecordBody::Other,
    }
}

fn parse<'a, T: Deserialize<'a> + Default>(data: &'a str) -> T {
    serde_json::from_str(data).unwrap_or_default()
}
