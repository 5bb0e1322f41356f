//! The worker's decisions: what to begin, what to refuse, what to write, when to end. No clock, files or tasks in here.
//!
//! ```text
//! inbox record, agent event, timer, drain  ->  Core::handle  ->  journal entry, outbox record, agent command, timer, exit
//! ```
//!
//! Effects are carried out in order. `Sync*` is a barrier: what follows it may rely on everything before it being on
//! disk. The one promise that everything else serves: a prompt's `Begun` entry is synced before the agent sees it, and a
//! `turn_complete` is synced before its `Ended` entry is written. So whoever finds `Begun` without `Ended` looks into the
//! outbox from the place that `Begun` names, and either finds the end there or writes it.

mod approvals;
mod drain;
mod history;
mod messages;
mod start;
mod turn;

#[cfg(test)]
mod invariants;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_config::WorkerConfig;
use drover_mailbox::Cursor;
use drover_types::{ErrorCode, Failure, InjectionId};
use serde_json::{Value, json};

use crate::agent::{AgentEvent, TurnOutcome, TurnStatus};
use approvals::Approvals;
use drain::swarm_over;
pub(crate) use history::History;
pub(crate) use messages::{
    ApprovalAnswer, Counts, Delivery, Effect, Entry, Exit, Input, Order, Place, Policy, Status, Timer, kind,
};
use messages::{error_data, outcome_data, write};
pub(crate) use start::{LostTurn, OpenTurn};
use turn::{Steered, Turn};

/// How long an agent may take to refuse a steered prompt whose turn has ended meanwhile.
const STEER_SETTLE: Duration = Duration::from_secs(1);

/// A prompt that waits for its turn.
#[derive(Debug, Clone, PartialEq)]
struct Prompt {
    id: InjectionId,
    seq: u64,
    trace: Option<Arc<str>>,
    content: String,
    /// Its `turn_started` is written: it was steered and refused.
    announced: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    /// Prompts are begun.
    Serving,
    /// No prompt is begun any more.
    Draining { reason: String, ends_swarm: bool },
    /// Nothing matters any more.
    Over,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Core {
    policy: Policy,
    /// Number of the last inbox record passed.
    last_seq: u64,
    /// End of the last inbox line passed.
    position: Place,
    /// Interrupts, approvals and shutdowns up to here were carried out, perhaps by an earlier generation.
    taken: u64,
    /// A shutdown that is being carried out; marked as taken only when it is done.
    shutdown_seq: u64,
    /// Where each prompt that has not ended stands in the inbox, by record number.
    unfinished: BTreeMap<u64, Cursor>,
    history: History,
    waiting: VecDeque<Prompt>,
    turn: Option<Turn>,
    /// Steered prompts whose turn has ended a moment ago: the agent may still refuse them.
    settling: Vec<(Steered, TurnOutcome)>,
    approvals: Approvals,
    phase: Phase,
    agent_ready: bool,
    greeted: bool,
    agent_pid: Option<u32>,
    agent_restarts: u32,
    writable: bool,
    /// Number of the last inbox record that an earlier generation took.
    inherited_seq: u64,
    counts: Counts,
    /// The time of the input that is being handled.
    now: Option<Instant>,
}

impl Core {
    /// Carries out one input.
    pub(crate) fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Effect>) {
        if self.phase == Phase::Over {
            return;
        }
        self.now = Some(now);
        match input {
            Input::Inbox(delivery) => self.take(now, delivery, out),
            Input::Agent(event) => self.on_agent(now, event, out),
            Input::AgentGone => {
                let failure = Failure::new(ErrorCode::Internal, "the agent ended without saying why")
                    .hint("look for a panic in the worker's log");
                self.give_up(failure, out);
            }
            Input::Timer(timer) => self.on_timer(now, timer, out),
            Input::Drain { reason } => self.drain(now, reason, false, out),
            Input::Said(failure) => {
                out.push(write(None, None, kind::WORKER_ERROR, error_data(&failure, false)));
            }
            Input::Word { kind, data } => out.push(write(None, None, kind, data)),
            Input::Store { writable } => {
                self.writable = writable;
                self.begin_next(out);
            }
        }
    }

    /// What the outside may know.
    pub(crate) fn status(&self) -> Status {
        let state = match (&self.phase, self.agent_ready, &self.turn) {
            (Phase::Draining { .. } | Phase::Over, _, _) => "draining",
            (Phase::Serving, _, Some(_)) => "busy",
            (Phase::Serving, false, None) => "starting",
            (Phase::Serving, true, None) => "idle",
        };
        Status {
            state,
            running: self.turn.as_ref().map(|turn| turn.id.clone()),
            queued: self.waiting.len(),
            agent_restarts: self.agent_restarts,
            agent_pid: self.agent_pid,
        }
    }

    /// Counts so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Something is at work or waits: the inbox deserves a close look.
    pub(crate) fn is_hot(&self) -> bool {
        self.turn.is_some() || !self.waiting.is_empty()
    }

    fn take(&mut self, now: Instant, delivery: Delivery, out: &mut Vec<Effect>) {
        let Delivery { start, end, seq, injection, trace, order } = delivery;
        let before = Cursor { segment: start.segment, offset: start.offset, seq: self.last_seq };
        self.position = end;
        if seq == 0 {
            let why = if let Order::Unusable { why } = order { why } else { "record without a number".to_owned() };
            self.note_unusable(seq, &why, out);
            return;
        }
        if seq <= self.last_seq {
            self.counts.repeated += 1;
            return;
        }
        self.last_seq = seq;
        match order {
            Order::Inject { content, steer } => match injection {
                Some(id) => {
                    let prompt = Prompt { id, seq, trace, content, announced: false };
                    self.take_prompt(now, before, prompt, steer, out);
                }
                None => self.note_unusable(seq, "inject without an injection_id", out),
            },
            Order::BadInject { why } => {
                self.note_unusable(seq, &why, out);
                if let Some(id) = injection.filter(|id| !self.history.contains(id)) {
                    self.history.add(&id);
                    self.unfinished.insert(seq, before);
                    self.refuse(id, seq, trace.as_ref(), &TurnOutcome::failed(ErrorCode::InvalidRequest, why), out);
                }
            }
            Order::Unusable { why } => self.note_unusable(seq, &why, out),
            Order::Interrupt | Order::Approval(_) | Order::Shutdown { .. } if seq <= self.taken => {
                self.counts.repeated += 1;
            }
            Order::Interrupt => self.interrupt(seq, injection.as_ref(), out),
            Order::Approval(answer) => {
                self.mark_taken(seq, out);
                self.answer_approval(injection, trace, answer, out);
            }
            // Nothing of it has to be remembered: the membership takes no ring that is older than its own.
            Order::Keyring { ring } => out.push(Effect::Keyring(ring)),
            Order::Shutdown { reason, ends_swarm } => {
                self.shutdown_seq = seq;
                self.drain(now, reason, ends_swarm, out);
            }
        }
    }

    fn take_prompt(&mut self, now: Instant, before: Cursor, prompt: Prompt, steer: bool, out: &mut Vec<Effect>) {
        if self.history.contains(&prompt.id) {
            self.counts.repeated += 1;
            return;
        }
        self.history.add(&prompt.id);
        self.unfinished.insert(prompt.seq, before);
        if let Phase::Draining { ends_swarm: true, .. } = self.phase {
            self.refuse(prompt.id, prompt.seq, prompt.trace.as_ref(), &swarm_over(), out);
            return;
        }
        if steer && self.can_steer() {
            self.steer(now, prompt, out);
            return;
        }
        if self.waiting.len() >= self.policy.max_queue {
            let why = format!(
                "the node's queue is full: {} prompts wait already; inject again later, or raise worker.max_queue",
                self.waiting.len()
            );
            let outcome = TurnOutcome::failed(ErrorCode::DeliveryFailed, why);
            self.refuse(prompt.id, prompt.seq, prompt.trace.as_ref(), &outcome, out);
            return;
        }
        self.waiting.push_back(prompt);
        self.begin_next(out);
    }

    fn interrupt(&mut self, seq: u64, injection: Option<&InjectionId>, out: &mut Vec<Effect>) {
        let waiting = injection.and_then(|id| self.waiting.iter().position(|prompt| prompt.id == *id));
        if let Some(prompt) = waiting.and_then(|index| self.waiting.remove(index)) {
            self.refuse(prompt.id, prompt.seq, prompt.trace.as_ref(), &TurnOutcome::interrupted(""), out);
            self.mark_taken(seq, out);
            return;
        }
        self.mark_taken(seq, out);
        if let Some(turn) = &mut self.turn
            && injection.is_none_or(|id| turn.has(id))
        {
            turn.interrupt(out);
        }
    }

    /// Ends a prompt that the agent never saw. Its end is in the journal before it is in the outbox, so that a crash in
    /// between neither loses it nor lets it run after all.
    fn refuse(
        &mut self,
        id: InjectionId,
        seq: u64,
        trace: Option<&Arc<str>>,
        outcome: &TurnOutcome,
        out: &mut Vec<Effect>,
    ) {
        let injection = id.clone();
        let (trace_kept, outcome_kept) = (trace.cloned(), outcome.clone());
        out.push(Effect::Journal(Entry::Ending { injection, seq, trace: trace_kept, outcome: outcome_kept }));
        out.push(Effect::SyncJournal);
        self.write_end(&id, trace, Some(""), outcome, None, out);
        out.push(Effect::SyncOutbox);
        self.ended(id, seq, out);
        out.push(self.mark());
    }

    fn write_end(
        &mut self,
        id: &InjectionId,
        trace: Option<&Arc<str>>,
        assistant: Option<&str>,
        outcome: &TurnOutcome,
        begun: Option<Instant>,
        out: &mut Vec<Effect>,
    ) {
        self.counts.turns[match outcome.status {
            TurnStatus::Completed => 0,
            TurnStatus::Failed => 1,
            TurnStatus::Interrupted => 2,
        }] += 1;
        if let Some(text) = assistant {
            out.push(write(Some(id), trace, kind::ASSISTANT, json!({ "content": text })));
        }
        let mut data = outcome_data(outcome);
        // Told apart from the records' times: the worker's clock may be set back in the middle of a turn.
        if let (Some(begun), Some(now)) = (begun, self.now) {
            data["duration_ms"] = (now.saturating_duration_since(begun).as_millis() as u64).into();
        }
        out.push(write(Some(id), trace, kind::TURN_COMPLETE, data));
    }

    /// Notes that a prompt's `turn_complete` is on disk.
    fn ended(&mut self, id: InjectionId, seq: u64, out: &mut Vec<Effect>) {
        self.unfinished.remove(&seq);
        out.push(Effect::Journal(Entry::Ended { injection: id.clone(), seq }));
        let low = self.low();
        self.history.ended(seq, id, low.seq);
    }

    /// Where a next generation has to start reading the inbox.
    fn low(&self) -> Cursor {
        self.unfinished.first_key_value().map_or(
            Cursor { segment: self.position.segment, offset: self.position.offset, seq: self.last_seq },
            |(_, cursor)| *cursor,
        )
    }

    fn mark(&self) -> Effect {
        Effect::Journal(Entry::Mark { low: self.low(), taken: self.taken })
    }

    /// Remembers that the order of this number is carried out, so that no later generation repeats it.
    fn mark_taken(&mut self, seq: u64, out: &mut Vec<Effect>) {
        self.taken = self.taken.max(seq);
        out.push(self.mark());
        out.push(Effect::SyncJournal);
    }

    /// Says once per generation that the inbox holds something this worker does not understand.
    fn note_unusable(&mut self, seq: u64, why: &str, out: &mut Vec<Effect>) {
        self.counts.unusable += 1;
        if self.counts.unusable == 1 {
            let message = format!("inbox record {seq} was skipped: {why}");
            let failure = Failure::new(ErrorCode::InvalidRequest, message)
                .hint("check that all daemons are of one version; further such records are only counted");
            out.push(write(None, None, kind::WORKER_ERROR, error_data(&failure, false)));
        }
    }

    fn on_agent(&mut self, now: Instant, event: AgentEvent, out: &mut Vec<Effect>) {
        match event {
            AgentEvent::Event { injection, kind, data } => self.on_event(&injection, kind, data, out),
            AgentEvent::Ready { detail, pid } => self.on_ready(detail, pid, out),
            AgentEvent::ApprovalWanted { injection, approval_id, call_id, inside_workspace, data } => {
                let wanted = approvals::Wanted { injection, approval_id, call_id, inside_workspace, data };
                self.want_approval(now, wanted, out);
            }
            AgentEvent::ApprovalGone { approval_id } => self.drop_approval(&approval_id, out),
            AgentEvent::SteerRefused { injection, prompt } => self.steer_refused(&injection, prompt, out),
            AgentEvent::TurnEnded { injection, outcome } => self.turn_ended(now, &injection, &outcome, out),
            AgentEvent::Crashed { reason, restarts } => {
                self.agent_ready = false;
                self.agent_restarts = restarts;
                self.agent_pid = None;
                let failure = Failure::new(ErrorCode::TurnLost, format!("the agent program died: {reason}"))
                    .hint("it is started again by itself; look at its output in the worker's log");
                out.push(write(None, None, kind::WORKER_ERROR, error_data(&failure, false)));
            }
            AgentEvent::GaveUp { failure } => self.give_up(failure, out),
        }
    }

    fn on_ready(&mut self, detail: Value, pid: Option<u32>, out: &mut Vec<Effect>) {
        self.agent_ready = true;
        self.agent_pid = pid;
        if !self.greeted {
            self.greeted = true;
            let mut data = self.policy.hello.clone();
            data.insert("inbox_seq".to_owned(), self.inherited_seq.into());
            data.insert("detail".to_owned(), detail);
            out.push(write(None, None, kind::WORKER_HELLO, Value::Object(data)));
            out.push(Effect::SyncOutbox);
        }
        self.begin_next(out);
    }

    fn on_timer(&mut self, now: Instant, timer: Timer, out: &mut Vec<Effect>) {
        match timer {
            Timer::Approval(id) => self.approval_timed_out(&id, out),
            Timer::DrainGrace => {
                if let Some(turn) = &mut self.turn {
                    turn.leave(out);
                    out.push(Effect::SetTimer(Timer::InterruptGrace, now + WorkerConfig::INTERRUPT_GRACE));
                }
            }
            Timer::InterruptGrace => {
                if let Some(id) = self.turn.as_ref().map(|turn| turn.id.clone()) {
                    let outcome = TurnOutcome::failed(
                        ErrorCode::TurnLost,
                        "the worker was told to end and the agent did not end the turn when it was interrupted",
                    );
                    self.turn_ended(now, &id, &outcome, out);
                }
            }
            Timer::SteerSettle => self.settle_steered(Some(now), out),
        }
    }
}
