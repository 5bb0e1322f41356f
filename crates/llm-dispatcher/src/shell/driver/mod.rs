//! The task that owns the core: what comes in, what the core wants done, and the end of it all.
//!
//! ```text
//! jobs (tasks.rs) ──> core ──> calls (calls.rs): begun, broken off, ended
//!                      │└────> money (money.rs): leases, charges, days
//!                      └─────> telling (telling.rs): notes, a look at everything
//! ```

mod calls;
mod money;
mod tasks;
mod telling;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use drover_service::{Context, now_us};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::warn;

use crate::call::{CallAnswer, CallError, Delta, Usage};
use crate::core::{AttemptId, ClientId, Effect, Engine, IdMap, Input, Money, Settings, TaskId};
use crate::ledger::{self, Ledger, Zone};
use crate::metrics::Metrics;
use crate::shell::charges::Charges;
use crate::shell::client::{End, Message, Queues, Reply, Unwanted};
use crate::shell::{Lanes, Note, Pool, Work, words};

pub(crate) use tasks::status_name;

use calls::poll_ended;
use money::Days;
use telling::lane_of;

/// Messages that are looked at together.
const TOGETHER: usize = 128;
/// Calls that ended that are looked at together: few, so that the first of a thousand answers which come at once is followed by
/// its next call before the last is read.
const ENDED_TOGETHER: usize = 8;
/// How long calls that were broken off at the end may take to be gone.
const LAST_CALLS: Duration = Duration::from_secs(3);
/// Stands in for a wait without an end.
const FAR: Duration = Duration::from_hours(24);

/// What the driver needs beside the core's settings.
pub(crate) struct Start {
    pub(crate) settings: Settings,
    pub(crate) lanes: Lanes,
    pub(crate) ledger: Ledger,
    pub(crate) zone: Zone,
    pub(crate) metrics: Metrics,
    /// Seed of everything that is drawn by chance: jitter of retries.
    pub(crate) seed: u64,
}

/// Owns the core and everything that the core does not know.
pub(crate) struct Driver {
    engine: Engine,
    began: Instant,
    queues: Queues,
    lanes: Arc<Lanes>,
    /// Lanes that the core knows.
    known_lanes: usize,
    cap: Option<Money>,
    any_price: bool,
    ledger: Ledger,
    /// Why the ledger gave no money last, while it cannot be written.
    ledger_fails: Option<String>,
    zone: Zone,
    days: Days,
    charges: Charges,
    metrics: Metrics,
    ctx: Context,
    tasks: IdMap<TaskId, Box<Open>>,
    attempts: IdMap<AttemptId, Call>,
    /// What they do. Not tasks of their own: so whoever ends is followed by the next at once, without a queue in between.
    running: FuturesUnordered<BoxFuture<'static, (AttemptId, End)>>,
    /// Calls under way, by client.
    under_way: IdMap<ClientId, u32>,
    /// What calls counted whose end the core was told and that it has not charged yet. Many may end before it is asked what to do.
    counted: IdMap<AttemptId, Usage>,
    notes: VecDeque<Note>,
    calls: u64,
    effects: Vec<Effect>,
}

/// A task that is not over.
struct Open {
    client: ClientId,
    work: Work,
    stream: Option<mpsc::Sender<Delta>>,
    reply: Reply,
    /// Answers that came, by call. There are two at most, when a hedge comes second.
    answers: Vec<(AttemptId, CallAnswer, Duration)>,
    /// How the last call that failed did so.
    failed: Option<(CallError, Duration)>,
    started_us: Option<u64>,
    beside: u32,
}

/// A call under way.
struct Call {
    task: TaskId,
    client: ClientId,
    began: Instant,
    /// Dropped to break the call off.
    keep: Option<oneshot::Sender<()>>,
}

impl Driver {
    /// Puts the core in motion. `counted` is what the ledger counts for today.
    pub(crate) async fn start(start: Start, ctx: &Context) -> Result<(Pool, Self), ledger::LedgerError> {
        let lanes = Arc::new(start.lanes);
        let (pool, queues) = Pool::new(Arc::clone(&lanes));
        let now = now_us();
        let day = start.zone.day(now);
        let counted = start.ledger.counted(day).await?;
        let known_lanes = lanes.count();
        let mut settings = start.settings;
        settings.lanes = lanes.settings();
        let (cap, any_price) = (settings.max_daily_spend, settings.allow_unknown_price);
        let mut driver = Self {
            engine: Engine::new(settings, start.seed),
            began: Instant::now(),
            queues,
            lanes,
            known_lanes,
            cap,
            any_price,
            ledger: start.ledger,
            ledger_fails: None,
            days: Days {
                number: 0,
                names: vec![day],
                next_us: start.zone.next_day_us(now),
                look: Instant::now(),
                asking: false,
            },
            charges: Charges::default(),
            zone: start.zone,
            metrics: start.metrics,
            ctx: ctx.clone(),
            tasks: IdMap::default(),
            attempts: IdMap::default(),
            running: FuturesUnordered::new(),
            under_way: IdMap::default(),
            counted: IdMap::default(),
            notes: VecDeque::new(),
            calls: 0,
            effects: Vec::new(),
        };
        driver.tell(Input::Day { day: 0, spent: counted });
        Ok((pool, driver))
    }

    /// Works until the daemon stops; then breaks off what is under way and leaves the ledger in order.
    pub(crate) async fn run(mut self) {
        let shutdown = self.ctx.shutdown().clone();
        let mut stopping = pin!(shutdown.cancelled());
        let mut alarm = pin!(tokio::time::sleep(FAR));
        let mut batch = Vec::with_capacity(TOGETHER);
        let mut ended = Vec::with_capacity(ENDED_TOGETHER);
        self.perform().await;
        loop {
            let wake = self.next_wake();
            if alarm.deadline() != wake {
                alarm.as_mut().reset(wake);
            }
            tokio::select! {
                biased;
                () = &mut stopping => break,
                Some(unwanted) = self.queues.unwanted.recv() => self.give_up(&unwanted),
                _ = self.queues.messages.recv_many(&mut batch, TOGETHER) => {
                    for message in batch.drain(..) {
                        self.take(message);
                    }
                }
                () = poll_fn(|cx| poll_ended(&mut self.running, cx, &mut ended)) => self.all_ended(&mut ended),
                () = &mut alarm => {
                    // What has arrived by now is heard before anything is called slow.
                    tokio::task::yield_now().await;
                    while poll_fn(|cx| Poll::Ready(poll_ended(&mut self.running, cx, &mut ended))).await.is_ready() {
                        self.all_ended(&mut ended);
                    }
                    self.tell(Input::Tick);
                }
            }
            self.perform().await;
            let now = Instant::now();
            // While nothing is under way nobody is held up, and whoever looks sees the whole.
            if self.attempts.is_empty() || self.charges.due().is_some_and(|due| due <= now) {
                self.write_charges().await;
            }
            if now >= self.days.look {
                self.look_at_clock(now);
            }
        }
        self.stop().await;
    }

    /// When something is to be done at the latest, whatever happens.
    fn next_wake(&self) -> Instant {
        let core = self.engine.next_wake().map_or(self.began + FAR, |at| self.began + at);
        let charges = self.charges.due().unwrap_or(core);
        core.min(charges).min(self.days.look)
    }

    async fn stop(&mut self) {
        let clients: Vec<ClientId> = self.tasks.values().map(|task| task.client).collect();
        for client in clients {
            self.tell(Input::CancelClient { client });
            self.perform().await;
        }
        let deadline = Instant::now() + LAST_CALLS;
        while !self.attempts.is_empty() {
            let ended = tokio::select! {
                ended = self.running.next() => ended,
                () = tokio::time::sleep_until(deadline) => None,
            };
            let Some((attempt, end)) = ended else { break };
            self.finished(attempt, end);
            self.perform().await;
        }
        self.write_charges().await;
        if self.attempts.is_empty()
            && let Err(error) = self.ledger.settle().await
        {
            warn!(%error, "what was set aside stays so, and counts as spent");
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn tell(&mut self, input: Input) {
        self.engine.handle(self.began.elapsed(), input, &mut self.effects);
    }

    fn give_up(&mut self, unwanted: &Unwanted) {
        match *unwanted {
            Unwanted::Task(task) if self.tasks.contains_key(&task) => self.tell(Input::Cancel { task }),
            Unwanted::Task(_) => {}
            Unwanted::Client(client) => self.tell(Input::CancelClient { client }),
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Submit { task, client, weight, job, reply } => self.submit(task, client, weight, *job, reply),
            Message::FirstByte { attempt } => self.tell(Input::FirstByte { attempt }),
            Message::Headers { attempt, hints } => self.tell(Input::Headers { attempt, hints }),
            Message::Lease { id, granted } => self.granted(id, granted),
            Message::Day { day, counted } => self.day(day, counted.ok()),
            Message::Look { reply } => {
                let _ = reply.send(self.snapshot());
            }
        }
    }

    /// Performs what the core wants, in its order.
    async fn perform(&mut self) {
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Start { attempt, task, lane, kind, .. } => self.call(attempt, task, lane, kind),
                Effect::Abort { attempt } => {
                    if let Some(call) = self.attempts.get_mut(&attempt) {
                        call.keep = None;
                    }
                }
                Effect::WantLease { id, day, amount } => self.want_lease(id, day, amount),
                Effect::ReturnLease { day, amount } => {
                    if let Some(day) = self.day_name(day) {
                        let _ = self.ledger.give_back(day, amount).await;
                    }
                }
                Effect::Charged { attempt, lane, day, amount, estimated, .. } => {
                    let usage = self.counted.remove(&attempt);
                    self.charge(lane, day, amount, estimated, usage);
                }
                Effect::Done { task, verdict } => self.done(task, verdict),
                Effect::Warn(warning) => {
                    let lane = lane_of(&warning).and_then(|lane| self.lanes.get(lane));
                    let note = words::note_of(warning, lane.as_deref(), self.now(), now_us());
                    self.note(note);
                }
            }
        }
        // What is not charged now never will be.
        self.counted.clear();
        // Kept for its room; nothing was added meanwhile, for effects that cannot be performed are told as messages.
        effects.append(&mut self.effects);
        self.effects = effects;
    }
}
