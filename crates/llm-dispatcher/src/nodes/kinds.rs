//! Kinds of tasks that nodes take.

use crate::core::Kind;

/// All of them. Model calls are not among them: they are made by the dispatcher.
pub const KINDS: [Kind; 2] = [Kind::Fetch, Kind::Extract];

/// Some of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Kinds(u8);

impl Kinds {
    /// Those that are named; words that are not known are of another version, and nothing for us.
    pub(super) fn of<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        let mut kinds = Self::default();
        for word in words {
            if let Some(kind) = named(word) {
                kinds.add(kind);
            }
        }
        kinds
    }

    pub(super) fn add(&mut self, kind: Kind) {
        self.0 |= bit(kind);
    }

    pub(super) fn has(self, kind: Kind) -> bool {
        self.0 & bit(kind) != 0
    }
}

/// The kind of that name, when nodes take it.
pub(super) fn named(word: &str) -> Option<Kind> {
    KINDS.into_iter().find(|kind| kind.as_str() == word)
}

fn bit(kind: Kind) -> u8 {
    KINDS.iter().position(|known| *known == kind).map_or(0, |place| 1 << place)
}
