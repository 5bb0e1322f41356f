//! The other nodes as the membership tells of them: where each can be reached, and what the core has to know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_membership::core::NodeKey;
use drover_membership::core::placement::{Item, Slot, place_bounded, rank};
use drover_proto::membership::{Member, MemberState};
use drover_types::SessionId;
use tokio::sync::watch;

use crate::core::{Burden, NodeId, Own, Peer, PeerState};

/// Capability of a node whose sessions can be reached: the port.
pub(crate) const PORT: &str = "handoff";
/// Capability: which agents it runs for sessions.
pub(crate) const AGENTS: &str = "agents";
/// Capability: which shared file system it keeps its sessions on.
pub(crate) const STORE: &str = "sessions";
/// Capability of a node that is emptied and takes no sessions.
pub(crate) const DRAINING: &str = "draining";
/// Nodes that are gone and still remembered as such.
const GONE: usize = 10_000;
/// How much more than its share of the load a node may get before new sessions go to the next.
const SLACK_PERCENT: u32 = 25;

/// One node.
#[derive(Debug, Clone)]
struct Known {
    addr: Option<SocketAddr>,
    peer: Peer,
    /// It shares our file system and runs sessions.
    able: bool,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<NodeId, Known>,
    own: Own,
    store: String,
    /// The membership has had the time to hear of everybody.
    settled: bool,
    /// Nodes that the core gave up on, to be reported.
    suspects: BTreeSet<NodeId>,
}

/// What is known of the others. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct View {
    me: NodeId,
    inner: Arc<Mutex<Inner>>,
    changed: watch::Sender<u64>,
}

impl View {
    pub(crate) fn new(me: NodeId) -> Self {
        Self { me, inner: Arc::default(), changed: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts up with every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// What this node is from the start.
    pub(crate) fn begin(&self, store: String, agents: impl Iterator<Item = &'static str>) {
        let mut inner = self.lock();
        inner.store = store;
        inner.own.capabilities = agents.map(|agent| format!("{AGENTS}={agent}")).collect();
    }

    /// A member is new or has changed.
    pub(crate) fn member(&self, member: &Member) {
        let node = NodeId::new(&member.node_id);
        let mut inner = self.lock();
        if node == self.me {
            inner.own.load = member.load_score.unwrap_or(0.0);
            let told = capabilities(member);
            inner.own.capabilities.extend(told);
        } else {
            let state = match member.state() {
                MemberState::Alive | MemberState::Unspecified => PeerState::Alive,
                MemberState::Suspect => PeerState::Suspect,
                MemberState::Dead | MemberState::Left => PeerState::Gone,
            };
            let port = member.capabilities.get(PORT).and_then(|port| port.parse::<u16>().ok());
            let ip = member.addr.parse::<IpAddr>().ok();
            let able = port.is_some()
                && member.capabilities.get(STORE) == Some(&inner.store)
                && !member.capabilities.contains_key(DRAINING);
            let addr = ip.zip(port).map(|(ip, port)| SocketAddr::new(ip, port));
            let load = member.load_score.unwrap_or(0.0);
            let (overloaded, capabilities) = (member.overloaded, capabilities(member));
            let peer = Peer { node: node.clone(), state, load, overloaded, capabilities };
            inner.nodes.insert(node, Known { addr, peer, able });
        }
        drop(inner);
        self.tell();
    }

    /// Every member as it is now.
    pub(crate) fn snapshot(&self, members: &[Member]) {
        let present: BTreeSet<NodeId> = members.iter().map(|member| NodeId::new(&member.node_id)).collect();
        let missing: Vec<NodeId> = self.lock().nodes.keys().filter(|node| !present.contains(*node)).cloned().collect();
        for node in missing {
            self.removed(&node);
        }
        for member in members {
            self.member(member);
        }
    }

    /// The membership has forgotten a node: it is gone, and what it had is for others.
    pub(crate) fn removed(&self, node: &NodeId) {
        let mut inner = self.lock();
        if let Some(known) = inner.nodes.get_mut(node) {
            known.peer.state = PeerState::Gone;
        }
        if inner.nodes.len() > GONE {
            inner.nodes.retain(|_, known| known.peer.state != PeerState::Gone);
        }
        drop(inner);
        self.tell();
    }

    /// The membership has been joined for long enough: whom it does not know is gone.
    pub(crate) fn settle(&self) {
        self.lock().settled = true;
        self.tell();
    }

    /// Whether it has.
    pub(crate) fn is_settled(&self) -> bool {
        self.lock().settled
    }

    /// A node owns something. One that a settled membership has never heard of is gone. True when that is news.
    pub(crate) fn owner(&self, node: &NodeId) -> bool {
        let mut inner = self.lock();
        if *node == self.me || !inner.settled || inner.nodes.contains_key(node) {
            return false;
        }
        let (node, capabilities) = (node.clone(), BTreeSet::new());
        let peer = Peer { node: node.clone(), state: PeerState::Gone, load: 0.0, overloaded: false, capabilities };
        inner.nodes.insert(node, Known { addr: None, peer, able: false });
        drop(inner);
        self.tell();
        true
    }

    /// For the core.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        let inner = self.lock();
        // A node that cannot take a session stays known, so that one that is gone is known as such.
        let fit = |known: &Known| {
            let mut peer = known.peer.clone();
            if !known.able {
                peer.overloaded = true;
                peer.load = 1.0;
            }
            peer
        };
        inner.nodes.values().map(fit).collect()
    }

    /// For the core.
    pub(crate) fn own(&self) -> Own {
        self.lock().own.clone()
    }

    /// Takes no sessions any more, or takes them again.
    pub(crate) fn leaving(&self, leaving: bool) {
        self.lock().own.leaving = leaving;
        self.tell();
    }

    /// Where a node's sessions are reached.
    pub(crate) fn addr(&self, node: &NodeId) -> Option<SocketAddr> {
        self.lock().nodes.get(node).and_then(|known| known.addr)
    }

    /// Whether a node is gone.
    pub(crate) fn is_gone(&self, node: &NodeId) -> bool {
        self.lock().nodes.get(node).is_some_and(|known| known.peer.state == PeerState::Gone)
    }

    /// Nodes that are gone.
    pub(crate) fn gone(&self) -> BTreeSet<NodeId> {
        let inner = self.lock();
        let gone = inner.nodes.values().filter(|known| known.peer.state == PeerState::Gone);
        gone.map(|known| known.peer.node.clone()).collect()
    }

    /// Nodes that are alive and run sessions.
    pub(crate) fn able(&self) -> Vec<NodeId> {
        let inner = self.lock();
        let able = inner.nodes.values().filter(|known| known.able && known.peer.state == PeerState::Alive);
        able.map(|known| known.peer.node.clone()).collect()
    }

    /// Whether somebody else who runs sessions has too much to do.
    pub(crate) fn is_anybody_over(&self) -> bool {
        let alive = |known: &&Known| known.able && known.peer.state == PeerState::Alive;
        self.lock().nodes.values().filter(alive).any(|known| known.peer.overloaded)
    }

    /// All who run sessions on this file system, this node too.
    pub(crate) fn burdens(&self, own_over: bool) -> Vec<Burden> {
        let inner = self.lock();
        let own = &inner.own;
        let me = Burden { node: self.me.clone(), load: own.load, over: own_over, open: !own.leaving };
        let alive = inner.nodes.values().filter(|known| known.able && known.peer.state == PeerState::Alive);
        let others = alive.map(|Known { peer, .. }| Burden {
            node: peer.node.clone(),
            load: peer.load,
            over: peer.overloaded,
            open: true,
        });
        others.chain([me]).collect()
    }

    /// A node keeps failing.
    pub(crate) fn suspect(&self, node: &NodeId) {
        self.lock().suspects.insert(node.clone());
        self.tell();
    }

    /// Takes those that are to be reported.
    pub(crate) fn take_suspects(&self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.lock().suspects)
    }

    /// Where a new session is to be opened: the nodes it may go to, best first. By rendezvous hash over those that have what it
    /// needs, passing over whoever is overloaded or has more than its share of the load.
    pub(crate) fn place(&self, session: &SessionId, needs: &BTreeSet<String>, threshold: f64) -> Vec<NodeId> {
        let inner = self.lock();
        let fits = |capabilities: &BTreeSet<String>| needs.is_subset(capabilities);
        let mut all: BTreeMap<NodeKey, (NodeId, u64)> = BTreeMap::new();
        let mut add = |node: &NodeId, load: f64| {
            // Everybody begins with the same, so that between two nodes that do next to nothing the hash alone decides.
            all.insert(NodeKey::of(node.as_str()), (node.clone(), 1000 + (load.clamp(0.0, 1.0) * 1000.0) as u64));
        };
        if !inner.own.leaving && fits(&inner.own.capabilities) && inner.own.load < threshold {
            add(&self.me, inner.own.load);
        }
        for known in inner.nodes.values() {
            let peer = &known.peer;
            let free = peer.state == PeerState::Alive && (threshold > 1.0 || !peer.overloaded) && peer.load < threshold;
            if known.able && free && fits(&peer.capabilities) {
                add(&peer.node, peer.load);
            }
        }
        let item = Item::new("session", session.as_str());
        let slots = || all.keys().copied().map(Slot::even);
        let best = place_bounded(item, slots(), SLACK_PERCENT, |key| all.get(&key).map_or(0, |(_, load)| *load));
        let mut ranked = rank(item, slots());
        if let Some(best) = best {
            ranked.retain(|key| *key != best);
            ranked.insert(0, best);
        }
        ranked.iter().filter_map(|key| all.get(key)).map(|(node, _)| node.clone()).collect()
    }
}

/// What a member can do, one word for each.
fn capabilities(member: &Member) -> BTreeSet<String> {
    let words = member
        .capabilities
        .iter()
        .flat_map(|(key, list)| list.split(',').map(move |one| format!("{key}={}", one.trim())).chain([key.clone()]));
    words.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, load: f64, state: MemberState) -> Member {
        Member {
            node_id: name.to_owned(),
            addr: "127.0.0.1".to_owned(),
            state: state as i32,
            load_score: Some(load),
            capabilities: [(PORT, "7"), (AGENTS, "echo,codex"), (STORE, "x")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Member::default()
        }
    }

    fn view() -> View {
        let view = View::new(NodeId::new("s/0"));
        view.begin("x".to_owned(), ["echo"].into_iter());
        view
    }

    #[test]
    fn who_is_forgotten_or_was_never_heard_of_is_gone() {
        let view = view();
        view.member(&member("s/1", 0.1, MemberState::Alive));
        let (one, two) = (NodeId::new("s/1"), NodeId::new("s/2"));
        assert!(!view.is_gone(&one) && !view.owner(&two), "nobody can know yet");
        view.removed(&one);
        assert!(view.is_gone(&one));
        view.settle();
        assert!(view.owner(&two) && view.is_gone(&two) && !view.owner(&two));
        view.snapshot(&[member("s/2", 0.1, MemberState::Alive)]);
        assert!(!view.is_gone(&two) && view.is_gone(&one));
        assert!(!view.owner(&NodeId::new("s/0")) && !view.is_gone(&NodeId::new("s/0")));
    }

    #[test]
    fn new_sessions_spread_over_those_that_can_take_them() {
        let view = view();
        for (name, load, state) in [
            ("s/1", 0.1, MemberState::Alive),
            ("s/2", 0.9, MemberState::Alive),
            ("s/3", 0.1, MemberState::Suspect),
            ("s/4", 0.1, MemberState::Alive),
        ] {
            view.member(&member(name, load, state));
        }
        let mut foreign = member("s/5", 0.0, MemberState::Alive);
        foreign.capabilities.insert(STORE.to_owned(), "y".to_owned());
        view.member(&foreign);
        let place = |name: String, needs: &[&str]| {
            let needs = needs.iter().map(|need| (*need).to_owned()).collect();
            view.place(&name.parse().unwrap(), &needs, 0.8)
        };
        let mut first = BTreeMap::<String, u32>::new();
        for n in 0..300 {
            let placed = place(format!("session-{n}"), &["agents=echo"]);
            assert_eq!(placed.len(), 3);
            *first.entry(placed[0].to_string()).or_default() += 1;
        }
        assert_eq!(first.keys().map(String::as_str).collect::<Vec<_>>(), ["s/0", "s/1", "s/4"]);
        assert!(first.values().all(|count| *count > 30), "{first:?}");
        assert!(place("a".to_owned(), &["agents=codex"]).iter().all(|node| node.as_str() != "s/0"));
        assert!(place("a".to_owned(), &["gpu=h100"]).is_empty());
    }
}
