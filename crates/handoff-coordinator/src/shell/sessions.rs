//! Questions about sessions, and what people have done with them.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::{
    CloseRequest, ExplainResponse, GetSessionResponse, HandoffRequest, HandoffResponse, ListSessionsRequest,
    OpenSession, Owner, Session, SessionEvent, SessionMessage, SessionState as Pb,
};
use drover_proto::{failure_of, status_of};
use drover_service::MAX_MESSAGE_BYTES;
use drover_types::{Epoch, ErrorCode, Failure, SessionId};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::ops::failed;
use super::route::failure;
use super::{Shell, events};
use crate::core::{Cause, Event, Failure as Why, Input, NodeId, OwnerRecord, Reply, SessionView, State, Why as Reason};
use crate::ownership::Ownership as _;
use crate::session::{Role, SessionState};

/// Longest wait for the end of a session, whose turns are answered first.
const CLOSING: Duration = Duration::from_mins(5);
/// A node that is moving a session about is asked again after this.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a session that is about to be served here is waited for.
const ABOUT_TO: Duration = Duration::from_secs(10);
/// Longest wait for another node's list.
const COUNT: Duration = Duration::from_secs(2);
/// Most bytes of what was said in one answer.
const SAID: usize = 32 << 20;

fn state_of(state: State) -> Pb {
    match state {
        State::Active => Pb::Active,
        State::Transferring => Pb::Transferring,
        State::Migrated => Pb::Migrated,
        State::Closed => Pb::Closed,
    }
}

fn shown(view: &SessionView) -> Session {
    Session {
        session_id: view.session.to_string(),
        epoch: view.epoch.0,
        owner: view.owner.as_ref().map(ToString::to_string).unwrap_or_default(),
        state: state_of(view.state) as i32,
        messages: u64::from(2 * view.turns - view.unanswered),
        bytes: view.bytes,
        agent: view.agent.map(|agent| agent.to_string()).unwrap_or_default(),
    }
}

fn foreign(record: &OwnerRecord) -> Session {
    let state = if record.cause == Cause::Closed { Pb::Closed } else { Pb::Active };
    Session {
        session_id: record.session.to_string(),
        epoch: record.epoch.0,
        owner: record.owner.node.to_string(),
        state: state as i32,
        ..Session::default()
    }
}

/// The newest owner of a session.
pub(super) async fn newest(shell: &Shell, session: &SessionId) -> Result<Option<OwnerRecord>, Failure> {
    let (ownership, session) = (shell.disk.places().ownership.clone(), session.clone());
    let read = tokio::task::spawn_blocking(move || ownership.newest(&session)).await;
    let gone = |why: String| Failure::new(ErrorCode::StoreUnavailable, why).hint("look at the shared file system");
    read.map_err(|error| gone(error.to_string()))?.map_err(|error| gone(error.to_string()))
}

/// Sessions, of this node or of all.
pub(crate) async fn list(shell: &Shell, all: bool, closed: bool) -> Result<Vec<Session>, Failure> {
    let here = shell.jobs.with(|engine| engine.sessions().map(|view| shown(&view)).collect::<Vec<_>>()).await?;
    let (mut listed, mut told) = (Vec::new(), Vec::new());
    if all {
        let ownership = shell.disk.places().ownership.clone();
        let everywhere = tokio::task::spawn_blocking(move || ownership.all()).await;
        let broken = |why: String| Failure::new(ErrorCode::StoreUnavailable, why);
        let records =
            everywhere.map_err(|error| broken(error.to_string()))?.map_err(|error| broken(error.to_string()))?;
        listed.extend(records.iter().map(foreign));
        told = told_by_others(shell, closed).await;
    }
    // What this node serves it knows best; of the others the records do.
    let own = shell.me.node.as_str();
    let found = listed;
    let here = here.into_iter().filter(|session| !all || session.owner == own);
    let more: Vec<Session> = here.chain(told).collect();
    let mut newest: BTreeMap<String, Session> =
        found.into_iter().map(|session| (session.session_id.clone(), session)).collect();
    for session in more {
        if newest.get(&session.session_id).is_none_or(|known| known.epoch <= session.epoch) {
            newest.insert(session.session_id.clone(), session);
        }
    }
    let known = |session: &Session| !session.owner.is_empty() && session.epoch > 0;
    newest.retain(|_, session| known(session) && (closed || session.state() != Pb::Closed));
    Ok(newest.into_values().collect())
}

/// What the other nodes say of the sessions that they serve. One that does not answer says nothing.
async fn told_by_others(shell: &Shell, closed: bool) -> Vec<Session> {
    let ask = |node: NodeId| async move {
        let mut client = peer(shell, &node).ok()?;
        let mut request = tonic::Request::new(ListSessionsRequest { all: false, closed });
        shell.links.sign(&mut request);
        let told = timeout(COUNT, client.list_sessions(request)).await.ok()?.ok()?.into_inner().sessions;
        Some(told.into_iter().filter(move |session| session.owner == node.as_str()))
    };
    let told = futures::future::join_all(shell.view.able().into_iter().map(ask)).await;
    told.into_iter().flatten().flatten().collect()
}

/// One session with what was said in it.
pub(crate) async fn get(shell: &Shell, session: SessionId, last: usize) -> Result<GetSessionResponse, Failure> {
    let record = newest(shell, &session).await?.ok_or_else(|| failure(&Why::UnknownSession))?;
    let id = session.clone();
    let view = shell.jobs.with(move |engine| engine.session(&id)).await?;
    let view = view.filter(|view| view.owner.as_ref() == Some(&shell.me.node));
    let state = if view.is_some() {
        shell.disk.state(&session).await?
    } else {
        let (places, id) = (shell.disk.places().clone(), session.clone());
        let read = tokio::task::spawn_blocking(move || places.read_foreign(&id)).await;
        let broken = |why: String| Failure::new(ErrorCode::StoreUnavailable, why);
        read.map_err(|error| broken(error.to_string()))?.map_err(|error| broken(error.to_string()))?
    };
    let mut found = GetSessionResponse { session: Some(foreign(&record)), ..GetSessionResponse::default() };
    if let Some(view) = &view {
        found.session = Some(shown(view));
    }
    if let Some(state) = state {
        fill(&mut found, state, last);
    }
    Ok(found)
}

fn fill(found: &mut GetSessionResponse, state: SessionState, last: usize) {
    let count = state.messages.len();
    if let Some(session) = &mut found.session {
        session.messages = count as u64;
        session.agent = state.metadata.agent.to_string();
    }
    let most = if last == 0 { count } else { last.min(count) };
    let mut bytes = 0;
    let mut messages: Vec<SessionMessage> = state
        .messages
        .into_iter()
        .rev()
        .take(most)
        .take_while(|said| {
            bytes += said.content.len();
            bytes <= SAID
        })
        .map(|said| SessionMessage {
            role: if said.role == Role::User { "user" } else { "assistant" }.to_owned(),
            turn: said.turn.0,
            content: said.content,
            timestamp_us: said.at_us,
        })
        .collect();
    messages.reverse();
    found.messages = messages;
    found.context = state.context.into_iter().map(|(key, value)| (key, value.to_string())).collect();
    let waits = state.tools.iter().filter(|tool| tool.result.is_none());
    found.pending_calls = waits.map(|tool| format!("{}.{}", tool.call.turn.0, tool.call.n)).collect();
    found.opened = Some(OpenSession {
        agent: state.metadata.agent.to_string(),
        capabilities: state.metadata.capabilities.into_iter().collect(),
        metadata: state.metadata.metadata.into_iter().collect(),
    });
}

/// The node that owns a session, when it is another that can be asked.
pub(super) async fn other_owner(shell: &Shell, session: &SessionId) -> Result<Option<NodeId>, Failure> {
    let record = newest(shell, session).await?.ok_or_else(|| failure(&Why::UnknownSession))?;
    if record.cause == Cause::Closed {
        return Err(failure(&Why::SessionClosed));
    }
    let node = record.owner.node;
    shell.view.owner(&node);
    Ok((node != shell.me.node && !shell.view.is_gone(&node)).then_some(node))
}

/// A client of another node's door.
pub(super) fn peer(shell: &Shell, node: &NodeId) -> Result<HandoffServiceClient<tonic::transport::Channel>, Failure> {
    let channel = shell.links.channel(node).ok_or_else(|| {
        Failure::new(ErrorCode::BackendUnavailable, format!("it is not known where {node} can be reached"))
            .hint("`drover members` lists the nodes")
    })?;
    Ok(HandoffServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// Ends a session, wherever it lives.
pub(crate) async fn close(shell: &Shell, session: SessionId) -> Result<(), Failure> {
    let until = Instant::now() + CLOSING;
    loop {
        if let Some(node) = other_owner(shell, &session).await? {
            let mut request = tonic::Request::new(CloseRequest { session_id: session.to_string() });
            shell.links.sign(&mut request);
            return peer(shell, &node)?.close(request).await.map(drop).map_err(|status| failure_of(&status));
        }
        let mut waiter = shell.waiters.add();
        shell.jobs.input(Input::Recover { session: session.clone() }).await;
        shell.jobs.input(Input::Close { session: session.clone(), reply: waiter.to }).await;
        let late = || Failure::new(ErrorCode::BackendUnavailable, "the session's turns do not end; it ends after them");
        match timeout(CLOSING, waiter.reply()).await.map_err(|_| late())? {
            Some(Reply::Closed) => return Ok(()),
            Some(Reply::Refused(Why::SessionClosed)) => return Err(failure(&Why::SessionClosed)),
            Some(Reply::Refused(why)) => return Err(failure(&why)),
            _ if Instant::now() >= until => return Err(late()),
            _ => sleep(AGAIN).await,
        }
    }
}

/// Moves a session, wherever it lives, and waits for it.
pub(crate) async fn hand_over(shell: &Shell, session: SessionId, to: String) -> Result<HandoffResponse, Status> {
    let until = Instant::now() + ABOUT_TO;
    loop {
        if let Some(node) = other_owner(shell, &session).await.map_err(failed)? {
            if node.as_str() == to {
                return Err(failed(Failure::new(ErrorCode::InvalidRequest, format!("the session is on {to} already"))));
            }
            let mut request = tonic::Request::new(HandoffRequest { session_id: session.to_string(), to });
            shell.links.sign(&mut request);
            let answer = peer(shell, &node).map_err(failed)?.handoff(request).await?;
            return Ok(answer.into_inner());
        }
        if to == shell.me.node.as_str() {
            return Err(failed(Failure::new(ErrorCode::InvalidRequest, format!("the session is on {to} already"))));
        }
        if !to.is_empty() {
            let node = NodeId::new(&to);
            let why = match shell.view.addr(&node) {
                _ if shell.view.is_gone(&node) => format!("{to} is gone"),
                None => format!("no node {to:?} takes sessions"),
                Some(_) => String::new(),
            };
            if !why.is_empty() {
                let failure = Failure::new(ErrorCode::InvalidRequest, why);
                return Err(failed(failure.hint("`drover members` lists the nodes")));
            }
        }
        let mut events = shell.events.listen();
        let target = (!to.is_empty()).then(|| NodeId::new(&to));
        shell.jobs.input(Input::Recover { session: session.clone() }).await;
        shell.jobs.input(Input::Move { session: session.clone(), to: target, why: Reason::Operator }).await;
        match outcome(&mut events, &session).await {
            Ok(response) => return Ok(HandoffResponse { from: shell.me.node.to_string(), ..response }),
            // It is about to be served here, or to leave.
            Err(Why::NotHere | Why::Moving) if Instant::now() < until => sleep(AGAIN).await,
            Err(why) => {
                let failure = Failure::new(ErrorCode::HandoffFailed, events::say(&why));
                return Err(status_of(&failure.hint("the session stays where it is; `drover why SESSION` says more")));
            }
        }
    }
}

/// Waits until a session's move has ended.
async fn outcome(
    events: &mut tokio::sync::broadcast::Receiver<Event>,
    session: &SessionId,
) -> Result<HandoffResponse, Why> {
    loop {
        match events.recv().await {
            Err(RecvError::Closed) => return Err(Why::Silent),
            Ok(Event::NotMoved { session: of, error } | Event::Failed { session: of, error, .. }) if of == *session => {
                return Err(error);
            }
            Ok(Event::Completed { handoff, session: of, to, epoch, bytes, attempts, frozen, total })
                if of == *session =>
            {
                return Ok(HandoffResponse {
                    handoff_id: handoff.to_string(),
                    from: String::new(),
                    to: to.to_string(),
                    epoch: epoch.0,
                    bytes,
                    attempts,
                    frozen_us: frozen.as_micros() as u64,
                    total_us: total.as_micros() as u64,
                });
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
        }
    }
}

fn cause_name(cause: &Cause) -> (&'static str, String) {
    match cause {
        Cause::Opened => ("opened", String::new()),
        Cause::Moved { handoff } => ("moved", handoff.to_string()),
        Cause::Reclaimed { handoff } => ("reclaimed", handoff.to_string()),
        Cause::Recovered => ("recovered", String::new()),
        Cause::TakenOver => ("taken_over", String::new()),
        Cause::Closed => ("closed", String::new()),
    }
}

fn sentence(record: &OwnerRecord) -> String {
    let OwnerRecord { epoch, owner, cause, .. } = record;
    let node = &owner.node;
    match cause {
        Cause::Opened => format!("epoch {epoch}: {node} opened it"),
        Cause::Moved { handoff } => format!("epoch {epoch}: it moved to {node} by handoff {handoff}"),
        Cause::Reclaimed { handoff } => {
            format!("epoch {epoch}: {node} kept it, because handoff {handoff} did not come to its end")
        }
        Cause::Recovered => format!("epoch {epoch}: {node} was started again and goes on with it"),
        Cause::TakenOver => format!("epoch {epoch}: {node} took it over, because its node was gone"),
        Cause::Closed => format!("epoch {epoch}: {node} closed it"),
    }
}

/// Why a session is where it is.
pub(crate) async fn explain(shell: &Shell, session: SessionId) -> Result<ExplainResponse, Failure> {
    let (ownership, id) = (shell.disk.places().ownership.clone(), session.clone());
    let read = tokio::task::spawn_blocking(move || ownership.history(&id)).await;
    let broken = |why: String| Failure::new(ErrorCode::StoreUnavailable, why);
    let records = read.map_err(|error| broken(error.to_string()))?.map_err(|error| broken(error.to_string()))?;
    let newest = records.last().ok_or_else(|| failure(&Why::UnknownSession))?;
    let id = session.clone();
    let view = shell.jobs.with(move |engine| engine.session(&id)).await?;
    let told = shell.events.of(&session);
    let mut lines: Vec<String> = records.iter().map(sentence).collect();
    if shell.view.is_gone(&newest.owner.node) && newest.cause != Cause::Closed {
        lines.push(format!("{} is gone; whoever is asked next takes it over", newest.owner.node));
    }
    lines.extend(told.iter().map(|(_, text)| format!("here: {text}")));
    let here = view.as_ref().filter(|view| view.epoch >= newest.epoch && view.epoch > Epoch(0));
    let owners = records.iter().map(|record| {
        let (cause, handoff_id) = cause_name(&record.cause);
        Owner {
            epoch: record.epoch.0,
            node_id: record.owner.node.to_string(),
            boot: record.owner.boot,
            cause: cause.to_owned(),
            handoff_id,
        }
    });
    let events = told.iter().map(|(at, text)| SessionEvent { timestamp_us: *at, text: text.clone() });
    Ok(ExplainResponse {
        session: Some(here.map_or_else(|| foreign(newest), shown)),
        owners: owners.collect(),
        events: events.collect(),
        lines,
    })
}
