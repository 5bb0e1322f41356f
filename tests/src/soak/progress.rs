//! When it is enough: a time, and a least of everything, so that a slow machine takes longer instead of seeing less.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What has to be done at least.
#[derive(Debug, Clone, Copy, Default)]
pub struct Least {
    /// Events that a subscriber has seen.
    pub events: u64,
    /// Swarms that came and went.
    pub swarms: u64,
    /// Sessions that were opened, talked in and closed.
    pub sessions: u64,
    /// Model calls.
    pub calls: u64,
}

/// Beyond its time a run waits so long for what has to be done.
const PATIENCE: Duration = Duration::from_mins(2);

/// What was done so far.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    time: Duration,
    least: Least,
    events: AtomicU64,
    swarms: AtomicU64,
    sessions: AtomicU64,
    calls: AtomicU64,
}

impl Progress {
    pub(super) fn new(time: Duration, least: Least) -> Self {
        Self {
            begun: Instant::now(),
            time,
            least,
            events: AtomicU64::default(),
            swarms: AtomicU64::default(),
            sessions: AtomicU64::default(),
            calls: AtomicU64::default(),
        }
    }

    /// Nothing new is to be begun.
    pub(super) fn is_over(&self) -> bool {
        let past = self.begun.elapsed();
        let enough = |done: &AtomicU64, least| done.load(Ordering::Relaxed) >= least;
        let done = enough(&self.events, self.least.events)
            && enough(&self.swarms, self.least.swarms)
            && enough(&self.sessions, self.least.sessions)
            && enough(&self.calls, self.least.calls);
        past >= self.time && (done || past >= self.time + PATIENCE)
    }

    pub(super) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// So many events were seen in all.
    pub(super) fn seen(&self, events: u64) {
        self.events.store(events, Ordering::Relaxed);
    }

    pub(super) fn swarm(&self) {
        self.swarms.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn session(&self) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
    }

    /// So many calls were made in all.
    pub(super) fn calls(&self, calls: u64) {
        self.calls.store(calls, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_the_time_and_the_work() {
        let least = Least { events: 2, ..Least::default() };
        let slow = Progress::new(Duration::ZERO, least);
        assert!(!slow.is_over(), "nothing was seen yet");
        slow.seen(2);
        assert!(slow.is_over());
        let quick = Progress::new(Duration::from_mins(10), least);
        quick.seen(100);
        assert!(!quick.is_over(), "its time is not over");
    }
}
