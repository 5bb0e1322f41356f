//! How unwell this node believes itself to be. A node whose probes fail for reasons of its own probes more slowly and
//! waits longer, instead of accusing others.

use std::time::Duration;

/// 0 is well.
#[derive(Debug, Default)]
pub(super) struct Health {
    score: u8,
}

impl Health {
    /// The worst score.
    const WORST: u8 = 8;

    pub(super) fn score(&self) -> u8 {
        self.score
    }

    /// Gets worse; says whether anything changed.
    pub(super) fn worse(&mut self, by: usize) -> bool {
        let before = self.score;
        self.score = self.score.saturating_add(u8::try_from(by).unwrap_or(u8::MAX)).min(Self::WORST);
        before != self.score
    }

    /// Gets better by one; says whether anything changed.
    pub(super) fn better(&mut self) -> bool {
        let before = self.score;
        self.score = self.score.saturating_sub(1);
        before != self.score
    }

    /// A wait as long as this node's state demands.
    pub(super) fn scale(&self, span: Duration) -> Duration {
        span * (u32::from(self.score) + 1)
    }
}
