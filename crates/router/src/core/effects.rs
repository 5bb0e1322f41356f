//! What the core asks for: events for the log, and what to do once they are on disk.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_types::{Failure, InjectionId, NodeIndex, OutboxId, SwarmId};
use uuid::Uuid;

use super::model::{Cursor, Request, Side, SwarmKey};

/// Microseconds of Unix time.
pub(crate) type Micros = u64;

/// Names one caller who waits for an answer.
pub(crate) type Token = u64;

/// A word that is mostly one of ours, so that naming an event costs no allocation.
#[derive(Clone)]
pub(crate) enum Word {
    /// One of ours.
    Known(&'static str),
    /// One that came from outside.
    Other(Arc<str>),
}

impl Deref for Word {
    type Target = str;
    fn deref(&self) -> &str {
        match self {
            Self::Known(text) => text,
            Self::Other(text) => text,
        }
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// One event of the log.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Its global number.
    pub(crate) seq: u64,
    /// When the router took it, in microseconds of Unix time. Never goes back while numbers go on.
    pub(crate) at: Micros,
    /// When it happened: by the worker's clock for what a worker says, as far as that clock can be believed.
    pub(crate) happened: Micros,
    /// Its name.
    pub(crate) name: Word,
    /// The swarm it belongs to.
    pub(crate) swarm: Option<SwarmId>,
    /// The allocation, empty when there is none.
    pub(crate) job: Arc<str>,
    /// The node it belongs to.
    pub(crate) node: Option<u32>,
    /// The injection it belongs to.
    pub(crate) injection: Option<InjectionId>,
    /// Its own fields, one JSON object.
    pub(crate) data: Bytes,
}

impl Event {
    /// What it weighs against the limits on memory.
    pub(crate) fn weight(&self) -> u64 {
        self.data.len() as u64 + 128
    }

    /// The message that says it.
    pub(crate) fn message(&self) -> pb::Event {
        pb::Event {
            seq: self.seq,
            timestamp_us: self.happened,
            stored_us: self.at,
            event: self.name.to_string(),
            swarm_id: self.swarm.as_ref().map_or_else(String::new, ToString::to_string),
            job_id: self.job.to_string(),
            node_id: self.node,
            injection_id: self.injection.as_ref().map_or_else(String::new, ToString::to_string),
            data: self.data.clone(),
        }
    }
}

/// What callers wait for together.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Topic {
    /// A launch.
    Launch(SwarmKey),
    /// A termination.
    Terminate(SwarmKey),
    /// The prompts of one request.
    Inject(Arc<str>),
}

/// One answer of a streaming call.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Launch(pb::LaunchSwarmResponse),
    Inject(pb::InjectResponse),
    Terminate(pb::TerminateSwarmResponse),
    Fail(Failure),
}

impl Step {
    /// Nothing follows it, whatever else is waited for.
    pub(crate) fn is_last(&self) -> bool {
        match self {
            Self::Launch(step) => matches!(step.step, Some(pb::launch_swarm_response::Step::Launched(_))),
            Self::Terminate(step) => matches!(step.step, Some(pb::terminate_swarm_response::Step::Terminated(_))),
            Self::Inject(_) => false,
            Self::Fail(_) => true,
        }
    }

    /// The way of one prompt to its node has ended, well or not.
    pub(crate) fn ends_delivery(&self) -> bool {
        matches!(self, Self::Inject(step) if step.state != pb::InjectionState::Accepted as i32)
    }
}

/// The one answer of a call that does not stream.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Interrupted(pb::InterruptResponse),
    Resolved(Box<pb::ResolveApprovalResponse>),
}

/// One record for an inbox, not yet encoded.
#[derive(Debug, Clone)]
pub(crate) struct InboxRecord {
    pub(crate) seq: u64,
    pub(crate) injection: Option<InjectionId>,
    pub(crate) body: InboxBody,
}

/// What an inbox record says.
#[derive(Debug, Clone)]
pub(crate) enum InboxBody {
    /// A prompt.
    Inject(Arc<Request>),
    /// Anything else: its type and its data as JSON.
    Control { kind: &'static str, data: Arc<str> },
}

impl InboxBody {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Inject(request) => request.content.len(),
            Self::Control { data, .. } => data.len(),
        }
    }
}

/// Records for one inbox, in order.
#[derive(Debug, Clone)]
pub(crate) struct DeliveryOrder {
    pub(crate) side: Side,
    pub(crate) swarm: SwarmId,
    pub(crate) node: NodeIndex,
    pub(crate) generation: u32,
    pub(crate) job: Arc<str>,
    pub(crate) records: Vec<InboxRecord>,
}

/// What to do once the events of the same batch are on disk, in this order.
#[derive(Debug)]
pub(crate) enum Out {
    /// Answers a call that ends with it.
    Answer(Token, Result<Answer, Failure>),
    /// Refuses a streaming call.
    Refuse(Token, Failure),
    /// Lets a streaming call wait for steps of a topic, after telling it those that were.
    Attach {
        token: Token,
        topic: Topic,
        backlog: Vec<Step>,
        expect: usize,
    },
    /// Tells everybody who waits.
    Step(Topic, Box<Step>),
    Deliver(DeliveryOrder),
    Follow(Side, OutboxId, Cursor),
    Unfollow(Side, OutboxId),
    Hot(Side, SwarmId, NodeIndex, bool),
    /// With the trace of the launch.
    Ensure(SwarmId, Arc<LaunchSpec>, String),
    Release(SwarmId, bool),
    RemoveMailbox(Side, SwarmId),
    /// Begins to talk to the follower of a side, or no longer does.
    Reach(Side, bool),
}

/// Collects what one batch of inputs leads to.
pub(crate) struct Effects {
    /// The time of the input that is being handled.
    pub(crate) now: Micros,
    /// Events, in order of their numbers.
    pub(crate) events: Vec<Event>,
    /// What to do afterwards.
    pub(crate) out: Vec<Out>,
    /// Where new ids come from.
    new_id: Box<dyn FnMut() -> Uuid + Send>,
}

impl Effects {
    /// Effects with ids from the given source.
    pub(crate) fn new(new_id: Box<dyn FnMut() -> Uuid + Send>) -> Self {
        Self { now: 0, events: Vec::new(), out: Vec::new(), new_id }
    }

    pub(crate) fn id(&mut self) -> Uuid {
        (self.new_id)()
    }

    pub(crate) fn step(&mut self, topic: Topic, step: Step) {
        self.out.push(Out::Step(topic, Box::new(step)));
    }

    /// Forgets everything collected, for a batch that did not reach the disk.
    pub(crate) fn clear(&mut self) {
        self.events.clear();
        self.out.clear();
    }
}
