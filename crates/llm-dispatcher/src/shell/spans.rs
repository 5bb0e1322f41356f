//! What a trace tells of a call, by the names of the OpenTelemetry conventions for generative models. Counts, names and reasons;
//! never a word of what was asked or answered.
//!
//! The span is made at debug level for a target that only an exporter of traces listens to, so it costs nothing without one.

use std::sync::Arc;

use tracing::field::Empty;
use tracing::{Span, debug_span};

use crate::call::{CallAnswer, CallError, CallRequest, Finish};
use crate::shell::{Lane, Work};

/// The span of a call that begins.
pub(super) fn of(work: &Work, lane: &Arc<Lane>) -> Span {
    match work {
        Work::Call(request) => call(request, lane),
        Work::Errand(_) => Span::none(),
    }
}

fn call(request: &CallRequest, lane: &Lane) -> Span {
    let span = debug_span!(
        target: "drover::gen_ai",
        "gen_ai.call",
        otel.name = Empty,
        otel.kind = "client",
        otel.status_code = Empty,
        gen_ai.operation.name = "chat",
        gen_ai.provider.name = provider(&lane.name),
        gen_ai.request.model = %lane.model,
        gen_ai.request.max_tokens = request.max_tokens,
        gen_ai.request.temperature = Empty,
        gen_ai.request.top_p = Empty,
        gen_ai.output.type = Empty,
        gen_ai.response.id = Empty,
        gen_ai.response.model = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        gen_ai.usage.cache_read.input_tokens = Empty,
        error.type = Empty,
    );
    if !span.is_disabled() {
        span.record("otel.name", format!("chat {}", lane.model));
        if let Some(temperature) = request.temperature {
            span.record("gen_ai.request.temperature", f64::from(temperature));
        }
        if let Some(top_p) = request.top_p {
            span.record("gen_ai.request.top_p", f64::from(top_p));
        }
        span.record("gen_ai.output.type", if request.json || request.schema.is_some() { "json" } else { "text" });
    }
    span
}

/// Tells how it ended.
pub(super) fn ended(span: &Span, result: &Result<CallAnswer, CallError>) {
    if span.is_disabled() {
        return;
    }
    let usage = match result {
        Ok(answer) => {
            let reason = match &answer.finish {
                Finish::Stop => "stop",
                Finish::Length => "length",
                Finish::ToolCalls => "tool_calls",
                Finish::Blocked(_) => "content_filter",
                Finish::Other(_) => "other",
            };
            // The convention's value is a list.
            span.record("gen_ai.response.finish_reasons", format!("[\"{reason}\"]"));
            if let Some(model) = &answer.model {
                span.record("gen_ai.response.model", model.as_str());
            }
            if let Some(id) = &answer.response_id {
                span.record("gen_ai.response.id", id.as_str());
            }
            answer.usage
        }
        Err(error) => {
            // Its kind only: the words are the provider's, which likes to repeat what it was sent.
            span.record("error.type", error.kind.as_str());
            span.record("otel.status_code", "ERROR");
            error.usage
        }
    };
    if let Some(usage) = usage {
        span.record("gen_ai.usage.input_tokens", usage.input_tokens);
        span.record("gen_ai.usage.output_tokens", usage.output_tokens);
        span.record("gen_ai.usage.cache_read.input_tokens", usage.cached_input_tokens);
    }
}

/// Providers by the names of the conventions, the others by their own.
fn provider(name: &str) -> &str {
    match name {
        "gemini" => "gcp.gemini",
        other => other,
    }
}
