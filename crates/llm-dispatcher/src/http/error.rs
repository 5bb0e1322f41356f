//! Refusals, in the shape that clients of `OpenAI`'s interface read.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::call::FailureKind;
use crate::core::{Reason, Refusal as Refused, Status};
use crate::shell::Done;

/// Official clients look at it before they try again by themselves. Whatever was worth trying again has been here.
pub(super) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Why a request is not answered.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
    /// The same request may well succeed a little later.
    later: bool,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), later: false }
    }

    /// The request itself is wrong.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// Something is asked for that is not passed on.
    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message)
    }

    /// What the end of a call that has no answer means to a client.
    pub(super) fn of(done: &Done) -> Self {
        let (status, code, later) = match done.status {
            Status::Answered | Status::Blocked => (StatusCode::BAD_GATEWAY, "no_answer", false),
            Status::Cancelled => (StatusCode::SERVICE_UNAVAILABLE, "cancelled", true),
            Status::Failed(Reason::Deadline) | Status::Refused(Refused::Deadline { .. }) => {
                (StatusCode::GATEWAY_TIMEOUT, "deadline", false)
            }
            Status::Failed(Reason::Budget { .. }) | Status::Refused(Refused::Budget { .. }) => {
                (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", false)
            }
            Status::Refused(Refused::QueueFull { .. }) => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", true),
            Status::Refused(Refused::UnknownPrice) => (StatusCode::BAD_REQUEST, "unknown_price", false),
            Status::Refused(Refused::NoLane) => (StatusCode::NOT_FOUND, "model_not_found", false),
            Status::Refused(Refused::Duplicate) => (StatusCode::CONFLICT, "duplicate", false),
            Status::Failed(Reason::Call(kind)) => of_call(kind),
        };
        Self { status, code, message: done.error.clone(), later }
    }

    /// What [`SHOULD_RETRY`] says.
    pub(super) fn should_retry(&self) -> &'static str {
        if self.later { "true" } else { "false" }
    }

    /// The body alone, for the middle of a stream.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 | 403 => "authentication_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": null, "code": self.code}})
    }
}

fn of_call(kind: FailureKind) -> (StatusCode, &'static str, bool) {
    match kind {
        FailureKind::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", true),
        FailureKind::QuotaExhausted => (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", false),
        FailureKind::BadRequest => (StatusCode::BAD_REQUEST, "invalid_request", false),
        FailureKind::Unsupported => (StatusCode::BAD_REQUEST, "unsupported_parameter", false),
        FailureKind::TooLarge => (StatusCode::BAD_REQUEST, "context_length_exceeded", false),
        FailureKind::NotFound => (StatusCode::NOT_FOUND, "model_not_found", false),
        FailureKind::Timeout => (StatusCode::GATEWAY_TIMEOUT, "provider_timeout", false),
        FailureKind::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "provider_overloaded", true),
        // The provider refuses our key, not the caller's.
        FailureKind::Auth => (StatusCode::BAD_GATEWAY, "provider_auth", false),
        FailureKind::Schema => (StatusCode::BAD_GATEWAY, "schema_mismatch", false),
        FailureKind::Connect | FailureKind::Broken | FailureKind::Server | FailureKind::Malformed => {
            (StatusCode::BAD_GATEWAY, "provider_failed", false)
        }
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        let code =
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE { "request_too_large" } else { "invalid_request" };
        Self::new(rejection.status(), code, rejection.body_text())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let retry = HeaderValue::from_static(self.should_retry());
        (self.status, [(SHOULD_RETRY, retry)], Json(self.body())).into_response()
    }
}
