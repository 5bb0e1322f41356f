//! The router's hands: what the core orders, carried out against the other daemons, and what they answer, brought back.

mod allocator;
mod decode;
mod follower;
mod orders;
mod ring;

pub(crate) use allocator::{list_providers, run as run_allocator};
#[cfg(test)]
pub(crate) use decode::Decoder;
pub(crate) use follower::run as run_follower;
pub(crate) use orders::Dispatch;
pub(crate) use ring::{RingChange, RingFile, sent};

use std::time::Duration;

/// Pauses between attempts to reach another daemon.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The pause after a failure; each is twice the one before, up to a ceiling, and a little apart from everybody else's.
    pub(crate) fn after_failure(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(LONGEST);
        pause.mul_f64(0.75 + f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 512.0)
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }
}
