//! Streams from the router that outlive it: when the connection breaks they are opened again, behind what was seen.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use drover_proto::router as pb;
use tokio::time::Instant;
use tonic::{Response, Status, Streaming};

use crate::app::App;
use crate::client::Rpc;
use crate::fault::{self, Fault};
use crate::start;

/// How long a router may be away before a command gives up.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long it may be away before this command starts it: `up` may be about to.
const BEFORE_STARTING: Duration = Duration::from_secs(2);
/// Pauses between attempts.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(1);

type Opening<T> = Pin<Box<dyn Future<Output = Result<Response<Streaming<T>>, Status>> + Send>>;

/// A stream of answers that is opened again when the connection breaks.
pub(crate) struct Resumable<T> {
    app: App,
    rpc: Rpc,
    /// Opens the stream behind a sequence number; calls that cannot be resumed repeat themselves under the same request id.
    open: Box<dyn FnMut(Rpc, u64) -> Opening<T> + Send>,
    /// Behind what the stream is to be opened.
    after: u64,
    /// Kept here, so that a caller who looks elsewhere for a moment does not make us ask again.
    opening: Option<Opening<T>>,
    current: Option<Streaming<T>>,
    away: Option<Away>,
}

/// One stream that has lost the router, for as long as it has.
struct Lost {
    count: Arc<AtomicU32>,
}

impl Lost {
    /// Says why, unless another stream has said so.
    fn now(app: &App, why: &str) -> Self {
        if app.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            app.screen.note(&format!("lost the router ({why}); reconnecting"));
        }
        Self { count: Arc::clone(&app.lost) }
    }

    fn found(self, app: &App) {
        if self.count.load(Ordering::Relaxed) == 1 {
            app.screen.note("connected again");
        }
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Away {
    lost: Lost,
    since: Instant,
    next_try: Instant,
    pause: Duration,
    why: String,
}

/// What a stream has to say.
pub(crate) enum Step<T> {
    Item(T),
    /// The other side has said all.
    End,
}

impl<T: Send + 'static> Resumable<T> {
    pub(crate) fn new(app: &App, rpc: Rpc, open: impl FnMut(Rpc, u64) -> Opening<T> + Send + 'static) -> Self {
        Self { app: app.clone(), rpc, open: Box::new(open), after: 0, opening: None, current: None, away: None }
    }

    /// The next answer. Can be dropped at any point and called again.
    pub(crate) async fn next(&mut self) -> Result<Step<T>, Fault> {
        loop {
            if let Some(away) = &self.away {
                tokio::time::sleep_until(away.next_try).await;
            }
            if self.current.is_none() {
                let opening = self.opening.get_or_insert_with(|| (self.open)(self.rpc.clone(), self.after));
                let opened = opening.await;
                self.opening = None;
                match opened {
                    Ok(stream) => self.current = Some(stream.into_inner()),
                    Err(status) => {
                        self.broken(&status).await?;
                        continue;
                    }
                }
            }
            let Some(stream) = &mut self.current else { continue };
            match stream.message().await {
                Ok(item) => {
                    if let Some(away) = self.away.take() {
                        away.lost.found(&self.app);
                    }
                    return Ok(item.map_or(Step::End, Step::Item));
                }
                Err(status) => {
                    self.current = None;
                    self.broken(&status).await?;
                }
            }
        }
    }

    /// The stream ended where it should not have: it is opened again.
    pub(crate) async fn cut_short(&mut self) -> Result<(), Fault> {
        self.current = None;
        self.broken(&Status::unavailable("the router ended the stream")).await
    }

    async fn broken(&mut self, status: &Status) -> Result<(), Fault> {
        let slow = drover_proto::failure_of(status).code == drover_types::ErrorCode::SlowSubscriber;
        if !fault::lost(status) && !slow {
            return Err(Fault::of_status(status));
        }
        let now = Instant::now();
        let why = if status.details().is_empty() { fault::deepest(status) } else { status.message().to_owned() };
        let away = self.away.get_or_insert_with(|| Away {
            lost: Lost::now(&self.app, &why),
            since: now,
            next_try: now,
            pause: SHORTEST,
            why: String::new(),
        });
        away.why = why;
        away.next_try = now + away.pause;
        away.pause = (away.pause * 2).min(LONGEST);
        let waited = now - away.since;
        if waited >= PATIENCE {
            return Err(Fault::unreachable(&format!("{} (tried for {} s)", away.why, PATIENCE.as_secs())));
        }
        if waited >= BEFORE_STARTING && self.app.may_start() {
            let state = self.app.state()?;
            start::ensure(&self.app, &state).await?;
        }
        Ok(())
    }
}

/// Opens a stream whose call can be repeated as it is.
pub(crate) fn repeatable<T: Send + 'static, F>(app: &App, rpc: Rpc, call: F) -> Resumable<T>
where
    F: FnMut(Rpc) -> Opening<T> + Send + 'static,
{
    let mut call = call;
    Resumable::new(app, rpc, move |rpc, _| call(rpc))
}

/// Events in the order of the log, each once, over any number of connections.
pub(crate) struct Watch {
    stream: Resumable<pb::WatchEventsResponse>,
    follow: bool,
    told_of_gap: bool,
}

impl Watch {
    /// Events behind `after`, of one swarm when `swarm` is not empty.
    pub(crate) fn new(app: &App, rpc: Rpc, after: u64, swarm: &str, follow: bool) -> Self {
        let swarm_id = swarm.to_owned();
        let mut stream = Resumable::new(app, rpc, move |mut rpc: Rpc, after_seq| {
            let request = pb::WatchEventsRequest { after_seq, swarm_id: swarm_id.clone(), follow, from_now: false };
            Box::pin(async move { rpc.watch_events(request).await })
        });
        stream.after = after;
        Self { stream, follow, told_of_gap: false }
    }

    /// The next events; `None` when the log has been read to its end and nothing is followed.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<pb::Event>>, Fault> {
        loop {
            let Step::Item(answer) = self.stream.next().await? else {
                if !self.follow {
                    return Ok(None);
                }
                self.stream.cut_short().await?;
                continue;
            };
            if answer.first_kept_seq > self.stream.after + 1 && !self.told_of_gap {
                self.told_of_gap = true;
                let first = answer.first_kept_seq;
                self.stream.app.screen.note(&format!("events before {first} are no longer kept (router.keep_events)"));
            }
            let seen = self.stream.after;
            let mut events = answer.events;
            events.retain(|event| event.seq > seen);
            if let Some(last) = events.last() {
                self.stream.after = last.seq;
                return Ok(Some(events));
            }
        }
    }
}
