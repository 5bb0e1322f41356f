//! The messages of Anthropic.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::endpoint::{Endpoint, EndpointError};
use super::failure;
use super::openai::unsupported;
use super::sse::SseEvent;
use super::stream::{self, Assembly, Format};
use super::transport::{Reply, Target, Transport};
use crate::call::{
    CallAnswer, CallError, CallRequest, Finish, Part, Provider, Role, Sink, ToolCall, ToolChoice, Usage,
};

/// The version whose requests may carry a temperature.
const DEFAULT_VERSION: &str = "2023-06-01";
/// From this version on a request with a temperature is refused.
const WITHOUT_SAMPLING: &str = "2026-10-21";

/// A provider that speaks messages.
#[derive(Debug)]
pub(super) struct Anthropic {
    transport: Transport,
    target: Result<Target, CallError>,
    sampling: bool,
}

impl Anthropic {
    pub(super) fn new(mut transport: Transport, endpoint: &Endpoint) -> Result<Self, EndpointError> {
        let version = endpoint.api_version.as_deref().unwrap_or(DEFAULT_VERSION);
        transport.add_header("anthropic-version", version)?;
        let base = transport.base();
        let target = transport.target(&format!("{}/v1/messages", base.strip_suffix("/v1").unwrap_or(base)));
        // Versions are dates, which sort as text.
        Ok(Self { target, transport, sampling: version < WITHOUT_SAMPLING })
    }

    /// An object can be had for certain, as the arguments of a tool that must be called; other shapes are asked for in words.
    fn forces_shape(request: &CallRequest) -> bool {
        request.tools.is_empty() && request.schema.as_ref().is_some_and(|schema| schema.is_object())
    }

    fn body(&self, model: &str, request: &CallRequest) -> Result<Vec<u8>, CallError> {
        let forced = Self::forces_shape(request);
        let mut system = request.system.as_deref().unwrap_or_default().to_owned();
        let mut say = |words: &str| {
            if !system.is_empty() {
                system.push_str("\n\n");
            }
            system.push_str(words);
        };
        match &request.schema {
            Some(schema) if !forced => say(&schema.in_words()),
            None if request.json => say("Answer with one JSON object only, without a code fence."),
            _ => {}
        }
        let mut tools: Vec<ToolBody<'_>> = request
            .tools
            .iter()
            .map(|tool| ToolBody {
                name: &tool.name,
                description: tool.description.as_deref(),
                input_schema: &tool.parameters,
            })
            .collect();
        let mut tool_choice = match &request.tool_choice {
            ToolChoice::Auto => None,
            ToolChoice::Never => Some(json!({"type": "none"})),
            ToolChoice::Required => Some(json!({"type": "any"})),
            ToolChoice::Named(name) => Some(json!({"type": "tool", "name": name})),
        }
        .filter(|_| !request.tools.is_empty());
        if let Some(schema) = request.schema.as_ref().filter(|_| forced) {
            tools.push(ToolBody {
                name: schema.name(),
                description: Some("Gives the answer."),
                input_schema: schema.schema(),
            });
            tool_choice = Some(json!({"type": "tool", "name": schema.name()}));
        }
        let body = Body {
            model,
            max_tokens: request.max_tokens,
            system: (!system.is_empty()).then_some(system),
            messages: messages(request)?,
            temperature: request.temperature.filter(|_| self.sampling),
            top_p: request.top_p.filter(|_| self.sampling),
            stop_sequences: &request.stop,
            metadata: request.user.as_deref().map(|user_id| Metadata { user_id }),
            tools,
            tool_choice,
            stream: request.stream.then_some(true),
        };
        serde_json::to_vec(&body).map_err(failure::malformed)
    }
}

#[async_trait]
impl Provider for Anthropic {
    fn name(&self) -> &str {
        &self.transport.name
    }

    async fn call(&self, model: &str, request: &CallRequest, sink: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        if request.grounded {
            return Err(unsupported("this provider has no web search of its own: use search, or gemini"));
        }
        let forced = Self::forces_shape(request);
        let target = self.target.as_ref().map_err(Clone::clone)?;
        let mut begun = match self.transport.post(target, &self.body(model, request)?, sink).await? {
            Reply::Begun(begun) => begun,
            Reply::Blocked(reason, hints) => {
                return Ok(CallAnswer { hints, ..CallAnswer::of("", Finish::Blocked(reason)) });
            }
        };
        let hints = begun.hints;
        let mut assembly = if request.stream {
            let mut format =
                Events { transport: &self.transport, forced, blocks: Vec::new(), counted: Counted::default() };
            stream::read(&self.transport, begun, &mut format, sink).await?
        } else {
            let body = self.transport.whole(&mut begun.answer).await?;
            whole(&body, forced)?
        };
        if forced && assembly.finish == Some(Finish::ToolCalls) {
            assembly.finish = Some(Finish::Stop);
        }
        let answer =
            assembly.answer(request).map_err(|error| CallError { hints, streamed: request.stream, ..error })?;
        Ok(CallAnswer { hints, ..answer })
    }
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    messages: Vec<MessageBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_sequences: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<ToolBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
}

#[derive(Serialize)]
struct Metadata<'a> {
    user_id: &'a str,
}

#[derive(Serialize)]
struct ToolBody<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    input_schema: &'a Value,
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    content: Vec<BlockBody<'a>>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum BlockBody<'a> {
    Text { text: &'a str },
    ToolUse { id: &'a str, name: &'a str, input: Value },
    ToolResult { tool_use_id: &'a str, content: &'a str },
}

/// Messages of one speaker in a row are put into one: results of several functions must come back together.
fn messages(request: &CallRequest) -> Result<Vec<MessageBody<'_>>, CallError> {
    let mut out: Vec<MessageBody<'_>> = Vec::with_capacity(request.messages.len());
    for message in &request.messages {
        let role = if message.role == Role::Assistant { "assistant" } else { "user" };
        let mut content = Vec::with_capacity(message.parts.len());
        for part in &message.parts {
            content.push(match part {
                // An empty text is refused there.
                Part::Text(text) if text.is_empty() => continue,
                Part::Text(text) => BlockBody::Text { text },
                Part::ToolCall(call) => {
                    BlockBody::ToolUse { id: &call.id, name: &call.name, input: arguments(&call.arguments)? }
                }
                Part::ToolResult { id, content, .. } => BlockBody::ToolResult { tool_use_id: id, content },
            });
        }
        match out.last_mut().filter(|last| last.role == role) {
            Some(last) => last.content.append(&mut content),
            None if content.is_empty() => {}
            None => out.push(MessageBody { role, content }),
        }
    }
    Ok(out)
}

/// Arguments as an object, for the providers that want one.
pub(super) fn arguments(text: &str) -> Result<Value, CallError> {
    if text.trim().is_empty() {
        return Ok(json!({}));
    }
    serde_json::from_str(text).map_err(|_| {
        let message = "the arguments of a tool call in the conversation are no JSON";
        CallError { maybe_billed: false, ..CallError::new(crate::call::FailureKind::BadRequest, message) }
    })
}

#[derive(Deserialize)]
struct MessageAnswer {
    id: Option<String>,
    model: Option<String>,
    content: Option<Vec<Block>>,
    stop_reason: Option<String>,
    usage: Option<UsageBody>,
}

#[derive(Deserialize)]
struct Block {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    text: String,
    id: Option<String>,
    name: Option<String>,
    input: Option<Value>,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[expect(clippy::struct_field_names, reason = "the names of the wire format")]
struct UsageBody {
    input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

/// What has been counted so far: a stream counts the input at its beginning and the output at its end.
#[derive(Default)]
struct Counted {
    input: Option<u64>,
    cached: u64,
    output: Option<u64>,
}

impl Counted {
    fn add(&mut self, usage: &UsageBody) {
        if let Some(input) = usage.input_tokens {
            let cached = usage.cache_read_input_tokens.unwrap_or(0);
            self.input = Some(input + usage.cache_creation_input_tokens.unwrap_or(0) + cached);
            self.cached = cached;
        }
        self.output = usage.output_tokens.or(self.output);
    }

    fn usage(&self) -> Option<Usage> {
        Some(Usage {
            input_tokens: self.input?,
            cached_input_tokens: self.cached,
            output_tokens: self.output?,
            reasoning_tokens: 0,
        })
    }
}

fn finish(reason: &str) -> Finish {
    match reason {
        "end_turn" | "stop_sequence" => Finish::Stop,
        "max_tokens" | "model_context_window_exceeded" => Finish::Length,
        "tool_use" => Finish::ToolCalls,
        "refusal" => Finish::Blocked(reason.to_owned()),
        other => Finish::Other(other.to_owned()),
    }
}

fn whole(body: &[u8], forced: bool) -> Result<Assembly, CallError> {
    let message: MessageAnswer = serde_json::from_slice(body).map_err(failure::malformed)?;
    let Some(content) = message.content else { return Err(failure::malformed("it has no content")) };
    let mut counted = Counted::default();
    counted.add(&message.usage.unwrap_or_default());
    let mut out = Assembly {
        finish: message.stop_reason.as_deref().map(finish),
        usage: counted.usage(),
        model: message.model,
        response_id: message.id,
        ended: true,
        ..Assembly::default()
    };
    for block in content {
        match block.kind.as_str() {
            "text" => out.text.push_str(&block.text),
            "tool_use" => {
                let arguments = block.input.unwrap_or_else(|| json!({})).to_string();
                if forced {
                    out.text = arguments;
                } else {
                    let (id, name) = (block.id.unwrap_or_default(), block.name.unwrap_or_default());
                    out.tool_calls.push(ToolCall { id, name, arguments });
                }
            }
            // Thinking, and kinds to come.
            _ => {}
        }
    }
    Ok(out)
}

/// What an open block of a stream adds to.
enum Open {
    Text,
    Call(usize),
    /// The arguments are the answer.
    Answer,
    Ignored,
}

struct Events<'a> {
    transport: &'a Transport,
    forced: bool,
    blocks: Vec<(u64, Open)>,
    counted: Counted,
}

#[derive(Deserialize)]
struct EventBody {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    index: u64,
    message: Option<MessageAnswer>,
    content_block: Option<Block>,
    delta: Option<DeltaBody>,
    usage: Option<UsageBody>,
}

#[derive(Deserialize)]
struct DeltaBody {
    text: Option<String>,
    partial_json: Option<String>,
    stop_reason: Option<String>,
}

impl Format for Events<'_> {
    fn event(&mut self, event: &SseEvent, into: &mut Assembly) -> Result<(), CallError> {
        if event.data.trim().is_empty() {
            return Ok(());
        }
        let body: EventBody = serde_json::from_str(&event.data).map_err(failure::malformed)?;
        match body.kind.as_str() {
            "message_start" => {
                let message = body.message.ok_or_else(|| failure::malformed("message_start has no message"))?;
                self.counted.add(&message.usage.unwrap_or_default());
                into.usage = self.counted.usage();
                into.model = message.model;
                into.response_id = message.id;
            }
            "content_block_start" => {
                let block = body.content_block.ok_or_else(|| failure::malformed("a block has no content"))?;
                let open = match block.kind.as_str() {
                    "text" => {
                        into.add_text(&block.text);
                        Open::Text
                    }
                    "tool_use" if self.forced => Open::Answer,
                    "tool_use" => {
                        let (id, name) = (block.id.unwrap_or_default(), block.name.unwrap_or_default());
                        into.add_call(ToolCall { id, name, arguments: String::new() });
                        Open::Call(into.tool_calls.len() - 1)
                    }
                    _ => Open::Ignored,
                };
                self.blocks.retain(|(index, _)| *index != body.index);
                self.blocks.push((body.index, open));
            }
            "content_block_delta" => {
                let delta = body.delta.ok_or_else(|| failure::malformed("a delta has none"))?;
                let open = self.blocks.iter().find(|(index, _)| *index == body.index).map(|(_, open)| open);
                match (open, delta.text, delta.partial_json) {
                    (Some(Open::Text), Some(text), _) => into.add_text(&text),
                    (Some(Open::Answer), _, Some(json)) => into.add_text(&json),
                    (Some(Open::Call(call)), _, Some(json)) => into.add_arguments(*call, &json),
                    (None, ..) => return Err(failure::malformed("a delta is of no block")),
                    _ => {}
                }
            }
            "message_delta" => {
                self.counted.add(&body.usage.unwrap_or_default());
                into.usage = self.counted.usage();
                if let Some(reason) = body.delta.and_then(|delta| delta.stop_reason) {
                    into.finish = Some(finish(&reason));
                }
            }
            "message_stop" => into.ended = true,
            "error" => {
                let value: Value = serde_json::from_str(&event.data).unwrap_or_default();
                let error = stream::error_event(&value, &event.data, self.transport.secret.as_ref());
                return Err(error.unwrap_or_else(|| failure::malformed("an error without an error")));
            }
            // `ping`, `content_block_stop`, and kinds to come.
            _ => {}
        }
        Ok(())
    }
}
