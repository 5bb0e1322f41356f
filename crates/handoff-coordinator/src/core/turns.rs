//! The turns that come in to a session: who waits for which, and which wait until they can be taken.

use std::time::Duration;

use drover_types::{Epoch, RequestId};

use super::api::{Asked, Effect, Failure, Reply};
use super::ids::{ReplyTo, Turn};
use super::message::Held;
use super::session::{Context, Phase, Session};
use crate::session::{Opening, Record};

/// Waiters for one turn; whoever came first is told to come again when there are more.
const MAX_WAITERS: usize = 16;

/// A turn that waits until it can be accepted.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) request: RequestId,
    pub(super) prompt: String,
    pub(super) open: Option<Opening>,
    at_us: u64,
    pub(super) until: Duration,
    /// Came through the owner before, or again after the freeze: goes first.
    flushed: bool,
}

impl Session {
    pub(crate) fn ask(&mut self, cx: &mut Context<'_>, asked: Asked) {
        let Asked { request, prompt, reply, known, open, at_us, .. } = asked;
        let session = self.id.clone();
        let refused = match &self.phase {
            _ if prompt.len() > cx.settings.max_text => Some(Reply::Refused(Failure::TooLong)),
            Phase::Closed { .. } => Some(Reply::Refused(Failure::SessionClosed)),
            Phase::Migrated { record, until } if known <= record.epoch && cx.now < *until => {
                Some(Reply::Redirect(record.clone()))
            }
            _ => None,
        };
        if let Some(refused) = refused {
            cx.out.push(Effect::Reply { to: reply, session, reply: refused });
            return;
        }
        if matches!(self.phase, Phase::Migrated { .. }) {
            self.look(cx);
        }
        self.attend(cx, &request, reply);
        if let Some((turn, mark)) = self.outline.find(&request).filter(|_| self.serves()) {
            let epoch = self.epoch();
            if mark.ended.is_some_and(|seq| seq <= self.journal.durable) {
                self.tell(cx, &request, &Reply::Answer { turn, epoch });
                self.waiters.remove(&request);
            } else if mark.accepted <= self.journal.durable {
                cx.out.push(Effect::Reply { to: reply, session, reply: Reply::Accepted { turn, epoch } });
            }
            return;
        }
        let until = cx.now + cx.settings.hold;
        self.hold(cx, Waiting { request, prompt, open, at_us, until, flushed: false });
        self.advance(cx);
    }

    /// Turns that had come to the owner before.
    pub(crate) fn flushed(&mut self, cx: &mut Context<'_>, turns: Vec<Held>) {
        for Held { request, prompt } in turns {
            if self.outline.find(&request).is_none() && prompt.len() <= cx.settings.max_text {
                let until = cx.now + cx.settings.hold;
                self.hold(cx, Waiting { request, prompt, open: None, at_us: 0, until, flushed: true });
            }
        }
        self.awaits_flush = false;
        if let Phase::Active { gate, .. } = &mut self.phase {
            *gate = None;
        }
        self.advance(cx);
    }

    /// Keeps a turn until it can be accepted; those of the owner before come first.
    pub(super) fn hold(&mut self, cx: &mut Context<'_>, waiting: Waiting) {
        if let Some(at) = self.held.iter().position(|held| held.request == waiting.request) {
            if !waiting.flushed || self.held[at].flushed {
                return;
            }
            self.held.remove(at);
        }
        if self.held.len() >= cx.settings.max_held {
            let request = waiting.request.clone();
            self.tell(cx, &request, &Reply::Retry);
            self.waiters.remove(&request);
            return;
        }
        if waiting.flushed {
            let behind = self.held.iter().take_while(|held| held.flushed).count();
            self.held.insert(behind, waiting);
        } else {
            self.held.push_back(waiting);
        }
    }

    fn attend(&mut self, cx: &mut Context<'_>, request: &RequestId, reply: ReplyTo) {
        let waiters = self.waiters.entry(request.clone()).or_default();
        if waiters.len() >= MAX_WAITERS {
            let to = waiters.remove(0);
            cx.out.push(Effect::Reply { to, session: self.id.clone(), reply: Reply::Retry });
        }
        waiters.push(reply);
    }

    pub(super) fn tell(&self, cx: &mut Context<'_>, request: &RequestId, reply: &Reply) {
        for to in self.waiters.get(request).into_iter().flatten() {
            cx.out.push(Effect::Reply { to: *to, session: self.id.clone(), reply: reply.clone() });
        }
    }

    pub(super) fn refuse_all(&mut self, cx: &mut Context<'_>, why: &Failure) {
        for held in std::mem::take(&mut self.held) {
            self.tell(cx, &held.request, &Reply::Refused(why.clone()));
            self.waiters.remove(&held.request);
        }
    }

    /// Ends the session once its turns are answered.
    pub(crate) fn close(&mut self, cx: &mut Context<'_>, reply: ReplyTo) {
        let say = match &self.phase {
            Phase::Closed { .. } => Reply::Closed,
            Phase::Migrated { record, .. } if record.epoch != Epoch(0) => Reply::Redirect(record.clone()),
            Phase::Migrated { .. } => Reply::Refused(Failure::UnknownSession),
            _ => {
                self.closers.push(reply);
                self.advance(cx);
                return;
            }
        };
        cx.out.push(Effect::Reply { to: reply, session: self.id.clone(), reply: say });
    }

    pub(super) fn answer_closers(&mut self, cx: &mut Context<'_>) {
        for to in std::mem::take(&mut self.closers) {
            cx.out.push(Effect::Reply { to, session: self.id.clone(), reply: Reply::Closed });
        }
    }

    /// Accepts those that wait.
    pub(super) fn accept_held(&mut self, cx: &mut Context<'_>) {
        while let Some(held) = self.held.pop_front() {
            let full = self.outline.turns() >= cx.settings.max_turns || self.journal.len >= cx.settings.max_bytes;
            if full || self.outline.closed {
                let why = if full { Failure::SessionFull } else { Failure::SessionClosed };
                self.tell(cx, &held.request, &Reply::Refused(why));
                self.waiters.remove(&held.request);
                continue;
            }
            if let Some((turn, mark)) = self.outline.find(&held.request) {
                // Accepted before under another owner.
                let epoch = self.epoch();
                let ended = mark.ended.is_some_and(|seq| seq <= self.journal.durable);
                let accepted = mark.accepted <= self.journal.durable;
                if ended {
                    self.tell(cx, &held.request, &Reply::Answer { turn, epoch });
                    self.waiters.remove(&held.request);
                } else if accepted {
                    self.tell(cx, &held.request, &Reply::Accepted { turn, epoch });
                }
                continue;
            }
            let turn = Turn(self.outline.turns());
            self.push(Record::Accepted { turn, request: held.request, prompt: held.prompt, at_us: held.at_us });
        }
    }
}
