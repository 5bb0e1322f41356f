//! The one door between the worker and whatever answers its prompts.
//!
//! The worker owns order, dedupe, the approval policy and the record of what began and ended; an agent owns its program
//! and turns what that program says into events. The two share nothing but these messages.

use async_trait::async_trait;
use drover_types::{ErrorCode, Failure, InjectionId};
use tokio::sync::mpsc;

/// What the worker tells the agent. Sent over a bounded channel; the agent runs as one tracked task.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentCommand {
    /// Run this prompt as a turn of its own. Only ever sent when no turn runs.
    Begin {
        /// Whose turn it is.
        injection: InjectionId,
        /// The prompt.
        prompt: String,
        /// W3C traceparent of the asker.
        trace: Option<String>,
    },
    /// Add this prompt to the running turn.
    Steer {
        /// The prompt's own id.
        injection: InjectionId,
        /// Whose turn it goes into.
        into: InjectionId,
        /// The prompt.
        prompt: String,
    },
    /// End the running turn. The commands it started must be dead when `TurnEnded` comes.
    Interrupt {
        /// Whose turn it is.
        injection: InjectionId,
    },
    /// The node ends: as with `Interrupt`, unless the turn goes on elsewhere without it.
    Leave {
        /// Whose turn it is.
        injection: InjectionId,
    },
    /// The word on an approval that the agent asked for.
    Answer {
        /// The approval.
        approval_id: String,
        /// The call it is about.
        call_id: String,
        /// Whether the call may go on.
        approved: bool,
        /// The decision in the agent's own words, when the asker gave one.
        decision: Option<serde_json::Value>,
    },
    /// End the agent program in order, then return from `run`.
    Stop,
}

/// What the agent tells the worker.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentEvent {
    /// Takes prompts now. Also sent again after each restart of the agent program.
    Ready {
        /// What is worth knowing about it: version, thread, model.
        detail: serde_json::Value,
        /// The agent program's process id; none when it is built in.
        pid: Option<u32>,
    },
    /// Something happened in a turn; `kind` is an event name of the JSON-line control plane.
    Event {
        /// Whose turn it is.
        injection: InjectionId,
        /// The event's name, such as `assistant_delta`.
        kind: String,
        /// The event's own fields, an object.
        data: serde_json::Value,
    },
    /// The agent waits for a word before it goes on.
    ApprovalWanted {
        /// Whose turn it is.
        injection: InjectionId,
        /// Names the approval.
        approval_id: String,
        /// The call it is about.
        call_id: String,
        /// Whether the call stays inside the node's working directory.
        inside_workspace: bool,
        /// The other fields of `exec_approval_required`, an object.
        data: serde_json::Value,
    },
    /// The agent no longer waits for this approval: its turn ended or was interrupted.
    ApprovalGone {
        /// The approval.
        approval_id: String,
    },
    /// There was no turn to steer; the worker queues the prompt as an ordinary one.
    SteerRefused {
        /// The prompt's own id.
        injection: InjectionId,
        /// The prompt.
        prompt: String,
    },
    /// The turn is over.
    TurnEnded {
        /// Whose turn it was.
        injection: InjectionId,
        /// How it ended.
        outcome: TurnOutcome,
    },
    /// The agent program died; the agent restarts it by itself, a bounded number of times.
    Crashed {
        /// What it died of.
        reason: String,
        /// Restarts so far.
        restarts: u32,
    },
    /// The agent will not come back. The worker says so and exits 1.
    GaveUp {
        /// Why, and what to do.
        failure: Failure,
    },
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnStatus {
    /// As it should.
    Completed,
    /// Not to its end.
    Failed,
    /// Somebody asked for its end.
    Interrupted,
}

impl TurnStatus {
    /// The spelling in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// The end of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnOutcome {
    /// How it ended.
    pub status: TurnStatus,
    /// What went wrong, for people.
    pub error: Option<String>,
    /// What went wrong, for programs.
    pub code: Option<ErrorCode>,
    /// The whole last assistant text, empty when there was none.
    pub text: String,
}

impl TurnOutcome {
    /// A turn that ended well with this text.
    pub fn completed(text: impl Into<String>) -> Self {
        Self { status: TurnStatus::Completed, error: None, code: None, text: text.into() }
    }

    /// A turn that failed without a text.
    pub fn failed(code: ErrorCode, error: impl Into<String>) -> Self {
        Self { status: TurnStatus::Failed, error: Some(error.into()), code: Some(code), text: String::new() }
    }

    /// A turn that was interrupted.
    pub fn interrupted(text: impl Into<String>) -> Self {
        Self { status: TurnStatus::Interrupted, error: None, code: None, text: text.into() }
    }
}

/// Something that answers prompts, one turn at a time.
#[async_trait]
pub trait Agent: Send + 'static {
    /// Runs until `Stop` or until it gives up. Never blocks on a full event channel for ever: the worker always drains it.
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>);
}
