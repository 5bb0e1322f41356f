//! One turn from its begin to its end, with the prompts that were steered into it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use drover_types::InjectionId;
use serde_json::{Value, json};

use super::messages::write;
use super::{Core, Effect, Entry, Phase, Prompt, STEER_SETTLE, Timer, kind};
use crate::agent::{AgentCommand, TurnOutcome};

/// Names that only the worker may write: an agent that used them would end its own turn in the router's eyes.
const RESERVED: &[&str] = &[
    kind::TURN_STARTED,
    kind::TURN_COMPLETE,
    kind::APPROVAL_REQUIRED,
    kind::APPROVAL_RESOLVED,
    kind::WORKER_HELLO,
    kind::WORKER_ERROR,
    kind::WORKER_BYE,
];

/// The running turn.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) id: InjectionId,
    seq: u64,
    pub(super) trace: Option<Arc<str>>,
    begun: Option<Instant>,
    /// The agent has given an answer.
    answered: bool,
    interrupting: bool,
    steered: Vec<Steered>,
    /// Flags of the last `thread_status`, so that the same is not said twice.
    flags: Vec<Value>,
}

/// A prompt that was added to a turn.
#[derive(Debug)]
pub(super) struct Steered {
    id: InjectionId,
    seq: u64,
    trace: Option<Arc<str>>,
    sent: Instant,
}

impl Turn {
    /// The turn is this injection's, also when it was steered in.
    pub(super) fn has(&self, id: &InjectionId) -> bool {
        self.id == *id || self.steered.iter().any(|steered| steered.id == *id)
    }

    /// Asks the agent to end the turn, once.
    pub(super) fn interrupt(&mut self, out: &mut Vec<Effect>) {
        if !self.interrupting {
            self.interrupting = true;
            out.push(Effect::Agent(AgentCommand::Interrupt { injection: self.id.clone() }));
        }
    }

    /// Tells the agent that the node ends, unless it is ending the turn already.
    pub(super) fn leave(&mut self, out: &mut Vec<Effect>) {
        if !self.interrupting {
            self.interrupting = true;
            out.push(Effect::Agent(AgentCommand::Leave { injection: self.id.clone() }));
        }
    }
}

impl Core {
    /// Begins the next waiting prompt when nothing stands against it.
    pub(super) fn begin_next(&mut self, out: &mut Vec<Effect>) {
        let free = self.turn.is_none() && self.agent_ready && self.writable && self.phase == Phase::Serving;
        if !free {
            return;
        }
        let Some(Prompt { id, seq, trace, content, announced }) = self.waiting.pop_front() else { return };
        out.push(Effect::Journal(Entry::Begun { injection: id.clone(), seq, trace: trace.clone() }));
        out.push(Effect::SyncJournal);
        out.push(write(Some(&id), trace.as_ref(), kind::THREAD_STATUS, json!({ "status": { "type": "active" } })));
        if !announced {
            out.push(write(Some(&id), trace.as_ref(), kind::TURN_STARTED, json!({})));
        }
        out.push(Effect::SyncOutbox);
        let told = trace.as_ref().map(|trace| trace.as_ref().to_owned());
        out.push(Effect::Agent(AgentCommand::Begin { injection: id.clone(), prompt: content, trace: told }));
        self.turn = Some(Turn {
            id,
            seq,
            trace,
            begun: self.now,
            answered: false,
            interrupting: false,
            steered: Vec::new(),
            flags: Vec::new(),
        });
    }

    /// A turn runs that a prompt can be added to.
    pub(super) fn can_steer(&self) -> bool {
        let running = self.turn.as_ref().is_some_and(|turn| !turn.interrupting);
        running && self.writable && self.phase == Phase::Serving
    }

    pub(super) fn steer(&mut self, now: Instant, prompt: Prompt, out: &mut Vec<Effect>) {
        let Some(turn) = &mut self.turn else { return };
        let Prompt { id, seq, trace, content, .. } = prompt;
        out.push(Effect::Journal(Entry::Begun { injection: id.clone(), seq, trace: trace.clone() }));
        out.push(Effect::SyncJournal);
        out.push(write(Some(&id), trace.as_ref(), kind::TURN_STARTED, json!({})));
        out.push(Effect::SyncOutbox);
        let into = turn.id.clone();
        out.push(Effect::Agent(AgentCommand::Steer { injection: id.clone(), into, prompt: content }));
        turn.steered.push(Steered { id, seq, trace, sent: now });
    }

    /// The agent had no turn to add the prompt to: it waits for one of its own, before all others.
    pub(super) fn steer_refused(&mut self, id: &InjectionId, content: String, out: &mut Vec<Effect>) {
        let of_turn = self.turn.as_mut().and_then(|turn| {
            turn.steered.iter().position(|steered| steered.id == *id).map(|index| turn.steered.remove(index))
        });
        let steered = of_turn.or_else(|| {
            let index = self.settling.iter().position(|(steered, _)| steered.id == *id)?;
            Some(self.settling.remove(index).0)
        });
        let Some(Steered { id, seq, trace, .. }) = steered else {
            self.counts.stray += 1;
            return;
        };
        out.push(Effect::Journal(Entry::Returned { injection: id.clone() }));
        self.waiting.push_front(Prompt { id, seq, trace, content, announced: true });
        self.begin_next(out);
    }

    pub(super) fn on_event(&mut self, id: &InjectionId, kind: String, data: Value, out: &mut Vec<Effect>) {
        let Some(turn) = self.turn.as_mut().filter(|turn| turn.has(id)) else {
            self.counts.stray += 1;
            return;
        };
        match kind.as_str() {
            kind::ASSISTANT => turn.answered = true,
            kind::THREAD_STATUS => {
                // The worker itself says when the thread becomes active and idle, in the order that clients know.
                let idle = data["status"]["type"] == "idle";
                let flags = data["status"]["activeFlags"].as_array().cloned().unwrap_or_default();
                if idle || (data["status"]["type"] == "active" && flags == turn.flags) {
                    return;
                }
                turn.flags = flags;
            }
            reserved if RESERVED.contains(&reserved) => {
                self.counts.stray += 1;
                return;
            }
            _ => {}
        }
        let trace = match turn.steered.iter().find(|steered| steered.id == *id) {
            Some(steered) => steered.trace.clone(),
            None => turn.trace.clone(),
        };
        out.push(Effect::Write { injection: Some(id.clone()), trace, kind: Cow::Owned(kind), data });
    }

    pub(super) fn turn_ended(&mut self, now: Instant, id: &InjectionId, outcome: &TurnOutcome, out: &mut Vec<Effect>) {
        match self.turn.take() {
            Some(turn) if turn.id == *id => self.close_turn(turn, outcome, Some(now), out),
            other => {
                self.turn = other;
                self.counts.stray += 1;
                return;
            }
        }
        if self.phase == Phase::Serving {
            self.begin_next(out);
        } else {
            out.push(Effect::CancelTimer(Timer::DrainGrace));
            out.push(Effect::CancelTimer(Timer::InterruptGrace));
            self.finish_drain(out);
        }
    }

    /// Writes the end of a turn and of every prompt in it. A prompt steered in a moment before `now` is kept back: the
    /// agent may not have seen it before the turn ended, and will refuse it.
    pub(super) fn close_turn(
        &mut self,
        turn: Turn,
        outcome: &TurnOutcome,
        now: Option<Instant>,
        out: &mut Vec<Effect>,
    ) {
        self.end_approvals(&turn, out);
        let Turn { id, seq, trace, begun, answered, steered, .. } = turn;
        let text = (!answered).then_some(outcome.text.as_str());
        self.write_end(&id, trace.as_ref(), text, outcome, begun, out);
        let mut over = vec![(id.clone(), seq)];
        for steered in steered {
            if let Some(now) = now
                && now < steered.sent + STEER_SETTLE
            {
                out.push(Effect::SetTimer(Timer::SteerSettle, now + STEER_SETTLE));
                self.settling.push((steered, outcome.clone()));
                continue;
            }
            self.write_end(&steered.id, steered.trace.as_ref(), Some(""), outcome, Some(steered.sent), out);
            over.push((steered.id, steered.seq));
        }
        out.push(write(Some(&id), trace.as_ref(), kind::THREAD_STATUS, json!({ "status": { "type": "idle" } })));
        self.note_ends(over, out);
    }

    /// Ends the steered prompts that can no longer be refused at `now`; all of them without a `now`.
    pub(super) fn settle_steered(&mut self, now: Option<Instant>, out: &mut Vec<Effect>) {
        let mut over = Vec::new();
        for (steered, outcome) in std::mem::take(&mut self.settling) {
            if now.is_some_and(|now| now < steered.sent + STEER_SETTLE) {
                self.settling.push((steered, outcome));
                continue;
            }
            self.write_end(&steered.id, steered.trace.as_ref(), Some(""), &outcome, Some(steered.sent), out);
            over.push((steered.id, steered.seq));
        }
        if !over.is_empty() {
            self.note_ends(over, out);
        }
    }

    fn note_ends(&mut self, over: Vec<(InjectionId, u64)>, out: &mut Vec<Effect>) {
        out.push(Effect::SyncOutbox);
        for (id, seq) in over {
            self.ended(id, seq, out);
        }
        out.push(self.mark());
    }
}
