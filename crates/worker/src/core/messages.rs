//! What goes into the core and what comes out of it, and the shapes of the records it writes.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_mailbox::Cursor;
use drover_types::{Failure, InjectionId};
use serde_json::{Value, json};

use crate::agent::{AgentCommand, AgentEvent, TurnOutcome};

/// Names of the records that the worker itself writes.
pub(crate) mod kind {
    pub(crate) const ASSISTANT: &str = "assistant";
    pub(crate) const APPROVAL_REQUIRED: &str = "exec_approval_required";
    pub(crate) const APPROVAL_RESOLVED: &str = "exec_approval_resolved";
    /// What the daemon of sessions tells of handoffs.
    pub(crate) const HANDOFFS: [&str; 3] = ["HandoffStarted", "HandoffCompleted", "HandoffFailed"];
    pub(crate) const KEYRING_STATE: &str = "keyring_state";
    pub(crate) const MEMBERS: &str = "members";
    pub(crate) const MEMBERSHIP_NOTES: &str = "membership_notes";
    pub(crate) const THREAD_STATUS: &str = "thread_status";
    pub(crate) const TURN_COMPLETE: &str = "turn_complete";
    pub(crate) const TURN_STARTED: &str = "turn_started";
    pub(crate) const WORKER_BYE: &str = "worker_bye";
    pub(crate) const WORKER_ERROR: &str = "worker_error";
    pub(crate) const WORKER_HELLO: &str = "worker_hello";
}

/// What the configuration says about a worker's decisions.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    /// Approve by itself what stays inside the working directory.
    pub(crate) auto_approve: bool,
    /// An approval without an answer for this long is declined.
    pub(crate) approval_timeout: Duration,
    /// How long a drain lets the running turn go on.
    pub(crate) drain_grace: Duration,
    /// Most prompts that may wait.
    pub(crate) max_queue: usize,
    /// The fields of `worker_hello` that stay the same: host, pid, agent, version.
    pub(crate) hello: serde_json::Map<String, Value>,
}

/// A byte in the inbox, between two records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    /// Number of the segment.
    pub(crate) segment: u32,
    /// Byte offset in it.
    pub(crate) offset: u64,
}

/// One line of the inbox.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delivery {
    /// Where the line begins.
    pub(crate) start: Place,
    /// Where the next one begins.
    pub(crate) end: Place,
    /// The record's number; 0 when the line is no record.
    pub(crate) seq: u64,
    /// The injection it names.
    pub(crate) injection: Option<InjectionId>,
    /// W3C traceparent.
    pub(crate) trace: Option<Arc<str>>,
    /// What it asks for.
    pub(crate) order: Order,
}

/// What an inbox record asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Order {
    /// Run a prompt, or add it to the running turn.
    Inject { content: String, steer: bool },
    /// End the running turn, or withdraw a waiting prompt.
    Interrupt,
    /// Somebody's word on an approval.
    Approval(ApprovalAnswer),
    /// End; with `ends_swarm` nobody will come back for the waiting prompts.
    Shutdown { reason: String, ends_swarm: bool },
    /// The key ring of the gossip, as JSON.
    Keyring { ring: Arc<str> },
    /// An `inject` that cannot be carried out.
    BadInject { why: String },
    /// Not understood.
    Unusable { why: String },
}

/// Somebody's word on an approval.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApprovalAnswer {
    pub(crate) approval_id: String,
    pub(crate) call_id: String,
    pub(crate) approved: bool,
    pub(crate) decision: Option<Value>,
}

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// The next line of the inbox.
    Inbox(Delivery),
    /// The agent said something.
    Agent(AgentEvent),
    /// The agent's task ended without a word.
    AgentGone,
    /// A timer that was set has run out.
    Timer(Timer),
    /// Somebody asked this process to end.
    Drain { reason: String },
    /// Whether the outbox and the journal can be written.
    Store { writable: bool },
    /// The shell has something to say that does not end the worker.
    Said(Failure),
    /// The membership beside this worker has a record for the outbox.
    Word { kind: &'static str, data: Value },
}

/// What a timer is for. Setting one again moves it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// This approval has waited long enough.
    Approval(String),
    /// The running turn had its grace.
    DrainGrace,
    /// The interrupted turn had its grace.
    InterruptGrace,
    /// Steered prompts of ended turns are no longer refused.
    SteerSettle,
}

/// A line of the worker's own memory.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Entry {
    /// The agent may see this prompt from now on.
    Begun { injection: InjectionId, seq: u64, trace: Option<Arc<str>> },
    /// This prompt ends without ever having been seen by the agent, and this is its end.
    Ending { injection: InjectionId, seq: u64, trace: Option<Arc<str>>, outcome: TurnOutcome },
    /// The agent refused this prompt: it waits again.
    Returned { injection: InjectionId },
    /// The prompt's `turn_complete` is on disk.
    Ended { injection: InjectionId, seq: u64 },
    /// Everything before `low` has ended; interrupts, approvals and shutdowns up to `taken` were carried out.
    Mark { low: Cursor, taken: u64 },
}

/// How the worker ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exit {
    /// As it was asked to.
    Drained,
    /// It cannot go on.
    Failed(Failure),
}

/// What the shell is to do, in order.
#[derive(Debug, PartialEq)]
pub(crate) enum Effect {
    /// Append to the journal.
    Journal(Entry),
    /// Bring the journal to disk.
    SyncJournal,
    /// Append to the outbox.
    Write { injection: Option<InjectionId>, trace: Option<Arc<str>>, kind: Cow<'static, str>, data: Value },
    /// Bring the outbox to disk.
    SyncOutbox,
    /// Tell the agent.
    Agent(AgentCommand),
    /// Give the key ring to the membership.
    Keyring(Arc<str>),
    /// Say so when this moment comes.
    SetTimer(Timer, Instant),
    /// No longer.
    CancelTimer(Timer),
    /// End the process, after everything before this is on disk.
    Exit(Exit),
}

/// What the outside may know of the worker.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Status {
    /// "starting", "idle", "busy" or "draining".
    pub(crate) state: &'static str,
    /// Injection whose turn runs.
    pub(crate) running: Option<InjectionId>,
    /// Prompts waiting.
    pub(crate) queued: usize,
    /// Times the agent program was restarted.
    pub(crate) agent_restarts: u32,
    /// Its process id.
    pub(crate) agent_pid: Option<u32>,
}

/// Plain counts, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Turns that ended, by status: completed, failed, interrupted.
    pub(crate) turns: [u64; 3],
    /// Inbox records that were not understood.
    pub(crate) unusable: u64,
    /// Inbox records passed over because they had been taken before.
    pub(crate) repeated: u64,
    /// Agent events that belonged to no running turn.
    pub(crate) stray: u64,
}

pub(super) fn write(id: Option<&InjectionId>, trace: Option<&Arc<str>>, kind: &'static str, data: Value) -> Effect {
    Effect::Write { injection: id.cloned(), trace: trace.cloned(), kind: Cow::Borrowed(kind), data }
}

pub(super) fn outcome_data(outcome: &TurnOutcome) -> Value {
    let mut data = json!({ "status": outcome.status.as_str() });
    if let Some(error) = &outcome.error {
        data["error"] = error.as_str().into();
    }
    if let Some(code) = outcome.code {
        data["code"] = code.as_str().into();
    }
    data
}

pub(super) fn error_data(failure: &Failure, fatal: bool) -> Value {
    json!({ "code": failure.code.as_str(), "message": failure.message, "hint": failure.hint, "fatal": fatal })
}
