//! The two clocks: one that only goes forward, for everything that is decided, and the wall's, for what people read.

use std::time::Duration;

use tokio::time::Instant;

use crate::core::Time;

/// Counts from the start of the daemon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Now, as the core counts.
    pub(crate) fn now(self) -> Time {
        Time(self.start.elapsed().as_micros() as u64)
    }

    /// When the runtime is to wake us.
    pub(crate) fn instant(self, time: Time) -> Instant {
        // Far enough for anything, and not so far that the addition fails.
        let most = Duration::from_hours(24);
        self.start + Duration::from_micros(time.0).min(self.start.elapsed() + most)
    }
}
