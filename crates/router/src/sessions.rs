//! The router as a door to the sessions: it keeps nothing of them and passes each call on to a node, which knows where the
//! session is.
//!
//! ```text
//! caller ──> here ──┬─ loopback, address book ─> a node of this host
//!                   └─ TLS, the members' table ─> a node elsewhere
//! ```
//!
//! A node that does not answer is left for another one as long as nothing was heard of it; whoever loses the stream later asks again
//! under the same name of the turn, which is safe.

use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_proto::handoff as pb;
use drover_proto::handoff::send_response::Update;
use drover_proto::status_of;
use drover_service::pki::{Authority, IdentityHandle};
use drover_service::{Context, connect_node};
use drover_sessions::{Client, Door, local};
use drover_types::{ErrorCode, Failure};
use futures::StreamExt as _;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};
use tonic::{Code, Response, Status};
use tracing::{debug, warn};

use crate::registry::Shared;

/// The router's own name among the nodes of its instance. No node of a swarm has one without a slash.
const NODE_ID: &str = "router";
/// How long its certificate is good; each start issues another one.
const VALID_FOR: Duration = Duration::from_hours(24 * 365);
/// A membership's capability that says on which port the node takes what is said to sessions.
const CAPABILITY: &str = "handoff";
/// How long a node may take until it begins to answer, or answers, before another one is asked.
const BEGIN: Duration = Duration::from_secs(8);
/// A move may take as long as its settings say, with all its attempts; the node ends it.
const MOVE: Duration = Duration::from_mins(10);
/// How long a node may take to say which sessions it has, and how many are asked at a time.
const LOOK: Duration = Duration::from_secs(3);
const AT_ONCE: usize = 16;
/// How long a node that did not answer is asked last.
const AVOIDED: Duration = Duration::from_secs(15);
/// Most sessions of which is remembered where they were.
const REMEMBERED: usize = 10_000;

/// Passes calls on.
pub(crate) struct Sessions {
    ctx: Context,
    shared: Arc<Shared>,
    identity: OnceCell<Option<IdentityHandle>>,
    /// Where sessions were last heard of. Only a hint, which saves a step.
    places: Mutex<HashMap<String, String>>,
    /// Nodes that did not answer, and until when they are asked last.
    avoided: Mutex<HashMap<String, Instant>>,
    /// Ways that were taken before, by the node's id and address.
    ways: Mutex<HashMap<(String, String), Door>>,
}

impl Sessions {
    pub(crate) fn new(ctx: &Context, shared: Arc<Shared>) -> Self {
        Self {
            ctx: ctx.clone(),
            shared,
            identity: OnceCell::new(),
            places: Mutex::default(),
            avoided: Mutex::default(),
            ways: Mutex::default(),
        }
    }

    /// Says something in a session. What comes back is passed on as it is.
    pub(crate) async fn send(
        self: &Arc<Self>,
        request: pb::SendRequest,
    ) -> Result<(tonic::Streaming<pb::SendResponse>, Watcher), Status> {
        let session = request.session_id.clone();
        let stream = self
            .first(&session, BEGIN, |mut door| {
                let request = request.clone();
                async move { door.send(request).await.map(Response::into_inner) }
            })
            .await?;
        Ok((stream, Watcher { sessions: Arc::clone(self), session }))
    }

    /// Asks one node after another until one answers. `near`: a session; its own node is asked first.
    pub(crate) async fn first<T, F>(&self, near: &str, limit: Duration, call: impl Fn(Client) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let doors = self.doors(near).await;
        if doors.is_empty() {
            return Err(status_of(&self.no_door()));
        }
        let mut last = String::new();
        for door in doors {
            match timeout(limit, call(door.client.clone())).await {
                Ok(Err(status)) if is_lost(&status) => {
                    last = format!("{}: {}", door.name, reason(&status));
                    self.forget(&door, near);
                }
                Ok(answer) => return answer,
                Err(_) => {
                    last = format!("{} does not answer within {} s", door.name, limit.as_secs());
                    self.forget(&door, near);
                }
            }
            debug!(why = last, "another node is asked");
        }
        let failure =
            Failure::new(ErrorCode::BackendUnavailable, format!("no node takes what is said to sessions: {last}"));
        Err(status_of(&failure.hint("`drover members` shows which nodes are there; try again in a moment")))
    }

    /// The same for a call that takes as long as a move.
    pub(crate) async fn slow<T, F>(&self, near: &str, call: impl Fn(Client) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.first(near, MOVE, call).await
    }

    /// All sessions: those that the shared files know, with what each node says of its own.
    pub(crate) async fn list(&self, closed: bool) -> Result<pb::ListSessionsResponse, Status> {
        let ask = |all| pb::ListSessionsRequest { all, closed };
        let mut all = self
            .slow("", |mut door| async move { door.list_sessions(ask(true)).await.map(Response::into_inner) })
            .await?
            .sessions;
        let doors = futures::stream::iter(self.doors("").await);
        let asked = doors.map(|mut door| async move {
            let own = timeout(LOOK, door.client.list_sessions(ask(false))).await;
            // Of a node that does not answer the shared files tell what they can.
            own.ok().and_then(Result::ok).map(|own| own.into_inner().sessions).unwrap_or_default()
        });
        let own: HashMap<String, pb::Session> = asked
            .buffer_unordered(AT_ONCE)
            .flat_map(futures::stream::iter)
            .filter(|session| std::future::ready(session.state() != pb::SessionState::Migrated))
            .map(|session| (session.session_id.clone(), session))
            .collect()
            .await;
        for session in &mut all {
            if let Some(known) = own.get(&session.session_id)
                && known.epoch >= session.epoch
            {
                session.clone_from(known);
            }
        }
        Ok(pb::ListSessionsResponse { sessions: all })
    }

    fn no_door(&self) -> Failure {
        let registry = self.shared.registry.load();
        let up = registry
            .swarms
            .values()
            .any(|view| matches!(view.swarm.status.as_str(), "running" | "degraded" | "launching"));
        if up {
            Failure::new(ErrorCode::BackendUnavailable, "no node serves sessions yet")
                .hint("nodes do a few seconds after their swarm came up, unless swarm.enabled is false; `drover members` shows them")
        } else {
            Failure::new(ErrorCode::UnknownSwarm, "sessions live on the nodes of swarms, and no swarm is up")
                .hint("launch one: drover launch --nodes 2")
        }
    }

    /// Nodes that can be asked, the one that was last heard to have the session first; the others in an order of the session's own,
    /// so that not all callers come to one node.
    async fn doors(&self, near: &str) -> Vec<Door> {
        let place = lock(&self.places).get(near).cloned();
        let mut nodes: Vec<(String, Option<SocketAddr>, Option<String>)> =
            local(self.ctx.state()).into_iter().map(|(node, daemon)| (node, None, Some(daemon))).collect();
        for (id, member) in self.shared.registry.load().members.iter() {
            let port = member.capabilities.get(CAPABILITY).and_then(|port| port.parse::<u16>().ok());
            let ip = member.addr.parse().ok();
            let known = nodes.iter().any(|(node, ..)| node == id);
            if let (false, "alive", Some(port), Some(ip)) = (known, member.state.as_str(), port, ip) {
                nodes.push((id.clone(), Some(SocketAddr::new(ip, port)), None));
            }
        }
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
        nodes.sort_by_cached_key(|(node, ..)| (avoided.contains(node), place.as_deref() != Some(node), rank(node)));
        let mut doors = Vec::with_capacity(nodes.len());
        for (node, addr, daemon) in nodes {
            if let Some(door) = self.way(node, addr, daemon).await {
                doors.push(door);
            }
        }
        doors
    }

    async fn way(&self, node: String, addr: Option<SocketAddr>, daemon: Option<String>) -> Option<Door> {
        let key = (node.clone(), addr.map_or_else(String::new, |addr| addr.to_string()));
        if let Some(door) = lock(&self.ways).get(&key) {
            return Some(door.clone());
        }
        let door = match (addr, daemon) {
            (_, Some(daemon)) => Door::of_daemon(&node, self.ctx.state(), &daemon),
            (Some(addr), None) => Door::new(&node, connect_node(self.identity().await?, addr, &node)),
            (None, None) => return None,
        };
        let mut ways = lock(&self.ways);
        if ways.len() >= REMEMBERED {
            ways.clear();
        }
        ways.insert(key, door.clone());
        Some(door)
    }

    /// By which nodes elsewhere know the router.
    async fn identity(&self) -> Option<&IdentityHandle> {
        let made = self.identity.get_or_init(|| async {
            let state = self.ctx.state().clone();
            let issued = tokio::task::spawn_blocking(move || {
                Authority::open_or_create(&state).and_then(|authority| authority.issue(NODE_ID, VALID_FOR))
            });
            match issued.await {
                Ok(Ok(identity)) => Some(IdentityHandle::new(identity)),
                Ok(Err(error)) => {
                    warn!(%error, "the router has no identity: nodes on other hosts take nothing from it");
                    None
                }
                Err(_) => None,
            }
        });
        made.await.as_ref()
    }

    fn remember(&self, session: &str, node: &str) {
        let mut places = lock(&self.places);
        if places.len() >= REMEMBERED && !places.contains_key(session) {
            places.clear();
        }
        if places.get(session).is_none_or(|known| known != node) {
            places.insert(session.to_owned(), node.to_owned());
        }
    }

    fn forget(&self, door: &Door, session: &str) {
        lock(&self.avoided).insert(door.name.clone(), Instant::now() + AVOIDED);
        lock(&self.places).remove(session);
        lock(&self.ways).retain(|(node, _), _| *node != door.name);
    }
}

/// Sees where a session is heard to be.
pub(crate) struct Watcher {
    sessions: Arc<Sessions>,
    session: String,
}

impl Watcher {
    pub(crate) fn see(&self, response: &pb::SendResponse) {
        let node = match &response.update {
            Some(Update::Accepted(accepted)) => &accepted.node_id,
            Some(Update::Moved(moved)) => &moved.node_id,
            Some(Update::Answer(answer)) => &answer.node_id,
            _ => return,
        };
        if !node.is_empty() {
            self.sessions.remember(&self.session, node);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The node was not reached, or is going away: another one may do.
fn is_lost(status: &Status) -> bool {
    if !status.details().is_empty() {
        return drover_proto::failure_of(status).code == ErrorCode::ShuttingDown;
    }
    status.source().is_some() || status.code() == Code::Unavailable
}

fn reason(status: &Status) -> String {
    let Some(mut reason) = status.source() else { return status.message().to_owned() };
    while let Some(next) = reason.source() {
        reason = next;
    }
    reason.to_string()
}
