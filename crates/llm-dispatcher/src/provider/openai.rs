//! The chat completions of `OpenAI`, spoken by Groq and by every compatible server as well.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::endpoint::{Endpoint, MaxTokensField, ProviderKind};
use super::failure;
use super::sse::SseEvent;
use super::stream::{self, Assembly, Format};
use super::transport::{Reply, Target, Transport};
use crate::call::{
    CallAnswer, CallError, CallRequest, FailureKind, Finish, Part, Provider, Role, Sink, ToolCall, ToolChoice, Usage,
};

/// A provider that speaks chat completions.
#[derive(Debug)]
pub(super) struct OpenAi {
    transport: Transport,
    target: Result<Target, CallError>,
    max_tokens_field: MaxTokensField,
}

impl OpenAi {
    pub(super) fn new(transport: Transport, endpoint: &Endpoint) -> Self {
        let base = transport.base();
        let path = match endpoint.kind {
            // Its address is written with and without the version.
            ProviderKind::Groq if !base.ends_with("/v1") => format!("{base}/openai/v1/chat/completions"),
            _ => format!("{base}/chat/completions"),
        };
        let target = transport.target(&path);
        let habit = match endpoint.kind {
            ProviderKind::Compatible => MaxTokensField::MaxTokens,
            _ => MaxTokensField::MaxCompletionTokens,
        };
        Self { transport, target, max_tokens_field: endpoint.max_tokens_field.unwrap_or(habit) }
    }

    fn body(&self, model: &str, request: &CallRequest) -> Result<Vec<u8>, CallError> {
        let max = Some(request.max_tokens);
        let (max_tokens, max_completion_tokens) = match self.max_tokens_field {
            MaxTokensField::MaxTokens => (max, None),
            MaxTokensField::MaxCompletionTokens => (None, max),
        };
        let body = Body {
            model,
            messages: messages(request),
            max_tokens,
            max_completion_tokens,
            temperature: request.temperature,
            top_p: request.top_p,
            stop: &request.stop,
            user: request.user.as_deref(),
            response_format: response_format(request),
            tools: request
                .tools
                .iter()
                .map(|tool| ToolBody {
                    kind: "function",
                    function: FunctionBody {
                        name: &tool.name,
                        description: tool.description.as_deref(),
                        parameters: &tool.parameters,
                        strict: tool.strict,
                    },
                })
                .collect(),
            tool_choice: match &request.tool_choice {
                ToolChoice::Auto => None,
                ToolChoice::Never => Some(json!("none")),
                ToolChoice::Required => Some(json!("required")),
                ToolChoice::Named(name) => Some(json!({"type": "function", "function": {"name": name}})),
            }
            .filter(|_| !request.tools.is_empty()),
            stream: request.stream.then_some(true),
            // Groq reports usage by itself, and its clients do not ask for it.
            stream_options: (request.stream && self.transport.kind != ProviderKind::Groq)
                .then_some(StreamOptions { include_usage: true }),
        };
        serde_json::to_vec(&body).map_err(failure::malformed)
    }
}

#[async_trait]
impl Provider for OpenAi {
    fn name(&self) -> &str {
        &self.transport.name
    }

    async fn call(&self, model: &str, request: &CallRequest, sink: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        if request.grounded {
            return Err(unsupported("this provider has no web search of its own: use search, or gemini"));
        }
        let target = self.target.as_ref().map_err(Clone::clone)?;
        let mut begun = match self.transport.post(target, &self.body(model, request)?, sink).await? {
            Reply::Begun(begun) => begun,
            Reply::Blocked(reason, hints) => {
                return Ok(CallAnswer { hints, ..CallAnswer::of("", Finish::Blocked(reason)) });
            }
        };
        let hints = begun.hints;
        let assembly = if request.stream {
            let mut format = Chunks { transport: &self.transport, choices: 0 };
            stream::read(&self.transport, begun, &mut format, sink).await?
        } else {
            let body = self.transport.whole(&mut begun.answer).await?;
            let completion: Completion = serde_json::from_slice(&body).map_err(failure::malformed)?;
            whole(completion)?
        };
        let answer =
            assembly.answer(request).map_err(|error| CallError { hints, streamed: request.stream, ..error })?;
        Ok(CallAnswer { hints, ..answer })
    }
}

pub(super) fn unsupported(message: &str) -> CallError {
    CallError { maybe_billed: false, ..CallError::new(FailureKind::Unsupported, message) }
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<MessageBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<ToolBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    content: Option<std::borrow::Cow<'a, str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<&'a str>,
}

#[derive(Serialize)]
struct ToolCallBody<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    function: CalledBody<'a>,
}

#[derive(Serialize)]
struct CalledBody<'a> {
    name: &'a str,
    arguments: &'a str,
}

#[derive(Serialize)]
struct ToolBody<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    function: FunctionBody<'a>,
}

#[derive(Serialize)]
struct FunctionBody<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    parameters: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    strict: Option<bool>,
}

fn messages(request: &CallRequest) -> Vec<MessageBody<'_>> {
    let plain = |role, text| MessageBody { role, content: Some(text), tool_calls: Vec::new(), tool_call_id: None };
    let mut out = Vec::with_capacity(request.messages.len() + 1);
    if let Some(system) = &request.system {
        out.push(plain("system", system.as_ref().into()));
    }
    for message in &request.messages {
        // Results of functions are messages of their own here.
        for part in &message.parts {
            if let Part::ToolResult { id, content, .. } = part {
                out.push(MessageBody { tool_call_id: Some(id), ..plain("tool", content.as_str().into()) });
            }
        }
        let texts: Vec<&str> = message
            .parts
            .iter()
            .filter_map(|part| if let Part::Text(text) = part { Some(text.as_str()) } else { None })
            .collect();
        let content = match texts[..] {
            [] => None,
            [only] => Some(only.into()),
            _ => Some(texts.concat().into()),
        };
        let tool_calls: Vec<ToolCallBody<'_>> = message
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::ToolCall(call) => Some(ToolCallBody {
                    id: &call.id,
                    kind: "function",
                    function: CalledBody { name: &call.name, arguments: &call.arguments },
                }),
                _ => None,
            })
            .collect();
        let role = if message.role == Role::Assistant { "assistant" } else { "user" };
        if content.is_some() || !tool_calls.is_empty() {
            out.push(MessageBody { role, content, tool_calls, tool_call_id: None });
        }
    }
    out
}

fn response_format(request: &CallRequest) -> Option<Value> {
    match &request.schema {
        Some(schema) => Some(json!({
            "type": "json_schema",
            "json_schema": {"name": schema.name(), "schema": schema.schema()},
        })),
        None if request.json => Some(json!({"type": "json_object"})),
        None => None,
    }
}

#[derive(Deserialize)]
struct Completion {
    id: Option<String>,
    model: Option<String>,
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<UsageBody>,
    x_groq: Option<Groq>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    #[serde(alias = "delta")]
    message: Option<Said>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Said {
    content: Option<Content>,
    refusal: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Called>>,
}

/// Some servers answer with a list of parts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(default)]
    text: String,
}

impl Content {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => parts.into_iter().map(|part| part.text).collect(),
        }
    }
}

#[derive(Deserialize)]
struct Called {
    index: Option<usize>,
    id: Option<String>,
    function: Option<CalledFunction>,
}

#[derive(Deserialize)]
struct CalledFunction {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct UsageBody {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<InputDetails>,
    completion_tokens_details: Option<OutputDetails>,
}

#[derive(Deserialize)]
struct InputDetails {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct OutputDetails {
    reasoning_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Groq {
    usage: Option<UsageBody>,
}

impl UsageBody {
    /// Nothing when a number is missing: half a usage would settle a call for half its price.
    fn usage(&self) -> Option<Usage> {
        Some(Usage {
            input_tokens: self.prompt_tokens?,
            output_tokens: self.completion_tokens?,
            cached_input_tokens: self.prompt_tokens_details.as_ref().and_then(|d| d.cached_tokens).unwrap_or(0),
            reasoning_tokens: self.completion_tokens_details.as_ref().and_then(|d| d.reasoning_tokens).unwrap_or(0),
        })
    }
}

fn finish(reason: &str) -> Finish {
    match reason {
        "stop" => Finish::Stop,
        "length" => Finish::Length,
        "tool_calls" | "function_call" => Finish::ToolCalls,
        "content_filter" => Finish::Blocked(reason.to_owned()),
        other => Finish::Other(other.to_owned()),
    }
}

fn whole(completion: Completion) -> Result<Assembly, CallError> {
    let mut out = Assembly {
        usage: usage_of(&completion),
        model: completion.model,
        response_id: completion.id,
        ended: true,
        ..Assembly::default()
    };
    let Some(choice) = completion.choices.into_iter().next() else {
        return Err(failure::malformed("it has no choices"));
    };
    let Some(said) = choice.message else { return Err(failure::malformed("its choice has no message")) };
    out.finish = choice.finish_reason.as_deref().map(finish);
    out.text = said.content.map(Content::text).unwrap_or_default();
    if let Some(refusal) = said.refusal.filter(|refusal| !refusal.is_empty()) {
        out.finish = Some(Finish::Blocked("refusal".to_owned()));
        out.text.push_str(&refusal);
    }
    for called in said.tool_calls.into_iter().flatten() {
        let function = called.function.ok_or_else(|| failure::malformed("a tool call names no function"))?;
        out.tool_calls.push(ToolCall {
            id: called.id.unwrap_or_default(),
            name: function.name.unwrap_or_default(),
            arguments: function.arguments.unwrap_or_default(),
        });
    }
    Ok(out)
}

fn usage_of(completion: &Completion) -> Option<Usage> {
    let groq = completion.x_groq.as_ref().and_then(|groq| groq.usage.as_ref());
    completion.usage.as_ref().and_then(UsageBody::usage).or_else(|| groq?.usage())
}

struct Chunks<'a> {
    transport: &'a Transport,
    choices: usize,
}

impl Format for Chunks<'_> {
    fn event(&mut self, event: &SseEvent, into: &mut Assembly) -> Result<(), CallError> {
        let data = event.data.trim();
        if data == "[DONE]" {
            into.ended = self.choices > 0;
            return Ok(());
        }
        if data.is_empty() {
            return Ok(());
        }
        let chunk: Completion = match serde_json::from_str(data) {
            Ok(chunk) => chunk,
            Err(error) => return Err(failure::malformed(error)),
        };
        if chunk.choices.is_empty() && chunk.usage.is_none() {
            let value: Value = serde_json::from_str(data).unwrap_or_default();
            if let Some(error) = stream::error_event(&value, data, self.transport.secret.as_ref()) {
                return Err(error);
            }
        }
        if let Some(usage) = usage_of(&chunk) {
            into.usage = Some(usage);
        }
        if into.response_id.is_none() {
            into.response_id = chunk.id;
        }
        if into.model.is_none() {
            into.model = chunk.model;
        }
        for choice in chunk.choices {
            self.choices += 1;
            if choice.index > 0 {
                continue;
            }
            if let Some(said) = choice.message {
                if let Some(content) = said.content {
                    into.add_text(&content.text());
                }
                if let Some(refusal) = said.refusal.filter(|refusal| !refusal.is_empty()) {
                    into.finish = Some(Finish::Blocked("refusal".to_owned()));
                    into.add_text(&refusal);
                }
                for called in said.tool_calls.into_iter().flatten() {
                    piece_of_call(called, into)?;
                }
            }
            if let Some(reason) = choice.finish_reason
                && !matches!(into.finish, Some(Finish::Blocked(_)))
            {
                into.finish = Some(finish(&reason));
            }
        }
        Ok(())
    }
}

/// The first piece of a call has its id and name, the others more of its arguments.
fn piece_of_call(called: Called, into: &mut Assembly) -> Result<(), CallError> {
    let index = called.index.unwrap_or(into.tool_calls.len().saturating_sub(1));
    let (name, arguments) = called.function.map_or((None, None), |function| (function.name, function.arguments));
    if index == into.tool_calls.len() {
        into.add_call(ToolCall {
            id: called.id.unwrap_or_default(),
            name: name.unwrap_or_default(),
            arguments: arguments.unwrap_or_default(),
        });
        return Ok(());
    }
    if index > into.tool_calls.len() {
        return Err(failure::malformed("a tool call is missing in the stream"));
    }
    into.add_arguments(index, &arguments.unwrap_or_default());
    Ok(())
}
