//! Whom the leader chooses as voters. A matter of availability only: any choice is safe.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::set::{Voter, VoterSet};
use crate::core::NodeKey;

/// A member as the gossip sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The member.
    pub key: NodeKey,
    /// What the gossip believes about it.
    pub state: PeerState,
    /// Its region; voters are spread over the regions.
    pub region: Arc<str>,
}

/// What the gossip believes about a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// It answers.
    Alive,
    /// It did not answer and may still show that it lives.
    Suspect,
    /// It did not answer in time.
    Dead,
    /// It said that it goes.
    Left,
}

/// What the leader thinks of one of its voters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worth {
    /// It answers.
    Good,
    /// It does not answer, but may come back: replaced when there is somebody, else kept.
    Lost,
    /// It does not come back.
    Gone,
}

/// What the choice is made from.
pub(super) struct Field<'a> {
    pub(super) me: NodeKey,
    pub(super) set: &'a VoterSet,
    pub(super) view: &'a BTreeMap<NodeKey, Peer>,
    /// Nodes that are willing, with their seats.
    pub(super) willing: &'a BTreeMap<NodeKey, u64>,
}

impl Field<'_> {
    /// The next voters, sorted; `None` when the present ones are as good as any.
    pub(super) fn choose(&self, worth: impl Fn(Voter) -> Worth) -> Option<Vec<Voter>> {
        let current = &self.set.voters;
        let of =
            |wanted: Worth| -> Vec<Voter> { current.iter().copied().filter(|voter| worth(*voter) == wanted).collect() };
        let good = of(Worth::Good);
        let spare = self.spare(&good);
        let fit = odd((good.len() + spare.len()).min(super::MAX_VOTERS));
        // A lost voter is kept while there is nobody instead, unless it is gone for good.
        let mut pool = self.by_preference(good.clone(), spare);
        for lost in of(Worth::Lost) {
            if pool.iter().all(|other| other.key != lost.key) {
                pool.push(lost);
            }
        }
        let same = if pool.len() < current.len() { odd(pool.len()) } else { current.len() };
        pool.truncate(if fit >= current.len() { fit } else { same });
        pool.sort_unstable();
        let answering = pool.iter().filter(|voter| good.contains(voter) || !current.contains(voter)).count();
        (pool != *current && answering > pool.len() / 2).then_some(pool)
    }

    /// Willing members that are no good voters already, the steadiest order first.
    fn spare(&self, good: &[Voter]) -> Vec<Voter> {
        let alive = |key: &NodeKey| self.view.get(key).is_some_and(|peer| peer.state == PeerState::Alive);
        let mut spare: Vec<Voter> = self
            .willing
            .iter()
            .filter(|(key, _)| **key != self.me && alive(key) && good.iter().all(|voter| voter.key != **key))
            .map(|(&key, &seat)| Voter { key, seat })
            .collect();
        spare.sort_unstable_by_key(|voter| order(voter.key));
        spare
    }

    /// The good ones, this node first, then the spare ones: each time one from the region with the fewest voters.
    fn by_preference(&self, mut pool: Vec<Voter>, mut spare: Vec<Voter>) -> Vec<Voter> {
        pool.sort_by_key(|voter| voter.key != self.me);
        while !spare.is_empty() {
            let crowd =
                |voter: &Voter| pool.iter().filter(|other| self.region(other.key) == self.region(voter.key)).count();
            let Some(index) = (0..spare.len()).min_by_key(|&index| (crowd(&spare[index]), index)) else { break };
            pool.push(spare.remove(index));
        }
        pool
    }

    fn region(&self, key: NodeKey) -> &str {
        self.view.get(&key).map_or("", |peer| &peer.region)
    }

    /// Members to ask for their seat, so that there is somebody to choose: none while the set is full and well.
    pub(super) fn wanted(&self, worth: impl Fn(Voter) -> Worth) -> Vec<NodeKey> {
        let good = self.set.voters.iter().filter(|voter| worth(**voter) == Worth::Good).count();
        let missing = super::MAX_VOTERS.saturating_sub(good);
        if missing == 0 {
            return Vec::new();
        }
        let voting =
            |key: NodeKey| self.set.voters.iter().any(|voter| voter.key == key && worth(*voter) == Worth::Good);
        let mut wanted: Vec<&Peer> = self
            .view
            .values()
            .filter(|peer| peer.state == PeerState::Alive && peer.key != self.me && !voting(peer.key))
            .collect();
        let crowd =
            |peer: &Peer| self.set.voters.iter().filter(|voter| self.region(voter.key) == &*peer.region).count();
        wanted.sort_unstable_by_key(|peer| (crowd(peer), order(peer.key)));
        // Two more than are missing, for those that do not answer.
        wanted.iter().take(missing + 2).map(|peer| peer.key).collect()
    }
}

/// The greatest odd number that is not greater; 0 for 0.
fn odd(count: usize) -> usize {
    if count == 0 { 0 } else { (count - 1) | 1 }
}

/// An order of the nodes that favours none.
fn order(key: NodeKey) -> u64 {
    (key.0 ^ (key.0 >> 29)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}
