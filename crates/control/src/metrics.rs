//! What the control plane counts.

use std::sync::PoisonError;

use drover_service::SharedRegistry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// Which command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CommandLabel {
    pub(crate) command: &'static str,
}

/// The handles.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) connections: Gauge,
    pub(crate) requests: Family<CommandLabel, Counter>,
    pub(crate) rejections: Counter,
    pub(crate) ignored_lines: Counter,
    pub(crate) event_lines: Counter,
    pub(crate) slow_clients: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &SharedRegistry) -> Self {
        let metrics = Self::default();
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let registry = registry.sub_registry_with_prefix("control");
        registry.register("connections", "JSON-line clients connected", metrics.connections.clone());
        registry.register("requests", "Commands of JSON-line clients", metrics.requests.clone());
        registry.register("rejections", "Commands answered with command_rejected", metrics.rejections.clone());
        registry.register(
            "ignored_lines",
            "Lines that were no command of this protocol",
            metrics.ignored_lines.clone(),
        );
        registry.register("event_lines", "Lines made of events, each once", metrics.event_lines.clone());
        registry.register("slow_clients", "Clients cut off because they did not read", metrics.slow_clients.clone());
        metrics
    }
}
