//! `/v1/chat/completions`.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Front;
use super::error::Refusal;
use super::inbound::{self, Conversation, Function, Text};
use super::outcome::{self, Facts, Running, Told, Writer};
use crate::call::{CallAnswer, CallRequest, Delta, Finish, Part, Role, ToolCall, Usage};
use crate::shell::{Client, Job};

#[derive(Debug, Deserialize)]
pub(super) struct ChatRequest {
    #[serde(default)]
    model: String,
    messages: Vec<ChatMessage>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    stop: Option<Stop>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    tools: Option<Vec<ChatTool>>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    user: Option<String>,
    n: Option<u32>,
    logprobs: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Text>,
    #[serde(default)]
    tool_calls: Option<Vec<ChatToolCall>>,
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ChatToolCall {
    id: String,
    function: CalledFunction,
}

#[derive(Debug, Deserialize)]
struct CalledFunction {
    name: String,
    #[serde(default)]
    arguments: String,
}

#[derive(Debug, Deserialize)]
struct ChatTool {
    #[serde(rename = "type")]
    kind: String,
    function: Option<Function>,
}

/// Answers a conversation.
pub(super) async fn completions(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(body) = body?;
    let asked = Asked::of(&front, &headers, body)?;
    if asked.streams {
        let created = drover_service::now_us() / 1_000_000;
        let writer = Chunks { id: fresh_id(), created, model: asked.model(), include_usage: asked.include_usage };
        let simulated = asked.simulated();
        return outcome::stream(Running::start(asked.client, asked.job), writer, simulated).await;
    }
    let (answer, facts) = outcome::answered(asked.client.run(asked.job).await)?;
    let simulated = facts.simulated();
    Ok(outcome::marked(Json(completion(&answer, &facts)).into_response(), simulated))
}

/// What somebody asks for, once it is clear that it can be had.
pub(super) struct Asked {
    pub(super) client: Arc<Client>,
    pub(super) job: Job,
    streams: bool,
    include_usage: bool,
}

impl Asked {
    pub(super) fn of(front: &Front, headers: &HeaderMap, body: ChatRequest) -> Result<Self, Refusal> {
        if body.n.is_some_and(|n| n != 1) {
            return Err(Refusal::unsupported("n must be 1: ask again for another answer"));
        }
        if body.logprobs == Some(true) {
            return Err(Refusal::unsupported("logprobs are not passed on"));
        }
        let chain = inbound::chain(front, &body.model)?;
        let streams = body.streams();
        let include_usage = body.stream_options.as_ref().is_some_and(|options| options.include_usage);
        let client = front.clients.of(headers, body.user.as_deref());
        let max_tokens = inbound::max_tokens(&chain, body.max_completion_tokens.or(body.max_tokens))?;
        let request = CallRequest { max_tokens, stream: streams, ..request(body)? };
        Ok(Self { client, job: inbound::job(request, chain, headers), streams, include_usage })
    }

    fn simulated(&self) -> bool {
        self.job.chain.first().is_some_and(|lane| lane.simulated())
    }

    fn model(&self) -> String {
        self.job.chain.first().map_or_else(String::new, |lane| lane.model.clone())
    }
}

impl ChatRequest {
    /// The answer is wanted piece by piece.
    pub(super) fn streams(&self) -> bool {
        self.stream == Some(true)
    }
}

/// Writes the answer to a request that is not streamed, as JSON.
pub(super) fn write(answer: &CallAnswer, facts: &Facts, out: &mut Vec<u8>) -> serde_json::Result<()> {
    serde_json::to_writer(out, &completion(answer, facts))
}

fn fresh_id() -> String {
    format!("chatcmpl-{}", uuid::Uuid::new_v4().simple())
}

fn request(body: ChatRequest) -> Result<CallRequest, Refusal> {
    let mut request = CallRequest {
        temperature: body.temperature,
        top_p: body.top_p,
        stop: match body.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        },
        tool_choice: inbound::tool_choice(body.tool_choice.as_ref())?,
        user: body.user.map(Into::into),
        ..CallRequest::default()
    };
    inbound::shape(body.response_format.as_ref(), &mut request)?;
    for tool in body.tools.into_iter().flatten() {
        match tool.function {
            Some(function) if tool.kind == "function" => request.tools.push(function.into()),
            _ => return Err(Refusal::unsupported("only tools of the type function are passed on")),
        }
    }
    let mut names = BTreeSet::new();
    if !request.tools.iter().all(|tool| names.insert(tool.name.as_str())) {
        return Err(Refusal::bad("two tools have the same name"));
    }
    let mut conversation = Conversation::default();
    for message in body.messages {
        let text = message.content.map(Text::read).transpose()?;
        match message.role.as_str() {
            "system" | "developer" => conversation.system(&text.unwrap_or_default()),
            "user" => conversation.add(Role::User, Part::Text(text.unwrap_or_default())),
            "assistant" => {
                if let Some(text) = text.filter(|text| !text.is_empty()) {
                    conversation.add(Role::Assistant, Part::Text(text));
                }
                for call in message.tool_calls.into_iter().flatten() {
                    let CalledFunction { name, arguments } = call.function;
                    conversation.add(Role::Assistant, Part::ToolCall(ToolCall { id: call.id, name, arguments }));
                }
            }
            "tool" => {
                let id = message.tool_call_id.ok_or_else(|| Refusal::bad("a tool message has no tool_call_id"))?;
                conversation.result(id, text.unwrap_or_default())?;
            }
            _ => return Err(Refusal::bad("the role of a message must be system, developer, user, assistant or tool")),
        }
    }
    conversation.into_request(&mut request)?;
    Ok(request)
}

fn finish(finish: &Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::Other(_) => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
        Finish::Blocked(_) => "content_filter",
    }
}

/// An answer as it is written: without a tree of values in between, because it is what is asked for most.
#[derive(Debug, Serialize)]
struct Completion<'a> {
    id: Cow<'a, str>,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [Choice<'a>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
    drover: Told<'a>,
}

#[derive(Debug, Serialize)]
struct Choice<'a> {
    index: u32,
    message: AnswerMessage<'a>,
    logprobs: Option<()>,
    finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
struct AnswerMessage<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<MadeCall<'a>>,
}

#[derive(Debug, Serialize)]
struct MadeCall<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    function: MadeFunction<'a>,
}

#[derive(Debug, Serialize)]
struct MadeFunction<'a> {
    name: &'a str,
    arguments: &'a str,
}

#[derive(Debug, Serialize)]
struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: InputDetails,
    completion_tokens_details: OutputDetails,
}

#[derive(Debug, Serialize)]
struct InputDetails {
    cached_tokens: u64,
}

#[derive(Debug, Serialize)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl From<&Usage> for UsageBody {
    fn from(usage: &Usage) -> Self {
        Self {
            prompt_tokens: usage.input_tokens,
            completion_tokens: usage.output_tokens,
            total_tokens: usage.input_tokens.saturating_add(usage.output_tokens),
            prompt_tokens_details: InputDetails { cached_tokens: usage.cached_input_tokens },
            completion_tokens_details: OutputDetails { reasoning_tokens: usage.reasoning_tokens },
        }
    }
}

fn completion<'a>(answer: &'a CallAnswer, facts: &'a Facts) -> Completion<'a> {
    let tool_calls: Vec<MadeCall<'_>> = answer
        .tool_calls
        .iter()
        .map(|call| MadeCall {
            id: &call.id,
            kind: "function",
            function: MadeFunction { name: &call.name, arguments: &call.arguments },
        })
        .collect();
    let content = (tool_calls.is_empty() || !answer.text.is_empty()).then_some(answer.text.as_str());
    let message = AnswerMessage { role: "assistant", content, refusal: None, tool_calls };
    Completion {
        id: answer.response_id.as_deref().map_or_else(|| fresh_id().into(), Cow::from),
        object: "chat.completion",
        created: facts.created(),
        model: facts.model(answer),
        choices: [Choice { index: 0, message, logprobs: None, finish_reason: finish(&answer.finish) }],
        usage: answer.usage.as_ref().map(UsageBody::from),
        drover: facts.told(),
    }
}

/// Writes an answer in chunks.
struct Chunks {
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
}

impl Chunks {
    fn chunk(&self, choices: &Value) -> Value {
        json!({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model, "choices": choices})
    }

    fn delta(&self, delta: &Value, finish: Option<&str>, out: &mut String) {
        let chunk = self.chunk(&json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]));
        write_event(&chunk, out);
    }
}

fn write_event(body: &Value, out: &mut String) {
    out.push_str("data: ");
    out.push_str(&body.to_string());
    out.push_str("\n\n");
}

impl Writer for Chunks {
    fn begin(&mut self, out: &mut String) {
        self.delta(&json!({"role": "assistant", "content": ""}), None, out);
    }

    fn piece(&mut self, piece: &Delta, out: &mut String) {
        let delta = match piece {
            Delta::Text(text) => json!({"content": text}),
            Delta::ToolCall { index, id, name } => json!({"tool_calls": [
                {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]}),
            Delta::Arguments { index, text } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            }
        };
        self.delta(&delta, None, out);
    }

    fn end(&mut self, end: Result<(Box<CallAnswer>, Facts), Refusal>, out: &mut String) {
        let (answer, facts) = match end {
            Ok(end) => end,
            // Without the last mark, so that nobody takes the beginning for the whole.
            Err(refusal) => return write_event(&refusal.body(), out),
        };
        self.delta(&json!({}), Some(finish(&answer.finish)), out);
        if self.include_usage
            && let Some(usage) = &answer.usage
        {
            let mut last = self.chunk(&json!([]));
            last["usage"] = json!(UsageBody::from(usage));
            last["drover"] = json!(facts.told());
            write_event(&last, out);
        }
        out.push_str("data: [DONE]\n\n");
    }
}
