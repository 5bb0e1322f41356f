//! The four events of membership, their payloads, and who is told of them.
//!
//! ```text
//! shell --publish--> log (numbered, the last ones kept) --> WatchEvents
//!                 \-> logging, metrics                       in place: they cannot wait
//!                 \-> queue --> command or webhook           one task each; a full queue loses its oldest
//! ```

mod handler;
mod log;

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_config::EventsConfig;
use drover_service::Context;
use serde::Serialize;
use tracing::{info, warn};

use crate::metrics::Metrics;
use handler::Handler;
pub use log::Log;

/// A node as events tell of it; the names are those that handlers get as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct NodeInfo {
    /// Unique node identifier.
    #[serde(rename = "ID")]
    pub id: String,
    /// IP address.
    pub addr: String,
    /// Discovery port.
    pub port: u16,
    /// Capabilities (models, tools).
    pub agent_caps: BTreeMap<String, String>,
    /// Current load, from 0 to 1.
    pub load_score: f64,
    /// Custom labels.
    pub labels: BTreeMap<String, String>,
    /// Last update, in microseconds of Unix time.
    pub timestamp: i64,
    /// Protocol version.
    pub version: String,
}

/// What happened, with its payload.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A node was discovered.
    NodeJoined(NodeInfo),
    /// A node left or is dead; its id.
    NodeLeft(String),
    /// A node does not answer; its id.
    NodeSuspect(String),
    /// A suspect node answers again.
    NodeAlive(NodeInfo),
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Counts up by one per event, from 1 at each start.
    pub seq: u64,
    /// When, in microseconds of Unix time.
    pub timestamp_us: u64,
    /// What.
    pub kind: Kind,
}

impl Kind {
    /// The name that the outside knows it by.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NodeJoined(_) => "NodeJoined",
            Self::NodeLeft(_) => "NodeLeft",
            Self::NodeSuspect(_) => "NodeSuspect",
            Self::NodeAlive(_) => "NodeAlive",
        }
    }

    /// Whom it is about.
    pub fn node_id(&self) -> &str {
        match self {
            Self::NodeJoined(info) | Self::NodeAlive(info) => &info.id,
            Self::NodeLeft(id) | Self::NodeSuspect(id) => id,
        }
    }
}

impl Event {
    /// One JSON object: `seq`, `timestamp`, `event` and, as `data`, the payload.
    pub fn to_json(&self) -> String {
        let data = match &self.kind {
            Kind::NodeJoined(info) | Kind::NodeAlive(info) => serde_json::to_value(info).unwrap_or_default(),
            Kind::NodeLeft(id) | Kind::NodeSuspect(id) => serde_json::json!({ "NodeID": id }),
        };
        let (seq, timestamp, event) = (self.seq, self.timestamp_us, self.kind.name());
        serde_json::json!({ "seq": seq, "timestamp": timestamp, "event": event, "data": data }).to_string()
    }
}

/// Tells everybody. Publishing never waits.
#[derive(Clone)]
pub struct Dispatcher {
    log: Arc<Log>,
    handlers: Arc<[Handler]>,
    metrics: Metrics,
}

impl Dispatcher {
    /// Starts a task for each configured handler.
    pub fn start(config: &EventsConfig, ctx: &Context, metrics: &Metrics) -> Self {
        let handlers = config
            .handlers
            .iter()
            .map(|handler| Handler::start(handler, config.queue, ctx, metrics))
            .collect::<Vec<_>>();
        Self { log: Arc::default(), handlers: handlers.into(), metrics: metrics.clone() }
    }

    /// The numbered events.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Something happened.
    pub fn publish(&self, timestamp_us: u64, kind: Kind) {
        let (event, node_id) = (kind.name(), kind.node_id().to_owned());
        if matches!(kind, Kind::NodeSuspect(_)) {
            warn!(event, node_id, "node does not answer");
        } else {
            info!(event, node_id, "membership changed");
        }
        self.metrics.event(event);
        let event = self.log.append(timestamp_us, kind);
        for handler in self.handlers.iter() {
            handler.offer(&event);
        }
    }
}

#[cfg(test)]
mod tests;
