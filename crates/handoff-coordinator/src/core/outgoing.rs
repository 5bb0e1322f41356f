//! The source's side of a handoff: ask, copy while serving, freeze, let the target claim, and learn what came of it.

use std::collections::BTreeSet;
use std::time::Duration;

use drover_types::{Epoch, SessionId};
use rand::Rng;

use super::api::{Cause, Effect, Event, Failure, OwnerRecord, Why};
use super::ids::{HandoffId, NodeId, Owner};
use super::message::{Message, Needs, Refusal, Rejection};
use super::policy::{PeerState, choose_target};
use super::session::{Base, Context, Phase, Session};

/// How far an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The last attempt failed; the next begins then.
    Waiting { until: Duration },
    /// The target was asked.
    Requested,
    /// Records go over while turns are served.
    Copying,
    /// The turn that runs may end, no other begins.
    Draining,
    /// The agent's process ends. From here on no turn is taken.
    Parking,
    /// The last records go over.
    Tail,
    /// The target may claim. Whatever happens now, only a claim decides.
    Offered { give_up: Duration },
}

/// One session on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// The first attempt's name stands for them all.
    operation: HandoffId,
    pub(crate) id: HandoffId,
    pub(crate) to: NodeId,
    named: bool,
    step: Step,
    started: Duration,
    deadline: Duration,
    heard: Duration,
    resend: Duration,
    retries: u32,
    attempts: u32,
    tried: BTreeSet<NodeId>,
    sent: u64,
    acked: u64,
    /// Where the target said last that something is missing. It says so for every piece behind the gap, and one repetition is enough.
    rewound: Option<u64>,
    /// How far the target said it has come, also with what only waits for its disk.
    taken: u64,
    /// When something was sent last, or the target had more than before.
    progress: Duration,
    /// How long there may be no progress before what the target lacks counts as lost. Grows with each time that it does: on a slow way a
    /// piece may take longer than any limit that is set, and what is sent twice makes it slower.
    patience: Duration,
    /// All bytes that went over.
    bytes: u64,
    frozen: Option<Duration>,
    last: Option<Rejection>,
}

impl Outgoing {
    pub(crate) fn deadline(&self) -> Duration {
        match self.step {
            Step::Waiting { until } => until,
            Step::Offered { give_up } => give_up.min(self.resend),
            _ => self.deadline.min(self.resend),
        }
    }

    pub(crate) fn completed(&self, now: Duration, session: &SessionId, epoch: Epoch) -> Event {
        Event::Completed {
            handoff: self.operation,
            session: session.clone(),
            to: self.to.clone(),
            epoch,
            bytes: self.bytes,
            attempts: self.attempts,
            frozen: self.frozen.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
            total: now.saturating_sub(self.started),
        }
    }

    /// The target was asked and says what it has. What only waits for its disk is not sent again, however long that takes; what never came is,
    /// and also what it had and has lost.
    fn has(&mut self, cx: &Context<'_>, have: u64, taken: u64) {
        let taken = taken.max(have);
        self.acked = self.acked.max(have.min(self.sent));
        if taken > self.taken {
            (self.taken, self.progress) = (taken, cx.now);
        }
        if taken < self.sent && self.progress + self.patience <= cx.now {
            (self.sent, self.acked, self.taken) = (taken, self.acked.min(have), taken);
            self.rewound = None;
            // Several times within an attempt, all the same.
            self.patience = (self.patience * 2).min(cx.settings.timeout / 4).max(cx.settings.resend);
        }
    }

    pub(crate) fn failed(&self, session: &SessionId, error: Failure) -> Event {
        let (handoff, session, to) = (self.operation, session.clone(), self.to.clone());
        Event::Failed { handoff, session, to, error, attempts: self.attempts }
    }
}

/// Why an attempt ended before it was offered.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Silent,
    Refused(Refusal),
    Rejected(Rejection),
    /// The membership gave the target up.
    Gone,
    /// A turn here does not end.
    Busy,
}

impl Session {
    /// No turn is taken.
    pub(crate) fn frozen(&self) -> bool {
        self.outgoing.as_ref().is_some_and(|out| matches!(out.step, Step::Parking | Step::Tail | Step::Offered { .. }))
    }

    /// No turn is begun.
    pub(crate) fn stops_turns(&self) -> bool {
        self.frozen() || self.outgoing.as_ref().is_some_and(|out| out.step == Step::Draining)
    }

    /// Nothing of the agent's is under way that could not go along.
    fn still(&self) -> bool {
        match self.outline.open {
            None => true,
            // One that is to end early ends here.
            Some(turn) => self.parked && self.outline.replayable() && !self.interrupted.contains(&turn),
        }
    }

    /// No turn is taken: it is frozen, or is as soon as the disks have what was taken before. With turns that come without a pause that would
    /// never be.
    pub(crate) fn holds_turns(&self) -> bool {
        let about_to = |out: &Outgoing| out.step == Step::Draining;
        self.frozen() || (self.still() && self.outgoing.as_ref().is_some_and(about_to))
    }

    pub(crate) fn needs(&self) -> Needs {
        let capabilities = self.outline.opening.as_ref().map(|opening| opening.capabilities.clone());
        Needs { capabilities: capabilities.unwrap_or_default() }
    }

    /// Sets out.
    pub(crate) fn request_move(&mut self, cx: &mut Context<'_>, to: Option<NodeId>, why: Why) {
        let mut refuse = |error| cx.out.push(Effect::Event(Event::NotMoved { session: self.id.clone(), error }));
        if !self.serves() {
            return refuse(if self.is_held() { Failure::Moving } else { Failure::NotHere });
        }
        if self.outgoing.is_some() || self.outline.closed {
            return refuse(Failure::Moving);
        }
        // A plan names the node that suits best; a person means the one that is named.
        let named = to.is_some() && why != Why::Load;
        let mut tried = BTreeSet::from([cx.me.node.clone()]);
        let target = match to {
            Some(node) if node == cx.me.node => None,
            Some(node) => Some(node),
            None => self.choose(cx, &tried),
        };
        let Some(to) = target else {
            cx.out.push(Effect::Event(Event::NotMoved { session: self.id.clone(), error: Failure::NoTarget }));
            return;
        };
        tried.insert(to.clone());
        let operation = HandoffId(cx.rng.random());
        let (handoff, session, epoch) = (operation, self.id.clone(), self.epoch());
        cx.out.push(Effect::Event(Event::Started { handoff, session, to: to.clone(), epoch, why }));
        self.outgoing = Some(Outgoing {
            operation,
            id: operation,
            to,
            named,
            step: Step::Requested,
            started: cx.now,
            deadline: cx.now,
            heard: cx.now,
            resend: cx.now,
            retries: 0,
            attempts: 0,
            tried,
            sent: 0,
            acked: 0,
            rewound: None,
            taken: 0,
            progress: cx.now,
            patience: cx.settings.resend,
            bytes: 0,
            frozen: None,
            last: None,
        });
        self.begin_attempt(cx, operation);
    }

    fn choose(&self, cx: &mut Context<'_>, tried: &BTreeSet<NodeId>) -> Option<NodeId> {
        choose_target(cx.rng, cx.settings, &self.id, &self.needs(), cx.peers.values().cloned(), tried)
    }

    fn begin_attempt(&mut self, cx: &mut Context<'_>, id: HandoffId) {
        self.attempts += 1;
        if let Some(out) = &mut self.outgoing {
            out.id = id;
            out.step = Step::Requested;
            out.attempts += 1;
            out.deadline = cx.now + cx.settings.timeout;
            out.heard = cx.now;
            (out.sent, out.acked, out.rewound, out.frozen) = (0, 0, None, None);
            (out.taken, out.progress, out.patience) = (0, cx.now, cx.settings.resend);
        }
        self.send_request(cx);
    }

    fn send_request(&mut self, cx: &mut Context<'_>) {
        let (session, epoch, needs) = (self.id.clone(), self.epoch(), self.needs());
        let (attempt, len, fresh) = (self.attempts, self.journal.len, self.distrust);
        let Some(out) = &mut self.outgoing else { return };
        out.resend = cx.now + cx.settings.resend;
        let message = Message::Request { handoff: out.id, session, epoch, attempt, len, needs, fresh };
        cx.out.push(Effect::Send { to: out.to.clone(), message });
    }

    /// The attempt under way, when the message is about it and from its target.
    fn under_way(&mut self, cx: &Context<'_>, from: &NodeId, handoff: HandoffId) -> Option<&mut Outgoing> {
        let out = self.outgoing.as_mut().filter(|out| out.id == handoff && out.to == *from)?;
        out.heard = cx.now;
        Some(out)
    }

    /// The target says something. False: it is about nothing that is under way here.
    pub(crate) fn target_says(&mut self, cx: &mut Context<'_>, from: &NodeId, message: &Message) -> bool {
        let own = self.journal.len;
        let Some(out) = self.under_way(cx, from, message.handoff()) else { return false };
        match (message, out.step) {
            (Message::Accept { have, .. }, Step::Requested) => {
                let have = (*have).min(own);
                (out.sent, out.acked, out.taken, out.step) = (have, have, have, Step::Copying);
                out.progress = cx.now;
                out.resend = cx.now + cx.settings.resend;
                self.distrust = false;
                self.advance(cx);
            }
            (Message::Accept { have, taken, .. }, Step::Copying | Step::Draining | Step::Parking | Step::Tail) => {
                out.has(cx, (*have).min(own), taken.unwrap_or(*have).min(own));
                self.advance(cx);
            }
            (Message::Received { len, again, .. }, Step::Copying | Step::Draining | Step::Parking | Step::Tail) => {
                let acked = out.acked.max((*len).min(out.sent));
                if acked > out.acked {
                    (out.acked, out.progress) = (acked, cx.now);
                }
                if *again && out.rewound != Some(out.acked) {
                    (out.sent, out.rewound) = (out.acked, Some(out.acked));
                }
                out.resend = cx.now + cx.settings.resend;
                self.advance(cx);
            }
            (Message::Reject { .. }, Step::Offered { .. }) => self.reclaim(cx),
            (Message::Reject { why, .. }, step) if !matches!(step, Step::Waiting { .. }) => {
                self.attempt_failed(cx, Fault::Rejected(*why));
            }
            (Message::Refused { why, .. }, Step::Offered { .. }) => {
                self.distrust = *why == Refusal::Digest;
                self.reclaim(cx);
            }
            (Message::Refused { why, .. }, step) if !matches!(step, Step::Waiting { .. }) => {
                self.attempt_failed(cx, Fault::Refused(*why));
            }
            (Message::Committed { epoch, .. }, Step::Offered { .. }) if *epoch == self.served_epoch().next() => {
                let Some(out) = self.outgoing.take() else { return true };
                // Which start of the target it was, its own record says; whoever asks there is told.
                let owner = Owner { node: out.to.clone(), boot: 0 };
                let cause = Cause::Moved { handoff: out.id };
                let record = OwnerRecord { session: self.id.clone(), epoch: *epoch, owner, cause };
                let (session, stopped) = (self.id.clone(), self.served_epoch());
                cx.out.push(Effect::Stop { session, epoch: stopped });
                self.arrived(cx, &out, record);
            }
            _ => {}
        }
        true
    }

    /// The epoch in which this process serves or served last, also while it claims the next.
    fn served_epoch(&self) -> Epoch {
        match &self.phase {
            Phase::Claiming { record, base: Base::Mine, .. } => Epoch(record.epoch.0 - 1),
            _ => self.epoch(),
        }
    }

    /// The agent's process has ended.
    pub(crate) fn agent_parked(&mut self, cx: &mut Context<'_>, handoff: HandoffId) {
        if let Some(out) = self.outgoing.as_mut().filter(|out| out.id == handoff && out.step == Step::Parking) {
            out.step = Step::Tail;
            out.resend = cx.now + cx.settings.resend;
        }
        self.advance(cx);
    }

    /// Goes as far as it can.
    pub(crate) fn drive_outgoing(&mut self, cx: &mut Context<'_>) {
        if !self.serves() {
            return;
        }
        let (len, digest, idle) = (self.journal.len, self.journal.digest, self.journal.idle());
        let (still, epoch) = (self.still(), self.epoch());
        let Some(out) = &mut self.outgoing else { return };
        if out.step == Step::Copying && len - out.acked.min(len) <= cx.settings.freeze_lag {
            out.step = Step::Draining;
        }
        if out.step == Step::Draining && still {
            out.frozen.get_or_insert(cx.now);
        }
        if out.step == Step::Draining && idle && still {
            out.step = Step::Parking;
            out.resend = cx.now + cx.settings.resend;
            cx.out.push(Effect::Park { session: self.id.clone(), epoch, handoff: out.id });
        }
        if matches!(out.step, Step::Copying | Step::Draining | Step::Parking | Step::Tail) {
            while out.sent < len && out.sent - out.acked < cx.settings.window {
                let piece = cx.settings.chunk.min(len - out.sent);
                let (to, handoff, session) = (out.to.clone(), out.id, self.id.clone());
                cx.out.push(Effect::SendChunk { to, handoff, session, offset: out.sent, len: piece });
                out.sent += piece;
                out.bytes += piece;
                out.progress = cx.now;
            }
        }
        if out.step == Step::Tail && out.acked == len {
            out.step = Step::Offered { give_up: cx.now + cx.settings.rpc_timeout };
            out.resend = cx.now + cx.settings.resend;
            let message = Message::Offer { handoff: out.id, epoch, len, digest };
            cx.out.push(Effect::Send { to: out.to.clone(), message });
        }
    }

    pub(crate) fn tick_outgoing(&mut self, cx: &mut Context<'_>) {
        if !self.serves() {
            return;
        }
        let Some(out) = &mut self.outgoing else { return };
        match out.step {
            Step::Waiting { until } if until > cx.now => {}
            Step::Waiting { .. } => {
                let id = HandoffId(cx.rng.random());
                self.begin_attempt(cx, id);
            }
            Step::Offered { give_up } => {
                if give_up <= cx.now {
                    self.reclaim(cx);
                } else if out.resend <= cx.now {
                    out.resend = cx.now + cx.settings.resend;
                    let (handoff, len, digest) = (out.id, self.journal.len, self.journal.digest);
                    let to = out.to.clone();
                    let message = Message::Offer { handoff, epoch: self.epoch(), len, digest };
                    cx.out.push(Effect::Send { to, message });
                }
            }
            Step::Draining | Step::Parking if out.deadline <= cx.now => self.attempt_failed(cx, Fault::Busy),
            _ if out.deadline <= cx.now || out.heard + cx.settings.rpc_timeout <= cx.now => {
                self.attempt_failed(cx, Fault::Silent);
            }
            // Keeps the reservation, and asks how far the target is.
            _ if out.resend <= cx.now => self.send_request(cx),
            _ => {}
        }
    }

    /// A target that is not believed alive is not waited for; nothing is lost yet.
    pub(crate) fn peers_changed(&mut self, cx: &mut Context<'_>) {
        let Some(out) = &self.outgoing else { return };
        let doubtful = cx.peers.get(&out.to).is_some_and(|peer| peer.state != PeerState::Alive);
        if self.serves() && doubtful && !matches!(out.step, Step::Waiting { .. } | Step::Offered { .. }) {
            self.attempt_failed(cx, Fault::Gone);
        }
    }

    /// The flow of the mission: wait and try again, then give the node up and try another, then go on here.
    fn attempt_failed(&mut self, cx: &mut Context<'_>, fault: Fault) {
        let Some(out) = &mut self.outgoing else { return };
        let agent_ended = matches!(out.step, Step::Parking | Step::Tail);
        let message = Message::Abort { handoff: out.id };
        cx.out.push(Effect::Send { to: out.to.clone(), message });
        out.step = Step::Waiting { until: cx.now + cx.settings.retry_delay };
        out.frozen = None;
        let retryable = matches!(fault, Fault::Silent | Fault::Refused(_));
        if let Fault::Rejected(why) = fault {
            out.last = Some(why);
        }
        if matches!(fault, Fault::Refused(Refusal::Digest)) {
            self.distrust = true;
        }
        let error = match fault {
            Fault::Silent => Failure::Silent,
            Fault::Refused(why) => Failure::Refused(why),
            Fault::Rejected(why) => Failure::NobodyTook(Some(why)),
            Fault::Gone => Failure::NobodyTook(out.last),
            Fault::Busy => Failure::Busy,
        };
        if retryable && out.retries < cx.settings.max_retries {
            out.retries += 1;
        } else {
            if retryable {
                cx.out.push(Effect::Suspect { node: out.to.clone() });
            }
            let more = !out.named && !matches!(fault, Fault::Busy) && out.tried.len() <= cx.settings.max_targets;
            let tried = out.tried.clone();
            let next = if more { self.choose(cx, &tried) } else { None };
            if let Some(next) = next {
                if let Some(out) = &mut self.outgoing {
                    out.tried.insert(next.clone());
                    (out.to, out.retries) = (next, 0);
                }
                let id = HandoffId(cx.rng.random());
                self.begin_attempt(cx, id);
            } else {
                self.end_outgoing(cx, error);
                // It may be in vain because somebody else has the session: what is open here then never ends, and nothing is
                // written that would show it.
                cx.out.push(Effect::Look { session: self.id.clone() });
            }
        }
        if agent_ended {
            self.run_again(cx);
        }
        self.advance(cx);
    }

    /// The session stays.
    pub(crate) fn end_outgoing(&mut self, cx: &mut Context<'_>, error: Failure) {
        if let Some(out) = self.outgoing.take() {
            cx.out.push(Effect::Event(out.failed(&self.id, error)));
        }
    }

    /// The target may have claimed or may yet: nobody guesses, this node claims too, and one of them is first.
    fn reclaim(&mut self, cx: &mut Context<'_>) {
        let Some(out) = self.outgoing.as_ref().filter(|_| self.serves()) else { return };
        let (handoff, next) = (out.id, self.epoch().next());
        let message = Message::Abort { handoff };
        cx.out.push(Effect::Send { to: out.to.clone(), message });
        self.claim(cx, next, Cause::Reclaimed { handoff }, Base::Mine);
    }
}
