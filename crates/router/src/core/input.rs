//! What happens to the core.

use std::sync::Arc;

use bytes::Bytes;
use drover_proto::allocator::{AllocationState, WorkerState};
use drover_proto::common::LaunchSpec;
use drover_types::{Failure, InjectionId, InjectionState, NodeIndex, OutboxId, SwarmId};

use super::effects::{Micros, Token, Word};
use super::members::MembersWord;
use super::model::{Request, Side};
use super::ring::{NoteWord, Ring, RingSaid};

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Input {
    Launch(Token, Box<LaunchOrder>),
    Inject(Token, Box<InjectOrder>),
    Terminate(Token, TerminateOrder),
    Interrupt(Token, InterruptOrder),
    Resolve(Token, ResolveOrder),
    /// A Follow stream is open and carries nothing yet.
    FollowerUp(Side),
    FollowerDown(Side, String),
    Records(RecordChunk),
    Delivered(DeliveryReport),
    AllocatorSnapshot {
        begun_at: Micros,
        allocations: Vec<Allocation>,
    },
    AllocationChanged(Allocation),
    AllocatorProgress {
        swarm: SwarmId,
        stage: String,
        message: String,
    },
    AllocatorDown(String),
    Ensured(SwarmId, Result<Allocation, Failure>),
    Released(SwarmId, Result<bool, Failure>),
    MailboxRemoved(SwarmId),
    /// The ring of gossip keys, at the start and after each change of it.
    Ring(Ring),
    Tick,
}

/// Asks for a launch.
#[derive(Debug)]
pub(crate) struct LaunchOrder {
    pub(crate) request_id: String,
    pub(crate) spec: LaunchSpec,
    pub(crate) trace: String,
    /// The entry of the catalogue that it means, where that could be found out.
    pub(crate) place: Option<LaunchPlace>,
    /// What the store knows of this request id.
    pub(crate) prior: Option<Prior>,
}

/// Where a launch goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LaunchPlace {
    /// Name of the backend.
    pub(crate) backend: String,
    /// Id in the catalogue.
    pub(crate) provider: String,
}

/// Asks for prompts.
#[derive(Debug, Clone)]
pub(crate) struct InjectOrder {
    pub(crate) request_id: String,
    pub(crate) swarm: String,
    pub(crate) nodes: Vec<u32>,
    pub(crate) content: String,
    pub(crate) injection_id: Option<InjectionId>,
    pub(crate) steer: bool,
    pub(crate) trace: String,
    /// What the store knows of this request id.
    pub(crate) prior: Option<Prior>,
    /// What the store knows of this injection id.
    pub(crate) prior_injection: Option<Prior>,
}

/// Asks for an end.
#[derive(Debug)]
pub(crate) struct TerminateOrder {
    pub(crate) request_id: String,
    pub(crate) swarm: String,
    pub(crate) force: bool,
}

/// Asks for turns to be interrupted.
#[derive(Debug)]
pub(crate) struct InterruptOrder {
    pub(crate) swarm: String,
    pub(crate) nodes: Vec<u32>,
    pub(crate) injection: Option<InjectionId>,
}

/// Answers an approval.
#[derive(Debug, Default)]
pub(crate) struct ResolveOrder {
    pub(crate) request_id: String,
    pub(crate) approval_id: String,
    pub(crate) job_id: String,
    pub(crate) call_id: String,
    pub(crate) node: Option<u32>,
    pub(crate) approved: bool,
    pub(crate) decision: String,
}

/// A request that was taken before, as the store has it.
#[derive(Debug, Clone)]
pub(crate) struct Prior {
    pub(crate) request: Arc<Request>,
    pub(crate) injections: Vec<PriorInjection>,
}

/// An injection as the store has it.
#[derive(Debug, Clone)]
pub(crate) struct PriorInjection {
    pub(crate) id: InjectionId,
    pub(crate) node: NodeIndex,
    pub(crate) state: InjectionState,
    pub(crate) error: String,
    pub(crate) ack_seq: u64,
    pub(crate) delivered_seq: u64,
    pub(crate) end_seq: u64,
}

/// Whole lines of one outbox, decoded.
#[derive(Debug)]
pub(crate) struct RecordChunk {
    pub(crate) outbox: OutboxId,
    pub(crate) segment: u32,
    pub(crate) start_offset: u64,
    pub(crate) next_segment: u32,
    pub(crate) next_offset: u64,
    pub(crate) records: Vec<OutRecord>,
    /// What was wrong with the file.
    pub(crate) damage: String,
}

/// One record of an outbox.
#[derive(Debug, Clone)]
pub(crate) struct OutRecord {
    pub(crate) seq: u64,
    /// When it was written, by the worker's clock; 0 when it does not say.
    pub(crate) ts: Micros,
    pub(crate) injection: Option<InjectionId>,
    pub(crate) name: Word,
    pub(crate) data: Bytes,
    pub(crate) body: RecordBody,
}

/// What the router acts on; parsed off the store's thread.
#[derive(Debug, Clone)]
pub(crate) enum RecordBody {
    Hello {
        host: String,
        pid: u32,
    },
    Bye,
    Error {
        failure: Failure,
        fatal: bool,
    },
    TurnStarted,
    TurnComplete {
        status: String,
        error: String,
    },
    Assistant,
    Usage(Option<u64>),
    ApprovalRequired {
        approval_id: String,
        call_id: String,
    },
    ApprovalResolved {
        approval_id: String,
        call_id: String,
    },
    /// A leader says who is there.
    Members(Box<MembersWord>),
    /// A node says which keys of the ring it has.
    RingSaid(RingSaid),
    /// A worker says what is wrong with its membership daemon.
    Notes(Vec<NoteWord>),
    /// Passed on as it is.
    Other,
}

/// What became of a delivery order.
#[derive(Debug)]
pub(crate) struct DeliveryReport {
    pub(crate) swarm: SwarmId,
    pub(crate) node: NodeIndex,
    pub(crate) results: Vec<(u64, Outcome)>,
}

/// What became of one inbox record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// On disk.
    Written,
    /// Certainly not in the file.
    Refused(String),
    /// Nobody knows.
    Uncertain(String),
}

/// An allocation as the allocator sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Allocation {
    pub(crate) swarm: SwarmId,
    pub(crate) job: String,
    pub(crate) state: AllocationState,
    pub(crate) backend_state: String,
    pub(crate) reason: String,
    pub(crate) backend: String,
    pub(crate) provider: String,
    /// Name of the follower that reaches the files of its workers; empty is the one beside the router.
    pub(crate) follower: String,
    pub(crate) nodes: Vec<AllocatedNode>,
}

impl Allocation {
    /// It has ended.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, AllocationState::Completed | AllocationState::Failed)
    }
}

/// A node as the allocator sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AllocatedNode {
    pub(crate) index: NodeIndex,
    pub(crate) host: String,
    pub(crate) generation: u32,
    pub(crate) state: WorkerState,
    pub(crate) reason: String,
    pub(crate) pid: u32,
    pub(crate) restarts: u32,
}
