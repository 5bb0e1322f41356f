//! The worker's own door: what it is doing, and the word to end. Prompts never come this way.

use drover_proto::common::NodeRef;
use drover_proto::status_of;
use drover_proto::worker::worker_service_server::{WorkerService, WorkerServiceServer};
use drover_proto::worker::{DrainRequest, DrainResponse, GetStatusRequest, GetStatusResponse};
use drover_types::{ErrorCode, Failure, OutboxId};
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response};

use crate::core::Status;
use crate::shell::Drain;

/// Whom the door leads to.
#[derive(Clone)]
pub(crate) struct Seat {
    pub(crate) id: OutboxId,
    pub(crate) agent: String,
    pub(crate) status: watch::Receiver<Status>,
    pub(crate) drains: mpsc::Sender<Drain>,
}

/// Answers from what the worker's loop last published, so that a slow disk never makes a caller wait.
pub(crate) struct Door {
    /// Nobody while the worker of a static host has no node.
    pub(crate) seat: watch::Receiver<Option<Seat>>,
}

impl Door {
    pub(crate) fn service(self) -> WorkerServiceServer<Self> {
        WorkerServiceServer::new(self)
    }
}

#[tonic::async_trait]
impl WorkerService for Door {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, tonic::Status> {
        let Some(Seat { id, agent, status, .. }) = self.seat.borrow().clone() else {
            return Ok(Response::new(GetStatusResponse {
                state: "waiting".to_owned(),
                ..GetStatusResponse::default()
            }));
        };
        let status = status.borrow().clone();
        Ok(Response::new(GetStatusResponse {
            node: Some(NodeRef { swarm_id: id.swarm.to_string(), node_id: id.node.0 }),
            generation: id.generation.0,
            agent,
            state: status.state.to_owned(),
            running_injection: status.running.map(|id| id.to_string()).unwrap_or_default(),
            queued: u32::try_from(status.queued).unwrap_or(u32::MAX),
            agent_restarts: status.agent_restarts,
            agent_pid: status.agent_pid.unwrap_or(0),
        }))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, tonic::Status> {
        let DrainRequest { reason } = request.into_inner();
        let reason = if reason.trim().is_empty() { "drain was asked for".to_owned() } else { reason };
        let over = || status_of(&Failure::new(ErrorCode::ShuttingDown, "the worker is ending already"));
        let seat = self.seat.borrow().clone();
        let Some(Seat { drains, .. }) = seat else {
            let failure = Failure::new(ErrorCode::InvalidRequest, "the worker of this host has no node to drain");
            return Err(status_of(&failure.hint("send the process SIGTERM to end it")));
        };
        drains.send(Drain { reason, force: false }).await.map_err(|_| over())?;
        Ok(Response::new(DrainResponse {}))
    }
}
