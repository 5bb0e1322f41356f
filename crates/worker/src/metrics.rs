//! What a worker counts.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::agent::TurnStatus;
use crate::core::{Counts, Status};
use crate::store::Written;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: &'static str,
}

/// The worker's metrics.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    before: Before,
    turns: Family<StatusLabel, Counter>,
    queued: Gauge,
    busy: Gauge,
    agent_restarts: Gauge,
    outbox_records: Counter,
    outbox_bytes: Counter,
    outbox_dropped: Counter,
    inbox_skipped: Counter,
    inbox_repeated: Counter,
    stray_events: Counter,
    store_errors: Counter,
}

/// Where the counters stood when the present node was taken: its totals begin at nothing.
#[derive(Debug, Clone, Default)]
struct Before {
    turns: [u64; 3],
    outbox_records: u64,
    outbox_bytes: u64,
    outbox_dropped: u64,
    inbox_skipped: u64,
    inbox_repeated: u64,
    stray_events: u64,
}

const STATUSES: [TurnStatus; 3] = [TurnStatus::Completed, TurnStatus::Failed, TurnStatus::Interrupted];

impl Metrics {
    /// The same metrics for the next node that this process serves.
    pub(crate) fn for_node(&self) -> Self {
        let mut metrics = self.clone();
        metrics.before = Before {
            turns: STATUSES.map(|status| self.turns.get_or_create(&StatusLabel { status: status.as_str() }).get()),
            outbox_records: self.outbox_records.get(),
            outbox_bytes: self.outbox_bytes.get(),
            outbox_dropped: self.outbox_dropped.get(),
            inbox_skipped: self.inbox_skipped.get(),
            inbox_repeated: self.inbox_repeated.get(),
            stray_events: self.stray_events.get(),
        };
        metrics
    }

    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = registry.sub_registry_with_prefix("worker");
        worker.register("turns", "Turns that ended, by how", metrics.turns.clone());
        worker.register("queued", "Prompts waiting for their turn", metrics.queued.clone());
        worker.register("busy", "1 while a turn runs", metrics.busy.clone());
        worker.register("agent_restarts", "Restarts of the agent program", metrics.agent_restarts.clone());
        worker.register("outbox_records", "Records for the outbox", metrics.outbox_records.clone());
        worker.register("outbox_bytes", "Bytes written to the outbox", metrics.outbox_bytes.clone());
        worker.register("outbox_dropped", "Records given up on a full disk", metrics.outbox_dropped.clone());
        worker.register("inbox_skipped", "Inbox records not understood", metrics.inbox_skipped.clone());
        worker.register("inbox_repeated", "Inbox records taken before", metrics.inbox_repeated.clone());
        worker.register("stray_events", "Agent events outside of a turn", metrics.stray_events.clone());
        worker.register("store_errors", "Failed writes to outbox or journal", metrics.store_errors.clone());
        drop(registry);
        metrics
    }

    pub(crate) fn store_failed(&self) {
        self.store_errors.inc();
    }

    /// Brings the metrics up to the given totals.
    pub(crate) fn update(&self, counts: Counts, status: &Status, written: Written) {
        let before = &self.before;
        for ((status, total), before) in STATUSES.into_iter().zip(counts.turns).zip(before.turns) {
            raise(&self.turns.get_or_create(&StatusLabel { status: status.as_str() }), before + total);
        }
        self.queued.set(i64::try_from(status.queued).unwrap_or(i64::MAX));
        self.busy.set(i64::from(status.running.is_some()));
        self.agent_restarts.set(i64::from(status.agent_restarts));
        raise(&self.outbox_records, before.outbox_records + written.records);
        raise(&self.outbox_bytes, before.outbox_bytes + written.bytes);
        raise(&self.outbox_dropped, before.outbox_dropped + written.dropped);
        raise(&self.inbox_skipped, before.inbox_skipped + counts.unusable);
        raise(&self.inbox_repeated, before.inbox_repeated + counts.repeated);
        raise(&self.stray_events, before.stray_events + counts.stray);
    }
}

/// Counters only go up; the totals are kept by those who count.
fn raise(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
