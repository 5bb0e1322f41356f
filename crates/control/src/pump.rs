//! Follows the router's event log, one stream for all clients, and picks up where it left off when the stream breaks.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::failure_of;
use drover_proto::router as pb;
use drover_service::{Caller, Context, Door};
use tonic::Status;
use tracing::{debug, warn};

use crate::hub::{Encoded, Hub};
use crate::outbox::Chunk;
use crate::translate::push_event;
use crate::upstream::Upstream;

/// A chunk is closed when it has this many bytes. One chunk under way is what a client that is cut off still gets.
const CHUNK_BYTES: usize = 64 << 10;
/// How long to wait for the router to say where its log stands.
const INFO_PATIENCE: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// After the word to stop, events of what is being finished still go out for this long.
const DRAIN: Duration = Duration::from_secs(1);

/// Runs until the daemon shuts down.
pub(crate) async fn follow_events(ctx: Context, hub: Arc<Hub>, upstream: Arc<dyn Upstream>) {
    let mut log = Log { hub, upstream, position: None };
    let follow = async {
        let mut retry = FIRST_RETRY;
        loop {
            let before = log.position;
            let status = match log.follow().await {
                Ok(()) => Status::unavailable("the event stream ended"),
                Err(status) => status,
            };
            // A stream that brought something has earned a quick retry.
            retry = if log.position > before { FIRST_RETRY } else { (retry * 2).min(LAST_RETRY) };
            if ctx.shutdown().is_cancelled() {
                // A router that ends with us has nothing more to tell, and one that goes on is not followed any longer.
                debug!(reason = %failure_of(&status), "event stream ended");
                return;
            }
            warn!(reason = %failure_of(&status), after_seq = log.position, "event stream broke, resuming");
            log.hub.debug("event stream broke, resuming");
            tokio::time::sleep(retry).await;
        }
    };
    let stop = async {
        ctx.shutdown().cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        () = follow => {}
        () = stop => {}
    }
}

struct Log {
    hub: Arc<Hub>,
    upstream: Arc<dyn Upstream>,
    /// The last event taken; `None` until the log's present end is known.
    position: Option<u64>,
}

impl Log {
    async fn follow(&mut self) -> Result<(), Status> {
        if self.position.is_none() {
            self.find_present().await?;
        }
        let mut stream = self
            .upstream
            .watch(
                Caller::own(Door::JsonLine),
                pb::WatchEventsRequest {
                    after_seq: self.position.unwrap_or(0),
                    from_now: self.position.is_none(),
                    follow: true,
                    swarm_id: String::new(),
                },
            )
            .await?;
        while let Some(batch) = stream.message().await? {
            self.take(batch);
        }
        Ok(())
    }

    /// A router that is busy with its backends may take its time over who it is; the log then starts with what comes.
    async fn find_present(&mut self) -> Result<(), Status> {
        if let Ok(info) = tokio::time::timeout(INFO_PATIENCE, self.upstream.info(Caller::own(Door::JsonLine))).await {
            let position = info?.last_seq;
            self.position = Some(position);
            self.hub.start_at(position);
        } else {
            warn!("the router does not say where its event log stands; starting with the next event");
        }
        Ok(())
    }

    fn take(&mut self, batch: pb::WatchEventsResponse) {
        if batch.first_kept_seq > self.position.unwrap_or(0) + 1 && self.position.is_some() {
            warn!(
                after_seq = self.position,
                first_kept_seq = batch.first_kept_seq,
                "events were forgotten before they were sent"
            );
        }
        let mut events = batch.events;
        if let Some(position) = self.position {
            events.retain(|event| event.seq > position);
        }
        let Some(last) = events.last().map(|event| event.seq) else {
            if self.position.is_none() && batch.live {
                self.hub.start_at(0);
            }
            return;
        };
        let encoded = (!self.hub.is_empty()).then(|| encode(&events));
        self.hub.give_out(last, encoded, || encode(&events));
        self.position = Some(last);
    }
}

/// Each event is encoded once, whoever gets it.
fn encode(events: &[pb::Event]) -> Encoded {
    let mut encoded = Encoded { chunks: Vec::new(), lines: events.len() as u64, ended_requests: Vec::new() };
    let estimate = |event: &pb::Event| event.data.len() + 320;
    let mut rest: usize = events.iter().map(estimate).sum();
    let mut out = Vec::with_capacity(rest.min(CHUNK_BYTES + (CHUNK_BYTES >> 2)));
    for event in events {
        encoded.ended_requests.extend(push_event(&mut out, event));
        rest -= estimate(event);
        if out.len() >= CHUNK_BYTES {
            let full = std::mem::replace(&mut out, Vec::with_capacity(rest.min(CHUNK_BYTES + (CHUNK_BYTES >> 2))));
            encoded.chunks.push(Chunk::events(full.into(), event.seq));
        }
    }
    if let Some(last) = events.last().filter(|_| !out.is_empty()) {
        encoded.chunks.push(Chunk::events(out.into(), last.seq));
    }
    encoded
}
