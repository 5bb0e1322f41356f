//! `/v1/responses`, as far as it is a question and an answer: conversations are not kept, so each request brings its own.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Front;
use super::error::Refusal;
use super::inbound::{self, Conversation, Text};
use super::outcome::{self, Facts, Running, Writer};
use crate::call::{CallAnswer, CallRequest, Delta, Finish, Part, Role, Tool, ToolCall};

#[derive(Debug, Deserialize)]
pub(super) struct ResponsesRequest {
    #[serde(default)]
    model: String,
    input: Input,
    instructions: Option<String>,
    max_output_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    text: Option<Value>,
    user: Option<String>,
    previous_response_id: Option<String>,
    background: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Input {
    Text(String),
    Items(Vec<Item>),
}

#[derive(Debug, Deserialize)]
struct Item {
    #[serde(rename = "type", default)]
    kind: String,
    role: Option<String>,
    content: Option<Text>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    input: Option<String>,
    output: Option<Text>,
}

/// Answers a conversation.
pub(super) async fn create(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    body: Result<Json<ResponsesRequest>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(body) = body?;
    if body.previous_response_id.is_some() {
        return Err(Refusal::unsupported(
            "answers are not kept: send the whole conversation instead of previous_response_id",
        ));
    }
    if body.background == Some(true) {
        return Err(Refusal::unsupported("background is not supported: wait for the answer, or stream it"));
    }
    let chain = inbound::chain(&front, &body.model)?;
    let streams = body.stream == Some(true);
    let client = front.clients.of(&headers, body.user.as_deref());
    let max_tokens = inbound::max_tokens(&chain, body.max_output_tokens)?;
    let (request, free) = request(body)?;
    let request = CallRequest { max_tokens, stream: streams, ..request };
    let simulated = chain.first().is_some_and(|lane| lane.simulated());
    let model = chain.first().map_or_else(String::new, |lane| lane.model.clone());
    let job = inbound::job(request, chain, &headers);
    let head = Head {
        id: format!("resp_{}", uuid::Uuid::new_v4().simple()),
        created: drover_service::now_us() / 1_000_000,
        model,
    };
    if streams {
        let writer = Events { head, free, sequence: 0, items: Vec::new() };
        return outcome::stream(Running::start(client, job), writer, simulated).await;
    }
    let (answer, facts) = outcome::answered(client.run(job).await)?;
    let simulated = facts.simulated();
    let output = output_of(&answer, &free, &head.id);
    Ok(outcome::marked(Json(head.response(Some((&answer, &facts)), &output)).into_response(), simulated))
}

/// Names of tools whose input is free text.
type Free = HashSet<String>;

fn request(body: ResponsesRequest) -> Result<(CallRequest, Free), Refusal> {
    let mut request = CallRequest {
        temperature: body.temperature,
        top_p: body.top_p,
        tool_choice: inbound::tool_choice(body.tool_choice.as_ref())?,
        user: body.user.map(Into::into),
        ..CallRequest::default()
    };
    inbound::shape(body.text.as_ref().and_then(|text| text.get("format")), &mut request)?;
    let mut free = Free::new();
    for tool in body.tools.into_iter().flatten() {
        add_tool(&tool, &mut request.tools, &mut free);
    }
    let mut conversation = Conversation::default();
    conversation.system(body.instructions.as_deref().unwrap_or_default());
    match body.input {
        Input::Text(text) => conversation.add(Role::User, Part::Text(text)),
        Input::Items(items) => {
            for item in items {
                add_item(item, &mut conversation)?;
            }
        }
    }
    conversation.into_request(&mut request)?;
    Ok((request, free))
}

/// Functions are passed on as they are, tools that take free text as functions of one text. Those that the provider itself
/// would have to carry out are left out: the model then has no such tool, and does without.
fn add_tool(tool: &Value, tools: &mut Vec<Tool>, free: &mut Free) {
    let text = |key: &str| tool.get(key).and_then(Value::as_str).map(str::to_owned);
    let Some(name) = text("name") else { return };
    let parameters = match tool.get("type").and_then(Value::as_str) {
        Some("function") => {
            let given = tool.get("parameters").filter(|parameters| parameters.is_object()).cloned();
            given.unwrap_or_else(|| json!({"type": "object", "properties": {}}))
        }
        Some("custom") => {
            free.insert(name.clone());
            json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]})
        }
        _ => return,
    };
    if tools.iter().all(|there| there.name != name) {
        tools.push(Tool {
            name,
            description: text("description"),
            parameters,
            strict: tool.get("strict").and_then(Value::as_bool),
        });
    }
}

fn add_item(item: Item, conversation: &mut Conversation) -> Result<(), Refusal> {
    let call_id = || item.call_id.clone().ok_or_else(|| Refusal::bad("a call in the input has no call_id"));
    match item.kind.as_str() {
        "" | "message" => {
            let text = item.content.map(Text::read).transpose()?.unwrap_or_default();
            match item.role.as_deref() {
                Some("system" | "developer") => conversation.system(&text),
                Some("user") => conversation.add(Role::User, Part::Text(text)),
                Some("assistant") => conversation.add(Role::Assistant, Part::Text(text)),
                _ => return Err(Refusal::bad("the role of a message must be system, developer, user or assistant")),
            }
        }
        "function_call" => {
            let call = ToolCall {
                id: call_id()?,
                name: item.name.unwrap_or_default(),
                arguments: item.arguments.unwrap_or_default(),
            };
            conversation.add(Role::Assistant, Part::ToolCall(call));
        }
        "custom_tool_call" => {
            let arguments = json!({"input": item.input.unwrap_or_default()}).to_string();
            let call =
                ToolCall { id: item.call_id.unwrap_or_default(), name: item.name.unwrap_or_default(), arguments };
            conversation.add(Role::Assistant, Part::ToolCall(call));
        }
        "function_call_output" | "custom_tool_call_output" => {
            let id = call_id()?;
            let output = item.output.map(Text::read).transpose()?.unwrap_or_default();
            conversation.result(id, output)?;
        }
        // Thoughts of another model, and what providers found for themselves, mean nothing to this one.
        "reasoning" | "web_search_call" | "item_reference" => {}
        other => {
            let other: String = other.chars().take(40).collect();
            return Err(Refusal::unsupported(format!("input of the type {other:?} is not passed on")));
        }
    }
    Ok(())
}

/// What every form of a response begins with.
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn response(&self, end: Option<(&CallAnswer, &Facts)>, output: &[Value]) -> Value {
        let mut body = json!({
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model,
            "status": "in_progress", "output": output, "error": null, "incomplete_details": null, "instructions": null,
            "metadata": {}, "parallel_tool_calls": true, "temperature": null, "top_p": null, "tool_choice": "auto", "tools": [],
        });
        let Some((answer, facts)) = end else { return body };
        let reason = match &answer.finish {
            Finish::Length => Some("max_output_tokens"),
            Finish::Blocked(_) => Some("content_filter"),
            Finish::Stop | Finish::ToolCalls | Finish::Other(_) => None,
        };
        body["status"] = json!(if reason.is_some() { "incomplete" } else { "completed" });
        body["incomplete_details"] = reason.map_or(Value::Null, |reason| json!({"reason": reason}));
        body["model"] = json!(facts.model(answer));
        body["drover"] = json!(facts.told());
        if let Some(usage) = &answer.usage {
            body["usage"] = json!({
                "input_tokens": usage.input_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_input_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.input_tokens + usage.output_tokens,
            });
        }
        body
    }
}

fn message_item(id: &str, text: &str, status: &str) -> Value {
    json!({"type": "message", "id": id, "role": "assistant", "status": status,
        "content": [{"type": "output_text", "text": text, "annotations": []}]})
}

fn call_item(id: &str, call: &ToolCall, free: &Free, status: &str) -> Value {
    if free.contains(&call.name) {
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_default();
        // A model that wrote no JSON wrote the text itself.
        let input = arguments.get("input").and_then(Value::as_str).unwrap_or(&call.arguments);
        return json!({"type": "custom_tool_call", "id": id, "call_id": call.id, "name": call.name, "input": input, "status": status});
    }
    json!({"type": "function_call", "id": id, "call_id": call.id, "name": call.name, "arguments": call.arguments, "status": status})
}

fn output_of(answer: &CallAnswer, free: &Free, id: &str) -> Vec<Value> {
    let mut output = Vec::new();
    if !answer.text.is_empty() || answer.tool_calls.is_empty() {
        output.push(message_item(&format!("msg_{id}"), &answer.text, "completed"));
    }
    for (index, call) in answer.tool_calls.iter().enumerate() {
        output.push(call_item(&format!("fc_{id}_{index}"), call, free, "completed"));
    }
    output
}

/// An item of the output under way.
enum Open {
    Message { id: String, text: String },
    Call { id: String, call: ToolCall },
}

/// Writes an answer as events.
struct Events {
    head: Head,
    free: Free,
    sequence: u64,
    items: Vec<Open>,
}

impl Events {
    fn event(&mut self, kind: &str, mut body: Value, out: &mut String) {
        body["type"] = json!(kind);
        body["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        out.push_str("event: ");
        out.push_str(kind);
        out.push_str("\ndata: ");
        out.push_str(&body.to_string());
        out.push_str("\n\n");
    }

    fn open_message(&mut self, out: &mut String) -> usize {
        if let Some(at) = self.items.iter().position(|item| matches!(item, Open::Message { .. })) {
            return at;
        }
        let (at, id) = (self.items.len(), format!("msg_{}", self.head.id));
        self.items.push(Open::Message { id: id.clone(), text: String::new() });
        let item = json!({"type": "message", "id": id, "role": "assistant", "status": "in_progress", "content": []});
        self.event("response.output_item.added", json!({"output_index": at, "item": item}), out);
        let part = json!({"type": "output_text", "text": "", "annotations": []});
        let body = json!({"item_id": id, "output_index": at, "content_index": 0, "part": part});
        self.event("response.content_part.added", body, out);
        at
    }

    /// The place in the output of the call with this number.
    fn place_of_call(&self, number: usize) -> Option<usize> {
        let calls = self.items.iter().enumerate().filter(|(_, item)| matches!(item, Open::Call { .. }));
        calls.map(|(at, _)| at).nth(number)
    }

    fn close(&mut self, at: usize, out: &mut String) -> Value {
        let item = match &self.items[at] {
            Open::Message { id, text } => {
                let (id, text) = (id.clone(), text.clone());
                let place = json!({"item_id": id, "output_index": at, "content_index": 0});
                let mut done = place.clone();
                done["text"] = json!(text);
                self.event("response.output_text.done", done, out);
                let mut done = place;
                done["part"] = json!({"type": "output_text", "text": text, "annotations": []});
                self.event("response.content_part.done", done, out);
                message_item(&id, &text, "completed")
            }
            Open::Call { id, call } => {
                let item = call_item(id, call, &self.free, "completed");
                if !self.free.contains(&call.name) {
                    let done = json!({"item_id": id, "output_index": at, "arguments": call.arguments});
                    self.event("response.function_call_arguments.done", done, out);
                }
                item
            }
        };
        self.event("response.output_item.done", json!({"output_index": at, "item": item}), out);
        item
    }
}

impl Writer for Events {
    fn begin(&mut self, out: &mut String) {
        let response = self.head.response(None, &[]);
        self.event("response.created", json!({"response": response}), out);
        self.event("response.in_progress", json!({"response": response}), out);
    }

    fn piece(&mut self, piece: &Delta, out: &mut String) {
        match piece {
            Delta::Text(more) => {
                let at = self.open_message(out);
                let Some(Open::Message { id, text }) = self.items.get_mut(at) else { return };
                text.push_str(more);
                let body =
                    json!({"item_id": id, "output_index": at, "content_index": 0, "delta": more, "logprobs": []});
                self.event("response.output_text.delta", body, out);
            }
            Delta::ToolCall { index, id, name } => {
                let call = ToolCall { id: id.clone(), name: name.clone(), arguments: String::new() };
                let (at, id) = (self.items.len(), format!("fc_{}_{index}", self.head.id));
                let item = call_item(&id, &call, &self.free, "in_progress");
                self.items.push(Open::Call { id, call });
                self.event("response.output_item.added", json!({"output_index": at, "item": item}), out);
            }
            Delta::Arguments { index, text } => {
                let Some(at) = self.place_of_call(*index) else { return };
                let Some(Open::Call { id, call }) = self.items.get_mut(at) else { return };
                call.arguments.push_str(text);
                // Free text is told when it is whole: until then it is wrapped in JSON.
                if !self.free.contains(&call.name) {
                    let body = json!({"item_id": id, "output_index": at, "delta": text});
                    self.event("response.function_call_arguments.delta", body, out);
                }
            }
        }
    }

    fn end(&mut self, end: Result<(Box<CallAnswer>, Facts), Refusal>, out: &mut String) {
        match end {
            Ok((answer, facts)) => {
                if self.items.is_empty() {
                    self.open_message(out);
                }
                let output: Vec<Value> = (0..self.items.len()).map(|at| self.close(at, out)).collect();
                let response = self.head.response(Some((&answer, &facts)), &output);
                let cut = matches!(answer.finish, Finish::Length | Finish::Blocked(_));
                let kind = if cut { "response.incomplete" } else { "response.completed" };
                self.event(kind, json!({"response": response}), out);
            }
            Err(refusal) => {
                let mut response = self.head.response(None, &[]);
                response["status"] = json!("failed");
                response["error"] = json!({"code": refusal.code, "message": refusal.message});
                self.event("response.failed", json!({"response": response}), out);
            }
        }
    }
}
