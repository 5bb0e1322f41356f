//! The door to the pool: on this node it looks like a model provider, and behind it the dispatcher answers.
//!
//! ```text
//! codex ── HTTP, loopback, token ──> serve ──> exchange ──> carriage ─┬─ tls      gRPC to the dispatcher, by certificate
//!                                                                     └─ mailbox  files that the dispatcher looks for
//! ```
//!
//! For one start of the agent there is one door, on a port of its own, with a token that only that agent gets, by its
//! environment. Connections of other users are closed before anybody reads from them. A carriage that breaks is taken up again
//! behind the last frame that arrived; when that takes too long the agent gets an error after which it may ask again, and is
//! then given the answer that was begun, so nothing is paid for twice. An agent that goes away takes its call with it.

mod carriage;
mod exchange;
mod mailbox;
mod serve;
mod tls;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use drover_config::WorkerConfig;
use drover_mailbox::Mailbox;
use drover_service::Context;
use drover_types::{ErrorCode, Failure, OutboxId};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::info;

use carriage::{Carriage, Times};
pub(crate) use tls::find as find_dispatcher;

/// What it takes to open a door for an agent of this node.
#[derive(Clone)]
pub(crate) struct Plan {
    ctx: Context,
    node_id: String,
    mailbox: PathBuf,
    /// Directory of the node's key and certificate.
    identity: Option<PathBuf>,
    /// `auto`, `grpc` or `mailbox`.
    way: String,
    /// Where the dispatcher is, when the configuration says so.
    address: Option<String>,
    times: Times,
}

impl Plan {
    /// `None` when the agent's model does not come from the pool.
    pub(crate) fn of(
        id: &OutboxId,
        mailbox: &Mailbox,
        identity: Option<PathBuf>,
        config: &WorkerConfig,
        ctx: &Context,
    ) -> Option<Self> {
        config.nodes_ask_pool().then(|| Self {
            ctx: ctx.clone(),
            node_id: format!("{}/{}", id.swarm, id.node),
            mailbox: mailbox.root().to_owned(),
            identity,
            way: config.pool_carriage.clone(),
            address: config.pool_address.clone(),
            times: Times::default(),
        })
    }

    /// Opens the door.
    pub(crate) async fn open(self) -> Result<Door, Failure> {
        let failed = |what: String| {
            Failure::new(ErrorCode::BackendUnavailable, format!("no door to the pool can be opened: {what}"))
                .hint("correct worker.pool_carriage, or set worker.codex_provider to own")
        };
        let ctx = self.ctx.clone();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let carriage = tokio::task::spawn_blocking(move || Carriage::of(&self)).await;
        let carriage = carriage.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
        let listener =
            ctx.bind("the door to the pool", Some(any), any).map_err(|error| failed(format!("{error:#}")))?;
        let addr = listener.local_addr();
        let token = Token::fresh();
        let closing = CancellationToken::new();
        info!(door = %addr, "the agent's model is the dispatcher's");
        serve::start(&ctx, listener, Arc::new(carriage), token.clone(), closing.clone());
        Ok(Door { addr, token, _open: closing.drop_guard() })
    }
}

/// An open door. It closes when this is dropped.
#[derive(Debug)]
pub(crate) struct Door {
    addr: SocketAddr,
    token: Token,
    _open: DropGuard,
}

impl Door {
    /// The address that an agent is given, as of any provider.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// What it must show.
    pub(crate) fn token(&self) -> Token {
        self.token.clone()
    }
}

/// What lets an agent in. Its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Arc<str>);

impl Token {
    fn fresh() -> Self {
        use fmt::Write as _;
        let bytes: [u8; 32] = rand::random();
        let text = bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        Self(text.into())
    }

    /// For those who only want to know how an agent would be set up.
    pub(crate) fn none() -> Self {
        Self("".into())
    }

    #[cfg(test)]
    pub(crate) fn of_test(text: &str) -> Self {
        Self(text.into())
    }

    /// For the environment of the agent, and for nothing else.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares in a time that does not tell how much was right.
    fn is(&self, given: &str) -> bool {
        let (own, given) = (self.0.as_bytes(), given.as_bytes());
        let differs = own.iter().zip(given).fold(0, |differs, (a, b)| differs | (a ^ b));
        !own.is_empty() && own.len() == given.len() && differs == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests;
