//! Tasks on nodes: which node does what, and what becomes of it when a node dies.
//!
//! ```text
//! errands ──read(kind, url)──> Nodes ─┬─ roster   who is there, who does what, who is next (pure)
//!                               ├─ service  the streams of the nodes, by certificate
//!                               └─ members  who is alive, how loaded and able, from the router
//! on a node:                       Hand     reads one page with the same guard as here
//! ```
//!
//! A node reads the page of a `fetch` task, and of an `extract` task the part of it that the model will see. Model calls are not
//! made on nodes: what they read comes back here, the model is asked here, and keys stay here. Work is given in attempts, each with a
//! number of its own; an attempt of a node that died is void, its work goes to another node, and of all attempts one result is
//! taken. Without any node the dispatcher reads pages itself.

mod hand;
mod kinds;
mod members;
mod roster;
mod service;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_config::Config;
use drover_proto::tasks as pb;
use drover_service::{Context, Server};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

pub use hand::Hand;
pub use kinds::KINDS;

use crate::call::{CallAnswer, CallError};
use crate::core::Kind;
use kinds::Kinds;
use roster::{Effect, Ended, Roster, Ticket};

/// The capability under which a member says which kinds it takes.
pub const CAPABILITY: &str = "tasks";

/// How often attempts are looked at that take too long.
const LOOK: Duration = Duration::from_secs(1);
/// What an attempt may take beyond the time for a page.
const SLACK: Duration = Duration::from_secs(15);
/// Words that may wait for one node. It is told of no more attempts than it takes at once.
const WORDS: usize = 256;

/// All nodes. Clones are the same.
#[derive(Clone)]
pub(crate) struct Nodes(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    began: Instant,
    there: Gauge,
    void: Counter,
    late: Counter,
}

struct State {
    roster: Roster,
    waiting: HashMap<Ticket, oneshot::Sender<Ended>>,
    streams: HashMap<u64, mpsc::Sender<pb::WorkResponse>>,
    next: u64,
    effects: Vec<Effect>,
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nodes").field("there", &self.0.there.get()).finish_non_exhaustive()
    }
}

impl Nodes {
    /// `None` when nodes are not to take tasks.
    pub(crate) fn new(config: &Config, ctx: &Context, max_nodes: u32, page: Duration) -> Option<Self> {
        if !config.worker.run_tasks {
            return None;
        }
        let (there, void, late) = (Gauge::default(), Counter::default(), Counter::default());
        {
            let registry = ctx.registry();
            let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
            registry.register("task_nodes", "Nodes that take tasks now", there.clone());
            registry.register("task_attempts_void", "Attempts on nodes that were given to another node", void.clone());
            registry.register("task_results_late", "Results of void attempts, which were not taken", late.clone());
        }
        // A node outside the gossip is taken at its own word.
        let gossips = config.swarm.as_ref().is_none_or(|swarm| swarm.enabled);
        let state = State {
            roster: Roster::new(max_nodes, page + SLACK, gossips),
            waiting: HashMap::new(),
            streams: HashMap::new(),
            next: 1,
            effects: Vec::new(),
        };
        let nodes = Self(Arc::new(Inner { state: Mutex::new(state), began: Instant::now(), there, void, late }));
        let looking = nodes.clone();
        let stopping = ctx.shutdown().clone();
        ctx.spawn("task nodes", async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(LOOK) => looking.act(Roster::look),
                    () = stopping.cancelled() => return,
                }
            }
        });
        if gossips {
            ctx.spawn("task members", members::follow(nodes.clone(), ctx.clone()));
        }
        Some(nodes)
    }

    /// Adds the service that nodes come to.
    pub(crate) fn serve(&self, server: Server, ctx: &Context) -> Server {
        server.grpc_nodes(service::Door::service(self, ctx))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the roster decide, and carries out what it decided.
    fn act<T>(&self, decide: impl FnOnce(&mut Roster, Duration, &mut Vec<Effect>) -> T) -> T {
        let now = self.0.began.elapsed();
        let mut state = self.state();
        let State { roster, effects, .. } = &mut *state;
        let result = decide(roster, now, effects);
        // A node that does not take what it is told is gone, which may free work again.
        while !state.effects.is_empty() {
            let mut effects = std::mem::take(&mut state.effects);
            for effect in effects.drain(..) {
                self.perform(&mut state, now, effect);
            }
        }
        self.0.there.set(i64::from(state.roster.usable()));
        result
    }

    fn perform(&self, state: &mut State, now: Duration, effect: Effect) {
        use pb::work_response::Said;
        let (stream, said) = match effect {
            Effect::Give { stream, attempt, kind, url } => {
                let (kind, url) = (kind.as_str().to_owned(), url.as_ref().to_owned());
                (stream, Said::Attempt(pb::Attempt { attempt, kind, url }))
            }
            Effect::Void { stream, attempt } => {
                self.0.void.inc();
                (stream, Said::Void(attempt))
            }
            Effect::Late => {
                self.0.late.inc();
                return;
            }
            Effect::Ended { ticket, ended } => {
                if let Some(waiter) = state.waiting.remove(&ticket) {
                    // One that gave up meanwhile has been taken out; this one listens.
                    let _ = waiter.send(ended);
                }
                return;
            }
        };
        let sent = state.streams.get(&stream).map(|to| to.try_send(pb::WorkResponse { said: Some(said) }));
        if matches!(sent, Some(Err(_))) {
            state.streams.remove(&stream);
            let State { roster, effects, .. } = state;
            roster.leave(now, stream, effects);
        }
    }

    /// A node comes; what it is told comes out of the channel. Its number is that of the stream.
    fn join(&self, node: &str, kinds: &[String], at_once: u32) -> (u64, mpsc::Receiver<pb::WorkResponse>) {
        let (tell, told) = mpsc::channel(WORDS);
        let stream = {
            let mut state = self.state();
            let stream = state.next;
            state.next += 1;
            state.streams.insert(stream, tell);
            stream
        };
        let offer = (Kinds::of(kinds.iter().map(String::as_str)), at_once);
        self.act(|roster, now, out| roster.join(now, node, stream, offer, out));
        (stream, told)
    }

    fn leave(&self, stream: u64) {
        self.state().streams.remove(&stream);
        self.act(|roster, now, out| roster.leave(now, stream, out));
    }

    fn result(&self, stream: u64, attempt: u64, result: Result<CallAnswer, CallError>) {
        self.act(|roster, now, out| roster.result(now, stream, attempt, result, out));
    }

    /// Has a page read on a node for a task of this kind. `None` when no node is there to do it.
    pub(crate) async fn read(&self, kind: Kind, url: &str) -> Option<Result<CallAnswer, CallError>> {
        let (tell, told) = oneshot::channel();
        let ticket = {
            let mut state = self.state();
            let ticket = Ticket(state.next);
            state.next += 1;
            state.waiting.insert(ticket, tell);
            ticket
        };
        let guard = Waiter { nodes: self, ticket };
        self.act(|roster, now, out| roster.submit(now, ticket, (kind, url.into()), out));
        let ended = told.await.ok();
        drop(guard);
        match ended? {
            Ended::Done(result) => Some(*result),
            Ended::Nobody => None,
        }
    }
}

/// Takes work back when nobody waits for it any more.
struct Waiter<'a> {
    nodes: &'a Nodes,
    ticket: Ticket,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let waited = self.nodes.state().waiting.remove(&self.ticket).is_some();
        if waited {
            self.nodes.act(|roster, now, out| roster.cancel(now, self.ticket, out));
        }
    }
}
