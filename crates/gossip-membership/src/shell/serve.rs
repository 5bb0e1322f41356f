//! The gRPC face for other nodes.

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_proto::gossip as pb;
use drover_proto::gossip::gossip_service_server::{GossipService, GossipServiceServer};
use drover_proto::status_of;
use drover_service::{NodePeer, now_us};
use drover_types::{ErrorCode, Failure};
use futures::stream::BoxStream;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use super::handle::Handle;
use super::streams::{MAX_ENTRIES, MAX_MESSAGE, PART, WHO};
use crate::core::{BUCKETS, NodeKey, PullRequest, Reply, Request as Asked};
use crate::wire;

/// Exchanges that other nodes may have under way here at a time; whoever finds no place tries again by itself.
const AT_ONCE: usize = 64;

/// The service.
#[derive(Clone)]
pub(crate) struct NodeDoor {
    handle: Handle,
    /// Callers are known by their certificate; without it they are believed, which only plaintext gossip does.
    certified: bool,
    places: Arc<Semaphore>,
}

impl NodeDoor {
    pub(crate) fn service(handle: &Handle, certified: bool) -> GossipServiceServer<Self> {
        let door = Self { handle: handle.clone(), certified, places: Arc::new(Semaphore::new(AT_ONCE)) };
        GossipServiceServer::new(door).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
    }

    /// Who asks.
    fn caller<T>(&self, request: &Request<T>) -> Result<NodeKey, Status> {
        if let Some(peer) = request.extensions().get::<NodePeer>() {
            return Ok(NodeKey::of(&peer.node_id));
        }
        if self.certified {
            let failure = Failure::new(ErrorCode::NotAllowed, "only nodes with a certificate of this instance may ask");
            return Err(status_of(&failure));
        }
        let named = request.metadata().get(WHO).and_then(|value| value.to_str().ok());
        let key = named.and_then(|text| u64::from_str_radix(text, 16).ok());
        key.map(NodeKey).ok_or_else(|| Status::invalid_argument("the caller does not say which node it is"))
    }

    async fn ask(&self, from: NodeKey, request: Asked) -> Result<Reply, Status> {
        self.handle.asked(from, request).await.map_err(|failure| status_of(&failure))
    }
}

fn malformed(error: wire::Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}

fn unexpected() -> Status {
    Status::internal("the answer does not fit the question")
}

#[tonic::async_trait]
impl GossipService for NodeDoor {
    type PullStream = BoxStream<'static, Result<pb::PullResponse, Status>>;

    async fn pull(&self, request: Request<pb::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let from = self.caller(&request)?;
        let _place = self.places.try_acquire().map_err(|_| Status::resource_exhausted("too many exchanges at once"))?;
        let pb::PullRequest { record, buckets, now_us: theirs } = request.into_inner();
        let record = Arc::new(wire::record_from(record).map_err(malformed)?);
        if record.key != from {
            return Err(status_of(&Failure::new(
                ErrorCode::NotAllowed,
                "the record is of another node than the caller",
            )));
        }
        let buckets: [u64; BUCKETS] =
            buckets.try_into().map_err(|_| Status::invalid_argument("not as many buckets as there are"))?;
        let node_id = record.record.node_id.clone();
        let asked = Asked::Pull(PullRequest { record, buckets: Box::new(buckets) });
        let Reply::Pulled(answer) = self.ask(from, asked).await? else { return Err(unexpected()) };
        self.handle.compare_clocks(&node_id, theirs.cast_signed().saturating_sub(now_us().cast_signed()));
        let first = pb::PullResponse {
            record: Some(wire::record_to(&answer.record).map_err(malformed)?),
            entries: Vec::new(),
            now_us: now_us(),
            differing: answer.differing,
        };
        let parts = wire::entries_to(&answer.entries, PART).into_iter().map(|entries| pb::PullResponse {
            record: None,
            entries,
            now_us: 0,
            differing: 0,
        });
        let all: Vec<_> = std::iter::once(first).chain(parts).map(Ok).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(all))))
    }

    async fn push(&self, request: Request<Streaming<pb::PushRequest>>) -> Result<Response<pb::PushResponse>, Status> {
        let from = self.caller(&request)?;
        let _place = self.places.try_acquire().map_err(|_| Status::resource_exhausted("too many exchanges at once"))?;
        let mut parts = request.into_inner();
        // The newest word about each member counts; a caller that repeats itself takes no memory with it.
        let mut entries = BTreeMap::new();
        while let Some(part) = parts.message().await? {
            for entry in wire::entries_from(part.entries).map_err(malformed)? {
                entries.insert(entry.record.key, entry);
            }
            if entries.len() > MAX_ENTRIES {
                return Err(Status::resource_exhausted("more members than any cluster has"));
            }
        }
        match self.ask(from, Asked::Push(entries.into_values().collect())).await? {
            Reply::Pushed => Ok(Response::new(pb::PushResponse {})),
            _ => Err(unexpected()),
        }
    }

    async fn ping(&self, request: Request<pb::PingRequest>) -> Result<Response<pb::PingResponse>, Status> {
        let from = self.caller(&request)?;
        let target = NodeKey(request.get_ref().target);
        let own = self.handle.with(|node| node.key()).await.map_err(|failure| status_of(&failure))?;
        if own != target {
            // Another node has taken over the port of one that is gone.
            return Err(Status::not_found("another node listens here"));
        }
        match self.ask(from, Asked::Ping).await? {
            Reply::Pong => Ok(Response::new(pb::PingResponse {})),
            _ => Err(unexpected()),
        }
    }

    async fn ring(&self, request: Request<pb::RingRequest>) -> Result<Response<pb::RingResponse>, Status> {
        self.caller(&request)?;
        let ring = self.handle.with(|node| node.ring()).await.map_err(|failure| status_of(&failure))?;
        let ring = ring.ok_or_else(|| Status::failed_precondition("this node has no key ring"))?;
        Ok(Response::new(pb::RingResponse { ring: ring.to_json().into_bytes().into() }))
    }

    async fn lease(&self, request: Request<pb::LeaseRequest>) -> Result<Response<pb::LeaseResponse>, Status> {
        let from = self.caller(&request)?;
        let election = self.handle.shared.election.get();
        let election = election.ok_or_else(|| Status::unavailable("this node takes no part in the election"))?;
        let message = election.asked(from, &request.get_ref().message).await?;
        Ok(Response::new(pb::LeaseResponse { message: message.into() }))
    }
}
