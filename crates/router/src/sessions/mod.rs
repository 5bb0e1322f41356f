//! The router as a door to the sessions: it keeps nothing of them and passes each call on to a node, which knows where the
//! session is.
//!
//! ```text
//! caller ──> here ──┬─ loopback, address book ─> a node of this host
//!                   ├─ TLS, the members' table ─> a node elsewhere
//!                   └─ files, by way of the follower that has them ─> a node that no network leads to
//! ```
//!
//! A node that does not answer is left for another one as long as nothing was heard of it; whoever loses the stream later asks again
//! under the same name of the turn, which is safe.

mod postman;
mod ways;

use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_proto::handoff as pb;
use drover_proto::handoff::send_response::Update;
use drover_proto::status_of;
use drover_service::{Context, in_trace, traceparent};
use drover_sessions::Client;
use drover_types::{ErrorCode, Failure};
use futures::StreamExt as _;
use tokio::time::timeout;
use tonic::{Code, Response, Status};
use tracing::debug;

use self::ways::{Node, Ways};
use crate::registry::Shared;

/// How long a node may take until it begins to answer, or answers, before another one is asked.
const BEGIN: Duration = Duration::from_secs(8);
/// A move may take as long as its settings say, with all its attempts; the node ends it.
const MOVE: Duration = Duration::from_mins(10);
/// How long a node may take to say which sessions it has, and how many are asked at a time.
const LOOK: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 16;

/// Nodes that are named when none of them answers.
const NAMED: usize = 8;

/// Passes calls on.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
    ways: Ways,
}

/// Why a node gave no answer.
enum Unheard {
    /// It did: this is what it said.
    Refused(Status),
    /// It was not reached, or went away; another one may do.
    Lost(String),
}

impl Sessions {
    pub(crate) fn new(ctx: &Context, shared: Arc<Shared>) -> Self {
        Self { ways: Ways::new(ctx, Arc::clone(&shared)), shared }
    }

    /// Says something in a session. What comes back is passed on as it is.
    pub(crate) async fn send(
        self: &Arc<Self>,
        request: pb::SendRequest,
    ) -> Result<(tonic::Streaming<pb::SendResponse>, Watcher), Status> {
        let session = request.session_id.clone();
        let trace = traceparent().unwrap_or_default();
        let stream = self
            .first(&session, BEGIN, |mut door| {
                let request = in_trace(request.clone(), &trace);
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
        let nodes = self.ways.nodes(near);
        if nodes.is_empty() {
            return Err(status_of(&self.no_door()));
        }
        let asked = nodes.len();
        let mut heard = Vec::new();
        for node in nodes {
            match self.ask(&node, limit, &call).await {
                Ok(answer) => return Ok(answer),
                Err(Unheard::Refused(status)) => return Err(status),
                Err(Unheard::Lost(why)) => {
                    debug!(node_id = node.id, why, "another node is asked");
                    self.ways.forget(&node, near);
                    if heard.len() < NAMED {
                        heard.push(if why.contains(&node.id) { why } else { format!("{}: {why}", node.id) });
                    }
                }
            }
        }
        let others = asked.saturating_sub(heard.len());
        let others = if others == 0 { String::new() } else { format!("; and {others} more") };
        let nodes = if asked == 1 { "node" } else { "nodes" };
        let heard = heard.join("; ");
        let failure = Failure::new(
            ErrorCode::BackendUnavailable,
            format!("no node takes what is said to sessions; {asked} {nodes} asked: {heard}{others}"),
        );
        Err(status_of(&failure.hint("`drover members` shows which nodes are there; try again in a moment")))
    }

    /// Asks one node, by each way that leads there.
    async fn ask<T, F>(&self, node: &Node, limit: Duration, call: &impl Fn(Client) -> F) -> Result<T, Unheard>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut why = Vec::new();
        for reach in self.ways.to(node, &mut why).await {
            let name = &reach.door.name;
            match timeout(limit, call(reach.door.client.clone())).await {
                Ok(Err(status)) if is_lost(&status) => why.push(format!("{name}: {}", reason(&status))),
                Ok(answer) => {
                    self.ways.worked(&reach, why.is_empty());
                    return answer.map_err(Unheard::Refused);
                }
                Err(_) => why.push(format!("{name} does not answer within {} s", limit.as_secs())),
            }
            self.ways.broke(node, &reach);
        }
        if why.is_empty() {
            why.push(format!("no way leads to {}", node.id));
        }
        Err(Unheard::Lost(why.join("; ")))
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
        let listed = |all| {
            move |mut door: Client| async move { door.list_sessions(ask(all)).await.map(|said| said.into_inner().sessions) }
        };
        let mut all = self.slow("", listed(true)).await?;
        let nodes = futures::stream::iter(self.ways.nodes(""));
        // Of a node that does not answer the shared files tell what they can.
        let asked = nodes.map(|node| async move { self.ask(&node, LOOK, &listed(false)).await.unwrap_or_default() });
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
            self.sessions.ways.remember(&self.session, node);
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
