//! One mapping between our error codes and gRPC statuses, so that no caller has to match on text.

use drover_types::{ErrorCode, Failure};
use prost::Message as _;
use tonic::{Code, Status};

use crate::common::ErrorDetail;

/// The gRPC status that carries this failure, with its code and hint in the details.
pub fn status_of(failure: &Failure) -> Status {
    let detail = ErrorDetail { code: failure.code.as_str().to_owned(), hint: failure.hint.clone() };
    Status::with_details(grpc_code(failure.code), failure.message.clone(), detail.encode_to_vec().into())
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
        | ErrorCode::UnknownProvider => Code::NotFound,
        ErrorCode::NodeOutOfRange => Code::OutOfRange,
        ErrorCode::InvalidRequest => Code::InvalidArgument,
        ErrorCode::RequestReused => Code::AlreadyExists,
        ErrorCode::SwarmOver
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
    }
}
