//! What the leaseholder plans for nodes that have too much to do: how many sessions each may send where in the next moments. One who sees
//! all of them does not send everybody's sessions to the same place, and no node more than it can take.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::ids::NodeId;
use super::message::Needs;
use super::policy::{Peer, PeerState};
use super::settings::Settings;

/// How much load one session is taken for, until the nodes say how it really is.
const STEP: f64 = 0.02;

/// One node, as the leaseholder sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Burden {
    /// Its name.
    pub node: NodeId,
    /// Its load, from 0 to 1.
    pub load: f64,
    /// It has too much to do.
    pub over: bool,
    /// It takes sessions.
    pub open: bool,
}

/// Room for so many sessions on each of these nodes.
pub type Rooms = BTreeMap<NodeId, u32>;

/// Room for each node that has too much to do, most loaded first. One for which there is none gets an empty plan: it goes on by itself.
pub fn plan_relief(burdens: &[Burden], settings: &Settings) -> BTreeMap<NodeId, Rooms> {
    let most = settings.max_moves as u32;
    let fit = |burden: &&Burden| burden.open && !burden.over && burden.load < settings.load_threshold;
    let mut targets: Vec<(f64, u32, &NodeId)> =
        burdens.iter().filter(fit).map(|burden| (burden.load, most, &burden.node)).collect();
    let mut sources: Vec<&Burden> = burdens.iter().filter(|burden| burden.over).collect();
    sources.sort_by(|a, b| b.load.total_cmp(&a.load).then_with(|| a.node.cmp(&b.node)));
    let mut plans: BTreeMap<NodeId, Rooms> = sources.iter().map(|source| (source.node.clone(), Rooms::new())).collect();
    for _ in 0..most {
        // One for each, and then again, so that nobody is left with nothing while another one has all.
        for source in &sources {
            let room = targets
                .iter_mut()
                .filter(|(load, left, _)| *left > 0 && *load + STEP < source.load.min(settings.load_threshold))
                .min_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.2.cmp(b.2)));
            let Some((load, left, node)) = room else { continue };
            (*load, *left) = (*load + STEP, *left - 1);
            if let Some(rooms) = plans.get_mut(&source.node) {
                *rooms.entry((*node).clone()).or_default() += 1;
            }
        }
    }
    plans
}

/// What the leaseholder said last to this node, as long as it counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Relief {
    rooms: Rooms,
    until: Option<Duration>,
}

impl Relief {
    /// The leaseholder has planned.
    pub(crate) fn heard(&mut self, now: Duration, rooms: Rooms, settings: &Settings) {
        (self.rooms, self.until) = (rooms, Some(now + settings.rebalance_interval * 3));
    }

    /// Whether there is somebody who plans; else this node decides for itself.
    pub(crate) fn counts(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// The node that one session is to go to, which takes one place there.
    pub(crate) fn take(&mut self, needs: &Needs, peers: &BTreeMap<NodeId, Peer>) -> Option<NodeId> {
        let fits = |node: &NodeId| {
            peers.get(node).is_some_and(|peer| {
                let able: &BTreeSet<String> = &peer.capabilities;
                peer.state == PeerState::Alive && !peer.overloaded && needs.capabilities.is_subset(able)
            })
        };
        let node = self.rooms.iter().find(|(node, left)| **left > 0 && fits(node)).map(|(node, _)| node.clone())?;
        if let Some(left) = self.rooms.get_mut(&node) {
            *left -= 1;
        }
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn burden(node: &str, load: f64, over: bool) -> Burden {
        Burden { node: NodeId::new(node), load, over, open: true }
    }

    fn total(plan: &BTreeMap<NodeId, Rooms>, to: &str) -> u32 {
        plan.values().filter_map(|rooms| rooms.get(&NodeId::new(to))).sum()
    }

    #[test]
    fn no_node_is_sent_more_than_it_takes_and_the_emptiest_get_most() {
        let settings = Settings::default();
        let burdens = [
            burden("a", 0.95, true),
            burden("b", 0.9, true),
            burden("c", 0.85, true),
            burden("d", 0.1, false),
            burden("e", 0.7, false),
        ];
        let plan = plan_relief(&burdens, &settings);
        assert_eq!(plan.len(), 3);
        assert_eq!((total(&plan, "d"), total(&plan, "e")), (settings.max_moves as u32, settings.max_moves as u32));
        for (source, rooms) in &plan {
            assert!(rooms.values().sum::<u32>() >= 2, "{source} got {rooms:?}");
        }
    }

    #[test]
    fn nobody_is_sent_to_one_who_has_too_much_to_do_leaves_or_would_have_as_much() {
        let settings = Settings::default();
        let mut closed = burden("closed", 0.0, false);
        closed.open = false;
        let burdens = [burden("a", 0.9, true), burden("over", 0.7, true), closed, burden("full", 0.79, false)];
        let plan = plan_relief(&burdens, &settings);
        assert!(plan.values().all(Rooms::is_empty), "{plan:?}");
        assert_eq!(plan.len(), 2, "both are told that there is no room");
    }

    #[test]
    fn a_plan_counts_for_a_while_and_each_place_once() {
        let (settings, mut relief) = (Settings::default(), Relief::default());
        let peer = |name: &str, can: &str| {
            let node = NodeId::new(name);
            let capabilities = BTreeSet::from([can.to_owned()]);
            (node.clone(), Peer { node, state: PeerState::Alive, load: 0.1, overloaded: false, capabilities })
        };
        let peers = BTreeMap::from([peer("d", "agents=codex"), peer("e", "agents=echo")]);
        assert!(!relief.counts(Duration::ZERO));
        let rooms = Rooms::from([(NodeId::new("d"), 2), (NodeId::new("e"), 1), (NodeId::new("unknown"), 9)]);
        relief.heard(Duration::ZERO, rooms, &settings);
        let needs = Needs { capabilities: BTreeSet::from(["agents=echo".to_owned()]) };
        assert_eq!(relief.take(&needs, &peers), Some(NodeId::new("e")));
        assert_eq!(relief.take(&needs, &peers), None);
        assert!(relief.counts(Duration::from_secs(2)) && !relief.counts(Duration::from_secs(3)));
    }
}
