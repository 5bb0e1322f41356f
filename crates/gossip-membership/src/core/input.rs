//! What happens to a node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::message::{Message, PullAnswer, Request};
use super::record::{Load, NodeKey, SignedRecord};

/// Something that happened; the core is told of it together with the time.
#[derive(Debug, Clone)]
pub enum Input {
    /// A datagram came. The sender has been authenticated as the owner of that key.
    Datagram {
        /// Who sent it.
        from: NodeKey,
        /// What it says.
        message: Message,
    },
    /// A hello was exchanged: the node at that address has proved that it is there now. Both sides get this.
    Contact {
        /// Who it is.
        record: Arc<SignedRecord>,
    },
    /// A request of this node over the stream has ended.
    StreamEnded {
        /// From [`super::Effect::Stream`].
        id: u32,
        /// How it ended.
        outcome: Outcome,
    },
    /// Another node asks over the stream; answered by [`super::Effect::Reply`] in the same call.
    StreamAsked {
        /// Names the request; chosen by the shell.
        id: u64,
        /// Who asks, from its certificate.
        from: NodeKey,
        /// What it asks.
        request: Request,
    },
    /// The time of [`super::Engine::deadline`] has come. Calling too early is harmless.
    Timer,
    /// Somebody on this node wants something.
    Command(Command),
}

/// How a request over the stream ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Answer to a ping.
    Pong,
    /// Answer to a pull.
    Pulled(PullAnswer),
    /// A push has arrived.
    Pushed,
    /// The host refused the connection: it is up, and nobody listens.
    Refused,
    /// No answer in time, no route, or a broken connection: says nothing about the node's process.
    Silent,
}

/// What the node itself wants.
#[derive(Debug, Clone)]
pub enum Command {
    /// Other capabilities or labels; whatever is `None` stays.
    Update {
        /// All capabilities.
        capabilities: Option<BTreeMap<String, String>>,
        /// All labels.
        labels: Option<BTreeMap<String, String>>,
    },
    /// A new load. `seq` is set by the core.
    Load(Load),
    /// Say good-bye to all; ends with [`super::Effect::LeaveDone`].
    Leave,
    /// More addresses to join through.
    Join(Vec<SocketAddr>),
    /// A member keeps failing at what this node asks of it.
    Suspect(NodeKey),
    /// What records are believed by has changed: whoever is not believed any more is no member.
    Recheck,
}
