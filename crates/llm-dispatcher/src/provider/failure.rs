//! What the failures of providers mean: one reading for all of them.

use std::error::Error as _;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::hints;
use super::http::HttpError;
use super::keys::Secret;
use crate::call::{CallError, FailureKind, LimitHints};

/// A wait beyond this is no wait but a used-up quota: another provider should answer.
const LONGEST_WAIT: Duration = Duration::from_mins(10);
/// Longest message that is passed on.
const MESSAGE_CHARS: usize = 400;

/// A failure below HTTP.
pub(super) fn of_http(error: &HttpError) -> CallError {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        message.push_str(": ");
        message.push_str(&source.to_string());
        cause = source.source();
    }
    let (kind, maybe_billed) = match error {
        HttpError::Connect { .. } | HttpError::ConnectTimeout { .. } | HttpError::Tls(_) | HttpError::Proxy(_) => {
            (FailureKind::Connect, false)
        }
        HttpError::Broken(_) => (FailureKind::Broken, true),
        HttpError::TooLarge(_) => (FailureKind::Malformed, true),
    };
    CallError { maybe_billed, ..CallError::new(kind, clean(&message)) }
}

/// An answer of which no sense can be made.
pub(super) fn malformed(why: impl std::fmt::Display) -> CallError {
    CallError::new(FailureKind::Malformed, clean(&format!("the provider's answer makes no sense: {why}")))
}

/// What a body of an error says.
#[derive(Debug, Default)]
struct Said {
    message: String,
    /// `code`, `type` and `status` of the three families, whichever are there.
    words: Vec<String>,
    retry_after: Option<Duration>,
    daily: bool,
}

/// Reads the body of an error of any family.
fn read(body: &[u8]) -> Said {
    let mut said = Said::default();
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        said.message = String::from_utf8_lossy(&body[..body.len().min(MESSAGE_CHARS)]).into_owned();
        return said;
    };
    // Gemini wraps an error of a stream in a list.
    let value = value.get(0).unwrap_or(&value);
    let error = value.get("error").unwrap_or(value);
    let message = error.as_str().or_else(|| error.get("message")?.as_str()).or_else(|| value.get("message")?.as_str());
    message.unwrap_or_default().clone_into(&mut said.message);
    for key in ["code", "type", "status"] {
        if let Some(word) = error.get(key).and_then(Value::as_str) {
            said.words.push(word.to_owned());
        }
    }
    for detail in error.get("details").and_then(Value::as_array).into_iter().flatten() {
        let kind = detail.get("@type").and_then(Value::as_str).unwrap_or_default();
        if kind.ends_with("google.rpc.RetryInfo") {
            said.retry_after = detail.get("retryDelay").and_then(Value::as_str).and_then(hints::duration);
        } else if kind.ends_with("google.rpc.QuotaFailure") {
            let violations = detail.get("violations").and_then(Value::as_array).into_iter().flatten();
            said.daily |= violations.into_iter().any(|violation| {
                let text = |key: &str| violation.get(key).and_then(Value::as_str).unwrap_or_default();
                text("quotaId").contains("PerDay") || text("quotaValue") == "0"
            });
        } else if kind.ends_with("google.rpc.ErrorInfo")
            && let Some(reason) = detail.get("reason").and_then(Value::as_str)
        {
            said.words.push(reason.to_owned());
        }
    }
    said.retry_after = said.retry_after.or_else(|| hints::from_message(&said.message));
    said
}

/// An answer whose status is an error.
pub(super) fn of_status(status: StatusCode, mut hints: LimitHints, body: &[u8], secret: Option<&Secret>) -> CallError {
    let said = read(body);
    if hints.retry_after.is_none() && matches!(status.as_u16(), 429 | 498 | 503 | 529) {
        hints.retry_after = said.retry_after;
    }
    let kind = kind_of(status.as_u16(), &said, &hints);
    let words = if said.message.is_empty() { "no explanation" } else { said.message.as_str() };
    let words = secret.map_or_else(|| words.to_owned(), |secret| secret.scrub(words));
    CallError {
        status: Some(status.as_u16()),
        hints,
        // Providers do not bill what they answer with an error.
        maybe_billed: false,
        ..CallError::new(kind, clean(&format!("the provider answered {}: {words}", status.as_u16())))
    }
}

/// An error that came in a stream, after a status that promised none.
pub(super) fn in_stream(body: &[u8], secret: Option<&Secret>) -> CallError {
    let said = read(body);
    let code = serde_json::from_slice::<Value>(body).ok().and_then(|value| {
        let value = value.get(0).unwrap_or(&value);
        value.pointer("/error/code")?.as_u64()
    });
    let status = said.words.iter().find_map(|word| match word.as_str() {
        "overloaded_error" => Some(529),
        "rate_limit_error" | "rate_limit_exceeded" => Some(429),
        "api_error" | "server_error" => Some(500),
        "authentication_error" => Some(401),
        "permission_error" => Some(403),
        "not_found_error" => Some(404),
        "request_too_large" => Some(413),
        "invalid_request_error" => Some(400),
        _ => None,
    });
    let status = status.or(code.and_then(|code| u16::try_from(code).ok())).unwrap_or(500);
    let hints = LimitHints { retry_after: said.retry_after, ..LimitHints::default() };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // It had begun to answer, so it may bill what it had done.
    CallError { maybe_billed: true, ..of_status(status, hints, body, secret) }
}

fn kind_of(status: u16, said: &Said, hints: &LimitHints) -> FailureKind {
    let says = |word: &str| said.words.iter().any(|said| said == word);
    let forever = hints.retry_after.is_some_and(|wait| wait > LONGEST_WAIT);
    if status == 400 && says("API_KEY_INVALID") {
        return FailureKind::Auth;
    }
    if status == 400 && says("context_length_exceeded") {
        return FailureKind::TooLarge;
    }
    match status {
        401 | 403 => FailureKind::Auth,
        402 => FailureKind::QuotaExhausted,
        // A redirection is not followed: the key would go along.
        404 | 410 | 300..=399 => FailureKind::NotFound,
        408 => FailureKind::Timeout,
        413 => FailureKind::TooLarge,
        429 if says("insufficient_quota") || said.daily || forever => FailureKind::QuotaExhausted,
        429 => FailureKind::RateLimited,
        498 | 503 | 529 => FailureKind::Overloaded,
        // Official clients try a conflict again.
        409 | 500..=599 => FailureKind::Server,
        _ => FailureKind::BadRequest,
    }
}

/// Whether an error is the provider's way to say that it withholds the answer: then it is a result.
pub(super) fn blocked(body: &[u8]) -> Option<String> {
    let said = read(body);
    said.words.into_iter().find(|word| word == "content_filter" || word == "content_policy_violation")
}

/// One line of bounded length, as log lines and tables want it.
fn clean(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(MESSAGE_CHARS) {
        out.push(if c.is_control() { ' ' } else { c });
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(status: u16, body: &Value) -> CallError {
        let secret = Secret::new("sk-clear").unwrap();
        let body = body.to_string();
        of_status(StatusCode::from_u16(status).unwrap(), LimitHints::default(), body.as_bytes(), Some(&secret))
    }

    #[test]
    fn each_family_says_what_can_be_tried_again() {
        let openai =
            |kind: &str, code: &str| json!({"error": {"message": "no", "type": kind, "param": null, "code": code}});
        let anthropic =
            |kind: &str| json!({"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "r"});
        let cases = [
            (429, openai("requests", "rate_limit_exceeded"), FailureKind::RateLimited),
            (429, openai("insufficient_quota", "insufficient_quota"), FailureKind::QuotaExhausted),
            (401, openai("invalid_request_error", "invalid_api_key"), FailureKind::Auth),
            (400, openai("invalid_request_error", "context_length_exceeded"), FailureKind::TooLarge),
            (498, openai("x", "capacity_exceeded"), FailureKind::Overloaded),
            (422, json!("plain"), FailureKind::BadRequest),
            (529, anthropic("overloaded_error"), FailureKind::Overloaded),
            (500, anthropic("api_error"), FailureKind::Server),
            (409, json!({}), FailureKind::Server),
            (408, json!({}), FailureKind::Timeout),
            (413, anthropic("request_too_large"), FailureKind::TooLarge),
            (404, anthropic("not_found_error"), FailureKind::NotFound),
            (302, json!({}), FailureKind::NotFound),
            (402, json!({}), FailureKind::QuotaExhausted),
        ];
        for (status, body, kind) in cases {
            let error = of(status, &body);
            assert_eq!(error.kind, kind, "{status} {body}");
            let again = matches!(status, 408 | 409 | 498 | 500 | 529) || kind == FailureKind::RateLimited;
            assert_eq!(error.retryable(), again, "{status} {body}");
            assert!(!error.maybe_billed);
        }
    }

    #[test]
    fn gemini_names_the_wait_in_its_body_and_a_day_is_no_wait() {
        let quota = |id: &str, value: &str, delay: &str| {
            json!({"error": {"code": 429, "message": "Quota exceeded.", "status": "RESOURCE_EXHAUSTED", "details": [
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": id, "quotaValue": value}]},
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]}})
        };
        let minute = of(429, &quota("GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "15", "2.5s"));
        assert_eq!((minute.kind, minute.hints.delay()), (FailureKind::RateLimited, Some(Duration::from_millis(2500))));
        for body in [
            quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "200", "30s"),
            quota("GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "0", "30s"),
            quota("x", "15", "7200s"),
        ] {
            let error = of(429, &body);
            assert_eq!(error.kind, FailureKind::QuotaExhausted, "{body}");
            assert!(!error.retryable() && error.fallback());
        }
        let invalid = json!({"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT",
            "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}});
        assert_eq!(of(400, &invalid).kind, FailureKind::Auth);
        let words = json!({"error": {"message": "Please retry in 1.5s."}});
        assert_eq!(of(503, &words).hints.delay(), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn a_message_is_one_line_of_bounded_length_without_the_key() {
        let error =
            of(401, &json!({"error": {"message": format!("bad key sk-clear\n\u{1b}[31m{}", "x".repeat(5000))}}));
        assert!(!error.message.contains("sk-clear") && error.message.contains("***"), "{error}");
        assert!(!error.message.contains(['\n', '\u{1b}']) && error.message.chars().count() <= MESSAGE_CHARS);
        let page = of_status(StatusCode::BAD_GATEWAY, LimitHints::default(), b"<html>\xff nginx", None);
        assert!(page.message.contains("nginx") && page.retryable());
    }

    #[test]
    fn an_error_in_a_stream_is_read_by_its_type() {
        let body = json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}});
        let error = in_stream(body.to_string().as_bytes(), None);
        assert_eq!((error.kind, error.maybe_billed), (FailureKind::Overloaded, true));
        let body = json!([{"error": {"code": 503, "message": "later", "status": "UNAVAILABLE"}}]);
        assert_eq!(in_stream(body.to_string().as_bytes(), None).kind, FailureKind::Overloaded);
    }
}
