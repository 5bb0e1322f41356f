//! Doors: whoever takes what is said to sessions.

use std::task::{Context, Poll};

use async_trait::async_trait;
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_service::{MAX_MESSAGE_BYTES, StateDir, Target, Token, address_book, connect, process};
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tower::ServiceExt as _;
use tower::util::BoxCloneSyncService;

/// The generated client over a way that finds its daemon again, and that shows the router's token where there is one.
pub type Client = HandoffServiceClient<InterceptedService<Way, Token>>;

/// How calls get to a door: a channel, or whatever else carries them.
#[derive(Debug, Clone)]
pub struct Way(BoxCloneSyncService<http::Request<Body>, http::Response<Body>, StdError>);

impl Way {
    /// A way that is not a channel.
    pub fn new<S>(service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + Sync + 'static,
        S::Error: Into<StdError> + 'static,
        S::Future: Send + 'static,
    {
        Self(BoxCloneSyncService::new(service.map_err(Into::into)))
    }
}

impl Service<http::Request<Body>> for Way {
    type Response = http::Response<Body>;
    type Error = StdError;
    type Future = <BoxCloneSyncService<http::Request<Body>, http::Response<Body>, StdError> as Service<
        http::Request<Body>,
    >>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.call(request)
    }
}

/// How nodes' doors are called in the address book: this, `-`, the swarm, `+`, the node's index.
pub const DOOR: &str = "handoff-coordinator";

/// Which new sessions may be opened through a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Opens {
    /// Any; it goes to the node that suits it best.
    #[default]
    Anywhere,
    /// Any, and it stays on this door's own node.
    Here,
    /// None: a door that is to open it is still awaited. Taken for [`Self::Anywhere`] when that one has said that it takes no sessions.
    Nothing,
}

/// One door.
#[derive(Debug, Clone)]
pub struct Door {
    /// What people call it: the node's id, or an address.
    pub name: String,
    /// The way through it.
    pub client: Client,
    /// What may be opened through it.
    pub opens: Opens,
}

impl Door {
    /// A door behind a channel.
    pub fn new(name: impl Into<String>, channel: Channel) -> Self {
        Self::with_token(name, channel, Token::default())
    }

    /// A door that wants to be shown a token.
    pub fn with_token(name: impl Into<String>, channel: Channel, token: Token) -> Self {
        Self::by(name, Way::new(channel), token)
    }

    /// A door at the end of some way.
    pub fn by(name: impl Into<String>, way: Way, token: Token) -> Self {
        let client = HandoffServiceClient::with_interceptor(way, token)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Self { name: name.into(), client, opens: Opens::default() }
    }

    /// The same door for other new sessions.
    #[must_use]
    pub fn opening(mut self, opens: Opens) -> Self {
        self.opens = opens;
        self
    }

    /// A door of this user's, at an address.
    pub fn at(addr: &str) -> Self {
        Self::new(addr, connect(Target::Address(addr.to_owned())))
    }

    /// A daemon of this instance.
    pub fn of_daemon(name: &str, state: &StateDir, daemon: &str) -> Self {
        Self::new(name, connect(Target::Daemon { state: state.clone(), name: daemon.to_owned() }))
    }
}

/// Who knows doors. Asked again whenever one fails, since nodes come and go.
#[async_trait]
pub trait Doors: Send + Sync {
    /// The doors there are now, best first.
    async fn doors(&self) -> Vec<Door>;
}

/// Always the same doors.
#[derive(Debug, Clone)]
pub struct Fixed(pub Vec<Door>);

#[async_trait]
impl Doors for Fixed {
    async fn doors(&self) -> Vec<Door> {
        self.0.clone()
    }
}

/// The doors of nodes that run on this host, of this instance, by the id of their node.
pub fn local(state: &StateDir) -> Vec<(String, String)> {
    let host = process::hostname();
    address_book::list(state)
        .into_iter()
        .filter(|entry| entry.host == host && entry.is_alive())
        .filter_map(|entry| {
            let (swarm, index) = entry.name.strip_prefix(DOOR)?.strip_prefix('-')?.rsplit_once('+')?;
            Some((format!("{swarm}/{index}"), entry.name.clone()))
        })
        .collect()
}
