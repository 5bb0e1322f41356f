//! What the daemon counts.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// One label with its value.
type Label = [(&'static str, &'static str); 1];
type FloatGauge = Gauge<f64, std::sync::atomic::AtomicU64>;

/// Handles of all metrics. Clones share the same numbers.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    events: Family<Label, Counter>,
    handled: Family<Label, Counter>,
    refused: Family<Label, Counter>,
    notes: Family<Label, Gauge>,
    members: Family<Label, Gauge>,
    /// Datagrams taken from the socket.
    pub(crate) datagrams_in: Counter,
    /// Datagrams handed to the socket.
    pub(crate) datagrams_out: Counter,
    /// Bytes of the datagrams taken, without headers below them.
    pub(crate) bytes_in: Counter,
    /// Bytes of the datagrams handed over, without headers below them.
    pub(crate) bytes_out: Counter,
    /// Datagrams that the socket did not take.
    pub(crate) send_errors: Counter,
    /// Exchanges of state over streams, by how they ended.
    pub(crate) streams: Family<Label, Counter>,
    /// Load of this node.
    pub(crate) load: FloatGauge,
    /// 1 while this node is overloaded.
    pub(crate) overloaded: Gauge,
    /// How far this node distrusts its own view.
    pub(crate) local_health: Gauge,
    /// Times that this process was found to have been stopped.
    pub(crate) own_pauses: Counter,
    /// Times that the snapshot could not be written.
    pub(crate) snapshot_errors: Counter,
    /// The term of the lease that is known last.
    pub(crate) term: Gauge,
    /// 1 while this node leads.
    pub(crate) leading: Gauge,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = registry.sub_registry_with_prefix("membership");
        let m = &metrics;
        r.register("events", "Events of membership, by name", m.events.clone());
        r.register("handled_events", "Events given to configured handlers, by outcome", m.handled.clone());
        r.register("refused_datagrams", "Datagrams that were dropped, by reason", m.refused.clone());
        r.register("notes", "What keeps the daemon from its work, by code; 1 while it holds", m.notes.clone());
        r.register("members", "Members by state", m.members.clone());
        r.register("datagrams_in", "Datagrams taken from the socket", m.datagrams_in.clone());
        r.register("datagrams_out", "Datagrams handed to the socket", m.datagrams_out.clone());
        r.register("in_bytes", "Bytes of datagrams taken from the socket", m.bytes_in.clone());
        r.register("out_bytes", "Bytes of datagrams handed to the socket", m.bytes_out.clone());
        r.register("send_errors", "Datagrams that the socket did not take", m.send_errors.clone());
        r.register("streams", "Exchanges over streams, by kind and outcome", m.streams.clone());
        r.register("load_score", "Load of this node from 0 to 1", m.load.clone());
        r.register("overloaded", "1 while this node is overloaded", m.overloaded.clone());
        r.register("local_health", "How far this node distrusts its own view", m.local_health.clone());
        r.register("own_pauses", "Times that this process had been stopped for a while", m.own_pauses.clone());
        r.register("snapshot_errors", "Snapshots that could not be written", m.snapshot_errors.clone());
        r.register("lease_term", "Term of the lease that is known last", m.term.clone());
        r.register("leading", "1 while this node leads", m.leading.clone());
        metrics
    }

    pub(crate) fn event(&self, name: &'static str) {
        self.events.get_or_create(&[("event", name)]).inc();
    }

    pub(crate) fn handled(&self, outcome: &'static str) {
        self.handled.get_or_create(&[("outcome", outcome)]).inc();
    }

    #[cfg(test)]
    pub(crate) fn handled_so_far(&self, outcome: &'static str) -> u64 {
        self.handled.get_or_create(&[("outcome", outcome)]).get()
    }

    pub(crate) fn refuse(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason)]).inc();
    }

    pub(crate) fn note(&self, code: &'static str, holds: bool) {
        self.notes.get_or_create(&[("code", code)]).set(i64::from(holds));
    }

    pub(crate) fn stream(&self, outcome: &'static str) {
        self.streams.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub(crate) fn members(&self, counts: &BTreeMap<&'static str, usize>) {
        for state in ["alive", "suspect", "dead", "left"] {
            let count = counts.get(state).copied().unwrap_or_default();
            self.members.get_or_create(&[("state", state)]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}
