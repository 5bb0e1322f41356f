//! Connections between nodes: TLS 1.3, a certificate on both sides, names checked.
//!
//! Each daemon has one port. A connection whose first byte begins a TLS handshake comes from a node and must show a
//! certificate of this instance; it reaches only what [`crate::Server::grpc_nodes`] serves. Any other connection must come
//! from an allowed user of this host, and reaches everything else.

mod config;
mod connect;
mod gate;
mod refusal;

pub(crate) use config::{client_config, server_config};
pub use connect::{connect_node, connect_node_stream};
pub(crate) use gate::{Admitted, Gate, Nodes};
pub use refusal::why;

use std::sync::Arc;

/// The node at the other end of a connection, from its certificate. In the extensions of every request to a service that is
/// for nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePeer {
    /// Who it is.
    pub node_id: Arc<str>,
    /// Where it connected from.
    pub addr: std::net::SocketAddr,
}

#[cfg(test)]
mod tests;
