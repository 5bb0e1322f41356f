//! `chat` in a session: the messages of the session go to the model that the dispatcher is configured with, by the way of the node's door to
//! the pool. All that a turn needs is in the session's records, so it goes on anywhere, and may be asked again.

use std::sync::Arc;

use async_trait::async_trait;
use drover_types::{Failure, OutboxId};
use drover_worker::chat::{Model, Said};
use tokio::sync::{OnceCell, mpsc};

use super::installed::Around;
use super::{Agent, Conversation, History, Start, TurnAsked, TurnDone, TurnOut};
use crate::session::{Outcome, Role, SessionState, TurnFault};

/// Pieces of an answer that may wait for their reader.
const PIECES: usize = 64;
/// What a session may be opened with to begin all its requests.
const SYSTEM: &str = "system";

/// Chat.
pub(super) struct Chat {
    around: Around,
    /// One door for all sessions of this node, opened by the first.
    model: Arc<OnceCell<Model>>,
}

impl Chat {
    pub(super) fn new(around: Around) -> Self {
        Self { around, model: Arc::default() }
    }
}

#[async_trait]
impl Agent for Chat {
    /// A turn changes nothing; asked again it costs again, and answers.
    fn replayable(&self) -> bool {
        true
    }

    fn travels(&self) -> bool {
        false
    }

    async fn begin(&self, start: Start) -> Result<Box<dyn Conversation>, Failure> {
        let talk = Talk { around: self.around.clone(), model: Arc::clone(&self.model), history: start.history };
        talk.model().await?;
        Ok(Box::new(talk))
    }
}

struct Talk {
    around: Around,
    model: Arc<OnceCell<Model>>,
    history: History,
}

impl Talk {
    async fn model(&self) -> Result<&Model, Failure> {
        self.model
            .get_or_try_init(|| async {
                let around = &self.around;
                let (swarm, node, mailbox) = around.place.clone().ok_or_else(not_of_a_swarm)?;
                let id = OutboxId { swarm, node, generation: drover_types::Generation(0) };
                Model::of_node(&id, &mailbox, around.identity.clone(), &around.config.worker, &around.ctx).await
            })
            .await
    }
}

fn not_of_a_swarm() -> Failure {
    Failure::new(drover_types::ErrorCode::ProviderUnavailable, "a node outside of a swarm has no way to the dispatcher")
        .hint("open the session with --agent echo or codex, or on a node of a swarm")
}

/// The conversation with this turn's prompt as its last word.
fn said(state: &SessionState, asked: &TurnAsked) -> Vec<Said> {
    let rules = state.metadata.metadata.get(SYSTEM).map(|text| Said::new("system", text.as_str()));
    // Prompts that came after this one are for later turns.
    let before = state.messages.iter().filter(|message| message.turn < asked.turn);
    let before = before.map(|message| {
        let role = match message.role {
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        Said::new(role, message.content.as_str())
    });
    rules.into_iter().chain(before).chain([Said::new("user", asked.prompt.as_str())]).collect()
}

#[async_trait]
impl Conversation for Talk {
    async fn turn(&mut self, asked: TurnAsked, out: &TurnOut) -> TurnDone {
        let state = match self.history.state().await {
            Ok(state) => state,
            Err(failure) => return TurnDone::failed(failure.message),
        };
        let said = said(&state, &asked);
        let model = match self.model().await {
            Ok(model) => model,
            Err(failure) => return TurnDone::failed(format!("{}; {}", failure.message, failure.hint)),
        };
        let (pieces, mut heard) = mpsc::channel::<String>(PIECES);
        let tell = async {
            while let Some(piece) = heard.recv().await {
                out.text(&piece).await;
            }
        };
        tokio::select! {
            (answer, ()) = async { tokio::join!(model.answer(&said, pieces), tell) } => match answer {
                Ok(text) => TurnDone::answer(text),
                Err(failure) => TurnDone::failed(format!("{}; {}", failure.message, failure.hint)),
            },
            () = asked.stop.cancelled() => TurnDone {
                outcome: Outcome::Failed { fault: TurnFault::Interrupted, message: "the turn was interrupted".to_owned() },
                context: Vec::new(),
            },
        }
    }

    async fn end(self: Box<Self>) {}
}
