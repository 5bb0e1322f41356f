//! What the allocator counts.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::metrics::counter::Counter;
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
        add("slurm_calls", "Calls to Slurm's controllers", &metrics.slurm_calls);
        let orphans = "Jobs with our mark that belong to no swarm";
        ours.register("slurm_orphans", orphans, metrics.slurm_orphans.clone());
        metrics
    }
}
