//! What runs the turns of a session. The coordinator owns order, records and moves; an agent owns its program and what that says.
//!
//! ```text
//! begin(start) -> Conversation     the process begins, or goes on with what `start` tells of
//!   turn(asked, out) -> TurnDone   one at a time; text goes out as it comes, tools are called under their keys
//!   end()                          nothing of it runs any more when this returns: another node may begin then
//! ```

mod chat;
mod codex;
mod echo;
mod host;
mod installed;
mod tools;
mod worker_turn;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use drover_types::{AgentKind, Epoch, ErrorCode, Failure, RequestId, SessionId};
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

pub(crate) use host::{Host, Live, LiveTurn};
pub use installed::Around;
pub(crate) use tools::SharedTool;

use crate::core::Turn;
use crate::session::{Opening, Outcome, SessionState};

/// One kind of agent.
#[async_trait]
pub trait Agent: Send + Sync + 'static {
    /// A turn that a crash cut off may run again, because all that it does outside goes through [`TurnOut::call`].
    fn replayable(&self) -> bool;

    /// [`Start::dir`] belongs to the session: it is captured after each turn and goes along.
    fn travels(&self) -> bool;

    /// Begins a conversation, or goes on with one.
    async fn begin(&self, start: Start) -> Result<Box<dyn Conversation>, Failure>;
}

/// One conversation under way on this node.
#[async_trait]
pub trait Conversation: Send + 'static {
    /// Runs one turn. When the future is dropped, what it runs must end too.
    async fn turn(&mut self, asked: TurnAsked, out: &TurnOut) -> TurnDone;

    /// Ends the agent's process. When this returns nothing of it runs any more.
    async fn end(self: Box<Self>);
}

/// What a conversation begins with.
#[derive(Clone)]
pub struct Start {
    /// The session.
    pub session: SessionId,
    /// In which epoch this node owns it.
    pub epoch: Epoch,
    /// Goes along with the session, when the agent says so; as it was after the last turn, wherever that ran.
    pub dir: PathBuf,
    /// Stays on this node.
    pub private: PathBuf,
    /// What the session was opened with.
    pub opening: Opening,
    /// Everything that was said.
    pub history: History,
}

/// Everything that was said in a session, read from the disk when it is asked for.
#[derive(Clone)]
pub struct History(Arc<dyn Fn() -> BoxFuture<'static, Result<SessionState, Failure>> + Send + Sync>);

impl History {
    /// Read in this way.
    pub fn new(read: impl Fn() -> BoxFuture<'static, Result<SessionState, Failure>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// The session as its records add up to.
    pub async fn state(&self) -> Result<SessionState, Failure> {
        (self.0)().await
    }
}

/// One turn.
#[derive(Debug, Clone)]
pub struct TurnAsked {
    /// Its place.
    pub turn: Turn,
    /// What its asker calls it.
    pub request: RequestId,
    /// What is said.
    pub prompt: String,
    /// The agent may have seen it before.
    pub again: bool,
    /// Cancelled when the turn is to end early; after a while its future is dropped.
    pub stop: CancellationToken,
}

/// How a turn ended.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnDone {
    /// With an answer, or without.
    pub outcome: Outcome,
    /// What the turns share and has changed; nothing as value: it is gone.
    pub context: Vec<(String, Option<serde_json::Value>)>,
}

impl TurnDone {
    /// An answer.
    pub fn answer(text: impl Into<String>) -> Self {
        Self { outcome: Outcome::Answer(text.into()), context: Vec::new() }
    }

    /// No answer.
    pub fn failed(message: impl Into<String>) -> Self {
        let fault = crate::session::TurnFault::AgentFailed;
        Self { outcome: Outcome::Failed { fault, message: message.into() }, context: Vec::new() }
    }
}

/// Where a turn's text and calls go.
pub struct TurnOut {
    live: Arc<LiveTurn>,
    call: Box<dyn Fn(String) -> BoxFuture<'static, Option<String>> + Send + Sync>,
}

impl TurnOut {
    pub(crate) fn new(
        live: Arc<LiveTurn>,
        call: impl Fn(String) -> BoxFuture<'static, Option<String>> + Send + Sync + 'static,
    ) -> Self {
        Self { live, call: Box::new(call) }
    }

    /// Says some more of the answer.
    #[expect(clippy::unused_async, reason = "agents of other kinds await a reader that is slow")]
    pub async fn text(&self, piece: &str) {
        self.live.say(piece);
    }

    /// Calls a tool under a key that is the same when the turn runs again: then the tool's first answer comes back.
    pub async fn call(&self, what: impl Into<String>) -> Result<String, Failure> {
        let gone = || Failure::new(ErrorCode::TurnLost, "the session has left this node");
        (self.call)(what.into()).await.ok_or_else(gone)
    }
}

/// The agents of this node.
#[derive(Clone, Default)]
pub struct Agents(BTreeMap<&'static str, (AgentKind, Arc<dyn Agent>)>);

impl Agents {
    /// Adds one.
    #[must_use]
    pub fn with(mut self, kind: AgentKind, agent: impl Agent) -> Self {
        self.0.insert(kind.as_str(), (kind, Arc::new(agent)));
        self
    }

    /// The agent of a kind.
    pub fn get(&self, kind: AgentKind) -> Option<&Arc<dyn Agent>> {
        self.0.get(kind.as_str()).map(|(_, agent)| agent)
    }

    /// Their names, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }
}
