//! The chat agent: a conversation with the model that the dispatcher is configured with, under its limits and its budget. No tools, no
//! files, no program of its own.
//!
//! It asks through the node's door to the pool, so a node needs no key and no way to the internet. Each request carries the conversation, its
//! newest part when all of it would be too much.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use drover_config::WorkerConfig;
use drover_mailbox::Mailbox;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, InjectionId, OutboxId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::agent::{Agent, AgentCommand, AgentEvent, TurnOutcome};
use crate::door::{Door, Plan};

/// What the pool takes for the model that the dispatcher is configured with.
const POOL_MODEL: &str = "drover";
/// Bytes of a conversation that one request carries at most.
const CARRIED: usize = 512 << 10;
/// A line of the stream that is longer is none of ours.
const LONGEST_LINE: usize = 4 << 20;
/// How long the door may say nothing: the dispatcher tries again by itself for a while.
const SILENCE: Duration = Duration::from_mins(30);
/// Pieces of an answer that may wait for their reader.
const PIECES: usize = 64;
/// What was said, in the node's directory.
const HISTORY: &str = "chat.jsonl";

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Said {
    /// By this role.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into() }
    }
}

/// Why there is no chat on this node.
pub(crate) fn not_open() -> Failure {
    Failure::new(
        ErrorCode::ProviderUnavailable,
        "nodes of this instance do not come to the dispatcher, so chat has no model",
    )
    .hint("set worker.agent to chat, or worker.codex_provider to pool, and start the daemons again")
}

/// A model to talk to.
#[derive(Debug)]
pub struct Model {
    door: Door,
    name: String,
    client: reqwest::Client,
}

impl Model {
    /// Opens a door to the pool for a node that takes part in no turn of a worker's own agent, such as one that serves sessions.
    pub async fn of_node(
        id: &OutboxId,
        mailbox: &Path,
        identity: Option<PathBuf>,
        config: &WorkerConfig,
        ctx: &Context,
    ) -> Result<Self, Failure> {
        let plan = Plan::of(id, &Mailbox::new(mailbox.to_owned()), identity, config, ctx);
        Self::open(plan.ok_or_else(not_open)?, config).await
    }

    async fn open(plan: Plan, config: &WorkerConfig) -> Result<Self, Failure> {
        let client = drover_service::web::client().no_proxy().read_timeout(SILENCE).build();
        let client = client.map_err(|error| {
            Failure::new(ErrorCode::Internal, format!("no connection to the pool can be made: {error}"))
        })?;
        let name = config.codex_model.clone().unwrap_or_else(|| POOL_MODEL.to_owned());
        Ok(Self { door: plan.open().await?, name, client })
    }

    /// Has the model answer the last thing that was said. The answer goes to `pieces` as it comes, and is given back whole.
    pub async fn answer(&self, said: &[Said], pieces: mpsc::Sender<String>) -> Result<String, Failure> {
        let body = json!({"model": self.name, "stream": true, "messages": newest(said, CARRIED)});
        let url = format!("{}/chat/completions", self.door.url());
        let broken = |error: &reqwest::Error| {
            Failure::new(ErrorCode::ProviderUnavailable, format!("the way to the model broke: {error}"))
                .hint("`drover doctor` says how the dispatcher is; say it again when it is there")
        };
        let asked = self.client.post(url).bearer_auth(self.door.token().reveal()).json(&body).send().await;
        let mut response = asked.map_err(|error| broken(&error))?;
        if !response.status().is_success() {
            let status = response.status();
            let text = response.text().await.unwrap_or_default();
            return Err(refused(&format!("HTTP {status}"), &text));
        }
        let mut lines = Lines::default();
        let mut answer = String::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| broken(&error))? {
            for line in lines.push(&bytes)? {
                match Event::of(&line) {
                    Event::Text(text) => {
                        answer.push_str(&text);
                        // Without a listener the answer is whole all the same.
                        let _ = pieces.send(text).await;
                    }
                    Event::End => return Ok(answer),
                    Event::Failed(error) => return Err(refused("the model", &error)),
                    Event::Other => {}
                }
            }
        }
        let cut = Failure::new(ErrorCode::ProviderUnavailable, "the answer of the model was cut off");
        Err(cut.hint("say it again"))
    }
}

fn refused(who: &str, text: &str) -> Failure {
    let error = serde_json::from_str::<Value>(text).unwrap_or_default();
    let message = error["error"]["message"].as_str().or(error["message"].as_str()).unwrap_or(text);
    let message: String = message.chars().take(500).collect();
    Failure::new(ErrorCode::ProviderUnavailable, format!("{who} answered: {message}"))
        .hint("`drover spend` shows the budget, `drover setup` the provider")
}

/// The newest part of a conversation that fits, with what stands before all of it.
fn newest(said: &[Said], most: usize) -> Vec<&Said> {
    let (rules, talk) = said.split_at(said.iter().take_while(|said| said.role == "system").count());
    let mut room = most;
    let fitting = talk.iter().rev().take_while(|said| {
        let fits = said.content.len() <= room;
        room = room.saturating_sub(said.content.len());
        fits
    });
    let fitting = fitting.count().max(1).min(talk.len());
    rules.iter().chain(&talk[talk.len() - fitting..]).collect()
}

/// Lines out of bytes that come as they come.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, Failure> {
        self.rest.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        if self.rest.len() > LONGEST_LINE {
            return Err(refused("the pool", "a line without an end"));
        }
        Ok(lines)
    }
}

/// What a line of the stream says.
#[derive(Debug, PartialEq)]
enum Event {
    Text(String),
    Failed(String),
    End,
    Other,
}

impl Event {
    fn of(line: &str) -> Self {
        let Some(data) = line.strip_prefix("data:").map(str::trim_start) else { return Self::Other };
        if data == "[DONE]" {
            return Self::End;
        }
        let Ok(event) = serde_json::from_str::<Value>(data) else { return Self::Other };
        if !event["error"].is_null() {
            return Self::Failed(data.to_owned());
        }
        match event["choices"][0]["delta"]["content"].as_str() {
            Some(text) if !text.is_empty() => Self::Text(text.to_owned()),
            _ => Self::Other,
        }
    }
}

/// The agent of a node that was launched with it.
pub(crate) struct ChatAgent {
    plan: Plan,
    config: WorkerConfig,
    history: PathBuf,
}

impl ChatAgent {
    pub(crate) fn new(plan: Plan, config: &WorkerConfig, node_dir: &Path) -> Self {
        Self { plan, config: config.clone(), history: node_dir.join(HISTORY) }
    }
}

#[async_trait]
impl Agent for ChatAgent {
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        let Self { plan, config, history } = *self;
        match Model::open(plan, &config).await {
            Ok(model) => {
                let said = read(&history);
                Talk { model, said, history, commands, events }.run().await;
            }
            // When nobody listens there is nobody to tell.
            Err(failure) => drop(events.send(AgentEvent::GaveUp { failure }).await),
        }
    }
}

/// What was said before, as far as it can be read.
fn read(history: &Path) -> Vec<Said> {
    let text = fs::read_to_string(history).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

struct Talk {
    model: Model,
    said: Vec<Said>,
    history: PathBuf,
    commands: mpsc::Receiver<AgentCommand>,
    events: mpsc::Sender<AgentEvent>,
}

impl Talk {
    async fn run(mut self) {
        let detail = json!({"model": self.model.name, "model_provider": "drover"});
        self.tell(AgentEvent::Ready { detail, pid: None }).await;
        while let Some(command) = self.commands.recv().await {
            match command {
                AgentCommand::Begin { injection, prompt, .. } => {
                    if !self.turn(injection, prompt).await {
                        return;
                    }
                }
                AgentCommand::Steer { injection, prompt, .. } => {
                    self.tell(AgentEvent::SteerRefused { injection, prompt }).await;
                }
                AgentCommand::Stop => return,
                AgentCommand::Interrupt { .. } | AgentCommand::Leave { .. } | AgentCommand::Answer { .. } => {}
            }
        }
    }

    async fn tell(&self, event: AgentEvent) {
        let _ = self.events.send(event).await;
    }

    /// One turn. False: the agent is to end.
    async fn turn(&mut self, injection: InjectionId, prompt: String) -> bool {
        let mut said = self.said.clone();
        said.push(Said::new("user", prompt));
        let known = self.said.len();
        let (pieces, mut heard) = mpsc::channel::<String>(PIECES);
        let model = &self.model;
        let answering = model.answer(&said, pieces);
        let mut answering = Box::pin(answering);
        let (mut goes_on, mut begun) = (true, String::new());
        let answer = loop {
            tokio::select! {
                biased;
                Some(piece) = heard.recv() => {
                    begun.push_str(&piece);
                    let data = json!({"content": piece});
                    let event = AgentEvent::Event { injection: injection.clone(), kind: "assistant_delta".to_owned(), data };
                    let _ = self.events.send(event).await;
                }
                answer = &mut answering => break answer.map_err(|failure| TurnOutcome {
                    text: begun.clone(),
                    ..TurnOutcome::failed(failure.code, failure.message)
                }),
                command = self.commands.recv() => match command {
                    Some(AgentCommand::Interrupt { injection: whose } | AgentCommand::Leave { injection: whose })
                        if whose == injection =>
                    {
                        break Err(TurnOutcome::interrupted(begun.clone()));
                    }
                    Some(AgentCommand::Steer { injection, prompt, .. }) => {
                        let _ = self.events.send(AgentEvent::SteerRefused { injection, prompt }).await;
                    }
                    Some(AgentCommand::Stop) | None => {
                        goes_on = false;
                        break Err(TurnOutcome::interrupted(begun.clone()));
                    }
                    Some(_) => {}
                },
            }
        };
        drop(answering);
        let outcome = match answer {
            Ok(text) => {
                while let Ok(piece) = heard.try_recv() {
                    let data = json!({"content": piece});
                    self.tell(AgentEvent::Event {
                        injection: injection.clone(),
                        kind: "assistant_delta".to_owned(),
                        data,
                    })
                    .await;
                }
                said.push(Said::new("assistant", text.clone()));
                self.keep(&said[known..]);
                self.said = said;
                TurnOutcome::completed(text)
            }
            Err(outcome) => outcome,
        };
        self.tell(AgentEvent::TurnEnded { injection, outcome }).await;
        goes_on
    }

    fn keep(&self, new: &[Said]) {
        let write = || -> io::Result<()> {
            let mut file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&self.history)?;
            let mut text = Vec::new();
            for said in new {
                serde_json::to_writer(&mut text, said)?;
                text.push(b'\n');
            }
            file.write_all(&text)?;
            file.sync_data()
        };
        match write() {
            Ok(()) => debug!(said = self.said.len(), "the conversation is kept"),
            Err(error) => {
                warn!(%error, path = %self.history.display(), "a worker that starts again will not know of this turn");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_the_newest_part_that_fits_and_always_the_last_word() {
        let said = [("system", "be brief"), ("user", "aaaa"), ("assistant", "bbbb"), ("user", "cccc")];
        let said: Vec<Said> = said.iter().map(|(role, text)| Said::new(role, *text)).collect();
        let texts = |most| newest(&said, most).iter().map(|said| said.content.as_str()).collect::<Vec<_>>();
        assert_eq!(texts(100), ["be brief", "aaaa", "bbbb", "cccc"]);
        assert_eq!(texts(9), ["be brief", "bbbb", "cccc"]);
        assert_eq!(texts(1), ["be brief", "cccc"]);
    }

    #[test]
    fn a_stream_is_read_however_it_is_cut() {
        let stream = "data: {\"choices\":[{\"delta\":{\"content\":\"Gr\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"üße\"}}]}\n\
                      : still at work\n\ndata: {\"choices\":[]}\n\ndata: [DONE]\n\n";
        for size in [1, 3, 7, 1000] {
            let mut lines = Lines::default();
            let all: Vec<Event> = stream
                .as_bytes()
                .chunks(size)
                .flat_map(|bytes| lines.push(bytes).unwrap())
                .map(|line| Event::of(&line))
                .filter(|event| *event != Event::Other)
                .collect();
            assert_eq!(all, [Event::Text("Gr".into()), Event::Text("üße".into()), Event::End], "in pieces of {size}");
        }
        let failed = Event::of("data: {\"error\":{\"message\":\"over the cap\"}}");
        assert!(matches!(&failed, Event::Failed(text) if refused("x", text).message.contains("over the cap")));
    }
}
