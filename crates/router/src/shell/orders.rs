//! Orders of the core on their way to the tasks that carry them out.
//!
//! The writer must never wait for another daemon, so an order is only noted here, and orders that a later one overtakes
//! fall away: what is noted is bounded by the number of outboxes, nodes and swarms, not by time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_proto::common::LaunchSpec;
use drover_types::{NodeIndex, OutboxId, SwarmId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::core::effects::{DeliveryOrder, Out};
use crate::core::model::{Cursor, Side};
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
    /// What each swarm is to be, and the trace of its launch.
    pub(crate) ensure: BTreeMap<SwarmId, (Arc<LaunchSpec>, String)>,
    pub(crate) release: BTreeMap<SwarmId, bool>,
    /// What it said has been missed: open the stream again.
    pub(crate) watch_again: bool,
}

/// What one follower is to be asked.
#[derive(Debug, Default)]
pub(crate) struct SidePlans {
    pub(crate) follow: Noted<FollowPlan>,
    pub(crate) deliver: Noted<VecDeque<DeliveryOrder>>,
    pub(crate) remove: Noted<VecDeque<SwarmId>>,
    /// Cancelled when nothing is wanted of that follower any more.
    pub(crate) over: CancellationToken,
}

/// What the tasks of the shell wait for.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    /// For the follower beside the router, which is always there.
    pub(crate) beside: Arc<SidePlans>,
    /// Followers of clusters that nobody talks to yet.
    pub(crate) fresh: Noted<Vec<(Side, Arc<SidePlans>)>>,
    pub(crate) allocator: Noted<AllocatorPlan>,
}

/// Notes what a commit allows.
#[derive(Debug, Default)]
pub(crate) struct Dispatch {
    pub(crate) plans: Arc<Plans>,
    /// For the followers of clusters.
    elsewhere: BTreeMap<Side, Arc<SidePlans>>,
}

impl Dispatch {
    /// Begins to talk to a follower, or begins anew.
    fn reach(&mut self, side: Side) {
        self.leave(&side);
        let plans = Arc::new(SidePlans::default());
        self.elsewhere.insert(Arc::clone(&side), Arc::clone(&plans));
        self.plans.fresh.change(|fresh| fresh.push((side, plans)));
    }

    fn leave(&mut self, side: &Side) {
        if let Some(plans) = self.elsewhere.remove(side) {
            plans.over.cancel();
        }
    }

    /// What the follower of a side is to be asked; nothing is asked of one that is not talked to.
    fn side(&self, side: &Side) -> Option<&SidePlans> {
        if side.is_empty() { Some(&self.plans.beside) } else { self.elsewhere.get(side).map(|plans| &**plans) }
    }

    fn follow(&self, side: &Side, change: impl FnOnce(&mut FollowPlan)) {
        if let Some(plans) = self.side(side) {
            plans.follow.change(change);
        }
    }
}

impl Orders for Dispatch {
    fn perform(&mut self, out: Out) {
        let plans = &self.plans;
        match out {
            Out::Deliver(order) => {
                if let Some(plans) = self.side(&order.side) {
                    plans.deliver.change(|queue| queue.push_back(order));
                }
            }
            Out::Follow(side, outbox, cursor) => self.follow(&side, |plan| {
                plan.outboxes.insert(outbox, Some(cursor));
            }),
            Out::Unfollow(side, outbox) => self.follow(&side, |plan| {
                plan.outboxes.insert(outbox, None);
            }),
            Out::Hot(side, swarm, node, hot) => self.follow(&side, |plan| {
                plan.heat.insert((swarm, node), hot);
            }),
            Out::Reach(side, true) => self.reach(side),
            Out::Reach(side, false) => self.leave(&side),
            Out::Ensure(swarm, spec, trace) => plans.allocator.change(|plan| {
                plan.ensure.insert(swarm, (spec, trace));
            }),
            Out::Release(swarm, force) => plans.allocator.change(|plan| {
                plan.release.insert(swarm, force);
            }),
            Out::RemoveMailbox(side, swarm) => {
                if let Some(plans) = self.side(&side) {
                    plans.remove.change(|queue| queue.push_back(swarm));
                }
            }
            // Those concern callers, not other daemons; the writer has dealt with them.
            Out::Answer(..) | Out::Refuse(..) | Out::Attach { .. } | Out::Step(..) => {}
        }
    }

    fn ask_allocations_again(&mut self) {
        self.plans.allocator.change(|plan| plan.watch_again = true);
    }
}
