//! The engine: takes in what happened, says what to do.

mod ending;
mod parts;
mod schedule;
mod tail;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::api::{Effect, Input, Reason, Refusal, Status, Verdict, Warning};
use super::budget::{Purse, Wish};
use super::ids::IdMap;
use super::money::Money;
use super::retry::RetryBudget;
use super::settings::{LaneSettings, Settings};
use super::slots::Workers;
use super::task::{AttemptId, ClientId, LaneId, TaskId, TaskSpec};
use parts::{Attempt, Client, Lane, Pending, Routes, Task, Ticket, Timer, TimerKey};

pub use view::{LaneView, Stats};

/// With nothing to do for so long, free money goes back to the ledger.
const IDLE: Duration = Duration::from_secs(30);

/// So long the ledger's word that nothing is left is believed.
const SHORT_FOR: Duration = Duration::from_secs(5);

/// Decides about every task from its submission to its verdict. See the page of this module for how it is used.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    rng: SmallRng,
    now: Duration,
    /// On their own, because a hash table is half empty now and then.
    tasks: IdMap<TaskId, Box<Task>>,
    attempts: BTreeMap<AttemptId, Attempt>,
    next_attempt: u64,
    clients: IdMap<ClientId, Client>,
    routes: Routes,
    lanes: Vec<Lane>,
    /// Lanes on which calls are under way, or hedges wait.
    active: BTreeSet<LaneId>,
    workers: Workers,
    /// Calls under way that count against the limit on all.
    api_in_flight: u32,
    purse: Purse,
    wishes: Vec<Wish>,
    /// When the ledger said last that nothing is left.
    short_since: Duration,
    exhausted_day: Option<u32>,
    retry_budget: RetryBudget,
    timers: BTreeMap<TimerKey, Timer>,
    next_timer: u64,
    /// When a call that waits for a limit may go.
    turn_wake: Option<Duration>,
    /// Virtual time between chains.
    share_time: u64,
    turns: u64,
    idle_since: Option<Duration>,
}

impl Engine {
    /// An engine with nothing to do. The seed decides nothing but how retries are spread.
    pub fn new(settings: Settings, seed: u64) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            now: Duration::ZERO,
            tasks: IdMap::default(),
            attempts: BTreeMap::new(),
            next_attempt: 1,
            clients: IdMap::default(),
            routes: Routes::default(),
            lanes: settings.lanes.iter().map(|lane| Lane::new(lane.clone(), &settings)).collect(),
            active: BTreeSet::new(),
            workers: Workers::new(settings.max_nodes),
            api_in_flight: 0,
            purse: Purse::new(settings.max_daily_spend, settings.warn_at),
            wishes: Vec::new(),
            short_since: Duration::ZERO,
            exhausted_day: None,
            retry_budget: RetryBudget::new(&settings.retry),
            timers: BTreeMap::new(),
            next_timer: 0,
            turn_wake: None,
            share_time: 0,
            turns: 0,
            idle_since: None,
            settings,
        }
    }

    /// One more place where calls can go.
    pub fn add_lane(&mut self, lane: LaneSettings) -> LaneId {
        let id = LaneId(self.lanes.len() as u16);
        self.lanes.push(Lane::new(lane, &self.settings));
        id
    }

    /// Takes in what happened at that time and appends what is to be done.
    pub fn handle(&mut self, now: Duration, input: Input, out: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        match input {
            Input::Submit { client, task } => self.submit(client, &task, out),
            Input::Cancel { task } => self.complete(task, Status::Cancelled, None, out),
            Input::CancelClient { client } => {
                let tasks = self.clients.get(&client).map(|client| client.tasks.clone()).unwrap_or_default();
                for task in tasks {
                    self.complete(task, Status::Cancelled, None, out);
                }
            }
            Input::Finished { attempt, outcome } => self.finished(attempt, &outcome, out),
            Input::FirstByte { attempt } => self.first_byte(attempt, out),
            Input::Headers { attempt, hints } => {
                if let Some(attempt) = self.attempts.get(&attempt) {
                    self.lanes[usize::from(attempt.lane.0)].limiter.hint(self.now, attempt.started, &hints);
                }
            }
            Input::Day { day, spent } => {
                self.purse.begin_day(day, spent, &mut self.wishes);
                self.exhausted_day = None;
            }
            Input::LeaseGranted { id } => self.purse.granted(id, &mut self.wishes),
            Input::LeaseRefused { id, available } => {
                self.purse.refused(id, available);
                self.short_since = self.now;
            }
            Input::Reconfigure { max_nodes, max_concurrent_api } => {
                self.workers.set_max(max_nodes);
                self.settings.max_nodes = max_nodes;
                self.settings.max_concurrent_api = max_concurrent_api;
            }
            Input::Tick => {}
        }
        self.fire(out);
        self.judge_running(out);
        self.pump(out);
        self.watch_idleness();
        self.speak_wishes(out);
    }

    /// When to call again with [`Input::Tick`] at the latest, if nothing happens before.
    pub fn next_wake(&self) -> Option<Duration> {
        let timer = self.timers.first_key_value().map(|(&(due, _), _)| due);
        let idle = self.idle_since.filter(|_| !self.purse.free().is_zero()).map(|since| since + IDLE);
        [timer, self.turn_wake, self.running_wake(), idle].into_iter().flatten().min()
    }

    fn submit(&mut self, client: ClientId, spec: &TaskSpec, out: &mut Vec<Effect>) {
        let refuse = |refusal: Refusal| Effect::Done { task: spec.id, verdict: not_begun(refusal) };
        if self.tasks.contains_key(&spec.id) {
            out.push(refuse(Refusal::Duplicate));
            return;
        }
        if self.tasks.len() >= self.settings.max_queued.saturating_add(self.attempts.len()) {
            out.push(refuse(Refusal::QueueFull { limit: self.settings.max_queued }));
            return;
        }
        if spec.lanes.is_empty() || spec.lanes.iter().any(|lane| usize::from(lane.0) >= self.lanes.len()) {
            out.push(refuse(Refusal::NoLane));
            return;
        }
        let needs_price = self.purse.has_cap() && !self.settings.allow_unknown_price;
        let payable = |lane: &&LaneId| !needs_price || self.lanes[usize::from(lane.0)].settings.price.is_some();
        let lanes: Vec<LaneId> = spec.lanes.iter().filter(payable).copied().collect();
        if lanes.is_empty() {
            out.push(refuse(Refusal::UnknownPrice));
            return;
        }
        let route = self.routes.intern(&lanes);
        if let Some(deadline) = spec.deadline {
            let allowed = deadline.saturating_sub(self.now);
            let expected = self.expected(client, spec, route);
            if allowed.is_zero() || expected > allowed {
                out.push(refuse(Refusal::Deadline { expected, allowed }));
                return;
            }
        }
        let deadline = spec.deadline.map(|due| self.arm(due, Timer::Deadline(spec.id)));
        let share = self.clients.entry(client).or_default();
        share.tasks.insert(spec.id);
        self.tasks.insert(
            spec.id,
            Box::new(Task {
                client,
                weight: spec.weight.max(1),
                kind: spec.kind,
                deadline,
                input_upper: spec.input_upper,
                tokens: spec.input_likely.saturating_add(spec.max_tokens),
                max_tokens: spec.max_tokens,
                route,
                hedge: spec.hedge,
                streaming: spec.streaming,
                submitted: self.now,
                first_start: None,
                pending: Pending::Queued,
                stamp: 0,
                live: Vec::new(),
                starts: 0,
                hedges: 0,
                failures: 0,
                bad_answers: 0,
                lane_failures: 0,
                rejections: 0,
                committed: None,
                lane: None,
                cost: Money::ZERO,
            }),
        );
        let ticket = Ticket { task: spec.id, stamp: 0 };
        self.routes.busy.insert(route);
        self.routes.get_mut(route).queue.push(client, spec.weight, spec.priority, spec.deadline, ticket);
        self.idle_since = None;
    }

    /// How long a task would probably take that came now.
    fn expected(&self, client: ClientId, spec: &TaskSpec, route: u32) -> Duration {
        let route = self.routes.get(route);
        let usable = route.lanes.iter().find(|lane| self.lanes[usize::from(lane.0)].breaker.allows(self.now));
        let lane = &self.lanes[usize::from(usable.unwrap_or(&route.lanes[0]).0)];
        let ahead = route.queue.ahead(client, spec.weight, spec.priority, true);
        let mut width = lane.width.current().min(self.settings.max_nodes);
        let mut taken = lane.in_flight.max(self.workers.busy().saturating_sub(self.settings.max_nodes - width));
        if lane.settings.api {
            width = width.min(self.settings.max_concurrent_api);
            taken = taken.max(self.api_in_flight.min(width));
        }
        let width = width.max(1);
        let room = width.saturating_sub(taken) as usize;
        let tail = lane.tail(spec.kind);
        let mean = tail.and_then(super::hedge::Tail::mean).unwrap_or_default();
        let places = (ahead + 1).saturating_sub(room) as f64 / f64::from(width);
        let for_place = Duration::from_secs_f64((mean.as_secs_f64() * places).min(1e9));
        let tokens = spec.input_likely.saturating_add(spec.max_tokens);
        let for_limit = lane.limiter.time_for(self.now, ahead, tokens);
        for_place.max(for_limit) + tail.and_then(super::hedge::Tail::usual).unwrap_or_default()
    }

    fn first_byte(&mut self, id: AttemptId, out: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        attempt.first_byte = true;
        if attempt.aborting {
            return;
        }
        let name = attempt.task;
        let Some(task) = self.tasks.get_mut(&name) else { return };
        if !task.streaming || task.committed.is_some() {
            return;
        }
        // From here on the client has seen words of this try; no other may speak.
        task.committed = Some(id);
        let others: Vec<AttemptId> = task.live.iter().copied().filter(|&other| other != id).collect();
        self.leave_queue(name);
        for other in others {
            self.abort(other, out);
        }
    }

    fn arm(&mut self, due: Duration, timer: Timer) -> TimerKey {
        let key = (due, self.next_timer);
        self.next_timer += 1;
        self.timers.insert(key, timer);
        key
    }

    /// Carries out what is due.
    fn fire(&mut self, out: &mut Vec<Effect>) {
        while let Some((&key, &timer)) = self.timers.first_key_value()
            && key.0 <= self.now
        {
            self.timers.remove(&key);
            match timer {
                Timer::Deadline(name) => {
                    if let Some(task) = self.tasks.get_mut(&name) {
                        task.deadline = None;
                    }
                    self.complete(name, Status::Failed(Reason::Deadline), None, out);
                }
                Timer::Retry(name) => {
                    let Some(task) = self.tasks.get_mut(&name) else { continue };
                    task.pending = Pending::Nothing;
                    match self.retry_budget.take(self.now) {
                        Ok(()) => self.queue_again(name),
                        Err(again) => {
                            let key = self.arm(again, Timer::Retry(name));
                            if let Some(task) = self.tasks.get_mut(&name) {
                                task.pending = Pending::Backoff(key);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Puts a task that was tried before at the head of its chain's queue.
    fn queue_again(&mut self, name: TaskId) {
        let Some(task) = self.tasks.get_mut(&name) else { return };
        if task.pending != Pending::Nothing {
            return;
        }
        task.pending = Pending::Queued;
        let ticket = Ticket { task: name, stamp: task.stamp };
        let route = task.route;
        self.routes.busy.insert(route);
        self.routes.get_mut(route).queue.push_returned(ticket);
    }

    /// Takes a task out of wherever its next try waits.
    fn leave_queue(&mut self, name: TaskId) {
        let Some(task) = self.tasks.get_mut(&name) else { return };
        match std::mem::replace(&mut task.pending, Pending::Nothing) {
            Pending::Nothing | Pending::Hedge => {}
            Pending::Queued => self.routes.get_mut(task.route).queue.forget_one(),
            Pending::Backoff(key) => {
                self.timers.remove(&key);
            }
        }
        task.stamp += 1;
    }

    fn watch_idleness(&mut self) {
        if !self.tasks.is_empty() || !self.attempts.is_empty() {
            self.idle_since = None;
            return;
        }
        let since = *self.idle_since.get_or_insert(self.now);
        if self.now >= since + IDLE && !self.purse.free().is_zero() {
            self.purse.rest(&mut self.wishes);
        }
    }

    /// Gives back all money that is free, for an orderly end. Tasks are to be cancelled before, and their calls to have ended.
    pub fn close(&mut self, out: &mut Vec<Effect>) {
        self.purse.rest(&mut self.wishes);
        self.speak_wishes(out);
    }

    fn speak_wishes(&mut self, out: &mut Vec<Effect>) {
        out.extend(self.wishes.drain(..).map(|wish| match wish {
            Wish::Lease { id, day, amount } => Effect::WantLease { id, day, amount },
            Wish::Return { day, amount } => Effect::ReturnLease { day, amount },
        }));
    }

    fn say_exhausted(&mut self, out: &mut Vec<Effect>) {
        let day = self.purse.today();
        if self.exhausted_day.replace(day) != Some(day) {
            out.push(Effect::Warn(Warning::BudgetExhausted { day }));
        }
    }
}

fn not_begun(refusal: Refusal) -> Verdict {
    Verdict {
        status: Status::Refused(refusal),
        winner: None,
        lane: None,
        attempts: 0,
        hedges: 0,
        cost: Money::ZERO,
        waited: Duration::ZERO,
    }
}
