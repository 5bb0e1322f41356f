//! Who owns a session, as far as this node knows: looking, claiming, going on from what is there, and letting go.

use std::time::Duration;

use drover_types::Epoch;

use super::api::{Cause, ClaimOutcome, Effect, Event, Failure, Looked, OwnerRecord, Reply};
use super::ids::HandoffId;
use super::journal::Journal;
use super::message::{Held, Message, Rejection};
use super::outgoing::Outgoing;
use super::outline::Outline;
use super::session::{Base, Context, Phase, Session};
use crate::session::{LogSum, Outcome, Record, TurnFault};

impl Session {
    /// Reads who owns it.
    pub(crate) fn look(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Looking { retry: None };
        cx.out.push(Effect::Look { session: self.id.clone() });
    }

    /// Takes it over if its owner is gone or was an earlier process of this node.
    pub(crate) fn recover(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            Phase::Migrated { .. } => {
                self.look(cx);
                self.recover = true;
            }
            Phase::Looking { .. } => self.recover = true,
            _ => {}
        }
    }

    pub(crate) fn looked(&mut self, cx: &mut Context<'_>, outcome: Looked) {
        if !matches!(self.phase, Phase::Looking { .. }) {
            // One that serves looks as well, when it has nothing to write that would tell it.
            if let Looked::Owned(newest) = outcome
                && self.serves()
                && newest.epoch > self.epoch()
            {
                self.lose(cx, newest);
            }
            return;
        }
        match outcome {
            Looked::Unknown => self.phase = Phase::Looking { retry: Some(cx.now + cx.settings.store_retry) },
            Looked::Nobody if cx.own.leaving => {
                self.refuse_all(cx, &Failure::NobodyTook(Some(Rejection::Leaving)));
                self.forget(cx);
            }
            Looked::Nobody => {
                if let Some(opening) = self.held.iter().find_map(|held| held.open.clone()) {
                    self.claim(cx, Epoch(1), Cause::Opened, Base::New(opening));
                } else {
                    self.refuse_all(cx, &Failure::UnknownSession);
                    self.forget(cx);
                }
            }
            Looked::Owned(record) => {
                let next = record.epoch.next();
                if record.cause == Cause::Closed {
                    self.over(cx, record.epoch);
                    return;
                }
                // A later process of this node has it when the start is greater: then this one is the earlier.
                if record.owner.node == cx.me.node && record.owner.boot <= cx.me.boot {
                    self.claim(cx, next, Cause::Recovered, Base::Journals);
                } else if cx.gone(&record.owner.node) && (self.recover || !self.held.is_empty()) && !cx.own.leaving {
                    self.claim(cx, next, Cause::TakenOver, Base::Journals);
                } else {
                    self.migrated(cx, record);
                }
            }
        }
        self.recover = false;
    }

    /// An entry that says nothing: it goes at once.
    fn forget(&mut self, cx: &mut Context<'_>) {
        let record =
            OwnerRecord { session: self.id.clone(), epoch: Epoch(0), owner: cx.me.clone(), cause: Cause::Opened };
        self.phase = Phase::Migrated { record, until: Duration::ZERO };
    }

    pub(crate) fn claim(&mut self, cx: &mut Context<'_>, epoch: Epoch, cause: Cause, base: Base) {
        let record = OwnerRecord { session: self.id.clone(), epoch, owner: cx.me.clone(), cause };
        cx.out.push(Effect::Claim { record: record.clone() });
        self.phase = Phase::Claiming { record, base, retry: None };
        self.awaits_flush = false;
    }

    /// A claim is decided. Says which handoff that ends here, and whether the session arrived.
    pub(crate) fn claimed(
        &mut self,
        cx: &mut Context<'_>,
        epoch: Epoch,
        outcome: ClaimOutcome,
    ) -> Option<(HandoffId, bool)> {
        let Phase::Claiming { record, retry, .. } = &mut self.phase else { return None };
        if record.epoch != epoch {
            return None;
        }
        let arriving = match record.cause {
            Cause::Moved { handoff } => Some(handoff),
            _ => None,
        };
        match outcome {
            ClaimOutcome::Unknown => {
                *retry = Some(cx.now + cx.settings.store_retry);
                None
            }
            ClaimOutcome::Lost(newest) => {
                self.lose(cx, newest);
                arriving.map(|handoff| (handoff, false))
            }
            ClaimOutcome::Won => {
                self.won(cx, epoch, arriving.is_some());
                arriving.map(|handoff| (handoff, true))
            }
        }
    }

    fn won(&mut self, cx: &mut Context<'_>, epoch: Epoch, gated: bool) {
        let phase = std::mem::replace(&mut self.phase, Phase::Opening { epoch });
        let Phase::Claiming { base, .. } = phase else { return };
        match base {
            Base::New(opening) => {
                self.take(LogSum::default());
                self.begin_epoch(cx, epoch);
                self.push(Record::Opened { opening });
            }
            Base::Copy(log) => {
                self.take(*log);
                self.begin_epoch(cx, epoch);
            }
            Base::Mine => {
                self.end_outgoing(cx, Failure::Silent);
                self.begin_epoch(cx, epoch);
            }
            Base::Journals => {
                self.phase = Phase::Loading { epoch, retry: None };
                cx.out.push(Effect::Load { session: self.id.clone(), epoch });
            }
        }
        // A turn that waits here may have come after one that waits at the source.
        self.awaits_flush = gated;
        self.kick(cx);
    }

    fn take(&mut self, log: LogSum) {
        self.journal = Journal::new(log.outline.seq(), log.len, log.digest);
        self.outline = log.outline;
    }

    pub(crate) fn loaded(&mut self, cx: &mut Context<'_>, epoch: Epoch, log: Option<Box<LogSum>>) {
        let Phase::Loading { epoch: due, retry } = &mut self.phase else { return };
        if *due != epoch {
            return;
        }
        let Some(log) = log else {
            *retry = Some(cx.now + cx.settings.store_retry);
            return;
        };
        if log.outline.epoch() >= epoch {
            // A later owner has said so much since this one claimed that it made a checkpoint of it.
            cx.out.push(Effect::Stop { session: self.id.clone(), epoch });
            self.look(cx);
            return;
        }
        if log.outline.opening.is_none() {
            // Claimed once and never opened: whoever asks again opens it.
            let opening = self.held.iter().find_map(|held| held.open.clone());
            let Some(opening) = opening else {
                self.refuse_all(cx, &Failure::UnknownSession);
                self.forget(cx);
                return;
            };
            self.take(*log);
            self.begin_epoch(cx, epoch);
            self.push(Record::Opened { opening });
        } else {
            self.take(*log);
            self.begin_epoch(cx, epoch);
        }
        self.kick(cx);
    }

    fn begin_epoch(&mut self, cx: &mut Context<'_>, epoch: Epoch) {
        self.phase = Phase::Opening { epoch };
        let follows = Some(self.outline.epoch()).filter(|last| *last != Epoch(0));
        self.push(Record::Epoch { epoch, owner: cx.me.clone(), follows });
    }

    /// The first record of the epoch is where everybody finds it: from here on turns are served.
    pub(super) fn activate(&mut self, cx: &mut Context<'_>, epoch: Epoch) {
        self.since = cx.now;
        if self.outline.closed {
            self.close_for_good(cx, epoch);
            return;
        }
        let gate = self.awaits_flush.then(|| cx.now + cx.settings.flush_wait);
        self.phase = Phase::Active { epoch, gate };
        cx.out.push(Effect::Event(Event::Serving { session: self.id.clone(), epoch }));
        self.parked = false;
        if let Some(turn) = self.outline.open {
            if self.outline.replayable() {
                self.run(cx, epoch, turn, true);
            } else {
                let message = "the process that ran this turn ended; it is not run a second time".to_owned();
                let outcome = Outcome::Failed { fault: TurnFault::TurnLost, message };
                self.push(Record::Ended { turn, outcome, at_us: 0 });
            }
        }
    }

    /// It is over, and its last ownership record is to say so. When that fails, the next who asks finds it in the journals.
    pub(super) fn close_for_good(&mut self, cx: &mut Context<'_>, epoch: Epoch) {
        let (session, owner) = (self.id.clone(), cx.me.clone());
        let record = OwnerRecord { session, epoch: epoch.next(), owner, cause: Cause::Closed };
        cx.out.push(Effect::Claim { record });
        self.over(cx, epoch);
    }

    fn over(&mut self, cx: &mut Context<'_>, epoch: Epoch) {
        self.phase = Phase::Closed { epoch, until: cx.now + cx.settings.memory };
        self.refuse_all(cx, &Failure::SessionClosed);
        self.answer_closers(cx);
    }

    /// Somebody else owns it.
    pub(crate) fn migrated(&mut self, cx: &mut Context<'_>, record: OwnerRecord) {
        let session = &self.id;
        for to in self.waiters.values().flatten().chain(&self.closers) {
            let reply = Reply::Redirect(record.clone());
            cx.out.push(Effect::Reply { to: *to, session: session.clone(), reply });
        }
        self.waiters.clear();
        self.closers.clear();
        self.held.clear();
        self.interrupted.clear();
        self.outline = Outline::default();
        self.journal = Journal::new(0, 0, super::ids::Digest::default());
        self.parked = false;
        self.phase = Phase::Migrated { record, until: cx.now + cx.settings.memory };
    }

    /// There is a later epoch than the one that this node serves or wanted to.
    pub(crate) fn lose(&mut self, cx: &mut Context<'_>, newest: OwnerRecord) {
        let epoch = self.epoch();
        if !matches!(self.phase, Phase::Claiming { base: Base::New(_) | Base::Copy(_) | Base::Journals, .. }) {
            cx.out.push(Effect::Stop { session: self.id.clone(), epoch });
        }
        let Some(outgoing) = self.outgoing.take() else { return self.migrated(cx, newest) };
        let arrived = matches!(newest.cause, Cause::Moved { handoff } if handoff == outgoing.id);
        if arrived {
            self.arrived(cx, &outgoing, newest);
        } else {
            cx.out.push(Effect::Event(outgoing.failed(&self.id, Failure::Lost)));
            self.migrated(cx, newest);
        }
    }

    /// The target has claimed: its are the turns that waited here, and those who ask are sent there.
    pub(crate) fn arrived(&mut self, cx: &mut Context<'_>, outgoing: &Outgoing, record: OwnerRecord) {
        let turns =
            self.held.drain(..).map(|held| Held { request: held.request, prompt: held.prompt }).collect::<Vec<_>>();
        let message = Message::Flush { handoff: outgoing.id, session: self.id.clone(), turns };
        cx.out.push(Effect::Send { to: outgoing.to.clone(), message });
        cx.out.push(Effect::Event(outgoing.completed(cx.now, &self.id, record.epoch)));
        self.migrated(cx, record);
    }
}
