//! Which outbox is looked at next, and when. Pure: no clock, no file, no thread.
//!
//! An outbox is *covered* when the system tells of its changes; then a rare look is only the safety net. An uncovered one
//! is polled: often while its node is at work, else seldom. Where no system tells, the beacon of a swarm may speak for all of
//! its quiet outboxes: it is asked as seldom as one of them would be, and they are looked at when it was flashed. Looks that
//! nobody waits for fall into common slots, so that a thousand quiet outboxes wake the process a few times a second at most,
//! and never all at once.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use drover_mailbox::{FLASH_PAUSE, Flash};
use drover_types::{OutboxId, SwarmId};

use crate::refs::NodeKey;

/// Names a followed outbox; never used twice.
pub(crate) type Key = u64;

/// What a look is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Why {
    /// It was just added or moved, or its node became hot or cold.
    Added,
    /// The system told of a change.
    Told,
    /// The last look did not get everything.
    More,
    /// Its node is at work.
    Hot,
    /// It is quiet and its turn has come.
    Cold,
    /// It does not exist yet.
    Waiting,
    /// The beacon of its swarm was flashed.
    Beacon,
}

/// Who tells of changes of an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cover {
    /// Nobody, so it is polled.
    None,
    /// The system, as far as changes of this machine go: another one may write there too.
    Partly,
    /// The system, of every change.
    Whole,
}

impl Why {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Told => "told",
            Self::More => "more",
            Self::Hot => "hot",
            Self::Cold => "cold",
            Self::Waiting => "waiting",
            Self::Beacon => "beacon",
        }
    }
}

/// What a look found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// There is more to read.
    More,
    /// Everything is read.
    Quiet,
    /// The outbox does not exist.
    Missing,
    /// It exists, but its worker has written nothing so far.
    Empty,
    /// It could not be read.
    Failed,
}

/// Two looks at one outbox on the system's word are at least this far apart, so that a busy one is read in batches.
const BATCHING: Duration = Duration::from_millis(2);
/// Common slots of one cold interval.
const SLOTS: u32 = 32;
/// Cold intervals between two looks at an outbox of which somebody else tells.
const NET: u32 = 15;
/// The first retry of an outbox that cannot be read.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Entry {
    id: OutboxId,
    /// When it was added, or when its worker made it after it was missing.
    added: Instant,
    missing: bool,
    looked: Option<Instant>,
    failures: u32,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nowhere: it is being looked at.
    Out,
    Ready,
    Due(Instant, Why),
}

/// What is known of a swarm's beacon.
#[derive(Debug)]
struct Beacon {
    /// When to ask it.
    due: Instant,
    /// What it said; `None` when there is none, or when it was not asked yet.
    said: Option<Flash>,
    /// Whether it was asked.
    asked: bool,
    /// It was flashed, and until then its worker may append without another flash: what comes in that time is looked for too.
    again: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Schedule {
    hot_poll: Duration,
    cold_poll: Duration,
    origin: Instant,
    next_key: Key,
    entries: HashMap<Key, Entry>,
    keys: HashMap<OutboxId, Key>,
    nodes: HashMap<NodeKey, Vec<Key>>,
    hot: HashSet<NodeKey>,
    /// Swarms with outboxes, where beacons are asked.
    beacons: Option<HashMap<SwarmId, Beacon>>,
    ready: VecDeque<(Key, Why)>,
    due: BTreeSet<(Instant, Key)>,
}

impl Schedule {
    /// `beacons`: changes come from other machines, whose workers may say so.
    pub(crate) fn new(hot_poll: Duration, cold_poll: Duration, beacons: bool, origin: Instant) -> Self {
        Self {
            hot_poll,
            cold_poll,
            origin,
            next_key: 0,
            entries: HashMap::new(),
            keys: HashMap::new(),
            nodes: HashMap::new(),
            hot: HashSet::new(),
            beacons: beacons.then(HashMap::new),
            ready: VecDeque::new(),
            due: BTreeSet::new(),
        }
    }

    /// Adds an outbox, or takes one that is there already for new; it is looked at next.
    pub(crate) fn add(&mut self, id: &OutboxId, now: Instant) -> Key {
        let key = self.keys.get(id).copied().unwrap_or_else(|| {
            self.next_key += 1;
            let key = self.next_key;
            self.keys.insert(id.clone(), key);
            self.nodes.entry(NodeKey::of(id)).or_default().push(key);
            let entry =
                Entry { id: id.clone(), added: now, missing: false, looked: None, failures: 0, place: Place::Out };
            self.entries.insert(key, entry);
            key
        });
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.added = now;
            entry.failures = 0;
        }
        if let Some(beacons) = &mut self.beacons {
            let new = || Beacon { due: now, said: None, asked: false, again: None };
            beacons.entry(id.swarm.clone()).or_insert_with(new);
        }
        self.make_ready(key, Why::Added);
        key
    }

    pub(crate) fn remove(&mut self, id: &OutboxId) -> Option<Key> {
        let key = self.keys.remove(id)?;
        self.unplace(key);
        self.entries.remove(&key);
        let node = NodeKey::of(id);
        if let Some(keys) = self.nodes.get_mut(&node) {
            keys.retain(|other| *other != key);
            if keys.is_empty() {
                self.nodes.remove(&node);
            }
        }
        Some(key)
    }

    /// Drops everything of a swarm and returns what it was.
    pub(crate) fn forget(&mut self, swarm: &SwarmId) -> Vec<Key> {
        self.hot.retain(|node| node.swarm != *swarm);
        if let Some(beacons) = &mut self.beacons {
            beacons.remove(swarm);
        }
        let ids: Vec<OutboxId> = self.keys.keys().filter(|id| id.swarm == *swarm).cloned().collect();
        ids.iter().filter_map(|id| self.remove(id)).collect()
    }

    /// A node is at work, or quiet again. Its outboxes are looked at once more either way.
    pub(crate) fn set_hot(&mut self, node: &NodeKey, hot: bool) {
        let changed = if hot { self.hot.insert(node.clone()) } else { self.hot.remove(node) };
        if changed {
            for key in self.nodes.get(node).cloned().unwrap_or_default() {
                self.make_ready(key, Why::Added);
            }
        }
    }

    pub(crate) fn is_hot(&self, id: &OutboxId) -> bool {
        self.hot.contains(&NodeKey::of(id))
    }

    /// The system says that an outbox changed.
    pub(crate) fn told(&mut self, key: Key, now: Instant) {
        let Some(entry) = self.entries.get(&key) else { return };
        match entry.looked.map(|looked| looked + BATCHING) {
            Some(earliest) if earliest > now => self.make_due(key, earliest, Why::Told),
            _ => self.make_ready(key, Why::Told),
        }
    }

    /// The swarm whose beacon is to be asked now.
    pub(crate) fn next_beacon(&self, now: Instant) -> Option<SwarmId> {
        let beacons = self.beacons.as_ref()?;
        beacons.iter().find(|(_, beacon)| beacon.due <= now).map(|(swarm, _)| swarm.clone())
    }

    /// What a beacon said; `None` when there is none, or when it cannot be asked. Its quiet outboxes are looked at when it has changed,
    /// and once more at the next time.
    pub(crate) fn beacon(&mut self, swarm: &SwarmId, said: Option<Flash>, now: Instant) {
        let due = self.origin + self.slot_within(now, Duration::ZERO, 1);
        let Some(beacon) = self.beacons.as_mut().and_then(|beacons| beacons.get_mut(swarm)) else { return };
        beacon.due = due;
        let changed = !std::mem::replace(&mut beacon.asked, true) || beacon.said != said;
        let look = changed || beacon.again.is_some();
        beacon.said = said;
        if changed {
            beacon.again = said.map(|_| now + FLASH_PAUSE);
        } else if beacon.again.is_some_and(|until| until <= now) {
            beacon.again = None;
        }
        if !look {
            return;
        }
        let quiet = |(key, entry): (&Key, &Entry)| {
            let waits = matches!(entry.place, Place::Due(_, Why::Cold));
            (waits && entry.id.swarm == *swarm).then_some(*key)
        };
        let keys: Vec<Key> = self.entries.iter().filter_map(quiet).collect();
        if keys.is_empty() && !self.keys.keys().any(|id| id.swarm == *swarm) {
            // All of its outboxes were dropped.
            if let Some(beacons) = &mut self.beacons {
                beacons.remove(swarm);
            }
        }
        for key in keys {
            self.make_ready(key, Why::Beacon);
        }
    }

    fn is_lit(&self, swarm: &SwarmId) -> bool {
        let beacon = self.beacons.as_ref().and_then(|beacons| beacons.get(swarm));
        beacon.is_some_and(|beacon| beacon.said.is_some())
    }

    /// The outbox to look at now.
    pub(crate) fn next(&mut self, now: Instant) -> Option<(Key, Why)> {
        while let Some(&(at, key)) = self.due.first() {
            if at > now {
                break;
            }
            self.due.pop_first();
            if let Some(entry) = self.entries.get_mut(&key)
                && let Place::Due(_, why) = entry.place
            {
                entry.place = Place::Ready;
                self.ready.push_back((key, why));
            }
        }
        let (key, why) = self.ready.pop_front()?;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.place = Place::Out;
        }
        Some((key, why))
    }

    /// What the look found, and who will tell of the next change.
    pub(crate) fn looked(&mut self, key: Key, found: Found, cover: Cover, now: Instant) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.looked = Some(now);
        entry.failures = if found == Found::Failed { entry.failures.saturating_add(1) } else { 0 };
        if found == Found::Empty && entry.missing {
            entry.added = now;
        }
        entry.missing = found == Found::Missing;
        let (failures, age) = (entry.failures, now.saturating_duration_since(entry.added));
        let node = NodeKey::of(&entry.id);
        let (hot, covered) = (self.hot.contains(&node), cover != Cover::None);
        match found {
            Found::More => self.make_ready(key, Why::More),
            Found::Failed => {
                let pause = RETRY.saturating_mul(1 << failures.saturating_sub(1).min(10));
                self.make_due(key, now + pause.min(self.cold_poll), Why::Waiting);
            }
            _ if hot && !covered => self.make_due(key, now + self.hot_poll, Why::Hot),
            // A worker starts soon or in hours; then it makes its outbox at once and says hello a little later.
            Found::Missing | Found::Empty if !covered => {
                let pause = (age / 8).max(self.hot_poll);
                self.make_due(key, (now + pause).min(self.cold_slot(key, now, 1)), Why::Waiting);
            }
            Found::Quiet | Found::Missing | Found::Empty => {
                let told = cover == Cover::Whole || cover == Cover::None && self.is_lit(&node.swarm);
                self.make_due(key, self.cold_slot(key, now, if told { NET } else { 1 }), Why::Cold);
            }
        }
    }

    /// When to look again if nothing happens before.
    pub(crate) fn wake_at(&self, now: Instant) -> Option<Instant> {
        if !self.ready.is_empty() {
            return Some(now);
        }
        let beacon = self.beacons.iter().flatten().map(|(_, beacon)| beacon.due).min();
        self.due.first().map(|(at, _)| *at).into_iter().chain(beacon).min()
    }

    /// The last slot that is safely within so many cold intervals; the first time a key-dependent one before it.
    fn cold_slot(&self, key: Key, now: Instant, intervals: u32) -> Instant {
        let slot = self.cold_poll / SLOTS;
        let first = self.entries.get(&key).is_none_or(|entry| now.saturating_duration_since(entry.added) < slot * 2);
        // Beacon or not, what was looked at together does not stay together.
        let spread = if first || intervals > 1 { slot * (key % u64::from(SLOTS / 2)) as u32 } else { Duration::ZERO };
        self.origin + self.slot_within(now, spread, intervals)
    }

    fn slot_within(&self, now: Instant, spread: Duration, intervals: u32) -> Duration {
        let slot = self.cold_poll / SLOTS;
        let since = now.saturating_duration_since(self.origin) + slot * (SLOTS * intervals - 2);
        let since = since.saturating_sub(spread);
        let over = since.as_nanos().checked_rem(slot.as_nanos()).unwrap_or(0);
        since.saturating_sub(Duration::from_nanos(over as u64))
    }

    fn make_ready(&mut self, key: Key, why: Why) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.place {
            Place::Ready => return,
            Place::Due(at, _) => {
                self.due.remove(&(at, key));
            }
            Place::Out => {}
        }
        entry.place = Place::Ready;
        self.ready.push_back((key, why));
    }

    fn make_due(&mut self, key: Key, at: Instant, why: Why) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.place {
            Place::Ready => return,
            Place::Due(before, _) if before <= at => return,
            Place::Due(before, _) => {
                self.due.remove(&(before, key));
            }
            Place::Out => {}
        }
        entry.place = Place::Due(at, why);
        self.due.insert((at, key));
    }

    fn unplace(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.place {
            Place::Ready => self.ready.retain(|(other, _)| *other != key),
            Place::Due(at, _) => {
                self.due.remove(&(at, key));
            }
            Place::Out => {}
        }
        entry.place = Place::Out;
    }
}

#[cfg(test)]
mod tests;
