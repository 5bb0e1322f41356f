//! Lines that are made of the router's answers and go only to the asker.

use std::collections::BTreeMap;

use bytes::Bytes;
use drover_proto::allocator::{LaunchField, Provider};
use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure};
use serde_json::value::RawValue;

use crate::envelope::{begin_line, line};
use crate::json::{Object, push_array, push_json, push_text};
use crate::line::RequestId;

/// What a failure is called on this protocol. The web backend compares the first of these literally.
pub(crate) fn reason_of(failure: &Failure) -> String {
    match failure.code {
        ErrorCode::UnknownSwarm => "unknown swarm_id".to_owned(),
        ErrorCode::SwarmOver => "swarm is terminating or terminated".to_owned(),
        ErrorCode::UnknownApproval => "unknown approval request".to_owned(),
        _ if failure.hint.is_empty() => failure.message.clone(),
        _ => format!("{}; {}", failure.message, failure.hint),
    }
}

pub(crate) fn rejected(request_id: &RequestId, reason: &str) -> Bytes {
    line("command_rejected", |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("reason", reason);
    })
}

pub(crate) fn inject_failed(request_id: &RequestId, swarm_id: &str, node_id: i64, error: &str) -> Bytes {
    line("inject_failed", |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("swarm_id", swarm_id);
        data.null("injection_id");
        data.number("node_id", node_id);
        data.text("error", error);
    })
}

/// A step of an injection that was taken before this request was made, told again. `None` for a step without an event.
pub(crate) fn inject_step(request_id: &RequestId, swarm_id: &str, step: &pb::InjectResponse) -> Option<Bytes> {
    let event = match step.state() {
        pb::InjectionState::Accepted => "inject_ack",
        pb::InjectionState::Delivered | pb::InjectionState::Started | pb::InjectionState::Completed => {
            "inject_delivered"
        }
        pb::InjectionState::Failed => "inject_failed",
        pb::InjectionState::Unspecified => return None,
    };
    Some(line(event, |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("swarm_id", swarm_id);
        data.text_or_null("injection_id", &step.injection_id);
        data.number("node_id", step.node_id.into());
        if event == "inject_failed" {
            data.text("error", &step.error);
        }
    }))
}

pub(crate) fn launched(request_id: &RequestId, swarm: &pb::Swarm) -> Bytes {
    line("swarm_launched", |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("swarm_id", &swarm.swarm_id);
        data.text("job_id", &swarm.job_id);
        data.number("node_count", swarm.node_count.into());
        push_place(data, swarm);
    })
}

pub(crate) fn terminated(request_id: &RequestId, swarm: &pb::Swarm) -> Bytes {
    line("swarm_terminated", |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("swarm_id", &swarm.swarm_id);
        data.text("job_id", &swarm.job_id);
    })
}

/// Only scalar values: the CLI prints each with its key.
pub(crate) fn swarm_status(request_id: &RequestId, swarm: &pb::Swarm, backend_error: &str) -> Bytes {
    line("swarm_status", |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("swarm_id", &swarm.swarm_id);
        data.text("job_id", &swarm.job_id);
        data.number("node_count", swarm.node_count.into());
        push_state(data, swarm);
        push_place(data, swarm);
        if !backend_error.is_empty() {
            data.text("error", backend_error);
        }
    })
}

/// The first and last parts of a `swarm_list` line; the swarms go between, shared by all who asked at the time.
pub(crate) fn swarm_list_frame(request_id: &RequestId) -> (Bytes, Bytes) {
    let mut head = Vec::with_capacity(192);
    begin_line(&mut head, "swarm_list", drover_service::now_us(), None);
    head.extend_from_slice(b"{\"request_id\":");
    push_json(&mut head, &request_id.to_json());
    head.extend_from_slice(b",\"swarms\":");
    (head.into(), Bytes::from_static(b"}}\n"))
}

/// The swarms as one object keyed by id.
pub(crate) fn swarm_list_body(swarms: &[pb::Swarm]) -> Bytes {
    let mut out = Vec::with_capacity(64 + swarms.len() * 512);
    let mut all = Object::begin(&mut out);
    for swarm in swarms {
        all.with(&swarm.swarm_id, |out| {
            let mut data = Object::begin(out);
            data.text("job_id", &swarm.job_id);
            data.number("node_count", swarm.node_count.into());
            data.text("system_prompt", &swarm.system_prompt);
            push_state(&mut data, swarm);
            push_place(&mut data, swarm);
            data.with("provider_params", |out| {
                let mut params = Object::begin(out);
                for (key, value) in [("partition", &swarm.partition), ("time_limit", &swarm.time)] {
                    if !value.is_empty() {
                        params.text(key, value);
                    }
                }
                params.end();
            });
            data.end();
        });
    }
    all.end();
    out.into()
}

/// `status` in the words that the clients of this protocol know; `state` is the exact one.
fn push_state(data: &mut Object<'_>, swarm: &pb::Swarm) {
    let status = match swarm.status.as_str() {
        "degraded" => "running",
        "failed" => "terminated",
        other => other,
    };
    data.text("status", status);
    data.text("state", &swarm.status);
    data.text("slurm_state", if swarm.slurm_state.is_empty() { "UNKNOWN" } else { &swarm.slurm_state });
    if !swarm.reason.is_empty() {
        data.text("reason", &swarm.reason);
    }
}

fn push_place(data: &mut Object<'_>, swarm: &pb::Swarm) {
    data.text_or_null("partition", &swarm.partition);
    data.text_or_null("time", &swarm.time);
    data.text("provider", &swarm.provider);
    data.text("provider_id", &swarm.provider_id);
    data.text_or_null("agent_runtime", &swarm.agent);
    data.null("agent_model");
    data.null("pricing_model");
}

pub(crate) fn providers_list(request_id: &RequestId, providers: &[Provider]) -> Bytes {
    line("providers_list", |data| {
        data.raw("request_id", &request_id.to_json());
        data.with("providers", |out| push_array(out, providers, push_provider));
    })
}

fn push_provider(out: &mut Vec<u8>, provider: &Provider) {
    let mut data = Object::begin(out);
    data.text("id", &provider.id);
    data.text("label", &provider.label);
    data.text("backend", &provider.backend);
    data.text("provider_ref", &provider.provider_ref);
    data.text_or_null("cluster_profile", &provider.cluster_profile);
    data.with("defaults", |out| {
        let mut defaults = Object::begin(out);
        // The map has no order of its own; the answer should not change from one poll to the next.
        for (key, value) in provider.defaults.iter().collect::<BTreeMap<_, _>>() {
            defaults.text(key, value);
        }
        defaults.end();
    });
    data.with("launch_fields", |out| push_array(out, &provider.launch_fields, push_launch_field));
    data.raw("launch_panels", "[]");
    data.null("launch_soft_timeout_seconds");
    data.null("launch_hard_timeout_seconds");
    data.flag("disabled", provider.disabled);
    data.text_or_null("disabled_reason", &provider.disabled_reason);
    data.end();
}

fn push_launch_field(out: &mut Vec<u8>, field: &LaunchField) {
    let mut data = Object::begin(out);
    data.text("key", &field.key);
    data.text("label", &field.label);
    data.text("type", &field.r#type);
    let typed = match field.r#type.as_str() {
        "number" => field.default.parse::<f64>().is_ok_and(f64::is_finite),
        "boolean" => matches!(field.default.as_str(), "true" | "false"),
        _ => false,
    };
    // "1." and "01" are numbers to Rust and nonsense to JSON.
    match serde_json::from_str::<&RawValue>(&field.default) {
        Ok(json) if typed => data.raw("default", json.get()),
        _ => data.text_or_null("default", &field.default),
    }
    data.flag("required", field.required);
    if !field.options.is_empty() {
        data.with("options", |out| push_array(out, &field.options, |out, option| push_text(out, option)));
    }
    data.end();
}

pub(crate) fn approvals_list(request_id: &RequestId, list: &pb::ListApprovalsResponse) -> Bytes {
    let mut by_node = BTreeMap::<&str, BTreeMap<u32, Vec<&pb::Approval>>>::new();
    for approval in list.approvals.iter().filter(|approval| approval.status != "resolved") {
        by_node.entry(&approval.swarm_id).or_default().entry(approval.node_id).or_default().push(approval);
    }
    line("approvals_list", |data| {
        data.raw("request_id", &request_id.to_json());
        data.number("approvals_version", i64::try_from(list.approvals_version).unwrap_or(i64::MAX));
        data.with("approvals", |out| {
            let mut swarms = Object::begin(out);
            for (swarm_id, nodes) in &by_node {
                swarms.with(swarm_id, |out| {
                    let mut data = Object::begin(out);
                    for (node_id, approvals) in nodes {
                        data.with(&node_id.to_string(), |out| {
                            push_array(out, approvals, |out, approval| push_approval(out, approval));
                        });
                    }
                    data.end();
                });
            }
            swarms.end();
        });
    })
}

/// Fields of the request that an approval is about, in the order of the protocol's description.
const ASKED: [&str; 6] =
    ["turn_id", "command", "reason", "cwd", "proposed_execpolicy_amendment", "available_decisions"];

fn push_approval(out: &mut Vec<u8>, approval: &pb::Approval) {
    let asked: BTreeMap<String, &RawValue> = serde_json::from_slice(&approval.data).unwrap_or_default();
    let mut data = Object::begin(out);
    data.text("job_id", &approval.job_id);
    data.text("approval_id", &approval.approval_id);
    data.text("approval_status", &approval.status);
    data.text("call_id", &approval.call_id);
    data.text_or_null("injection_id", &approval.injection_id);
    for key in ASKED {
        data.raw(key, asked.get(key).map_or("null", |value| value.get()));
    }
    data.number("created_at_ms", i64::try_from(approval.created_ms).unwrap_or(i64::MAX));
    data.number("updated_at_ms", i64::try_from(approval.updated_ms).unwrap_or(i64::MAX));
    data.end();
}

/// `exec_approval_submitted`, or `exec_approval_resolved` when the approval had been answered before.
pub(crate) fn approval_answer(request_id: &RequestId, answer: &pb::ResolveApprovalResponse, asked: bool) -> Bytes {
    let approval = answer.approval.clone().unwrap_or_default();
    let (event, approved) = if answer.already_resolved {
        ("exec_approval_resolved", stands(&approval).unwrap_or(asked))
    } else {
        ("exec_approval_submitted", asked)
    };
    line(event, |data| {
        data.raw("request_id", &request_id.to_json());
        data.text("approval_id", &approval.approval_id);
        data.text("swarm_id", &approval.swarm_id);
        data.text("job_id", &approval.job_id);
        data.text("call_id", &approval.call_id);
        data.number("node_id", approval.node_id.into());
        data.text_or_null("injection_id", &approval.injection_id);
        data.flag("approved", approved);
        let decision = serde_json::from_str::<&RawValue>(&approval.decision);
        data.raw("decision", decision.map_or("null", RawValue::get));
        if answer.already_resolved {
            data.flag("idempotent", true);
        }
    })
}

/// Whether an approval that has been answered was granted; `None` when its decision is of a kind that does not say.
fn stands(approval: &pb::Approval) -> Option<bool> {
    match approval.status.as_str() {
        "approved_pending_ack" => return Some(true),
        "denied_pending_ack" => return Some(false),
        _ => {}
    }
    match serde_json::from_str::<String>(&approval.decision).ok()?.as_str() {
        "accept" | "acceptForSession" | "approved" | "approved_for_session" => Some(true),
        "decline" | "cancel" | "denied" | "abort" => Some(false),
        _ => None,
    }
}

pub(crate) fn queue_list(request_id: &RequestId) -> Bytes {
    line("queue_list", |data| {
        data.raw("request_id", &request_id.to_json());
        data.raw("items", "[]");
    })
}

pub(crate) fn queue_updated() -> Bytes {
    line("queue_updated", |data| data.raw("items", "[]"))
}

pub(crate) fn project_list(request_id: &RequestId) -> Bytes {
    line("project_list", |data| {
        data.raw("request_id", &request_id.to_json());
        data.raw("projects", "{}");
    })
}

pub(crate) fn projects_updated() -> Bytes {
    line("projects_updated", |data| data.raw("projects", "{}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn data(line: &Bytes) -> Value {
        assert!(line.is_ascii());
        let mut line: Value = serde_json::from_slice(line).unwrap();
        line["data"].take()
    }

    #[test]
    fn a_swarm_list_is_an_object_keyed_by_id() {
        let swarm = pb::Swarm {
            swarm_id: "s\"1".to_owned(),
            node_count: 3,
            status: "degraded".to_owned(),
            system_prompt: "über\n".to_owned(),
            time: "00:10:00".to_owned(),
            ..pb::Swarm::default()
        };
        let (head, tail) = swarm_list_frame(&RequestId::from("r"));
        let whole = [head, swarm_list_body(&[swarm]), tail].concat();
        let swarms = data(&whole.into());
        let one = &swarms["swarms"]["s\"1"];
        assert_eq!(
            (&one["job_id"], &one["node_count"], &one["system_prompt"]),
            (&json!(""), &json!(3), &json!("über\n"))
        );
        assert_eq!((&one["status"], &one["state"]), (&json!("running"), &json!("degraded")));
        assert_eq!(one["provider_params"], json!({"time_limit":"00:10:00"}));
        assert_eq!(swarm_list_body(&[]), "{}");
    }

    #[test]
    fn a_status_always_has_a_node_count_and_only_scalars() {
        let swarm = pb::Swarm { node_count: 4, nodes: vec![pb::Node::default()], ..pb::Swarm::default() };
        let status = data(&swarm_status(&RequestId::from("r"), &swarm, "ssh is down"));
        assert_eq!((&status["node_count"], &status["error"]), (&json!(4), &json!("ssh is down")));
        assert_eq!(status["slurm_state"], "UNKNOWN");
        assert!(status.as_object().unwrap().values().all(|value| !value.is_object() && !value.is_array()));
    }

    #[test]
    fn form_defaults_have_the_type_of_the_field() {
        let field = |kind: &str, default: &str| {
            let mut out = Vec::new();
            let field = LaunchField { r#type: kind.to_owned(), default: default.to_owned(), ..LaunchField::default() };
            push_launch_field(&mut out, &field);
            serde_json::from_slice::<Value>(&out).unwrap()["default"].clone()
        };
        assert_eq!(field("number", "4"), json!(4));
        assert_eq!(field("number", "inf"), json!("inf"));
        assert_eq!(field("number", "01"), json!("01"));
        assert_eq!(field("boolean", "true"), json!(true));
        assert_eq!(field("text", "4"), json!("4"));
        assert_eq!(field("select", ""), Value::Null);
    }

    #[test]
    fn approvals_are_grouped_by_swarm_and_node() {
        let approval = |swarm: &str, node_id, call: &str, status: &str| pb::Approval {
            swarm_id: swarm.to_owned(),
            node_id,
            call_id: call.to_owned(),
            status: status.to_owned(),
            data: br#"{"command":["rm","x"],"available_decisions":["accept"],"raw":{}}"#.to_vec().into(),
            ..pb::Approval::default()
        };
        let list = pb::ListApprovalsResponse {
            approvals_version: 7,
            approvals: vec![
                approval("a", 0, "c1", "pending"),
                approval("b", 2, "c2", "resolved"),
                approval("a", 1, "c3", "pending"),
                approval("a", 0, "c4", "approved_pending_ack"),
            ],
        };
        let data = data(&approvals_list(&RequestId::from("r"), &list));
        assert_eq!(data["approvals_version"], 7);
        let calls = |node: &str| -> Vec<&str> {
            data["approvals"]["a"][node].as_array().unwrap().iter().map(|a| a["call_id"].as_str().unwrap()).collect()
        };
        assert_eq!((calls("0"), calls("1")), (vec!["c1", "c4"], vec!["c3"]));
        assert!(data["approvals"].get("b").is_none());
        assert_eq!(data["approvals"]["a"]["0"][0]["command"], json!(["rm", "x"]));
        assert_eq!(data["approvals"]["a"]["0"][0]["turn_id"], Value::Null);
    }

    #[test]
    fn the_spelling_that_the_web_backend_compares() {
        assert_eq!(
            reason_of(&Failure::new(ErrorCode::UnknownSwarm, "no swarm x").hint("drover list")),
            "unknown swarm_id"
        );
        assert_eq!(
            reason_of(&Failure::new(ErrorCode::CodexMissing, "no codex").hint("use echo")),
            "no codex; use echo"
        );
    }
}
