//! Members as the outside reads them.

use drover_proto::membership::{Member, MemberState};

use crate::core::{Load, Record, State, Time};
use crate::events::NodeInfo;

/// What is known of a member beside its record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) state: State,
    pub(super) since: Time,
    pub(super) load: Option<Load>,
    pub(super) local: bool,
}

pub(super) fn member(record: &Record, seen: Seen, now: Time) -> Member {
    let state = match seen.state {
        State::Alive => MemberState::Alive,
        State::Suspect => MemberState::Suspect,
        State::Dead => MemberState::Dead,
        State::Left => MemberState::Left,
    };
    let swarm_id = record.labels.get("swarm_id").cloned().unwrap_or_default();
    Member {
        node_id: record.node_id.clone(),
        node_index: record.labels.get("node_index").and_then(|index| index.parse().ok()),
        swarm_id,
        addr: record.addr.ip().to_string(),
        port: u32::from(record.addr.port()),
        rpc_port: u32::from(record.rpc_port),
        state: state.into(),
        load_score: seen.load.map(Load::ratio),
        overloaded: seen.load.is_some_and(|load| load.overloaded),
        incarnation: record.incarnation,
        boot: record.boot,
        capabilities: record.capabilities.clone().into_iter().collect(),
        labels: record.labels.clone().into_iter().collect(),
        region: record.region.clone(),
        version: record.protocol.to_string(),
        timestamp_us: record.timestamp_us,
        state_for_ms: now.since(seen.since).as_millis() as u64,
        local: seen.local,
    }
}

pub(super) fn info(record: &Record, load: Load) -> NodeInfo {
    NodeInfo {
        id: record.node_id.clone(),
        addr: record.addr.ip().to_string(),
        port: record.addr.port(),
        agent_caps: record.capabilities.clone(),
        load_score: load.ratio(),
        labels: record.labels.clone(),
        timestamp: record.timestamp_us.cast_signed(),
        version: record.protocol.to_string(),
    }
}
