//! The streams of nodes that take work.

use drover_proto::tasks as pb;
use drover_proto::tasks::task_service_server::{TaskService, TaskServiceServer};
use drover_proto::tasks::work_request::Said;
use drover_service::{Context, MAX_MESSAGE_BYTES};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{Nodes, hand};
use crate::pool::node_of;

/// The service.
pub(super) struct Door {
    nodes: Nodes,
    ctx: Context,
}

impl Door {
    pub(super) fn service(nodes: &Nodes, ctx: &Context) -> TaskServiceServer<Self> {
        TaskServiceServer::new(Self { nodes: nodes.clone(), ctx: ctx.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl TaskService for Door {
    type WorkStream = BoxStream<'static, Result<pb::WorkResponse, Status>>;

    async fn work(&self, request: Request<Streaming<pb::WorkRequest>>) -> Result<Response<Self::WorkStream>, Status> {
        let node = node_of(&request)?;
        let mut said = request.into_inner();
        let Some(pb::WorkRequest { said: Some(Said::Offer(offer)) }) = said.message().await? else {
            return Err(Status::invalid_argument("a node offers itself first"));
        };
        let (stream, told) = self.nodes.join(&node, &offer.kinds, offer.at_once);
        info!(node = %node, at_once = offer.at_once, "a node takes tasks");
        let (nodes, stopping) = (self.nodes.clone(), self.ctx.shutdown().clone());
        self.ctx.spawn("task node", async move {
            loop {
                let heard = tokio::select! {
                    heard = said.message() => heard,
                    () = stopping.cancelled() => break,
                };
                match heard {
                    Ok(Some(pb::WorkRequest { said: Some(Said::Result(result)) })) => {
                        nodes.result(stream, result.attempt, hand::outcome(result));
                    }
                    Ok(Some(_)) => warn!(node = %node, "a node says what is not understood; it is of another version"),
                    Ok(None) => break,
                    Err(status) => {
                        info!(node = %node, why = status.message(), "the stream of a node broke");
                        break;
                    }
                }
            }
            nodes.leave(stream);
            info!(node = %node, "a node takes no more tasks");
        });
        Ok(Response::new(ReceiverStream::new(told).map(Ok).boxed()))
    }
}
