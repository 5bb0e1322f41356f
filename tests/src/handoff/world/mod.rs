//! The simulated world: virtual time, one queue of events, and nodes that are the production core and nothing else.
//!
//! Nothing here looks at a clock or at global randomness, so that a seed is a whole run. A node may be killed between any two
//! effects; what it had asked of the file system then happens, happens in part, or does not.

mod effects;
mod faults;
mod files;
mod parts;
mod talk;
mod time;
mod weather;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use drover_handoff::core::{Effect, Engine, Input, NodeId, Own, Owner, Peer, PeerState, ReplyTo, Settings, Why};
use drover_types::{RequestId, SessionId};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use self::parts::{Happening, Node, Process, Scheduled};
use super::clients::Client;
use super::judge::Judge;
use super::shared::{Missing, Shared};

pub use self::weather::{Fault, Weather};

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

    /// The part of the protocol that was taken away.
    pub fn missing(&self) -> Option<Missing> {
        self.missing
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

    /// Asks a node to move a session.
    pub fn request(&mut self, node: usize, session: &SessionId, to: Option<usize>) {
        let to = to.map(|to| self.nodes[to].id.clone());
        let (session, start) = (session.clone(), self.nodes[node].start);
        let input = Input::Move { session, to, why: Why::Operator };
        self.schedule(Duration::ZERO, Happening::Input { node, start, input });
    }

    /// Asks the node that serves a session, or another one, to end one of its turns early: one that a client waits for, or whichever runs.
    pub fn interrupt(&mut self, node: usize, session: &SessionId) {
        let node = self.server(session).filter(|_| self.rng.random_bool(0.9)).unwrap_or(node);
        let of = self.clients.iter().filter(|client| client.session == *session);
        let pending: Vec<RequestId> =
            of.flat_map(|client| client.pending.iter().map(|pending| pending.request.clone())).collect();
        let request = match pending.len() {
            0 => None,
            all => Some(pending[self.rng.random_range(0..all)].clone()).filter(|_| self.rng.random_bool(0.7)),
        };
        let (session, start) = (session.clone(), self.nodes[node].start);
        let input = Input::Interrupt { session, request, reply: ReplyTo(u64::MAX) };
        self.schedule(Duration::ZERO, Happening::Input { node, start, input });
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
}
