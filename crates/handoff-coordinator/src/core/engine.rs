//! All sessions of one node: brings every input to the session or handoff that it is for, keeps their timers, and looks at the load.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use drover_types::{AgentKind, Epoch, SessionId};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::api::{Effect, Event, Failure, Input, Installed, Reply, Why};
use super::ids::{HandoffId, NodeId, Owner};
use super::incoming::{End, Incoming};
use super::message::{Message, Refusal, Rejection};
use super::policy::{LoadGate, Own, Peer, reject};
use super::relief::Relief;
use super::session::{Context, Session, State};
use super::settings::Settings;

/// One session, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionView {
    /// Its name.
    pub session: SessionId,
    /// Its epoch, as far as this node knows.
    pub epoch: Epoch,
    /// Who has it, when that is known.
    pub owner: Option<NodeId>,
    /// How it is.
    pub state: State,
    /// Its turns.
    pub turns: u32,
    /// Those that wait or run.
    pub unanswered: u32,
    /// The agent that talks in it, when that is known.
    pub agent: Option<AgentKind>,
    /// Bytes of its records.
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Session(SessionId),
    Incoming(HandoffId),
    Rebalance,
}

/// The core of one process of one node.
#[derive(Debug)]
pub struct Engine {
    me: Owner,
    settings: Settings,
    rng: SmallRng,
    now: Duration,
    sessions: BTreeMap<SessionId, Session>,
    incoming: BTreeMap<HandoffId, Incoming>,
    ended: BTreeMap<HandoffId, End>,
    ended_order: VecDeque<HandoffId>,
    peers: BTreeMap<NodeId, Peer>,
    own: Own,
    gate: LoadGate,
    relief: Relief,
    timers: BTreeSet<(Duration, Timer)>,
    armed: BTreeMap<Timer, Duration>,
}

impl Engine {
    /// A process that begins: it knows nothing, and [`Input::Recover`] tells it of each session that an earlier one had.
    pub fn new(now: Duration, me: Owner, settings: Settings, seed: u64) -> Self {
        let mut engine = Self {
            me,
            rng: SmallRng::seed_from_u64(seed),
            now,
            sessions: BTreeMap::new(),
            incoming: BTreeMap::new(),
            ended: BTreeMap::new(),
            ended_order: VecDeque::new(),
            peers: BTreeMap::new(),
            own: Own::default(),
            gate: LoadGate::default(),
            relief: Relief::default(),
            timers: BTreeSet::new(),
            armed: BTreeMap::new(),
            settings,
        };
        engine.arm(Timer::Rebalance, now + engine.settings.rebalance_interval);
        engine
    }

    /// Who this process is.
    pub fn me(&self) -> &Owner {
        &self.me
    }

    /// When [`Input::Tick`] is due.
    pub fn deadline(&self) -> Duration {
        self.timers.first().map_or(Duration::MAX, |(at, _)| *at)
    }

    /// Everything that this node knows of.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView> {
        self.sessions.values().map(|session| self.view(session))
    }

    /// This node serves a session or is about to.
    pub fn holds(&self, session: &SessionId) -> bool {
        self.sessions.get(session).is_some_and(Session::is_held)
    }

    /// One session, when this node knows of it.
    pub fn session(&self, session: &SessionId) -> Option<SessionView> {
        self.sessions.get(session).map(|session| self.view(session))
    }

    fn view(&self, session: &Session) -> SessionView {
        SessionView {
            session: session.id.clone(),
            epoch: session.epoch(),
            owner: session.owner(&self.me.node).cloned(),
            state: session.state(),
            turns: session.outline.turns(),
            unanswered: session.outline.unanswered() as u32,
            bytes: session.journal.len,
            agent: session.outline.opening.as_ref().map(|opening| opening.agent),
        }
    }

    /// This node is overloaded, with hysteresis.
    pub fn is_over(&self) -> bool {
        self.gate.is_over()
    }

    /// Sessions that this node serves or is about to, with those on their way in.
    pub fn held(&self) -> usize {
        self.sessions.values().filter(|session| session.is_held()).count() + self.incoming.len()
    }

    /// Handoffs under way here, out and in.
    pub fn moving(&self) -> (usize, usize) {
        (self.sessions.values().filter(|session| session.outgoing.is_some()).count(), self.incoming.len())
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Duration, input: Input, out: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        match input {
            Input::Turn(asked) => {
                if !self.sessions.contains_key(&asked.session) && self.sessions.len() >= 4 * self.settings.max_sessions
                {
                    out.push(Effect::Reply { to: asked.reply, session: asked.session, reply: Reply::Retry });
                    return;
                }
                let id = asked.session.clone();
                self.with(&id, out, |session, cx| session.ask(cx, *asked));
            }
            Input::Interrupt { session, request, reply } => {
                self.with(&session, out, |session, cx| session.interrupt(cx, request.as_ref(), reply));
            }
            Input::Close { session, reply } => self.with(&session, out, |session, cx| session.close(cx, reply)),
            Input::Recover { session } => self.with(&session, out, Session::recover),
            Input::Move { session, to, why } => {
                if self.sessions.contains_key(&session) {
                    self.with(&session, out, |session, cx| session.request_move(cx, to, why));
                } else {
                    out.push(Effect::Event(Event::NotMoved { session, error: Failure::NotHere }));
                }
            }
            Input::Message { from, message } => self.message(from, message, out),
            Input::Looked { session, outcome } => {
                self.if_known(&session, out, |session, cx| session.looked(cx, outcome));
            }
            Input::Claimed { session, epoch, outcome } => {
                let mut ended = None;
                self.if_known(&session, out, |session, cx| ended = session.claimed(cx, epoch, outcome));
                if let Some((handoff, arrived)) = ended {
                    let end = if arrived { End::Committed(epoch) } else { End::Refused(Refusal::Lost) };
                    self.end(handoff, end, out);
                }
            }
            Input::Loaded { session, epoch, log } => {
                self.if_known(&session, out, |session, cx| session.loaded(cx, epoch, log));
            }
            Input::Appended { session, epoch, first, outcome } => {
                self.if_known(&session, out, |session, cx| session.appended(cx, epoch, first, outcome));
            }
            Input::Parked { session, handoff, .. } => {
                self.if_known(&session, out, |session, cx| session.agent_parked(cx, handoff));
            }
            Input::Reserved { handoff, outcome } => {
                self.if_coming(handoff, out, |incoming, cx| incoming.reserved(cx, outcome));
            }
            Input::Written { handoff, len } => self.if_coming(handoff, out, |incoming, cx| incoming.wrote(cx, len)),
            Input::Installed { handoff, outcome } => self.installed(handoff, outcome, out),
            Input::Called { session, epoch, call, what } => {
                self.if_known(&session, out, |session, cx| session.called(cx, epoch, call, what));
            }
            Input::Returned { session, epoch, call, result } => {
                self.if_known(&session, out, |session, cx| session.returned(cx, epoch, call, result));
            }
            Input::Ended { session, epoch, turn, outcome, notes, at_us } => {
                self.if_known(&session, out, |session, cx| session.ended(cx, epoch, turn, outcome, notes, at_us));
            }
            Input::Peers(peers) => {
                self.peers = peers.into_iter().map(|peer| (peer.node.clone(), peer)).collect();
                for id in self.leaving() {
                    self.if_known(&id, out, Session::peers_changed);
                }
            }
            Input::Own(own) => {
                self.own = own;
                let over = self.gate.update(self.own.load, &self.settings);
                let why = if self.own.leaving { Rejection::Leaving } else { Rejection::Overloaded };
                if self.own.leaving || over {
                    let free: Vec<HandoffId> =
                        self.incoming.values().filter(|one| one.is_free()).map(|one| one.id).collect();
                    for id in free {
                        self.end(id, End::Rejected(why), out);
                    }
                }
            }
            Input::Relief(rooms) => self.relief.heard(self.now, rooms, &self.settings),
            Input::Tick => self.tick(out),
        }
    }

    fn leaving(&self) -> Vec<SessionId> {
        self.sessions.values().filter(|one| one.outgoing.is_some()).map(|one| one.id.clone()).collect()
    }

    fn context<'a>(&'a mut self, out: &'a mut Vec<Effect>) -> (Context<'a>, &'a mut BTreeMap<SessionId, Session>) {
        let Self { now, settings, me, peers, own, rng, sessions, .. } = self;
        (Context { now: *now, settings, me, peers, own, rng, out }, sessions)
    }

    /// Acts on a session, which begins with a look at who owns it when it is not known yet.
    fn with(&mut self, id: &SessionId, out: &mut Vec<Effect>, act: impl FnOnce(&mut Session, &mut Context<'_>)) {
        let (mut cx, sessions) = self.context(out);
        let session = sessions.entry(id.clone()).or_insert_with(|| {
            let mut session = Session::new(id.clone());
            session.look(&mut cx);
            session
        });
        act(session, &mut cx);
        self.settle(id);
    }

    fn if_known(&mut self, id: &SessionId, out: &mut Vec<Effect>, act: impl FnOnce(&mut Session, &mut Context<'_>)) {
        let (mut cx, sessions) = self.context(out);
        if let Some(session) = sessions.get_mut(id) {
            act(session, &mut cx);
            self.settle(id);
        }
    }

    fn settle(&mut self, id: &SessionId) {
        let Some(session) = self.sessions.get(id) else { return };
        let at = if session.is_over(self.now) {
            self.sessions.remove(id);
            Duration::MAX
        } else {
            session.deadline()
        };
        self.arm(Timer::Session(id.clone()), at);
    }

    fn if_coming(
        &mut self,
        id: HandoffId,
        out: &mut Vec<Effect>,
        act: impl FnOnce(&mut Incoming, &mut Context<'_>) -> Option<End>,
    ) {
        let Some(mut incoming) = self.incoming.remove(&id) else { return };
        let (mut cx, _) = self.context(out);
        let end = act(&mut incoming, &mut cx);
        self.put_back(incoming, end, out);
    }

    fn put_back(&mut self, incoming: Incoming, end: Option<End>, out: &mut Vec<Effect>) {
        let id = incoming.id;
        self.arm(Timer::Incoming(id), incoming.deadline());
        self.incoming.insert(id, incoming);
        if let Some(end) = end {
            self.end(id, end, out);
        }
    }

    fn installed(&mut self, id: HandoffId, outcome: Installed, out: &mut Vec<Effect>) {
        if !self.incoming.get(&id).is_some_and(Incoming::installs) {
            return;
        }
        let Some(mut incoming) = self.incoming.remove(&id) else { return };
        let name = incoming.session.clone();
        let (mut cx, sessions) = self.context(out);
        let fresh = !sessions.contains_key(&name);
        let session = sessions.entry(name.clone()).or_insert_with(|| Session::new(name.clone()));
        let end = incoming.installed(&mut cx, outcome, session);
        if fresh && end.is_some() {
            sessions.remove(&name);
        }
        self.settle(&name);
        self.put_back(incoming, end, out);
    }

    /// A handoff is over here.
    fn end(&mut self, id: HandoffId, end: End, out: &mut Vec<Effect>) {
        let Some(incoming) = self.incoming.remove(&id) else { return };
        self.arm(Timer::Incoming(id), Duration::MAX);
        if !matches!(end, End::Committed(_)) {
            out.push(Effect::Discard { handoff: id, session: incoming.session });
        }
        if end != End::Aborted {
            out.push(Effect::Send { to: incoming.from, message: end.message(id) });
        }
        self.remember(id, end);
    }

    fn remember(&mut self, id: HandoffId, end: End) {
        if self.ended.insert(id, end).is_none() {
            self.ended_order.push_back(id);
        }
        while self.ended_order.len() > self.settings.remembered {
            if let Some(oldest) = self.ended_order.pop_front() {
                self.ended.remove(&oldest);
            }
        }
    }

    fn message(&mut self, from: NodeId, message: Message, out: &mut Vec<Effect>) {
        let handoff = message.handoff();
        match message {
            Message::Request { .. } => self.request(from, message, out),
            Message::Chunk { .. } | Message::Offer { .. } if !self.comes(handoff, &from) => {
                let end = self.ended.get(&handoff).copied().unwrap_or(End::Aborted);
                out.push(Effect::Send { to: from, message: end.message(handoff) });
            }
            Message::Chunk { offset, bytes, .. } => self.if_coming(handoff, out, |incoming, cx| {
                incoming.chunk(cx, offset, bytes);
                None
            }),
            Message::Offer { epoch, len, digest, .. } => {
                self.if_coming(handoff, out, |incoming, cx| incoming.offered(cx, epoch, len, digest));
            }
            Message::Abort { .. } => match self.incoming.get(&handoff) {
                Some(incoming) if incoming.from == from && incoming.is_free() => self.end(handoff, End::Aborted, out),
                // Only its outcome ends a claim.
                Some(_) => {}
                // A request that comes after this is an old one.
                None => {
                    if !self.ended.contains_key(&handoff) {
                        self.remember(handoff, End::Aborted);
                    }
                }
            },
            Message::Flush { session, turns, .. } => {
                if self.sessions.get(&session).is_some_and(Session::is_held) {
                    self.if_known(&session, out, |session, cx| session.flushed(cx, turns));
                }
            }
            Message::Accept { .. }
            | Message::Reject { .. }
            | Message::Received { .. }
            | Message::Refused { .. }
            | Message::Committed { .. } => self.target_says(&from, &message, out),
        }
    }

    fn comes(&self, handoff: HandoffId, from: &NodeId) -> bool {
        self.incoming.get(&handoff).is_some_and(|incoming| incoming.from == *from)
    }

    fn target_says(&mut self, from: &NodeId, message: &Message, out: &mut Vec<Effect>) {
        let handoff = message.handoff();
        let mover = self.sessions.values().find(|session| {
            session.outgoing.as_ref().is_some_and(|outgoing| outgoing.id == handoff && outgoing.to == *from)
        });
        if let Some(id) = mover.map(|session| session.id.clone()) {
            self.if_known(&id, out, |session, cx| {
                session.target_says(cx, from, message);
            });
        } else if matches!(message, Message::Accept { .. } | Message::Received { .. }) {
            // It keeps a place for something that is not under way any more.
            out.push(Effect::Send { to: from.clone(), message: Message::Abort { handoff } });
        }
    }

    /// Another node asks this one to take a session.
    fn request(&mut self, from: NodeId, message: Message, out: &mut Vec<Effect>) {
        let Message::Request { handoff, session, epoch, attempt, len, needs, fresh } = message else { return };
        if let Some(end) = self.ended.get(&handoff) {
            out.push(Effect::Send { to: from, message: end.message(handoff) });
            return;
        }
        if self.comes(handoff, &from) {
            self.if_coming(handoff, out, |incoming, cx| {
                incoming.asked_again(cx);
                None
            });
            return;
        }
        let held = self.sessions.get(&session).is_some_and(Session::is_held);
        let other = self.incoming.values().find(|incoming| incoming.session == session);
        let other = other.map(|other| (other.id, other.is_free() && (epoch, attempt) > (other.epoch, other.attempt)));
        let full = self.incoming.len() >= self.settings.max_moves;
        let why = match other {
            _ if held => Some(Rejection::Duplicate),
            // The source has given the earlier attempt up, or an earlier request comes late.
            Some((_, false)) => Some(Rejection::Duplicate),
            Some((id, true)) => {
                self.end(id, End::Aborted, out);
                None
            }
            None if full => Some(Rejection::Overloaded),
            None => None,
        };
        let why = why.or_else(|| reject(&self.own, self.gate.is_over(), self.held(), len, &needs, &self.settings));
        if let Some(why) = why {
            self.remember(handoff, End::Rejected(why));
            out.push(Effect::Send { to: from, message: Message::Reject { handoff, why } });
            return;
        }
        let (mut cx, _) = self.context(out);
        let incoming = Incoming::new(&mut cx, handoff, from, session, epoch, attempt, len, fresh);
        self.put_back(incoming, None, out);
    }

    // ---- time

    fn arm(&mut self, timer: Timer, at: Duration) {
        if let Some(before) = self.armed.get(&timer).copied() {
            if before == at {
                return;
            }
            self.timers.remove(&(before, timer.clone()));
        }
        if at == Duration::MAX {
            self.armed.remove(&timer);
        } else {
            self.timers.insert((at, timer.clone()));
            self.armed.insert(timer, at);
        }
    }

    fn tick(&mut self, out: &mut Vec<Effect>) {
        // Each of those that are due now once: whatever they arm for now waits for the next call.
        let mut due = Vec::new();
        while let Some((at, _)) = self.timers.first()
            && *at <= self.now
            && let Some((_, timer)) = self.timers.pop_first()
        {
            self.armed.remove(&timer);
            due.push(timer);
        }
        for timer in due {
            match timer {
                Timer::Session(id) => self.if_known(&id, out, Session::tick),
                Timer::Incoming(id) => {
                    if self.incoming.get(&id).is_some_and(|incoming| incoming.deadline() <= self.now) {
                        self.end(id, End::Refused(Refusal::Unknown), out);
                    }
                }
                Timer::Rebalance => self.rebalance(out),
            }
        }
    }

    /// Too much to do: the sessions that are moved most easily go, and those that have just come stay. Where to, the leaseholder has
    /// planned; when there is none, this node chooses.
    fn rebalance(&mut self, out: &mut Vec<Effect>) {
        self.arm(Timer::Rebalance, self.now + self.settings.rebalance_interval);
        let (leaving, _) = self.moving();
        if !self.settings.enabled || !self.gate.is_over() || leaving >= self.settings.max_moves {
            return;
        }
        let settled = self.now.checked_sub(self.settings.residence);
        let mut movable: Vec<_> = self
            .sessions
            .values()
            .filter(|one| one.state() == State::Active && settled.is_some_and(|since| one.since <= since))
            .map(|one| (one.outline.open.is_some(), one.journal.len, &one.id))
            .collect();
        movable.sort_unstable();
        let movable: Vec<SessionId> = movable.into_iter().map(|(.., id)| id.clone()).collect();
        let planned = self.relief.counts(self.now);
        let mut room = self.settings.max_moves - leaving;
        for id in movable {
            if room == 0 {
                return;
            }
            let to = match self.sessions.get(&id) {
                Some(session) if planned => match self.relief.take(&session.needs(), &self.peers) {
                    Some(to) => Some(to),
                    None => continue,
                },
                _ => None,
            };
            room -= 1;
            self.if_known(&id, out, |session, cx| session.request_move(cx, to, Why::Load));
        }
    }
}
