//! What both of `OpenAI`'s interfaces have in common on the way in: which model, how much, and the conversation.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Refusal;
use super::{Front, WITHIN};
use crate::call::{CallRequest, Message, Part, Role, Tool, ToolChoice};
use crate::provider::OutputSchema;
use crate::shell::{Chain, Job};

/// A name of a model that leaves the choice to the configuration.
const OURS: &[&str] = &["", "auto", "default", "drover"];
/// The header by which a caller says how long it will wait, in milliseconds.
const WITHIN_MS: &str = "x-drover-within-ms";

/// Where a call for this model goes. `provider/model` names both, unless a configured model has that very name.
pub(super) fn chain(front: &Front, model: &str) -> Result<Chain, Refusal> {
    let lanes = front.pool.lanes().all();
    let chain = if OURS.contains(&model) {
        front.pool.chain(None, None)
    } else if lanes.iter().any(|lane| lane.model == model) {
        front.pool.chain(None, Some(model))
    } else {
        match model.split_once('/').filter(|(provider, _)| lanes.iter().any(|lane| lane.name == *provider)) {
            Some((provider, model)) => front.pool.chain(Some(provider), Some(model)),
            None => front.pool.chain(None, Some(model)),
        }
    };
    let not_found = |message: String| Refusal::new(axum::http::StatusCode::NOT_FOUND, "model_not_found", message);
    let chain = chain.map_err(|failure| not_found(failure.to_string()))?;
    if chain.first().is_none() {
        return Err(not_found("no provider is configured".to_owned()));
    }
    Ok(chain)
}

/// The bound on the answer: as asked for, else as configured.
pub(super) fn max_tokens(chain: &Chain, asked: Option<u64>) -> Result<u32, Refusal> {
    match asked {
        Some(0) => Err(Refusal::bad("the bound on the answer must be at least 1 token")),
        Some(asked) => u32::try_from(asked).map_err(|_| Refusal::bad("the bound on the answer is no number of tokens")),
        None => Ok(chain.first().map_or(0, |lane| lane.max_tokens)),
    }
}

/// The job for a request.
pub(super) fn job(request: CallRequest, chain: Chain, headers: &HeaderMap) -> Job {
    let asked = headers.get(WITHIN_MS).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_millis);
    let mut job = Job::call(request, chain);
    job.priority = super::clients::priority(headers);
    job.within = Some(asked.unwrap_or(WITHIN));
    job.cache = may_be_kept(headers);
    job
}

/// Whether an answer that was kept will do; the header by which programs say that it will not is that of the web.
pub(super) fn may_be_kept(headers: &HeaderMap) -> bool {
    let said = headers.get(axum::http::header::CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
    !said.split(',').any(|word| matches!(word.trim(), "no-cache" | "no-store"))
}

/// A conversation as it is put together.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    system: String,
    messages: Vec<Message>,
}

impl Conversation {
    pub(super) fn system(&mut self, text: &str) {
        if !self.system.is_empty() && !text.is_empty() {
            self.system.push_str("\n\n");
        }
        self.system.push_str(text);
    }

    pub(super) fn add(&mut self, role: Role, part: Part) {
        match self.messages.last_mut().filter(|last| last.role == role && role != Role::User) {
            Some(last) => last.parts.push(part),
            None => self.messages.push(Message { role, parts: vec![part] }),
        }
    }

    /// What a function returned. Its name stands at the call that it answers.
    pub(super) fn result(&mut self, id: String, content: String) -> Result<(), Refusal> {
        let calls = self.messages.iter().rev().flat_map(|message| &message.parts);
        let name = calls.into_iter().find_map(|part| match part {
            Part::ToolCall(call) if call.id == id => Some(call.name.clone()),
            _ => None,
        });
        let Some(name) = name else {
            return Err(Refusal::bad("the result of a tool call has no call of its id before it"));
        };
        self.add(Role::Tool, Part::ToolResult { id, name, content });
        Ok(())
    }

    /// Moves it into a request.
    pub(super) fn into_request(self, request: &mut CallRequest) -> Result<(), Refusal> {
        if self.messages.is_empty() {
            return Err(Refusal::bad("there is no message to answer"));
        }
        request.system = (!self.system.is_empty()).then(|| self.system.into());
        request.messages = self.messages;
        Ok(())
    }
}

/// Text, or parts of which all are text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Text {
    Plain(String),
    Parts(Vec<TextPart>),
}

#[derive(Debug, Deserialize)]
pub(super) struct TextPart {
    #[serde(rename = "type", default)]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
}

impl Text {
    pub(super) fn read(self) -> Result<String, Refusal> {
        match self {
            Self::Plain(text) => Ok(text),
            Self::Parts(parts) => {
                let mut out = String::new();
                for part in parts {
                    let Some(text) = part.text.or(part.refusal) else {
                        let kind: String = part.kind.chars().take(40).collect();
                        let message = format!("content of the type {kind:?} is not passed on: only text is");
                        return Err(Refusal::unsupported(message));
                    };
                    out.push_str(&text);
                }
                Ok(out)
            }
        }
    }
}

/// A function as both interfaces write it, one in a field of its own.
#[derive(Debug, Deserialize)]
pub(super) struct Function {
    pub(super) name: String,
    description: Option<String>,
    parameters: Option<Value>,
    strict: Option<bool>,
}

impl From<Function> for Tool {
    fn from(function: Function) -> Self {
        Self {
            name: function.name,
            description: function.description,
            parameters: function
                .parameters
                .filter(Value::is_object)
                .unwrap_or_else(|| json!({"type": "object", "properties": {}})),
            strict: function.strict,
        }
    }
}

/// `"auto"`, `"none"`, `"required"`, or an object with the name of a function at either of two places.
pub(super) fn tool_choice(choice: Option<&Value>) -> Result<ToolChoice, Refusal> {
    let Some(choice) = choice.filter(|choice| !choice.is_null()) else { return Ok(ToolChoice::Auto) };
    match choice.as_str() {
        Some("auto") => return Ok(ToolChoice::Auto),
        Some("none") => return Ok(ToolChoice::Never),
        Some("required") => return Ok(ToolChoice::Required),
        _ => {}
    }
    let name = choice.pointer("/function/name").or_else(|| choice.get("name")).and_then(Value::as_str);
    name.map(|name| ToolChoice::Named(name.to_owned())).ok_or_else(|| Refusal::bad("this tool_choice is not known"))
}

/// The shape of the answer: `text`, `json_object`, or a schema at either of two places.
pub(super) fn shape(format: Option<&Value>, request: &mut CallRequest) -> Result<(), Refusal> {
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(()) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(()),
        Some("json_object") => {
            request.json = true;
            Ok(())
        }
        Some("json_schema") => {
            let at = format.get("json_schema").unwrap_or(format);
            let name = at.get("name").and_then(Value::as_str).unwrap_or("answer");
            let schema = at.get("schema").cloned().ok_or_else(|| Refusal::bad("the format has no schema"))?;
            let schema = OutputSchema::new(name, schema).map_err(|error| Refusal::bad(error.to_string()))?;
            request.schema = Some(Arc::new(schema));
            Ok(())
        }
        _ => Err(Refusal::unsupported("this format of answers is not known: use text, json_object or json_schema")),
    }
}
