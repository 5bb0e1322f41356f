//! What is counted.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::core::{Appended, Event, Input};
use crate::shell::{failure_code, why_name};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Reasons by which handoffs set out, and by which they come to nothing.
const WHY: [&str; 3] = ["operator", "load", "drain"];
const FAILED: [&str; 6] = ["no_target", "nobody_took", "silent", "refused", "busy", "lost"];

/// The metrics of this daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) held: Gauge,
    pub(crate) accepted: Counter,
    pub(crate) answered: Counter,
    pub(crate) forwarded: Counter,
    pub(crate) dropped: Counter,
    pub(crate) damaged: Counter,
    pub(crate) suspected: Counter,
    fenced: Counter,
    unknown: Counter,
    started: Family<Reason, Counter>,
    completed: Counter,
    failed: Family<Reason, Counter>,
    bytes: Counter,
    frozen: Histogram,
    total: Histogram,
}

impl Metrics {
    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let metrics = Self {
            held: Gauge::default(),
            accepted: Counter::default(),
            answered: Counter::default(),
            forwarded: Counter::default(),
            dropped: Counter::default(),
            damaged: Counter::default(),
            suspected: Counter::default(),
            fenced: Counter::default(),
            unknown: Counter::default(),
            started: Family::default(),
            completed: Counter::default(),
            failed: Family::default(),
            bytes: Counter::default(),
            frozen: seconds(),
            total: seconds(),
        };
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let sessions = registry.sub_registry_with_prefix("sessions");
        sessions.register("held", "Sessions served here, with those on their way in", metrics.held.clone());
        sessions.register("turns_accepted", "Turns that were kept here", metrics.accepted.clone());
        sessions.register("turns_answered", "Answers that were given out here", metrics.answered.clone());
        sessions.register("turns_forwarded", "Turns that were passed on to another node", metrics.forwarded.clone());
        sessions.register(
            "fenced",
            "Records that came too late: another owner's epoch had begun",
            metrics.fenced.clone(),
        );
        let unknown = "Appends whose outcome a file system did not tell at once";
        sessions.register("store_unknown", unknown, metrics.unknown.clone());
        let handoff = registry.sub_registry_with_prefix("handoff");
        handoff.register("started", "Handoffs that set out from here, by reason", metrics.started.clone());
        handoff.register("completed", "Handoffs from here that arrived", metrics.completed.clone());
        handoff.register("failed", "Handoffs from here that did not arrive, by reason", metrics.failed.clone());
        handoff.register("bytes", "Bytes of sessions that went over", metrics.bytes.clone());
        handoff.register("messages_dropped", "Messages to other nodes that could not be sent", metrics.dropped.clone());
        handoff.register("chunks_damaged", "Pieces of sessions that came damaged", metrics.damaged.clone());
        handoff.register("suspects", "Nodes that were reported because they kept failing", metrics.suspected.clone());
        let frozen = "How long a session that left took no turns";
        handoff.register("frozen_seconds", frozen, metrics.frozen.clone());
        handoff.register("total_seconds", "How long handoffs took", metrics.total.clone());
        drop(registry);
        // Whoever asks for an increase misses the first of a series that was not there.
        for reason in WHY {
            drop(metrics.started.get_or_create(&Reason { reason }));
        }
        for reason in FAILED {
            drop(metrics.failed.get_or_create(&Reason { reason }));
        }
        metrics
    }

    /// An append has ended.
    pub(crate) fn appended(&self, input: &Input) {
        match input {
            Input::Appended { outcome: Appended::Fenced(_), .. } => _ = self.fenced.inc(),
            Input::Appended { outcome: Appended::Unknown, .. } => _ = self.unknown.inc(),
            _ => {}
        }
    }

    /// Something has happened.
    pub(crate) fn event(&self, event: &Event) {
        match event {
            Event::Started { why, .. } => {
                self.started.get_or_create(&Reason { reason: why_name(*why) }).inc();
            }
            Event::Completed { bytes, frozen, total, .. } => {
                self.completed.inc();
                self.bytes.inc_by(*bytes);
                self.frozen.observe(frozen.as_secs_f64());
                self.total.observe(total.as_secs_f64());
            }
            Event::Failed { error, .. } => {
                self.failed.get_or_create(&Reason { reason: failure_code(error) }).inc();
            }
            Event::NotMoved { .. } | Event::Serving { .. } => {}
        }
    }
}
