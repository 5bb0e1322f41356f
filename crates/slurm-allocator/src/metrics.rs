//! What the allocator counts.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// Handles of the allocator's metrics. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    /// Launches that were begun.
    pub(crate) launches: Counter,
    /// Worker processes that were started.
    pub(crate) worker_starts: Counter,
    /// Worker processes that could not be started.
    pub(crate) worker_start_failures: Counter,
    /// Worker processes that ended unasked.
    pub(crate) worker_deaths: Counter,
    /// Worker processes that were killed because they did not end in time.
    pub(crate) worker_kills: Counter,
    /// Writes of an allocation's state that failed.
    pub(crate) store_failures: Counter,
    /// Calls to Slurm's controllers.
    pub(crate) slurm_calls: Counter,
    /// Jobs with our mark that belong to no swarm.
    pub(crate) slurm_orphans: Gauge,
}

/// What is counted of the ways to clusters, by cluster. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct RelayMetrics {
    /// Connections that were carried to a follower.
    pub(crate) connections: Family<[(&'static str, String); 1], Counter>,
    /// Connections that were answered with a reason, because there was nobody to carry them to.
    pub(crate) refusals: Family<[(&'static str, String); 1], Counter>,
    /// Connections that are being carried now.
    pub(crate) open: Family<[(&'static str, String); 1], Gauge>,
    /// Bytes, from the cluster to here.
    pub(crate) bytes_in: Family<[(&'static str, String); 1], Counter>,
    /// Bytes, from here to the cluster.
    pub(crate) bytes_out: Family<[(&'static str, String); 1], Counter>,
}

impl RelayMetrics {
    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = registry.sub_registry_with_prefix("allocator");
        let mut add = |name: &str, help: &str, counter: &Family<_, Counter>| ours.register(name, help, counter.clone());
        add("relay_connections", "Connections that were carried to a cluster's follower", &metrics.connections);
        add("relay_refusals", "Connections that there was no follower for", &metrics.refusals);
        add("relay_received_bytes", "Bytes carried from clusters", &metrics.bytes_in);
        add("relay_sent_bytes", "Bytes carried to clusters", &metrics.bytes_out);
        ours.register("relay_open", "Connections to clusters' followers that are being carried", metrics.open.clone());
        metrics
    }
}

impl Metrics {
    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = registry.sub_registry_with_prefix("allocator");
        let mut add = |name: &str, help: &str, counter: &Counter| ours.register(name, help, counter.clone());
        add("launches", "Launches that were begun", &metrics.launches);
        add("worker_starts", "Worker processes that were started", &metrics.worker_starts);
        add("worker_start_failures", "Worker processes that could not be started", &metrics.worker_start_failures);
        add("worker_deaths", "Worker processes that ended unasked", &metrics.worker_deaths);
        add("worker_kills", "Worker processes that were killed", &metrics.worker_kills);
        add("store_failures", "Writes of an allocation's state that failed", &metrics.store_failures);
        add("slurm_calls", "Requests to Slurm's controllers, as sdiag counts them", &metrics.slurm_calls);
        let orphans = "Jobs with our mark that belong to no swarm";
        ours.register("slurm_orphans", orphans, metrics.slurm_orphans.clone());
        metrics
    }
}
