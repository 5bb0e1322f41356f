//! One turn of an agent that the worker knows: it is started for the turn and ends with it.
//!
//! So nothing of a session runs between its turns: a node holds as many sessions as its disk does, what a turn leaves behind is
//! captured while nobody writes, and a process that goes on elsewhere never meets an older one.

use std::time::Duration;

use drover_types::{ErrorCode, InjectionId, RequestId};
use drover_worker::agent::{Agent, AgentCommand, AgentEvent, TurnOutcome, TurnStatus};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::TurnOut;
use crate::session::{Outcome, TurnFault};

/// What may wait between an agent and whoever hears it.
const WAITING: usize = 256;
/// How long an interrupted turn may take to end before its agent is told to end itself.
const INTERRUPT: Duration = Duration::from_secs(15);

/// How a turn went.
#[derive(Debug)]
pub(super) struct Heard {
    /// Everything that the agent said in it, in its order; what was streamed, put together.
    pub(super) text: String,
    /// How it ended.
    pub(super) outcome: TurnOutcome,
}

impl Heard {
    /// How it ended, for the session's records.
    pub(super) fn outcome(self) -> Outcome {
        let Self { text, outcome } = self;
        let why = |otherwise: &str| outcome.error.clone().unwrap_or_else(|| otherwise.to_owned());
        match outcome.status {
            TurnStatus::Completed => Outcome::Answer(text),
            TurnStatus::Interrupted => {
                Outcome::Failed { fault: TurnFault::Interrupted, message: why("the turn was interrupted") }
            }
            TurnStatus::Failed if outcome.code == Some(ErrorCode::TurnLost) => {
                Outcome::Failed { fault: TurnFault::TurnLost, message: why("the agent ended while the turn ran") }
            }
            TurnStatus::Failed => {
                Outcome::Failed { fault: TurnFault::AgentFailed, message: why("the agent gave no reason") }
            }
        }
    }
}

/// What is asked of an agent.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// The turn's name, with which the agent marks the prompt.
    pub(super) name: RequestId,
    /// The prompt.
    pub(super) prompt: String,
    /// Say yes to what stays inside the working directory. To everything else the answer is no: nobody can be asked.
    pub(super) approves: bool,
}

/// Runs an agent for one turn and ends it. When this returns, its process and all that it has started are gone.
pub(super) async fn one_turn(agent: Box<dyn Agent>, ask: Ask, says: &TurnOut, stop: &CancellationToken) -> Heard {
    let (commands, commands_out) = mpsc::channel(WAITING);
    let (events_in, events) = mpsc::channel(WAITING);
    // Both kinds of names have the same letters.
    let name = InjectionId::try_from(String::from(ask.name.clone()));
    let Ok(name) = name else { return Heard { text: String::new(), outcome: lost("the turn has no usable name") } };
    let listener =
        Listener { name, prompt: ask.prompt, approves: ask.approves, says, commands, events, text: Text::default() };
    let ((), heard) = tokio::join!(agent.run(commands_out, events_in), listener.listen(stop));
    heard
}

struct Listener<'a> {
    name: InjectionId,
    prompt: String,
    approves: bool,
    says: &'a TurnOut,
    commands: mpsc::Sender<AgentCommand>,
    events: mpsc::Receiver<AgentEvent>,
    text: Text,
}

impl Listener<'_> {
    async fn listen(mut self, stop: &CancellationToken) -> Heard {
        let injection = self.name.clone();
        let prompt = std::mem::take(&mut self.prompt);
        self.command(AgentCommand::Begin { injection: injection.clone(), prompt, trace: None }).await;
        let mut stopping = false;
        let mut limit = None;
        let outcome = loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => if let Some(outcome) = self.hear(event).await {
                        break outcome;
                    },
                    None => break lost("the agent ended without a word"),
                },
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    limit = Some(tokio::time::Instant::now() + INTERRUPT);
                    self.command(AgentCommand::Interrupt { injection: injection.clone() }).await;
                }
                () = until(limit) => {
                    break TurnOutcome::interrupted("");
                }
            }
        };
        self.command(AgentCommand::Stop).await;
        // Nothing that it still says belongs to the turn; it must be heard all the same, or it would wait.
        while self.events.recv().await.is_some() {}
        if let Some(rest) = self.text.end(&outcome.text) {
            self.say(rest).await;
        }
        Heard { text: self.text.whole, outcome }
    }

    async fn command(&self, command: AgentCommand) {
        // One that is gone says so by the end of its events.
        let _ = self.commands.send(command).await;
    }

    async fn say(&self, piece: String) {
        self.says.text(&piece).await;
    }

    async fn hear(&mut self, event: AgentEvent) -> Option<TurnOutcome> {
        match event {
            AgentEvent::Event { kind, data, .. } => {
                let content = data.get("content").and_then(Value::as_str).unwrap_or_default();
                let piece = match kind.as_str() {
                    "assistant_delta" => self.text.piece(content),
                    "assistant" => self.text.message(content),
                    _ => None,
                };
                if let Some(piece) = piece {
                    self.say(piece).await;
                }
            }
            AgentEvent::ApprovalWanted { approval_id, call_id, inside_workspace, .. } => {
                let approved = self.approves && inside_workspace;
                self.command(AgentCommand::Answer { approval_id, call_id, approved, decision: None }).await;
            }
            AgentEvent::TurnEnded { injection, outcome } if injection == self.name => return Some(outcome),
            AgentEvent::GaveUp { failure } => {
                let hint = if failure.hint.is_empty() { String::new() } else { format!("; {}", failure.hint) };
                return Some(TurnOutcome::failed(failure.code, format!("{}{hint}", failure.message)));
            }
            AgentEvent::TurnEnded { .. }
            | AgentEvent::Ready { .. }
            | AgentEvent::ApprovalGone { .. }
            | AgentEvent::SteerRefused { .. }
            | AgentEvent::Crashed { .. } => {}
        }
        None
    }
}

async fn until(limit: Option<tokio::time::Instant>) {
    match limit {
        Some(limit) => tokio::time::sleep_until(limit).await,
        None => std::future::pending().await,
    }
}

fn lost(why: &str) -> TurnOutcome {
    TurnOutcome::failed(ErrorCode::TurnLost, why)
}

/// What was said in a turn, out of pieces and of whole messages that repeat them.
#[derive(Debug, Default)]
struct Text {
    whole: String,
    /// Where the message that is being said begins.
    message: usize,
    /// The message is over: the next one stands apart.
    ended: bool,
}

impl Text {
    fn add(&mut self, piece: &str) -> Option<String> {
        if piece.is_empty() {
            return None;
        }
        let mut said = String::new();
        if std::mem::take(&mut self.ended) && !self.whole.is_empty() {
            said.push_str("\n\n");
            self.message = self.whole.len() + said.len();
        }
        said.push_str(piece);
        self.whole.push_str(&said);
        Some(said)
    }

    fn piece(&mut self, piece: &str) -> Option<String> {
        self.add(piece)
    }

    /// A message is complete: what of it was not streamed is still to be said.
    fn message(&mut self, content: &str) -> Option<String> {
        let streamed = if self.ended { "" } else { &self.whole[self.message..] };
        let rest = if let Some(rest) = content.strip_prefix(streamed) {
            rest
        } else {
            // Not what was streamed: then the message counts as one of its own.
            self.ended = true;
            content
        };
        let said = self.add(rest);
        self.ended = true;
        said
    }

    /// The turn is over. Its last message was said already, as a rule.
    fn end(&mut self, last: &str) -> Option<String> {
        if self.whole.ends_with(last) { None } else { self.message(last) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_streamed_and_what_is_repeated_whole_are_one_text() {
        let mut text = Text::default();
        let said: Vec<String> = [
            text.piece("I loo"),
            text.piece("k."),
            text.message("I look."),
            text.message("Done, all of it."),
            text.piece("And "),
            text.message("And so on"),
            text.end("And so on"),
        ]
        .into_iter()
        .flatten()
        .collect();
        assert_eq!(said.concat(), text.whole);
        assert_eq!(text.whole, "I look.\n\nDone, all of it.\n\nAnd so on");

        let mut silent = Text::default();
        assert_eq!(silent.end("only at the end"), Some("only at the end".to_owned()));
        assert_eq!(silent.whole, "only at the end");
    }
}
