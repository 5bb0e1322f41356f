//! The door for other nodes: what they say goes to the core.

use drover_proto::status_of;
use drover_proto::transfer::transfer_service_server::{TransferService, TransferServiceServer};
use drover_proto::transfer::{TellRequest, TellResponse};
use drover_service::{MAX_MESSAGE_BYTES, NodePeer};
use drover_types::{ErrorCode, Failure};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::Shell;
use super::links::NODE_HEADER;
use super::wire::{self, Said, WireError};
use crate::core::{Input, NodeId};

/// The service.
#[derive(Clone)]
pub(crate) struct NodeDoor {
    shell: Shell,
}

impl NodeDoor {
    pub(crate) fn service(shell: &Shell) -> TransferServiceServer<Self> {
        TransferServiceServer::new(Self { shell: shell.clone() }).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// The node that asks: by its certificate, or by its word where there are no certificates.
pub(crate) fn caller<T>(request: &Request<T>, certified: bool) -> Result<NodeId, Status> {
    if let Some(peer) = request.extensions().get::<NodePeer>() {
        return Ok(NodeId::new(&peer.node_id));
    }
    let word = request.metadata().get(NODE_HEADER).and_then(|value| value.to_str().ok());
    match word.filter(|_| !certified) {
        Some(node) => Ok(NodeId::new(node)),
        None => Err(status_of(&Failure::new(ErrorCode::NotAllowed, "this is for nodes with a certificate"))),
    }
}

#[tonic::async_trait]
impl TransferService for NodeDoor {
    async fn tell(&self, request: Request<Streaming<TellRequest>>) -> Result<Response<TellResponse>, Status> {
        let from = caller(&request, self.shell.identity.is_some())?;
        let mut messages = request.into_inner();
        let stopping = self.shell.ctx.shutdown();
        loop {
            let message = tokio::select! {
                message = messages.message() => message?,
                () = stopping.cancelled() => None,
            };
            let Some(message) = message else { return Ok(Response::new(TellResponse {})) };
            match wire::decode(message) {
                Ok(Said::Message(message)) => {
                    self.shell.jobs.input(Input::Message { from: from.clone(), message }).await;
                }
                Ok(Said::Recover(session)) => {
                    debug!(session_id = %session, node = %from, "asked to look after a session");
                    self.shell.jobs.input(Input::Recover { session }).await;
                }
                Ok(Said::Relief(rooms)) => self.shell.jobs.input(Input::Relief(rooms)).await,
                Ok(Said::Ordered) => self.shell.drains.ordered(),
                // It counts as lost, and is sent again.
                Err(WireError::Damaged) => {
                    self.shell.metrics.damaged.inc();
                }
                Err(WireError::Field(why)) => {
                    return Err(status_of(&Failure::new(ErrorCode::InvalidRequest, why)));
                }
            }
        }
    }
}
