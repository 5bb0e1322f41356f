//! What the daemon counts.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

type Label = [(&'static str, &'static str); 1];
type FloatCounter = Counter<f64, std::sync::atomic::AtomicU64>;

/// Handles of all metrics. Clones share the same numbers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    /// Calls that were started, by why.
    calls: Family<Label, Counter>,
    /// Tasks that are over, by how.
    tasks: Family<Label, Counter>,
    /// What the core warned of, by code.
    warnings: Family<Label, Counter>,
    /// Questions that an answer may have been kept for, by what came of that.
    cache: Family<Label, Counter>,
    /// Tokens that providers said they counted, by direction.
    tokens: Family<Label, Counter>,
    /// Calls under way.
    pub(crate) under_way: Gauge,
    /// Tasks that were handed in and are not over.
    pub(crate) open_tasks: Gauge,
    /// What calls cost.
    pub(crate) spent_usd: FloatCounter,
    /// Runs that are under way.
    pub(crate) runs: Gauge,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = registry.sub_registry_with_prefix("dispatcher");
        let m = &metrics;
        r.register("calls", "Calls to providers, by why they were made", m.calls.clone());
        r.register("tasks", "Tasks that are over, by how they ended", m.tasks.clone());
        r.register("warnings", "What was warned of, by code", m.warnings.clone());
        r.register("cache", "Questions to the cache, by what it had", m.cache.clone());
        r.register("tokens", "Tokens that providers counted, by direction", m.tokens.clone());
        r.register("calls_under_way", "Calls under way", m.under_way.clone());
        r.register("open_tasks", "Tasks that were handed in and are not over", m.open_tasks.clone());
        r.register("spent_usd", "What calls cost, broken off ones at their worst case", m.spent_usd.clone());
        r.register("runs", "Runs under way", m.runs.clone());
        metrics
    }

    pub(crate) fn call(&self, why: &'static str) {
        self.calls.get_or_create(&[("why", why)]).inc();
    }

    pub(crate) fn task(&self, status: &'static str) {
        self.tasks.get_or_create(&[("status", status)]).inc();
    }

    pub(crate) fn cache(&self, what: &'static str) {
        self.cache.get_or_create(&[("what", what)]).inc();
    }

    pub(crate) fn tokens(&self, input: u64, output: u64) {
        self.tokens.get_or_create(&[("direction", "input")]).inc_by(input);
        self.tokens.get_or_create(&[("direction", "output")]).inc_by(output);
    }

    pub(crate) fn warning(&self, code: &'static str) {
        self.warnings.get_or_create(&[("code", code)]).inc();
    }
}
