//! Names that come in over gRPC, parsed once: they become parts of paths.

use drover_mailbox::Cursor;
use drover_proto::common;
use drover_types::{ErrorCode, Failure, Generation, NodeIndex, OutboxId, SwarmId};

/// One node of one swarm.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeKey {
    pub(crate) swarm: SwarmId,
    pub(crate) node: NodeIndex,
}

impl NodeKey {
    pub(crate) fn of(id: &OutboxId) -> Self {
        Self { swarm: id.swarm.clone(), node: id.node }
    }

    /// Spreads nodes evenly over so many places; a node always has the same.
    pub(crate) fn place(&self, places: usize) -> usize {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        (hasher.finish() % places.max(1) as u64) as usize
    }
}

pub(crate) fn swarm(id: &str) -> Result<SwarmId, Failure> {
    id.parse().map_err(|error| Failure::new(ErrorCode::InvalidRequest, format!("swarm {id:?}: {error}")))
}

pub(crate) fn node(node: Option<&common::NodeRef>) -> Result<NodeKey, Failure> {
    let node = node.ok_or_else(|| Failure::new(ErrorCode::InvalidRequest, "no node was named"))?;
    Ok(NodeKey { swarm: swarm(&node.swarm_id)?, node: NodeIndex(node.node_id) })
}

pub(crate) fn outbox(outbox: Option<&common::OutboxRef>) -> Result<OutboxId, Failure> {
    let outbox = outbox.ok_or_else(|| Failure::new(ErrorCode::InvalidRequest, "no outbox was named"))?;
    Ok(OutboxId {
        swarm: swarm(&outbox.swarm_id)?,
        node: NodeIndex(outbox.node_id),
        generation: Generation(outbox.generation),
    })
}

/// An absent cursor is the beginning.
pub(crate) fn cursor(cursor: Option<&common::Cursor>) -> Cursor {
    cursor.map_or_else(Cursor::default, |cursor| Cursor {
        segment: cursor.segment.max(1),
        offset: cursor.offset,
        seq: cursor.seq,
    })
}

pub(crate) fn outbox_ref(id: &OutboxId) -> common::OutboxRef {
    common::OutboxRef { swarm_id: id.swarm.to_string(), node_id: id.node.0, generation: id.generation.0 }
}
