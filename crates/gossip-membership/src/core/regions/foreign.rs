//! What is known of one other region.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;

use super::{WideTiming, entry_of, gateways_of};
use crate::core::effect::{Cause, Effect, Event};
use crate::core::engine::MemberView;
use crate::core::member::State;
use crate::core::message::Entry;
use crate::core::record::{Load, NodeKey, SignedRecord};
use crate::core::table::{BUCKETS, bucket};
use crate::core::time::Time;

struct Remote {
    record: Arc<SignedRecord>,
    /// What its own region says.
    said: State,
    /// What is shown here: a region that is out of reach is suspect.
    shown: State,
    since: Time,
    /// When this boot of it was first heard of.
    met: Time,
    load: Load,
    /// The change of the foreign view that it came with.
    revision: u64,
}

/// Members of another region, as that region sees them.
pub(super) struct Foreign {
    members: BTreeMap<NodeKey, Remote>,
    /// When it was last heard of, by whatever way.
    heard: Time,
    reached: bool,
    /// Who did not answer lately.
    silent: BTreeSet<NodeKey>,
}

impl Foreign {
    pub(super) fn new(now: Time) -> Self {
        Self { members: BTreeMap::new(), heard: now, reached: true, silent: BTreeSet::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn record(&self, key: NodeKey) -> Option<&Arc<SignedRecord>> {
        self.members.get(&key).map(|member| &member.record)
    }

    pub(super) fn members(&self) -> impl Iterator<Item = MemberView> + '_ {
        self.members.values().map(|member| MemberView {
            record: member.record.clone(),
            state: member.shown,
            since: member.since,
            heard: None,
            load: member.load,
        })
    }

    /// Everything that came with a later change, as it is shown here.
    pub(super) fn since(&self, now: Time, revision: u64) -> Vec<Entry> {
        let changed = |key: &NodeKey| self.members.get(key).is_some_and(|member| member.revision > revision);
        self.members().filter(|view| changed(&view.record.key)).map(|view| entry_of(now, &view)).collect()
    }

    /// XOR over the members that are up there, by bucket.
    pub(super) fn buckets(&self) -> [u64; BUCKETS] {
        let mut buckets = [0; BUCKETS];
        for (key, member) in self.members.iter().filter(|(_, member)| member.said.is_up()) {
            buckets[bucket(*key)] ^= hash_of(&member.record, member.said, member.load);
        }
        buckets
    }

    /// One of its gateways, or when none of them answers, anybody.
    pub(super) fn whom_to_ask(&self, region: &str, rng: &mut SmallRng) -> Option<NodeKey> {
        let alive = self.members.iter().filter(|(_, member)| member.said == State::Alive).map(|(key, _)| *key);
        let gateways: Vec<NodeKey> =
            gateways_of(region, alive).into_iter().filter(|key| !self.silent.contains(key)).collect();
        if let Some(gateway) = gateways.choose(rng) {
            return Some(*gateway);
        }
        let all: Vec<NodeKey> =
            self.members.iter().filter(|(_, member)| member.said != State::Left).map(|(key, _)| *key).collect();
        all.choose(rng).copied()
    }

    pub(super) fn silent(&mut self, key: NodeKey) {
        self.silent.insert(key);
    }

    /// Takes over what is said of a member. True when anything changed.
    pub(super) fn take(&mut self, now: Time, entry: &Entry, revision: u64, out: &mut Vec<Effect>) -> bool {
        let key = entry.record.key;
        // A leaver is one whatever is said of it.
        let said = if entry.record.record.leaving && entry.state.is_up() { State::Left } else { entry.state };
        let Some(member) = self.members.get_mut(&key) else {
            if said.is_up() {
                let record = entry.record.clone();
                let joined =
                    Remote { record, said, shown: State::Alive, since: now, met: now, load: entry.load, revision };
                self.members.insert(key, joined);
                out.push(Effect::Learn(entry.record.clone()));
                out.push(Effect::Event(Event::Joined(entry.record.clone())));
                self.show(now, key, said, revision, out);
            }
            return said.is_up();
        };
        if entry.record.record.version() < member.record.record.version() {
            return false;
        }
        let newer = entry.record.record.version() > member.record.record.version();
        let other_load = (member.load.score, member.load.overloaded) != (entry.load.score, entry.load.overloaded);
        if !newer && member.said == said && !other_load {
            return false;
        }
        let again = entry.record.record.boot > member.record.record.boot;
        if again && member.shown.is_up() {
            out.push(Effect::Event(Event::Left { record: member.record.clone(), cause: Cause::Restarted }));
        }
        if again {
            member.met = now;
        }
        if newer {
            member.record = entry.record.clone();
            out.push(Effect::Learn(entry.record.clone()));
            let told = if again && said.is_up() { Some(Event::Joined(entry.record.clone())) } else { None };
            if again {
                member.shown = if said.is_up() { State::Alive } else { said };
            }
            let updated = (!again && said.is_up()).then(|| Event::Updated(entry.record.clone()));
            out.extend(told.or(updated).map(Effect::Event));
        }
        member.said = said;
        member.revision = revision;
        if other_load {
            member.load = entry.load;
            out.push(Effect::Event(Event::Load { key, load: entry.load }));
        }
        self.show(now, key, said, revision, out);
        true
    }

    /// A gateway there has answered: in the buckets that differ, who is not listed is gone. Unless it is new: then it may be
    /// that those over there have not found each other yet.
    pub(super) fn answered(
        &mut self,
        now: Time,
        from: NodeKey,
        (differing, listed): (u64, &BTreeSet<NodeKey>),
        patience: Duration,
        revision: u64,
        out: &mut Vec<Effect>,
    ) -> bool {
        self.heard = now;
        self.silent.remove(&from);
        let mut changed = !self.reached;
        if !self.reached {
            self.reached = true;
            let said: Vec<(NodeKey, State)> = self.members.iter().map(|(key, member)| (*key, member.said)).collect();
            for (key, said) in said {
                self.show(now, key, said, revision, out);
            }
        }
        let lost: Vec<NodeKey> = self
            .members
            .iter()
            .filter(|(key, member)| {
                member.said.is_up()
                    && now.since(member.met) >= patience
                    && differing >> bucket(**key) & 1 == 1
                    && !listed.contains(key)
            })
            .map(|(key, _)| *key)
            .collect();
        for key in lost {
            changed = true;
            if let Some(member) = self.members.get_mut(&key) {
                member.said = State::Dead;
            }
            self.show(now, key, State::Dead, revision, out);
        }
        changed
    }

    /// What time does: the region out of reach, its members given up, the ended forgotten. True when anything changed.
    pub(super) fn age(
        &mut self,
        now: Time,
        timing: &WideTiming,
        judges: bool,
        revision: u64,
        out: &mut Vec<Effect>,
    ) -> bool {
        if !judges {
            // Whoever becomes a gateway begins to count then.
            self.heard = now;
        }
        let quiet = now.since(self.heard);
        let mut changed = false;
        if quiet >= timing.suspect {
            self.reached = false;
            self.silent.clear();
            let state = if quiet >= timing.suspect + timing.dead { State::Dead } else { State::Suspect };
            let up: Vec<NodeKey> =
                self.members.iter().filter(|(_, member)| member.shown.is_up()).map(|(key, _)| *key).collect();
            for key in up {
                changed |= self.show(now, key, state, revision, out);
            }
        }
        let over: Vec<NodeKey> = self
            .members
            .iter()
            .filter(|(_, member)| !member.shown.is_up() && now.since(member.since) >= timing.removed)
            .map(|(key, _)| *key)
            .collect();
        for key in over {
            self.members.remove(&key);
            out.push(Effect::Forget(key));
        }
        changed
    }

    /// Shows a member in this state, and says so. True when that is another than before.
    fn show(&mut self, now: Time, key: NodeKey, state: State, revision: u64, out: &mut Vec<Effect>) -> bool {
        let Some(member) = self.members.get_mut(&key) else { return false };
        if member.shown == state {
            return false;
        }
        let record = member.record.clone();
        let event = match (member.shown.is_up(), state) {
            (true, State::Alive) => Some(Event::Alive(record)),
            (false, State::Alive) => Some(Event::Joined(record)),
            (true, State::Suspect) => Some(Event::Suspect(record)),
            (true, State::Dead) => Some(Event::Left { record, cause: Cause::Dead }),
            (true, State::Left) => Some(Event::Left { record, cause: Cause::Left }),
            (false, State::Suspect | State::Dead | State::Left) => None,
        };
        if state == State::Suspect && !member.shown.is_up() {
            // Given up, and suspect at home: it comes back when it is alive there.
            return false;
        }
        member.shown = state;
        member.since = now;
        member.revision = revision;
        out.extend(event.map(Effect::Event));
        true
    }
}

/// What two regions compare: equal for equal views of a member. Of the load only the coarse class counts, so that small changes cost
/// nothing on a wide-area link.
pub(super) fn hash_of(record: &SignedRecord, state: State, load: Load) -> u64 {
    let (boot, incarnation) = record.record.version();
    let class = u64::from(load.score / 50) << 1 | u64::from(load.overloaded);
    let words = [record.key.0, boot, u64::from(incarnation), state as u64, class];
    words.into_iter().fold(0x9E37_79B9_7F4A_7C15, |hash: u64, word| {
        let mixed = (hash ^ word).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ mixed >> 29
    })
}
