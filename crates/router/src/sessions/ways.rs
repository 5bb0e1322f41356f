//! Which nodes take what is said to sessions, and how each of them is reached.
//!
//! A node of this host is reached by loopback, and one elsewhere over the network where that leads to it. Where it does not, such as from
//! a laptop that has only SSH to a login host, calls go through the node's mailbox.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_proto::common::NodeRef;
use drover_service::pki::{IdentityHandle, issue_own};
use drover_service::{Context, Target, Token, connect, connect_node, connect_node_stream};
use drover_sessions::{Door, Way, local};
use drover_types::SwarmId;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tracing::{info, warn};

use super::lock;
use super::postman::Postman;
use crate::core::model::Side;
use crate::registry::Shared;

/// The router's own name among the nodes of its instance. No node of a swarm has one without a slash.
const NODE_ID: &str = "router";
/// A membership's capability that says on which port the node takes what is said to sessions.
const CAPABILITY: &str = "handoff";
/// How long a node that did not answer is asked last.
const AVOIDED: Duration = Duration::from_secs(15);
/// How long a connection may take to begin where there is another way: a packet that is dropped on purpose is never answered.
const PROBE: Duration = Duration::from_millis(1500);
/// How long an address that was reached counts as reached, and how long a network that leads nowhere is left alone.
const BELIEVED: Duration = Duration::from_mins(1);
/// Most sessions of which is remembered where they were, and most ways that are kept.
const REMEMBERED: usize = 10_000;

/// A node that can be asked.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) id: String,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// On this host, by its name in the address book.
    Here(String),
    Elsewhere {
        addr: SocketAddr,
        mailbox: Option<Mailbox>,
    },
}

/// The files by which a node is reached.
#[derive(Debug, Clone)]
struct Mailbox {
    swarm: SwarmId,
    index: u32,
    side: Side,
}

/// One way to a node.
pub(super) struct Reach {
    pub(super) door: Door,
    /// The swarm of a node that is reached through its mailbox.
    posted: Option<SwarmId>,
}

/// Knows nodes and ways.
pub(super) struct Ways {
    ctx: Context,
    shared: Arc<Shared>,
    identity: OnceCell<Option<IdentityHandle>>,
    /// Where sessions were last heard of. Only a hint, which saves a step.
    places: Mutex<HashMap<String, String>>,
    /// Nodes that did not answer, and until when they are asked last.
    avoided: Mutex<HashMap<String, Instant>>,
    /// Doors that were used before, by the node's id and its address, or its name in the address book.
    doors: Mutex<HashMap<(String, String), Door>>,
    /// Addresses that were reached, and until when that is believed.
    reached: Mutex<HashMap<SocketAddr, Instant>>,
    /// Swarms to whose nodes no network leads, and when that is looked at again.
    shut: Arc<Mutex<HashMap<SwarmId, Instant>>>,
    followers: Mutex<HashMap<Side, Channel>>,
}

/// Looks whether a node answers at an address.
async fn probe(identity: &IdentityHandle, addr: SocketAddr, node: &str) -> Result<(), String> {
    let identity = identity.current();
    match timeout(PROBE, connect_node_stream(&identity, addr, node)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} ms", PROBE.as_millis())),
    }
}

impl Ways {
    pub(super) fn new(ctx: &Context, shared: Arc<Shared>) -> Self {
        Self {
            ctx: ctx.clone(),
            shared,
            identity: OnceCell::new(),
            places: Mutex::default(),
            avoided: Mutex::default(),
            doors: Mutex::default(),
            reached: Mutex::default(),
            shut: Arc::default(),
            followers: Mutex::default(),
        }
    }

    /// Nodes that can be asked, the one that was last heard to have the session first; the others in an order of the session's own,
    /// so that not all callers come to one node.
    pub(super) fn nodes(&self, near: &str) -> Vec<Node> {
        let place = lock(&self.places).get(near).cloned();
        let here = local(self.ctx.state()).into_iter().map(|(id, daemon)| Node { id, place: Place::Here(daemon) });
        let mut nodes: Vec<Node> = here.collect();
        let registry = self.shared.registry.load();
        for (id, member) in registry.members.iter() {
            let port = member.capabilities.get(CAPABILITY).and_then(|port| port.parse::<u16>().ok());
            let ip = member.addr.parse().ok();
            let known = nodes.iter().any(|node| node.id == *id);
            if let (false, "alive", Some(port), Some(ip)) = (known, member.state.as_str(), port, ip) {
                let swarm = member.swarm_id.parse::<SwarmId>().ok();
                let mailbox = swarm.zip(member.node_index).and_then(|(swarm, index)| {
                    let side = Side::clone(&registry.swarms.get(&swarm)?.side);
                    Some(Mailbox { swarm, index, side })
                });
                let addr = SocketAddr::new(ip, port);
                nodes.push(Node { id: id.clone(), place: Place::Elsewhere { addr, mailbox } });
            }
        }
        self.forget_gone(&nodes);
        let rank = |node: &str| {
            let mut hash = DefaultHasher::new();
            (node, near).hash(&mut hash);
            hash.finish()
        };
        let now = Instant::now();
        let avoided: Vec<String> = {
            let mut avoided = lock(&self.avoided);
            avoided.retain(|_, until| *until > now);
            avoided.keys().cloned().collect()
        };
        nodes.sort_by_cached_key(|node| {
            (avoided.contains(&node.id), place.as_deref() != Some(&node.id), rank(&node.id))
        });
        nodes
    }

    /// Lets go of the doors of nodes that are no more; each has a task and buffers of its own.
    fn forget_gone(&self, nodes: &[Node]) {
        let mut doors = lock(&self.doors);
        // A node may have one for each of its addresses.
        if doors.len() > nodes.len() {
            let known: HashSet<&str> = nodes.iter().map(|node| node.id.as_str()).collect();
            doors.retain(|(id, _), _| known.contains(id.as_str()));
        }
    }

    /// The ways to a node, best first. `why` gains what is known of those that do not lead there.
    pub(super) async fn to(&self, node: &Node, why: &mut Vec<String>) -> Vec<Reach> {
        let (addr, mailbox) = match &node.place {
            Place::Here(daemon) => {
                let door = self.kept(&node.id, daemon, || Door::of_daemon(&node.id, self.ctx.state(), daemon));
                return vec![Reach { door, posted: None }];
            }
            Place::Elsewhere { addr, mailbox } => (*addr, mailbox.as_ref()),
        };
        let mut reaches = Vec::new();
        // Without another way the connection itself says what is wrong.
        if mailbox.is_none_or(|mailbox| !self.is_shut(&mailbox.swarm, &node.id, addr))
            && (mailbox.is_none() || self.is_reached(&node.id, addr, why).await)
            && let Some(door) = self.door(&node.id, addr).await
        {
            reaches.push(Reach { door, posted: None });
        }
        if let Some(Mailbox { swarm, index, side }) = mailbox {
            let (follower, by) = self.follower(side);
            let to = NodeRef { swarm_id: swarm.to_string(), node_id: *index };
            let way = Way::new(Postman::new(follower, &by, to));
            let door = Door::by(format!("{} through its mailbox", node.id), way, Token::default());
            reaches.push(Reach { door, posted: Some(swarm.clone()) });
        }
        reaches
    }

    async fn door(&self, node: &str, addr: SocketAddr) -> Option<Door> {
        let identity = self.identity().await?;
        Some(self.kept(node, &addr.to_string(), || Door::new(node, connect_node(identity, addr, node))))
    }

    /// The door that was made before, so that its connection is used again.
    fn kept(&self, node: &str, place: &str, make: impl FnOnce() -> Door) -> Door {
        let mut doors = lock(&self.doors);
        let key = (node.to_owned(), place.to_owned());
        if let Some(door) = doors.get(&key) {
            return door.clone();
        }
        if doors.len() >= REMEMBERED {
            doors.clear();
        }
        doors.entry(key).or_insert_with(make).clone()
    }

    fn follower(&self, side: &Side) -> (Channel, String) {
        let by = if side.is_empty() { "outbox-follower" } else { &**side };
        let mut followers = lock(&self.followers);
        let known = followers
            .entry(Side::clone(side))
            .or_insert_with(|| connect(Target::Daemon { state: self.ctx.state().clone(), name: by.to_owned() }));
        (known.clone(), by.to_owned())
    }

    /// Whether the node itself answers there: the address may be another host's in the network that the router is in.
    async fn is_reached(&self, node: &str, addr: SocketAddr, why: &mut Vec<String>) -> bool {
        if lock(&self.reached).get(&addr).is_some_and(|until| *until > Instant::now()) {
            return true;
        }
        let Some(identity) = self.identity().await else { return false };
        let failed = match probe(identity, addr, node).await {
            Ok(()) => {
                let mut reached = lock(&self.reached);
                if reached.len() >= REMEMBERED {
                    reached.clear();
                }
                reached.insert(addr, Instant::now() + BELIEVED);
                return true;
            }
            Err(failed) => failed,
        };
        why.push(format!("{addr}: {failed}"));
        false
    }

    /// Whether no network leads to a swarm's nodes, as far as is known. That is looked at again now and then, and nobody waits for it.
    fn is_shut(&self, swarm: &SwarmId, node: &str, addr: SocketAddr) -> bool {
        let now = Instant::now();
        let mut shut = lock(&self.shut);
        let Some(until) = shut.get_mut(swarm) else { return false };
        if *until <= now
            && let Some(identity) = self.identity.get().cloned().flatten()
        {
            *until = now + BELIEVED;
            let (shut, swarm, node) = (Arc::clone(&self.shut), swarm.clone(), node.to_owned());
            self.ctx.spawn("probe", async move {
                if probe(&identity, addr, &node).await.is_ok() {
                    info!(swarm_id = %swarm, %addr, "nodes of the swarm are reached over the network again");
                    lock(&shut).remove(&swarm);
                }
            });
        }
        true
    }

    /// A node was reached this way, and not over the network before that.
    pub(super) fn worked(&self, reach: &Reach, first: bool) {
        if let (Some(swarm), false) = (&reach.posted, first)
            && lock(&self.shut).insert(swarm.clone(), Instant::now() + BELIEVED).is_none()
        {
            info!(swarm_id = %swarm, "what is said to sessions goes through the mailbox: no network leads to these nodes");
        }
    }

    /// A way did not lead to its node: next time it is looked at first.
    pub(super) fn broke(&self, node: &Node, reach: &Reach) {
        if reach.posted.is_some() {
            return;
        }
        lock(&self.doors).retain(|(id, _), _| *id != node.id);
        if let Place::Elsewhere { addr, .. } = &node.place {
            lock(&self.reached).remove(addr);
        }
    }

    /// By which nodes elsewhere know the router.
    async fn identity(&self) -> Option<&IdentityHandle> {
        let made = self.identity.get_or_init(|| async {
            let ctx = self.ctx.clone();
            let issued = tokio::task::spawn_blocking(move || issue_own(&ctx, NODE_ID));
            match issued.await {
                Ok(Ok(identity)) => Some(identity),
                Ok(Err(error)) => {
                    warn!(%error, "the router has no identity: nodes on other hosts take nothing from it");
                    None
                }
                Err(_) => None,
            }
        });
        made.await.as_ref()
    }

    pub(super) fn remember(&self, session: &str, node: &str) {
        let mut places = lock(&self.places);
        if places.len() >= REMEMBERED && !places.contains_key(session) {
            places.clear();
        }
        if places.get(session).is_none_or(|known| known != node) {
            places.insert(session.to_owned(), node.to_owned());
        }
    }

    pub(super) fn forget(&self, node: &Node, session: &str) {
        lock(&self.avoided).insert(node.id.clone(), Instant::now() + AVOIDED);
        lock(&self.places).remove(session);
    }
}
