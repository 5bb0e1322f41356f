//! What one call to a model is, whoever answers it: the request, the answer, the error, and the trait that providers have.
//!
//! Nothing here knows a wire format. A request carries no model name, so that the same request can go to several candidates
//! of a chain without a copy; the model goes beside it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::provider::OutputSchema;

/// What a model is asked. Its `Debug` shows sizes, never text.
#[derive(Clone, Default)]
pub struct CallRequest {
    /// Instructions beside the conversation.
    pub system: Option<Arc<str>>,
    /// The conversation, oldest first.
    pub messages: Vec<Message>,
    /// Most tokens that the answer may have, thinking included. Every call has such a bound, because its cost must have one.
    pub max_tokens: u32,
    /// Randomness of the answer.
    pub temperature: Option<f32>,
    /// Share of the probability mass that is drawn from.
    pub top_p: Option<f32>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// The answer must be JSON of this shape.
    pub schema: Option<Arc<OutputSchema>>,
    /// The answer must be some JSON object. A schema says more.
    pub json: bool,
    /// Functions that the model may ask its caller to run. Nothing here runs them.
    pub tools: Vec<Tool>,
    /// Whether it may, must or must not ask for one.
    pub tool_choice: ToolChoice,
    /// Let the provider search the web for the answer. Only Gemini can; others refuse.
    pub grounded: bool,
    /// Opaque id of the person on whose behalf the call is made, passed on to providers that take one.
    pub user: Option<Arc<str>>,
    /// Hand out the answer piece by piece, through [`Sink::delta`].
    pub stream: bool,
}

impl CallRequest {
    /// A request of one prompt.
    pub fn prompt(text: impl Into<String>, max_tokens: u32) -> Self {
        Self { messages: vec![Message::user(text)], max_tokens, ..Self::default() }
    }

    /// With instructions beside the prompt.
    #[must_use]
    pub fn with_system(mut self, system: impl Into<Arc<str>>) -> Self {
        self.system = Some(system.into());
        self
    }

    /// With a shape that the answer must have.
    #[must_use]
    pub fn with_schema(mut self, schema: Arc<OutputSchema>) -> Self {
        self.schema = Some(schema);
        self
    }

    /// Most input tokens that a provider can count for this request.
    ///
    /// Every tokenizer in use falls back to single bytes, so a text never has more tokens than bytes. What providers add around
    /// messages, tools and schemas is a few tokens each, of which the constants are several times the largest known.
    pub fn input_upper_bound(&self) -> u64 {
        const PER_CALL: u64 = 64;
        const PER_MESSAGE: u64 = 16;
        const WITH_TOOLS: u64 = 1024;
        const PER_TOOL: u64 = 64;
        const WITH_JSON: u64 = 1024;
        let mut bound = PER_CALL + self.system.as_ref().map_or(0, |text| text.len() as u64 + PER_MESSAGE);
        for message in &self.messages {
            bound += PER_MESSAGE + message.parts.iter().map(|part| part.bytes() + PER_MESSAGE).sum::<u64>();
        }
        if !self.tools.is_empty() {
            bound += WITH_TOOLS + self.tools.iter().map(|tool| tool.bytes() + PER_TOOL).sum::<u64>();
        }
        if let Some(schema) = &self.schema {
            // A schema can be sent twice: as a parameter, and in words to those that have no such parameter.
            bound += WITH_JSON + 2 * schema.bytes();
        } else if self.json {
            bound += WITH_JSON;
        }
        bound
    }
}

impl fmt::Debug for CallRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallRequest")
            .field("system_bytes", &self.system.as_ref().map_or(0, |text| text.len()))
            .field("messages", &self.messages.len())
            .field("input_upper_bound", &self.input_upper_bound())
            .field("max_tokens", &self.max_tokens)
            .field("schema", &self.schema.is_some())
            .field("tools", &self.tools.len())
            .field("grounded", &self.grounded)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// Who said a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// A function that the model asked for.
    Tool,
}

/// One message of a conversation. Its `Debug` shows no text.
#[derive(Clone, PartialEq)]
pub struct Message {
    /// Who said it.
    pub role: Role,
    /// What it is made of.
    pub parts: Vec<Part>,
}

impl Message {
    /// What the user says.
    pub fn user(text: impl Into<String>) -> Self {
        Self { role: Role::User, parts: vec![Part::Text(text.into())] }
    }

    /// What the model said.
    pub fn assistant(text: impl Into<String>) -> Self {
        Self { role: Role::Assistant, parts: vec![Part::Text(text.into())] }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.parts.iter().map(Part::bytes).sum::<u64>();
        f.debug_struct("Message").field("role", &self.role).field("bytes", &bytes).finish_non_exhaustive()
    }
}

/// A piece of a message.
#[derive(Clone, PartialEq)]
pub enum Part {
    /// Words.
    Text(String),
    /// The model asked for a function.
    ToolCall(ToolCall),
    /// What a function returned.
    ToolResult {
        /// Id of the call.
        id: String,
        /// Name of the function; providers without ids go by it.
        name: String,
        /// What it returned.
        content: String,
    },
}

impl Part {
    fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::Text(text) => text.len(),
            Self::ToolCall(call) => call.id.len() + call.name.len() + call.arguments.len(),
            Self::ToolResult { id, name, content } => id.len() + name.len() + content.len(),
        };
        bytes as u64
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({} bytes)", self.bytes())
    }
}

/// A function that the model asked its caller to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Id that the result is given back with.
    pub id: String,
    /// Name of the function.
    pub name: String,
    /// Its arguments, as JSON text.
    pub arguments: String,
}

/// A function that the model may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Name of the function.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON Schema of its arguments.
    pub parameters: Value,
    /// The arguments must follow the schema exactly, where the provider can see to that.
    pub strict: Option<bool>,
}

impl Tool {
    fn bytes(&self) -> u64 {
        let words = self.name.len() + self.description.as_ref().map_or(0, String::len);
        (words + self.parameters.to_string().len()) as u64
    }
}

/// Whether the model may ask for a function.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// It must not.
    Never,
    /// It must ask for one.
    Required,
    /// It must ask for this one.
    Named(String),
}

/// A piece of an answer under way.
#[derive(Clone, PartialEq, Eq)]
pub enum Delta {
    /// More words.
    Text(String),
    /// A function call begins.
    ToolCall {
        /// Which of the calls of this answer, from 0.
        index: usize,
        /// Its id.
        id: String,
        /// Name of the function.
        name: String,
    },
    /// More of the arguments of a function call.
    Arguments {
        /// Which call.
        index: usize,
        /// A piece of JSON text.
        text: String,
    },
}

impl fmt::Debug for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Self::ToolCall { index, name, .. } => write!(f, "ToolCall({index}, {name})"),
            Self::Arguments { index, text } => write!(f, "Arguments({index}, {} bytes)", text.len()),
        }
    }
}

/// Tokens that a provider says it counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// All input, that read from the provider's cache included.
    pub input_tokens: u64,
    /// The part of the input that was read from the provider's cache.
    pub cached_input_tokens: u64,
    /// All output that is billed, thinking included.
    pub output_tokens: u64,
    /// The part of the output that was thinking.
    pub reasoning_tokens: u64,
}

/// Why an answer ended. Providers add reasons at will, so an unknown one is kept as they wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The model was done, or met a stop text.
    Stop,
    /// `max_tokens` were used up.
    Length,
    /// It asks for functions.
    ToolCalls,
    /// The provider withholds the answer or its rest: a result, not a failure to be tried again.
    Blocked(String),
    /// A reason that is not known here.
    Other(String),
}

/// A page that a grounded answer rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Citation {
    /// Address of the page.
    pub url: String,
    /// Its title.
    pub title: String,
}

/// What a model answered. Its `Debug` shows sizes, never text.
#[derive(Clone, PartialEq)]
pub struct CallAnswer {
    /// The whole text.
    pub text: String,
    /// Functions that it asks for.
    pub tool_calls: Vec<ToolCall>,
    /// Why it ended.
    pub finish: Finish,
    /// What the provider counted; `None` when it did not say, which is not zero.
    pub usage: Option<Usage>,
    /// The text as JSON, when a schema was asked for; it is valid.
    pub structured: Option<Value>,
    /// The model that answered, as the provider names it.
    pub model: Option<String>,
    /// The provider's id of the answer.
    pub response_id: Option<String>,
    /// Pages that it rests on.
    pub citations: Vec<Citation>,
    /// What was searched for to ground it; providers bill these.
    pub searches: Vec<String>,
    /// What the provider said about its limits.
    pub hints: LimitHints,
}

impl CallAnswer {
    /// An answer of these words and nothing else known.
    pub fn of(text: impl Into<String>, finish: Finish) -> Self {
        Self {
            text: text.into(),
            tool_calls: Vec::new(),
            finish,
            usage: None,
            structured: None,
            model: None,
            response_id: None,
            citations: Vec::new(),
            searches: Vec::new(),
            hints: LimitHints::default(),
        }
    }
}

impl fmt::Debug for CallAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallAnswer")
            .field("text_bytes", &self.text.len())
            .field("tool_calls", &self.tool_calls.len())
            .field("finish", &self.finish)
            .field("usage", &self.usage)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

/// One dimension of a limit, as far as the provider told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// How much there is in all.
    pub limit: Option<u64>,
    /// How much is left.
    pub remaining: Option<u64>,
    /// How long until it is full again.
    pub reset_after: Option<Duration>,
    /// What a period is, where the provider said or is known for it; Groq counts requests by the day.
    pub window: Option<Duration>,
}

/// What a provider said about its limits, in the headers or the body of an answer. Times are from now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitHints {
    /// Try again after this long.
    pub retry_after: Option<Duration>,
    /// Requests.
    pub requests: Quota,
    /// Tokens.
    pub tokens: Quota,
}

impl LimitHints {
    /// How long to wait before the next try: what the provider asked for, else the time until its empty dimension is full.
    pub fn delay(&self) -> Option<Duration> {
        let empty = |quota: &Quota| if quota.remaining == Some(0) { quota.reset_after } else { None };
        self.retry_after.or_else(|| empty(&self.requests).max(empty(&self.tokens)))
    }
}

/// What kind of failure a call ended with. It decides what is done next, see [`CallError::retryable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No connection came about, so nothing was sent.
    Connect,
    /// The connection broke or ended early.
    Broken,
    /// The provider said nothing for too long.
    Timeout,
    /// Too many requests or tokens.
    RateLimited,
    /// The provider has no room at the moment.
    Overloaded,
    /// The provider failed.
    Server,
    /// The answer is no answer of this provider's format.
    Malformed,
    /// The answer is not of the shape that was asked for.
    Schema,
    /// A quota is used up for long, or the account has no money left.
    QuotaExhausted,
    /// The key is missing, wrong or not allowed to.
    Auth,
    /// There is no such model or endpoint.
    NotFound,
    /// The provider refuses the request as it is.
    BadRequest,
    /// The request is too long for the model or the provider.
    TooLarge,
    /// This provider cannot do what is asked.
    Unsupported,
}

impl FailureKind {
    /// The word for it in results and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Broken => "broken",
            Self::Timeout => "timeout",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
            Self::Server => "server",
            Self::Malformed => "malformed",
            Self::Schema => "schema",
            Self::QuotaExhausted => "quota_exhausted",
            Self::Auth => "auth",
            Self::NotFound => "not_found",
            Self::BadRequest => "bad_request",
            Self::TooLarge => "too_large",
            Self::Unsupported => "unsupported",
        }
    }
}

/// A call that came to nothing. The message never has a key in it.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("{message}")]
pub struct CallError {
    /// What kind of failure.
    pub kind: FailureKind,
    /// For people: a lowercase fragment.
    pub message: String,
    /// HTTP status, when there was one.
    pub status: Option<u16>,
    /// What the provider said about its limits.
    pub hints: LimitHints,
    /// The request may have reached the provider, so it may be billed.
    pub maybe_billed: bool,
    /// What the provider counted, when it told before the failure.
    pub usage: Option<Usage>,
    /// Pieces of an answer were handed out before the failure; a silent second try would repeat them.
    pub streamed: bool,
}

impl CallError {
    /// An error of which nothing more is known.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            status: None,
            hints: LimitHints::default(),
            maybe_billed: true,
            usage: None,
            streamed: false,
        }
    }

    /// The same provider may answer the same request later.
    pub fn retryable(&self) -> bool {
        !self.streamed
            && matches!(
                self.kind,
                FailureKind::Connect
                    | FailureKind::Broken
                    | FailureKind::Timeout
                    | FailureKind::RateLimited
                    | FailureKind::Overloaded
                    | FailureKind::Server
                    | FailureKind::Malformed
                    | FailureKind::Schema
            )
    }

    /// Another provider may answer the same request.
    pub fn fallback(&self) -> bool {
        !self.streamed && !matches!(self.kind, FailureKind::BadRequest)
    }
}

/// Where a call tells of its progress.
#[async_trait]
pub trait Sink: Send {
    /// The provider has begun to answer: its status and headers are here.
    fn head(&mut self, hints: &LimitHints);

    /// A piece of the answer. The call waits until it is taken, so a slow reader slows the provider and no memory fills.
    async fn delta(&mut self, delta: Delta);
}

/// For callers who want only the whole answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSink;

#[async_trait]
impl Sink for NoSink {
    fn head(&mut self, _hints: &LimitHints) {}

    async fn delta(&mut self, _delta: Delta) {}
}

/// Someone who answers calls. Dropping the future of a call ends its HTTP request.
#[async_trait]
pub trait Provider: Send + Sync + fmt::Debug {
    /// Its name in configuration and results.
    fn name(&self) -> &str;

    /// Answers are made up, and must be labelled so.
    fn simulated(&self) -> bool {
        false
    }

    /// Makes one call, once: nothing is tried again in here. There is no deadline for the whole call either; the caller drops
    /// the future when its time is up.
    async fn call(&self, model: &str, request: &CallRequest, sink: &mut dyn Sink) -> Result<CallAnswer, CallError>;
}
