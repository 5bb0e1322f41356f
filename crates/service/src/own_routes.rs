//! What every daemon answers over plain HTTP on its port, beside gRPC.

use std::sync::PoisonError;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use axum::routing::get;
use serde_json::{Value, json};

use crate::address_book::{self, Entry};
use crate::context::Context;
use crate::state_dir::StateDir;

/// `/healthz`, `/metrics` and `/targets`.
pub(crate) fn own_routes(ctx: &Context) -> axum::Router {
    let stopping = ctx.shutdown().clone();
    let healthz = move || {
        let (status, text) = if stopping.is_cancelled() {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
        } else {
            (StatusCode::OK, "ok\n")
        };
        async move { (status, text) }
    };
    let registry = ctx.registry();
    let metrics = move || {
        let mut text = String::new();
        let encoded = prometheus_client::encoding::text::encode(
            &mut text,
            &registry.lock().unwrap_or_else(PoisonError::into_inner),
        );
        async move {
            match encoded {
                Ok(()) => {
                    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                        .into_response()
                }
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }
        }
    };
    let state = ctx.state().clone();
    let targets = move || {
        let state = state.clone();
        async move {
            let listed = tokio::task::spawn_blocking(move || targets(&state)).await.unwrap_or_default();
            ([(header::CONTENT_TYPE, "application/json")], listed.to_string())
        }
    };
    axum::Router::new().route("/healthz", get(healthz)).route("/metrics", get(metrics)).route("/targets", get(targets))
}

/// Every daemon of this instance that runs on this host, as Prometheus' HTTP service discovery wants them: ports are whatever
/// was free, so nobody could write them into its configuration.
fn targets(state: &StateDir) -> Value {
    let host = crate::process::hostname();
    let living = address_book::list(state).into_iter().filter(|entry| entry.host == host && entry.is_alive());
    // A stand-in is the way to a daemon elsewhere, and carries nothing but gRPC.
    living.filter(|entry| !entry.name.contains('@') && !entry.listen.is_empty()).map(|entry| target(&entry)).collect()
}

fn target(entry: &Entry) -> Value {
    let daemon = ["worker", "gossip-membership", "handoff-coordinator"]
        .into_iter()
        .find(|kind| entry.name.strip_prefix(kind).is_some_and(|rest| rest.is_empty() || rest.starts_with('-')))
        .unwrap_or(&entry.name);
    json!({
        "targets": [entry.listen],
        "labels": {"daemon": daemon, "name": entry.name, "host": entry.host, "uid": entry.uid.to_string()},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{self, ProcessId};

    #[test]
    fn what_runs_is_listed_by_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let me = ProcessId::current();
        let add = |name: &str, start_time| {
            let entry = Entry {
                name: name.into(),
                pid: me.pid,
                start_time,
                host: process::hostname(),
                version: "0".into(),
                listen: "127.0.0.1:1".into(),
                control: None,
                uid: 7,
            };
            address_book::write(&state, &entry).unwrap();
        };
        for name in ["router", "worker-0199-2", "gossip-membership", "outbox-follower@hpc"] {
            add(name, me.start_time);
        }
        add("slurm-allocator", me.start_time + 1); // Of another process: this one is gone.
        let listed = targets(&state);
        let labels: Vec<(&str, &str)> = listed
            .as_array()
            .unwrap()
            .iter()
            .map(|target| (target["labels"]["daemon"].as_str().unwrap(), target["labels"]["name"].as_str().unwrap()))
            .collect();
        assert_eq!(
            labels,
            [("gossip-membership", "gossip-membership"), ("router", "router"), ("worker", "worker-0199-2")]
        );
        assert_eq!(listed[0]["targets"], json!(["127.0.0.1:1"]));
        assert_eq!(listed[0]["labels"]["uid"], "7");
    }
}
