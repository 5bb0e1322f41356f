//! The coordinator of the leaseholder plans for all: which nodes take the sessions of one that is to be empty, and where sessions of nodes go
//! that have too much to do. What it says is carried out by the nodes that it concerns; where nobody leads, they plan for themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drover_proto::handoff::{self as pb, DrainRequest};
use tokio::time::sleep;
use tracing::{debug, info};

use super::Shell;
use super::drain::{shares, tell};
use super::members::{client, leader};
use super::orders::Order;
use crate::core::{Engine, Input, NodeId, Share, plan_relief};

/// Pause between two looks while somebody has too much to do, and while nobody has.
const LOOK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
/// Looks after which an order is planned anew: who can take sessions may have changed.
const ANEW: u32 = 15;

/// Plans as long as this node leads, until the shutdown.
pub(crate) async fn plan(shell: Shell) {
    let mut client = client(&shell, &shell.membership);
    let stopping = shell.ctx.shutdown().clone();
    // Which orders were planned, and how many looks ago.
    let mut planned: BTreeMap<NodeId, u32> = BTreeMap::new();
    loop {
        let busy = shell.view.is_anybody_over() || shell.jobs.with(Engine::is_over).await.unwrap_or_default();
        tokio::select! {
            () = sleep(if busy { LOOK.0 } else { LOOK.1 }) => {}
            () = shell.drains.wait_for_order() => {}
            () = stopping.cancelled() => return,
        }
        if leader(&mut client).await.is_none_or(|leader| leader != shell.me.node) {
            planned.clear();
            continue;
        }
        relieve(&shell).await;
        let orders = shell.orders.clone();
        let Ok(orders) = tokio::task::spawn_blocking(move || orders.all()).await else { continue };
        planned.retain(|node, looks| {
            *looks += 1;
            *looks < ANEW && orders.iter().any(|order| order.node == *node)
        });
        drain(&shell, &orders, &mut planned).await;
    }
}

/// Says where sessions of nodes may go that have too much to do.
async fn relieve(shell: &Shell) {
    let own_over = shell.jobs.with(Engine::is_over).await.unwrap_or_default();
    let burdens = shell.view.burdens(own_over);
    if !shell.settings.enabled || burdens.iter().all(|burden| !burden.over) {
        return;
    }
    for (node, rooms) in plan_relief(&burdens, &shell.settings) {
        debug!(node = %node, ?rooms, "relief is planned");
        if node == shell.me.node {
            shell.jobs.input(Input::Relief(rooms)).await;
        } else {
            shell.links.send_relief(&node, &rooms);
        }
    }
}

/// Says who takes the sessions of nodes that are to be empty.
async fn drain(shell: &Shell, orders: &[Order], planned: &mut BTreeMap<NodeId, u32>) {
    let without: BTreeSet<NodeId> = orders.iter().map(|order| order.node.clone()).collect();
    let due: Vec<&NodeId> = without.iter().filter(|node| !planned.contains_key(*node)).collect();
    if due.is_empty() {
        return;
    }
    let mut all = shares(shell, &without).await;
    if !without.contains(&shell.me.node) && !shell.view.own().leaving {
        let held = shell.jobs.with(Engine::held).await.unwrap_or_default();
        all.push(Share { node: shell.me.node.clone(), sessions: held as u32, weight: 1 });
    }
    let planned_by = shell.me.node.to_string();
    let share = |share: &Share| pb::Share { node_id: share.node.to_string(), sessions: share.sessions };
    for node in due {
        let shares: Vec<pb::Share> = all.iter().map(share).collect();
        let (node_id, planned_by) = (node.to_string(), planned_by.clone());
        let request = DrainRequest { node_id, undo: false, planned_by, shares };
        let told = if *node == shell.me.node {
            super::drain::begin(shell, request).await.map(drop).map_err(|status| drover_proto::failure_of(&status))
        } else {
            tell(shell, node, request).await
        };
        match told {
            Ok(()) => {
                info!(node = %node, nodes = all.len(), "the drain of a node is planned");
                planned.insert(node.clone(), 0);
            }
            // It is asked again at the next look.
            Err(failure) => debug!(node = %node, why = %failure.message, "a node does not take its plan"),
        }
    }
}
