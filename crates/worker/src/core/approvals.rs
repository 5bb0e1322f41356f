//! Approvals: who may say yes, how long it may take, and what is written about it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use drover_types::InjectionId;
use serde_json::{Value, json};

use super::messages::write;
use super::turn::Turn;
use super::{ApprovalAnswer, Core, Effect, Timer, kind};
use crate::agent::AgentCommand;

/// Settled approvals that are remembered, so that a late answer is told what was decided.
const REMEMBERED: usize = 256;

/// What the agent asks.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) injection: InjectionId,
    pub(super) approval_id: String,
    pub(super) call_id: String,
    pub(super) inside_workspace: bool,
    pub(super) data: Value,
}

#[derive(Debug)]
struct Open {
    approval_id: String,
    call_id: String,
    injection: InjectionId,
    trace: Option<Arc<str>>,
}

#[derive(Debug)]
struct Settled {
    approval_id: String,
    call_id: String,
    approved: bool,
    decision: Value,
    source: &'static str,
}

/// The approvals of the running turn, and the last settled ones.
#[derive(Debug, Default)]
pub(super) struct Approvals {
    open: Vec<Open>,
    settled: VecDeque<Settled>,
}

impl Approvals {
    /// Takes out the open approval that an answer means: by its id when it has one, else by its call.
    fn take_open(&mut self, approval_id: &str, call_id: &str) -> Option<Open> {
        let index = self.open.iter().position(|open| fits(approval_id, call_id, &open.approval_id, &open.call_id))?;
        Some(self.open.remove(index))
    }

    /// The record of a decision; remembers it.
    fn settle(&mut self, open: Open, approved: bool, decision: Value, source: &'static str) -> Effect {
        let Open { approval_id, call_id, injection, trace } = open;
        let data = json!({
            "approval_id": approval_id, "call_id": call_id, "approved": approved, "decision": decision, "source": source,
        });
        if self.settled.len() == REMEMBERED {
            self.settled.pop_front();
        }
        self.settled.push_back(Settled { approval_id, call_id, approved, decision, source });
        write(Some(&injection), trace.as_ref(), kind::APPROVAL_RESOLVED, data)
    }
}

fn fits(wanted_id: &str, wanted_call: &str, approval_id: &str, call_id: &str) -> bool {
    if wanted_id.is_empty() { !wanted_call.is_empty() && wanted_call == call_id } else { wanted_id == approval_id }
}

fn word(approved: bool) -> Value {
    Value::from(if approved { "accept" } else { "decline" })
}

impl Core {
    pub(super) fn want_approval(&mut self, now: Instant, wanted: Wanted, out: &mut Vec<Effect>) {
        let Wanted { injection, approval_id, call_id, inside_workspace, data } = wanted;
        let Some(turn) = self.turn.as_ref().filter(|turn| turn.has(&injection)) else {
            // Whatever asks outside of a turn must not be left waiting, and must not act.
            self.counts.stray += 1;
            out.push(answer(approval_id, call_id, false, None));
            return;
        };
        if self.approvals.open.iter().any(|open| open.approval_id == approval_id) {
            return;
        }
        let mut data = if data.is_object() { data } else { json!({}) };
        data["approval_id"] = approval_id.as_str().into();
        data["call_id"] = call_id.as_str().into();
        let trace = turn.trace.clone();
        out.push(write(Some(&injection), trace.as_ref(), kind::APPROVAL_REQUIRED, data));
        let open = Open { approval_id: approval_id.clone(), call_id: call_id.clone(), injection, trace };
        if self.policy.auto_approve && inside_workspace {
            out.push(self.approvals.settle(open, true, word(true), "policy"));
            out.push(Effect::SyncOutbox);
            out.push(answer(approval_id, call_id, true, None));
            return;
        }
        out.push(Effect::SyncOutbox);
        out.push(Effect::SetTimer(Timer::Approval(approval_id), now + self.policy.approval_timeout));
        self.approvals.open.push(open);
    }

    pub(super) fn answer_approval(
        &mut self,
        injection: Option<InjectionId>,
        trace: Option<Arc<str>>,
        given: ApprovalAnswer,
        out: &mut Vec<Effect>,
    ) {
        let ApprovalAnswer { approval_id, call_id, approved, decision } = given;
        let Some(open) = self.approvals.take_open(&approval_id, &call_id) else {
            self.answer_too_late(injection, trace, &approval_id, &call_id, out);
            return;
        };
        out.push(Effect::CancelTimer(Timer::Approval(open.approval_id.clone())));
        let (approval_id, call_id) = (open.approval_id.clone(), open.call_id.clone());
        let said = decision.clone().unwrap_or_else(|| word(approved));
        out.push(self.approvals.settle(open, approved, said, "router"));
        out.push(Effect::SyncOutbox);
        out.push(answer(approval_id, call_id, approved, decision));
    }

    /// Nothing waits for this answer: it changes nothing, and the record says what holds instead.
    fn answer_too_late(
        &mut self,
        injection: Option<InjectionId>,
        trace: Option<Arc<str>>,
        approval_id: &str,
        call_id: &str,
        out: &mut Vec<Effect>,
    ) {
        let settled = self.approvals.settled.iter().rev();
        let known = settled.into_iter().find(|old| fits(approval_id, call_id, &old.approval_id, &old.call_id));
        let data = match known {
            Some(old) => json!({
                "approval_id": old.approval_id, "call_id": old.call_id, "approved": old.approved,
                "decision": old.decision, "source": old.source, "idempotent": true,
            }),
            None => json!({
                "approval_id": approval_id, "call_id": call_id, "approved": false, "decision": "cancel",
                "source": "turn_end", "idempotent": true,
            }),
        };
        out.push(Effect::Write { injection, trace, kind: std::borrow::Cow::Borrowed(kind::APPROVAL_RESOLVED), data });
        out.push(Effect::SyncOutbox);
    }

    pub(super) fn approval_timed_out(&mut self, approval_id: &str, out: &mut Vec<Effect>) {
        if let Some(open) = self.approvals.take_open(approval_id, "") {
            let call_id = open.call_id.clone();
            out.push(self.approvals.settle(open, false, word(false), "timeout"));
            out.push(Effect::SyncOutbox);
            out.push(answer(approval_id.to_owned(), call_id, false, None));
        }
    }

    /// The agent no longer waits for it.
    pub(super) fn drop_approval(&mut self, approval_id: &str, out: &mut Vec<Effect>) {
        if let Some(open) = self.approvals.take_open(approval_id, "") {
            out.push(Effect::CancelTimer(Timer::Approval(approval_id.to_owned())));
            out.push(self.approvals.settle(open, false, Value::from("cancel"), "turn_end"));
            out.push(Effect::SyncOutbox);
        }
    }

    /// Settles what is still open when its turn ends; the records are synced with the end of the turn.
    pub(super) fn end_approvals(&mut self, turn: &Turn, out: &mut Vec<Effect>) {
        let (mine, others) =
            std::mem::take(&mut self.approvals.open).into_iter().partition(|open| turn.has(&open.injection));
        self.approvals.open = others;
        let mine: Vec<Open> = mine;
        for open in mine {
            out.push(Effect::CancelTimer(Timer::Approval(open.approval_id.clone())));
            out.push(self.approvals.settle(open, false, Value::from("cancel"), "turn_end"));
        }
    }
}

fn answer(approval_id: String, call_id: String, approved: bool, decision: Option<Value>) -> Effect {
    Effect::Agent(AgentCommand::Answer { approval_id, call_id, approved, decision })
}
