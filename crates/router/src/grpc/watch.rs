//! WatchEvents: past events from the database, recent ones from memory, each once and in order.
//!
//! The stream is pulled. A subscriber that does not read is not polled, holds nothing but its place in the log, and makes
//! nobody wait; when it reads on and has fallen too far behind, it is told where to resume.

use std::sync::Arc;

use drover_proto::router as pb;
use drover_proto::status_of;
use drover_types::{ErrorCode, Failure, SwarmId};
use futures::Stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Service;
use crate::core::effects::Event;
use crate::core::find_by_name;
use crate::log::{Backlog, EventLog, Recent};
use crate::metrics::Metrics;
use crate::store::{Past, Wanted, stopping};

/// One subscriber.
pub(crate) struct Watcher {
    log: Arc<EventLog>,
    past: Past,
    metrics: Metrics,
    shutdown: CancellationToken,
    changes: watch::Receiver<u64>,
    /// Every event up to here has been looked at.
    position: u64,
    swarm: Option<SwarmId>,
    follow: bool,
    /// What was the present when the call came.
    present: u64,
    live: bool,
    backlog: Backlog,
    most_bytes: u64,
    over: bool,
}

impl Watcher {
    pub(crate) fn new(service: &Service, request: &pb::WatchEventsRequest) -> Result<Self, Failure> {
        let log = Arc::clone(&service.shared.log);
        // Before the position: what comes in between is noticed.
        let changes = log.changes();
        let present = log.last();
        if !request.from_now && request.after_seq > present {
            return Err(Failure::new(
                ErrorCode::InvalidRequest,
                format!(
                    "after_seq {} lies beyond the last event, {present}: it is of another event log",
                    request.after_seq
                ),
            )
            .hint("begin with after_seq 0"));
        }
        let swarm = match request.swarm_id.as_str() {
            "" => None,
            // The events of a swarm outlive its entry in the registry, so a whole id needs none.
            name => match find_by_name(&service.shared.registry.load().swarms, name) {
                Ok(view) => view.swarm.swarm_id.parse().ok(),
                Err(failure) if name.len() == 36 => name.parse().map(Some).map_err(|_| failure)?,
                Err(failure) => return Err(failure),
            },
        };
        service.metrics.subscribers.inc();
        Ok(Self {
            backlog: Backlog::none(&log),
            past: service.past.clone(),
            metrics: service.metrics.clone(),
            shutdown: service.ctx.shutdown().clone(),
            changes,
            position: if request.from_now { present } else { request.after_seq },
            swarm,
            follow: request.follow,
            present,
            live: false,
            most_bytes: service.subscriber_max_bytes,
            over: false,
            log,
        })
    }

    /// The answers.
    pub(crate) fn stream(self) -> impl Stream<Item = Result<pb::WatchEventsResponse, Status>> + Send {
        futures::stream::unfold(self, |mut watcher| async move {
            let next = watcher.next().await?;
            if next.is_err() {
                watcher.over = true;
            }
            Some((next.map_err(|failure| status_of(&failure)), watcher))
        })
    }

    async fn next(&mut self) -> Option<Result<pb::WatchEventsResponse, Failure>> {
        loop {
            if self.over {
                return None;
            }
            if self.shutdown.is_cancelled() {
                return Some(Err(stopping().hint(format!("resume with after_seq {}", self.position))));
            }
            if self.live && self.backlog.bytes(&self.log) > self.most_bytes {
                self.metrics.slow_subscribers.inc();
                return Some(Err(self.too_slow()));
            }
            if !self.live && self.position >= self.present {
                self.live = true;
                self.over = !self.follow;
                self.backlog = Backlog::none(&self.log);
                return Some(Ok(pb::WatchEventsResponse { live: true, ..pb::WatchEventsResponse::default() }));
            }
            // Marked as seen before looking: what comes in between is noticed.
            self.changes.borrow_and_update();
            let message = match self.log.after(self.position) {
                Recent::Present => {
                    let shutdown = self.shutdown.clone();
                    tokio::select! {
                        changed = self.changes.changed() => if changed.is_err() { return None },
                        () = shutdown.cancelled() => {}
                    }
                    continue;
                }
                Recent::Batch(batch) => {
                    let events = self.wanted(&batch.events);
                    self.position = batch.last();
                    self.backlog.passed(&batch);
                    pb::WatchEventsResponse { events, ..pb::WatchEventsResponse::default() }
                }
                Recent::Gone => match self.read_past().await {
                    Ok(message) => message,
                    Err(failure) => return Some(Err(failure)),
                },
            };
            if !message.events.is_empty() || message.first_kept_seq != 0 {
                return Some(Ok(message));
            }
        }
    }

    fn wanted(&self, events: &[Event]) -> Vec<pb::Event> {
        let wanted = |event: &&Event| {
            event.seq > self.position
                && (self.follow || event.seq <= self.present)
                && (self.swarm.is_none() || event.swarm == self.swarm)
        };
        events.iter().filter(wanted).map(Event::message).collect()
    }

    async fn read_past(&mut self) -> Result<pb::WatchEventsResponse, Failure> {
        let after = self.position.max(self.log.first_kept().saturating_sub(1));
        let last = if self.follow { self.log.last() } else { self.present };
        let page = self.past.read(Wanted { after, last, swarm: self.swarm.clone() }).await?;
        // Looked at again behind the read: events may have been deleted under it.
        let first_kept = self.log.first_kept();
        let lost = self.position + 1 < first_kept;
        let events: Vec<pb::Event> = page.events.iter().map(Event::message).collect();
        self.backlog.passed_bytes(page.events.iter().map(Event::weight).sum());
        self.position = page.upto.max(after);
        Ok(pb::WatchEventsResponse { events, live: false, first_kept_seq: if lost { first_kept } else { 0 } })
    }

    fn too_slow(&self) -> Failure {
        Failure::new(
            ErrorCode::SlowSubscriber,
            format!(
                "more than {} bytes of events were waiting for this subscriber; resume with after_seq {}",
                self.most_bytes, self.position
            ),
        )
        .hint(format!("call again with after_seq {}; router.subscriber_max_bytes sets the limit", self.position))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.metrics.subscribers.dec();
    }
}
