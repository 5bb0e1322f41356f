//! The simulated world: virtual time, one queue of events, and nodes that are the production core and nothing else.
//!
//! Nothing here looks at a clock or at global randomness, so that a seed is a whole run. A node may be killed between any two
//! effects; what it had asked of the file system then happens, happens in part, or does not.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drover_handoff::core::{
    Appended, Call, Cause, ClaimOutcome, Digest, Effect, Engine, Event, HandoffId, Input, Installed, Looked, Message,
    NodeId, Own, Owner, OwnerRecord, Peer, PeerState, Reply, ReplyTo, Reserved, Settings, Turn, Why,
};
use drover_handoff::session::{LogSum, Outcome, Record};
use drover_types::{Epoch, RequestId, SessionId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::clients::Client;
use super::judge::Judge;
use super::shared::{Missing, Shared, lines};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// Share of messages that are lost, and of those that come twice.
    pub loss: f64,
    /// Comes twice.
    pub twice: f64,
    /// Share of pieces that arrive damaged, and are not noticed on arrival.
    pub damage: f64,
    /// Longest time of a message on its way, in microseconds.
    pub way: u64,
    /// Share of file operations whose outcome nobody learns.
    pub unknown: f64,
    /// Share of effects before which the process is killed.
    pub kill: f64,
}

impl Weather {
    /// Nothing goes wrong.
    pub const FAIR: Self = Self { loss: 0.0, twice: 0.0, damage: 0.0, way: 2_000, unknown: 0.0, kill: 0.0 };
}

/// What is done to whoever performs the effect of a certain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Killed before it performs it; back after two seconds.
    Kill,
    /// Killed, and back after a minute.
    KillForLong,
    /// Stopped for a minute.
    Stop,
    /// Cut off from all others for ten seconds.
    Cut,
    /// What others send does not reach it for ten seconds.
    Deaf,
    /// Does not reach the shared file system for ten seconds.
    NoFiles,
    /// Everybody takes it for gone for ten seconds.
    Slander,
}

impl Fault {
    /// Every one.
    pub const ALL: [Self; 7] =
        [Self::Kill, Self::KillForLong, Self::Stop, Self::Cut, Self::Deaf, Self::NoFiles, Self::Slander];
}

/// Something asked of the shared file system.
#[derive(Debug, Clone)]
enum Op {
    Look(SessionId),
    Claim(OwnerRecord),
    Load(SessionId, Epoch),
    /// The write of an append, then the look.
    Append {
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: Arc<Vec<Record>>,
        offset: usize,
        looked: bool,
        unknown: bool,
    },
    Tool {
        session: SessionId,
        epoch: Epoch,
        call: Call,
    },
}

#[derive(Debug)]
enum Happening {
    Input {
        node: usize,
        start: u32,
        input: Input,
    },
    Said {
        from: usize,
        to: usize,
        message: Message,
    },
    Asked {
        client: usize,
        request: RequestId,
        node: usize,
    },
    Heard {
        client: usize,
        request: RequestId,
        reply: Reply,
    },
    Again {
        client: usize,
        request: RequestId,
        try_number: u64,
    },
    Next {
        client: usize,
    },
    Op {
        node: usize,
        start: u32,
        op: Op,
    },
    /// The outcome of an append comes back.
    Kept {
        node: usize,
        start: u32,
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: Arc<Vec<Record>>,
        outcome: Option<OwnerRecord>,
        unknown: bool,
    },
    Agent {
        node: usize,
        start: u32,
        session: SessionId,
        life: u64,
    },
    Timer {
        node: usize,
        start: u32,
    },
    Wake {
        node: usize,
        start: u32,
    },
    Start {
        node: usize,
    },
    Joined {
        a: usize,
        b: usize,
    },
    Reached {
        node: usize,
    },
    Believed {
        node: usize,
    },
}

struct Scheduled {
    at: Duration,
    order: u64,
    what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What a node's disk has of a session.
#[derive(Debug, Clone, Default)]
struct Local {
    bytes: Vec<u8>,
    sum: LogSum,
    prompts: BTreeMap<Turn, String>,
    outcomes: BTreeMap<Turn, Outcome>,
    results: BTreeMap<Call, String>,
    /// Bytes of this epoch's journal that are known to be written.
    journal: (Epoch, usize),
}

impl Local {
    fn of(sum: LogSum, bytes: Vec<u8>, records: &[Record]) -> Self {
        let mut local = Self { bytes, sum, ..Self::default() };
        local.read(records);
        local
    }

    fn read(&mut self, records: &[Record]) {
        for record in records {
            match record {
                Record::Accepted { turn, prompt, .. } => {
                    self.prompts.insert(*turn, prompt.clone());
                }
                Record::Ended { turn, outcome, .. } => {
                    self.outcomes.insert(*turn, outcome.clone());
                }
                Record::Returned { call, result } => {
                    self.results.insert(*call, result.clone());
                }
                _ => {}
            }
        }
    }
}

/// The process of an agent.
#[derive(Debug)]
struct Agent {
    life: u64,
    epoch: Epoch,
    turn: Turn,
    step: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Running,
    Stopped,
    Killed,
}

struct Node {
    id: NodeId,
    engine: Engine,
    process: Process,
    start: u32,
    timer: Duration,
    waiting: VecDeque<Happening>,
    local: BTreeMap<SessionId, Local>,
    copies: BTreeMap<SessionId, Vec<u8>>,
    /// Copies that were found whole, until the claim is decided.
    whole: BTreeMap<SessionId, Local>,
    agents: BTreeMap<SessionId, Agent>,
    /// What somebody who reads before it claims would have found.
    early: BTreeMap<SessionId, (LogSum, Vec<u8>, Vec<Record>)>,
    believed_gone: bool,
    killed_at: Duration,
    load: f64,
}

/// The simulated world.
pub struct World {
    /// Virtual time.
    pub now: Duration,
    /// How bad it is.
    pub weather: Weather,
    /// Judges everything that happens here.
    pub judge: Judge,
    /// Ownership, journals, the tool.
    pub shared: Shared,
    /// Randomness for those who write scenarios.
    pub rng: SmallRng,
    /// The clients.
    pub clients: Vec<Client>,
    /// What is done at the effect of this number.
    pub fault: Option<(u64, Fault)>,
    /// Effects so far.
    pub effects: u64,
    /// Everything that happened, when somebody wants to see it.
    pub story: Option<Vec<String>>,
    missing: Option<Missing>,
    settings: Settings,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order: u64,
    lives: u64,
    replies: BTreeMap<ReplyTo, (usize, RequestId)>,
    tries: BTreeMap<RequestId, u64>,
    cut: BTreeSet<(usize, usize)>,
    unreachable: BTreeSet<usize>,
    serving: BTreeMap<SessionId, usize>,
    trace: u64,
    scratch: Vec<Effect>,
}

/// An episode takes a small part of this; more is nodes that keep each other busy.
const MOST_EFFECTS: u64 = 2_000_000;
/// A client that hears nothing asks again after this.
const PATIENCE: Duration = Duration::from_millis(1500);

impl World {
    /// Nodes that have nothing to do yet.
    pub fn new(seed: u64, nodes: usize, settings: Settings, weather: Weather, missing: Option<Missing>) -> Self {
        let mut world = Self {
            now: Duration::ZERO,
            weather,
            judge: Judge::default(),
            shared: Shared::default(),
            rng: SmallRng::seed_from_u64(seed),
            clients: Vec::new(),
            fault: None,
            effects: 0,
            story: None,
            missing,
            settings,
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
            order: 0,
            lives: 0,
            replies: BTreeMap::new(),
            tries: BTreeMap::new(),
            cut: BTreeSet::new(),
            unreachable: BTreeSet::new(),
            serving: BTreeMap::new(),
            trace: seed,
            scratch: Vec::new(),
        };
        for node in 0..nodes {
            let id = NodeId::new(&format!("swarm/{node}"));
            let owner = Owner { node: id.clone(), boot: 0 };
            let engine = Engine::new(Duration::ZERO, owner, world.settings.clone(), 0);
            world.nodes.push(Node {
                id,
                engine,
                process: Process::Killed,
                start: 0,
                timer: Duration::MAX,
                waiting: VecDeque::new(),
                local: BTreeMap::new(),
                copies: BTreeMap::new(),
                whole: BTreeMap::new(),
                agents: BTreeMap::new(),
                early: BTreeMap::new(),
                believed_gone: false,
                killed_at: Duration::ZERO,
                load: 0.1,
            });
        }
        (0..nodes).for_each(|node| world.start(node));
        world
    }

    /// Sums up all that has happened.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The node that served a session last.
    pub fn server(&self, session: &SessionId) -> Option<usize> {
        self.serving.get(session).copied()
    }

    /// Adds a client and has it begin.
    pub fn client(&mut self, session: &SessionId, replayable: bool, turns: usize) -> usize {
        let number = self.clients.len();
        let node = self.rng.random_range(0..self.nodes.len());
        self.clients.push(Client::new(number, session.clone(), replayable, node, turns));
        self.schedule(Duration::ZERO, Happening::Next { client: number });
        number
    }

    /// All turns are answered, and nothing is on its way.
    pub fn is_quiet(&self) -> bool {
        self.clients.iter().all(Client::is_done)
            && self.judge.under_way() == 0
            && self.nodes.iter().all(|node| node.engine.moving() == (0, 0))
    }

    // ---- what is done to the nodes

    fn start(&mut self, node: usize) {
        let slot = &mut self.nodes[node];
        if slot.process != Process::Killed {
            return;
        }
        slot.start += 1;
        let owner = Owner { node: slot.id.clone(), boot: u64::from(slot.start) };
        let seed = self.rng.random();
        slot.engine = Engine::new(self.now, owner, self.settings.clone(), seed);
        slot.process = Process::Running;
        slot.timer = Duration::MAX;
        slot.waiting.clear();
        slot.early.clear();
        slot.whole.clear();
        let own = Own { load: slot.load, leaving: false, capabilities: ["echo".to_owned()].into() };
        self.feed(node, Input::Own(own));
        self.tell_peers();
        let id = self.nodes[node].id.clone();
        let mine = |files: &super::shared::Files| files.newest().is_some_and(|newest| newest.owner.node == id);
        let owned: Vec<SessionId> =
            self.shared.sessions.iter().filter(|(_, files)| mine(files)).map(|(session, _)| session.clone()).collect();
        for session in owned {
            self.feed(node, Input::Recover { session });
        }
    }

    /// Kills a process; it starts again after a while.
    pub fn kill(&mut self, node: usize, back: Duration) {
        let slot = &mut self.nodes[node];
        if slot.process == Process::Killed {
            return;
        }
        slot.process = Process::Killed;
        slot.killed_at = self.now;
        slot.waiting.clear();
        slot.agents.clear();
        let owner = slot.engine.me().clone();
        // What it knew is gone with it.
        slot.engine = Engine::new(self.now, owner.clone(), self.settings.clone(), 0);
        self.judge.killed(&owner);
        self.say(|| format!("{owner} is killed"));
        self.schedule(back, Happening::Start { node });
        self.schedule(Duration::from_secs(1), Happening::Believed { node });
    }

    /// Stops a process for a while; what comes for it waits.
    pub fn pause(&mut self, node: usize, span: Duration) {
        let slot = &mut self.nodes[node];
        if slot.process == Process::Running {
            slot.process = Process::Stopped;
            let start = slot.start;
            self.say(|| format!("node {node} is stopped for {span:?}"));
            self.schedule(span, Happening::Wake { node, start });
        }
    }

    /// Cuts one node off from another, in one direction.
    pub fn cut(&mut self, from: usize, to: usize, span: Duration) {
        self.say(|| format!("{from} does not reach {to} for {span:?}"));
        self.cut.insert((from, to));
        self.schedule(span, Happening::Joined { a: from, b: to });
    }

    /// Cuts a node off from the shared file system.
    pub fn cut_off_files(&mut self, node: usize, span: Duration) {
        self.say(|| format!("{node} does not reach the files for {span:?}"));
        self.unreachable.insert(node);
        self.schedule(span, Happening::Reached { node });
    }

    /// Everybody takes a node that lives for gone.
    pub fn slander(&mut self, node: usize, span: Duration) {
        self.nodes[node].believed_gone = true;
        self.tell_peers();
        self.schedule(span, Happening::Believed { node });
    }

    /// Sets what a node says of its load.
    pub fn load(&mut self, node: usize, load: f64) {
        self.nodes[node].load = load;
        if self.nodes[node].process == Process::Running {
            let own = Own { load, leaving: false, capabilities: ["echo".to_owned()].into() };
            self.feed(node, Input::Own(own));
        }
        self.tell_peers();
    }

    fn strike(&mut self, node: usize, fault: Fault) {
        let span = Duration::from_secs(10);
        match fault {
            Fault::Kill => self.kill(node, Duration::from_secs(2)),
            Fault::KillForLong => self.kill(node, Duration::from_mins(1)),
            Fault::Stop => self.pause(node, Duration::from_mins(1)),
            Fault::Cut | Fault::Deaf => {
                for other in (0..self.nodes.len()).filter(|other| *other != node) {
                    self.cut(other, node, span);
                    if fault == Fault::Cut {
                        self.cut(node, other, span);
                    }
                }
            }
            Fault::NoFiles => self.cut_off_files(node, span),
            Fault::Slander => self.slander(node, span),
        }
    }

    /// Asks a node to move a session.
    pub fn request(&mut self, node: usize, session: &SessionId, to: Option<usize>) {
        let to = to.map(|to| self.nodes[to].id.clone());
        let (session, start) = (session.clone(), self.nodes[node].start);
        let input = Input::Move { session, to, why: Why::Operator };
        self.schedule(Duration::ZERO, Happening::Input { node, start, input });
    }

    /// From now on nothing goes wrong, and what was killed or stopped or cut is back.
    pub fn heal(&mut self) {
        self.weather = Weather::FAIR;
        self.fault = None;
        self.cut.clear();
        self.unreachable.clear();
        for node in 0..self.nodes.len() {
            self.nodes[node].believed_gone = false;
            let start = self.nodes[node].start;
            match self.nodes[node].process {
                Process::Killed => self.start(node),
                Process::Stopped => self.wake(node, start),
                Process::Running => {}
            }
        }
        self.tell_peers();
    }

    fn tell_peers(&mut self) {
        for node in 0..self.nodes.len() {
            if self.nodes[node].process != Process::Running {
                continue;
            }
            let peers = self.nodes.iter().enumerate().filter(|(other, _)| *other != node).map(|(_, peer)| Peer {
                node: peer.id.clone(),
                state: if peer.believed_gone { PeerState::Gone } else { PeerState::Alive },
                load: peer.load,
                overloaded: false,
                capabilities: ["echo".to_owned()].into(),
            });
            let peers = peers.collect();
            self.feed(node, Input::Peers(peers));
        }
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(story) = &mut self.story {
            story.push(format!("{now:?} {}", text()));
        }
    }

    // ---- time

    /// Lets virtual time pass.
    pub fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse(next)) = self.queue.peek()
            && next.at <= end
        {
            self.step();
            if self.effects > MOST_EFFECTS {
                self.judge.storm();
                break;
            }
        }
        self.now = end;
    }

    fn step(&mut self) {
        let Some(Reverse(Scheduled { at, what, .. })) = self.queue.pop() else { return };
        self.now = self.now.max(at);
        match what {
            Happening::Timer { node, start } => {
                let slot = &mut self.nodes[node];
                if slot.start == start && slot.timer == at && slot.process == Process::Running {
                    slot.timer = Duration::MAX;
                    self.feed(node, Input::Tick);
                }
            }
            Happening::Wake { node, start } => self.wake(node, start),
            Happening::Start { node } => self.start(node),
            Happening::Joined { a, b } => {
                self.cut.remove(&(a, b));
            }
            Happening::Reached { node } => {
                self.unreachable.remove(&node);
            }
            Happening::Believed { node } => {
                let killed = self.nodes[node].process == Process::Killed;
                let long = self.now >= self.nodes[node].killed_at + Duration::from_secs(1);
                self.nodes[node].believed_gone = killed && long;
                self.tell_peers();
            }
            Happening::Heard { client, request, reply } => self.hear(client, &request, &reply),
            Happening::Again { client, request, try_number } => {
                if self.tries.get(&request) == Some(&try_number) {
                    // Somewhere else, perhaps.
                    if self.rng.random_bool(0.5) {
                        self.clients[client].node = self.rng.random_range(0..self.nodes.len());
                    }
                    self.ask(client, &request);
                }
            }
            Happening::Next { client } => self.next(client),
            Happening::Op { node, start, op } => self.operate(node, start, op),
            other => self.arrive(other),
        }
    }

    fn wake(&mut self, node: usize, start: u32) {
        if self.nodes[node].start != start || self.nodes[node].process != Process::Stopped {
            return;
        }
        self.nodes[node].process = Process::Running;
        self.nodes[node].timer = Duration::MAX;
        self.say(|| format!("node {node} goes on"));
        let timer_first = self.rng.random_bool(0.5);
        if timer_first {
            self.feed(node, Input::Tick);
        }
        for what in std::mem::take(&mut self.nodes[node].waiting) {
            self.arrive(what);
        }
        self.feed(node, Input::Tick);
    }

    /// Something comes to a process, which may be stopped or another one by now.
    fn arrive(&mut self, what: Happening) {
        let (node, start) = match &what {
            Happening::Input { node, start, .. }
            | Happening::Kept { node, start, .. }
            | Happening::Agent { node, start, .. } => (*node, Some(*start)),
            Happening::Said { to, .. } => (*to, None),
            Happening::Asked { node, .. } => (*node, None),
            _ => return,
        };
        let slot = &mut self.nodes[node];
        if start.is_some_and(|start| start != slot.start) || slot.process == Process::Killed {
            return;
        }
        if slot.process == Process::Stopped {
            slot.waiting.push_back(what);
            return;
        }
        match what {
            Happening::Input { input, .. } => {
                if let Input::Claimed { session, outcome: ClaimOutcome::Won, epoch } = &input {
                    self.adopt(node, session, *epoch);
                }
                self.feed(node, input);
            }
            Happening::Said { from, message, .. } => {
                let from = self.nodes[from].id.clone();
                self.feed(node, Input::Message { from, message });
            }
            Happening::Asked { client, request, .. } => {
                self.order += 1;
                let reply = ReplyTo(self.order);
                if let Some(asked) = self.clients[client].ask(&request, reply, self.now) {
                    self.replies.insert(reply, (client, request));
                    self.feed(node, Input::Turn(Box::new(asked)));
                }
            }
            Happening::Kept { session, epoch, first, records, outcome, unknown, .. } => {
                self.kept(node, session, epoch, first, &records, outcome, unknown);
            }
            Happening::Agent { session, life, .. } => self.agent(node, &session, life),
            _ => {}
        }
    }

    fn feed(&mut self, node: usize, input: Input) {
        if let Some(story) = &mut self.story {
            let name = self.nodes[node].engine.me().clone();
            if !matches!(input, Input::Tick | Input::Peers(_) | Input::Own(_)) {
                story.push(format!("{:?} {name} <- {input:?}", self.now));
            }
        }
        let start = self.nodes[node].start;
        let mut effects = std::mem::take(&mut self.scratch);
        self.nodes[node].engine.handle(self.now, input, &mut effects);
        for effect in effects.drain(..) {
            self.effects += 1;
            if let Some((_, fault)) = self.fault.take_if(|(at, _)| *at == self.effects) {
                self.strike(node, fault);
            }
            if self.weather.kill > 0.0 && self.rng.random_bool(self.weather.kill) {
                let back = Duration::from_millis(self.rng.random_range(10..8_000));
                self.kill(node, back);
            }
            if self.nodes[node].process == Process::Killed || self.nodes[node].start != start {
                break;
            }
            self.perform(node, effect);
        }
        effects.clear();
        self.scratch = effects;
        let slot = &mut self.nodes[node];
        let deadline = slot.engine.deadline();
        if slot.process == Process::Running && deadline < slot.timer {
            let at = deadline.max(self.now);
            slot.timer = at;
            let start = slot.start;
            self.order += 1;
            self.queue.push(Reverse(Scheduled { at, order: self.order, what: Happening::Timer { node, start } }));
        }
    }

    fn schedule(&mut self, after: Duration, what: Happening) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { at: self.now + after, order: self.order, what }));
    }

    fn mix(&mut self, part: u64) {
        self.trace = (self.trace ^ part).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
    }

    fn span(&mut self, micros: std::ops::Range<u64>) -> Duration {
        Duration::from_micros(self.rng.random_range(micros))
    }

    fn later(&mut self, node: usize, micros: std::ops::Range<u64>, input: Input) {
        let (after, start) = (self.span(micros), self.nodes[node].start);
        self.schedule(after, Happening::Input { node, start, input });
    }

    // ---- clients

    fn next(&mut self, client: usize) {
        if let Some(request) = self.clients[client].next_turn() {
            self.ask(client, &request);
            // Some do not wait for one answer before they ask the next thing.
            if self.clients[client].pending.len() < 2 && self.rng.random_bool(0.2) {
                let after = self.span(0..3_000);
                self.schedule(after, Happening::Next { client });
            }
        }
    }

    fn ask(&mut self, client: usize, request: &RequestId) {
        let number = self.tries.entry(request.clone()).or_default();
        *number += 1;
        let try_number = *number;
        let mut nodes = vec![self.clients[client].node];
        if self.rng.random_bool(self.weather.twice) {
            nodes.push(self.rng.random_range(0..self.nodes.len()));
        }
        for node in nodes {
            if !self.rng.random_bool(self.weather.loss) {
                let after = self.span(50..self.weather.way.max(51));
                self.schedule(after, Happening::Asked { client, request: request.clone(), node });
            }
        }
        self.schedule(PATIENCE, Happening::Again { client, request: request.clone(), try_number });
    }

    fn hear(&mut self, client: usize, request: &RequestId, reply: &Reply) {
        let nodes = &self.nodes;
        let node_of = |name: &str| nodes.iter().position(|node| node.id.as_str() == name).unwrap_or(0);
        let (again, over) = self.clients[client].hear(request, reply, node_of);
        if let Some(after) = again {
            let number = self.tries.entry(request.clone()).or_default();
            *number += 1;
            let try_number = *number;
            self.schedule(after, Happening::Again { client, request: request.clone(), try_number });
        }
        if over {
            let after = self.span(1_000..400_000);
            self.schedule(after, Happening::Next { client });
        }
    }

    // ---- file systems

    fn operate(&mut self, node: usize, start: u32, op: Op) {
        let alive = self.nodes[node].start == start && self.nodes[node].process != Process::Killed;
        // What a killed process had asked for happens, or does not.
        if !alive && self.rng.random_bool(0.5) {
            return;
        }
        let unreachable = self.unreachable.contains(&node);
        let missing = self.missing;
        match op {
            Op::Look(_) | Op::Load(..) if !alive => {}
            Op::Look(session) => {
                let outcome = match self.shared.sessions.get(&session) {
                    _ if unreachable => Looked::Unknown,
                    Some(files) => files.look(),
                    None => Looked::Nobody,
                };
                self.later(node, 50..500, Input::Looked { session, outcome });
            }
            Op::Claim(record) => {
                let (session, epoch) = (record.session.clone(), record.epoch);
                let files = self.shared.sessions.entry(session.clone()).or_default();
                let outcome = if unreachable { ClaimOutcome::Unknown } else { files.claim(&record, missing) };
                if alive {
                    self.later(node, 50..500, Input::Claimed { session, epoch, outcome });
                }
            }
            Op::Load(session, epoch) => {
                let log = (!unreachable).then(|| {
                    let early = self.nodes[node].early.remove(&session).filter(|_| missing.is_some());
                    let found = early.or_else(|| self.shared.sessions.get(&session).map(|files| files.read(epoch)));
                    let (sum, bytes, records) = found.unwrap_or_default();
                    let local = Local::of(sum.clone(), bytes, &records);
                    self.nodes[node].local.insert(session.clone(), local);
                    Box::new(sum)
                });
                self.later(node, 50..500, Input::Loaded { session, epoch, log });
            }
            Op::Append { session, epoch, first, records, offset, looked: false, unknown } => {
                let unknown = unknown || unreachable;
                if !unreachable {
                    let mut bytes = lines(first, &records);
                    if !alive {
                        bytes.truncate(self.rng.random_range(0..=bytes.len()));
                    }
                    self.shared.sessions.entry(session.clone()).or_default().write(epoch, offset, &bytes);
                }
                if alive {
                    let op = Op::Append { session, epoch, first, records, offset, looked: true, unknown };
                    let after = self.span(50..3_000);
                    self.schedule(after, Happening::Op { node, start, op });
                }
            }
            Op::Append { session, epoch, first, records, unknown, .. } => {
                let newest = self.shared.sessions.get(&session).and_then(|files| files.newest());
                let outcome = newest.filter(|newest| newest.epoch > epoch).cloned();
                let outcome = if missing == Some(Missing::LookAfterWriting) { None } else { outcome };
                let unknown = unknown || unreachable;
                let after = self.span(50..500);
                self.schedule(after, Happening::Kept { node, start, session, epoch, first, records, outcome, unknown });
            }
            Op::Tool { session, epoch, call } => {
                if let Some(result) = self.shared.tool.call(&session, epoch, call, missing)
                    && alive
                {
                    self.later(node, 50..2_000, Input::Returned { session, epoch, call, result });
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "they are the fields of one outcome")]
    fn kept(
        &mut self,
        node: usize,
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: &Arc<Vec<Record>>,
        outcome: Option<OwnerRecord>,
        unknown: bool,
    ) {
        let outcome = match outcome {
            _ if unknown => Appended::Unknown,
            Some(newest) => Appended::Fenced(newest),
            None => {
                let bytes = lines(first, records);
                let local = self.nodes[node].local.entry(session.clone()).or_default();
                local.journal.1 += bytes.len();
                bytes.split_inclusive(|byte| *byte == b'\n').for_each(|line| local.sum.add(line));
                local.bytes.extend_from_slice(&bytes);
                local.read(records);
                Appended::Done { len: local.sum.len, digest: local.sum.digest }
            }
        };
        self.feed(node, Input::Appended { session, epoch, first, outcome });
    }

    /// A claim is won: what is on the disk is what the session goes on from.
    fn adopt(&mut self, node: usize, session: &SessionId, epoch: Epoch) {
        let newest = self.shared.sessions.get(session).and_then(|files| files.newest());
        let slot = &mut self.nodes[node];
        let whole = slot.whole.remove(session);
        let moved = newest.is_some_and(|newest| newest.epoch == epoch && matches!(newest.cause, Cause::Moved { .. }));
        if let Some(local) = whole.filter(|_| moved) {
            slot.local.insert(session.clone(), local);
            slot.copies.remove(session);
        }
        if epoch == Epoch(1) {
            slot.local.insert(session.clone(), Local::default());
        }
    }

    fn install(&mut self, node: usize, handoff: HandoffId, session: &SessionId, len: u64, digest: Digest) {
        let copy = self.nodes[node].copies.get(session).cloned().unwrap_or_default();
        let (mut sum, mut records) = (LogSum::default(), Vec::new());
        let good = copy.split_inclusive(|byte| *byte == b'\n').all(|line| match sum.line(line) {
            Ok(record) => {
                records.push(record);
                true
            }
            Err(_) => false,
        });
        let outcome = if good && (sum.len, sum.digest) == (len, digest) {
            self.nodes[node].whole.insert(session.clone(), Local::of(sum.clone(), copy, &records));
            Installed::Done(Box::new(sum))
        } else {
            Installed::Differs
        };
        self.later(node, 100..3_000, Input::Installed { handoff, outcome });
    }

    // ---- the agent

    fn agent(&mut self, node: usize, session: &SessionId, life: u64) {
        let slot = &mut self.nodes[node];
        let Some(agent) = slot.agents.get_mut(session).filter(|agent| agent.life == life) else { return };
        let (epoch, turn, step) = (agent.epoch, agent.turn, agent.step);
        let local = slot.local.entry(session.clone()).or_default();
        let prompt = local.prompts.get(&turn).cloned().unwrap_or_default();
        let calls = prompt.bytes().map(u32::from).sum::<u32>() % 3;
        let session = session.clone();
        if step < calls {
            let call = Call { turn, n: step };
            self.feed(node, Input::Called { session, epoch, call, what: "tool".into() });
        } else {
            let owner = slot.engine.me();
            // Names who answered, so that an answer that was given twice shows.
            let text = format!("{prompt}: turn {}, {owner} in {}", turn.0, epoch.0);
            let outcome = Outcome::Answer(text);
            slot.agents.remove(&session);
            self.feed(node, Input::Ended { session, epoch, turn, outcome, notes: Vec::new(), at_us: 0 });
        }
    }

    fn schedule_agent(&mut self, node: usize, session: &SessionId) {
        let Some(agent) = self.nodes[node].agents.get(session) else { return };
        let (life, start) = (agent.life, self.nodes[node].start);
        let after = self.span(500..60_000);
        self.schedule(after, Happening::Agent { node, start, session: session.clone(), life });
    }

    // ---- effects

    fn perform(&mut self, node: usize, effect: Effect) {
        self.say(|| format!("   {node} -> {effect:?}"));
        self.mix(self.effects << 8 | node as u64);
        let start = self.nodes[node].start;
        let owner = self.nodes[node].engine.me().clone();
        match effect {
            Effect::Reply { to, session, reply } => self.reply(node, to, &session, reply),
            Effect::Send { to, message } => self.send(node, &to, &message),
            Effect::SendChunk { to, handoff, session, offset, len } => {
                let local = self.nodes[node].local.entry(session).or_default();
                let end = ((offset + len) as usize).min(local.bytes.len());
                let mut bytes = local.bytes[(offset as usize).min(end)..end].to_vec();
                if !bytes.is_empty() && self.rng.random_bool(self.weather.damage) {
                    let at = self.rng.random_range(0..bytes.len());
                    bytes[at] ^= 1;
                }
                self.send(node, &to, &Message::Chunk { handoff, offset, bytes: Bytes::from(bytes) });
            }
            Effect::Look { session } => self.operation(node, Op::Look(session)),
            Effect::Claim { record } => {
                if self.missing == Some(Missing::ClaimBeforeReading)
                    && matches!(record.cause, Cause::TakenOver | Cause::Recovered)
                    && let Some(files) = self.shared.sessions.get(&record.session)
                {
                    let early = files.read(record.epoch);
                    self.nodes[node].early.insert(record.session.clone(), early);
                }
                if self.weather.unknown > 0.0 && self.rng.random_bool(self.weather.unknown) {
                    // It happens late, or not at all, and the node is not told.
                    let (session, epoch) = (record.session.clone(), record.epoch);
                    self.later(node, 500..2_000, Input::Claimed { session, epoch, outcome: ClaimOutcome::Unknown });
                    if self.rng.random_bool(0.6) {
                        let late = self.span(0..4_000_000);
                        self.schedule(late, Happening::Op { node, start: u32::MAX, op: Op::Claim(record) });
                    }
                } else {
                    self.operation(node, Op::Claim(record));
                }
            }
            Effect::Load { session, epoch } => self.operation(node, Op::Load(session, epoch)),
            Effect::Append { session, epoch, first, records } => {
                self.judge.acts(&session, epoch, &owner);
                let unknown = self.weather.unknown > 0.0 && self.rng.random_bool(self.weather.unknown);
                let local = self.nodes[node].local.entry(session.clone()).or_default();
                if local.journal.0 != epoch {
                    local.journal = (epoch, 0);
                }
                let offset = local.journal.1;
                let op = Op::Append { session, epoch, first, records, offset, looked: false, unknown };
                self.operation(node, op);
            }
            Effect::Park { session, epoch, handoff } => {
                self.nodes[node].agents.remove(&session);
                self.later(node, 100..5_000, Input::Parked { session, epoch, handoff });
            }
            Effect::Reserve { handoff, session, fresh, .. } => {
                let copy = self.nodes[node].copies.entry(session).or_default();
                if fresh {
                    copy.clear();
                }
                let have = copy.len() as u64;
                self.later(node, 50..1_000, Input::Reserved { handoff, outcome: Reserved::Room(have) });
            }
            Effect::Write { handoff, session, offset, bytes } => {
                let copy = self.nodes[node].copies.entry(session).or_default();
                copy.truncate(offset as usize);
                copy.extend_from_slice(&bytes);
                let len = Some(copy.len() as u64);
                self.later(node, 50..1_000, Input::Written { handoff, len });
            }
            Effect::Install { handoff, session, len, digest } => self.install(node, handoff, &session, len, digest),
            // Kept, so that the next attempt need not begin at the beginning.
            Effect::Discard { .. } | Effect::Suspect { .. } => {}
            Effect::Run { session, epoch, turn, .. } => {
                self.judge.acts(&session, epoch, &owner);
                self.lives += 1;
                let agent = Agent { life: self.lives, epoch, turn, step: 0 };
                self.nodes[node].agents.insert(session.clone(), agent);
                self.schedule_agent(node, &session);
            }
            Effect::Call { session, epoch, call } => {
                self.judge.acts(&session, epoch, &owner);
                let after = self.span(100..200_000);
                self.schedule(after, Happening::Op { node, start, op: Op::Tool { session, epoch, call } });
            }
            Effect::Resume { session, epoch, call } => {
                self.judge.acts(&session, epoch, &owner);
                if let Some(agent) = self.nodes[node].agents.get_mut(&session).filter(|agent| agent.turn == call.turn)
                    && agent.step == call.n
                {
                    agent.step += 1;
                    self.schedule_agent(node, &session);
                }
            }
            Effect::Stop { session, .. } => {
                self.nodes[node].agents.remove(&session);
            }
            Effect::Event(event) => {
                if let Event::Serving { session, .. } = &event {
                    self.serving.insert(session.clone(), node);
                }
                self.judge.event(self.now, &owner, &event);
            }
        }
    }

    fn operation(&mut self, node: usize, op: Op) {
        let (after, start) = (self.span(100..3_000), self.nodes[node].start);
        self.schedule(after, Happening::Op { node, start, op });
    }

    fn send(&mut self, from: usize, to: &NodeId, message: &Message) {
        let Some(to) = self.nodes.iter().position(|node| node.id == *to) else { return };
        if self.cut.contains(&(from, to)) || self.rng.random_bool(self.weather.loss) {
            return;
        }
        let times = if self.rng.random_bool(self.weather.twice) { 2 } else { 1 };
        for _ in 0..times {
            let mut after = self.span(50..self.weather.way.max(51));
            if self.weather.twice > 0.0 && self.rng.random_bool(0.01) {
                // An old one turns up when nobody thinks of it.
                after += self.span(0..20_000_000);
            }
            self.schedule(after, Happening::Said { from, to, message: message.clone() });
        }
    }

    fn reply(&mut self, node: usize, to: ReplyTo, session: &SessionId, reply: Reply) {
        let Some((client, request)) = self.replies.get(&to).cloned() else { return };
        let owner = self.nodes[node].engine.me().clone();
        match &reply {
            Reply::Accepted { turn, epoch } => {
                self.judge.acts(session, *epoch, &owner);
                self.judge.acknowledges(session, &request, *turn);
            }
            Reply::Answer { turn, epoch } => {
                self.judge.acts(session, *epoch, &owner);
                let outcome = self.nodes[node].local.get(session).and_then(|local| local.outcomes.get(turn)).cloned();
                let lost = Outcome::Answer("nothing on this node's disk".into());
                self.judge.answers(session, &request, *turn, &outcome.unwrap_or(lost));
            }
            _ => {}
        }
        if !self.rng.random_bool(self.weather.loss) {
            let after = self.span(50..self.weather.way.max(51));
            self.schedule(after, Happening::Heard { client, request, reply });
        }
    }
}
