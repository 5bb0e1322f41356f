//! The closed set of reasons that cross a process boundary, each with a stable spelling.

use std::fmt;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        /// A stable, machine-readable reason. `docs/errors.md` has a paragraph for each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $($(#[$doc])* $variant),+ }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable spelling.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// Reads the stable spelling.
            pub fn from_name(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

codes! {
    /// No swarm has this id.
    UnknownSwarm = "unknown_swarm",
    /// The swarm is ending or has ended.
    SwarmOver = "swarm_over",
    /// The swarm has no node of this index.
    NodeOutOfRange = "node_out_of_range",
    /// No injection has this id.
    UnknownInjection = "unknown_injection",
    /// No session has this id.
    UnknownSession = "unknown_session",
    /// The session has ended, or is as large as one may be.
    SessionOver = "session_over",
    /// The session did not move.
    HandoffFailed = "handoff_failed",
    /// No approval has this name.
    UnknownApproval = "unknown_approval",
    /// The catalogue has no such provider.
    UnknownProvider = "unknown_provider",
    /// The provider cannot be used at the moment.
    ProviderUnavailable = "provider_unavailable",
    /// A value of the request makes no sense.
    InvalidRequest = "invalid_request",
    /// The request id was used before for something else.
    RequestReused = "request_reused",
    /// The swarm did not come up.
    LaunchFailed = "launch_failed",
    /// No usable codex program was found.
    CodexMissing = "codex_missing",
    /// Codex is there but has no credentials.
    CodexNotLoggedIn = "codex_not_logged_in",
    /// The prompt did not reach the node.
    DeliveryFailed = "delivery_failed",
    /// The worker or its agent died while the turn ran.
    TurnLost = "turn_lost",
    /// Another daemon did not answer.
    BackendUnavailable = "backend_unavailable",
    /// State cannot be written: the disk is full or read-only.
    StoreUnavailable = "store_unavailable",
    /// The subscriber was too slow; it can resume by sequence number.
    SlowSubscriber = "slow_subscriber",
    /// The daemon is shutting down.
    ShuttingDown = "shutting_down",
    /// The other side is of a version that does not fit.
    VersionMismatch = "version_mismatch",
    /// The caller is not allowed to do this.
    NotAllowed = "not_allowed",
    /// A fault of ours.
    Internal = "internal",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A reason that crosses a process boundary: a code, one sentence of what was wrong, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The stable code.
    pub code: ErrorCode,
    /// What was wrong, a lowercase fragment.
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }

    /// The same failure with a word on what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
