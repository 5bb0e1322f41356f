//! All connected clients, and how far the event log has been given to them.
//!
//! The one rule that everything else rests on: an event reaches every client that was connected when it was given out,
//! and the position moves in the same breath. So a request that reads the position before it calls the router knows of
//! each event of the answer whether it will still come (later than the position) or has been and will not (the answer to
//! a repeated request), and then answers from the call itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use crate::envelope::line;
use crate::metrics::Metrics;
use crate::outbox::{Chunk, Outbox};

/// How long an answer waits for the event log to catch up with it.
const CATCH_UP: Duration = Duration::from_secs(2);
/// How long a request waits for the event log after the start.
const START: Duration = Duration::from_secs(10);

/// The connected clients.
pub(crate) struct Hub {
    clients: Mutex<Clients>,
    /// Sequence number of the last event given out; `None` until the log is known.
    position: watch::Sender<Option<u64>>,
    /// Requests that wait for the event that ends them, by request id.
    ends: Mutex<HashMap<String, Vec<Arc<End>>>>,
    debug: bool,
    pub(crate) metrics: Metrics,
}

#[derive(Default)]
struct Clients {
    next: u64,
    outboxes: HashMap<u64, Arc<Outbox>>,
}

/// Set when the event that ends a request has been given out.
#[derive(Default)]
struct End {
    seen: AtomicBool,
    told: Notify,
}

impl Hub {
    pub(crate) fn new(debug: bool, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            clients: Mutex::default(),
            position: watch::Sender::new(None),
            ends: Mutex::default(),
            debug,
            metrics,
        })
    }

    /// Adds a client: from now on it gets every event.
    pub(crate) fn join(self: &Arc<Self>, outbox: Arc<Outbox>) -> Membership {
        let mut clients = self.clients();
        let id = clients.next;
        clients.next += 1;
        outbox.start_after(self.position().unwrap_or(0));
        clients.outboxes.insert(id, outbox);
        drop(clients);
        self.metrics.connections.inc();
        Membership { hub: Arc::clone(self), id }
    }

    /// Nobody is connected.
    pub(crate) fn is_empty(&self) -> bool {
        self.clients().outboxes.is_empty()
    }

    /// Gives events out and moves the position. `encoded` is `None` when there was nobody to encode for; should somebody
    /// have come meanwhile, `encode` makes up for it.
    pub(crate) fn give_out(&self, position: u64, encoded: Option<Encoded>, encode: impl FnOnce() -> Encoded) {
        let clients = self.clients();
        if !clients.outboxes.is_empty() {
            let encoded = encoded.unwrap_or_else(encode);
            self.metrics.event_lines.inc_by(encoded.lines);
            for outbox in clients.outboxes.values() {
                if !outbox.push_events(&encoded.chunks) {
                    self.metrics.slow_clients.inc();
                }
            }
            self.tell_ends(&encoded.ended_requests);
        }
        self.position.send_replace(Some(position));
    }

    /// Says that the log is known up to here, nothing of it to be given out.
    pub(crate) fn start_at(&self, position: u64) {
        let _clients = self.clients();
        self.position.send_replace(Some(position));
    }

    /// Sends a line that is no event of the log to everybody.
    pub(crate) fn broadcast(&self, line: &Bytes) {
        for outbox in self.clients().outboxes.values() {
            outbox.push_line(line.clone());
        }
    }

    /// With `--debug`: tells everybody what the adapter does.
    pub(crate) fn debug(&self, message: &str) {
        if self.debug {
            self.broadcast(&line("debug", |data| {
                data.text("source", "control");
                data.text("message", message);
            }));
        }
    }

    /// Sequence number of the last event given out.
    pub(crate) fn position(&self) -> Option<u64> {
        *self.position.borrow()
    }

    /// The position, once there is one; `None` when the log cannot be reached.
    pub(crate) async fn started(&self) -> Option<u64> {
        if let Some(position) = self.position() {
            return Some(position);
        }
        let mut position = self.position.subscribe();
        let known = tokio::time::timeout(START, position.wait_for(Option::is_some)).await;
        known.ok().and_then(Result::ok).and_then(|position| *position)
    }

    /// Waits until the event has been given out, so that an answer comes after it; not for ever.
    pub(crate) async fn reached(&self, seq: u64) {
        let mut position = self.position.subscribe();
        let _ = tokio::time::timeout(CATCH_UP, position.wait_for(|position| position.unwrap_or(0) >= seq)).await;
    }

    /// Watches for the event that ends a request.
    pub(crate) fn expect_end(self: &Arc<Self>, request_id: &str) -> ExpectedEnd {
        let end = Arc::new(End::default());
        self.ends().entry(request_id.to_owned()).or_default().push(Arc::clone(&end));
        ExpectedEnd { hub: Arc::clone(self), request_id: request_id.to_owned(), end }
    }

    fn tell_ends(&self, request_ids: &[String]) {
        if request_ids.is_empty() {
            return;
        }
        let ends = self.ends();
        for end in request_ids.iter().filter_map(|id| ends.get(id)).flatten() {
            end.seen.store(true, Ordering::Release);
            end.told.notify_one();
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ends(&self) -> MutexGuard<'_, HashMap<String, Vec<Arc<End>>>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Events ready to be sent.
pub(crate) struct Encoded {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) lines: u64,
    pub(crate) ended_requests: Vec<String>,
}

/// A client's place among the others; leaves when dropped.
pub(crate) struct Membership {
    hub: Arc<Hub>,
    id: u64,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.hub.clients().outboxes.remove(&self.id);
        self.hub.metrics.connections.dec();
    }
}

/// A request that may be ended by an event.
pub(crate) struct ExpectedEnd {
    hub: Arc<Hub>,
    request_id: String,
    end: Arc<End>,
}

impl ExpectedEnd {
    /// The event has been given out.
    pub(crate) fn seen(&self) -> bool {
        self.end.seen.load(Ordering::Acquire)
    }

    /// Waits a while for the event: true when it has been given out.
    pub(crate) async fn seen_within(&self, patience: Duration) -> bool {
        self.seen() || tokio::time::timeout(patience, self.end.told.notified()).await.is_ok()
    }
}

impl Drop for ExpectedEnd {
    fn drop(&mut self) {
        let mut ends = self.hub.ends();
        if let Some(waiting) = ends.get_mut(&self.request_id) {
            waiting.retain(|end| !Arc::ptr_eq(end, &self.end));
            if waiting.is_empty() {
                ends.remove(&self.request_id);
            }
        }
    }
}
