//! The node's own conversation as a session: what `inject` says to the node is a turn of it. It is served by the daemon of sessions, so it is
//! kept, moves and is taken over like any other, and the next prompt to this node goes on with it wherever it is by then.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use drover_proto::handoff::OpenSession;
use drover_service::StateDir;
use drover_sessions::{Ask, DOOR, Door, Doors, Heard, Opens, Sending, interrupt, local};
use drover_types::{AgentKind, ErrorCode, InjectionId, OutboxId, RequestId, SessionId, SwarmId};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::debug;

use crate::agent::{Agent, AgentCommand, AgentEvent, TurnOutcome, TurnStatus};

/// How long no door may help: the daemon of sessions comes up a moment after the worker.
const PATIENCE: Duration = Duration::from_mins(2);
/// How long the node's own door is awaited when the session is new: it belongs here.
const OWN_DOOR: Duration = Duration::from_mins(1);
/// Pause before doors are asked again to end a turn that they have not heard of yet.
const AGAIN: Duration = Duration::from_millis(200);

/// The session of a node: `node-<swarm>-<index>`.
pub(crate) fn name_of(id: &OutboxId) -> String {
    format!("node-{}-{}", id.swarm, id.node)
}

/// The node, as the gossip calls it, whose own session this is by its name; nothing for others.
pub fn home_of(session: &SessionId) -> Option<String> {
    let (swarm, index) = session.as_str().strip_prefix("node-")?.rsplit_once('-')?;
    let (swarm, index): (SwarmId, u32) = (swarm.parse().ok()?, index.parse().ok()?);
    Some(format!("{swarm}/{index}"))
}

/// Passes prompts on to the session.
pub(crate) struct OwnSession {
    name: String,
    kind: AgentKind,
    doors: NodeDoors,
}

impl OwnSession {
    pub(crate) fn new(id: &OutboxId, kind: AgentKind, state: &StateDir) -> Self {
        let daemon = format!("{DOOR}-{}+{}", id.swarm, id.node);
        let node = format!("{}/{}", id.swarm, id.node);
        let doors = NodeDoors { node, daemon, state: state.clone(), since: Instant::now() };
        Self { name: name_of(id), kind, doors }
    }
}

/// The node's own door first, then those of its neighbours. A new session is opened on this node, unless that takes none.
#[derive(Clone)]
struct NodeDoors {
    node: String,
    daemon: String,
    state: StateDir,
    /// Since when doors are wanted.
    since: Instant,
}

#[async_trait]
impl Doors for NodeDoors {
    async fn doors(&self) -> Vec<Door> {
        let own = Door::of_daemon(&self.node, &self.state, &self.daemon).opening(Opens::Here);
        let opens = if self.since.elapsed() < OWN_DOOR { Opens::Nothing } else { Opens::Anywhere };
        let others = local(&self.state).into_iter().filter(|(node, _)| *node != self.node);
        let others = others.map(|(node, daemon)| Door::of_daemon(&node, &self.state, &daemon).opening(opens));
        std::iter::once(own).chain(others).collect()
    }
}

#[async_trait]
impl Agent for OwnSession {
    async fn run(self: Box<Self>, mut commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        let detail = json!({ "agent": self.kind, "session_id": self.name });
        if events.send(AgentEvent::Ready { detail, pid: None }).await.is_err() {
            return;
        }
        while let Some(command) = commands.recv().await {
            let (injection, prompt) = match command {
                AgentCommand::Begin { injection, prompt, .. } => (injection, prompt),
                AgentCommand::Stop => return,
                AgentCommand::Steer { injection, prompt, .. } => {
                    let _ = events.send(AgentEvent::SteerRefused { injection, prompt }).await;
                    continue;
                }
                AgentCommand::Interrupt { .. } | AgentCommand::Leave { .. } | AgentCommand::Answer { .. } => continue,
            };
            let mut turn = Turn { injection: injection.clone(), events: &events, text: String::new() };
            let (outcome, stop) = match self.ask(&injection, prompt) {
                Ok(ask) => turn.hear(ask, self.doors_now(), &mut commands).await,
                Err(why) => (TurnOutcome::failed(ErrorCode::InvalidRequest, why), false),
            };
            if events.send(AgentEvent::TurnEnded { injection, outcome }).await.is_err() || stop {
                return;
            }
        }
    }
}

impl OwnSession {
    fn doors_now(&self) -> Arc<dyn Doors> {
        Arc::new(NodeDoors { since: Instant::now(), ..self.doors.clone() })
    }

    fn ask(&self, injection: &InjectionId, prompt: String) -> Result<Ask, String> {
        let session: SessionId = self.name.parse().map_err(|error: drover_types::IdError| error.to_string())?;
        let request: RequestId =
            injection.as_str().parse().map_err(|error: drover_types::IdError| error.to_string())?;
        let open = OpenSession { agent: self.kind.to_string(), ..OpenSession::default() };
        Ok(Ask { session, request, prompt, open: Some(open), patience: PATIENCE })
    }
}

/// A turn under way.
struct Turn<'a> {
    injection: InjectionId,
    events: &'a mpsc::Sender<AgentEvent>,
    text: String,
}

impl Turn<'_> {
    async fn say(&self, kind: &str, data: Value) {
        let (injection, kind) = (self.injection.clone(), kind.to_owned());
        // Without a listener the worker is at its end.
        let _ = self.events.send(AgentEvent::Event { injection, kind, data }).await;
    }

    /// Hears it to its end. True: the worker ends.
    async fn hear(
        &mut self,
        ask: Ask,
        doors: Arc<dyn Doors>,
        commands: &mut mpsc::Receiver<AgentCommand>,
    ) -> (TurnOutcome, bool) {
        // Made at most once, and waits until somebody wants it.
        let ending = end_early(Arc::clone(&doors), ask.session.clone(), ask.request.clone());
        tokio::pin!(ending);
        let mut sending = Sending::new(ask, doors);
        let (mut wanted, mut told) = (false, false);
        loop {
            let heard = tokio::select! {
                heard = sending.next() => heard,
                () = &mut ending, if wanted && !told => {
                    told = true;
                    continue;
                }
                command = commands.recv() => match command {
                    // Its answer then says that it was.
                    Some(AgentCommand::Interrupt { .. }) => {
                        wanted = true;
                        continue;
                    }
                    // In the session it goes on, and its answer stands there.
                    Some(AgentCommand::Leave { .. }) => return (TurnOutcome::interrupted(self.text.as_str()), false),
                    None | Some(AgentCommand::Stop) => return (TurnOutcome::interrupted(self.text.as_str()), true),
                    Some(AgentCommand::Steer { injection, prompt, .. }) => {
                        let _ = self.events.send(AgentEvent::SteerRefused { injection, prompt }).await;
                        continue;
                    }
                    Some(_) => continue,
                },
            };
            match heard {
                Ok(Some(Heard::Text(text))) => {
                    self.text.push_str(&text);
                    self.say("assistant_delta", json!({ "content": text })).await;
                }
                // What was streamed before does not count; the whole answer comes at the end.
                Ok(Some(Heard::Again(text))) => {
                    self.say("assistant_delta", json!({ "content": format!("\n{text}") })).await;
                    self.text = text;
                }
                Ok(Some(Heard::Accepted(_) | Heard::Moved(_))) => {}
                Ok(Some(Heard::Answer(answer))) => {
                    if answer.fault.is_empty() {
                        let data = json!({ "content": answer.text, "final_answer": true });
                        self.say("assistant", data).await;
                        return (TurnOutcome::completed(answer.text), false);
                    }
                    return (failed(&answer.fault, answer.message, &self.text), false);
                }
                Ok(None) => {
                    let why = "the session ended the turn without an answer";
                    return (TurnOutcome::failed(ErrorCode::Internal, why), false);
                }
                Err(_) if wanted => return (TurnOutcome::interrupted(self.text.as_str()), false),
                Err(error) => return (TurnOutcome::failed(ErrorCode::BackendUnavailable, error.to_string()), false),
            }
        }
    }
}

/// Has a turn end wherever it is, also one that no door has heard of yet.
async fn end_early(doors: Arc<dyn Doors>, session: SessionId, request: RequestId) {
    while let Err(error) = interrupt(doors.as_ref(), &session, Some(&request), PATIENCE).await {
        debug!(session_id = %session, %error, "the turn cannot be interrupted yet");
        sleep(AGAIN).await;
    }
}

fn failed(fault: &str, message: String, text: &str) -> TurnOutcome {
    let (status, code) = match fault {
        "turn_lost" => (TurnStatus::Failed, Some(ErrorCode::TurnLost)),
        "interrupted" => (TurnStatus::Interrupted, None),
        _ => (TurnStatus::Failed, Some(ErrorCode::Internal)),
    };
    TurnOutcome { status, error: Some(message), code, text: text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_session_has_a_name_of_its_own_and_a_fault_keeps_its_kind() {
        let id = OutboxId {
            swarm: "0199c7a2-7c1e-7d3a-9c55-0123456789ab".parse().unwrap(),
            node: drover_types::NodeIndex(3),
            generation: drover_types::Generation(1),
        };
        let name = name_of(&id);
        assert_eq!(name, "node-0199c7a2-7c1e-7d3a-9c55-0123456789ab-3");
        let session: SessionId = name.parse().unwrap();
        assert_eq!(home_of(&session).as_deref(), Some("0199c7a2-7c1e-7d3a-9c55-0123456789ab/3"));
        for other in ["notes", "node-1", "node-0199c7a2-7c1e-7d3a-9c55-0123456789ab-one"] {
            assert_eq!(home_of(&other.parse().unwrap()), None);
        }
        assert_eq!(failed("turn_lost", String::new(), "").code, Some(ErrorCode::TurnLost));
        assert_eq!(failed("interrupted", String::new(), "half").status, TurnStatus::Interrupted);
    }
}
