//! One mapping between our error codes and gRPC statuses, so that no caller has to match on text.

use drover_types::{ErrorCode, Failure, shortened};
use prost::Message as _;
use tonic::{Code, Status};

use crate::common::ErrorDetail;

/// Longest message and hint that travel. They are headers, which have little room, and may repeat what the caller sent.
const MOST_MESSAGE: usize = 800;
const MOST_HINT: usize = 400;

/// The gRPC status that carries this failure, with its code and hint in the details.
pub fn status_of(failure: &Failure) -> Status {
    let detail =
        ErrorDetail { code: failure.code.as_str().to_owned(), hint: shortened(&failure.hint, MOST_HINT).into_owned() };
    Status::with_details(
        grpc_code(failure.code),
        shortened(&failure.message, MOST_MESSAGE),
        detail.encode_to_vec().into(),
    )
}

/// The failure in a gRPC status, also in one that none of our daemons wrote.
pub fn failure_of(status: &Status) -> Failure {
    if let Ok(detail) = ErrorDetail::decode(status.details())
        && let Some(code) = ErrorCode::from_name(&detail.code)
    {
        return Failure { code, message: status.message().to_owned(), hint: detail.hint };
    }
    let code = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidRequest,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ErrorCode::BackendUnavailable,
        Code::PermissionDenied | Code::Unauthenticated => ErrorCode::NotAllowed,
        Code::Unimplemented => ErrorCode::VersionMismatch,
        _ => ErrorCode::Internal,
    };
    Failure::new(code, status.message())
}

fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::UnknownSwarm
        | ErrorCode::UnknownInjection
        | ErrorCode::UnknownApproval
        | ErrorCode::UnknownSession
        | ErrorCode::UnknownProvider => Code::NotFound,
        ErrorCode::NodeOutOfRange => Code::OutOfRange,
        ErrorCode::InvalidRequest => Code::InvalidArgument,
        ErrorCode::RequestReused => Code::AlreadyExists,
        ErrorCode::SwarmOver
        | ErrorCode::SessionOver
        | ErrorCode::HandoffFailed
        | ErrorCode::LaunchFailed
        | ErrorCode::CodexMissing
        | ErrorCode::CodexNotLoggedIn
        | ErrorCode::DeliveryFailed
        | ErrorCode::VersionMismatch => Code::FailedPrecondition,
        ErrorCode::TurnLost => Code::Aborted,
        ErrorCode::ProviderUnavailable | ErrorCode::BackendUnavailable | ErrorCode::ShuttingDown => Code::Unavailable,
        ErrorCode::StoreUnavailable | ErrorCode::SlowSubscriber => Code::ResourceExhausted,
        ErrorCode::NotAllowed => Code::PermissionDenied,
        ErrorCode::Internal => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for &code in ErrorCode::ALL {
            let failure = Failure::new(code, "what was wrong").hint("what to do");
            assert_eq!(failure_of(&status_of(&failure)), failure);
        }
        // What repeats a mebibyte, in characters that take the most room, still fits among the headers.
        let long =
            Failure::new(ErrorCode::InvalidRequest, "\u{10ffff}".repeat(1 << 18)).hint("\u{10ffff}".repeat(1 << 18));
        let headers = format!("{:?}", status_of(&long).into_http::<String>().headers());
        assert!(headers.len() < 16 << 10, "{} bytes", headers.len());
    }
}
