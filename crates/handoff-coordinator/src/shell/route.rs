//! A turn on its way to whoever owns its session, and the answer on its way back, also when the session moves meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{Accepted, Answer, Moved, SendRequest, SendResponse, Text};
use drover_proto::{failure_of, status_of};
use drover_service::{MAX_MESSAGE_BYTES, in_trace, now_us, traceparent};
use drover_types::{AgentKind, Epoch, ErrorCode, Failure, RequestId, SessionId};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use tracing::debug;

use super::ear::Ear;
use super::events::say;
use super::view::AGENTS;
use super::{Shell, waiters::Waiter};
use crate::core::{Asked, Cause, Failure as Why, Input, NodeId, OwnerRecord, Rejection, Reply, Turn};
use crate::ownership::Ownership as _;
use crate::session::{Opening, Outcome, TurnFault};

/// Pause before a turn that nobody took is brought again: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// A turn that nobody accepts for so long is given back.
const PATIENCE: Duration = Duration::from_mins(1);
/// So often in a row a turn follows its session at once.
const HOPS: u32 = 3;
/// Longest wait for the first word of another node.
const FIRST_WORD: Duration = Duration::from_secs(12);
/// Most bytes of text in one message.
const TEXT: usize = 64 << 10;

/// A turn as it was asked for, checked.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) session: SessionId,
    pub(crate) request: RequestId,
    pub(crate) opening: Option<Opening>,
    pub(crate) raw: SendRequest,
}

/// How one try ended.
enum Tried {
    /// The turn is answered, or the caller has gone.
    Over,
    /// The session lives there.
    Elsewhere(NodeId, Epoch),
    /// Once more, a little later.
    Again,
    /// It cannot be.
    Failed(Failure),
}

impl Wanted {
    pub(crate) fn check(raw: SendRequest, shell: &Shell) -> Result<Self, Failure> {
        let invalid = |why: String| Failure::new(ErrorCode::InvalidRequest, why);
        let session: SessionId =
            raw.session_id.parse().map_err(|error: drover_types::IdError| invalid(error.to_string()))?;
        let request = raw.request_id.parse().map_err(|error: drover_types::IdError| invalid(error.to_string()))?;
        if raw.prompt.len() > shell.settings.max_text {
            return Err(invalid(format!("the prompt has more than {} bytes", shell.settings.max_text)));
        }
        let opening = match &raw.open {
            None => None,
            Some(open) => {
                let agent = if open.agent.is_empty() { shell.default_agent.as_str() } else { &open.agent };
                let agent: AgentKind =
                    agent.parse().map_err(|error: drover_types::UnknownName| invalid(error.to_string()))?;
                let mut capabilities: BTreeSet<String> = open.capabilities.iter().cloned().collect();
                capabilities.insert(format!("{AGENTS}={agent}"));
                let metadata = open.metadata.clone().into_iter().collect();
                let replayable = shell.agents.get(agent).is_some_and(|agent| agent.replayable());
                Some(Opening { agent, replayable, capabilities, metadata, at_us: now_us() })
            }
        };
        Ok(Self { session, request, opening, raw })
    }
}

/// Brings one turn to its answer.
pub(crate) struct Route {
    shell: Shell,
    wanted: Wanted,
    ear: Ear,
    /// Bytes of the answer that the caller has.
    offset: u64,
    known: Epoch,
    accepted: Option<(Epoch, String)>,
    /// Nodes that could not be reached for a new session.
    passed_over: BTreeSet<NodeId>,
}

impl Route {
    pub(crate) fn new(shell: &Shell, wanted: Wanted, ear: Ear) -> Self {
        let (offset, known) = (wanted.raw.offset, Epoch(wanted.raw.known_epoch));
        let passed_over = BTreeSet::new();
        Self { shell: shell.clone(), wanted, ear, offset, known, accepted: None, passed_over }
    }

    /// Follows the session until the turn is answered or the caller is gone.
    pub(crate) async fn follow(mut self) {
        let (mut since, mut pause, mut hops) = (Instant::now(), AGAIN.0, 0);
        let mut next: Option<NodeId> = None;
        loop {
            let accepted = self.accepted.clone();
            let tried = match next.take() {
                Some(node) if node != self.shell.me.node => self.elsewhere(&node).await,
                Some(_) => self.here().await,
                None => match self.whereabouts().await {
                    Ok(Some(node)) if node != self.shell.me.node => self.elsewhere(&node).await,
                    Ok(_) => self.here().await,
                    Err(failure) => Tried::Failed(failure),
                },
            };
            if accepted != self.accepted {
                (since, pause, hops) = (Instant::now(), AGAIN.0, 0);
            }
            match tried {
                Tried::Over => return,
                Tried::Failed(failure) => {
                    self.ear.say(Err(status_of(&failure))).await;
                    return;
                }
                Tried::Elsewhere(node, epoch) => {
                    self.known = self.known.max(epoch);
                    let addr = self.shell.view.addr(&node).map(|addr| addr.to_string()).unwrap_or_default();
                    let moved = Moved { node_id: node.to_string(), epoch: epoch.0, addr };
                    if !self.say(Update::Moved(moved)).await || self.wanted.raw.redirect_only {
                        return;
                    }
                    if self.shell.view.addr(&node).is_some() && !self.shell.view.is_gone(&node) {
                        next = Some(node);
                        hops += 1;
                        // Nodes that remember wrongly may each name the other for a while.
                        if hops <= HOPS {
                            continue;
                        }
                    }
                }
                Tried::Again => {}
            }
            if since.elapsed() > PATIENCE {
                let failure =
                    Failure::new(ErrorCode::BackendUnavailable, "nobody takes this session's turns at the moment")
                        .hint("ask again under the same request id; `drover why` says where the session is");
                self.ear.say(Err(status_of(&failure))).await;
                return;
            }
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(AGAIN.1),
                () = self.ear.closed() => return,
                () = self.shell.ctx.shutdown().cancelled() => {
                    let failure = Failure::new(ErrorCode::ShuttingDown, "this node is ending")
                        .hint("ask another node under the same request id");
                    self.ear.say(Err(status_of(&failure))).await;
                    return;
                }
            }
        }
    }

    async fn say(&mut self, update: Update) -> bool {
        self.ear.say(Ok(SendResponse { update: Some(update) })).await
    }

    /// The node that has the session or is to have it; nothing for this one.
    async fn whereabouts(&self) -> Result<Option<NodeId>, Failure> {
        let session = self.wanted.session.clone();
        let held = self.shell.jobs.with(move |engine| engine.holds(&session)).await?;
        if held || self.wanted.raw.redirect_only {
            return Ok(None);
        }
        let (ownership, session) = (self.shell.disk.places().ownership.clone(), self.wanted.session.clone());
        let newest = tokio::task::spawn_blocking(move || ownership.newest(&session)).await;
        match newest {
            // The core tries the file system again, in its own time.
            Err(_) | Ok(Err(_)) => Ok(None),
            Ok(Ok(Some(record))) => Ok(self.owner(&record)),
            Ok(Ok(None)) => self.placed(),
        }
    }

    fn owner(&self, record: &OwnerRecord) -> Option<NodeId> {
        let node = &record.owner.node;
        self.shell.view.owner(node);
        let reachable = *node != self.shell.me.node && !self.shell.view.is_gone(node);
        (record.cause != Cause::Closed && reachable).then(|| node.clone())
    }

    /// Where a new session is to be opened.
    fn placed(&self) -> Result<Option<NodeId>, Failure> {
        let Some(opening) = self.wanted.opening.as_ref().filter(|_| !self.wanted.raw.placed) else { return Ok(None) };
        let place = |threshold| self.shell.view.place(&self.wanted.session, &opening.capabilities, threshold);
        let mut placed = place(self.shell.settings.load_threshold);
        if placed.is_empty() {
            // Everybody has too much to do; somebody takes it all the same.
            placed = place(f64::INFINITY);
        }
        if placed.is_empty() && !opening.capabilities.is_subset(&self.shell.view.own().capabilities) {
            let wanted = opening.capabilities.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Failure::new(
                ErrorCode::InvalidRequest,
                format!("no node has what the session needs: {wanted}"),
            )
            .hint("`drover members` shows what each can do; the agent echo is always there"));
        }
        // A node's own session belongs to it, also when it is first talked to through another door.
        let home = drover_worker::home_of(&self.wanted.session);
        let at_home = |node: &&NodeId| home.as_deref() == Some(node.as_str());
        let mut free = placed.iter().filter(|node| !self.passed_over.contains(*node));
        Ok(free.clone().find(at_home).or_else(|| free.next()).cloned())
    }

    /// Asks this node's own core.
    async fn here(&mut self) -> Tried {
        let mut waiter = self.shell.waiters.add();
        let (session, request) = (self.wanted.session.clone(), self.wanted.request.clone());
        let asked = Asked {
            session,
            request,
            prompt: self.wanted.raw.prompt.clone(),
            reply: waiter.to,
            known: self.known,
            open: self.wanted.opening.clone(),
            at_us: now_us(),
        };
        self.shell.jobs.input(Input::Turn(Box::new(asked))).await;
        let mut running = None;
        loop {
            let reply = tokio::select! {
                reply = next_reply(&mut waiter, &mut running) => reply,
                () = self.ear.closed() => return Tried::Over,
                () = self.shell.ctx.shutdown().cancelled() => return Tried::Again,
            };
            match reply {
                Heard::Said => {
                    if let Some(running) = &mut running
                        && !self.pass_on(running).await
                    {
                        return Tried::Over;
                    }
                }
                Heard::Reply(Reply::Accepted { turn, epoch }) => {
                    let node = self.shell.me.node.to_string();
                    self.shell.metrics.accepted.inc();
                    if !self.accept(turn.0, epoch, node).await {
                        return Tried::Over;
                    }
                    let live = self.shell.live.of(&self.wanted.session, turn);
                    let mut watch = live.watch();
                    watch.mark_changed();
                    running = Some(Running { live, watch });
                }
                Heard::Reply(Reply::Answer { turn, epoch }) => {
                    return self.answer(turn, epoch).await;
                }
                Heard::Reply(Reply::Redirect(record)) => {
                    self.shell.view.owner(&record.owner.node);
                    return Tried::Elsewhere(record.owner.node, record.epoch);
                }
                Heard::Reply(Reply::Retry) | Heard::Nothing => return Tried::Again,
                Heard::Reply(Reply::Refused(why)) => return Tried::Failed(failure(&why)),
                Heard::Reply(Reply::Interrupted { .. }) => {}
                Heard::Reply(Reply::Closed) => return Tried::Failed(failure(&Why::SessionClosed)),
            }
        }
    }

    /// Says that the turn is kept, unless the caller knows.
    async fn accept(&mut self, turn: u32, epoch: Epoch, node_id: String) -> bool {
        let here = Some((epoch, node_id.clone()));
        if self.accepted == here {
            return true;
        }
        self.accepted = here;
        self.known = self.known.max(epoch);
        self.say(Update::Accepted(Accepted { turn, epoch: epoch.0, node_id })).await
    }

    /// Passes on what a turn that runs here has said since.
    async fn pass_on(&mut self, running: &mut Running) -> bool {
        let len = *running.watch.borrow_and_update() as u64;
        if len < self.offset {
            // It runs again. What the caller has counts as far as it says the same, which only the answer tells.
            self.offset = 0;
        }
        let Some(fresh) = running.live.after(self.offset as usize) else {
            self.offset = 0;
            return true;
        };
        let mut rest = fresh.as_str();
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.floor_char_boundary(TEXT.min(rest.len())));
            let text = Text { offset: self.offset, text: piece.to_owned() };
            self.offset += piece.len() as u64;
            rest = behind;
            if !self.say(Update::Text(text)).await {
                return false;
            }
        }
        true
    }

    async fn answer(&mut self, turn: Turn, epoch: Epoch) -> Tried {
        let outcome = self.shell.disk.answer(&self.wanted.session, turn).await;
        let outcome = match outcome {
            Ok(Some(outcome)) => outcome,
            // It has moved on meanwhile; whoever has it answers the same.
            Ok(None) => return Tried::Again,
            Err(failure) => return Tried::Failed(failure),
        };
        self.shell.metrics.answered.inc();
        let (text, fault, message) = match outcome {
            Outcome::Answer(text) => (text, String::new(), String::new()),
            Outcome::Failed { fault, message } => (String::new(), fault_name(fault).to_owned(), message),
        };
        let node_id = self.shell.me.node.to_string();
        self.say(Update::Answer(Answer { turn: turn.0, epoch: epoch.0, node_id, text, fault, message })).await;
        Tried::Over
    }

    /// Asks another node, and passes on what it says.
    async fn elsewhere(&mut self, node: &NodeId) -> Tried {
        let Some(channel) = self.shell.links.channel(node) else {
            self.passed_over.insert(node.clone());
            return Tried::Again;
        };
        let mut client = HandoffServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let request = SendRequest {
            offset: self.offset,
            known_epoch: self.known.0,
            redirect_only: true,
            placed: true,
            ..self.wanted.raw.clone()
        };
        let mut request = in_trace(request, &traceparent().unwrap_or_default());
        self.shell.links.sign(&mut request);
        self.shell.metrics.forwarded.inc();
        let begun = tokio::select! {
            begun = timeout(FIRST_WORD, client.send(request)) => begun,
            () = self.ear.closed() => return Tried::Over,
        };
        let mut stream = match begun {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(status)) => return self.broken(node, &status),
            Err(_) => return self.broken(node, &Status::unavailable("no answer")),
        };
        let mut first = true;
        let stopping = self.shell.ctx.shutdown().clone();
        loop {
            let next = tokio::select! {
                // A node that says nothing while it holds the turn back may be stopped; asking again does no harm.
                next = timeout(if first { FIRST_WORD } else { Duration::MAX }, stream.message()) => next,
                () = self.ear.closed() => return Tried::Over,
                () = self.gone(node) => return Tried::Again,
                () = stopping.cancelled() => return Tried::Again,
            };
            first = false;
            let update = match next {
                Err(_) => return self.broken(node, &Status::unavailable("no word")),
                Ok(Err(status)) => return self.broken(node, &status),
                Ok(Ok(None)) => return Tried::Again,
                Ok(Ok(Some(response))) => response.update,
            };
            match update {
                Some(Update::Accepted(Accepted { turn, epoch, node_id })) => {
                    let heard = self.accept(turn, Epoch(epoch), node_id).await;
                    if !heard {
                        return Tried::Over;
                    }
                }
                Some(Update::Text(text)) => {
                    self.offset = text.offset + text.text.len() as u64;
                    if !self.say(Update::Text(text)).await {
                        return Tried::Over;
                    }
                }
                Some(Update::Moved(moved)) => {
                    return Tried::Elsewhere(NodeId::new(&moved.node_id), Epoch(moved.epoch));
                }
                Some(answer @ Update::Answer(_)) => {
                    self.say(answer).await;
                    return Tried::Over;
                }
                None => {}
            }
        }
    }

    /// Waits until a node is gone.
    async fn gone(&self, node: &NodeId) {
        let mut changed = self.shell.view.watch();
        while !self.shell.view.is_gone(node) {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn broken(&mut self, node: &NodeId, status: &Status) -> Tried {
        debug!(node = %node, session_id = %self.wanted.session, error = status.message(), "a turn was not passed on");
        let failure = failure_of(status);
        match failure.code {
            ErrorCode::BackendUnavailable | ErrorCode::ShuttingDown | ErrorCode::Internal => {
                self.passed_over.insert(node.clone());
                Tried::Again
            }
            _ => Tried::Failed(failure),
        }
    }
}

/// A turn that runs here.
struct Running {
    live: std::sync::Arc<crate::agent::LiveTurn>,
    watch: tokio::sync::watch::Receiver<usize>,
}

enum Heard {
    Reply(Reply),
    /// The turn has said some more.
    Said,
    Nothing,
}

async fn next_reply(waiter: &mut Waiter, running: &mut Option<Running>) -> Heard {
    let said = async {
        let more = match running {
            Some(running) => running.watch.changed().await.is_ok(),
            None => false,
        };
        if !more {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = said => Heard::Said,
        reply = waiter.reply() => reply.map_or(Heard::Nothing, Heard::Reply),
    }
}

pub(crate) fn fault_name(fault: TurnFault) -> &'static str {
    match fault {
        TurnFault::TurnLost => "turn_lost",
        TurnFault::AgentFailed => "agent_failed",
        TurnFault::Interrupted => "interrupted",
    }
}

/// What a caller is told.
pub(crate) fn failure(why: &Why) -> Failure {
    let (code, hint) = match why {
        Why::UnknownSession => (
            ErrorCode::UnknownSession,
            "open it by sending to it with an agent; `drover sessions` lists those that are open",
        ),
        Why::SessionClosed | Why::SessionFull => (ErrorCode::SessionOver, "begin another session"),
        Why::UnknownTurn => (ErrorCode::InvalidRequest, "`drover sessions SESSION` shows its turns"),
        Why::TooLong => (ErrorCode::InvalidRequest, "shorten it"),
        Why::NobodyTook(Some(Rejection::Leaving)) => {
            (ErrorCode::BackendUnavailable, "this node is to be empty; ask another one under the same request id")
        }
        _ => (ErrorCode::HandoffFailed, "`drover why SESSION` says more"),
    };
    Failure::new(code, say(why)).hint(hint)
}
