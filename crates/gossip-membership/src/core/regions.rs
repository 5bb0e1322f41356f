//! One pool per region, and gateways between them: a wide-area link must not slow the detection inside a region, and what happens inside a
//! region must not be decided over a wide-area link.
//!
//! ```text
//!   region a: Engine over its own members only            region b: Engine over its own members only
//!        gateways (2-3, by rendezvous) --- pull over streams, what differs --- gateways
//!        first gateway --- push over streams --> every other member
//! ```
//!
//! [`Regional`] wraps an engine and is one itself, so that nothing around it changes. The wrapped engine never hears of a member of
//! another region: it probes, suspects and gossips inside its own. Gateways of one region ask those of each other one for what differs
//! from what they know, at a slower pace; the answer is what the other region believes of itself. The first gateway passes on what is new.
//!
//! A region that cannot be reached is suspect as a whole, so that nothing is placed there, and is given up only after a much longer
//! time. Who is reached again is what its own region says it is.

mod foreign;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use self::foreign::{Foreign, hash_of};
use super::effect::Effect;
use super::engine::{Engine, MemberView, Snapshot};
use super::input::{Command, Input, Outcome};
use super::member::State;
use super::message::{Entry, Message, PullAnswer, PullRequest, Reply, Request, Rumor};
use super::placement::{Item, Slot, rank};
use super::record::{Load, NodeKey, SignedRecord, Verifier};
use super::table::{BUCKETS, bucket};
use super::time::Time;

/// Streams of this layer, apart from those of the wrapped engine.
const OURS: u32 = 1 << 31;
/// Members that are told at a time; the others get their turn.
const AT_ONCE: usize = 64;
/// Members of its own region that a gateway of another is told of: newcomers there may know nobody at home.
const HINTS: usize = 3;
/// How long a member of another region counts as a newcomer.
const NEW: Duration = Duration::from_mins(1);
/// How many newcomers are remembered.
const NEWCOMERS: usize = 64;
/// Members of other regions that a restarted node begins with.
const REMEMBERED: usize = 4;

/// How long everything takes between regions.
#[derive(Debug, Clone, Copy)]
pub struct WideTiming {
    /// Pause between two pulls from one region.
    pub interval: Duration,
    /// A region is suspect when none of its gateways has answered for so long.
    pub suspect: Duration,
    /// And its members are given up after so much more.
    pub dead: Duration,
    /// How long who is given up or has left stays listed.
    pub removed: Duration,
}

impl WideTiming {
    /// From the probe period and `dead_node_timeout`.
    pub fn new(period: Duration, dead_node_timeout: Duration) -> Self {
        Self { interval: period * 2, suspect: period * 8, dead: dead_node_timeout, removed: dead_node_timeout }
    }
}

/// What a stream of this layer is for.
#[derive(Debug, Clone)]
enum Asked {
    Pull { region: String, from: NodeKey },
    Push { to: NodeKey, revision: u64 },
    Hint,
}

/// An engine for the own region, and a view of the others.
pub struct Regional<E> {
    inner: E,
    region: String,
    timing: WideTiming,
    verifier: Box<dyn Verifier>,
    rng: SmallRng,
    regions: BTreeMap<String, Foreign>,
    streams: BTreeMap<u32, Asked>,
    next_stream: u32,
    next_tick: Time,
    /// Counts the changes of the foreign view.
    revision: u64,
    /// Up to which change each member of the own region was told by this node.
    told: BTreeMap<NodeKey, u64>,
    /// Nodes of other regions that this node met, and that its gateways have not been told of.
    met: Vec<Arc<SignedRecord>>,
    /// Members of other regions that were first heard of lately.
    newcomers: VecDeque<(Time, Arc<SignedRecord>)>,
    /// The own load, which other regions hear as they hear those of the others here.
    load: Load,
}

impl<E: Engine> Regional<E> {
    /// Wraps an engine that knows nobody yet.
    pub fn new(inner: E, timing: WideTiming, verifier: Box<dyn Verifier>, seed: u64) -> Self {
        let region = inner.local().record.region.clone();
        Self {
            inner,
            region,
            timing,
            verifier,
            rng: SmallRng::seed_from_u64(seed),
            regions: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_stream: 0,
            next_tick: Time::FAR,
            revision: 0,
            told: BTreeMap::new(),
            met: Vec::new(),
            newcomers: VecDeque::new(),
            load: Load::default(),
        }
    }

    /// The wrapped engine.
    pub fn inner(&self) -> &E {
        &self.inner
    }

    /// The gateways of the own region, first the one that tells the others.
    pub fn gateways(&self) -> Vec<NodeKey> {
        let local = self.inner.local();
        let others = self.inner.members().filter(|member| member.state == State::Alive).map(|member| member.record.key);
        let here = (!local.record.leaving).then_some(local.key);
        gateways_of(&self.region, others.chain(here))
    }

    fn is_foreign(&self, record: &SignedRecord) -> bool {
        record.record.region != self.region
    }

    fn stream(&mut self, to: NodeKey, request: Request, asked: Asked, out: &mut Vec<Effect>) {
        self.next_stream = (self.next_stream + 1) & !OURS;
        let id = self.next_stream | OURS;
        self.streams.insert(id, asked);
        out.push(Effect::Stream { id, to, request });
    }

    /// A node of another region has shown itself.
    fn meet(&mut self, now: Time, record: &Arc<SignedRecord>, out: &mut Vec<Effect>) {
        let known = self.regions.get(&record.record.region).and_then(|foreign| foreign.record(record.key));
        if known.is_some_and(|known| known.record.version() >= record.record.version()) {
            return;
        }
        let entry = Entry { record: record.clone(), state: State::Alive, age_ms: 0, load: Load::default() };
        self.take(now, &entry, out);
        self.met.push(record.clone());
        self.next_tick = self.next_tick.min(now + Duration::from_millis(20));
    }

    /// Takes over what is said about a node of another region.
    fn take(&mut self, now: Time, entry: &Entry, out: &mut Vec<Effect>) {
        let name = &entry.record.record.region;
        let fresh = self.regions.get(name).and_then(|foreign| foreign.record(entry.record.key)) != Some(&entry.record);
        if fresh && self.verifier.check(&entry.record).is_err() {
            return;
        }
        let foreign = self.regions.entry(name.clone()).or_insert_with(|| Foreign::new(now));
        if foreign.record(entry.record.key).is_none_or(|known| known.record.boot < entry.record.record.boot) {
            self.newcomers.push_back((now, entry.record.clone()));
            if self.newcomers.len() > NEWCOMERS {
                self.newcomers.pop_front();
            }
        }
        if foreign.take(now, entry, self.revision + 1, out) {
            self.revision += 1;
        }
        if self.next_tick == Time::FAR {
            self.next_tick = now + self.jitter();
        }
    }

    fn jitter(&mut self) -> Duration {
        self.timing.interval.mul_f64(self.rng.random_range(0.1..0.5))
    }

    fn tick(&mut self, now: Time, out: &mut Vec<Effect>) {
        if now < self.next_tick {
            return;
        }
        let gateways = self.gateways();
        let me = self.inner.local().key;
        if gateways.contains(&me) {
            let names: Vec<String> = self.regions.keys().cloned().collect();
            for name in names {
                self.pull(&name, out);
            }
            self.met.clear();
        } else if let Some(first) = gateways.first().copied()
            && !self.met.is_empty()
        {
            let entries = std::mem::take(&mut self.met).into_iter().map(|record| Entry {
                record,
                state: State::Alive,
                age_ms: 0,
                load: Load::default(),
            });
            self.stream(first, Request::Push(entries.collect()), Asked::Hint, out);
        }
        // Whoever is no gateway is told when a region is out of reach.
        let judges = gateways.contains(&me);
        for foreign in self.regions.values_mut() {
            let changed = foreign.age(now, &self.timing, judges, self.revision + 1, out);
            self.revision += u64::from(changed);
        }
        if gateways.first() == Some(&me) {
            self.push(now, out);
        }
        self.regions.retain(|_, foreign| !foreign.is_empty());
        self.next_tick =
            if self.regions.is_empty() { Time::FAR } else { now + self.timing.interval * 3 / 4 + self.jitter() };
    }

    /// Asks another region for what differs.
    fn pull(&mut self, name: &str, out: &mut Vec<Effect>) {
        let asked = |asked: &Asked| matches!(asked, Asked::Pull { region, .. } if region == name);
        if self.streams.values().any(asked) {
            return;
        }
        let Some(foreign) = self.regions.get(name) else { return };
        let Some(to) = foreign.whom_to_ask(name, &mut self.rng) else { return };
        let request = PullRequest { record: self.inner.local().clone(), buckets: Box::new(foreign.buckets()) };
        self.stream(to, Request::Pull(request), Asked::Pull { region: name.to_owned(), from: to }, out);
    }

    /// Tells the members of the own region what they have not been told.
    fn push(&mut self, now: Time, out: &mut Vec<Effect>) {
        let up: BTreeSet<NodeKey> = self
            .inner
            .members()
            .filter(|member| member.state == State::Alive)
            .map(|member| member.record.key)
            .collect();
        self.told.retain(|key, _| up.contains(key));
        let under_way: BTreeSet<NodeKey> = self
            .streams
            .values()
            .filter_map(|asked| if let Asked::Push { to, .. } = asked { Some(*to) } else { None })
            .collect();
        let due: Vec<NodeKey> = up
            .into_iter()
            .filter(|key| !under_way.contains(key) && self.told.get(key).is_none_or(|told| *told < self.revision))
            .take(AT_ONCE.saturating_sub(under_way.len()))
            .collect();
        for to in due {
            let since = self.told.get(&to).copied().unwrap_or(0);
            let entries: Vec<Entry> = self.regions.values().flat_map(|foreign| foreign.since(now, since)).collect();
            let revision = self.revision;
            if entries.is_empty() {
                self.told.insert(to, revision);
            } else {
                self.stream(to, Request::Push(entries), Asked::Push { to, revision }, out);
            }
        }
    }

    /// What a node of another region asks about this one.
    fn answer(&mut self, now: Time, id: u64, request: &PullRequest, out: &mut Vec<Effect>) {
        let local = MemberView {
            record: self.inner.local().clone(),
            state: State::Alive,
            since: Time::ZERO,
            heard: None,
            load: self.load,
        };
        let all: Vec<MemberView> = self.inner.members().chain([local]).collect();
        let mut buckets = [0; BUCKETS];
        for member in all.iter().filter(|member| member.state.is_up()) {
            buckets[bucket(member.record.key)] ^= hash_of(&member.record, member.state, member.load);
        }
        let differing =
            (0..BUCKETS).filter(|at| buckets[*at] != request.buckets[*at]).fold(0_u64, |mask, at| mask | 1 << at);
        let mut entries: Vec<Entry> = all
            .iter()
            .filter(|member| differing >> bucket(member.record.key) & 1 == 1)
            .map(|member| entry_of(now, member))
            .collect();
        self.newcomers.retain(|(met, _)| now.since(*met) < NEW);
        let home = &request.record.record.region;
        let mut hints: Vec<&Arc<SignedRecord>> = self
            .newcomers
            .iter()
            .map(|(_, record)| record)
            .filter(|record| record.record.region == *home && record.key != request.record.key)
            .collect();
        hints.shuffle(&mut self.rng);
        entries.extend(hints.into_iter().take(HINTS).map(|record| Entry {
            record: record.clone(),
            state: State::Alive,
            age_ms: 0,
            load: Load::default(),
        }));
        let answer = PullAnswer { record: self.inner.local().clone(), differing, entries };
        out.push(Effect::Reply { id, reply: Reply::Pulled(answer) });
        self.meet(now, &request.record, out);
    }

    fn pulled(&mut self, now: Time, region: &str, from: NodeKey, answer: &PullAnswer, out: &mut Vec<Effect>) {
        if answer.record.key != from || answer.record.record.region != region {
            return;
        }
        let mut listed = BTreeSet::new();
        for entry in &answer.entries {
            if entry.record.record.region == region {
                listed.insert(entry.record.key);
                self.take(now, entry, out);
            } else if entry.record.record.region == self.region {
                self.neighbour(now, &entry.record, out);
            }
        }
        if let Some(foreign) = self.regions.get_mut(region) {
            let changed = foreign.answered(
                now,
                from,
                (answer.differing, &listed),
                self.timing.interval * 5,
                self.revision + 1,
                out,
            );
            self.revision += u64::from(changed);
        }
    }

    /// Another region told of a member of this one: if nobody here has, this node says hello to it.
    fn neighbour(&mut self, now: Time, record: &SignedRecord, out: &mut Vec<Effect>) {
        if record.key != self.inner.local().key && self.inner.record(record.key).is_none() {
            self.inner.handle(now, Input::Command(Command::Join(vec![record.record.addr])), out);
        }
    }

    /// A stream of this layer has ended.
    fn ended(&mut self, now: Time, asked: Asked, outcome: Outcome, out: &mut Vec<Effect>) {
        match (asked, outcome) {
            (Asked::Pull { region, from }, Outcome::Pulled(answer)) => self.pulled(now, &region, from, &answer, out),
            (Asked::Pull { region, from }, _) => {
                if let Some(foreign) = self.regions.get_mut(&region) {
                    foreign.silent(from);
                }
            }
            (Asked::Push { to, revision }, Outcome::Pushed) => {
                self.told.insert(to, revision);
            }
            (Asked::Push { .. } | Asked::Hint, _) => {}
        }
    }

    /// What of an input is for the wrapped engine; what is about other regions is taken here.
    fn sort(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) -> Option<Input> {
        match input {
            Input::Contact { record } if self.is_foreign(&record) => {
                out.push(Effect::Learn(record.clone()));
                self.meet(now, &record, out);
                None
            }
            Input::Datagram { from, message } => {
                let foreign = |rumor: &Rumor| matches!(rumor, Rumor::Alive { record, .. } if self.is_foreign(record));
                Some(Input::Datagram { from, message: without(message, foreign) })
            }
            Input::StreamEnded { id, outcome } if id & OURS != 0 => {
                if let Some(asked) = self.streams.remove(&id) {
                    self.ended(now, asked, outcome, out);
                }
                None
            }
            Input::StreamAsked { id, from, request: Request::Pull(pull) } if self.is_foreign(&pull.record) => {
                if pull.record.key == from && self.verifier.check(&pull.record).is_ok() {
                    self.answer(now, id, &pull, out);
                }
                None
            }
            Input::StreamAsked { id, from, request: Request::Push(entries) } => {
                let (foreign, own): (Vec<Entry>, Vec<Entry>) =
                    entries.into_iter().partition(|entry| self.is_foreign(&entry.record));
                // Only members of the own region tell about others; those speak for themselves.
                if self.inner.record(from).is_some() {
                    for entry in &foreign {
                        self.take(now, entry, out);
                    }
                }
                if own.is_empty() && !foreign.is_empty() {
                    out.push(Effect::Reply { id, reply: Reply::Pushed });
                    return None;
                }
                Some(Input::StreamAsked { id, from, request: Request::Push(own) })
            }
            Input::Command(Command::Load(load)) => {
                self.load = load;
                Some(Input::Command(Command::Load(load)))
            }
            other => Some(other),
        }
    }
}

impl<E: Engine> Engine for Regional<E> {
    fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) {
        if let Some(input) = self.sort(now, input, out) {
            self.inner.handle(now, input, out);
        }
        self.tick(now, out);
    }

    fn deadline(&self) -> Time {
        self.inner.deadline().min(self.next_tick)
    }

    fn local(&self) -> &Arc<SignedRecord> {
        self.inner.local()
    }

    fn record(&self, key: NodeKey) -> Option<&Arc<SignedRecord>> {
        let elsewhere = || self.regions.values().find_map(|foreign| foreign.record(key));
        self.inner.record(key).or_else(elsewhere)
    }

    fn members(&self) -> Box<dyn Iterator<Item = MemberView> + '_> {
        Box::new(self.inner.members().chain(self.regions.values().flat_map(Foreign::members)))
    }

    fn digest(&self) -> u64 {
        self.inner.digest()
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.inner.snapshot();
        for foreign in self.regions.values() {
            let up = foreign.members().filter(|member| member.state == State::Alive).take(REMEMBERED);
            snapshot.members.extend(up.map(|member| (member.record.record.node_id.clone(), member.record.record.addr)));
        }
        snapshot
    }
}

/// Two gateways, three from six members on: one that leaves is no gap, and more would only say the same.
fn gateways_of(region: &str, alive: impl Iterator<Item = NodeKey>) -> Vec<NodeKey> {
    let mut ranked = rank(Item::new("gateway", region), alive.map(Slot::even));
    ranked.truncate(if ranked.len() < 6 { 2 } else { 3 });
    ranked
}

fn entry_of(now: Time, member: &MemberView) -> Entry {
    let age_ms = u32::try_from(now.since(member.since).as_millis()).unwrap_or(u32::MAX);
    Entry { record: member.record.clone(), state: member.state, age_ms, load: member.load }
}

fn without(message: Message, foreign: impl Fn(&Rumor) -> bool) -> Message {
    let keep = |mut rumors: Vec<Rumor>| {
        rumors.retain(|rumor| !foreign(rumor));
        rumors
    };
    match message {
        Message::Ping { seq, digest, load, rumors } => Message::Ping { seq, digest, load, rumors: keep(rumors) },
        Message::Ack { seq, digest, load, rumors } => Message::Ack { seq, digest, load, rumors: keep(rumors) },
        Message::Gossip { rumors } => Message::Gossip { rumors: keep(rumors) },
        other => other,
    }
}
