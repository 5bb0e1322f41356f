//! What every place to run workers on has in common.

use async_trait::async_trait;
use drover_types::{Failure, SwarmId};

use crate::allocation::Allocation;
use crate::spec::Spec;

/// One launch.
#[derive(Debug, Clone)]
pub struct Request {
    /// The swarm it is for.
    pub swarm: SwarmId,
    /// What is to be started.
    pub spec: Spec,
    /// Id of the catalogue entry it is launched on.
    pub provider: String,
}

/// A place to run workers on. It puts each change of an allocation on the [`Board`](crate::Board) by itself.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Starts an allocation. Never called twice at once for one swarm, nor for one that the board has already.
    async fn launch(&self, request: Request) -> Result<Allocation, Failure>;

    /// Begins the end of an allocation. Safe to repeat; one that is over already is left as it is.
    async fn release(&self, swarm: &SwarmId, force: bool) -> Result<(), Failure>;
}
