//! The simulated world: virtual time, one queue of events, and nodes that are the production core and nothing else.
//!
//! Nothing here looks at a clock or at global randomness, so that a seed is a whole run: it gives the same events at the same virtual
//! times, which [`World::trace`] sums up in one number.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use drover_membership::core::{
    Command, Core, Effect, Engine, Event, Input, Message, NodeKey, Outcome, Record, Reply, Request, Settings,
    SignedRecord, Signer, Snapshot, Time, Untrusted, Verifier,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::invariants::Judge;
use super::network::{Network, Weather};

/// Headers of Ethernet, IP and UDP, and what sealing adds: envelope 19, tag 16.
const DATAGRAM_OVERHEAD: usize = 42 + 19 + 16;
/// A stream whose other end is silent is given up after this.
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);
/// Datagrams that wait at a stopped process; more are dropped, as by a socket buffer.
const SOCKET_BUFFER: usize = 512;
/// Wall-clock time of the beginning.
const EPOCH_US: u64 = 1_790_000_000_000_000;

/// How a node ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its process is killed: the host refuses connections at once.
    Process,
    /// Its host goes silent.
    Host,
}

#[derive(Debug)]
enum Happening {
    Packet { from: usize, from_boot: u64, to: usize, to_boot: u64, message: Message },
    Hello { from: usize, to: usize, leg: u8, record: Arc<SignedRecord> },
    Asked { from: usize, to: usize, id: u32, request: Request },
    Ended { to: usize, start: u32, id: u32, outcome: Outcome },
    Timer { node: usize, start: u32 },
    Wake { node: usize, start: u32 },
}

struct Scheduled {
    at: Time,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Running,
    /// Stopped until its wake; what comes in queues up.
    Stopped,
    /// Ended, as seen by those who connect.
    Ended(End),
}

struct Node {
    core: Core,
    key: NodeKey,
    process: Process,
    /// Counts starts, so that what was meant for an earlier process does not reach a later one.
    start: u32,
    timer: Time,
    waiting: VecDeque<Happening>,
    /// Boots of nodes that it has met and did not list, or not so: under these it talks to them.
    met: BTreeMap<NodeKey, u64>,
    snapshot: Option<Snapshot>,
    /// How far its wall clock is off, in microseconds.
    clock: i64,
    settings: Settings,
    left: bool,
}

/// What passed over the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Datagrams sent.
    pub datagrams: u64,
    /// Their bytes with all headers.
    pub bytes: u64,
    /// Requests over a stream.
    pub streams: u64,
}

/// The simulated world.
pub struct World {
    /// Virtual time.
    pub now: Time,
    /// Who can reach whom, and how well.
    pub network: Network,
    /// Judges everything that happens here.
    pub judge: Judge,
    /// What has passed over the network.
    pub traffic: Traffic,
    /// Randomness for those who write scenarios.
    pub rng: SmallRng,
    settings: Settings,
    seed: u64,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order: u64,
    trace: u64,
    by_key: BTreeMap<NodeKey, usize>,
    effects: Vec<Effect>,
    /// A large mass join does not keep what every node told of every other.
    pub judged: bool,
    /// Called with every effect, for whoever wants to see what a seed does.
    pub watch: Option<fn(Time, usize, &Effect)>,
    /// How many joins each node has told of, less the ends.
    pub seen: Vec<usize>,
}

struct Seal {
    cert: Arc<[u8]>,
}

/// Stands in for a signature: nobody else in the simulation makes records for a node.
fn fake_signature(record: &Record) -> [u8; 64] {
    let mut signature = [0; 64];
    signature[..8].copy_from_slice(&record.key().0.to_be_bytes());
    signature[8..16].copy_from_slice(&record.boot.to_be_bytes());
    signature[16..20].copy_from_slice(&record.incarnation.to_be_bytes());
    signature
}

impl Signer for Seal {
    fn sign(&mut self, record: Record) -> SignedRecord {
        let signature = fake_signature(&record);
        SignedRecord::new(record, signature, Arc::clone(&self.cert))
    }
}

impl Verifier for Seal {
    fn check(&mut self, record: &SignedRecord) -> Result<(), Untrusted> {
        let claimed = (&record.signature[8..16], &record.signature[16..20]);
        let real = (&record.record.boot.to_be_bytes()[..], &record.record.incarnation.to_be_bytes()[..]);
        if claimed == real { Ok(()) } else { Err(Untrusted::BadSignature) }
    }
}

impl World {
    /// An empty world.
    pub fn new(seed: u64, weather: Weather, settings: Settings) -> Self {
        Self {
            now: Time::ZERO,
            network: Network::new(seed, weather),
            judge: Judge::new(),
            traffic: Traffic::default(),
            rng: SmallRng::seed_from_u64(seed),
            settings,
            seed,
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
            order: 0,
            trace: seed,
            by_key: BTreeMap::new(),
            effects: Vec::new(),
            judged: true,
            watch: None,
            seen: Vec::new(),
        }
    }

    /// Sums up all that has happened.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// How many nodes there ever were.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Nobody yet.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Nodes whose process is there, stopped or not.
    pub fn alive(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.is_alive(*node)).collect()
    }

    /// How many processes are stopped.
    pub fn stopped(&self) -> usize {
        self.nodes.iter().filter(|node| node.process == Process::Stopped).count()
    }

    /// Its process is there, stopped or not.
    pub fn is_alive(&self, node: usize) -> bool {
        !matches!(self.nodes[node].process, Process::Ended(_)) && !self.nodes[node].left
    }

    /// Its process runs.
    pub fn is_running(&self, node: usize) -> bool {
        self.nodes[node].process == Process::Running && !self.nodes[node].left
    }

    /// Where a node takes datagrams.
    pub fn addr(node: usize) -> SocketAddr {
        let [_, high, middle, low] = (node as u32).to_be_bytes();
        SocketAddr::from((Ipv4Addr::new(10, high, middle, low), 7946))
    }

    fn at(addr: SocketAddr) -> Option<usize> {
        match addr.ip() {
            std::net::IpAddr::V4(ip) => {
                let [_, high, middle, low] = ip.octets();
                Some(u32::from_be_bytes([0, high, middle, low]) as usize)
            }
            std::net::IpAddr::V6(_) => None,
        }
    }

    fn record(node: usize, boot: u64, stamp: u64) -> Record {
        Record {
            node_id: format!("swarm-1/{node}"),
            boot,
            incarnation: 0,
            addr: Self::addr(node),
            rpc_port: 7954,
            protocol: 1,
            region: String::new(),
            capabilities: BTreeMap::from([("models".into(), "m".into())]),
            labels: BTreeMap::from([("swarm_id".into(), "swarm-1".into()), ("node_index".into(), node.to_string())]),
            dh_public: [0; 32],
            leaving: false,
            timestamp_us: stamp,
        }
    }

    fn core(&mut self, node: usize, boot: u64, settings: &Settings, seeds: Vec<SocketAddr>) -> Core {
        // As long as a real certificate of a node.
        let cert: Arc<[u8]> = Arc::from(vec![node as u8; 380]);
        let seed = self.seed ^ (node as u64).wrapping_mul(0x9e37_79b9) ^ boot;
        let record = Self::record(node, boot, EPOCH_US + self.now.0);
        let (signer, verifier) = (Box::new(Seal { cert: Arc::clone(&cert) }), Box::new(Seal { cert }));
        Core::new(self.now, settings.clone(), record, seeds, signer, verifier, seed).expect("record within bounds")
    }

    /// Starts a new node.
    pub fn start(&mut self, seeds: &[usize]) -> usize {
        let settings = self.settings.clone();
        self.start_with(seeds, settings)
    }

    /// Starts a new node with settings of its own.
    pub fn start_with(&mut self, seeds: &[usize], settings: Settings) -> usize {
        let node = self.nodes.len();
        let boot = EPOCH_US + self.now.0 + node as u64;
        let core = self.core(node, boot, &settings, seeds.iter().map(|seed| Self::addr(*seed)).collect());
        let key = core.local().key;
        self.by_key.insert(key, node);
        self.network.grow();
        self.nodes.push(Node {
            core,
            key,
            process: Process::Running,
            start: 0,
            timer: Time::FAR,
            waiting: VecDeque::new(),
            met: BTreeMap::new(),
            snapshot: None,
            clock: 0,
            settings,
            left: false,
        });
        self.seen.push(0);
        if self.judged {
            self.judge.started(self.now, node, key, boot);
        }
        self.feed(node, Input::Timer);
        node
    }

    /// Starts a node's process again under the same id; from its snapshot, or with a seed and whatever its clock says.
    pub fn restart(&mut self, node: usize, with_snapshot: bool, seeds: &[usize]) {
        let snapshot = self.nodes[node].snapshot.take().filter(|_| with_snapshot);
        let clock = (EPOCH_US + self.now.0).saturating_add_signed(self.nodes[node].clock);
        let boot = Snapshot::next_boot(snapshot.as_ref(), clock);
        let mut seeds: Vec<SocketAddr> = seeds.iter().map(|seed| Self::addr(*seed)).collect();
        seeds.extend(snapshot.iter().flat_map(|snapshot| &snapshot.members).map(|(_, addr)| *addr));
        let settings = self.nodes[node].settings.clone();
        let core = self.core(node, boot, &settings, seeds);
        let now = self.now;
        let old = &mut self.nodes[node];
        old.core = core;
        old.process = Process::Running;
        old.start += 1;
        old.timer = Time::FAR;
        old.waiting.clear();
        old.met.clear();
        old.left = false;
        let key = old.key;
        self.judge.started(now, node, key, boot);
        self.feed(node, Input::Timer);
    }

    /// Sets a node's wall clock off. Its protocol must not notice.
    pub fn set_clock(&mut self, node: usize, off: i64) {
        self.nodes[node].clock = off;
    }

    /// Kills a node; all survivors must tell so within `bound`.
    pub fn kill(&mut self, node: usize, end: End, bound: Duration) {
        self.nodes[node].process = Process::Ended(end);
        self.nodes[node].waiting.clear();
        self.judge.killed(self.now, node, bound);
        self.mix(&[0x6b11, node as u64, self.now.0]);
    }

    /// Stops a node's process for a while.
    pub fn pause(&mut self, node: usize, span: Duration) {
        if self.nodes[node].process != Process::Running {
            return;
        }
        self.nodes[node].process = Process::Stopped;
        self.judge.stopped(self.now, node);
        let start = self.nodes[node].start;
        self.schedule(self.now + span, Happening::Wake { node, start });
    }

    /// Has a node say good-bye.
    pub fn leave(&mut self, node: usize) {
        self.judge.leaving(self.now, node);
        self.feed(node, Input::Command(Command::Leave));
    }

    /// Hands a node a command.
    pub fn command(&mut self, node: usize, command: Command) {
        self.feed(node, Input::Command(command));
    }

    /// Hands a node something made up, as an attacker or an old datagram would.
    pub fn inject(&mut self, node: usize, input: Input) {
        self.feed(node, input);
    }

    /// A node's own record.
    pub fn local(&self, node: usize) -> Arc<SignedRecord> {
        Arc::clone(self.nodes[node].core.local())
    }

    /// What a node has as another's record.
    pub fn known(&self, node: usize, of: usize) -> Option<Arc<SignedRecord>> {
        self.nodes[node].core.record(self.nodes[of].key).cloned()
    }

    /// Lets virtual time pass.
    pub fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse(next)) = self.queue.peek()
            && next.at <= end
        {
            self.step();
        }
        self.now = end;
        if self.judged {
            self.judge.settle(end);
        }
    }

    /// Lets virtual time pass until something holds, looked at every `tick`. Says how long it took.
    pub fn run_until(
        &mut self,
        tick: Duration,
        most: Duration,
        mut holds: impl FnMut(&Self) -> bool,
    ) -> Option<Duration> {
        let start = self.now;
        while self.now.since(start) <= most {
            if holds(self) {
                return Some(self.now.since(start));
            }
            self.run_for(tick);
        }
        None
    }

    fn step(&mut self) {
        let Some(Reverse(Scheduled { at, what, .. })) = self.queue.pop() else { return };
        self.now = self.now.max(at);
        match what {
            Happening::Timer { node, start } => {
                let slot = &mut self.nodes[node];
                if slot.start != start || slot.timer != at || slot.process != Process::Running {
                    return;
                }
                slot.timer = Time::FAR;
                self.feed(node, Input::Timer);
            }
            Happening::Wake { node, start } => self.wake(node, start),
            other => self.arrive(other),
        }
    }

    fn wake(&mut self, node: usize, start: u32) {
        if self.nodes[node].start != start || self.nodes[node].process != Process::Stopped {
            return;
        }
        self.nodes[node].process = Process::Running;
        self.nodes[node].timer = Time::FAR;
        self.judge.resumed(self.now, node);
        // A real runtime polls timers and sockets in no particular order.
        let timer_first = self.rng.random_bool(0.5);
        if timer_first {
            self.feed(node, Input::Timer);
        }
        for what in std::mem::take(&mut self.nodes[node].waiting) {
            self.arrive(what);
        }
        if !timer_first {
            self.feed(node, Input::Timer);
        }
    }

    fn arrive(&mut self, what: Happening) {
        let to = match &what {
            Happening::Packet { to, .. } | Happening::Hello { to, .. } | Happening::Asked { to, .. } => *to,
            Happening::Ended { to, start, .. } => {
                if self.nodes[*to].start != *start {
                    return;
                }
                *to
            }
            Happening::Timer { .. } | Happening::Wake { .. } => return,
        };
        match self.nodes[to].process {
            Process::Running => self.take(what),
            Process::Stopped => {
                if self.nodes[to].waiting.len() < SOCKET_BUFFER || !matches!(what, Happening::Packet { .. }) {
                    self.nodes[to].waiting.push_back(what);
                }
            }
            Process::Ended(end) => {
                // Killed while the request was on its way.
                if let Happening::Asked { from, id, .. } = what {
                    self.fail_stream(from, id, end);
                }
            }
        }
    }

    fn take(&mut self, what: Happening) {
        match what {
            Happening::Packet { from, from_boot, to, to_boot, message } => {
                let receiver = &self.nodes[to];
                let key = self.nodes[from].key;
                let listed = receiver.core.record(key).map(|record| record.record.boot);
                let known = listed == Some(from_boot) || receiver.met.get(&key) == Some(&from_boot);
                // Whoever does not know the other's boot cannot open what it sent.
                if known && receiver.core.local().record.boot == to_boot {
                    self.feed(to, Input::Datagram { from: key, message });
                }
            }
            Happening::Hello { from, to, leg, record } => {
                if leg < 3 {
                    let own = Arc::clone(self.nodes[to].core.local());
                    self.hello(to, from, leg + 1, &own);
                }
                // Only an echo proves that the other is there: the first leg alone is nothing.
                if leg > 1 {
                    let receiver = &mut self.nodes[to];
                    let listed = receiver.core.record(record.key).map(|known| known.record.boot);
                    if listed != Some(record.record.boot) {
                        receiver.met.insert(record.key, record.record.boot);
                    }
                    self.feed(to, Input::Contact { record });
                }
            }
            Happening::Asked { from, to, id, request } => {
                let key = self.nodes[from].key;
                let input = Input::StreamAsked { id: (from as u64) << 32 | u64::from(id), from: key, request };
                self.feed(to, input);
            }
            Happening::Ended { to, id, outcome, .. } => self.feed(to, Input::StreamEnded { id, outcome }),
            Happening::Timer { .. } | Happening::Wake { .. } => {}
        }
    }

    fn feed(&mut self, node: usize, input: Input) {
        let mut effects = std::mem::take(&mut self.effects);
        self.nodes[node].core.handle(self.now, input, &mut effects);
        for effect in effects.drain(..) {
            self.perform(node, effect);
        }
        self.effects = effects;
        let deadline = self.nodes[node].core.deadline();
        let slot = &mut self.nodes[node];
        if deadline < slot.timer {
            slot.timer = deadline;
            let start = slot.start;
            self.schedule(deadline.max(self.now), Happening::Timer { node, start });
            self.nodes[node].timer = deadline.max(self.now);
        }
    }

    fn schedule(&mut self, at: Time, what: Happening) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { at, order: self.order, what }));
    }

    fn mix(&mut self, parts: &[u64]) {
        for part in parts {
            self.trace = (self.trace ^ part).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        }
    }

    fn perform(&mut self, node: usize, effect: Effect) {
        let now = self.now;
        if let Some(watch) = self.watch {
            watch(now, node, &effect);
        }
        match effect {
            Effect::Send { to, message } => self.send(node, to, &message),
            Effect::Hello { addr } => {
                self.mix(&[1, node as u64, now.0]);
                if let Some(to) = Self::at(addr).filter(|to| *to < self.nodes.len() && *to != node) {
                    let own = Arc::clone(self.nodes[node].core.local());
                    self.hello(node, to, 1, &own);
                }
            }
            Effect::Stream { id, to, request } => {
                self.traffic.streams += 1;
                self.mix(&[2, node as u64, now.0, to.0]);
                if let Some(to) = self.by_key.get(&to).copied() {
                    self.open_stream(node, to, id, request);
                }
            }
            Effect::Reply { id, reply } => {
                let (to, id) = ((id >> 32) as usize, id as u32);
                let outcome = match reply {
                    Reply::Pulled(answer) => Outcome::Pulled(answer),
                    Reply::Pushed => Outcome::Pushed,
                    Reply::Pong => Outcome::Pong,
                };
                if self.network.joined(node, to) {
                    self.end_stream(to, id, outcome, Duration::ZERO);
                }
            }
            Effect::Event(event) => {
                let number = match &event {
                    Event::Joined(_) => 1,
                    Event::Left { .. } => 2,
                    Event::Suspect(_) => 3,
                    Event::Alive(_) => 4,
                    Event::Updated(_) => 5,
                    Event::Load { .. } => 6,
                };
                self.mix(&[3, node as u64, now.0, number]);
                match &event {
                    Event::Joined(_) => self.seen[node] += 1,
                    Event::Left { .. } => self.seen[node] = self.seen[node].saturating_sub(1),
                    _ => {}
                }
                if self.judged {
                    self.judge.event(now, node, &event);
                }
            }
            Effect::Local(record) => {
                if self.judged {
                    self.judge.reboot(node, record.record.boot);
                }
            }
            Effect::Persist => {
                if self.judged {
                    self.nodes[node].snapshot = Some(self.nodes[node].core.snapshot());
                }
            }
            Effect::LeaveDone => {
                self.nodes[node].left = true;
                self.nodes[node].process = Process::Ended(End::Process);
                self.judge.end(now, node);
            }
            Effect::Learn(record) => {
                if let Some(boot) = self.nodes[node].met.get_mut(&record.key) {
                    *boot = record.record.boot;
                }
            }
            Effect::Forget(_) | Effect::Note(_) => {}
        }
    }

    fn send(&mut self, from: usize, to: NodeKey, message: &Message) {
        self.traffic.datagrams += 1;
        self.traffic.bytes += (DATAGRAM_OVERHEAD + size(message)) as u64;
        let kind = match message {
            Message::Ping { digest, .. } | Message::Ack { digest, .. } => *digest,
            Message::Gossip { rumors } => rumors.len() as u64,
            _ => 0,
        };
        self.mix(&[4, from as u64, self.now.0, to.0, kind]);
        let sender = &self.nodes[from];
        let listed = sender.core.record(to).map(|record| record.record.boot);
        let Some(to_boot) = sender.met.get(&to).copied().or(listed) else { return };
        let from_boot = sender.core.local().record.boot;
        let Some(to) = self.by_key.get(&to).copied() else { return };
        let arrivals = self.network.datagram(from, to, &mut self.rng);
        for delay in arrivals {
            let message = message.clone();
            self.schedule(self.now + delay, Happening::Packet { from, from_boot, to, to_boot, message });
        }
    }

    fn hello(&mut self, from: usize, to: usize, leg: u8, record: &Arc<SignedRecord>) {
        self.traffic.datagrams += 1;
        self.traffic.bytes += (DATAGRAM_OVERHEAD + 600) as u64;
        for delay in self.network.datagram(from, to, &mut self.rng) {
            let record = Arc::clone(record);
            self.schedule(self.now + delay, Happening::Hello { from, to, leg, record });
        }
    }

    fn open_stream(&mut self, from: usize, to: usize, id: u32, request: Request) {
        if !self.network.joined(from, to) {
            self.end_stream(from, id, Outcome::Silent, STREAM_TIMEOUT);
            return;
        }
        if let Process::Ended(end) = self.nodes[to].process {
            self.fail_stream(from, id, end);
            return;
        }
        // Connection and handshake before the request.
        let handshake = self.network.way(&mut self.rng) * 4;
        let arrival = handshake + self.network.way(&mut self.rng);
        self.schedule(self.now + arrival, Happening::Asked { from, to, id, request });
        self.end_stream(from, id, Outcome::Silent, STREAM_TIMEOUT);
    }

    fn fail_stream(&mut self, from: usize, id: u32, end: End) {
        match end {
            End::Process => {
                let way = self.network.way(&mut self.rng);
                self.end_stream(from, id, Outcome::Refused, way);
            }
            End::Host => self.end_stream(from, id, Outcome::Silent, STREAM_TIMEOUT),
        }
    }

    fn end_stream(&mut self, to: usize, id: u32, outcome: Outcome, after: Duration) {
        let way = self.network.way(&mut self.rng);
        let start = self.nodes[to].start;
        self.schedule(self.now + after + way, Happening::Ended { to, start, id, outcome });
    }

    /// Sets up the rings of keys.
    pub fn set_keys(&mut self, node: usize, seals: u8, opens: &[u8]) {
        self.network.set_keys(node, seals, opens.iter().copied().collect::<BTreeSet<_>>());
    }
}

/// Bytes of a message, as the codec will make them.
fn size(message: &Message) -> usize {
    use drover_membership::core::Rumor;
    let body = |rumors: &[Rumor]| 2 + rumors.iter().map(Rumor::size).sum::<usize>();
    match message {
        Message::Ping { rumors, .. } | Message::Ack { rumors, .. } => 3 + 8 + 4 + body(rumors),
        Message::Relay { .. } | Message::RelayAck { .. } | Message::Nack { .. } => 3 + 8,
        Message::Gossip { rumors } => body(rumors),
        Message::Load { .. } => 4,
    }
}
