//! Answers and refusals in the four formats.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::bucket::{Dimension, Rejected, Standing};
use super::request::{Asked, Wire};

/// What is answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Say {
    pub(super) text: String,
    /// Name and arguments of a function that is asked for.
    pub(super) call: Option<(String, String)>,
    pub(super) cut: bool,
    pub(super) blocked: bool,
    pub(super) prompt_blocked: bool,
    pub(super) usage: Option<(u64, u64)>,
    pub(super) number: u64,
}

/// A JSON string literal.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn finish(wire: Wire, say: &Say) -> &'static str {
    match wire {
        Wire::OpenAi | Wire::Groq => match say {
            Say { blocked: true, .. } => "content_filter",
            Say { call: Some(_), .. } => "tool_calls",
            Say { cut: true, .. } => "length",
            _ => "stop",
        },
        Wire::Anthropic => match say {
            Say { blocked: true, .. } => "refusal",
            Say { call: Some(_), .. } => "tool_use",
            Say { cut: true, .. } => "max_tokens",
            _ => "end_turn",
        },
        Wire::Gemini => match say {
            Say { blocked: true, .. } => "SAFETY",
            Say { cut: true, .. } => "MAX_TOKENS",
            _ => "STOP",
        },
    }
}

fn gemini_usage(usage: Option<(u64, u64)>) -> Option<Value> {
    let (input, output) = usage?;
    Some(json!({"promptTokenCount": input, "candidatesTokenCount": output, "totalTokenCount": input + output}))
}

fn openai_usage(wire: Wire, (input, output): (u64, u64)) -> Value {
    let mut usage = json!({"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output});
    if wire == Wire::Groq {
        usage["queue_time"] = json!(0.0);
        usage["total_time"] = json!(0.1);
    }
    usage
}

/// The whole answer at once.
pub(super) fn whole(asked: &Asked, say: &Say) -> String {
    let (number, model, text) = (say.number, quoted(&asked.model), quoted(&say.text));
    let finish = finish(asked.wire, say);
    match asked.wire {
        Wire::OpenAi | Wire::Groq => {
            // Written by hand: this is what measurements ask for, a hundred thousand times over.
            let mut message = format!("{{\"role\":\"assistant\",\"content\":{text}");
            if let Some((name, arguments)) = &say.call {
                let (name, arguments) = (quoted(name), quoted(arguments));
                let _ = write!(
                    message,
                    ",\"tool_calls\":[{{\"id\":\"call_{number}\",\"type\":\"function\",\"function\":{{\"name\":{name},\"arguments\":{arguments}}}}}]"
                );
            }
            message.push('}');
            let usage =
                say.usage.map_or_else(String::new, |usage| format!(",\"usage\":{}", openai_usage(asked.wire, usage)));
            format!(
                "{{\"id\":\"chatcmpl-mock-{number}\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":{model},\
                 \"choices\":[{{\"index\":0,\"message\":{message},\"logprobs\":null,\"finish_reason\":\"{finish}\"}}]{usage}}}"
            )
        }
        Wire::Anthropic => {
            let mut content = Vec::new();
            if !say.text.is_empty() {
                content.push(json!({"type": "text", "text": say.text}));
            }
            if let Some((name, arguments)) = &say.call {
                let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
                content
                    .push(json!({"type": "tool_use", "id": format!("toolu_{number}"), "name": name, "input": input}));
            }
            let mut body = json!({"id": format!("msg_mock_{number}"), "type": "message", "role": "assistant",
                "model": asked.model, "content": content, "stop_reason": finish, "stop_sequence": null});
            if let Some((input, output)) = say.usage {
                body["usage"] = json!({"input_tokens": input, "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0, "output_tokens": output});
            }
            body.to_string()
        }
        Wire::Gemini => gemini(asked, say, &say.text, Some(finish), say.usage).to_string(),
    }
}

fn gemini(asked: &Asked, say: &Say, text: &str, finish: Option<&str>, usage: Option<(u64, u64)>) -> Value {
    let mut body = json!({"modelVersion": asked.model, "responseId": format!("mock-{}", say.number)});
    if let Some(usage) = gemini_usage(usage) {
        body["usageMetadata"] = usage;
    }
    if say.prompt_blocked {
        body["promptFeedback"] = json!({"blockReason": "PROHIBITED_CONTENT"});
        return body;
    }
    let mut parts = Vec::new();
    if !text.is_empty() {
        parts.push(json!({"text": text}));
    }
    if let Some((name, arguments)) = say.call.as_ref().filter(|_| finish.is_some()) {
        let args: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
        parts.push(json!({"functionCall": {"name": name, "args": args}}));
    }
    let mut candidate = json!({"content": {"role": "model", "parts": parts}, "index": 0});
    if let Some(finish) = finish {
        candidate["finishReason"] = json!(finish);
    }
    body["candidates"] = json!([candidate]);
    body
}

/// The answer as events of a stream.
pub(super) fn events(asked: &Asked, say: &Say, pieces: usize) -> Vec<String> {
    let finish = finish(asked.wire, say);
    let pieces = split(&say.text, pieces);
    let mut out = Vec::with_capacity(pieces.len() + 5);
    match asked.wire {
        Wire::OpenAi | Wire::Groq => {
            let chunk = |delta: Value, finish: Option<&str>, extra: Option<(&str, Value)>| {
                let mut chunk = json!({"id": format!("chatcmpl-mock-{}", say.number), "object": "chat.completion.chunk",
                    "created": 1_700_000_000, "model": asked.model,
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
                if let Some((key, value)) = extra {
                    chunk[key] = value;
                }
                format!("data: {chunk}\n\n")
            };
            let id = (asked.wire == Wire::Groq).then(|| ("x_groq", json!({"id": format!("req_{}", say.number)})));
            out.push(chunk(json!({"role": "assistant", "content": ""}), None, id));
            out.extend(pieces.iter().map(|piece| chunk(json!({"content": piece}), None, None)));
            if let Some((name, arguments)) = &say.call {
                let start = json!({"tool_calls": [{"index": 0, "id": format!("call_{}", say.number), "type": "function",
                    "function": {"name": name, "arguments": ""}}]});
                out.push(chunk(start, None, None));
                out.extend(split(arguments, 3).iter().map(|piece| {
                    chunk(json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}), None, None)
                }));
            }
            let groq = say.usage.filter(|_| asked.wire == Wire::Groq);
            let usage = groq.map(|usage| ("x_groq", json!({"usage": openai_usage(asked.wire, usage)})));
            out.push(chunk(json!({}), Some(finish), usage));
            if let Some(usage) = say.usage.filter(|_| asked.wire == Wire::OpenAi && asked.include_usage) {
                let last = json!({"id": format!("chatcmpl-mock-{}", say.number), "object": "chat.completion.chunk",
                    "created": 1_700_000_000, "model": asked.model, "choices": [], "usage": openai_usage(asked.wire, usage)});
                out.push(format!("data: {last}\n\n"));
            }
            out.push("data: [DONE]\n\n".to_owned());
        }
        Wire::Anthropic => {
            let event = |body: Value| {
                let kind = body["type"].as_str().unwrap_or_default();
                format!("event: {kind}\ndata: {body}\n\n")
            };
            let mut message = json!({"id": format!("msg_mock_{}", say.number), "type": "message", "role": "assistant",
                "model": asked.model, "content": [], "stop_reason": null});
            if let Some((input, _)) = say.usage {
                message["usage"] = json!({"input_tokens": input, "output_tokens": 1});
            }
            out.push(event(json!({"type": "message_start", "message": message})));
            let mut index = 0;
            if !pieces.is_empty() {
                out.push(event(
                    json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
                ));
                out.push(event(json!({"type": "ping"})));
                out.extend(pieces.iter().map(|piece| {
                    event(json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}))
                }));
                out.push(event(json!({"type": "content_block_stop", "index": 0})));
                index = 1;
            }
            if let Some((name, arguments)) = &say.call {
                let block =
                    json!({"type": "tool_use", "id": format!("toolu_{}", say.number), "name": name, "input": {}});
                out.push(event(json!({"type": "content_block_start", "index": index, "content_block": block})));
                out.extend(split(arguments, 3).iter().map(|piece| {
                    let delta = json!({"type": "input_json_delta", "partial_json": piece});
                    event(json!({"type": "content_block_delta", "index": index, "delta": delta}))
                }));
                out.push(event(json!({"type": "content_block_stop", "index": index})));
            }
            let mut last = json!({"type": "message_delta", "delta": {"stop_reason": finish, "stop_sequence": null}});
            if let Some((_, output)) = say.usage {
                last["usage"] = json!({"output_tokens": output});
            }
            out.push(event(last));
            out.push(event(json!({"type": "message_stop"})));
        }
        Wire::Gemini => {
            // CRLF, as the real one sends.
            out.extend(pieces.iter().map(|piece| format!("data: {}\r\n\r\n", gemini(asked, say, piece, None, None))));
            out.push(format!("data: {}\r\n\r\n", gemini(asked, say, "", Some(finish), say.usage)));
        }
    }
    out
}

/// A text in so many pieces of about equal length.
fn split(text: &str, pieces: usize) -> Vec<&str> {
    let each = text.chars().count().div_ceil(pieces.max(1)).max(1);
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.char_indices().nth(each).map_or(rest.len(), |(at, _)| at);
        let (piece, others) = rest.split_at(end);
        out.push(piece);
        rest = others;
    }
    out
}

/// The body of an error.
pub(super) fn error(wire: Wire, status: u16, message: &str) -> String {
    match wire {
        Wire::OpenAi | Wire::Groq => {
            let (kind, code) = match status {
                401 => ("invalid_request_error", "invalid_api_key"),
                429 => ("requests", "rate_limit_exceeded"),
                400..=499 => ("invalid_request_error", "invalid_request"),
                _ => ("server_error", "server_error"),
            };
            json!({"error": {"message": message, "type": kind, "param": null, "code": code}})
        }
        Wire::Anthropic => {
            let kind = match status {
                401 => "authentication_error",
                404 => "not_found_error",
                413 => "request_too_large",
                429 => "rate_limit_error",
                529 | 503 => "overloaded_error",
                400..=499 => "invalid_request_error",
                _ => "api_error",
            };
            json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_mock"})
        }
        Wire::Gemini => {
            let kind = match status {
                400 => "INVALID_ARGUMENT",
                401 | 403 => "PERMISSION_DENIED",
                404 => "NOT_FOUND",
                429 => "RESOURCE_EXHAUSTED",
                503 => "UNAVAILABLE",
                _ => "INTERNAL",
            };
            json!({"error": {"code": status, "message": message, "status": kind}})
        }
    }
    .to_string()
}

/// A refusal for the number of calls: its body and headers.
pub(super) fn rejected(wire: Wire, refused: Option<Rejected>, hints: bool) -> (String, Vec<(&'static str, String)>) {
    let wait = refused.filter(|_| hints).map(|refused| refused.wait);
    let what = match refused.map(|refused| refused.dimension) {
        Some(Dimension::Requests) => "requests per minute",
        Some(Dimension::Tokens) => "tokens per minute",
        None => "concurrent requests",
    };
    let mut headers = Vec::new();
    let body = if wire == Wire::Gemini {
        let mut details = vec![json!({"@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel", "quotaValue": "60"}]})];
        if let Some(wait) = wait {
            let delay = format!("{:.3}s", wait.as_secs_f64() + 0.0005);
            details.push(json!({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}));
        }
        json!({"error": {"code": 429, "message": format!("mock limit of {what}"), "status": "RESOURCE_EXHAUSTED", "details": details}})
            .to_string()
    } else {
        if let Some(wait) = wait {
            headers.push(("retry-after", wait.as_secs_f64().ceil().to_string()));
            if wire != Wire::Anthropic {
                headers.push(("retry-after-ms", wait.as_millis().saturating_add(1).to_string()));
            }
        }
        error(wire, 429, &format!("Rate limit reached on {what} of the mock"))
    };
    (body, headers)
}

/// What is said about the limits in every answer.
pub(super) fn limit_headers(wire: Wire, standing: [Option<Standing>; 2]) -> Vec<(&'static str, String)> {
    const NAMES: [[[&str; 3]; 2]; 2] = [
        [
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        ],
        [
            [
                "anthropic-ratelimit-requests-limit",
                "anthropic-ratelimit-requests-remaining",
                "anthropic-ratelimit-requests-reset",
            ],
            [
                "anthropic-ratelimit-tokens-limit",
                "anthropic-ratelimit-tokens-remaining",
                "anthropic-ratelimit-tokens-reset",
            ],
        ],
    ];
    let reset = |after: Duration| match wire {
        Wire::Anthropic => {
            let at = jiff::Timestamp::now() + jiff::SignedDuration::try_from(after).unwrap_or_default();
            at.to_string()
        }
        _ => format!("{}ms", after.as_millis()),
    };
    let names = match wire {
        Wire::OpenAi | Wire::Groq => NAMES[0],
        Wire::Anthropic => NAMES[1],
        // It says nothing before it refuses.
        Wire::Gemini => return Vec::new(),
    };
    let mut out = Vec::new();
    for (names, standing) in names.into_iter().zip(standing) {
        let Some(standing) = standing else { continue };
        let values = [standing.limit.to_string(), standing.remaining.to_string(), reset(standing.full_after)];
        out.extend(names.into_iter().zip(values));
    }
    out
}
