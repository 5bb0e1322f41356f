//! Which prompts were ever taken, so that none is taken a second time under another record number.

use std::collections::{HashSet, VecDeque};

use drover_types::InjectionId;

/// Ended prompts that are remembered by id, for a record that is written again under another number: those come within seconds. Older
/// ones are still recognised by their record number.
const REMEMBERED: usize = 4096;

/// Every prompt that has not ended, and the last ones that have.
#[derive(Debug, Default)]
pub(crate) struct History {
    ids: HashSet<InjectionId>,
    ended: VecDeque<(u64, InjectionId)>,
}

impl History {
    pub(crate) fn contains(&self, id: &InjectionId) -> bool {
        self.ids.contains(id)
    }

    pub(crate) fn add(&mut self, id: &InjectionId) {
        self.ids.insert(id.clone());
    }

    /// Notes an end. What stands in the inbox behind `low` is read again by a next generation, which can only know it
    /// by its id: such a prompt is never forgotten.
    pub(crate) fn ended(&mut self, seq: u64, id: InjectionId, low: u64) {
        self.ids.insert(id.clone());
        self.ended.push_back((seq, id));
        while self.ended.len() > REMEMBERED && self.ended.front().is_some_and(|(seq, _)| *seq <= low) {
            if let Some((_, id)) = self.ended.pop_front() {
                self.ids.remove(&id);
            }
        }
    }

    /// The prompts that have ended, in that order.
    pub(crate) fn ended_prompts(&self) -> impl Iterator<Item = &(u64, InjectionId)> {
        self.ended.iter()
    }
}
