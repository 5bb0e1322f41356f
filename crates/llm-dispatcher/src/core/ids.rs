//! Tables by number. The numbers are our own counters, so nobody can choose those that collide, and mixing them once is enough.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A hash table whose keys are numbers of ours.
pub(crate) type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Spreads a counter over all bits.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The golden ratio in 64 bits: neighbours land far apart, in the high bits and, turned round, in the low ones.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::Hash as _;

    use super::*;
    use crate::core::TaskId;

    #[test]
    fn neighbours_differ_in_low_and_high_bits() {
        let hashes: Vec<u64> = (0..1000_u64)
            .map(|n| {
                let mut hasher = IdHasher::default();
                TaskId(n).hash(&mut hasher);
                hasher.finish()
            })
            .collect();
        let low: HashSet<u64> = hashes.iter().map(|hash| hash % 4096).collect();
        let high: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
        assert!(low.len() > 800 && high.len() == 128, "{} {}", low.len(), high.len());
    }
}
