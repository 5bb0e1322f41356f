//! What the router counts.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Handles of the router's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) events: Counter,
    pub(crate) commits: Counter,
    pub(crate) commit_seconds: Histogram,
    pub(crate) store_errors: Counter,
    pub(crate) subscribers: Gauge,
    pub(crate) slow_subscribers: Counter,
    pub(crate) deliveries: Counter,
    pub(crate) bad_records: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            events: Counter::default(),
            commits: Counter::default(),
            commit_seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 14)),
            store_errors: Counter::default(),
            subscribers: Gauge::default(),
            slow_subscribers: Counter::default(),
            deliveries: Counter::default(),
            bad_records: Counter::default(),
        }
    }
}

impl Metrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("router");
        registry.register("events", "Events written to the log", self.events.clone());
        registry.register("commits", "Transactions that wrote events", self.commits.clone());
        registry.register("commit_seconds", "Time to write one transaction", self.commit_seconds.clone());
        registry.register("store_errors", "Transactions that failed", self.store_errors.clone());
        registry.register("subscribers", "Open WatchEvents calls", self.subscribers.clone());
        registry.register("slow_subscribers", "Subscribers cut off for being slow", self.slow_subscribers.clone());
        registry.register("deliveries", "Inbox records that reached the disk", self.deliveries.clone());
        registry.register("bad_records", "Outbox lines that are no records", self.bad_records.clone());
    }

    pub(crate) fn committed(&self, events: usize, took: Duration) {
        self.events.inc_by(events as u64);
        self.commits.inc();
        self.commit_seconds.observe(took.as_secs_f64());
    }
}
