//! Whether anybody uses this follower, for one that is to end when nobody does.
//!
//! On a login host a follower belongs to nobody who would end it: whoever started it may have closed the lid of a laptop. What
//! counts as use is a call under way; a Follow stream is one for as long as it is open, and the server closes the streams of
//! clients that do not answer any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Counts calls under way. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Usage(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    under_way: usize,
    since: Instant,
}

/// A call under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Use(Arc<Shared>);

impl Usage {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State { under_way: 0, since: Instant::now() }),
            freed: Notify::new(),
        }))
    }

    /// Notes that a call begins.
    pub(crate) fn begin(&self) -> Use {
        self.0.state().under_way += 1;
        Use(Arc::clone(&self.0))
    }

    /// Returns when there has been no call for so long.
    pub(crate) async fn idle_for(&self, long: Duration) {
        loop {
            let left = {
                let state = self.0.state();
                (state.under_way == 0).then(|| long.saturating_sub(state.since.elapsed()))
            };
            match left {
                Some(Duration::ZERO) => return,
                Some(left) => tokio::time::sleep(left).await,
                None => self.0.freed.notified().await,
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.under_way -= 1;
        state.since = Instant::now();
        // Kept when nobody waits yet, so the last end of a call is never missed.
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_mins(10);

    #[tokio::test(start_paused = true)]
    async fn only_an_unbroken_time_without_calls_counts() {
        let usage = Usage::new();
        let began = Instant::now();
        let (first, second) = (usage.begin(), usage.begin());
        let used = async {
            tokio::time::sleep(LONG * 3).await;
            drop(first);
            tokio::time::sleep(LONG / 2).await;
            drop(second);
            tokio::time::sleep(LONG / 2).await;
            drop(usage.begin());
        };
        tokio::join!(used, usage.idle_for(LONG));
        assert_eq!(began.elapsed(), LONG * 5);
    }
}
