//! Where backends put the latest state of every allocation, and watchers read it.
//!
//! There is no queue per watcher. Each watcher remembers the number of the last change it was given and asks for what is
//! newer: a slow one finds the latest state of each swarm and misses only states that are no longer true. Progress lines
//! are kept in one bounded ring; a watcher that falls behind it misses the oldest.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_types::SwarmId;
use tokio::sync::watch;

use crate::allocation::{Allocation, AllocationState, LaunchProgress};

/// How many progress lines are kept for watchers that are behind.
const PROGRESS_LINES: usize = 1024;

/// Something a watcher has not seen yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// An allocation as it is now.
    Allocation(Arc<Allocation>),
    /// A line of progress.
    Progress(Arc<LaunchProgress>),
}

/// The latest state of every allocation. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Board {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the last change.
    version: u64,
    allocations: BTreeMap<SwarmId, (u64, Arc<Allocation>)>,
    progress: VecDeque<(u64, Arc<LaunchProgress>)>,
}

impl Default for Board {
    fn default() -> Self {
        Self { state: Arc::default(), changed: watch::Sender::new(0) }
    }
}

impl Board {
    /// Puts the state of an allocation; the same state again is no change.
    pub fn put(&self, allocation: Allocation) {
        self.change(|state| {
            if state.allocations.get(&allocation.swarm).is_some_and(|(_, known)| **known == allocation) {
                return false;
            }
            let swarm = allocation.swarm.clone();
            state.allocations.insert(swarm, (state.version + 1, Arc::new(allocation)));
            true
        });
    }

    /// Adds a line of progress.
    pub fn progress(&self, line: LaunchProgress) {
        self.change(|state| {
            if state.progress.len() == PROGRESS_LINES {
                state.progress.pop_front();
            }
            state.progress.push_back((state.version + 1, Arc::new(line)));
            true
        });
    }

    /// Forgets an allocation that has been over for long. Watchers are not told: they know that it is over.
    pub fn forget(&self, swarm: &SwarmId) {
        self.state().allocations.remove(swarm);
    }

    /// The swarms that live and are of these, with the number of their nodes, by id.
    pub(crate) fn living(&self, ours: impl Fn(&Allocation) -> bool) -> Vec<(SwarmId, u32)> {
        let state = self.state();
        let alive = state
            .allocations
            .values()
            .map(|(_, allocation)| allocation)
            .filter(|allocation| !matches!(allocation.state, AllocationState::Completed | AllocationState::Failed))
            .filter(|allocation| ours(allocation));
        alive.map(|allocation| (allocation.swarm.clone(), allocation.nodes.len() as u32)).collect()
    }

    /// Rings at every change.
    pub(crate) fn bell(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// One allocation.
    pub fn get(&self, swarm: &SwarmId) -> Option<Arc<Allocation>> {
        self.state().allocations.get(swarm).map(|(_, allocation)| Arc::clone(allocation))
    }

    /// Every allocation, and a view that goes on from there.
    pub fn watch(&self) -> (Vec<Arc<Allocation>>, Viewer) {
        let changed = self.changed.subscribe();
        let state = self.state();
        let all = state.allocations.values().map(|(_, allocation)| Arc::clone(allocation)).collect();
        (all, Viewer { state: Arc::clone(&self.state), changed, seen: state.version })
    }

    fn change(&self, change: impl FnOnce(&mut State) -> bool) {
        let version = {
            let mut state = self.state();
            if !change(&mut state) {
                return;
            }
            state.version += 1;
            state.version
        };
        self.changed.send_modify(|newest| *newest = version.max(*newest));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One watcher's place in the changes.
#[derive(Debug)]
pub struct Viewer {
    state: Arc<Mutex<State>>,
    changed: watch::Receiver<u64>,
    seen: u64,
}

impl Viewer {
    /// Waits for news and returns all of it, oldest first; `None` when the board is gone.
    pub async fn next(&mut self) -> Option<Vec<Update>> {
        loop {
            let news = self.news();
            if !news.is_empty() {
                return Some(news);
            }
            self.changed.changed().await.ok()?;
        }
    }

    fn news(&mut self) -> Vec<Update> {
        self.changed.mark_unchanged();
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = self.seen;
        let mut news: Vec<(u64, Update)> = state
            .allocations
            .values()
            .filter(|(version, _)| *version > seen)
            .map(|(version, allocation)| (*version, Update::Allocation(Arc::clone(allocation))))
            .collect();
        let lines = state.progress.iter().rev().take_while(|(version, _)| *version > seen);
        news.extend(lines.map(|(version, line)| (*version, Update::Progress(Arc::clone(line)))));
        self.seen = state.version;
        drop(state);
        news.sort_by_key(|(version, _)| *version);
        news.into_iter().map(|(_, update)| update).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::BackendKind;

    fn allocation(swarm: &str, reason: &str) -> Allocation {
        Allocation {
            swarm: swarm.parse().unwrap(),
            job: "local-1".parse().unwrap(),
            state: AllocationState::Running,
            backend_state: "RUNNING".into(),
            reason: reason.into(),
            nodes: Vec::new(),
            backend: BackendKind::Local,
            provider: "local".into(),
        }
    }

    fn line(n: usize) -> LaunchProgress {
        LaunchProgress { swarm: "a".parse().unwrap(), stage: "starting", message: n.to_string() }
    }

    #[tokio::test]
    async fn a_watcher_that_slept_gets_the_latest_state_of_each_swarm_once() {
        let board = Board::default();
        board.put(allocation("a", "old"));
        let (all, mut viewer) = board.watch();
        assert_eq!(all.len(), 1);
        for n in 0..10_000 {
            board.put(allocation("a", &n.to_string()));
            board.put(allocation("b", &n.to_string()));
            board.progress(line(n));
        }
        let news = viewer.next().await.unwrap();
        let states: Vec<_> = news.iter().filter(|update| matches!(update, Update::Allocation(_))).collect();
        assert_eq!(states.len(), 2);
        for state in states {
            assert!(matches!(state, Update::Allocation(allocation) if allocation.reason == "9999"), "{state:?}");
        }
        let lines = news.iter().filter(|update| matches!(update, Update::Progress(_))).count();
        assert_eq!(lines, PROGRESS_LINES);
        assert!(viewer.news().is_empty());
    }

    #[tokio::test]
    async fn the_same_state_again_wakes_nobody() {
        let board = Board::default();
        board.put(allocation("a", "x"));
        let (_, mut viewer) = board.watch();
        board.put(allocation("a", "x"));
        assert!(viewer.news().is_empty());
        board.put(allocation("a", "y"));
        assert_eq!(viewer.next().await.unwrap().len(), 1);
    }
}
