//! An answer that is kept, in memory and as it stands on the disk.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::call::{CallAnswer, Delta, Finish, ToolCall, Usage};
use crate::core::{LaneId, Status};
use crate::shell::Done;

/// What an answer takes in memory beside its text.
const OVERHEAD: u64 = 512;

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kept {
    pub(super) answer: CallAnswer,
    /// When it was answered, in seconds of Unix time.
    pub(super) at: u64,
    /// About what it takes.
    pub(super) bytes: u64,
}

/// As it stands on the disk.
#[derive(Serialize, Deserialize)]
struct Body {
    text: String,
    #[serde(default)]
    tool_calls: Vec<ToolCall>,
    finish: String,
    usage: Option<Usage>,
    structured: Option<Value>,
    model: Option<String>,
    response_id: Option<String>,
}

impl Kept {
    /// The answer that a job got, when it may be kept: a whole one, of the lane that is asked first.
    pub(super) fn of(done: &Done, first: Option<LaneId>) -> Option<Self> {
        let answer = done.answer.as_ref().filter(|_| done.status == Status::Answered && !done.cached)?;
        let whole = matches!(answer.finish, Finish::Stop | Finish::Length | Finish::ToolCalls);
        let by_first = done.lane.as_ref().map(|lane| lane.id) == first;
        if !whole || !by_first || !answer.citations.is_empty() || !answer.searches.is_empty() {
            return None;
        }
        let mut answer = answer.clone();
        // What was said of limits then says nothing about now.
        answer.hints = crate::call::LimitHints::default();
        Some(Self::new(answer, done.ended_us / 1_000_000))
    }

    fn new(answer: CallAnswer, at: u64) -> Self {
        let calls: usize =
            answer.tool_calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len()).sum();
        let structured = if answer.structured.is_some() { 2 * answer.text.len() } else { 0 };
        let bytes = (answer.text.len() + calls + structured) as u64 + OVERHEAD;
        Self { answer, at, bytes }
    }

    pub(super) fn is_fresh(&self, now: u64, ttl: Duration) -> bool {
        // A clock that was set back makes nothing older.
        now.saturating_sub(self.at) < ttl.as_secs().max(1)
    }

    /// The answer in pieces, for those who want it so.
    pub(super) fn deltas(&self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if !self.answer.text.is_empty() {
            deltas.push(Delta::Text(self.answer.text.clone()));
        }
        for (index, call) in self.answer.tool_calls.iter().enumerate() {
            deltas.push(Delta::ToolCall { index, id: call.id.clone(), name: call.name.clone() });
            deltas.push(Delta::Arguments { index, text: call.arguments.clone() });
        }
        deltas
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let answer = &self.answer;
        let body = Body {
            text: answer.text.clone(),
            tool_calls: answer.tool_calls.clone(),
            finish: match answer.finish {
                Finish::Length => "length",
                Finish::ToolCalls => "tool_calls",
                Finish::Stop | Finish::Blocked(_) | Finish::Other(_) => "stop",
            }
            .to_owned(),
            usage: answer.usage,
            structured: answer.structured.clone(),
            model: answer.model.clone(),
            response_id: answer.response_id.clone(),
        };
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// Reads what an earlier process wrote; what cannot be read is not there.
    pub(super) fn from_bytes(bytes: &[u8], at: u64) -> Option<Self> {
        let body: Body = serde_json::from_slice(bytes).ok()?;
        let finish = match body.finish.as_str() {
            "stop" => Finish::Stop,
            "length" => Finish::Length,
            "tool_calls" => Finish::ToolCalls,
            _ => return None,
        };
        let answer = CallAnswer {
            tool_calls: body.tool_calls,
            usage: body.usage,
            structured: body.structured,
            model: body.model,
            response_id: body.response_id,
            ..CallAnswer::of(body.text, finish)
        };
        Some(Self::new(answer, at))
    }
}
