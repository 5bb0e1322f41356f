//! What the follower counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// One label with its value.
type Label = [(&'static str, &'static str); 1];

/// Handles of all metrics. Clones share the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Looks at outboxes, by what they were for.
    pub looks: Family<Label, Counter>,
    /// Questions for the beacon of a swarm.
    pub beacons: Counter,
    /// Lines handed to followers.
    pub lines: Counter,
    /// Bytes of those lines.
    pub bytes: Counter,
    /// Times that something was wrong with an outbox file.
    pub damage: Counter,
    /// Outboxes that could not be read, each time.
    pub read_errors: Counter,
    /// Bytes that are in outboxes and not yet handed out.
    pub unread_bytes: Gauge,
    /// Outboxes that are followed.
    pub outboxes: Gauge,
    /// Follow streams that are open.
    pub streams: Gauge,
    /// Files that are held open, inboxes and outboxes.
    pub open_files: Gauge,
    /// From the system's word that an outbox changed until its lines were handed out.
    pub told_seconds: Histogram,
    /// Records appended to inboxes, by what became of them: synced, refused or unsure.
    pub deliveries: Family<Label, Counter>,
    /// Bytes of the synced ones.
    pub delivered_bytes: Counter,
    /// How long appending and syncing one Deliver call took.
    pub deliver_seconds: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.000_1, 2.0, 18));
        let metrics = Self {
            looks: Family::default(),
            beacons: Counter::default(),
            lines: Counter::default(),
            bytes: Counter::default(),
            damage: Counter::default(),
            read_errors: Counter::default(),
            unread_bytes: Gauge::default(),
            outboxes: Gauge::default(),
            streams: Gauge::default(),
            open_files: Gauge::default(),
            told_seconds: seconds(),
            deliveries: Family::default(),
            delivered_bytes: Counter::default(),
            deliver_seconds: seconds(),
        };
        let registry = registry.sub_registry_with_prefix("follower");
        registry.register("looks", "Looks at outboxes, by what they were for", metrics.looks.clone());
        registry.register("beacons", "Questions for the beacon of a swarm", metrics.beacons.clone());
        registry.register("lines", "Outbox lines handed to followers", metrics.lines.clone());
        registry.register("bytes", "Bytes of outbox lines handed to followers", metrics.bytes.clone());
        registry.register("damage", "Times that something was wrong with an outbox file", metrics.damage.clone());
        registry.register("read_errors", "Outboxes that could not be read", metrics.read_errors.clone());
        registry.register("unread_bytes", "Bytes in outboxes not yet handed out", metrics.unread_bytes.clone());
        registry.register("outboxes", "Outboxes that are followed", metrics.outboxes.clone());
        registry.register("streams", "Follow streams that are open", metrics.streams.clone());
        registry.register("open_files", "Inbox and outbox files held open", metrics.open_files.clone());
        registry.register("told_seconds", "From a change of an outbox to its lines sent", metrics.told_seconds.clone());
        registry.register("deliveries", "Records for inboxes, by what became of them", metrics.deliveries.clone());
        registry.register("delivered_bytes", "Bytes of records synced to inboxes", metrics.delivered_bytes.clone());
        registry.register("deliver_seconds", "Duration of Deliver calls", metrics.deliver_seconds.clone());
        metrics
    }

    /// Looks so far for one purpose: `added`, `told`, `more`, `hot`, `cold`, `waiting` or `beacon`.
    pub fn looks_for(&self, why: &'static str) -> u64 {
        self.looks.get_or_create(&[("why", why)]).get()
    }
}
