//! The members, found by key, by slot at random, and along the ring of keys; and the digest of the view.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use rand::Rng;
use rand::rngs::SmallRng;

use super::member::{Member, State};
use super::record::{NodeKey, SignedRecord};
use super::time::Time;

/// Into how many parts the view is divided for comparing. A pull carries one XOR for each.
pub const BUCKETS: usize = 64;

/// Which bucket a node belongs to.
pub(super) fn bucket(key: NodeKey) -> usize {
    (key.0 >> 58) as usize
}

/// Every node computes the same for the same claim. It is no defence: a liar only causes pulls.
fn fingerprint(key: NodeKey, (boot, incarnation): (u64, u32)) -> u64 {
    let mut hash = key.0;
    for part in [boot, u64::from(incarnation)] {
        hash = (hash ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
    }
    hash
}

/// A node that has been removed. Nothing that is not newer brings it back.
#[derive(Debug)]
pub(super) struct Grave {
    pub(super) record: Arc<SignedRecord>,
    pub(super) until: Time,
    /// It said good-bye: nobody looks for it.
    pub(super) left: bool,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Member>>,
    free: Vec<u32>,
    index: BTreeMap<NodeKey, u32>,
    /// Slots in the shuffled order of the round robin. A slot stays in it when its member goes.
    order: Vec<u32>,
    cursor: usize,
    up: usize,
    buckets: Box<Buckets>,
    /// Dead and left members in the order in which they became so.
    ended: VecDeque<(Time, NodeKey)>,
    graves: BTreeMap<NodeKey, Grave>,
}

/// XOR of the fingerprints of all who are up.
#[derive(Debug)]
struct Buckets([u64; BUCKETS]);

impl Default for Buckets {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Table {
    /// Most nodes that are remembered after their removal.
    const GRAVES: usize = 4096;

    pub(super) fn get(&self, key: NodeKey) -> Option<&Member> {
        let slot = *self.index.get(&key)?;
        self.slots[slot as usize].as_ref()
    }

    pub(super) fn get_mut(&mut self, key: NodeKey) -> Option<&mut Member> {
        let slot = *self.index.get(&key)?;
        self.slots[slot as usize].as_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.slots.iter().flatten()
    }

    /// How many others are up.
    pub(super) fn up(&self) -> usize {
        self.up
    }

    pub(super) fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets.0
    }

    /// This node is part of its own view.
    pub(super) fn count_self(&mut self, key: NodeKey, version: (u64, u32)) {
        self.buckets.0[bucket(key)] ^= fingerprint(key, version);
    }

    pub(super) fn insert(&mut self, member: Member, rng: &mut SmallRng) {
        let key = member.key();
        self.graves.remove(&key);
        self.toggle(&member);
        if member.is_up() {
            self.up += 1;
        }
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(member);
            slot
        } else {
            let slot = self.slots.len() as u32;
            if self.slots.len() == self.slots.capacity() {
                // Doubling would waste a third of the memory of a large simulation.
                self.slots.reserve_exact(self.slots.len() / 8 + 8);
                self.order.reserve_exact(self.slots.len() / 8 + 8);
            }
            self.slots.push(Some(member));
            self.order.push(slot);
            let last = self.order.len() - 1;
            let at = rng.random_range(0..=last);
            self.order.swap(at, last);
            slot
        };
        self.index.insert(key, slot);
    }

    /// A newer claim of a node, which is up from now on, or has left.
    pub(super) fn replace(&mut self, now: Time, key: NodeKey, record: Arc<SignedRecord>) {
        let Some(mut member) = self.take(key) else { return };
        self.toggle(&member);
        let state = if record.record.leaving { State::Left } else { State::Alive };
        if member.record.record.boot != record.record.boot {
            member.heard = None;
            member.load = super::record::Load::default();
        }
        member.record = record;
        member.suspicion = None;
        self.change(now, &mut member, state);
        self.toggle(&member);
        self.put_back(key, member);
    }

    pub(super) fn set_state(&mut self, now: Time, key: NodeKey, state: State) {
        let Some(mut member) = self.take(key) else { return };
        self.toggle(&member);
        self.change(now, &mut member, state);
        self.toggle(&member);
        self.put_back(key, member);
    }

    fn change(&mut self, now: Time, member: &mut Member, state: State) {
        if member.state == state {
            return;
        }
        match (member.is_up(), state.is_up()) {
            (true, false) => self.up -= 1,
            (false, true) => self.up += 1,
            _ => {}
        }
        member.state = state;
        member.since = now;
        if !state.is_up() {
            self.ended.push_back((now, member.key()));
        }
    }

    fn take(&mut self, key: NodeKey) -> Option<Member> {
        let slot = *self.index.get(&key)?;
        self.slots[slot as usize].take()
    }

    fn put_back(&mut self, key: NodeKey, member: Member) {
        if let Some(slot) = self.index.get(&key) {
            self.slots[*slot as usize] = Some(member);
        }
    }

    /// Adds a member to the digest, or takes it out.
    fn toggle(&mut self, member: &Member) {
        if member.is_up() {
            self.buckets.0[bucket(member.key())] ^= fingerprint(member.key(), member.version());
        }
    }

    /// When the next removal is due, if members are removed so long after their end.
    pub(super) fn next_removal(&self, after: std::time::Duration) -> Time {
        self.ended.front().map_or(Time::FAR, |(ended, _)| *ended + after)
    }

    /// Removes one who ended at or before `end`, and remembers it until `until`.
    pub(super) fn remove_ended(&mut self, end: Time, until: Time, remember: bool) -> Option<NodeKey> {
        while let Some((ended, key)) = self.ended.front().copied()
            && ended <= end
        {
            self.ended.pop_front();
            // It may have come back, or ended once more since.
            if self.get(key).is_none_or(|member| member.is_up() || member.since > ended) {
                continue;
            }
            let Some(slot) = self.index.remove(&key) else { continue };
            self.free.push(slot);
            if let Some(member) = self.slots[slot as usize].take()
                && remember
            {
                self.bury(member.record, until, member.state == State::Left);
            }
            return Some(key);
        }
        None
    }

    pub(super) fn bury(&mut self, record: Arc<SignedRecord>, until: Time, left: bool) {
        if self.graves.len() >= Self::GRAVES
            && let Some(oldest) = self.graves.iter().min_by_key(|(_, grave)| grave.until).map(|(key, _)| *key)
        {
            self.graves.remove(&oldest);
        }
        self.graves.insert(record.key, Grave { record, until, left });
    }

    pub(super) fn grave(&self, now: Time, key: NodeKey) -> Option<&Grave> {
        self.graves.get(&key).filter(|grave| grave.until > now)
    }

    pub(super) fn forget_graves(&mut self, now: Time) {
        self.graves.retain(|_, grave| grave.until > now);
    }

    /// Records of nodes that did not say good-bye and are not up.
    pub(super) fn missing(&self) -> Vec<&Arc<SignedRecord>> {
        let dead = self.iter().filter(|member| member.state == State::Dead).map(|member| &member.record);
        dead.chain(self.graves.values().filter(|grave| !grave.left).map(|grave| &grave.record)).collect()
    }

    /// The next member after `key` on the ring that `wanted` says yes to.
    pub(super) fn after(&self, key: NodeKey, wanted: impl Fn(&Member) -> bool) -> Option<NodeKey> {
        let tail = self.index.range((Excluded(key), Unbounded));
        let head = self.index.range(..key);
        tail.chain(head)
            .find(|(_, slot)| self.slots[**slot as usize].as_ref().is_some_and(&wanted))
            .map(|(key, _)| *key)
    }

    /// Whether `watcher` is one of the `reach` places before or after `key` on the ring.
    pub(super) fn is_near(&self, watcher: NodeKey, key: NodeKey, reach: usize) -> bool {
        let between = |from: NodeKey, to: NodeKey| {
            if from < to {
                self.index.range((Excluded(from), Excluded(to))).take(reach).count()
            } else {
                let tail = self.index.range((Excluded(from), Unbounded));
                tail.chain(self.index.range(..to)).take(reach).count()
            }
        };
        between(watcher, key) < reach || between(key, watcher) < reach
    }

    /// The next member of the shuffled round robin that is up. Shuffled again after each turn.
    pub(super) fn next_in_turn(&mut self, rng: &mut SmallRng) -> Option<NodeKey> {
        for _ in 0..=self.order.len() {
            if self.cursor >= self.order.len() {
                self.cursor = 0;
                shuffle(&mut self.order, rng);
            }
            let slot = *self.order.get(self.cursor)?;
            self.cursor += 1;
            if let Some(member) = &self.slots[slot as usize]
                && member.is_up()
            {
                return Some(member.key());
            }
        }
        None
    }

    /// Up to `count` different members that are up, at random.
    pub(super) fn sample(&self, count: usize, but: &[NodeKey], rng: &mut SmallRng) -> Vec<NodeKey> {
        let mut chosen: Vec<NodeKey> = Vec::with_capacity(count);
        let fits = |member: &Member, chosen: &[NodeKey]| {
            member.is_up() && !but.contains(&member.key()) && !chosen.contains(&member.key())
        };
        if self.slots.is_empty() {
            return chosen;
        }
        for _ in 0..4 * count {
            let slot = rng.random_range(0..self.slots.len());
            if let Some(member) = &self.slots[slot]
                && fits(member, &chosen)
            {
                chosen.push(member.key());
                if chosen.len() == count {
                    return chosen;
                }
            }
        }
        // Few are left, or bad luck: take them in order from a random place.
        let start = rng.random_range(0..self.slots.len());
        for member in self.slots[start..].iter().chain(&self.slots[..start]).flatten() {
            if chosen.len() == count {
                break;
            }
            if fits(member, &chosen) {
                chosen.push(member.key());
            }
        }
        chosen
    }
}

fn shuffle(order: &mut [u32], rng: &mut SmallRng) {
    for at in (1..order.len()).rev() {
        order.swap(at, rng.random_range(0..=at));
    }
}
