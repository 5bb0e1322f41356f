//! A session as its agent sees it.

use std::collections::BTreeMap;

use drover_types::{Epoch, RequestId, SessionId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::record::{Opening, Outcome, Record};
use crate::core::{Call, Turn};

/// Who said something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Whoever asks.
    User,
    /// The agent.
    Assistant,
}

/// One thing that was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// By whom.
    pub role: Role,
    /// In which turn.
    pub turn: Turn,
    /// The text; of a turn that failed, what is to be said of that.
    pub content: String,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
}

/// A call of a tool that has not answered. Its key is the session's id with these two numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Its key.
    pub call: Call,
    /// The tool and what it is given.
    pub what: String,
    /// What came of it; nothing while it is under way.
    pub result: Option<String>,
}

/// A session with everything that was said in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// Its name.
    pub session_id: SessionId,
    /// Conversation so far.
    pub messages: Vec<Message>,
    /// What its turns share.
    pub context: BTreeMap<String, serde_json::Value>,
    /// Calls of tools in the turn that runs.
    pub tools: Vec<ToolCall>,
    /// What it was opened with.
    pub metadata: Opening,
    /// Under whom it is, or was when the last record was written.
    pub epoch: Epoch,
    /// Manifest of its working directory.
    pub files: Option<String>,
    /// Turns that wait or run, with their names.
    pub waiting: Vec<(Turn, RequestId, String)>,
    /// It is over.
    pub closed: bool,
}

/// Records that make no session.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StateError {
    /// The first one after the owner's must open it.
    #[error("session {0} has no opening record")]
    NotOpened(SessionId),
}

impl SessionState {
    /// Adds up records that an [`crate::core::Outline`] has accepted.
    pub fn of<'a>(id: &SessionId, records: impl IntoIterator<Item = &'a Record>) -> Result<Self, StateError> {
        let mut records = records.into_iter();
        let mut epoch = Epoch(0);
        let metadata = loop {
            match records.next() {
                Some(Record::Epoch { epoch: begun, .. }) => epoch = *begun,
                Some(Record::Opened { opening }) => break opening.clone(),
                _ => return Err(StateError::NotOpened(id.clone())),
            }
        };
        let mut state = Self {
            session_id: id.clone(),
            messages: Vec::new(),
            context: BTreeMap::new(),
            tools: Vec::new(),
            metadata,
            epoch,
            files: None,
            waiting: Vec::new(),
            closed: false,
        };
        records.for_each(|record| state.apply(record));
        Ok(state)
    }

    /// Takes the next record.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Epoch { epoch, .. } => self.epoch = *epoch,
            Record::Opened { .. } => {}
            Record::Accepted { turn, request, prompt, at_us } => {
                self.waiting.push((*turn, request.clone(), prompt.clone()));
                let content = prompt.clone();
                self.messages.push(Message { role: Role::User, turn: *turn, content, at_us: *at_us });
            }
            Record::Begun { .. } => self.tools.clear(),
            Record::Called { call, what } => {
                self.tools.push(ToolCall { call: *call, what: what.clone(), result: None });
            }
            Record::Returned { call, result } => {
                if let Some(tool) = self.tools.iter_mut().find(|tool| tool.call == *call) {
                    tool.result = Some(result.clone());
                }
            }
            Record::Ended { turn, outcome, at_us } => {
                self.waiting.retain(|(waiting, ..)| waiting != turn);
                self.tools.clear();
                let content = match outcome {
                    Outcome::Answer(text) => text.clone(),
                    Outcome::Failed { message, .. } => message.clone(),
                };
                // Behind its own prompt, before those that came while it ran.
                let at = self.messages.iter().rposition(|said| said.turn <= *turn).map_or(0, |at| at + 1);
                self.messages.insert(at, Message { role: Role::Assistant, turn: *turn, content, at_us: *at_us });
            }
            Record::Context { key, value: Some(value) } => {
                self.context.insert(key.clone(), value.clone());
            }
            Record::Context { key, value: None } => {
                self.context.remove(key);
            }
            Record::Files { manifest } => self.files = Some(manifest.clone()),
            Record::Closed => self.closed = true,
        }
    }
}
