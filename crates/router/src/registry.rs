//! What readers see: a picture of the registry as of the last commit. Reading it waits for nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use drover_proto::router as pb;
use drover_types::SwarmId;
use tokio::sync::watch;

use crate::core::Core;
use crate::core::members::MembersView;
use crate::core::model::{Side, SwarmView};
use crate::core::ring::RingSaid;
use crate::log::EventLog;

/// A picture of the registry.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) swarms: BTreeMap<SwarmId, Arc<SwarmView>>,
    pub(crate) approvals: Arc<Vec<pb::Approval>>,
    pub(crate) approvals_version: u64,
    pub(crate) allocator_error: String,
    pub(crate) follower_error: String,
    /// The members of the gossip by their id there.
    pub(crate) members: Arc<BTreeMap<String, Arc<pb::Member>>>,
    /// Who reported them last.
    pub(crate) members_view: MembersView,
    /// Which keys each node said that it has, by its swarm and index.
    pub(crate) rings: Arc<BTreeMap<(SwarmId, u32), RingSaid>>,
    /// Made when it is first asked for.
    pub(crate) listing: OnceLock<Arc<pb::ListSwarmsResponse>>,
}

impl Registry {
    /// Every swarm, oldest first. Made once per picture.
    pub(crate) fn listing(&self) -> &Arc<pb::ListSwarmsResponse> {
        self.listing.get_or_init(|| {
            let mut swarms: Vec<pb::Swarm> = self.swarms.values().map(|view| view.swarm.clone()).collect();
            swarms.sort_by_key(|swarm| swarm.created_ms);
            Arc::new(pb::ListSwarmsResponse { swarms })
        })
    }

    /// The next picture: this one with what a commit changed.
    pub(crate) fn next(&self, core: &Core) -> Self {
        let dirty = &core.book.dirty;
        let mut swarms = self.swarms.clone();
        let mut gone = false;
        for key in &dirty.views {
            match core.swarms.get(key) {
                Some(swarm) => {
                    swarms.insert(swarm.head.id.clone(), Arc::new(swarm.view()));
                }
                None => gone = true,
            }
        }
        if gone {
            swarms.retain(|id, _| core.by_id.contains_key(id));
        }
        let approvals =
            if dirty.approvals_view { Arc::new(core.waiting_approvals()) } else { Arc::clone(&self.approvals) };
        let members = match (dirty.all_members, dirty.members.is_empty()) {
            (false, true) => Arc::clone(&self.members),
            (all, _) => {
                let mut members = if all { BTreeMap::new() } else { BTreeMap::clone(&self.members) };
                let mut show = |id: &String| match core.book.members.get(id) {
                    Some(facts) => drop(members.insert(id.clone(), Arc::new(core.member_view(facts)))),
                    None => drop(members.remove(id)),
                };
                if all {
                    core.book.members.keys().for_each(&mut show);
                } else {
                    dirty.members.iter().for_each(&mut show);
                }
                Arc::new(members)
            }
        };
        let rings = if dirty.rings_view { Arc::new(core.rings_said()) } else { Arc::clone(&self.rings) };
        Self {
            members,
            members_view: core.book.members_view.clone(),
            rings,
            swarms,
            approvals,
            approvals_version: core.book.approvals_version,
            allocator_error: core.book.allocator.error.clone(),
            follower_error: core.book.followers.of(&Side::default()).error,
            listing: OnceLock::new(),
        }
    }
}

/// What the parts of the router share without waiting for each other.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The registry as of the last commit.
    pub(crate) registry: ArcSwap<Registry>,
    /// The recent end of the event log.
    pub(crate) log: Arc<EventLog>,
    /// Why the event log cannot be written; empty while it can.
    pub(crate) store_error: ArcSwap<String>,
    /// Why the audit log cannot be written; empty while it can.
    pub(crate) audit_error: OnceLock<Arc<ArcSwap<String>>>,
    /// Where the JSON-line control plane listens.
    pub(crate) control_addr: OnceLock<String>,
    /// Rings when the picture of the members has changed.
    pub(crate) members_bell: watch::Sender<()>,
}

impl Shared {
    pub(crate) fn new(log: EventLog) -> Self {
        Self {
            registry: ArcSwap::default(),
            log: Arc::new(log),
            store_error: ArcSwap::default(),
            audit_error: OnceLock::new(),
            control_addr: OnceLock::new(),
            members_bell: watch::channel(()).0,
        }
    }

    /// Why commands are refused although their caller may give them: what cannot be written. Empty when all can.
    pub(crate) fn unwritable(&self) -> String {
        let store = self.store_error.load();
        if !store.is_empty() {
            return store.to_string();
        }
        self.audit_error.get().map(|error| error.load().to_string()).unwrap_or_default()
    }
}
