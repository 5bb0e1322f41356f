//! One span for each turn: the link between whoever asked and what the agent did, in the trace that the prompt came with.
//!
//! Records of a turn carry the context of its span, so that whoever reads them hangs his own below it. Without a tracer
//! they carry the context that the prompt came with.

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_types::{InjectionId, OutboxId};
use serde_json::Value;
use tracing::Span;
use tracing::field::Empty;

use crate::core::{Entry, kind};

/// The spans of turns that run.
pub(crate) struct Spans {
    node: OutboxId,
    open: BTreeMap<InjectionId, Open>,
}

struct Open {
    span: Span,
    context: Option<Arc<str>>,
}

impl Spans {
    pub(crate) fn new(node: OutboxId) -> Self {
        Self { node, open: BTreeMap::new() }
    }

    /// A turn is begun before its first record is written, and ended behind its last.
    pub(crate) fn note(&mut self, entry: &Entry) {
        match entry {
            Entry::Begun { injection, trace, .. } => {
                let OutboxId { swarm, node, generation } = &self.node;
                let span = tracing::debug_span!(
                    parent: None, "turn", swarm_id = %swarm, node_id = %node, %generation, injection_id = %injection,
                    status = Empty
                );
                if span.is_disabled() {
                    return;
                }
                if let Some(trace) = trace {
                    drover_service::remote_parent(&span, trace);
                }
                let context = span.in_scope(drover_service::traceparent).map(Arc::from);
                self.open.insert(injection.clone(), Open { span, context });
            }
            Entry::Returned { injection } | Entry::Ended { injection, .. } => {
                self.open.remove(injection);
            }
            Entry::Ending { .. } | Entry::Mark { .. } => {}
        }
    }

    /// The trace context for a record.
    pub(crate) fn trace_of<'a>(
        &'a self,
        injection: Option<&InjectionId>,
        came_with: Option<&'a Arc<str>>,
        kind: &str,
        data: &Value,
    ) -> Option<&'a Arc<str>> {
        let Some(open) = injection.and_then(|id| self.open.get(id)) else { return came_with };
        if kind == kind::TURN_COMPLETE {
            open.span.record("status", data["status"].as_str().unwrap_or_default());
        }
        open.context.as_ref().or(came_with)
    }
}
