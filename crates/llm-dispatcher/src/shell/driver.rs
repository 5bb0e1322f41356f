//! The task that owns the core.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use drover_service::{Context, now_us};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::call::{CallAnswer, CallError, Delta, FailureKind, Finish, Usage};
use crate::core::{
    AttemptId, BreakerState, Charge, ClientId, Effect, Engine, IdMap, Input, LaneId, LeaseId, Money, Outcome, Refusal,
    Settings, StartKind, Status, TaskId, TaskSpec, Verdict,
};
use crate::ledger::{self, Day, Granted, Ledger, Zone};
use crate::metrics::Metrics;
use crate::shell::charges::Charges;
use crate::shell::client::{End, Message, Queues, Refused, Reply, Tagged, Unwanted};
use crate::shell::{Done, Job, Lane, LaneSnapshot, Lanes, Note, Pool, Snapshot, Work, attempt, words};

/// Messages that are looked at together.
const TOGETHER: usize = 128;
/// Calls that ended that are looked at together: few, so that the first of a thousand answers which come at once is followed by
/// its next call before the last is read.
const ENDED_TOGETHER: usize = 8;
/// Notes that are kept for whoever looks later.
const NOTES: usize = 50;
/// How long calls that were broken off at the end may take to be gone.
const LAST_CALLS: Duration = Duration::from_secs(3);
/// Stands in for a wait without an end.
const FAR: Duration = Duration::from_hours(24);
/// The clock on the wall is looked at this often: it can be set, and a machine can sleep.
const LOOK_AT_CLOCK: Duration = Duration::from_mins(1);

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
    /// The call whose end the core is being told, and what it counted.
    ended: Option<(AttemptId, Option<Usage>)>,
    notes: VecDeque<Note>,
    calls: u64,
    effects: Vec<Effect>,
}

/// Which day it is, by number and by name.
struct Days {
    number: u32,
    names: Vec<Day>,
    next_us: u64,
    /// When to look again whether it has come.
    look: Instant,
    /// The ledger is being asked about it.
    asking: bool,
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
            ended: None,
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

    fn submit(&mut self, id: TaskId, client: ClientId, weight: u32, job: Job, reply: Reply) {
        self.learn_lanes();
        let mut spec = TaskSpec::new(id, Vec::new());
        spec.weight = weight;
        spec.priority = job.priority;
        spec.kind = job.kind;
        spec.deadline = job.within.map(|within| self.now() + within);
        // Two calls would mix their pieces.
        spec.hedge = job.hedge && job.stream.is_none();
        spec.streaming = job.stream.is_some();
        match &job.work {
            Work::Call(request) => {
                spec.input_upper = request.input_upper_bound();
                // Four bytes for a token is a fair guess, and the bound is about the bytes.
                spec.input_likely = spec.input_upper / 4;
                spec.max_tokens = u64::from(request.max_tokens);
                let priced = |lane: &&Arc<Lane>| self.any_price || lane.is_priced_for(spec.input_upper);
                let lanes = job.chain.lanes();
                spec.lanes = lanes.iter().filter(priced).map(|lane| lane.id).collect();
                if spec.lanes.is_empty() && self.cap.is_none() {
                    // Without a cap nothing is counted against it.
                    spec.lanes = lanes.iter().map(|lane| lane.id).collect();
                }
                if spec.lanes.is_empty() && !lanes.is_empty() {
                    return self.refuse(Status::Refused(Refusal::UnknownPrice), None, reply);
                }
            }
            Work::Errand(errand) => match (errand.worst_case(), self.lanes.fees()) {
                (Some(worst), Some(fees)) if !worst.is_zero() => {
                    // The lane of fees counts pico-dollars where others count tokens.
                    spec.input_upper = u64::try_from(worst.pico()).unwrap_or(u64::MAX);
                    spec.lanes.push(fees);
                }
                (None, _) if self.cap.is_some() && !self.any_price => {
                    return self.refuse(Status::Refused(Refusal::UnknownPrice), Some(words::NO_FEE), reply);
                }
                _ => spec.lanes.push(Lanes::ERRANDS),
            },
        }
        let open = Open {
            client,
            work: job.work,
            stream: job.stream,
            reply,
            answers: Vec::new(),
            failed: None,
            started_us: None,
            beside: 0,
        };
        self.tasks.insert(id, Box::new(open));
        self.metrics.open_tasks.inc();
        self.tell(Input::Submit { client, task: spec });
    }

    /// Refuses what the core need not see.
    fn refuse(&self, status: Status, why: Option<&str>, reply: Reply) {
        let now = now_us();
        self.metrics.task(status_name(status));
        let done = Done {
            status,
            answer: None,
            error: why.map_or_else(|| words::error_of(status, None, None), str::to_owned),
            attempts: 0,
            cost: Money::ZERO,
            lane: None,
            started_us: now,
            ended_us: now,
            busy: Duration::ZERO,
            beside: 0,
            cached: false,
        };
        self.answer(reply, done);
    }

    /// Tells the core of lanes that were added meanwhile.
    fn learn_lanes(&mut self) {
        if self.lanes.count() == self.known_lanes {
            return;
        }
        let settings = self.lanes.settings();
        for lane in settings.into_iter().skip(self.known_lanes) {
            self.engine.add_lane(lane);
            self.known_lanes += 1;
        }
    }

    fn all_ended(&mut self, ended: &mut Vec<(AttemptId, End)>) {
        for (attempt, end) in ended.drain(..) {
            self.finished(attempt, end);
        }
    }

    fn finished(&mut self, attempt: AttemptId, end: End) {
        let Some(call) = self.attempts.remove(&attempt) else { return };
        let took = call.began.elapsed();
        self.metrics.under_way.dec();
        if let Some(count) = self.under_way.get_mut(&call.client) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&call.client);
            }
        }
        let mut usage = None;
        let outcome = match end {
            End::Aborted => Outcome::Aborted { charge: Charge::Unknown },
            End::Called(result) => match *result {
                Ok(answer) => {
                    usage = answer.usage;
                    let hints = answer.hints;
                    let blocked = matches!(answer.finish, Finish::Blocked(_));
                    if let Some(task) = self.tasks.get_mut(&call.task) {
                        task.answers.push((attempt, answer, took));
                    }
                    if blocked { Outcome::Blocked { usage } } else { Outcome::Answered { usage, hints } }
                }
                Err(error) => {
                    usage = error.usage;
                    let charge = match error.usage {
                        Some(usage) => Charge::Reported(usage),
                        None if error.maybe_billed => Charge::Unknown,
                        None => Charge::Nothing,
                    };
                    let outcome = Outcome::Failed { kind: error.kind, charge, hints: error.hints };
                    if let Some(task) = self.tasks.get_mut(&call.task) {
                        task.failed = Some((error, took));
                    }
                    outcome
                }
            },
        };
        self.ended = Some((attempt, usage));
        self.tell(Input::Finished { attempt, outcome });
    }

    fn granted(&mut self, id: LeaseId, granted: Result<(), Refused>) {
        let input = match granted {
            Ok(()) => {
                self.ledger_fails = None;
                Input::LeaseGranted { id }
            }
            Err(Refused::Left(available)) => Input::LeaseRefused { id, available },
            Err(Refused::Ledger(error)) => {
                let why = error.to_string();
                if self.ledger_fails.is_none() {
                    let hint = "free or repair the disk of the state directory; nothing is spent until then";
                    self.note(Note {
                        code: "ledger_unusable",
                        message: why.clone(),
                        hint: hint.to_owned(),
                        at_us: now_us(),
                    });
                }
                self.ledger_fails = Some(why);
                Input::LeaseRefused { id, available: Money::ZERO }
            }
        };
        self.tell(input);
    }

    /// When a day is over, what the ledger counts for the next one is asked.
    fn look_at_clock(&mut self, at: Instant) {
        let now = now_us();
        let left = Duration::from_micros(self.days.next_us.saturating_sub(now));
        if self.days.asking || !left.is_zero() {
            self.days.look = at + if left.is_zero() { LOOK_AT_CLOCK } else { left.min(LOOK_AT_CLOCK) };
            return;
        }
        self.days.asking = true;
        self.days.look = at + LOOK_AT_CLOCK;
        let (day, ledger, tell) = (self.zone.day(now), self.ledger.clone(), self.queues.tell.clone());
        self.ctx.spawn("ask for the day", async move {
            let counted = ledger.counted(day).await;
            let _ = tell.send(Message::Day { day, counted }).await;
        });
    }

    fn day(&mut self, day: Day, counted: Option<Money>) {
        self.days.asking = false;
        self.days.look = Instant::now();
        let Some(spent) = counted else {
            // Until the ledger can be read the old day goes on, whose cap holds.
            self.days.next_us = now_us() + 1_000_000;
            return;
        };
        self.days.number += 1;
        self.days.names.push(day);
        self.days.next_us = self.zone.next_day_us(now_us());
        info!(%day, "a new day of the budget");
        self.tell(Input::Day { day: self.days.number, spent });
    }

    fn day_name(&self, number: u32) -> Option<Day> {
        self.days.names.get(number as usize).copied()
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
                    let usage = self.ended.and_then(|(ended, usage)| usage.filter(|_| ended == attempt));
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
        // Kept for its room; nothing was added meanwhile, for effects that cannot be performed are told as messages.
        effects.append(&mut self.effects);
        self.effects = effects;
    }

    fn call(&mut self, attempt: AttemptId, task: TaskId, lane: LaneId, kind: StartKind) {
        let (Some(open), Some(to)) = (self.tasks.get_mut(&task), self.lanes.get(lane)) else {
            // A task that nobody knows has been cancelled, and its call is over before it began.
            self.end_at_once(attempt);
            return;
        };
        let beside = self.under_way.entry(open.client).or_default();
        *beside += 1;
        open.beside = open.beside.max(*beside);
        open.started_us.get_or_insert_with(now_us);
        self.calls += 1;
        self.metrics.under_way.inc();
        self.metrics.call(match kind {
            StartKind::First => "first",
            StartKind::Retry => "retry",
            StartKind::Hedge => "hedge",
        });
        let (keep, kept) = oneshot::channel();
        let call = Call { task, client: open.client, began: Instant::now(), keep: Some(keep) };
        let work = open.work.clone();
        let stream = open.stream.clone();
        self.attempts.insert(attempt, call);
        let ctx = self.ctx.clone();
        let making = AssertUnwindSafe(attempt::make(attempt, work, to, stream, kept, self.queues.tell.clone()));
        let making = making.catch_unwind().map(move |made| {
            made.unwrap_or_else(|_| {
                ctx.fail(anyhow::anyhow!("a call panicked"));
                (attempt, End::Aborted)
            })
        });
        let mut making: BoxFuture<'static, (AttemptId, End)> = Box::pin(making);
        // It begins now, and not behind all those that have something to read. Who is to be woken for it is told when it is looked
        // at among the others, which is before this task waits for anything.
        let begun = making.as_mut().poll(&mut std::task::Context::from_waker(Waker::noop()));
        self.running.push(match begun {
            Poll::Pending => making,
            Poll::Ready(end) => Box::pin(std::future::ready(end)),
        });
    }

    /// Tells the core that a call ended before it began.
    fn end_at_once(&self, attempt: AttemptId) {
        let error = CallError { maybe_billed: false, ..CallError::new(FailureKind::Unsupported, "nobody wants it") };
        self.running.push(Box::pin(std::future::ready((attempt, End::Called(Box::new(Err(error)))))));
    }

    fn want_lease(&mut self, id: LeaseId, day: u32, amount: Money) {
        let (ledger, tell) = (self.ledger.clone(), self.queues.tell.clone());
        let (day, cap) = (self.day_name(day), self.cap);
        self.ctx.spawn("set money aside", async move {
            let granted = match (day, cap) {
                (Some(day), Some(cap)) => match ledger.set_aside(day, amount, cap).await {
                    Ok(Granted::Yes) => Ok(()),
                    Ok(Granted::No { left }) => Err(Refused::Left(left)),
                    Err(error) => Err(Refused::Ledger(error)),
                },
                // The core asks only where there is a cap, and for days that it was told of.
                _ => Err(Refused::Left(Money::ZERO)),
            };
            let _ = tell.send(Message::Lease { id, granted }).await;
        });
    }

    fn charge(&mut self, lane: LaneId, day: u32, amount: Money, estimated: bool, usage: Option<Usage>) {
        if lane == Lanes::ERRANDS {
            return;
        }
        // Fees are told as input, which they are not.
        let usage = usage.filter(|_| Some(lane) != self.lanes.fees());
        self.metrics.spent_usd.inc_by(amount.usd());
        if let Some(usage) = usage {
            self.metrics.tokens(usage.input_tokens, usage.output_tokens);
        }
        self.charges.add(lane, day, amount, estimated, usage);
    }

    async fn write_charges(&mut self) {
        for sum in self.charges.take() {
            let (Some(lane), Some(day)) = (self.lanes.get(sum.lane), self.day_name(sum.day)) else { continue };
            let charge = ledger::Charge {
                day,
                provider: lane.name.clone(),
                model: lane.model.clone(),
                calls: sum.calls,
                amount: sum.amount,
                estimated: sum.estimated,
                usage: sum.usage,
            };
            if let Err(error) = self.ledger.charge(charge).await {
                warn!(%error, "a charge could not be written down");
            }
        }
    }

    fn done(&mut self, task: TaskId, verdict: Verdict) {
        let Some(mut open) = self.tasks.remove(&task) else { return };
        self.metrics.open_tasks.dec();
        self.metrics.task(status_name(verdict.status));
        let won = verdict.winner.and_then(|winner| open.answers.iter().position(|(attempt, ..)| *attempt == winner));
        let (answer, busy) = match won.map(|index| open.answers.swap_remove(index)) {
            Some((_, answer, took)) => (Some(answer), took),
            None => (None, open.failed.as_ref().map_or(Duration::ZERO, |(_, took)| *took)),
        };
        let last = open.failed.as_ref().map(|(error, _)| error.message.as_str());
        let ended_us = now_us();
        let done = Done {
            status: verdict.status,
            answer,
            error: words::error_of(verdict.status, last, self.ledger_fails.as_deref()),
            attempts: verdict.attempts,
            cost: verdict.cost,
            lane: verdict.lane.and_then(|lane| self.lanes.get(lane)).filter(|lane| lane.provider.is_some()),
            started_us: open.started_us.unwrap_or(ended_us),
            ended_us,
            busy,
            beside: open.beside,
            cached: false,
        };
        self.answer(open.reply, done);
    }

    /// Tells whoever waits, if anybody still does.
    fn answer(&self, reply: Reply, done: Done) {
        match reply {
            Reply::One(to) => {
                let _ = to.send(done);
            }
            Reply::Tagged { tag, to } => match to.try_send(Tagged { tag, done }) {
                Err(mpsc::error::TrySendError::Full(tagged)) => {
                    // Its owner has handed in more than it has room for; it must not hold up the others.
                    self.ctx.spawn("late answer", async move {
                        let _ = to.send(tagged).await;
                    });
                }
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            },
        }
    }

    fn note(&mut self, note: Note) {
        if note.code == "hedging_off" {
            // Nobody has to do anything about it.
            debug!("{}", note.message);
            self.metrics.warning(note.code);
            return;
        }
        warn!(code = note.code, hint = note.hint, "{}", note.message);
        self.metrics.warning(note.code);
        if self.notes.len() == NOTES {
            self.notes.pop_front();
        }
        self.notes.push_back(note.clone());
        // Nobody listens most of the time.
        let _: Result<usize, broadcast::error::SendError<Note>> = self.queues.notes.send(note);
    }

    fn snapshot(&self) -> Snapshot {
        let lanes = self.lanes.all().into_iter().filter(|lane| lane.provider.is_some()).filter_map(|lane| {
            let view = self.engine.lane(lane.id)?;
            Some(LaneSnapshot {
                under_way: view.in_flight,
                width: view.width,
                breaker: match view.breaker {
                    BreakerState::Closed => "closed",
                    BreakerState::Open { .. } => "open",
                    BreakerState::HalfOpen { .. } => "half_open",
                },
                lane,
            })
        });
        let waiting = self.tasks.values().filter(|task| task.started_us.is_none()).count();
        Snapshot {
            queued: waiting as u64,
            under_way: self.attempts.len() as u64,
            calls: self.calls,
            lanes: lanes.collect(),
            notes: self.notes.iter().cloned().collect(),
        }
    }
}

/// Calls that have ended by now, as many as are looked at together.
fn poll_ended(
    running: &mut FuturesUnordered<BoxFuture<'static, (AttemptId, End)>>,
    cx: &mut std::task::Context<'_>,
    ended: &mut Vec<(AttemptId, End)>,
) -> Poll<()> {
    while ended.len() < ENDED_TOGETHER
        && let Poll::Ready(Some(end)) = running.poll_next_unpin(cx)
    {
        ended.push(end);
    }
    if ended.is_empty() { Poll::Pending } else { Poll::Ready(()) }
}

/// The word for a status, in results and metrics.
pub(crate) fn status_name(status: Status) -> &'static str {
    match status {
        Status::Answered => "succeeded",
        Status::Blocked => "blocked",
        Status::Failed(_) => "failed",
        Status::Refused(_) => "refused",
        Status::Cancelled => "cancelled",
    }
}

fn lane_of(warning: &crate::core::Warning) -> Option<LaneId> {
    use crate::core::Warning as W;
    match *warning {
        W::RateLimited { lane, .. }
        | W::BreakerOpen { lane, .. }
        | W::BreakerClosed { lane }
        | W::HedgingOff { lane } => Some(lane),
        W::SpendReached { .. } | W::BudgetExhausted { .. } => None,
    }
}
