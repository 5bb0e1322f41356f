//! Builds the server-sent events of one answer.

use std::time::Duration;

use serde_json::{Value, json};

use super::history::Item;
use crate::directive::Say;

/// A piece of a response body.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    /// These bytes, after this pause.
    Bytes(Duration, String),
    /// What follows completes the answer: remember these items, before the agent can ask again.
    Complete(Vec<Item>),
    /// The connection breaks here.
    Break,
    /// Nothing more comes, and the connection stays open.
    Hang,
}

fn event(value: &Value) -> Piece {
    after(Duration::ZERO, value)
}

fn after(pause: Duration, value: &Value) -> Piece {
    Piece::Bytes(pause, format!("data: {value}\n\n"))
}

fn created(id: &str) -> Piece {
    event(&json!({"type": "response.created", "response": {"id": id}}))
}

fn completed(id: &str, (input, output): (u64, u64)) -> Piece {
    event(&json!({"type": "response.completed", "response": {"id": id, "usage": {
        "input_tokens": input, "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": input + output,
    }}}))
}

/// A text, streamed in pieces.
pub(super) fn say(id: &str, say: &Say) -> Vec<Piece> {
    let mut out = vec![created(id)];
    let mut index = 0;
    if let Some(text) = &say.reasoning {
        let item_id = format!("rs_{id}");
        let item =
            |summary: Value| json!({"type": "reasoning", "id": item_id, "summary": summary, "encrypted_content": null});
        out.push(event(&json!({"type": "response.output_item.added", "output_index": 0, "item": item(json!([]))})));
        out.push(event(&json!({"type": "response.reasoning_summary_part.added", "item_id": item_id,
            "output_index": 0, "summary_index": 0, "part": {"type": "summary_text", "text": ""}})));
        out.push(event(&json!({"type": "response.reasoning_summary_text.delta", "item_id": item_id,
            "output_index": 0, "summary_index": 0, "delta": text})));
        out.push(event(&json!({"type": "response.output_item.done", "output_index": 0,
            "item": item(json!([{"type": "summary_text", "text": text}]))})));
        index = 1;
    }
    let message = format!("msg_{id}");
    out.push(event(&json!({"type": "response.output_item.added", "output_index": index,
        "item": {"type": "message", "id": message, "role": "assistant", "content": []}})));
    for piece in say.pieces() {
        out.push(after(
            say.delay,
            &json!({"type": "response.output_text.delta", "item_id": message,
            "output_index": index, "content_index": 0, "delta": piece}),
        ));
    }
    out.push(event(&json!({"type": "response.output_item.done", "output_index": index, "item": {
        "type": "message", "id": message, "role": "assistant",
        "content": [{"type": "output_text", "text": say.text, "annotations": []}]}})));
    out.push(Piece::Complete(vec![Item::Assistant(say.text.clone())]));
    out.push(completed(id, say.usage));
    out
}

/// A command to run.
pub(super) fn run(id: &str, command: &str, escalate: bool, workdir: Option<&str>) -> Vec<Piece> {
    let mut arguments = json!({"cmd": command, "login": false, "yield_time_ms": 60_000});
    if escalate {
        arguments["sandbox_permissions"] = json!("require_escalated");
        arguments["justification"] = json!("the prompt asks for it");
    }
    if let Some(workdir) = workdir {
        arguments["workdir"] = json!(workdir);
    }
    let call_id = format!("call_{id}");
    call(
        id,
        &call_id,
        &json!({"type": "function_call", "id": format!("fc_{id}"), "call_id": call_id,
        "name": "exec_command", "arguments": arguments.to_string()}),
    )
}

/// A file to add.
pub(super) fn patch(id: &str, file: &str, text: &str) -> Vec<Piece> {
    let call_id = format!("call_{id}");
    let input = format!("*** Begin Patch\n*** Add File: {file}\n+{text}\n*** End Patch");
    call(
        id,
        &call_id,
        &json!({"type": "custom_tool_call", "id": format!("ctc_{id}"), "call_id": call_id,
        "name": "apply_patch", "input": input}),
    )
}

fn call(id: &str, call_id: &str, item: &Value) -> Vec<Piece> {
    vec![
        created(id),
        event(&json!({"type": "response.output_item.done", "output_index": 0, "item": item})),
        Piece::Complete(vec![Item::Call(call_id.to_owned())]),
        completed(id, (100, 20)),
    ]
}

/// A response that breaks in the middle of a text, or hangs there.
pub(super) fn cut(id: &str, end: Piece) -> Vec<Piece> {
    let message = format!("msg_{id}");
    vec![
        created(id),
        event(&json!({"type": "response.output_item.added", "output_index": 0,
            "item": {"type": "message", "id": message, "role": "assistant", "content": []}})),
        event(&json!({"type": "response.output_text.delta", "item_id": message,
            "output_index": 0, "content_index": 0, "delta": "this answer will never "})),
        end,
    ]
}

/// A response that reports its own failure.
pub(super) fn failed(id: &str, code: &str, message: &str) -> Vec<Piece> {
    vec![
        created(id),
        event(&json!({"type": "response.failed",
        "response": {"id": id, "error": {"code": code, "message": message}}})),
    ]
}

/// A response that ends early and says so.
pub(super) fn incomplete(id: &str, reason: &str) -> Vec<Piece> {
    vec![
        created(id),
        event(&json!({"type": "response.incomplete",
        "response": {"id": id, "incomplete_details": {"reason": reason}}})),
    ]
}
