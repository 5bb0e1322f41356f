//! Orders of the core on their way to the tasks that carry them out.
//!
//! The writer must never wait for another daemon, so an order is only noted here, and orders that a later one overtakes
//! fall away: what is noted is bounded by the number of outboxes, nodes and swarms, not by time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_proto::common::LaunchSpec;
use drover_types::{NodeIndex, OutboxId, SwarmId};
use tokio::sync::Notify;

use crate::core::effects::{DeliveryOrder, Out};
use crate::core::model::Cursor;
use crate::store::Orders;

/// Something noted, and a bell.
#[derive(Debug, Default)]
pub(crate) struct Noted<T> {
    state: Mutex<T>,
    bell: Notify,
}

impl<T: Default> Noted<T> {
    fn lock(&self) -> MutexGuard<'_, T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.lock());
        self.bell.notify_one();
    }

    /// Everything noted so far.
    pub(crate) fn take(&self) -> T {
        std::mem::take(&mut self.lock())
    }

    /// Returns when something was noted since it last returned.
    pub(crate) async fn rung(&self) {
        self.bell.notified().await;
    }
}

/// Changes to what the Follow stream carries.
#[derive(Debug, Default)]
pub(crate) struct FollowPlan {
    /// Outboxes to follow from a place, or no longer.
    pub(crate) outboxes: BTreeMap<OutboxId, Option<Cursor>>,
    /// Nodes that are hot, or no longer.
    pub(crate) heat: BTreeMap<(SwarmId, NodeIndex), bool>,
}

impl FollowPlan {
    pub(crate) fn is_empty(&self) -> bool {
        self.outboxes.is_empty() && self.heat.is_empty()
    }
}

/// What the allocator is to be asked.
#[derive(Debug, Default)]
pub(crate) struct AllocatorPlan {
    pub(crate) ensure: BTreeMap<SwarmId, Arc<LaunchSpec>>,
    pub(crate) release: BTreeMap<SwarmId, bool>,
    /// What it said has been missed: open the stream again.
    pub(crate) watch_again: bool,
}

/// What the tasks of the shell wait for.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    pub(crate) follow: Noted<FollowPlan>,
    pub(crate) deliver: Noted<VecDeque<DeliveryOrder>>,
    pub(crate) remove: Noted<VecDeque<SwarmId>>,
    pub(crate) allocator: Noted<AllocatorPlan>,
}

/// Notes what a commit allows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dispatch {
    pub(crate) plans: Arc<Plans>,
}

impl Orders for Dispatch {
    fn perform(&mut self, out: Out) {
        let plans = &self.plans;
        match out {
            Out::Deliver(order) => plans.deliver.change(|queue| queue.push_back(order)),
            Out::Follow(outbox, cursor) => plans.follow.change(|plan| {
                plan.outboxes.insert(outbox, Some(cursor));
            }),
            Out::Unfollow(outbox) => plans.follow.change(|plan| {
                plan.outboxes.insert(outbox, None);
            }),
            Out::Hot(swarm, node, hot) => plans.follow.change(|plan| {
                plan.heat.insert((swarm, node), hot);
            }),
            Out::Ensure(swarm, spec) => plans.allocator.change(|plan| {
                plan.ensure.insert(swarm, spec);
            }),
            Out::Release(swarm, force) => plans.allocator.change(|plan| {
                plan.release.insert(swarm, force);
            }),
            Out::RemoveMailbox(swarm) => plans.remove.change(|queue| queue.push_back(swarm)),
            // Those concern callers, not other daemons; the writer has dealt with them.
            Out::Answer(..) | Out::Refuse(..) | Out::Attach { .. } | Out::Step(..) => {}
        }
    }

    fn ask_allocations_again(&mut self) {
        self.plans.allocator.change(|plan| plan.watch_again = true);
    }
}
