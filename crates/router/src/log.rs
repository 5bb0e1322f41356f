//! The recent end of the event log in memory, for everybody who follows it.
//!
//! Subscribers pull: nobody ever waits for one, and one that stops reading costs nothing but its place in the log. What
//! has left the memory is read from the database.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::core::effects::Event;

/// Most events of a batch.
const MOST_EVENTS: usize = 512;
/// A batch is closed when it has this many bytes: it becomes one message, and those have a limit.
const MOST_BYTES: u64 = 1 << 20;

/// Some committed events, in order and without a gap.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The events.
    pub(crate) events: Vec<Event>,
    /// Bytes of all events that were ever in memory before these.
    before: u64,
    bytes: u64,
}

impl Batch {
    /// Number of the first event.
    pub(crate) fn first(&self) -> u64 {
        self.events.first().map_or(0, |event| event.seq)
    }

    /// Number of the last event.
    pub(crate) fn last(&self) -> u64 {
        self.events.last().map_or(0, |event| event.seq)
    }
}

#[derive(Debug, Default)]
struct Ring {
    batches: VecDeque<Arc<Batch>>,
    bytes: u64,
    /// Bytes of all events that were ever put in.
    total: u64,
}

/// What memory holds behind a position.
#[derive(Debug)]
pub(crate) enum Recent {
    /// Nothing has happened since.
    Present,
    /// These, and perhaps more.
    Batch(Arc<Batch>),
    /// It has left the memory.
    Gone,
}

/// The recent end of the event log.
#[derive(Debug)]
pub(crate) struct EventLog {
    ring: RwLock<Ring>,
    limit: u64,
    last: watch::Sender<u64>,
    first_kept: AtomicU64,
}

impl EventLog {
    pub(crate) fn new(limit: u64, first_kept: u64, last: u64) -> Self {
        Self { ring: RwLock::default(), limit, last: watch::Sender::new(last), first_kept: AtomicU64::new(first_kept) }
    }

    /// Adds committed events and wakes everybody who waits for some.
    pub(crate) fn push(&self, events: Vec<Event>) {
        let Some(last) = events.last().map(|event| event.seq) else { return };
        {
            let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
            let mut rest = events.into_iter();
            loop {
                let mut events = Vec::new();
                let mut bytes = 0;
                while events.len() < MOST_EVENTS && bytes < MOST_BYTES {
                    let Some(event) = rest.next() else { break };
                    bytes += event.weight();
                    events.push(event);
                }
                if events.is_empty() {
                    break;
                }
                let before = ring.total;
                ring.total += bytes;
                ring.bytes += bytes;
                ring.batches.push_back(Arc::new(Batch { events, before, bytes }));
            }
            while ring.bytes > self.limit && ring.batches.len() > 1 {
                if let Some(oldest) = ring.batches.pop_front() {
                    ring.bytes -= oldest.bytes;
                }
            }
        }
        self.last.send_replace(last);
    }

    /// The number of the last committed event.
    pub(crate) fn last(&self) -> u64 {
        *self.last.borrow()
    }

    /// Changes whenever an event is committed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The number of the first event that is kept.
    pub(crate) fn first_kept(&self) -> u64 {
        self.first_kept.load(Ordering::Acquire)
    }

    pub(crate) fn set_first_kept(&self, seq: u64) {
        self.first_kept.store(seq, Ordering::Release);
    }

    /// The batch that holds the event after `position`.
    pub(crate) fn after(&self, position: u64) -> Recent {
        if position >= self.last() {
            return Recent::Present;
        }
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let place = ring.batches.partition_point(|batch| batch.last() <= position);
        match ring.batches.get(place) {
            Some(batch) if batch.first() <= position + 1 => Recent::Batch(Arc::clone(batch)),
            _ => Recent::Gone,
        }
    }

    /// Bytes of all events ever put in.
    pub(crate) fn total(&self) -> u64 {
        self.ring.read().unwrap_or_else(PoisonError::into_inner).total
    }
}

/// How far behind the end a subscriber is, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Backlog {
    seen: u64,
}

impl Backlog {
    /// At the present.
    pub(crate) fn none(log: &EventLog) -> Self {
        Self { seen: log.total() }
    }

    /// Just behind this batch.
    pub(crate) fn passed(&mut self, batch: &Batch) {
        self.seen = batch.before + batch.bytes;
    }

    /// Behind this many more bytes.
    pub(crate) fn passed_bytes(&mut self, bytes: u64) {
        self.seen += bytes;
    }

    pub(crate) fn bytes(self, log: &EventLog) -> u64 {
        log.total().saturating_sub(self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::effects::Word;

    fn events(range: std::ops::RangeInclusive<u64>) -> Vec<Event> {
        range
            .map(|seq| Event {
                seq,
                at: seq,
                happened: seq,
                name: Word::Known("x"),
                swarm: None,
                job: "".into(),
                node: None,
                injection: None,
                data: vec![b' '; 100].into(),
            })
            .collect()
    }

    #[test]
    fn memory_is_bounded_and_says_what_it_has_lost() {
        let log = EventLog::new(10 * 228, 1, 0);
        for start in (1..=100).step_by(5) {
            log.push(events(start..=start + 4));
        }
        assert_eq!(log.last(), 100);
        assert!(matches!(log.after(100), Recent::Present));
        assert!(matches!(log.after(0), Recent::Gone), "the first events have left");
        let Recent::Batch(batch) = log.after(97) else { panic!("the last events are there") };
        assert!(batch.first() <= 98 && batch.last() == 100);
    }

    #[test]
    fn large_events_do_not_share_a_batch() {
        let log = EventLog::new(64 << 20, 1, 0);
        let large = events(1..=20).into_iter().map(|event| Event { data: vec![b' '; 3 << 20].into(), ..event });
        log.push(large.collect());
        let Recent::Batch(batch) = log.after(7) else { panic!("it is there") };
        assert_eq!((batch.first(), batch.last()), (8, 8));
    }
}
