//! The gRPC face.

use std::io;
use std::sync::Arc;

use drover_mailbox::Mailbox;
use drover_proto::mailbox::mailbox_service_server::MailboxService;
use drover_proto::mailbox::{
    CarryRequest, CarryResponse, DeliverRequest, DeliverResponse, FollowRequest, FollowResponse, RemoveSwarmRequest,
    RemoveSwarmResponse,
};
use drover_proto::status_of;
use drover_types::{ErrorCode, Failure, SwarmId};
use futures::Stream;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use crate::carry;
use crate::follow;
use crate::lane::Command;
use crate::refs;
use crate::run::{Follower, Shared};

/// How often a swarm's directory is tried to be removed while others still put files into it.
const REMOVALS: u32 = 5;

#[tonic::async_trait]
impl MailboxService for Follower {
    type FollowStream = BoxStream<'static, Result<FollowResponse, Status>>;
    type CarryStream = BoxStream<'static, Result<CarryResponse, Status>>;

    async fn deliver(&self, request: Request<DeliverRequest>) -> Result<Response<DeliverResponse>, Status> {
        let _used = self.shared().usage.begin();
        let results = self.shared().inboxes.deliver(request.into_inner().deliveries).await;
        Ok(Response::new(DeliverResponse { results }))
    }

    async fn follow(&self, request: Request<Streaming<FollowRequest>>) -> Result<Response<Self::FollowStream>, Status> {
        Ok(Response::new(self.follow_requests(request.into_inner())))
    }

    async fn carry(&self, request: Request<CarryRequest>) -> Result<Response<Self::CarryStream>, Status> {
        let lines = carry::start(self.shared(), request.into_inner()).map_err(|failure| status_of(&failure))?;
        Ok(Response::new(Box::pin(lines)))
    }

    async fn remove_swarm(
        &self,
        request: Request<RemoveSwarmRequest>,
    ) -> Result<Response<RemoveSwarmResponse>, Status> {
        let _used = self.shared().usage.begin();
        let swarm = refs::swarm(&request.get_ref().swarm_id).map_err(|failure| status_of(&failure))?;
        match self.remove(&swarm).await {
            Ok(removed) => {
                info!(swarm_id = %swarm, removed, "mailbox of a swarm removed");
                Ok(Response::new(RemoveSwarmResponse { removed }))
            }
            Err(error) => {
                let dir = Mailbox::new(&self.shared().settings.mailbox).swarm_dir(&swarm);
                let message = format!("cannot remove {}: {error}", dir.display());
                Err(status_of(&Failure::new(ErrorCode::StoreUnavailable, message).hint("remove it by hand")))
            }
        }
    }
}

impl Follower {
    /// Follows without a connection: what the gRPC method does with its request stream.
    pub fn follow_requests<R>(&self, requests: R) -> BoxStream<'static, Result<FollowResponse, Status>>
    where
        R: Stream<Item = Result<FollowRequest, Status>> + Send + Unpin + 'static,
    {
        Box::pin(follow::start(self.shared(), requests))
    }

    async fn remove(&self, swarm: &SwarmId) -> io::Result<bool> {
        let shared: &Arc<Shared> = self.shared();
        shared.inboxes.close(swarm).await;
        for bell in shared.bells() {
            bell.command(vec![Command::Forget(swarm.clone())], None);
        }
        let mailbox = Mailbox::new(&shared.settings.mailbox);
        let swarm = swarm.clone();
        let removal = tokio::task::spawn_blocking(move || {
            let mut tries = 1;
            loop {
                match mailbox.remove_swarm(&swarm) {
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < REMOVALS => tries += 1,
                    other => return other,
                }
            }
        });
        removal.await.map_err(io::Error::other)?
    }
}
