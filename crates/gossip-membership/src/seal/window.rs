//! Which counters of a sender have been seen.

/// The highest counter seen, and which of the 64 up to it. Counters begin at 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Window {
    highest: u64,
    /// Bit n stands for `highest - n`.
    seen: u64,
}

impl Window {
    /// Nothing up to this counter is taken any more.
    pub(super) fn after(highest: u64) -> Self {
        Self { highest, seen: u64::MAX }
    }

    pub(super) fn highest(self) -> u64 {
        self.highest
    }

    /// Whether the counter is new. Nothing changes: the seal has yet to be checked.
    pub(super) fn is_new(self, counter: u64) -> bool {
        match self.highest.checked_sub(counter) {
            None => true,
            Some(behind) => counter != 0 && behind < 64 && self.seen & 1 << behind == 0,
        }
    }

    /// Notes a counter whose seal was good; false when it is not new.
    pub(super) fn note(&mut self, counter: u64) -> bool {
        if !self.is_new(counter) {
            return false;
        }
        match counter.checked_sub(self.highest) {
            Some(ahead) => {
                self.seen = if ahead < 64 { self.seen << ahead } else { 0 } | 1;
                self.highest = counter;
            }
            None => self.seen |= 1 << (self.highest - counter),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_counter_is_taken_once_and_none_that_is_near_is_lost(counters in prop::collection::vec(1_u64..300, 1..400)) {
            let mut window = Window::default();
            let (mut taken, mut highest) = (BTreeSet::new(), 0);
            for counter in counters {
                let near = counter + 64 > highest;
                prop_assert_eq!(window.note(counter), near && !taken.contains(&counter));
                if near {
                    taken.insert(counter);
                    highest = highest.max(counter);
                }
                prop_assert!(!window.is_new(counter) && !window.is_new(0));
            }
        }
    }

    #[test]
    fn the_last_counter_is_no_edge() {
        let mut window = Window::default();
        assert!(window.note(1) && window.note(u64::MAX) && !window.note(u64::MAX) && window.note(u64::MAX - 63));
        assert!(!window.note(u64::MAX - 64));
        assert!(!Window::after(100).is_new(100) && !Window::after(100).is_new(90) && Window::after(100).is_new(101));
    }
}
