//! The answers that were wanted last, as many as there is room for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::Key;
use super::kept::Kept;

pub(super) struct Memory {
    most: u64,
    bytes: u64,
    /// Counts looks, so that the one wanted longest ago is known.
    clock: u64,
    answers: HashMap<Key, (Arc<Kept>, u64)>,
    by_age: BTreeMap<u64, Key>,
}

impl Memory {
    pub(super) fn new(most: u64) -> Self {
        Self { most, bytes: 0, clock: 0, answers: HashMap::new(), by_age: BTreeMap::new() }
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<Arc<Kept>> {
        let (kept, seen) = self.answers.get_mut(key)?;
        self.by_age.remove(seen);
        self.clock += 1;
        *seen = self.clock;
        self.by_age.insert(self.clock, *key);
        Some(Arc::clone(kept))
    }

    pub(super) fn put(&mut self, key: Key, kept: Arc<Kept>) {
        if kept.bytes > self.most {
            return;
        }
        self.clock += 1;
        self.bytes += kept.bytes;
        if let Some((before, seen)) = self.answers.insert(key, (kept, self.clock)) {
            self.bytes -= before.bytes;
            self.by_age.remove(&seen);
        }
        self.by_age.insert(self.clock, key);
        while self.bytes > self.most {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            if let Some((gone, _)) = self.answers.remove(&oldest) {
                self.bytes -= gone.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{CallAnswer, Finish};

    #[test]
    fn what_was_wanted_longest_ago_makes_room() {
        let kept = |text: &str| Arc::new(Kept { answer: CallAnswer::of(text, Finish::Stop), at: 0, bytes: 100 });
        let key = |n: u8| [n; 32];
        let mut memory = Memory::new(300);
        for n in 0..3 {
            memory.put(key(n), kept("x"));
        }
        assert!(memory.get(&key(0)).is_some());
        memory.put(key(3), kept("x"));
        assert!(memory.get(&key(1)).is_none() && memory.get(&key(0)).is_some() && memory.get(&key(3)).is_some());
        memory.put(key(0), kept("y"));
        assert_eq!((memory.bytes, memory.answers.len(), memory.by_age.len()), (300, 3, 3));
        memory.put(key(9), Arc::new(Kept { answer: CallAnswer::of("", Finish::Stop), at: 0, bytes: 301 }));
        assert!(memory.get(&key(9)).is_none() && memory.answers.len() == 3);
    }
}
