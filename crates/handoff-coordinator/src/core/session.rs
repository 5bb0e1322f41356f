//! One session on one node: its records and its agent. Who owns it: see `owning`; the turns that come in: see `turns`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use drover_types::{Epoch, RequestId, SessionId};
use rand::rngs::SmallRng;

use super::api::{Appended, Effect, OwnerRecord, Reply};
use super::ids::{Call, NodeId, Owner, ReplyTo, Turn};
use super::journal::Journal;
use super::outgoing::Outgoing;
use super::outline::Outline;
use super::policy::{Own, Peer, PeerState};
use super::settings::Settings;
use super::turns::Waiting;
use crate::session::{LogSum, Opening, Outcome, Record};

/// What a session needs of its engine.
pub(crate) struct Context<'a> {
    pub(crate) now: Duration,
    pub(crate) settings: &'a Settings,
    pub(crate) me: &'a Owner,
    pub(crate) peers: &'a BTreeMap<NodeId, Peer>,
    pub(crate) own: &'a Own,
    pub(crate) rng: &'a mut SmallRng,
    pub(crate) out: &'a mut Vec<Effect>,
}

impl Context<'_> {
    pub(super) fn gone(&self, node: &NodeId) -> bool {
        self.peers.get(node).is_some_and(|peer| peer.state == PeerState::Gone)
    }
}

/// How a session is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Served here.
    Active,
    /// On its way, or about to be served here.
    Transferring,
    /// Served elsewhere.
    Migrated,
    /// Over.
    Closed,
}

/// What the next owner begins with.
#[derive(Debug)]
pub(crate) enum Base {
    /// Nothing: the session is new.
    New(Opening),
    /// A copy that is on this node's disk, whole.
    Copy(Box<LogSum>),
    /// What this process has in memory: nobody else has served since.
    Mine,
    /// What the journals on the shared file system say.
    Journals,
}

#[derive(Debug)]
pub(crate) enum Phase {
    Looking {
        retry: Option<Duration>,
    },
    Claiming {
        record: OwnerRecord,
        base: Base,
        retry: Option<Duration>,
    },
    Loading {
        epoch: Epoch,
        retry: Option<Duration>,
    },
    /// The first record of the epoch is on its way to the disks.
    Opening {
        epoch: Epoch,
    },
    /// Served here. Turns wait until `gate` for those that had come to the owner before.
    Active {
        epoch: Epoch,
        gate: Option<Duration>,
    },
    Migrated {
        record: OwnerRecord,
        until: Duration,
    },
    Closed {
        epoch: Epoch,
        until: Duration,
    },
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) phase: Phase,
    pub(crate) outline: Outline,
    pub(crate) journal: Journal,
    /// The agent waits for a call of a tool.
    pub(crate) parked: bool,
    pub(super) waiters: BTreeMap<RequestId, Vec<ReplyTo>>,
    pub(super) held: VecDeque<Waiting>,
    pub(super) closers: Vec<ReplyTo>,
    /// Turns that are to end early.
    pub(super) interrupted: BTreeSet<Turn>,
    pub(crate) outgoing: Option<Outgoing>,
    /// Counts attempts to move it; kept here so that it rises while this process lives.
    pub(crate) attempts: u32,
    /// The last copy at a target was not the same.
    pub(crate) distrust: bool,
    /// Since when it is served here.
    pub(crate) since: Duration,
    /// Take it over when the look says that its owner is gone.
    pub(super) recover: bool,
    /// It came by a handoff, and the turns that had come to the source are still to come.
    pub(super) awaits_flush: bool,
}

impl Session {
    pub(crate) fn new(id: SessionId) -> Self {
        Self {
            id,
            phase: Phase::Looking { retry: None },
            outline: Outline::default(),
            journal: Journal::new(0, 0, super::ids::Digest::default()),
            parked: false,
            waiters: BTreeMap::new(),
            held: VecDeque::new(),
            closers: Vec::new(),
            interrupted: BTreeSet::new(),
            outgoing: None,
            attempts: 0,
            distrust: false,
            since: Duration::ZERO,
            recover: false,
            awaits_flush: false,
        }
    }

    /// How it is, for people.
    pub(crate) fn state(&self) -> State {
        match &self.phase {
            Phase::Active { .. } if self.outgoing.is_none() => State::Active,
            Phase::Migrated { .. } => State::Migrated,
            Phase::Closed { .. } => State::Closed,
            _ => State::Transferring,
        }
    }

    /// The epoch that it is in, as far as this node knows.
    pub(crate) fn epoch(&self) -> Epoch {
        match &self.phase {
            Phase::Looking { .. } => Epoch(0),
            Phase::Claiming { record, .. } | Phase::Migrated { record, .. } => record.epoch,
            Phase::Loading { epoch, .. }
            | Phase::Opening { epoch }
            | Phase::Active { epoch, .. }
            | Phase::Closed { epoch, .. } => *epoch,
        }
    }

    /// This node owns it or is about to.
    pub(crate) fn is_held(&self) -> bool {
        !matches!(self.phase, Phase::Looking { .. } | Phase::Migrated { .. })
    }

    /// Nothing of it need be remembered.
    pub(crate) fn is_over(&self, now: Duration) -> bool {
        matches!(self.phase, Phase::Migrated { until, .. } | Phase::Closed { until, .. } if until <= now)
    }

    pub(crate) fn owner<'a>(&'a self, me: &'a NodeId) -> Option<&'a NodeId> {
        match &self.phase {
            Phase::Looking { .. } => None,
            Phase::Migrated { record, .. } => Some(&record.owner.node),
            _ => Some(me),
        }
    }

    pub(crate) fn deadline(&self) -> Duration {
        let phase = match &self.phase {
            Phase::Looking { retry } | Phase::Claiming { retry, .. } | Phase::Loading { retry, .. } => *retry,
            Phase::Opening { .. } => None,
            Phase::Active { gate, .. } => *gate,
            Phase::Migrated { until, .. } | Phase::Closed { until, .. } => Some(*until),
        };
        let held = self.held.iter().map(|held| held.until).min();
        // While it claims, only the outcome counts.
        let outgoing = self.outgoing.as_ref().filter(|_| self.serves()).map(Outgoing::deadline);
        [phase, held, self.journal.retry, outgoing].into_iter().flatten().min().unwrap_or(Duration::MAX)
    }

    // ---- records

    pub(crate) fn serves(&self) -> bool {
        matches!(self.phase, Phase::Active { .. })
    }

    /// Adds a record of which the outline can be sure.
    pub(super) fn push(&mut self, record: Record) {
        let applied = self.outline.apply(&record);
        debug_assert!(applied.is_ok(), "{applied:?}");
        if applied.is_ok() {
            self.journal.push(record);
        }
    }

    /// Does whatever can be done now.
    pub(crate) fn advance(&mut self, cx: &mut Context<'_>) {
        if let Phase::Active { gate, .. } = &mut self.phase {
            if gate.is_some_and(|until| until <= cx.now) {
                *gate = None;
            }
            let open = gate.is_none();
            if open && !self.holds_turns() {
                self.accept_held(cx);
            }
            if !self.stops_turns()
                && let Some(turn) = self.outline.next()
            {
                self.push(Record::Begun { turn });
            }
            let idle = self.outline.unanswered() == 0 && self.held.is_empty();
            if !self.closers.is_empty() && idle && self.outgoing.is_none() && !self.outline.closed {
                self.push(Record::Closed);
            }
        }
        self.kick(cx);
        self.drive_outgoing(cx);
    }

    pub(super) fn kick(&mut self, cx: &mut Context<'_>) {
        if matches!(self.phase, Phase::Opening { .. } | Phase::Active { .. })
            && let Some((first, records)) = self.journal.next(cx.now)
        {
            let (session, epoch) = (self.id.clone(), self.epoch());
            cx.out.push(Effect::Append { session, epoch, first, records });
        }
    }

    pub(crate) fn appended(&mut self, cx: &mut Context<'_>, epoch: Epoch, first: u64, outcome: Appended) {
        let current = matches!(self.phase, Phase::Opening { .. } | Phase::Active { .. }) && self.epoch() == epoch;
        if !current || first != self.journal.durable + 1 {
            return;
        }
        match outcome {
            Appended::Unknown => self.journal.retry = Some(cx.now + cx.settings.store_retry),
            Appended::Fenced(newest) => self.lose(cx, newest),
            Appended::Done { len, digest } => {
                let Some(batch) = self.journal.done(len, digest) else { return };
                for record in batch.iter() {
                    self.kept(cx, epoch, record);
                }
                self.advance(cx);
            }
        }
    }

    /// A record is where everybody finds it, and the epoch was still the newest after that: what it says may be seen.
    fn kept(&mut self, cx: &mut Context<'_>, epoch: Epoch, record: &Record) {
        let session = || self.id.clone();
        match record {
            Record::Epoch { .. } => self.activate(cx, epoch),
            Record::Accepted { turn, request, .. } => {
                self.tell(cx, request, &Reply::Accepted { turn: *turn, epoch });
            }
            Record::Begun { turn } => self.run(cx, epoch, *turn, false),
            Record::Called { call, .. } => cx.out.push(Effect::Call { session: session(), epoch, call: *call }),
            Record::Returned { call, .. } => cx.out.push(Effect::Resume { session: session(), epoch, call: *call }),
            Record::Ended { turn, .. } => {
                let request = self.outline.turns[turn.0 as usize].request.clone();
                self.tell(cx, &request, &Reply::Answer { turn: *turn, epoch });
                self.waiters.remove(&request);
            }
            Record::Closed => {
                cx.out.push(Effect::Stop { session: self.id.clone(), epoch });
                self.close_for_good(cx, epoch);
            }
            Record::Opened { .. } | Record::Context { .. } | Record::Files { .. } => {}
        }
    }

    // ---- the agent

    /// The agent wants a tool.
    pub(crate) fn called(&mut self, cx: &mut Context<'_>, epoch: Epoch, call: Call, what: String) {
        if !self.serves() || self.epoch() != epoch || self.outline.open != Some(call.turn) || self.frozen() {
            return;
        }
        let session = self.id.clone();
        match self.outline.calls.get(&call) {
            // The turn runs again: what was called under this key before counts.
            Some((answered, seq)) if *seq <= self.journal.durable => {
                let effect = if *answered {
                    Effect::Resume { session, epoch, call }
                } else {
                    self.parked = true;
                    Effect::Call { session, epoch, call }
                };
                cx.out.push(effect);
            }
            Some(_) => {}
            None => {
                self.push(Record::Called { call, what });
                self.parked = true;
            }
        }
        self.advance(cx);
    }

    /// A tool has answered.
    pub(crate) fn returned(&mut self, cx: &mut Context<'_>, epoch: Epoch, call: Call, result: String) {
        let pending =
            self.outline.calls.get(&call).is_some_and(|(answered, seq)| !answered && *seq <= self.journal.durable);
        // While it is frozen the answer is not lost: the tool gives it again under the same key.
        if !self.serves() || self.epoch() != epoch || !pending || self.frozen() {
            return;
        }
        self.push(Record::Returned { call, result });
        self.parked = false;
        self.advance(cx);
    }

    /// The agent has ended a turn.
    pub(crate) fn ended(
        &mut self,
        cx: &mut Context<'_>,
        epoch: Epoch,
        turn: Turn,
        outcome: Outcome,
        notes: Vec<Record>,
        at_us: u64,
    ) {
        if !self.serves() || self.epoch() != epoch || self.outline.open != Some(turn) || self.frozen() {
            return;
        }
        for note in notes {
            if matches!(note, Record::Context { .. } | Record::Files { .. }) {
                self.push(note);
            }
        }
        self.parked = false;
        self.interrupted.remove(&turn);
        self.push(Record::Ended { turn, outcome, at_us });
        self.advance(cx);
    }

    /// The agent's process is gone and the session stays: the turn that it was in begins again.
    pub(crate) fn run_again(&mut self, cx: &mut Context<'_>) {
        if let (Phase::Active { epoch, .. }, Some(turn)) = (&self.phase, self.outline.open) {
            let epoch = *epoch;
            self.parked = false;
            self.run(cx, epoch, turn, true);
        }
    }

    // ---- time

    pub(crate) fn tick(&mut self, cx: &mut Context<'_>) {
        let due = |retry: &Option<Duration>| retry.is_some_and(|at| at <= cx.now);
        match &mut self.phase {
            Phase::Looking { retry } if due(retry) => {
                *retry = None;
                cx.out.push(Effect::Look { session: self.id.clone() });
            }
            Phase::Claiming { record, retry, .. } if due(retry) => {
                *retry = None;
                cx.out.push(Effect::Claim { record: record.clone() });
            }
            Phase::Loading { epoch, retry } if due(retry) => {
                *retry = None;
                cx.out.push(Effect::Load { session: self.id.clone(), epoch: *epoch });
            }
            _ => {}
        }
        let late: Vec<RequestId> =
            self.held.iter().filter(|held| held.until <= cx.now).map(|held| held.request.clone()).collect();
        for request in late {
            self.held.retain(|held| held.request != request);
            self.tell(cx, &request, &Reply::Retry);
            self.waiters.remove(&request);
        }
        self.tick_outgoing(cx);
        self.advance(cx);
    }
}
