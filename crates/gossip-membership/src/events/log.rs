//! The last events in order, for readers that come and go.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::{Event, Kind};

/// Events that are kept for readers that were away for a moment.
const KEPT: usize = 512;

/// Numbers events and keeps the last ones.
#[derive(Debug)]
pub struct Log {
    kept: Mutex<VecDeque<Arc<Event>>>,
    last: watch::Sender<u64>,
}

impl Default for Log {
    fn default() -> Self {
        Self { kept: Mutex::default(), last: watch::Sender::new(0) }
    }
}

impl Log {
    pub(super) fn append(&self, timestamp_us: u64, kind: Kind) -> Arc<Event> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let event = Arc::new(Event { seq: *self.last.borrow() + 1, timestamp_us, kind });
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Arc::clone(&event));
        // Inside the lock, so that a reader who sees the number finds the event.
        self.last.send_replace(event.seq);
        event
    }

    /// The kept events after a number.
    pub fn after(&self, seq: u64) -> Vec<Arc<Event>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter(|event| event.seq > seq).cloned().collect()
    }

    /// Changes with every event; its value is the last number.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}
