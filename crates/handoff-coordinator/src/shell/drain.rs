//! Emptying a node: its sessions go to the others one by one, evenly and no faster than allowed, and it takes no new ones.
//!
//! ```text
//! a person ─> a door ─> an order on the shared file system ─> the leaseholder: who takes how many ─> the node, which carries it out
//!                └──────────── tells how far it is <───────────────────────────────────────────────────┘
//! ```
//!
//! The order stands until it is taken back. Whoever of them ends is replaced by another one that finds the order: the door by one that is asked
//! again, the leaseholder by the next, the node by its next start. Where nobody leads, the node plans for itself.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_proto::handoff::{self as pb, DrainRequest, DrainResponse, DrainState, GetStatusRequest};
use drover_proto::status_of;
use drover_service::now_us;
use drover_types::{ErrorCode, Failure, SessionId};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::Status;
use tracing::{info, warn};

use super::Shell;
use super::members::leader;
use super::ops::failed;
use super::orders::Order;
use super::sessions::peer;
use crate::core::{DrainPlan, Event, Input, NodeId, Share, State, Why};
use crate::ownership::Ownership as _;

/// Moves that begin in a second.
const PER_SECOND: u32 = 200;
/// How often it is looked whether the next may go.
const STEP: Duration = Duration::from_millis(5);
/// How often a watcher is told.
const TELL: Duration = Duration::from_millis(200);
/// Longest wait for another node's count of its sessions.
const COUNT: Duration = Duration::from_secs(2);
/// How long a node waits for the plan of the leaseholder, where there is one.
const PLANNED: Duration = Duration::from_secs(3);
/// How often it is looked whether something has come to a node that is to be empty, or was left there.
const AGAIN: Duration = Duration::from_secs(5);
/// Words that may wait for a watcher.
const EARS: usize = 16;

type Ear = mpsc::Sender<Result<DrainResponse, Status>>;

/// Who takes sessions, and who planned it.
#[derive(Debug, Clone)]
struct Planned {
    shares: Vec<Share>,
    by: String,
}

/// What the task that empties this node is told.
#[derive(Debug, Default)]
struct Told {
    plan: Option<Planned>,
    /// The node ends: there is no time to wait for a plan.
    at_once: bool,
    /// There is such a task.
    alive: bool,
}

/// The drain of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Drains {
    state: watch::Sender<Option<DrainState>>,
    told: Arc<Mutex<Told>>,
    wake: Arc<Notify>,
    /// There are new orders.
    ordered: Arc<Notify>,
}

impl Drains {
    pub(crate) fn new() -> Self {
        Self { state: watch::Sender::new(None), told: Arc::default(), wake: Arc::default(), ordered: Arc::default() }
    }

    /// How far it is; nothing when none was ordered.
    pub(crate) fn state(&self) -> Option<DrainState> {
        self.state.borrow().clone()
    }

    /// Somebody has ordered something.
    pub(crate) fn ordered(&self) {
        self.ordered.notify_one();
    }

    /// Waits for an order.
    pub(crate) async fn wait_for_order(&self) {
        self.ordered.notified().await;
    }

    /// It was taken back.
    fn end(&self) {
        if self.told().alive {
            self.wake.notify_one();
        }
    }

    fn change(&self, change: impl FnOnce(&mut DrainState)) {
        self.state.send_modify(|state| change(state.get_or_insert_default()));
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it begin, or gives the one that is under way its plan.
    fn start(&self, shell: &Shell, plan: Option<Planned>, at_once: bool) {
        let fresh = {
            let mut told = self.told();
            told.at_once |= at_once;
            if plan.is_some() {
                told.plan = plan;
            }
            !std::mem::replace(&mut told.alive, true)
        };
        if fresh {
            self.change(|state| *state = DrainState { running: true, ..DrainState::default() });
            let (drains, shell) = (self.clone(), shell.clone());
            shell.ctx.clone().spawn("drain", async move {
                drains.carry_out(&shell).await;
                drains.told().alive = false;
            });
        } else {
            self.again();
            self.wake.notify_one();
        }
    }

    fn again(&self) {
        self.change(|state| {
            state.running = true;
            state.error.clear();
        });
    }

    /// Empties the node, and goes on to as long as it is to be empty.
    async fn carry_out(&self, shell: &Shell) {
        loop {
            let left = match self.plan_for(shell).await {
                Ok(planned) => empty(shell, self, planned).await,
                Err(failure) => Err(failure),
            };
            self.change(|state| {
                state.running = false;
                match &left {
                    Ok(left) => state.left = *left,
                    Err(failure) => state.error.clone_from(&failure.message),
                }
            });
            loop {
                let woken = tokio::select! {
                    () = sleep(AGAIN) => false,
                    () = self.wake.notified() => true,
                    () = shell.ctx.shutdown().cancelled() => return,
                };
                if !shell.view.own().leaving {
                    return;
                }
                if woken || count_here(shell).await.is_ok_and(|count| count > 0) {
                    break;
                }
            }
            self.again();
        }
    }

    /// The plan: the leaseholder's, or this node's own where nobody leads.
    async fn plan_for(&self, shell: &Shell) -> Result<Planned, Failure> {
        let (mut plan, at_once) = {
            let mut told = self.told();
            (told.plan.take(), told.at_once)
        };
        if plan.is_none() && !at_once && shell.is_led_by_another().await {
            let until = Instant::now() + PLANNED;
            while plan.is_none() && timeout_at(until, self.wake.notified()).await.is_ok() {
                plan = self.told().plan.take();
            }
        }
        let plan = match plan.filter(|plan| !plan.shares.is_empty()) {
            Some(plan) => plan,
            None => Planned { shares: shares(shell, &BTreeSet::new()).await, by: shell.me.node.to_string() },
        };
        if plan.shares.is_empty() && count_here(shell).await? > 0 {
            let message = "there is no node that could take this node's sessions";
            return Err(Failure::new(ErrorCode::HandoffFailed, message));
        }
        self.change(|state| state.planned_by.clone_from(&plan.by));
        Ok(plan)
    }

    /// An order that stands since before this start.
    pub(crate) async fn go_on(&self, shell: &Shell) {
        let (orders, me) = (shell.orders.clone(), shell.me.node.clone());
        if let Ok(Some(order)) = tokio::task::spawn_blocking(move || orders.of(&me)).await {
            info!(by = %order.by, "this node is to be empty, as was ordered before it started");
            shell.view.leaving(true);
            self.start(shell, None, false);
        }
    }
}

impl Shell {
    async fn is_led_by_another(&self) -> bool {
        let mut client = super::members::client(self, &self.membership);
        leader(&mut client).await.is_some_and(|leader| leader != self.me.node)
    }
}

/// Begins to empty a node, or undoes it; streams how far it is.
pub(crate) async fn begin(
    shell: &Shell,
    asked: DrainRequest,
) -> Result<mpsc::Receiver<Result<DrainResponse, Status>>, Status> {
    let (ear, told) = mpsc::channel(EARS);
    let DrainRequest { node_id, undo, planned_by, shares } = asked;
    let node = if node_id.is_empty() { shell.me.node.clone() } else { NodeId::new(&node_id) };
    // A node that ends says so itself; that is no order, for its next start is there to serve.
    let ends = node_id.is_empty();
    if ends || (!planned_by.is_empty() && node == shell.me.node) {
        shell.view.leaving(!undo);
        if undo {
            shell.drains.end();
            let _ = ear.send(Ok(DrainResponse::default())).await;
            return Ok(told);
        }
        let shares = shares.into_iter().map(|share| Share {
            node: NodeId::new(&share.node_id),
            sessions: share.sessions,
            weight: 1,
        });
        let shares: Vec<Share> = shares.filter(|share| share.node != shell.me.node).collect();
        let plan = (!shares.is_empty()).then_some(Planned { shares, by: planned_by });
        shell.drains.start(shell, plan, ends);
        watch_here(shell, ear);
        return Ok(told);
    }
    order(shell, &node, undo).await?;
    if undo {
        let _ = ear.send(Ok(DrainResponse::default())).await;
    } else if node == shell.me.node {
        watch_here(shell, ear);
    } else {
        let shell = shell.clone();
        shell.ctx.clone().spawn("watch drain", async move { watch_other(&shell, &node, &ear).await });
    }
    Ok(told)
}

/// Gives an order, or takes it back: it stands when this returns, and whoever is concerned has been told.
async fn order(shell: &Shell, node: &NodeId, undo: bool) -> Result<(), Status> {
    let known = *node == shell.me.node || shell.view.addr(node).is_some();
    let (orders, of, by) = (shell.orders.clone(), node.clone(), shell.me.node.clone());
    let written = tokio::task::spawn_blocking(move || {
        let stood = orders.of(&of).is_some();
        if undo {
            orders.take_back(&of)?;
        } else if known && !stood {
            orders.give(&Order { node: of, at_us: now_us(), by })?;
        }
        Ok::<_, std::io::Error>(stood)
    });
    let broken =
        |why: String| failed(Failure::new(ErrorCode::StoreUnavailable, format!("the order is not kept: {why}")));
    let stood = written.await.map_err(|error| broken(error.to_string()))?.map_err(|error| broken(error.to_string()))?;
    let lifts_one = undo && stood;
    if !known && !lifts_one {
        let failure = Failure::new(ErrorCode::InvalidRequest, format!("no node {:?} takes sessions", node.as_str()));
        return Err(failed(failure.hint("`drover members` lists the nodes")));
    }
    tell_leader(shell).await;
    if *node == shell.me.node {
        shell.view.leaving(!undo);
        if undo {
            shell.drains.end();
        } else {
            shell.drains.start(shell, None, false);
        }
        return Ok(());
    }
    let planned_by = shell.me.node.to_string();
    let told =
        tell(shell, node, DrainRequest { node_id: node.to_string(), undo, planned_by, shares: Vec::new() }).await;
    if let Err(failure) = told {
        info!(node = %node, why = %failure.message, "a node that is to be emptied does not answer; it finds the order");
    }
    Ok(())
}

async fn tell_leader(shell: &Shell) {
    let mut client = super::members::client(shell, &shell.membership);
    match leader(&mut client).await {
        Some(leader) if leader == shell.me.node => shell.drains.ordered(),
        Some(leader) => shell.links.send_ordered(&leader),
        None => {}
    }
}

/// Has a node carry out a drain, and does not wait for its end.
pub(super) async fn tell(shell: &Shell, node: &NodeId, request: DrainRequest) -> Result<(), Failure> {
    let mut client = peer(shell, node)?;
    let mut request = tonic::Request::new(request);
    shell.links.sign(&mut request);
    match timeout(COUNT, client.drain(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(drover_proto::failure_of(&status)),
        Err(_) => Err(Failure::new(ErrorCode::BackendUnavailable, "it does not answer")),
    }
}

fn progress(state: &DrainState) -> DrainResponse {
    DrainResponse { moved: state.moved, left: state.left, stuck: state.stuck.clone() }
}

fn stopped(state: &DrainState) -> Status {
    let failure = Failure::new(ErrorCode::HandoffFailed, state.error.clone());
    status_of(&failure.hint("the order stands, and it goes on when there is one; `drover members` lists the nodes"))
}

/// Tells of this node's own drain until it has ended or nobody listens.
fn watch_here(shell: &Shell, ear: Ear) {
    let mut state = shell.drains.state.subscribe();
    let stopping = shell.ctx.shutdown().clone();
    shell.ctx.spawn("watch drain", async move {
        loop {
            let now = state.borrow_and_update().clone().unwrap_or_default();
            let word = if now.error.is_empty() { Ok(progress(&now)) } else { Err(stopped(&now)) };
            let over = !now.running;
            if ear.send(word).await.is_err() || over {
                return;
            }
            sleep(TELL).await;
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                () = ear.closed() => return,
                () = stopping.cancelled() => return,
            }
        }
    });
}

/// Tells of another node's drain, whatever becomes of that node.
async fn watch_other(shell: &Shell, node: &NodeId, ear: &Ear) {
    let mut known = DrainState::default();
    loop {
        let word = match status(shell, node).await {
            Some(status) => match status.drain.filter(|_| status.draining) {
                Some(state) if !state.error.is_empty() => Some(Err(stopped(&state))),
                Some(state) => {
                    known = state;
                    Some(Ok(!known.running))
                }
                // It was started again and has not begun, or it was undone.
                None => Some(Ok(!stands(shell, node).await)),
            },
            None if shell.view.is_gone(node) => {
                let left = owned_by(shell, node).await;
                left.map(|left| {
                    known.left = left;
                    Ok(left == 0)
                })
            }
            None => None,
        };
        let over = match word {
            Some(Err(status)) => {
                let _ = ear.send(Err(status)).await;
                return;
            }
            Some(Ok(over)) => over,
            None => false,
        };
        if ear.send(Ok(progress(&known))).await.is_err() || over {
            return;
        }
        tokio::select! {
            () = sleep(TELL) => {}
            () = ear.closed() => return,
            () = shell.ctx.shutdown().cancelled() => return,
        }
    }
}

async fn stands(shell: &Shell, node: &NodeId) -> bool {
    let (orders, of) = (shell.orders.clone(), node.clone());
    tokio::task::spawn_blocking(move || orders.of(&of).is_some()).await.unwrap_or(true)
}

/// Sessions that the records say are a node's, which cannot be asked.
async fn owned_by(shell: &Shell, node: &NodeId) -> Option<u32> {
    let (ownership, of) = (shell.disk.places().ownership.clone(), node.clone());
    let owned = tokio::task::spawn_blocking(move || ownership.owned_by(&of)).await.ok()?.ok()?;
    Some(owned.iter().filter(|record| record.cause != crate::core::Cause::Closed).count() as u32)
}

async fn status(shell: &Shell, node: &NodeId) -> Option<pb::GetStatusResponse> {
    let mut client = peer(shell, node).ok()?;
    let mut request = tonic::Request::new(GetStatusRequest {});
    shell.links.sign(&mut request);
    Some(timeout(COUNT, client.get_status(request)).await.ok()?.ok()?.into_inner())
}

async fn here(shell: &Shell) -> Result<Vec<SessionId>, Failure> {
    let held = shell.jobs.with(|engine| {
        let held = engine.sessions().filter(|view| matches!(view.state, State::Active | State::Transferring));
        let own = held.filter(|view| view.owner.as_ref() == Some(&engine.me().node));
        own.map(|view| view.session).collect()
    });
    held.await
}

async fn count_here(shell: &Shell) -> Result<usize, Failure> {
    here(shell).await.map(|sessions| sessions.len())
}

/// Moves every session away from here. How many are left.
async fn empty(shell: &Shell, drains: &Drains, planned: Planned) -> Result<u32, Failure> {
    let sessions = here(shell).await?;
    if sessions.is_empty() {
        return Ok(0);
    }
    let (shares, by) = (planned.shares, planned.by);
    info!(sessions = sessions.len(), nodes = shares.len(), planned_by = by, "this node is emptied");
    let total = sessions.len() as u32;
    // Each of the others takes so many at a time.
    let most = shell.settings.max_moves * shares.len();
    let mut plan = DrainPlan::new(sessions, shares, most, PER_SECOND);
    let (begun, mut events, mut moved) = (Instant::now(), shell.events.listen(), 0);
    let before = drains.state().map_or(0, |state| state.moved);
    drains.change(|state| state.left = total);
    while !plan.is_done() && shell.view.own().leaving {
        while let Some(next) = plan.next(begun.elapsed()) {
            let (session, to) = (next.session, Some(next.to));
            shell.jobs.input(Input::Move { session, to, why: Why::Drain }).await;
        }
        tokio::select! {
            event = events.recv() => match event {
                Ok(Event::Completed { session, .. }) => {
                    moved += 1;
                    plan.ended(&session, true);
                    drains.change(|state| (state.moved, state.left) = (before + moved, total.saturating_sub(moved)));
                }
                Ok(Event::Failed { session, .. } | Event::NotMoved { session, .. }) => plan.ended(&session, false),
                Ok(_) => {}
                Err(error) => warn!(%error, "a drain has lost sight of its moves"),
            },
            () = sleep(STEP) => {}
            () = shell.ctx.shutdown().cancelled() => break,
        }
    }
    let left = count_here(shell).await? as u32;
    drains.change(|state| state.stuck = plan.stuck().iter().map(ToString::to_string).collect());
    info!(moved, left, took_ms = begun.elapsed().as_millis() as u64, "this node was emptied");
    Ok(left)
}

/// Who takes sessions, and how many each has; without those that are to be empty too.
pub(super) async fn shares(shell: &Shell, without: &BTreeSet<NodeId>) -> Vec<Share> {
    let mut shares = Vec::new();
    for node in shell.view.able().into_iter().filter(|node| !without.contains(node)) {
        match status(shell, &node).await {
            Some(status) if !status.draining => shares.push(Share { node, sessions: status.held, weight: 1 }),
            Some(_) => {}
            None => warn!(node = %node, "a node that could take sessions does not answer"),
        }
    }
    shares
}
