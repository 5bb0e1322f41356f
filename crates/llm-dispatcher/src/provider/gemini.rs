//! The content generation of Google Gemini.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::anthropic::arguments;
use super::endpoint::Endpoint;
use super::failure;
use super::openai::unsupported;
use super::sse::SseEvent;
use super::stream::{self, Assembly, Format};
use super::structured::openapi_subset;
use super::transport::{Reply, Transport};
use crate::call::{
    CallAnswer, CallError, CallRequest, Citation, Finish, Part, Provider, Role, Sink, ToolCall, ToolChoice, Usage,
};

/// The version that knows most.
const DEFAULT_VERSION: &str = "v1beta";

/// A provider that speaks Gemini.
#[derive(Debug)]
pub(super) struct Gemini {
    transport: Transport,
    /// Path up to the name of the model.
    models: String,
}

impl Gemini {
    pub(super) fn new(transport: Transport, endpoint: &Endpoint) -> Self {
        let version = endpoint.api_version.as_deref().unwrap_or(DEFAULT_VERSION);
        let base = transport.base();
        let base = base.strip_suffix(version).and_then(|base| base.strip_suffix('/')).unwrap_or(base);
        Self { models: format!("{base}/{version}/models/"), transport }
    }
}

#[async_trait]
impl Provider for Gemini {
    fn name(&self) -> &str {
        &self.transport.name
    }

    async fn call(&self, model: &str, request: &CallRequest, sink: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        if request.grounded && !request.tools.is_empty() {
            return Err(unsupported("gemini takes either web search or functions, not both"));
        }
        let model = model.strip_prefix("models/").unwrap_or(model);
        // A name in a path must not be a path.
        if model.contains(['/', '?', '#', '%']) {
            return Err(unsupported("the name of the model has characters that no model of gemini has"));
        }
        let method = if request.stream { "streamGenerateContent?alt=sse" } else { "generateContent" };
        let target = self.transport.target(&format!("{}{model}:{method}", self.models))?;
        let mut begun = match self.transport.post(&target, &body(request)?, sink).await? {
            Reply::Begun(begun) => begun,
            Reply::Blocked(reason, hints) => {
                return Ok(CallAnswer { hints, ..CallAnswer::of("", Finish::Blocked(reason)) });
            }
        };
        let hints = begun.hints;
        let assembly = if request.stream {
            let mut format = Chunks { transport: &self.transport };
            stream::read(&self.transport, begun, &mut format, sink).await?
        } else {
            let bytes = self.transport.whole(&mut begun.answer).await?;
            let generated: Generated = serde_json::from_slice(&bytes).map_err(failure::malformed)?;
            let mut assembly = Assembly { ended: true, ..Assembly::default() };
            take(generated, &mut assembly);
            if assembly.finish.is_none() && assembly.text.is_empty() && assembly.tool_calls.is_empty() {
                return Err(failure::malformed("it has neither candidates nor a reason why"));
            }
            assembly
        };
        let answer =
            assembly.answer(request).map_err(|error| CallError { hints, streamed: request.stream, ..error })?;
        Ok(CallAnswer { hints, ..answer })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    contents: Vec<ContentBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_instruction: Option<ContentBody<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_config: Option<Value>,
    generation_config: ConfigBody<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConfigBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    max_output_tokens: u32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_sequences: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    response_mime_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_schema: Option<Value>,
}

#[derive(Serialize)]
struct ContentBody<'a> {
    role: &'static str,
    parts: Vec<PartBody<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum PartBody<'a> {
    Text(std::borrow::Cow<'a, str>),
    FunctionCall(Value),
    FunctionResponse(Value),
}

fn body(request: &CallRequest) -> Result<Vec<u8>, CallError> {
    let mut contents: Vec<ContentBody<'_>> = Vec::with_capacity(request.messages.len());
    for message in &request.messages {
        let role = if message.role == Role::Assistant { "model" } else { "user" };
        let mut parts = Vec::with_capacity(message.parts.len());
        for part in &message.parts {
            parts.push(match part {
                Part::Text(text) => PartBody::Text(text.as_str().into()),
                Part::ToolCall(call) => {
                    PartBody::FunctionCall(json!({"name": call.name, "args": arguments(&call.arguments)?}))
                }
                Part::ToolResult { name, content, .. } => PartBody::FunctionResponse(
                    // The response must be an object; most functions return one as text.
                    json!({"name": name, "response": serde_json::from_str::<Map<String, Value>>(content)
                        .map_or_else(|_| json!({"result": content}), Value::Object)}),
                ),
            });
        }
        match contents.last_mut().filter(|last| last.role == role) {
            Some(last) => last.parts.append(&mut parts),
            None => contents.push(ContentBody { role, parts }),
        }
    }
    let response_schema = request.schema.as_ref().and_then(|schema| openapi_subset(schema.schema()));
    let mut system = request.system.as_deref().map(std::borrow::Cow::from);
    if let Some(schema) = request.schema.as_ref().filter(|_| response_schema.is_none()) {
        let words = schema.in_words();
        system = Some(system.map_or_else(|| words.clone(), |system| format!("{system}\n\n{words}")).into());
    }
    let mut tools = Vec::new();
    if request.grounded {
        tools.push(json!({"google_search": {}}));
    }
    if !request.tools.is_empty() {
        let declared: Vec<Value> = request
            .tools
            .iter()
            .map(|tool| {
                let mut function = json!({"name": tool.name});
                if let Some(description) = &tool.description {
                    function["description"] = json!(description);
                }
                // A function without parameters must not have an empty list of them.
                if let Some(parameters) = openapi_subset(&tool.parameters)
                    && parameters.get("properties").and_then(Value::as_object).is_some_and(|known| !known.is_empty())
                {
                    function["parameters"] = parameters;
                }
                function
            })
            .collect();
        tools.push(json!({"functionDeclarations": declared}));
    }
    let tool_config = match &request.tool_choice {
        ToolChoice::Auto => None,
        ToolChoice::Never => Some(json!({"functionCallingConfig": {"mode": "NONE"}})),
        ToolChoice::Required => Some(json!({"functionCallingConfig": {"mode": "ANY"}})),
        ToolChoice::Named(name) => {
            Some(json!({"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": [name]}}))
        }
    }
    .filter(|_| !request.tools.is_empty());
    let wants_json = request.json || request.schema.is_some();
    let body = Body {
        contents,
        system_instruction: system.map(|system| ContentBody { role: "user", parts: vec![PartBody::Text(system)] }),
        tools,
        tool_config,
        generation_config: ConfigBody {
            temperature: request.temperature,
            top_p: request.top_p,
            max_output_tokens: request.max_tokens,
            stop_sequences: &request.stop,
            response_mime_type: wants_json.then_some("application/json"),
            response_schema,
        },
    };
    serde_json::to_vec(&body).map_err(failure::malformed)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Generated {
    #[serde(default)]
    candidates: Vec<Candidate>,
    prompt_feedback: Option<Feedback>,
    usage_metadata: Option<UsageBody>,
    model_version: Option<String>,
    response_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Feedback {
    block_reason: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Candidate {
    content: Option<ContentAnswer>,
    finish_reason: Option<String>,
    grounding_metadata: Option<Grounding>,
}

#[derive(Deserialize)]
struct ContentAnswer {
    #[serde(default)]
    parts: Vec<PartAnswer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PartAnswer {
    text: Option<String>,
    #[serde(default)]
    thought: bool,
    function_call: Option<FunctionCall>,
}

#[derive(Deserialize)]
struct FunctionCall {
    id: Option<String>,
    #[serde(default)]
    name: String,
    args: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Grounding {
    #[serde(default)]
    web_search_queries: Vec<String>,
    #[serde(default)]
    grounding_chunks: Vec<GroundingChunk>,
}

#[derive(Deserialize)]
struct GroundingChunk {
    web: Option<Web>,
}

#[derive(Deserialize)]
struct Web {
    uri: Option<String>,
    title: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "the names of the wire format")]
struct UsageBody {
    prompt_token_count: Option<u64>,
    candidates_token_count: Option<u64>,
    thoughts_token_count: Option<u64>,
    tool_use_prompt_token_count: Option<u64>,
    cached_content_token_count: Option<u64>,
}

impl UsageBody {
    fn usage(&self) -> Option<Usage> {
        let thoughts = self.thoughts_token_count.unwrap_or(0);
        Some(Usage {
            // Pages read to ground an answer are input too.
            input_tokens: self.prompt_token_count? + self.tool_use_prompt_token_count.unwrap_or(0),
            cached_input_tokens: self.cached_content_token_count.unwrap_or(0),
            // A blocked answer has no candidates to count.
            output_tokens: self.candidates_token_count.unwrap_or(0) + thoughts,
            reasoning_tokens: thoughts,
        })
    }
}

fn finish(reason: &str) -> Finish {
    match reason {
        "STOP" => Finish::Stop,
        // Gemini itself says STOP; servers that speak its format say this.
        "FUNCTION_CALL" => Finish::ToolCalls,
        "MAX_TOKENS" => Finish::Length,
        "SAFETY"
        | "RECITATION"
        | "LANGUAGE"
        | "BLOCKLIST"
        | "PROHIBITED_CONTENT"
        | "SPII"
        | "IMAGE_SAFETY"
        | "IMAGE_PROHIBITED_CONTENT"
        | "IMAGE_RECITATION"
        | "MODEL_ARMOR" => Finish::Blocked(reason.to_owned()),
        other => Finish::Other(other.to_owned()),
    }
}

/// Takes in an answer, or one of the like pieces that a stream of it is made of.
fn take(generated: Generated, into: &mut Assembly) {
    if let Some(usage) = generated.usage_metadata.and_then(|usage| usage.usage()) {
        into.usage = Some(usage);
    }
    into.model = generated.model_version.or(into.model.take());
    into.response_id = generated.response_id.or(into.response_id.take());
    if let Some(reason) = generated.prompt_feedback.and_then(|feedback| feedback.block_reason) {
        into.finish = Some(Finish::Blocked(reason));
    }
    let Some(candidate) = generated.candidates.into_iter().next() else { return };
    for part in candidate.content.into_iter().flat_map(|content| content.parts) {
        if let Some(text) = part.text.filter(|_| !part.thought) {
            into.add_text(&text);
        }
        if let Some(call) = part.function_call {
            // Calls have no ids before version 3: the place in the answer is one that holds within a turn.
            let id = call.id.unwrap_or_else(|| format!("call_{}_{}", into.tool_calls.len(), call.name));
            let arguments = call.args.unwrap_or_else(|| json!({})).to_string();
            into.add_call(ToolCall { id, name: call.name, arguments });
        }
    }
    if let Some(grounding) = candidate.grounding_metadata {
        into.searches.extend(grounding.web_search_queries);
        for web in grounding.grounding_chunks.into_iter().filter_map(|chunk| chunk.web) {
            if let Some(url) = web.uri {
                into.citations.push(Citation { url, title: web.title.unwrap_or_default() });
            }
        }
    }
    if let Some(reason) = candidate.finish_reason {
        into.finish = Some(match finish(&reason) {
            Finish::Stop if !into.tool_calls.is_empty() => Finish::ToolCalls,
            finish => finish,
        });
    }
}

struct Chunks<'a> {
    transport: &'a Transport,
}

impl Format for Chunks<'_> {
    fn event(&mut self, event: &SseEvent, into: &mut Assembly) -> Result<(), CallError> {
        if event.data.trim().is_empty() {
            return Ok(());
        }
        let generated: Generated = match serde_json::from_str(&event.data) {
            Ok(generated) => generated,
            Err(error) => {
                let value: Value = serde_json::from_str(&event.data).unwrap_or_default();
                let told = stream::error_event(&value, &event.data, self.transport.secret.as_ref());
                return Err(told.unwrap_or_else(|| failure::malformed(error)));
            }
        };
        if generated.candidates.is_empty() {
            let value: Value = serde_json::from_str(&event.data).unwrap_or_default();
            if let Some(error) = stream::error_event(&value, &event.data, self.transport.secret.as_ref()) {
                return Err(error);
            }
        }
        take(generated, into);
        Ok(())
    }
}
