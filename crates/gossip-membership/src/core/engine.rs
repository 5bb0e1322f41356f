//! The state machine: takes inputs apart, keeps the deadlines, and is the one place where time passes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::dissemination::{LoadAllowance, LoadPush, Rumors};
use super::effect::{Effect, Event, Note};
use super::exchange::Exchange;
use super::health::Health;
use super::input::{Command, Input, Outcome};
use super::join::Join;
use super::member::{Member, State};
use super::message::{Message, Reply, Request, Rumor};
use super::probe::Prober;
use super::record::{Load, NodeKey, Record, RecordError, SignedRecord, Signer, Verifier};
use super::settings::Settings;
use super::table::Table;
use super::time::Time;

/// What the shell and the simulator know of the protocol.
pub trait Engine {
    /// Takes what happened, and appends what is to be done.
    fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>);

    /// When [`Input::Timer`] is due.
    fn deadline(&self) -> Time;

    /// This node's own record.
    fn local(&self) -> &Arc<SignedRecord>;

    /// The newest record of another node that has not been removed.
    fn record(&self, key: NodeKey) -> Option<&Arc<SignedRecord>>;

    /// All other nodes that have not been removed, in no particular order.
    fn members(&self) -> Box<dyn Iterator<Item = MemberView> + '_>;

    /// XOR over all nodes that are up, this one included: equal views have equal digests.
    fn digest(&self) -> u64;

    /// What a later process of this node should start from.
    fn snapshot(&self) -> Snapshot;
}

/// One member as others may see it.
#[derive(Debug, Clone)]
pub struct MemberView {
    /// Its newest record.
    pub record: Arc<SignedRecord>,
    /// What this node believes of it.
    pub state: State,
    /// Since when.
    pub since: Time,
    /// Last first-hand sign of life.
    pub heard: Option<Time>,
    /// Last load heard.
    pub load: Load,
}

/// Written to disk by the shell, so that a restarted node finds the others without a seed, under a higher boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Boot of the node that wrote it.
    pub boot: u64,
    /// Where the others take datagrams.
    pub members: Vec<(String, SocketAddr)>,
}

impl Snapshot {
    /// The boot to start with: later than the last, whatever the clock says.
    pub fn next_boot(last: Option<&Self>, unix_us: u64) -> u64 {
        last.map_or(unix_us, |last| unix_us.max(last.boot.saturating_add(1)))
    }
}

/// The protocol of one node.
pub struct Core {
    pub(super) me: NodeKey,
    pub(super) local: Arc<SignedRecord>,
    pub(super) settings: Settings,
    pub(super) verifier: Box<dyn Verifier>,
    pub(super) signer: Box<dyn Signer>,
    pub(super) rng: SmallRng,
    pub(super) now: Time,
    /// When this node started, and its wall-clock time then.
    started: (Time, u64),
    pub(super) table: Table,
    pub(super) rumors: Rumors,
    pub(super) gossip_at: Time,
    pub(super) gossiped: Time,
    pub(super) prober: Prober,
    pub(super) suspicions: BTreeSet<(Time, NodeKey)>,
    pub(super) health: Health,
    /// After a pause of its own, this node gives nobody up before this.
    pub(super) hold_until: Time,
    pub(super) exchange: Exchange,
    pub(super) join: Join,
    pub(super) load: Load,
    /// Load at the last time when all were told.
    pub(super) load_told: Load,
    pub(super) load_push: Option<LoadPush>,
    pub(super) load_allowance: LoadAllowance,
    /// When the good-bye has been said often enough.
    pub(super) leaving: Option<Time>,
    pub(super) rival_at: Time,
    /// When the snapshot is to be written, if it has to be.
    persist_at: Time,
    next_stream: u32,
}

impl Core {
    /// A node that knows nobody yet. `record` is this node's own; its `timestamp_us` is the wall-clock time of `now`.
    /// Call [`Engine::handle`] with [`Input::Timer`] to start.
    pub fn new(
        now: Time,
        settings: Settings,
        record: Record,
        seeds: Vec<SocketAddr>,
        mut signer: Box<dyn Signer>,
        verifier: Box<dyn Verifier>,
        seed: u64,
    ) -> Result<Self, RecordError> {
        record.encode()?;
        let started = (now, record.timestamp_us);
        let local = Arc::new(signer.sign(record));
        let me = local.key;
        let mut table = Table::default();
        table.count_self(me, local.record.version());
        let mut core = Self {
            me,
            table,
            signer,
            verifier,
            now,
            started,
            rng: SmallRng::seed_from_u64(seed),
            rumors: Rumors::default(),
            gossip_at: Time::FAR,
            gossiped: Time::ZERO,
            prober: Prober::new(now),
            suspicions: BTreeSet::new(),
            health: Health::default(),
            hold_until: Time::ZERO,
            exchange: Exchange::new(now + settings.push_pull_interval),
            join: Join::new(now, seeds, local.record.addr),
            load: Load::default(),
            load_told: Load::default(),
            load_push: None,
            load_allowance: LoadAllowance::default(),
            leaving: None,
            rival_at: Time::ZERO,
            persist_at: Time::FAR,
            next_stream: 0,
            local,
            settings,
        };
        // Nodes that start together must not probe together.
        let first = core.jitter(core.settings.period());
        core.prober.next = now + first;
        Ok(core)
    }

    /// How unwell this node believes itself to be, from 0 to 8.
    pub fn health(&self) -> u8 {
        self.health.score()
    }

    /// Whether the state of the cluster has been got from somebody since the start.
    pub fn has_joined(&self) -> bool {
        self.join.is_done()
    }

    pub(super) fn event(out: &mut Vec<Effect>, event: Event) {
        out.push(Effect::Event(event));
    }

    pub(super) fn stream(&mut self, to: NodeKey, request: Request, out: &mut Vec<Effect>) -> u32 {
        self.next_stream = self.next_stream.wrapping_add(1);
        out.push(Effect::Stream { id: self.next_stream, to, request });
        self.next_stream
    }

    pub(super) fn members_changed(&mut self) {
        if self.persist_at == Time::FAR {
            self.persist_at = self.now + self.settings.period() * 2;
        }
    }

    /// Makes and signs a newer claim of this node, and tells it.
    pub(super) fn renew(&mut self, change: impl FnOnce(&mut Record), out: &mut Vec<Effect>) -> Result<(), RecordError> {
        let mut record = self.local.record.clone();
        change(&mut record);
        if record.boot == self.local.record.boot {
            if let Some(next) = self.local.record.incarnation.max(record.incarnation).checked_add(1) {
                record.incarnation = next;
            } else {
                record.boot = record.boot.saturating_add(1);
                record.incarnation = 0;
            }
        }
        let running = self.now.since(self.started.0);
        record.timestamp_us = self.started.1.saturating_add(u64::try_from(running.as_micros()).unwrap_or(0));
        record.encode()?;
        let old = self.local.record.version();
        let same_boot = record.boot == old.0;
        let cert = Arc::clone(&self.local.cert);
        self.local = Arc::new(self.signer.sign(record));
        // Who has a certificate of this node does not need it again, unless it is another one.
        let known = same_boot && cert == self.local.cert;
        self.table.count_self(self.me, old);
        self.table.count_self(self.me, self.local.record.version());
        out.push(Effect::Local(Arc::clone(&self.local)));
        if !same_boot {
            out.push(Effect::Persist);
        }
        self.tell_alive(Arc::clone(&self.local), known, true);
        Ok(())
    }

    /// A timer that is late by much says that this process was stopped, or starved. All that it did not hear meanwhile was not silence
    /// of the others: what was running gets the lost time back.
    fn notice_own_pause(&mut self, out: &mut Vec<Effect>) {
        let due = self.deadline();
        if !self.settings.guards.own_pause || self.now < due || self.now.since(due) <= self.settings.own_pause() {
            return;
        }
        let lag = self.now.since(due);
        out.push(Effect::Note(Note::OwnPause(lag)));
        let old = std::mem::take(&mut self.suspicions);
        for (_, key) in old {
            if let Some(suspicion) = self.table.get_mut(key).and_then(|member| member.suspicion.as_mut()) {
                suspicion.shift(lag);
                self.suspicions.insert((suspicion.deadline, key));
            }
        }
        self.prober.forget();
        self.prober.next = self.now + self.settings.batch();
        self.hold_until = self.now + self.settings.period();
        self.exchange.calm();
        if self.health.worse(1) {
            out.push(Effect::Note(Note::Health(self.health.score())));
        }
    }

    fn run_timers(&mut self, out: &mut Vec<Effect>) {
        if self.now < self.deadline() {
            return;
        }
        if let Some(end) = self.leaving {
            if self.now >= end {
                self.leaving = Some(Time::FAR);
                out.push(Effect::LeaveDone);
            }
        } else {
            self.run_probes(out);
            self.run_suspicions(out);
            self.run_join(out);
            self.run_exchange(out);
        }
        self.remove_ended(out);
        self.gossip(out);
        if self.now >= self.persist_at {
            self.persist_at = Time::FAR;
            out.push(Effect::Persist);
        }
    }

    fn remove_ended(&mut self, out: &mut Vec<Effect>) {
        let end = self.now - self.settings.dead_node_timeout;
        if self.now < self.table.next_removal(self.settings.dead_node_timeout) {
            return;
        }
        let until = self.now + self.settings.tombstone();
        while let Some(key) = self.table.remove_ended(end, until, self.settings.guards.tombstones) {
            self.rumors.forget(key);
            out.push(Effect::Forget(key));
            self.members_changed();
        }
        self.table.forget_graves(self.now);
    }

    fn on_datagram(&mut self, from: NodeKey, message: Message, out: &mut Vec<Effect>) {
        if from == self.me {
            return;
        }
        if !self.hear(from, out) {
            self.on_buried(from, message, out);
            return;
        }
        match message {
            Message::Ping { seq, digest, load, rumors } => {
                self.take_load(from, load, out);
                self.take_rumors(from, rumors, out);
                let first = self.notice_for(from);
                let rumors = self.news(first);
                let message = Message::Ack { seq, digest: self.digest(), load: self.load, rumors };
                out.push(Effect::Send { to: from, message });
                self.compare(from, digest);
            }
            Message::Ack { seq, digest, load, rumors } => {
                self.take_load(from, load, out);
                self.on_ack(from, seq, out);
                self.take_rumors(from, rumors, out);
                self.compare(from, digest);
            }
            Message::Relay { seq, target } => self.on_relay(from, seq, target, out),
            Message::RelayAck { seq, target } => self.on_relay_ack(seq, target, out),
            Message::Nack { seq, target } => self.on_nack(seq, target),
            Message::Gossip { rumors } => self.take_rumors(from, rumors, out),
            Message::Load { load } => self.take_load(from, load, out),
        }
    }

    /// From a node that has been removed here, only two words count: what it says of this node, so that this node can answer, and a
    /// newer claim of its own. Otherwise two who have removed each other would never meet again.
    fn on_buried(&mut self, from: NodeKey, message: Message, out: &mut Vec<Effect>) {
        if self.table.grave(self.now, from).is_none() {
            return;
        }
        let Message::Gossip { rumors } = message else { return };
        for rumor in rumors {
            match rumor {
                Rumor::Alive { record, .. } if record.key == from => {
                    self.claim(record, true, out);
                }
                Rumor::Dead(accusation) if accusation.key == self.me => self.refute(from, accusation, out),
                _ => {}
            }
        }
    }

    fn take_load(&mut self, from: NodeKey, load: Load, out: &mut Vec<Effect>) {
        let Some(member) = self.table.get_mut(from) else { return };
        // The first word of a boot counts whatever its number.
        if !load.is_after(member.load) && member.load != Load::default() {
            return;
        }
        let changed = (load.score, load.overloaded) != (member.load.score, member.load.overloaded);
        member.load = load;
        if changed && member.is_up() {
            Self::event(out, Event::Load { key: from, load });
        }
    }

    fn on_stream_ended(&mut self, id: u32, outcome: Outcome, out: &mut Vec<Effect>) {
        match outcome {
            Outcome::Pulled(answer) => self.on_pulled(id, answer, out),
            Outcome::Pong => self.on_pong(id, out),
            Outcome::Pushed => {}
            Outcome::Refused => {
                self.on_refused(id, out);
                self.on_pull_failed(id);
            }
            Outcome::Silent => self.on_pull_failed(id),
        }
    }

    fn on_stream_asked(&mut self, id: u64, from: NodeKey, request: Request, out: &mut Vec<Effect>) {
        if from == self.me {
            return;
        }
        let reply = match request {
            Request::Pull(request) => Reply::Pulled(self.answer_pull(from, &request, out)),
            Request::Push(entries) => {
                self.take_entries(from, entries, out);
                Reply::Pushed
            }
            Request::Ping => {
                self.hear(from, out);
                Reply::Pong
            }
        };
        out.push(Effect::Reply { id, reply });
    }

    fn on_command(&mut self, command: Command, out: &mut Vec<Effect>) {
        match command {
            Command::Update { capabilities, labels } => {
                let updated = self.renew(
                    |record| {
                        record.capabilities = capabilities.unwrap_or_else(|| record.capabilities.clone());
                        record.labels = labels.unwrap_or_else(|| record.labels.clone());
                    },
                    out,
                );
                if let Err(error) = updated {
                    out.push(Effect::Note(Note::UpdateRefused(error)));
                }
            }
            Command::Load(load) => self.set_load(load),
            Command::Leave => self.leave(out),
            Command::Join(seeds) => self.join.add(self.now, seeds),
            Command::Suspect(key) => self.suspect_reported(key, out),
            Command::Recheck => self.recheck(out),
        }
    }

    /// Says good-bye for a while, and does nothing else from now on.
    fn leave(&mut self, out: &mut Vec<Effect>) {
        if self.leaving.is_some() {
            return;
        }
        if let Err(error) = self.renew(|record| record.leaving = true, out) {
            out.push(Effect::Note(Note::UpdateRefused(error)));
        }
        let alone = self.table.up() == 0;
        self.leaving = Some(if alone { self.now } else { self.now + self.settings.period() });
        self.prober.forget();
        self.suspicions.clear();
    }
}

impl Engine for Core {
    fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        self.notice_own_pause(out);
        match input {
            Input::Datagram { from, message } => self.on_datagram(from, message, out),
            Input::Contact { record } => self.on_contact(&record, out),
            Input::StreamEnded { id, outcome } => self.on_stream_ended(id, outcome, out),
            Input::StreamAsked { id, from, request } => self.on_stream_asked(id, from, request, out),
            Input::Timer => {}
            Input::Command(command) => self.on_command(command, out),
        }
        self.run_timers(out);
    }

    fn deadline(&self) -> Time {
        let always = self.gossip_at.min(self.persist_at).min(self.table.next_removal(self.settings.dead_node_timeout));
        if let Some(end) = self.leaving {
            return always.min(end);
        }
        let suspicion = self.suspicions.first().map_or(Time::FAR, |(deadline, _)| (*deadline).max(self.hold_until));
        always.min(self.prober.deadline()).min(suspicion).min(self.join.deadline()).min(self.exchange.deadline())
    }

    fn local(&self) -> &Arc<SignedRecord> {
        &self.local
    }

    fn record(&self, key: NodeKey) -> Option<&Arc<SignedRecord>> {
        self.table.get(key).map(|member| &member.record)
    }

    fn members(&self) -> Box<dyn Iterator<Item = MemberView> + '_> {
        Box::new(self.table.iter().map(|member| MemberView {
            record: Arc::clone(&member.record),
            state: member.state,
            since: member.since,
            heard: member.heard,
            load: member.load,
        }))
    }

    fn digest(&self) -> u64 {
        self.table.buckets().iter().fold(0, |all, bucket| all ^ bucket)
    }

    fn snapshot(&self) -> Snapshot {
        let up = self.table.iter().filter(|member| Member::is_up(member));
        let members = up.map(|member| (member.record.record.node_id.clone(), member.record.record.addr)).collect();
        Snapshot { boot: self.local.record.boot, members }
    }
}
