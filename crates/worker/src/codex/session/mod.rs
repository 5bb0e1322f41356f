//! The decisions of the codex agent: a state machine without clock, files or processes.
//!
//! ```text
//!            Started        initialize, thread/start or thread/resume
//!   Down ──────────────▶ Handshake ───────────────────────────────▶ Ready ◀─┐
//!    ▲                       │                                      │ turn ─┘
//!    └────── Exited ─────────┴──────────────────────────────────────┘
//! ```
//!
//! One turn runs at a time, because codex takes a second `turn/start` on a busy thread for steering. A turn is over for the
//! worker only when codex says so and, after an interrupt, when the processes that it started are gone: codex leaves a
//! running command behind as a background terminal. If they do not go, codex itself is ended and resumed.

mod program;
mod turn;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use drover_types::{ErrorCode, Failure, InjectionId};
use serde_json::Value;

use super::approval::Question;
use super::memory::ThreadMemory;
use super::rpc::{self, Message, RpcError};
use super::translate::Translator;
use super::workspace::Workspace;
use crate::agent::{AgentCommand, AgentEvent, TurnOutcome};

/// How long codex may take over a request that it answers at once when it is well.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How long an interrupted turn may take to end.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(10);
/// Pause before an interrupt is sent again that found no turn yet.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(50);
/// Pause between two looks for processes that an interrupted turn left behind.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long codex may take to end them itself.
const LEFT_TO_CODEX: Duration = Duration::from_secs(1);
/// How long they may survive our own kill before codex is restarted.
const LEFT_TO_US: Duration = Duration::from_secs(3);
/// How long the last words about ended commands may take.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long another process may hold the thread: the codex of a worker that has just died.
const WRITER_LIMIT: Duration = Duration::from_mins(1);
/// While the provider is away codex says so at every attempt; that is told once, and then this often.
const RETRY_TOLD_EVERY: Duration = Duration::from_mins(1);
/// The longest pause before a restart.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

/// What the session was set up with.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) cwd: String,
    pub(super) approval_policy: String,
    pub(super) sandbox_mode: String,
    pub(super) max_restarts: u32,
}

/// What happens to the session.
#[derive(Debug)]
pub(super) enum Input {
    /// The worker wants something.
    Command(AgentCommand),
    /// Codex was started.
    Started { pid: u32 },
    /// Codex says something.
    Message(Message),
    /// Codex is gone, and so is every process that it left.
    Exited { reason: String },
    /// Codex cannot be started, and trying again will not help.
    CannotStart(Failure),
    /// How many processes of the turn are still there.
    Stragglers(usize),
    /// Time has passed.
    Tick,
}

/// What the shell is to do, in this order.
#[derive(Debug, PartialEq)]
pub(super) enum Effect {
    /// Write this to codex.
    Send(Vec<u8>),
    /// Tell the worker.
    Emit(AgentEvent),
    /// Write this down before going on.
    Remember(ThreadMemory),
    /// Note which processes of codex are there before the turn.
    Baseline,
    /// Look which have come since; answered with `Stragglers`.
    Look,
    /// Kill those that the last look has found.
    Kill,
    /// End codex; at once, or first by closing its input. Answered with `Exited`.
    End { hard: bool },
    /// Start codex after this pause.
    Start { after: Duration },
    /// Nothing more will come.
    Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Down,
    Handshake,
    Ready,
    Over,
}

/// A request that waits for its answer.
#[derive(Debug)]
struct Call {
    what: Asked,
    until: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Initialize,
    StartThread,
    ResumeThread,
    StartTurn,
    Interrupt,
    Clean,
    Steer(InjectionId),
}

impl Asked {
    fn method(&self) -> &'static str {
        match self {
            Self::Initialize => "initialize",
            Self::StartThread => "thread/start",
            Self::ResumeThread => "thread/resume",
            Self::StartTurn => "turn/start",
            Self::Interrupt => "turn/interrupt",
            Self::Clean => "thread/backgroundTerminals/clean",
            Self::Steer(_) => "turn/steer",
        }
    }
}

#[derive(Debug)]
struct Turn {
    injection: InjectionId,
    /// Codex's name for it, once it is known.
    id: Option<String>,
    stage: Stage,
    steers: Vec<Steer>,
    /// When a retry was last told, and how many have come since that were not.
    retries: Option<(Instant, u64)>,
}

#[derive(Debug)]
enum Stage {
    Running,
    /// An end was asked for, as soon as the turn's id is known.
    Interrupting {
        until: Instant,
        again_at: Option<Instant>,
    },
    /// Codex has ended the turn and is asked to end its commands.
    Cleaning {
        outcome: TurnOutcome,
    },
    /// The processes of the turn must go.
    Looking {
        outcome: TurnOutcome,
        since: Instant,
        look_at: Option<Instant>,
    },
    /// Nothing is missing but what became of the prompts that were added last.
    Settling {
        outcome: TurnOutcome,
    },
}

#[derive(Debug)]
struct Steer {
    injection: InjectionId,
    prompt: String,
    stage: SteerStage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SteerStage {
    /// The turn's id is not known yet.
    Waiting,
    /// On its way.
    Sent,
    /// Codex has it but has not used it.
    Accepted,
    /// It is part of the conversation.
    Taken,
}

/// Why codex was ended by us.
#[derive(Debug)]
enum Ending {
    /// The worker stops.
    Stop,
    /// A turn's processes could only be ended with codex itself. No fault.
    Stuck,
    /// It did not do what it must.
    Fault(String),
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Session {
    terms: Terms,
    workspace: Workspace,
    translator: Translator,
    memory: Option<ThreadMemory>,
    phase: Phase,
    pid: u32,
    user_agent: String,
    next_id: u64,
    calls: BTreeMap<u64, Call>,
    turn: Option<Turn>,
    last_turn_id: Option<String>,
    /// A prompt that came while codex was not ready.
    held: Option<(InjectionId, String)>,
    questions: Vec<Question>,
    ending: Option<Ending>,
    restarts: u32,
    /// When the thread was first found held by another process, how often it was tried since, and when to try again.
    writer: Option<(Instant, u32, Option<Instant>)>,
    /// The history is gone, and nobody was told yet.
    history_lost: Option<String>,
    out: Vec<Effect>,
}

impl Session {
    pub(super) fn new(terms: Terms, workspace: Workspace, memory: Option<ThreadMemory>) -> Self {
        Self {
            terms,
            workspace,
            translator: Translator::default(),
            memory,
            phase: Phase::Down,
            pid: 0,
            user_agent: String::new(),
            next_id: 1,
            calls: BTreeMap::new(),
            turn: None,
            last_turn_id: None,
            held: None,
            questions: Vec::new(),
            ending: None,
            restarts: 0,
            writer: None,
            history_lost: None,
            out: Vec::new(),
        }
    }

    /// When a `Tick` is due.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let calls = self.calls.values().map(|call| call.until);
        let stage = match self.turn.as_ref().map(|turn| &turn.stage) {
            Some(Stage::Interrupting { until, again_at }) => [Some(*until), *again_at],
            Some(Stage::Looking { look_at, .. }) => [*look_at, None],
            _ => [None, None],
        };
        let retry = self.writer.and_then(|(_, _, at)| at);
        calls.chain(stage.into_iter().flatten()).chain(retry).min()
    }

    /// Takes one input and says what to do about it.
    pub(super) fn handle(&mut self, now: Instant, input: Input) -> Vec<Effect> {
        match input {
            _ if self.phase == Phase::Over => {}
            Input::Command(command) => self.command(now, command),
            Input::Started { pid } => self.started(now, pid),
            Input::Message(message) if self.ending.is_none() => self.message(now, message),
            // What codex still says while it ends may be the end of the turn.
            Input::Message(Message::Notification { method, params }) => self.notification(now, &method, &params),
            Input::Message(_) => {}
            Input::Exited { reason } => self.exited(reason),
            Input::CannotStart(failure) => self.give_up(failure),
            Input::Stragglers(count) => self.stragglers(now, count),
            Input::Tick => self.tick(now),
        }
        std::mem::take(&mut self.out)
    }

    fn emit(&mut self, event: AgentEvent) {
        self.out.push(Effect::Emit(event));
    }

    fn call(&mut self, now: Instant, what: Asked, params: &Value) {
        let id = self.next_id;
        self.next_id += 1;
        self.out.push(Effect::Send(rpc::request(id, what.method(), params)));
        self.calls.insert(id, Call { what, until: now + CALL_LIMIT });
    }

    fn thread_id(&self) -> String {
        self.memory.as_ref().map(|memory| memory.thread_id.clone()).unwrap_or_default()
    }

    // What the worker wants.

    fn command(&mut self, now: Instant, command: AgentCommand) {
        match command {
            AgentCommand::Begin { injection, prompt, .. } => {
                if self.phase == Phase::Ready && self.ending.is_none() && self.turn.is_none() {
                    self.begin(now, injection, &prompt);
                } else if self.turn.is_none() && self.held.is_none() {
                    self.held = Some((injection, prompt));
                } else {
                    let outcome = TurnOutcome::failed(ErrorCode::Internal, "a turn was begun while another one ran");
                    self.emit(AgentEvent::TurnEnded { injection, outcome });
                }
            }
            AgentCommand::Steer { injection, into, prompt } => self.steer(now, injection, &into, prompt),
            AgentCommand::Interrupt { injection } | AgentCommand::Leave { injection } => {
                self.interrupt(now, &injection);
            }
            AgentCommand::Answer { approval_id, call_id, approved, decision } => {
                let found = self.questions.iter().position(|question| question.approval_id == approval_id);
                let found = found.or_else(|| self.questions.iter().position(|question| question.call_id == call_id));
                if let Some(found) = found {
                    let question = self.questions.remove(found);
                    let result = question.result(approved, decision.as_ref());
                    self.out.push(Effect::Send(rpc::answer(&question.rpc_id, &result)));
                }
            }
            AgentCommand::Stop => {
                if self.phase == Phase::Down {
                    self.finish_for_good();
                } else {
                    self.end(Ending::Stop);
                }
            }
        }
    }

    // What codex says.

    fn message(&mut self, now: Instant, message: Message) {
        match message {
            Message::Notification { method, params } => self.notification(now, &method, &params),
            Message::Request { id, method, params } => self.question(&id, &method, &params),
            Message::Response { id, result } => {
                if let Some(call) = self.calls.remove(&id) {
                    self.answered(now, call.what, result);
                }
            }
        }
    }

    fn answered(&mut self, now: Instant, what: Asked, result: Result<Value, RpcError>) {
        match (what, result) {
            (Asked::Initialize, Ok(result)) => {
                result["userAgent"].as_str().unwrap_or("unknown").clone_into(&mut self.user_agent);
                self.out.push(Effect::Send(rpc::notification("initialized")));
                self.open_thread(now);
            }
            (Asked::StartThread, Ok(result)) => match result["thread"]["id"].as_str() {
                Some(id) => {
                    let memory = ThreadMemory { thread_id: id.to_owned(), used: false };
                    self.out.push(Effect::Remember(memory.clone()));
                    self.memory = Some(memory);
                    self.ready(now, &result, false);
                }
                None => self.end(Ending::Fault("codex opened a thread without an id".to_owned())),
            },
            (Asked::ResumeThread, Ok(result)) => self.ready(now, &result, true),
            (Asked::ResumeThread, Err(error)) => self.not_resumed(now, &error),
            (Asked::StartThread, Err(error)) => {
                let failure = Failure::new(ErrorCode::InvalidRequest, format!("codex opened no thread: {error}"));
                self.end(Ending::Stop);
                self.give_up(failure.hint("check worker.approval_policy, worker.sandbox_mode and codex's config.toml"));
            }
            (Asked::Initialize, Err(error)) => self.end(Ending::Fault(format!("codex refused the handshake: {error}"))),
            (Asked::StartTurn, Ok(result)) => {
                if let Some(turn_id) = result["turn"]["id"].as_str() {
                    self.learn_turn_id(now, turn_id);
                }
            }
            (Asked::StartTurn, Err(error)) => {
                let outcome = TurnOutcome::failed(ErrorCode::InvalidRequest, format!("codex began no turn: {error}"));
                self.settle(outcome);
            }
            (Asked::Interrupt, Err(_)) => {
                // The turn has just ended, or has not quite begun.
                if let Some(Turn { stage: Stage::Interrupting { again_at, .. }, .. }) = &mut self.turn {
                    *again_at = Some(now + INTERRUPT_AGAIN);
                }
            }
            (Asked::Interrupt, Ok(_)) => {}
            // An error means that this version cannot clean up; the processes are looked for all the same.
            (Asked::Clean, _) => self.look(now),
            (Asked::Steer(injection), result) => {
                if let Some(steer) = self.steer_of(&injection) {
                    match (&result, steer.stage) {
                        (Ok(_), SteerStage::Sent) => steer.stage = SteerStage::Accepted,
                        (Ok(_), _) => {}
                        (Err(_), _) => self.refuse(&injection),
                    }
                }
                self.settle_when_known();
            }
        }
    }

    // Time.

    fn tick(&mut self, now: Instant) {
        if let Some((since, tries, Some(at))) = self.writer
            && now >= at
        {
            self.writer = Some((since, tries, None));
            self.open_thread(now);
        }
        match self.turn.as_mut().map(|turn| &mut turn.stage) {
            Some(Stage::Interrupting { until, .. }) if now >= *until => self.end(Ending::Stuck),
            Some(Stage::Interrupting { again_at: Some(at), .. }) if now >= *at => self.send_waiting(now),
            Some(Stage::Looking { look_at, .. }) if look_at.is_some_and(|at| now >= at) => {
                *look_at = None;
                self.out.push(Effect::Look);
            }
            _ => {}
        }
        let late: Vec<u64> = self.calls.iter().filter(|(_, call)| now >= call.until).map(|(id, _)| *id).collect();
        for id in late {
            match self.calls.remove(&id).map(|call| call.what) {
                Some(Asked::Clean) => self.look(now),
                // The turn's own limit covers this one.
                Some(Asked::Interrupt) | None => {}
                Some(what) => {
                    let limit = CALL_LIMIT.as_secs();
                    self.end(Ending::Fault(format!("codex did not answer {} within {limit} s", what.method())));
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
