//! What can go wrong for an operator, each with what to do about it and the exit code that scripts see.

use std::error::Error as _;
use std::path::Path;
use std::{fmt, io};

use drover_types::{ErrorCode, Failure};
use tonic::{Code, Status};

/// Exit codes, the same in every program of drover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// What was asked for is done.
    Done = 0,
    /// It is not.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// A daemon cannot be reached.
    Unreachable = 69,
    /// The configuration is wrong.
    BadConfig = 78,
}

/// A failure on its way to the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) exit: Exit,
    /// The stable code, for scripts; none when the fault lies in the command line or on this machine.
    pub(crate) code: Option<ErrorCode>,
    /// What was wrong.
    pub(crate) message: String,
    /// What to do next; may be empty.
    pub(crate) hint: String,
}

impl Fault {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, code: None, message: message.into(), hint: String::new() }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// What the router answered, with our own advice where it gave none.
    pub(crate) fn of_failure(failure: Failure) -> Self {
        let Failure { code, message, hint } = failure;
        let message = if message.is_empty() { code.as_str().replace('_', " ") } else { message };
        let hint = if hint.is_empty() { advice(code).to_owned() } else { hint };
        Self { exit: Exit::Failed, code: Some(code), message, hint }
    }

    /// The same, of a failed call.
    pub(crate) fn of_status(status: &Status) -> Self {
        if lost(status) {
            return Self::unreachable(&deepest(status));
        }
        Self::of_failure(drover_proto::failure_of(status))
    }

    /// The state directory cannot be written.
    pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> Self {
        let mut fault = Self::failed(format!("cannot write state directory {}: {error}", path.display()));
        fault.code = Some(ErrorCode::StoreUnavailable);
        fault.hint(match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free some space; nothing that was accepted is lost"
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                "the file system is read-only: remount it, or choose another directory with DROVER_STATE_DIR"
            }
            _ => "`drover doctor --fix` repairs its mode; or choose another directory with DROVER_STATE_DIR",
        })
    }

    /// The router does not answer.
    pub(crate) fn unreachable(why: &str) -> Self {
        Self::new(Exit::Unreachable, format!("cannot reach the router: {why}"))
            .hint("start it with `drover up`, or leave out --no-start; `drover doctor` says what is wrong")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<&Status> for Fault {
    fn from(status: &Status) -> Self {
        Self::of_status(status)
    }
}

/// Whether the call did not reach a router, or the connection broke under it: repeating it may help.
pub(crate) fn lost(status: &Status) -> bool {
    if !status.details().is_empty() {
        return drover_proto::failure_of(status).code == ErrorCode::ShuttingDown;
    }
    status.source().is_some() || status.code() == Code::Unavailable
}

/// The innermost reason of a failed call: the layers above it only say "transport error".
pub(crate) fn deepest(status: &Status) -> String {
    let Some(mut reason) = status.source() else { return status.message().to_owned() };
    while let Some(next) = reason.source() {
        reason = next;
    }
    reason.to_string()
}

/// What to do about each code when the daemon that reported it gave no hint of its own.
pub(crate) fn advice(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::UnknownSwarm => "`drover list` shows the swarms",
        ErrorCode::SwarmOver => "launch another one: drover launch --nodes N --prompt P",
        ErrorCode::NodeOutOfRange => "`drover status SWARM` shows its nodes; they count from 0",
        ErrorCode::UnknownInjection => "`drover events --since 0` shows the injections",
        ErrorCode::UnknownSession => "`drover sessions` shows the sessions; sending with --agent opens a new one",
        ErrorCode::SessionOver => "send to another session id; it is opened when it is new",
        ErrorCode::HandoffFailed => "`drover why SESSION` says more, `drover members` lists the nodes",
        ErrorCode::UnknownApproval => "`drover approvals` shows what waits for an answer",
        ErrorCode::UnknownProvider => "`drover launch --dry-run` shows where swarms can be launched",
        ErrorCode::ProviderUnavailable => "choose another with --cluster, or look at `drover doctor`",
        ErrorCode::InvalidRequest => "look at the help of the command: drover help COMMAND",
        ErrorCode::RequestReused => "repeat the command; it makes up a new request id",
        ErrorCode::LaunchFailed | ErrorCode::DeliveryFailed => "`drover why SWARM` says more",
        ErrorCode::CodexMissing => {
            "install it (npm install -g @openai/codex) or set worker.codex_bin; --agent echo needs neither codex nor a key"
        }
        ErrorCode::CodexNotLoggedIn => {
            "run `codex login`, or set OPENAI_API_KEY where the daemons start; --agent echo needs neither codex nor a key"
        }
        ErrorCode::TurnLost => "inject the prompt again when it is safe to repeat",
        ErrorCode::BackendUnavailable => "`drover doctor` says which daemon does not answer",
        ErrorCode::StoreUnavailable => {
            "free space in the state directory or make it writable; nothing accepted is lost"
        }
        ErrorCode::SlowSubscriber => "resume with `drover events --since SEQ --follow`",
        ErrorCode::ShuttingDown => "try again in a moment",
        ErrorCode::VersionMismatch => {
            "stop the older daemons (`drover down`) and repeat the command; swarms go on meanwhile"
        }
        ErrorCode::NotAllowed => "security.allow_uids in the router's configuration lists who may connect",
        ErrorCode::Internal => "this is a fault of ours; the log of the daemon says more (see `drover doctor`)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_says_what_to_do_and_keeps_a_better_hint() {
        for &code in ErrorCode::ALL {
            let status = drover_proto::status_of(&Failure::new(code, "what was wrong"));
            let fault = Fault::of_status(&status);
            assert!(fault.hint.len() > 15, "{code}: {}", fault.hint);
            if code != ErrorCode::ShuttingDown {
                assert_eq!((fault.message.as_str(), fault.exit), ("what was wrong", Exit::Failed), "{code}");
            }
            let hinted = drover_proto::status_of(&Failure::new(code, "m").hint("do this"));
            if code != ErrorCode::ShuttingDown {
                assert_eq!(Fault::of_status(&hinted).hint, "do this");
            }
        }
    }

    #[test]
    fn only_a_broken_connection_is_worth_a_second_try() {
        assert!(lost(&Status::unavailable("no")));
        assert!(lost(&drover_proto::status_of(&Failure::new(ErrorCode::ShuttingDown, "x"))));
        assert!(!lost(&drover_proto::status_of(&Failure::new(ErrorCode::BackendUnavailable, "x"))));
        assert!(!lost(&Status::not_found("no")));
    }
}
