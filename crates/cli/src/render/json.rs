//! The JSON that scripts read. Fields are added freely and never renamed.

use std::collections::BTreeMap;

use drover_proto::router as pb;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// One event as a line; the field order is part of what people grep for.
#[derive(Debug, Serialize)]
pub(crate) struct EventLine<'a> {
    seq: u64,
    timestamp: String,
    event: &'a str,
    swarm_id: Option<&'a str>,
    job_id: Option<&'a str>,
    node_id: Option<u32>,
    injection_id: Option<&'a str>,
    data: &'a RawValue,
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// The event as one JSON line, without the line end.
pub(crate) fn event_line(event: &pb::Event) -> String {
    let data = serde_json::from_slice::<&RawValue>(&event.data).ok();
    let line = EventLine {
        seq: event.seq,
        timestamp: timestamp(event.timestamp_us),
        event: &event.event,
        swarm_id: given(&event.swarm_id),
        job_id: given(&event.job_id),
        node_id: event.node_id,
        injection_id: given(&event.injection_id),
        data: data.unwrap_or(RawValue::NULL),
    };
    serde_json::to_string(&line).unwrap_or_default()
}

/// The event's own fields; an empty object when they cannot be read.
pub(crate) fn data_of(event: &pb::Event) -> Value {
    serde_json::from_slice(&event.data).unwrap_or_else(|_| json!({}))
}

/// ISO 8601 in UTC with microseconds, as on the JSON-line control plane.
pub(crate) fn timestamp(micros: u64) -> String {
    i64::try_from(micros)
        .ok()
        .and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok())
        .map_or_else(String::new, |at| at.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string())
}

/// A swarm as `launch`, `status` and `list` print it.
pub(crate) fn swarm(swarm: &pb::Swarm) -> Value {
    json!({
        "swarm_id": swarm.swarm_id,
        "job_id": swarm.job_id,
        "node_count": swarm.node_count,
        "system_prompt": swarm.system_prompt,
        "status": swarm.status,
        "reason": swarm.reason,
        "slurm_state": swarm.slurm_state,
        "partition": swarm.partition,
        "time": swarm.time,
        "provider": swarm.provider,
        "provider_id": swarm.provider_id,
        "agent": swarm.agent,
        "created_ms": swarm.created_ms,
        "ended_ms": (swarm.ended_ms != 0).then_some(swarm.ended_ms),
        "nodes": swarm.nodes.iter().map(node).collect::<Vec<_>>(),
    })
}

fn node(node: &pb::Node) -> Value {
    json!({
        "node_id": node.node_id,
        "host": node.host,
        "state": node.state,
        "reason": node.reason,
        "generation": node.generation,
        "outstanding": node.outstanding,
        "pid": node.pid,
        "running_injection": given(&node.running_injection),
        "membership": membership(node),
    })
}

/// A node's place in the gossip; null while it is no member and nothing is wrong with that.
fn membership(node: &pb::Node) -> Value {
    if node.membership.is_empty() && node.membership_notes.is_empty() {
        return Value::Null;
    }
    json!({
        "state": given(&node.membership),
        "load_score": node.load_score,
        "overloaded": node.overloaded,
        "overload_reason": given(&node.overload_reason),
        "notes": node.membership_notes.iter().map(note).collect::<Vec<_>>(),
    })
}

fn note(note: &pb::MembershipNote) -> Value {
    json!({
        "code": note.code,
        "message": note.message,
        "hint": note.hint,
        "count": note.count,
        "last": timestamp(note.last_us),
        "current": note.current,
    })
}

/// A member as `members` prints it.
pub(crate) fn member(member: &pb::Member) -> Value {
    let sorted = |pairs: &std::collections::HashMap<String, String>| -> BTreeMap<String, String> {
        pairs.clone().into_iter().collect()
    };
    json!({
        "node_id": member.node_id,
        "swarm_id": given(&member.swarm_id),
        "node_index": member.node_index,
        "addr": member.addr,
        "port": member.port,
        "state": member.state,
        "load_score": member.load_score,
        "incarnation": member.incarnation,
        "capabilities": sorted(&member.capabilities),
        "labels": sorted(&member.labels),
        "version": member.version,
        "timestamp": member.timestamp_us,
        "boot": member.boot,
        "region": member.region,
        "host": given(&member.host),
        "overloaded": member.overloaded,
        "overload_reason": given(&member.overload_reason),
        "cause": given(&member.cause),
        "since": timestamp(member.since_us),
    })
}

/// An approval as `approvals` and `approve` print it.
pub(crate) fn approval(approval: &pb::Approval) -> Value {
    let parsed = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or(Value::Null);
    json!({
        "approval_id": approval.approval_id,
        "swarm_id": approval.swarm_id,
        "job_id": approval.job_id,
        "node_id": approval.node_id,
        "injection_id": approval.injection_id,
        "call_id": approval.call_id,
        "status": approval.status,
        "created_ms": approval.created_ms,
        "updated_ms": approval.updated_ms,
        "decision": parsed(approval.decision.as_bytes()),
        "data": parsed(&approval.data),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_line_has_the_agreed_fields_in_order() {
        let event = pb::Event {
            seq: 7,
            timestamp_us: 1_772_063_938_123_456,
            stored_us: 0,
            event: "assistant".into(),
            swarm_id: "s".into(),
            job_id: String::new(),
            node_id: Some(0),
            injection_id: "i".into(),
            data: bytes::Bytes::from_static(br#"{"content":"hi","n":1.50}"#),
        };
        assert_eq!(
            event_line(&event),
            r#"{"seq":7,"timestamp":"2026-02-25T23:58:58.123456+00:00","event":"assistant","swarm_id":"s","job_id":null,"node_id":0,"injection_id":"i","data":{"content":"hi","n":1.50}}"#
        );
    }

    #[test]
    fn launch_and_status_have_the_agreed_fields() {
        let value = swarm(&pb::Swarm { nodes: vec![pb::Node::default()], ..Default::default() });
        for field in
            ["swarm_id", "job_id", "node_count", "system_prompt", "status", "slurm_state", "partition", "time", "nodes"]
        {
            assert!(value.get(field).is_some(), "{field}");
        }
        for field in ["node_id", "host", "state"] {
            assert!(value["nodes"][0].get(field).is_some(), "{field}");
        }
    }
}
