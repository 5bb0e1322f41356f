//! What there is right now, counted when somebody asks: swarms, nodes, prompts under way, approvals that wait.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::registry::Shared;

/// Counts the picture that readers see, so that no commit waits for whoever watches.
pub(crate) struct Gauges(pub(crate) Arc<Shared>);

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

/// Every state has a series from the start: what is missing cannot be told from nothing.
const SWARMS: [&str; 6] = ["launching", "running", "degraded", "terminating", "terminated", "failed"];
const NODES: [&str; 7] = ["pending", "starting", "idle", "busy", "restarting", "exited", "failed"];

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let picture = self.0.registry.load();
        let mut swarms: BTreeMap<&str, i64> = SWARMS.iter().map(|state| (*state, 0)).collect();
        let mut nodes: BTreeMap<&str, i64> = NODES.iter().map(|state| (*state, 0)).collect();
        let mut outstanding = 0;
        for view in picture.swarms.values() {
            *swarms.entry(&view.swarm.status).or_default() += 1;
            for node in &view.swarm.nodes {
                *nodes.entry(&node.state).or_default() += 1;
                outstanding += i64::from(node.outstanding);
            }
        }
        by_state(&mut encoder, "router_swarms", "Swarms that are listed, by status", &swarms)?;
        by_state(&mut encoder, "router_nodes", "Nodes of listed swarms, by state", &nodes)?;
        let approvals = i64::try_from(picture.approvals.len()).unwrap_or(i64::MAX);
        let reachable = [
            ("router_outstanding_prompts", "Prompts accepted and not yet ended", outstanding),
            ("router_waiting_approvals", "Approvals that wait for an answer", approvals),
            (
                "router_allocator_reached",
                "1 while the allocator answers",
                i64::from(picture.allocator_error.is_empty()),
            ),
            ("router_follower_reached", "1 while the follower answers", i64::from(picture.follower_error.is_empty())),
        ];
        for (name, help, value) in reachable {
            let gauge = Gauge::<i64>::default();
            gauge.set(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

fn by_state(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, counts: &BTreeMap<&str, i64>) -> fmt::Result {
    let family = Family::<[(&str, String); 1], Gauge>::default();
    for (state, count) in counts {
        family.get_or_create(&[("state", (*state).to_owned())]).set(*count);
    }
    family.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}
