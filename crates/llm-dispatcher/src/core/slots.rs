//! Workers: as many as allowed, made when needed, used again in every phase.

use super::task::Kind;

/// A worker; its number stays while it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u32);

/// The workers that there are.
#[derive(Debug, Clone)]
pub(super) struct Workers {
    max: u32,
    idle: [Vec<WorkerId>; Kind::ALL.len()],
    /// Numbers of workers that were let go.
    free: Vec<WorkerId>,
    next: u32,
    living: u32,
    busy: u32,
    /// Times that a worker went on with the same kind of work, and with another.
    pub(super) reused: u64,
    pub(super) recycled: u64,
}

impl Workers {
    pub(super) fn new(max: u32) -> Self {
        Self {
            max: max.max(1),
            idle: Default::default(),
            free: Vec::new(),
            next: 0,
            living: 0,
            busy: 0,
            reused: 0,
            recycled: 0,
        }
    }

    pub(super) fn set_max(&mut self, max: u32) {
        self.max = max.max(1);
        for kind in 0..self.idle.len() {
            while self.living > self.max
                && let Some(worker) = self.idle[kind].pop()
            {
                self.let_go(worker);
            }
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.busy < self.max
    }

    pub(super) fn busy(&self) -> u32 {
        self.busy
    }

    pub(super) fn living(&self) -> u32 {
        self.living
    }

    /// One that did the same before, else a new one, else one that did something else.
    pub(super) fn take(&mut self, kind: Kind) -> Option<WorkerId> {
        if !self.has_room() {
            return None;
        }
        let worker = if let Some(worker) = self.idle[kind.index()].pop() {
            self.reused += 1;
            worker
        } else if self.living < self.max {
            self.living += 1;
            self.free.pop().unwrap_or_else(|| {
                self.next += 1;
                WorkerId(self.next - 1)
            })
        } else {
            self.recycled += 1;
            self.idle.iter_mut().find_map(Vec::pop)?
        };
        self.busy += 1;
        Some(worker)
    }

    pub(super) fn release(&mut self, worker: WorkerId, kind: Kind) {
        self.busy -= 1;
        if self.living > self.max {
            self.let_go(worker);
        } else {
            self.idle[kind.index()].push(worker);
        }
    }

    fn let_go(&mut self, worker: WorkerId) {
        self.living -= 1;
        self.free.push(worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_used_again_across_kinds_and_never_exceed_the_limit() {
        let mut workers = Workers::new(3);
        let first: Vec<_> = (0..3).filter_map(|_| workers.take(Kind::Search)).collect();
        assert_eq!((first.len(), workers.take(Kind::Fetch)), (3, None));
        for worker in first {
            workers.release(worker, Kind::Search);
        }
        let next: Vec<_> = (0..3).filter_map(|_| workers.take(Kind::Fetch)).collect();
        assert_eq!((next.len(), workers.living(), workers.recycled), (3, 3, 3));
        workers.set_max(1);
        for worker in next {
            workers.release(worker, Kind::Fetch);
        }
        assert_eq!((workers.living(), workers.take(Kind::Fetch).is_some(), workers.take(Kind::Fetch)), (1, true, None));
    }
}
