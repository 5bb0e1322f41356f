//! The lease under a hostile network, with virtual time: the very state machine of the daemon, driven by a seeded
//! scheduler, and judged by what it does.
//!
//! The judge sees effects, and asks `leads` as every user of the lease does before an act. It reads nothing else of the state
//! machines. Two things must never be: two nodes that lead in one (epoch, term), and two nodes that lead at one instant.
//!
//! Every machine has a clock of its own that runs up to 4 % fast or slow and begins anywhere after a reboot. Wall-clock time is
//! not an input of the lease, so it may jump as it likes.

use std::cmp::Reverse;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BinaryHeap};
use std::hash::{Hash as _, Hasher as _};
use std::time::Duration;

use drover_membership::core::lease::{
    Ballot, Charter, Durable, Effect, Guards, Input, Lease, Notary, Peer, PeerState, Reply, Request, SignedCharter,
    Standing, Start, Timing, Voter, VoterSet,
};
use drover_membership::core::{NodeKey, Time};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// What happens in a run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// Nodes at the beginning; the first of them, at most seven, are the first voters.
    pub nodes: usize,
    /// Virtual length of the run.
    pub length: Duration,
    /// Messages lost, in percent.
    pub loss: u32,
    /// What is done to the nodes.
    pub faults: Faults,
    /// What is taken away from the state machine, to see that the judge notices.
    pub broken: Broken,
}

/// What is done to the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Everything at random: partitions, links cut in one direction, pauses, crashes in the middle of an effect, restarts with and
    /// without memory, joins, orderly leaves, and a charter of a higher epoch when no majority can ever be again.
    Chaos,
    /// Only the leader is killed, again and again, and comes back; how long was there none?
    KillLeader,
    /// The leader is cut off together with a minority, again and again.
    CutOff,
}

/// A guard that is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// None: it must hold.
    Nothing,
    /// Votes and promises are not on disk after a restart.
    VotesForgotten,
    /// A change of voters needs no majority of the old ones.
    OldMajorityIgnored,
    /// Leases are not waited out.
    LeaseNotWaitedOut,
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Hash over every effect with its time: the same seed gives the same.
    pub trace: u64,
    /// Leaderships that began.
    pub leaders: usize,
    /// Voter sets that were written by leaders.
    pub sets: u64,
    /// Charters that the login side gave out.
    pub epochs: u64,
    /// Times without a leader, after it was killed or cut off, in microseconds.
    pub gaps: Vec<u64>,
}

/// What must never be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// Two nodes led in one term.
    TwoInOneTerm(Ballot),
    /// Two nodes led at one instant.
    TwoAtOnce(Ballot, Ballot),
    /// A node led that had been without a majority for longer than a lease.
    MinorityLed(Ballot),
    /// Nobody led for so many microseconds, though a majority could.
    NoLeader(u64),
}

const SECOND: u64 = 1_000_000;
/// Nobody waits longer than that for a leader after the last one was killed.
const LEADERLESS: u64 = 10 * SECOND;
/// Nor that long after it was cut off, where every vote of the rest may be needed: some are lost or split several times in a row.
const LEADERLESS_IN_A_PART: u64 = 15 * SECOND;

/// Runs the plan. The same plan always gives the same.
pub fn run(plan: Plan) -> Result<Report, Violation> {
    let mut world = World::new(plan);
    world.begin();
    world.run()
}

#[derive(Debug)]
enum Event {
    Request { to: usize, from: usize, boot: u64, call: u64, request: Request },
    Reply { to: usize, from: usize, boot: u64, reply: Reply },
    Timer { node: usize, boot: u64 },
    View { node: usize },
    Wake { node: usize },
    Restart { node: usize, remembers: bool },
    Fault,
    Login,
}

struct Node {
    key: NodeKey,
    lease: Option<Lease>,
    boot: u64,
    seat: u64,
    disk: Option<Durable>,
    /// Does not come back.
    gone: bool,
    leaving: bool,
    down_since: Option<u64>,
    paused: bool,
    waiting: Vec<Input>,
    standing: Standing,
    timer: Option<u64>,
    /// Clock: begins here, and runs by so many millionths faster.
    offset: u64,
    fast: i64,
    group: u32,
    cut_since: u64,
}

impl Node {
    fn local(&self, real: u64) -> Time {
        let real = real.cast_signed();
        Time((self.offset.cast_signed() + real + real / 1000 * self.fast / 1000) as u64)
    }

    /// The first moment at which the clock shows at least this.
    fn real(&self, local: Time) -> u64 {
        let behind = local.0.saturating_sub(self.offset);
        let mut real = (behind as f64 / (1.0 + self.fast as f64 / 1e6)) as u64;
        real = real.saturating_sub(2000);
        while self.local(real) < local {
            real += 1000;
        }
        real
    }

    fn up(&self) -> bool {
        self.lease.is_some()
    }

    fn acts(&self, real: u64) -> Option<Ballot> {
        match (&self.lease, self.standing) {
            (Some(lease), Standing::Leads { .. }) if !self.paused => lease.leads(self.local(real)),
            _ => None,
        }
    }
}

/// Takes every charter that can be read: signatures are not what is tried here.
struct Anything;

impl Notary for Anything {
    fn check(&self, signed: &SignedCharter) -> Option<Charter> {
        Charter::decode(&signed.bytes)
    }
}

struct World {
    plan: Plan,
    rng: SmallRng,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    stored: BTreeMap<usize, Event>,
    next: usize,
    nodes: Vec<Node>,
    /// Links that are cut in one direction.
    blocked: Vec<(usize, usize)>,
    calls: BTreeMap<u64, (usize, u64)>,
    charter: Option<SignedCharter>,
    leaders: BTreeMap<Ballot, usize>,
    trace: DefaultHasher,
    report: Report,
    /// Since when a leader is being waited for.
    gap_since: Option<u64>,
    violation: Option<Violation>,
}

impl World {
    fn new(plan: Plan) -> Self {
        Self {
            plan,
            rng: SmallRng::seed_from_u64(plan.seed),
            now: SECOND,
            events: BinaryHeap::new(),
            stored: BTreeMap::new(),
            next: 0,
            nodes: Vec::new(),
            blocked: Vec::new(),
            calls: BTreeMap::new(),
            charter: None,
            leaders: BTreeMap::new(),
            trace: DefaultHasher::new(),
            report: Report::default(),
            gap_since: None,
            violation: None,
        }
    }

    fn begin(&mut self) {
        for _ in 0..self.plan.nodes {
            self.add_node();
        }
        self.publish_charter();
        self.after(2 * SECOND, Event::Login);
        self.after(5 * SECOND, Event::Fault);
        self.gap_since = Some(self.now);
    }

    fn run(mut self) -> Result<Report, Violation> {
        let end = self.plan.length.as_micros() as u64;
        while let Some(Reverse((time, _, id))) = self.events.pop() {
            self.now = time;
            if self.now > end {
                break;
            }
            let Some(event) = self.stored.remove(&id) else { continue };
            self.carry_out(event);
            self.judge();
            if let Some(violation) = self.violation.take() {
                return Err(violation);
            }
        }
        self.report.trace = self.trace.finish();
        Ok(self.report)
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next += 1;
        self.stored.insert(self.next, event);
        self.events.push(Reverse((time, self.next as u64, self.next)));
    }

    fn after(&mut self, span: u64, event: Event) {
        self.at(self.now + span, event);
    }

    fn add_node(&mut self) {
        let index = self.nodes.len();
        let offset = self.rng.random_range(0..1000 * SECOND);
        let fast = self.rng.random_range(-40_000..=40_000);
        self.nodes.push(Node {
            key: NodeKey::of(&format!("swarm/{index}")),
            lease: None,
            boot: 0,
            seat: 1,
            disk: None,
            gone: false,
            leaving: false,
            down_since: None,
            paused: false,
            waiting: Vec::new(),
            standing: Standing::Leaderless,
            timer: None,
            offset,
            fast,
            group: 0,
            cut_since: 0,
        });
        self.start(index);
        let first = self.rng.random_range(0..SECOND);
        self.after(first, Event::View { node: index });
    }

    fn start(&mut self, index: usize) {
        let guards = Guards {
            old_majority: self.plan.broken != Broken::OldMajorityIgnored,
            wait_out: self.plan.broken != Broken::LeaseNotWaitedOut,
        };
        let seed = self.rng.random();
        let now = self.now;
        let node = &mut self.nodes[index];
        node.boot += 1;
        node.down_since = None;
        node.paused = false;
        node.standing = Standing::Leaderless;
        node.timer = None;
        let start = Start {
            me: node.key,
            boot: node.boot,
            seat: node.seat,
            durable: node.disk.clone(),
            timing: Timing::new(Duration::from_secs(1)),
            seed,
            notary: Box::new(Anything),
            guards,
        };
        let local = node.local(now);
        node.lease = Some(Lease::new(start, local));
        self.input(index, Input::Timer);
    }

    fn stop(&mut self, index: usize) {
        let now = self.now;
        let node = &mut self.nodes[index];
        node.lease = None;
        node.standing = Standing::Leaderless;
        node.waiting.clear();
        node.paused = false;
        node.down_since.get_or_insert(now);
        // The machine may have been rebooted: its clock begins anywhere.
        node.offset = self.rng.random_range(0..1000 * SECOND);
    }

    fn input(&mut self, index: usize, input: Input) {
        let now = self.now;
        let node = &mut self.nodes[index];
        if node.paused {
            node.waiting.push(input);
            return;
        }
        let local = node.local(now);
        let Some(lease) = &mut node.lease else { return };
        let mut effects = Vec::new();
        lease.handle(local, input, &mut effects);
        for effect in effects {
            self.effect(index, effect);
            // Some processes die between two effects, after what was written and before what was to be said.
            if self.plan.faults == Faults::Chaos && self.rng.random_range(0..4000) == 0 {
                self.crash(index, true);
                return;
            }
        }
        let node = &mut self.nodes[index];
        let boot = node.boot;
        let Some(lease) = &node.lease else { return };
        if let Some(deadline) = lease.deadline(local) {
            let due = node.real(deadline).max(now + 1);
            if node.timer.is_none_or(|timer| due < timer || timer <= now) {
                node.timer = Some(due);
                // No process is woken on the dot.
                let late = self.rng.random_range(0..5_000);
                self.at(due + late, Event::Timer { node: index, boot });
            }
        }
    }

    fn effect(&mut self, index: usize, effect: Effect) {
        (self.now, index).hash(&mut self.trace);
        format!("{effect:?}").hash(&mut self.trace);
        match effect {
            Effect::Persist(durable) => self.write(index, durable),
            Effect::Ask { to, request } => {
                let Some(to) = self.nodes.iter().position(|node| node.key == to) else { return };
                let call = self.next as u64;
                self.calls.insert(call, (index, self.nodes[index].boot));
                let boot = self.nodes[to].boot;
                let copies = if self.rng.random_range(0..50) == 0 { 2 } else { 1 };
                for _ in 0..copies {
                    if let Some(delay) = self.passes(index, to) {
                        let request = request.clone();
                        self.after(delay, Event::Request { to, from: index, boot, call, request });
                    }
                }
            }
            Effect::Answer { call, reply } => {
                let Some((to, boot)) = self.calls.get(&call).copied() else { return };
                if let Some(delay) = self.passes(index, to) {
                    self.after(delay, Event::Reply { to, from: index, boot, reply });
                }
            }
            Effect::Standing(standing) => {
                self.nodes[index].standing = standing;
                if let Standing::Leads { ballot } = standing {
                    self.report.leaders += 1;
                    if *self.leaders.entry(ballot).or_insert(index) != index {
                        self.violation = Some(Violation::TwoInOneTerm(ballot));
                    }
                }
            }
        }
    }

    fn write(&mut self, index: usize, durable: Durable) {
        self.report.sets = self.report.sets.max(durable.set.version.generation);
        let node = &mut self.nodes[index];
        node.disk = Some(match &node.disk {
            // The promise is kept in memory only.
            Some(before) if self.plan.broken == Broken::VotesForgotten => Durable {
                promised: Ballot {
                    epoch: durable.promised.epoch,
                    term: before.promised.term.min(durable.set.version.ballot.term),
                },
                vote: None,
                ..durable
            },
            _ => durable,
        });
    }

    /// How long a message takes; `None` when it is lost.
    fn passes(&mut self, from: usize, to: usize) -> Option<u64> {
        let lost = self.rng.random_range(0..100) < self.plan.loss;
        let slow = self.rng.random_range(0..20) == 0;
        let delay = if slow { self.rng.random_range(1_000..800_000) } else { self.rng.random_range(200..20_000) };
        let cut = self.nodes[from].group != self.nodes[to].group || self.blocked.contains(&(from, to));
        (!lost && !cut).then_some(delay)
    }

    fn carry_out(&mut self, event: Event) {
        match event {
            Event::Request { to, from, boot, call, request } => {
                if self.nodes[to].boot == boot {
                    let from = self.nodes[from].key;
                    self.input(to, Input::Request { call, from, request });
                }
            }
            Event::Reply { to, from, boot, reply } => {
                if self.nodes[to].boot == boot {
                    let from = self.nodes[from].key;
                    self.input(to, Input::Reply { from, reply });
                }
            }
            Event::Timer { node, boot } => {
                if self.nodes[node].boot == boot {
                    self.nodes[node].timer = None;
                    self.input(node, Input::Timer);
                }
            }
            Event::View { node } => {
                if self.nodes[node].up() {
                    let view = self.view_of(node);
                    self.input(node, Input::View(view));
                }
                if !self.nodes[node].gone {
                    let pause = self.rng.random_range(SECOND / 2..2 * SECOND);
                    self.after(pause, Event::View { node });
                }
            }
            Event::Wake { node } => {
                self.nodes[node].paused = false;
                let waiting = std::mem::take(&mut self.nodes[node].waiting);
                for input in std::iter::once(Input::Timer).chain(waiting) {
                    self.input(node, input);
                }
            }
            Event::Restart { node, remembers } => {
                if !self.nodes[node].up() && !self.nodes[node].gone {
                    if !remembers {
                        self.nodes[node].disk = None;
                        self.nodes[node].seat += 1;
                    }
                    self.start(node);
                }
            }
            Event::Fault => self.fault(),
            Event::Login => {
                self.login();
                self.after(3 * SECOND, Event::Login);
            }
        }
    }

    /// What the gossip would say, late, and now and then wrong.
    fn view_of(&mut self, index: usize) -> Vec<Peer> {
        let (now, group) = (self.now, self.nodes[index].group);
        let cut = self.nodes[index].cut_since;
        let mut view = Vec::new();
        for other in 0..self.nodes.len() {
            let node = &self.nodes[other];
            let silent = match node.down_since {
                Some(since) => now - since,
                None if node.group != group => now - cut.max(node.cut_since),
                None => 0,
            };
            let state = match silent / SECOND {
                _ if node.leaving && silent < 40 * SECOND => PeerState::Left,
                40.. => continue,
                8.. => PeerState::Dead,
                4.. => PeerState::Suspect,
                _ if self.rng.random_range(0..100) == 0 => PeerState::Dead,
                _ => PeerState::Alive,
            };
            let region = if other % 2 == 0 { "even" } else { "odd" };
            view.push(Peer { key: self.nodes[other].key, state, region: region.into() });
        }
        view
    }

    fn crash(&mut self, index: usize, comes_back: bool) {
        self.stop(index);
        if comes_back {
            let after = self.rng.random_range(SECOND / 20..12 * SECOND);
            let remembers = self.plan.faults != Faults::Chaos || self.rng.random_range(0..10) > 0;
            self.after(after, Event::Restart { node: index, remembers });
        } else {
            self.nodes[index].gone = true;
        }
    }

    fn leader(&self) -> Option<usize> {
        (0..self.nodes.len()).find(|&index| self.nodes[index].acts(self.now).is_some())
    }

    fn regroup(&mut self, mut group: impl FnMut(&mut Self, usize) -> u32) {
        for index in 0..self.nodes.len() {
            let next = group(self, index);
            let node = &mut self.nodes[index];
            if node.group != next {
                node.group = next;
                node.cut_since = self.now;
            }
        }
    }

    fn fault(&mut self) {
        match self.plan.faults {
            Faults::Chaos => {
                self.chaos();
                let pause = self.rng.random_range(SECOND / 5..6 * SECOND);
                self.after(pause, Event::Fault);
            }
            Faults::KillLeader => {
                if let Some(leader) = self.leader() {
                    self.crash(leader, true);
                    self.gap_since = Some(self.now);
                }
                self.after(20 * SECOND, Event::Fault);
            }
            Faults::CutOff => {
                let leader = self.leader();
                if self.nodes.iter().any(|node| node.group != 0) {
                    self.regroup(|_, _| 0);
                } else if let Some(leader) = leader {
                    let few = (self.nodes.len() - 1) / 2;
                    let count = self.nodes.len();
                    self.regroup(|_, index| u32::from((index + count - leader) % count < few));
                    self.gap_since = Some(self.now);
                }
                self.after(15 * SECOND, Event::Fault);
            }
        }
    }

    fn chaos(&mut self) {
        let index = self.rng.random_range(0..self.nodes.len());
        let leader = self.leader();
        let living = self.nodes.iter().filter(|node| !node.gone).count();
        match self.rng.random_range(0..24) {
            0..=2 => self.regroup(|world, _| world.rng.random_range(0..2)),
            3 => self.regroup(|world, _| world.rng.random_range(0..3)),
            4 => {
                if let Some(leader) = leader {
                    self.regroup(|_, index| u32::from(index == leader));
                }
            }
            5..=8 => {
                self.regroup(|_, _| 0);
                self.blocked.clear();
            }
            9 => {
                let other = self.rng.random_range(0..self.nodes.len());
                self.blocked.push((index, other));
            }
            10..=13 => {
                let index = if self.rng.random() { leader.unwrap_or(index) } else { index };
                if self.nodes[index].up() && !self.nodes[index].paused {
                    self.nodes[index].paused = true;
                    let span = self.rng.random_range(SECOND / 10..9 * SECOND);
                    self.after(span, Event::Wake { node: index });
                }
            }
            14..=17 => {
                if self.nodes[index].up() {
                    self.crash(index, true);
                }
            }
            18..=19 => {
                if let Some(leader) = leader {
                    self.crash(leader, true);
                }
            }
            20 => {
                if living > 3 && self.nodes[index].up() {
                    self.crash(index, false);
                }
            }
            21 => {
                if living > 3 && self.nodes[index].up() {
                    self.nodes[index].leaving = true;
                    self.input(index, Input::Leave);
                }
            }
            22 => {
                if self.nodes[index].leaving && self.nodes[index].up() {
                    self.crash(index, false);
                }
            }
            _ => {
                if living < 12 {
                    self.add_node();
                }
            }
        }
    }

    /// The login side: it gives out a charter of a higher epoch when it knows that no set that anybody remembers can ever
    /// have a majority again; and tells the charter to whoever is new.
    fn login(&mut self) {
        let seated = |voter: Voter| {
            self.nodes.iter().any(|node| {
                let seat = node.disk.as_ref().map(|disk| disk.seat);
                node.key == voter.key && !node.gone && seat == Some(voter.seat)
            })
        };
        let possible = |set: &VoterSet| !set.voters.is_empty() && set.agreed(seated);
        let remembered = |node: &Node| !node.gone && node.disk.as_ref().is_some_and(|disk| possible(&disk.set));
        if !self.nodes.iter().any(remembered) {
            self.publish_charter();
        }
    }

    fn publish_charter(&mut self) {
        let mut voters: Vec<Voter> = self
            .nodes
            .iter()
            .filter(|node| !node.gone && !node.leaving)
            .take(7)
            .map(|node| Voter { key: node.key, seat: node.disk.as_ref().map_or(node.seat, |disk| disk.seat) })
            .collect();
        if voters.is_empty() {
            return;
        }
        voters.sort_unstable();
        self.report.epochs += 1;
        let charter = Charter { epoch: self.report.epochs, voters };
        let signed = SignedCharter { bytes: charter.encode(), signature: [].into() };
        self.charter = Some(signed.clone());
        for index in 0..self.nodes.len() {
            if self.nodes[index].up() {
                self.input(index, Input::Charter(signed.clone()));
            }
        }
    }

    fn judge(&mut self) {
        let mut acting = (0..self.nodes.len()).filter_map(|index| Some((index, self.nodes[index].acts(self.now)?)));
        let first = acting.next();
        if let (Some((_, one)), Some((_, other))) = (first, acting.next()) {
            self.violation = Some(Violation::TwoAtOnce(one, other));
            return;
        }
        drop(acting);
        let lease = 5 * SECOND;
        if let (Faults::CutOff, Some((index, ballot))) = (self.plan.faults, first) {
            let node = &self.nodes[index];
            if node.group == 1 && self.now > node.cut_since + lease {
                self.violation = Some(Violation::MinorityLed(ballot));
            }
        }
        let counts = first.is_some_and(|(index, _)| self.plan.faults != Faults::CutOff || self.nodes[index].group == 0);
        if let (Some(since), true) = (self.gap_since, counts) {
            self.report.gaps.push(self.now - since);
            self.gap_since = None;
        }
        let limit = if self.plan.faults == Faults::CutOff { LEADERLESS_IN_A_PART } else { LEADERLESS };
        if let (Some(since), true) = (self.gap_since, self.plan.faults != Faults::Chaos)
            && self.now > since + limit
        {
            self.violation = Some(Violation::NoLeader(self.now - since));
        }
    }
}
