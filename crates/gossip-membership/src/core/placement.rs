//! Where a key belongs: rendezvous hashing over the members that can take it.
//!
//! Every member gets a score for the key, and the best score wins. A member that leaves takes only its own keys with it,
//! and its keys spread evenly over the others; a member that joins takes its share from all alike. Everybody who sees the same
//! members comes to the same answer, on every machine: there is no floating point in it.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use ring::digest::{SHA256, digest};

use super::record::{NodeKey, Record};

/// A key to place, such as a session's id, hashed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Item(u64);

impl Item {
    /// From any text. The kind of thing is part of it, so that a session and a prompt of one name are placed apart.
    pub fn new(kind: &str, name: &str) -> Self {
        Self(NodeKey::of(&format!("{kind}\0{name}")).0)
    }

    /// From bytes of any kind.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let hash = digest(&SHA256, bytes);
        Self(hash.as_ref().iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte)))
    }
}

/// A member that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The member.
    pub key: NodeKey,
    /// How much it takes compared with others. 1 for everybody when capacities do not matter.
    pub weight: NonZeroU32,
}

impl Slot {
    /// A member like all others.
    pub fn even(key: NodeKey) -> Self {
        Self { key, weight: NonZeroU32::MIN }
    }
}

/// Which members come into question. Empty asks for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wants {
    /// Labels that a member must have, with exactly this value.
    pub labels: BTreeMap<String, String>,
    /// Capabilities that a member must have. A member's value is a list with commas in which the wanted one stands; an empty
    /// wanted value only asks that there is one.
    pub capabilities: BTreeMap<String, String>,
    /// The region, when it matters.
    pub region: Option<String>,
}

impl Wants {
    /// Whether a member with this record will do.
    pub fn fit(&self, record: &Record) -> bool {
        self.region.as_ref().is_none_or(|region| *region == record.region)
            && self.labels.iter().all(|(key, value)| record.labels.get(key) == Some(value))
            && self.capabilities.iter().all(|(key, value)| {
                record.capabilities.get(key).is_some_and(|list| value.is_empty() || names(list, value))
            })
    }
}

fn names(list: &str, value: &str) -> bool {
    list == value || list.split(',').any(|one| one.trim() == value)
}

/// The member that the key belongs to.
pub fn place(item: Item, slots: impl IntoIterator<Item = Slot>) -> Option<NodeKey> {
    slots.into_iter().max_by(|a, b| compare(item, a, b)).map(|slot| slot.key)
}

/// All of them, best first: who is next when the first does not take it.
pub fn rank(item: Item, slots: impl IntoIterator<Item = Slot>) -> Vec<NodeKey> {
    let mut slots: Vec<Slot> = slots.into_iter().collect();
    slots.sort_by(|a, b| compare(item, b, a));
    slots.into_iter().map(|slot| slot.key).collect()
}

/// The best member that is not full: none holds more than `1 + slack_percent / 100` of its share of all that is placed, this item
/// included. `held` says how much a member holds now. Who moves when a member leaves then depends also on who is full.
pub fn place_bounded(
    item: Item,
    slots: impl IntoIterator<Item = Slot>,
    slack_percent: u32,
    held: impl Fn(NodeKey) -> u64,
) -> Option<NodeKey> {
    let slots: Vec<Slot> = slots.into_iter().collect();
    let placed: u64 = slots.iter().map(|slot| held(slot.key)).sum::<u64>() + 1;
    let weights: u64 = slots.iter().map(|slot| u64::from(slot.weight.get())).sum();
    let full = |slot: &Slot| {
        let share = u128::from(placed) * u128::from(slot.weight.get()) * u128::from(100 + slack_percent);
        u128::from(held(slot.key)) >= share.div_ceil(u128::from(weights) * 100)
    };
    slots.iter().filter(|slot| !full(slot)).max_by(|a, b| compare(item, a, b)).map(|slot| slot.key)
}

/// The greater is the better. With `u` evenly spread in (0, 1], `-weight / ln u` gives each member its share by weight; the
/// logarithm's base does not matter, and fractions are compared without dividing.
fn compare(item: Item, a: &Slot, b: &Slot) -> std::cmp::Ordering {
    let (hash_a, hash_b) = (score(item, a.key), score(item, b.key));
    let by_score = if a.weight == b.weight {
        hash_a.cmp(&hash_b)
    } else {
        // weight_a / cost_a against weight_b / cost_b.
        let left = u128::from(a.weight.get()) * u128::from(cost(hash_b));
        let right = u128::from(b.weight.get()) * u128::from(cost(hash_a));
        left.cmp(&right)
    };
    by_score.then(a.key.cmp(&b.key))
}

/// Evenly spread, and different for each pair.
fn score(item: Item, key: NodeKey) -> u64 {
    let mut word = item.0 ^ key.0.rotate_left(32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for multiplier in [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB] {
        word = (word ^ (word >> 31)).wrapping_mul(multiplier);
    }
    word ^ (word >> 31)
}

/// `-log2((hash + 1) / 2^64)` with 48 binary places, at least 1: small for a great hash.
fn cost(hash: u64) -> u64 {
    const PLACES: u32 = 48;
    let value = u128::from(hash) + 1;
    if value > u128::from(u64::MAX) {
        return 1;
    }
    let mut mantissa = value as u64;
    let zeros = mantissa.leading_zeros();
    mantissa <<= zeros;
    // log2 of the mantissa, which stands for a number from 1 to 2, one binary place after the other.
    let mut fraction = 0_u64;
    for _ in 0..PLACES {
        let square = u128::from(mantissa) * u128::from(mantissa);
        let over = square >> 127 == 1;
        fraction = fraction << 1 | u64::from(over);
        mantissa = (square >> if over { 64 } else { 63 }) as u64;
    }
    ((u64::from(zeros) + 1) << PLACES).saturating_sub(fraction).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nodes(swarm: u64, count: u64) -> Vec<NodeKey> {
        (0..count).map(|index| NodeKey::of(&format!("swarm-{swarm}/{index}"))).collect()
    }

    fn even(nodes: &[NodeKey]) -> Vec<Slot> {
        nodes.iter().copied().map(Slot::even).collect()
    }

    fn items(count: u64) -> impl Iterator<Item = Item> {
        (0..count).map(|index| Item::new("session", &index.to_string()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        /// Issue of the handoff: whoever leaves takes only its own keys along.
        #[test]
        fn one_of_thirty_leaves_and_few_keys_move(swarm: u64, gone in 0_usize..30) {
            let nodes = nodes(swarm, 30);
            let mut left = nodes.clone();
            let leaver = left.remove(gone);
            let (before, after) = (even(&nodes), even(&left));
            let (mut moved, mut loads) = (0_u32, BTreeMap::<NodeKey, u32>::new());
            let total = 12_000;
            for item in items(total) {
                let (was, is) = (place(item, before.clone()).unwrap(), place(item, after.clone()).unwrap());
                *loads.entry(was).or_default() += 1;
                if was != is {
                    prop_assert_eq!(was, leaver, "a key moved whose member stayed");
                    moved += 1;
                }
            }
            prop_assert!(f64::from(moved) <= 0.05 * total as f64, "{moved} of {total} moved");
            // 400 each; five standard deviations.
            prop_assert!(loads.len() == 30 && loads.values().all(|load| (300..500).contains(load)), "{loads:?}");
        }

        #[test]
        fn a_member_gets_its_weight(swarm: u64, weight in 2_u32..8) {
            let nodes = nodes(swarm, 10);
            let mut slots = even(&nodes);
            slots[0].weight = NonZeroU32::new(weight).unwrap();
            let total = 20_000;
            let got = items(total).filter(|item| place(*item, slots.clone()) == Some(nodes[0])).count() as f64;
            let due = total as f64 * f64::from(weight) / f64::from(9 + weight);
            prop_assert!((got / due - 1.0).abs() < 0.08, "{got} of {due}");
        }

        #[test]
        fn none_is_overfull(swarm: u64, slack in 1_u32..50) {
            let nodes = nodes(swarm, 12);
            let slots = even(&nodes);
            let mut held = BTreeMap::<NodeKey, u64>::new();
            let total = 1_200;
            for item in items(total) {
                let key = place_bounded(item, slots.clone(), slack, |key| held.get(&key).copied().unwrap_or(0));
                *held.entry(key.unwrap()).or_default() += 1;
            }
            let most = (100 * (100 + u64::from(slack))).div_ceil(100);
            prop_assert!(held.values().all(|held| *held <= most), "{held:?} above {most}");
        }
    }

    #[test]
    fn the_same_on_every_machine() {
        let nodes = nodes(1, 5);
        let slots: Vec<Slot> = nodes
            .iter()
            .zip(1..)
            .map(|(&key, weight)| Slot { key, weight: NonZeroU32::new(weight).unwrap() })
            .collect();
        let places: Vec<usize> = items(12)
            .map(|item| nodes.iter().position(|key| place(item, slots.clone()) == Some(*key)).unwrap())
            .collect();
        assert_eq!(
            places,
            [0, 4, 0, 1, 0, 4, 2, 0, 4, 0, 3, 3],
            "a change here moves every key of every instance at the upgrade"
        );
        let order = rank(Item::new("session", "x"), even(&nodes));
        assert_eq!(Some(order[0]), place(Item::new("session", "x"), even(&nodes)));
        assert_eq!(place(Item::of_bytes(b""), []), None);
    }

    #[test]
    fn the_cost_is_the_logarithm() {
        for hash in [0, 1, 12_345, 1 << 40, u64::MAX / 3, u64::MAX / 2, u64::MAX - 1_000_000] {
            let exact = 64.0 - ((hash as f64) + 1.0).log2();
            let ours = cost(hash) as f64 / (1_u64 << 48) as f64;
            assert!((exact - ours).abs() < 1e-9, "{hash}: {ours} for {exact}");
        }
        assert_eq!(cost(u64::MAX), 1);
    }
}
