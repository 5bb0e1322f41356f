//! Exchanges that come over TLS.

use std::sync::Arc;

use drover_proto::pool as pb;
use drover_proto::pool::pool_service_server::{PoolService, PoolServiceServer};
use drover_proto::status_of;
use drover_service::{MAX_MESSAGE_BYTES, NodePeer};
use drover_types::{ErrorCode, Failure};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use super::desk::{Desk, Refused};
use super::{Ask, Frame};

/// The service.
pub(super) struct Door {
    desk: Desk,
}

impl Door {
    pub(super) fn service(desk: &Desk) -> PoolServiceServer<Self> {
        PoolServiceServer::new(Self { desk: desk.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Who asks, by its certificate.
pub(crate) fn node_of<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    request
        .extensions()
        .get::<NodePeer>()
        .map(|peer| Arc::clone(&peer.node_id))
        .ok_or_else(|| status_of(&Failure::new(ErrorCode::NotAllowed, "only nodes with a certificate come this way")))
}

#[tonic::async_trait]
impl PoolService for Door {
    type AskStream = BoxStream<'static, Result<pb::AskResponse, Status>>;

    async fn ask(&self, request: Request<pb::AskRequest>) -> Result<Response<Self::AskStream>, Status> {
        let node = node_of(&request)?;
        let message = request.into_inner();
        let have = message.have;
        let ask = Ask::of_message(message, &node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let frames = match self.desk.open(ask, have) {
            Ok(reader) => futures::stream::unfold(reader, |mut reader| async move {
                let frame = reader.next().await?;
                Some((Ok(frame.to_message()), reader))
            })
            .boxed(),
            Err(Refused::Busy) => return Err(Status::resource_exhausted(Refused::Busy.to_string())),
            // As an end, so that the node does not try it again.
            Err(refused) => {
                let end = Frame::End { error: refused.to_string() };
                futures::stream::iter([Ok(end.to_message())]).boxed()
            }
        };
        Ok(Response::new(frames))
    }

    async fn release(&self, request: Request<pb::ReleaseRequest>) -> Result<Response<pb::ReleaseResponse>, Status> {
        let node = node_of(&request)?;
        self.desk.release(&node, &request.into_inner().exchange_ids);
        Ok(Response::new(pb::ReleaseResponse {}))
    }
}
