//! A provider, a ledger and a clock that exist only as numbers, around the core: hours pass in milliseconds, and the same seed
//! gives the same run. The provider keeps its own count of calls and money, and it is the judge.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::time::Duration;

use drover_llm_dispatcher::call::{FailureKind, LimitHints, Usage};
use drover_llm_dispatcher::core::{
    AttemptId, Charge, ClientId, Effect, Engine, Input, LaneId, Money, Outcome, Settings, StartKind, TaskId, TaskSpec,
    Verdict, Warning,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::provider::SimLane;

pub(crate) fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

pub(crate) fn seconds(count: f64) -> Duration {
    Duration::from_secs_f64(count)
}

/// Fixed seeds, and one that is new in each run, or that of `DROVER_SEED`; a failure names the seed.
#[expect(clippy::print_stdout, reason = "a failed run names its seed")]
pub(crate) fn seeds(fixed: u64) -> Vec<u64> {
    let chosen = std::env::var("DROVER_SEED").ok().and_then(|seed| seed.parse().ok());
    let fresh = chosen.unwrap_or_else(|| rand::rng().random_range(1000..1_000_000_000));
    println!("fresh seed {fresh}");
    (1..=fixed).chain([fresh]).collect()
}

/// How many rounds: the short size is for every day, the whole one is asked for with `DROVER_SIM=whole`.
pub(crate) fn rounds(short: u64, whole: u64) -> u64 {
    if std::env::var("DROVER_SIM").is_ok_and(|size| size == "whole") { whole } else { short }
}

/// The durable side of the budget, as the real ledger keeps it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SimLedger {
    pub(crate) cap: Option<Money>,
    /// What counts against the cap of each day: all that was set aside, less what was given back.
    pub(crate) counted: BTreeMap<u32, Money>,
}

/// A call, with the process that made it; numbers begin anew in each.
type Key = (u32, AttemptId);

#[derive(Debug)]
enum Event {
    Submit(ClientId, TaskSpec),
    Cancel(TaskId),
    Arrives(Key),
    Answers(Key, Box<Outcome>),
    /// The connection of a call that was broken off is seen to be closed.
    Closes(Key),
    Told(Key, Box<Outcome>),
    Lease(drover_llm_dispatcher::core::LeaseId, u32, Money),
    LeaseAnswer(drover_llm_dispatcher::core::LeaseId, Result<(), Money>),
    GiveBack(u32, Money),
    Day(u32),
    Change(usize, fn(&mut SimLane, f64), f64),
}

struct Timed(Duration, u64, Event);

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Travelling,
    AtProvider,
    Gone,
}

/// A call as the provider sees it.
#[derive(Debug, Clone, Copy)]
struct Call {
    task: TaskId,
    lane: usize,
    place: Where,
    aborted: bool,
    /// The core was told of its end.
    told: bool,
    worst: Money,
}

/// How a task ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) at: Duration,
    pub(crate) verdict: Verdict,
}

pub(crate) struct Sim {
    pub(crate) engine: Engine,
    pub(crate) now: Duration,
    pub(crate) rng: SmallRng,
    pub(crate) lanes: Vec<SimLane>,
    pub(crate) ledger: SimLedger,
    pub(crate) ended: HashMap<TaskId, Ended>,
    pub(crate) first_start: HashMap<TaskId, Duration>,
    pub(crate) open: HashSet<TaskId>,
    pub(crate) warnings: Vec<(Duration, Warning)>,
    pub(crate) starts: u64,
    pub(crate) hedges: u64,
    pub(crate) charged: Money,
    /// Worst cases of the calls that were under way when the process died.
    pub(crate) lost: Money,
    /// Calls of the core, and those that were asked for by its wake and did nothing.
    pub(crate) handled: u64,
    pub(crate) idle_wakes: u64,
    pub(crate) today: u32,
    /// What the clients' tasks cost at worst and use, by id, for the provider.
    specs: HashMap<TaskId, TaskSpec>,
    queue: BinaryHeap<Reverse<Timed>>,
    calls: HashMap<Key, Call>,
    process: u32,
    next: u64,
    fsync: Duration,
}

impl Sim {
    pub(crate) fn new(mut settings: Settings, lanes: Vec<SimLane>, seed: u64) -> Self {
        settings.lanes = lanes.iter().map(|lane| lane.settings.clone()).collect();
        let cap = settings.max_daily_spend;
        let mut this = Self {
            engine: Engine::new(settings, seed),
            now: Duration::ZERO,
            rng: SmallRng::seed_from_u64(seed ^ 0x5eed),
            lanes,
            ledger: SimLedger { cap, counted: BTreeMap::new() },
            ended: HashMap::new(),
            first_start: HashMap::new(),
            open: HashSet::new(),
            warnings: Vec::new(),
            starts: 0,
            hedges: 0,
            charged: Money::ZERO,
            lost: Money::ZERO,
            handled: 0,
            idle_wakes: 0,
            today: 1,
            specs: HashMap::new(),
            queue: BinaryHeap::new(),
            calls: HashMap::new(),
            process: 0,
            next: 0,
            fsync: ms(2),
        };
        this.tell(Input::Day { day: 1, spent: Money::ZERO });
        this
    }

    /// The process dies: what was under way stays with the provider, and what was on the way to the disk may or may not
    /// have got there. A new one starts from the ledger.
    pub(crate) fn crash(&mut self, mut settings: Settings, seed: u64) -> Vec<TaskSpec> {
        settings.lanes = self.lanes.iter().map(|lane| lane.settings.clone()).collect();
        let events = std::mem::take(&mut self.queue).into_sorted_vec();
        // Oldest first: the disk keeps an order, so what is lost is lost with all that came after it.
        let mut kept = true;
        for Reverse(Timed(at, _, event)) in events.into_iter().rev() {
            match event {
                Event::Lease(_, day, amount) => {
                    kept &= self.rng.random_bool(0.5);
                    if kept && self.room(day) >= amount {
                        *self.ledger.counted.entry(day).or_default() += amount;
                    }
                }
                Event::GiveBack(day, amount) => {
                    kept &= self.rng.random_bool(0.5);
                    if kept {
                        self.give_back(day, amount);
                    }
                }
                // The request is out; the provider takes it or not, and bills it.
                Event::Arrives(attempt) => self.push(at, Event::Arrives(attempt)),
                Event::Answers(attempt, outcome) => self.push(at, Event::Answers(attempt, outcome)),
                Event::Change(lane, change, to) => self.push(at, Event::Change(lane, change, to)),
                Event::Day(day) => self.push(at, Event::Day(day)),
                _ => {}
            }
        }
        for call in self.calls.values_mut().filter(|call| !call.told) {
            call.told = true;
            self.lost += call.worst;
        }
        self.process += 1;
        self.engine = Engine::new(settings, seed);
        // The new process has a clock of its own; ours goes on, which is the harder case.
        let counted = self.ledger.counted.get(&self.today).copied().unwrap_or_default();
        let unfinished: Vec<TaskId> = self.open.drain().collect();
        self.tell(Input::Day { day: self.today, spent: counted });
        let mut again: Vec<TaskSpec> = unfinished.iter().filter_map(|task| self.specs.get(task).cloned()).collect();
        again.sort_by_key(|spec| spec.id);
        again
    }

    pub(crate) fn submit(&mut self, client: u64, task: TaskSpec) {
        assert!(self.open.insert(task.id), "{:?} twice", task.id);
        self.ended.remove(&task.id);
        self.specs.insert(task.id, task.clone());
        self.tell(Input::Submit { client: ClientId(client), task });
    }

    pub(crate) fn submit_at(&mut self, at: Duration, client: u64, task: TaskSpec) {
        self.push(at, Event::Submit(ClientId(client), task));
    }

    pub(crate) fn cancel_at(&mut self, at: Duration, task: TaskId) {
        self.push(at, Event::Cancel(task));
    }

    pub(crate) fn day_at(&mut self, at: Duration, day: u32) {
        self.push(at, Event::Day(day));
    }

    /// Changes the provider at some time.
    pub(crate) fn change_at(&mut self, at: Duration, lane: usize, change: fn(&mut SimLane, f64), to: f64) {
        self.push(at, Event::Change(lane, change, to));
    }

    /// Runs until nothing is left to do.
    pub(crate) fn run(&mut self) -> Duration {
        self.run_until(Duration::from_hours(10_000));
        self.now
    }

    /// Runs until every task is over.
    pub(crate) fn run_tasks(&mut self) -> Duration {
        while !self.open.is_empty() && self.step(Duration::from_hours(10_000)) {}
        assert!(self.open.is_empty(), "{} tasks are stuck: {:?}", self.open.len(), self.engine.stats());
        self.now
    }

    pub(crate) fn run_until(&mut self, end: Duration) {
        while self.step(end) {}
        if end < Duration::from_hours(10_000) {
            self.now = end;
        }
    }

    /// One event. Says whether there was one before the end.
    pub(crate) fn step(&mut self, end: Duration) -> bool {
        let event = self.queue.peek().map(|Reverse(timed)| timed.0);
        let wake = self.engine.next_wake();
        let Some(at) = [event, wake].into_iter().flatten().min().filter(|&at| at <= end) else { return false };
        assert!(at >= self.now || event.is_none_or(|event| event > at), "an event of the past");
        if event == Some(at) {
            let Reverse(Timed(at, _, event)) = self.queue.pop().unwrap();
            self.now = self.now.max(at);
            self.happen(event);
        } else {
            assert!(wake.unwrap() >= self.now, "a wake of the past: {wake:?} at {:?}", self.now);
            self.now = at;
            let before = self.next;
            let starts = self.starts;
            self.tell(Input::Tick);
            if self.next == before && self.starts == starts {
                self.idle_wakes += 1;
                assert!(
                    self.engine.next_wake().is_none_or(|wake| wake > at),
                    "the core wakes again and again at {at:?}"
                );
            }
        }
        true
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.next += 1;
        self.queue.push(Reverse(Timed(at, self.next, event)));
    }

    pub(crate) fn tell(&mut self, input: Input) {
        let mut out = Vec::new();
        self.handled += 1;
        self.engine.handle(self.now, input, &mut out);
        for effect in out {
            self.perform(&effect);
        }
    }

    fn perform(&mut self, effect: &Effect) {
        match *effect {
            Effect::Start { attempt, task, lane, kind, deadline, .. } => {
                assert!(self.open.contains(&task), "a call for a task that is over");
                assert!(deadline >= self.now);
                self.starts += 1;
                self.hedges += u64::from(kind == StartKind::Hedge);
                self.first_start.entry(task).or_insert(self.now);
                let index = usize::from(lane.0);
                let spec = &self.specs[&task];
                let price = self.lanes[index].settings.price.unwrap_or_default();
                let worst = price.worst(spec.input_upper, spec.max_tokens);
                let key = (self.process, attempt);
                let call = Call { task, lane: index, place: Where::Travelling, aborted: false, told: false, worst };
                self.calls.insert(key, call);
                let at = self.now + self.network(index);
                self.push(at, Event::Arrives(key));
            }
            Effect::Abort { attempt } => {
                let key = (self.process, attempt);
                let call = self.calls.get_mut(&key).expect("a call that was started");
                assert!(!std::mem::replace(&mut call.aborted, true), "broken off twice");
                let index = call.lane;
                let at = self.now + self.network(index);
                self.push(at, Event::Closes(key));
                self.push(self.now, Event::Told(key, Box::new(Outcome::Aborted { charge: Charge::Unknown })));
            }
            Effect::WantLease { id, day, amount } => {
                let cap = self.ledger.cap.expect("a cap");
                let one_percent = Money::from_pico(cap.pico() / 100);
                let dearest = self.specs.values().map(|spec| {
                    let price = |lane: &LaneId| self.lanes[usize::from(lane.0)].settings.price.unwrap_or_default();
                    let worst = spec.lanes.iter().map(|lane| price(lane).worst(spec.input_upper, spec.max_tokens));
                    worst.max().unwrap_or_default()
                });
                if amount > one_percent {
                    assert!(amount <= dearest.max().unwrap_or_default(), "a lease of {amount} under a cap of {cap}");
                }
                self.push(self.now + self.fsync, Event::Lease(id, day, amount));
            }
            Effect::ReturnLease { day, amount } => self.push(self.now + self.fsync * 10, Event::GiveBack(day, amount)),
            Effect::Charged { amount, .. } => self.charged += amount,
            Effect::Done { task, verdict } => {
                assert!(self.open.remove(&task), "{task:?} ended twice, or never began");
                let earlier = self.ended.insert(task, Ended { at: self.now, verdict });
                assert!(earlier.is_none(), "{task:?} has two verdicts");
            }
            Effect::Warn(warning) => self.warnings.push((self.now, warning)),
        }
    }

    fn network(&mut self, lane: usize) -> Duration {
        let (least, most) = self.lanes[lane].network;
        least + most.saturating_sub(least).mul_f64(self.rng.random())
    }

    fn room(&self, day: u32) -> Money {
        self.ledger.cap.unwrap().minus(self.ledger.counted.get(&day).copied().unwrap_or_default())
    }

    fn give_back(&mut self, day: u32, amount: Money) {
        let counted = self.ledger.counted.entry(day).or_default();
        assert!(*counted >= amount, "more comes back than was set aside");
        *counted = counted.minus(amount);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Submit(client, task) => {
                assert!(self.open.insert(task.id));
                self.specs.insert(task.id, task.clone());
                self.tell(Input::Submit { client, task });
            }
            Event::Cancel(task) => self.tell(Input::Cancel { task }),
            Event::Arrives(key) => self.arrive(key),
            Event::Answers(key, outcome) => {
                let call = self.calls.get_mut(&key).unwrap();
                if call.place == Where::AtProvider {
                    call.place = Where::Gone;
                    let index = call.lane;
                    self.lanes[index].in_flight -= 1;
                    let lane = &self.lanes[index];
                    let free = lane.heard + lane.serial;
                    let at = (self.now + self.network(index)).max(free);
                    self.lanes[index].heard = at;
                    self.push(at, Event::Told(key, outcome));
                }
            }
            Event::Closes(key) => {
                let call = self.calls.get_mut(&key).unwrap();
                if std::mem::replace(&mut call.place, Where::Gone) == Where::AtProvider {
                    self.lanes[call.lane].in_flight -= 1;
                }
            }
            Event::Told(key, outcome) => {
                let aborted = matches!(*outcome, Outcome::Aborted { .. });
                let call = self.calls.get_mut(&key).unwrap();
                // The shell tells of one end only: of a call that was broken off, that one. A dead process hears nothing.
                if call.aborted == aborted && !std::mem::replace(&mut call.told, true) {
                    if !aborted {
                        self.calls.remove(&key);
                    }
                    self.tell(Input::Finished { attempt: key.1, outcome: *outcome });
                }
            }
            Event::Lease(id, day, amount) => {
                let room = self.room(day);
                let answer = if room >= amount {
                    *self.ledger.counted.entry(day).or_default() += amount;
                    Ok(())
                } else {
                    Err(room)
                };
                self.push(self.now, Event::LeaseAnswer(id, answer));
            }
            Event::LeaseAnswer(id, Ok(())) => self.tell(Input::LeaseGranted { id }),
            Event::LeaseAnswer(id, Err(available)) => self.tell(Input::LeaseRefused { id, available }),
            Event::GiveBack(day, amount) => self.give_back(day, amount),
            Event::Day(day) => {
                self.today = day;
                let counted = self.ledger.counted.get(&day).copied().unwrap_or_default();
                self.tell(Input::Day { day, spent: counted });
            }
            Event::Change(lane, change, to) => {
                let now = self.now.mul_f64(self.lanes[lane].clock);
                if let Some(bucket) = &mut self.lanes[lane].requests {
                    bucket.fill(now);
                }
                change(&mut self.lanes[lane], to);
            }
        }
    }

    fn arrive(&mut self, key: Key) {
        let call = self.calls[&key];
        if call.place == Where::Gone {
            return;
        }
        let spec = &self.specs[&call.task];
        let tokens = (spec.input_likely + spec.max_tokens) as f64;
        let (input_upper, max_tokens) = (spec.input_upper, spec.max_tokens);
        let now = self.now;
        let back = self.network(call.lane);
        let rng = &mut self.rng;
        let lane = &mut self.lanes[call.lane];
        if lane.down {
            let outcome =
                Outcome::Failed { kind: FailureKind::Server, charge: Charge::Nothing, hints: LimitHints::default() };
            self.calls.get_mut(&key).unwrap().place = Where::Gone;
            self.push(now + back, Event::Told(key, Box::new(outcome)));
            return;
        }
        if let Err(wait) = lane.admit(now, tokens) {
            lane.refused.push(now);
            let hints = lane.hints(true, wait);
            let outcome = Outcome::Failed { kind: FailureKind::RateLimited, charge: Charge::Nothing, hints };
            self.calls.get_mut(&key).unwrap().place = Where::Gone;
            self.push(now + back, Event::Told(key, Box::new(outcome)));
            return;
        }
        lane.accepted.push(now);
        lane.in_flight += 1;
        lane.most_in_flight = lane.most_in_flight.max(lane.in_flight);
        let mut took = if rng.random_bool(lane.slow_share) {
            lane.slow
        } else if lane.sigma > 0.0 {
            let normal: f64 = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
            lane.usual.mul_f64((lane.sigma * normal).exp())
        } else {
            lane.usual.mul_f64(1.0 + lane.spread * rng.random_range(-1.0..=1.0))
        };
        let share = rng.random_range(lane.uses.0..=lane.uses.1);
        let usage = Usage {
            input_tokens: (input_upper as f64 * share) as u64,
            output_tokens: (max_tokens as f64 * share) as u64,
            ..Usage::default()
        };
        let price = lane.settings.price.unwrap_or_default();
        let cost = price.of(&usage);
        assert!(cost <= call.worst);
        let luck: f64 = rng.random();
        let faults = [lane.errors, lane.resets, lane.hung, lane.garbage];
        let mut sum = 0.0;
        let fault = faults.iter().position(|share| {
            sum += share;
            luck < sum
        });
        let failed = |kind, charge| Outcome::Failed { kind, charge, hints: LimitHints::default() };
        // The provider bills what it worked on, whoever still listens; an error of its own it does not bill.
        let (outcome, billed) = match fault {
            None => (Outcome::Answered { usage: Some(usage), hints: lane.hints(false, Duration::ZERO) }, cost),
            Some(0) => (failed(FailureKind::Server, Charge::Nothing), Money::ZERO),
            Some(1) => {
                took = took.mul_f64(0.5);
                (failed(FailureKind::Broken, Charge::Unknown), cost)
            }
            Some(2) => {
                took = Duration::from_hours(1000);
                (failed(FailureKind::Broken, Charge::Unknown), call.worst)
            }
            Some(_) => (failed(FailureKind::Malformed, Charge::Unknown), cost),
        };
        lane.charged += billed;
        self.calls.get_mut(&key).unwrap().place = Where::AtProvider;
        self.push(now + took, Event::Answers(key, Box::new(outcome)));
    }

    pub(crate) fn provider_charged(&self) -> Money {
        self.lanes.iter().map(|lane| lane.charged).sum()
    }

    pub(crate) fn refused(&self) -> usize {
        self.lanes.iter().map(|lane| lane.refused.len()).sum()
    }

    pub(crate) fn answered(&self) -> usize {
        let answered = |ended: &&Ended| ended.verdict.status == drover_llm_dispatcher::core::Status::Answered;
        self.ended.values().filter(answered).count()
    }
}

/// A task on the first lane.
pub(crate) fn task(id: u64) -> TaskSpec {
    TaskSpec { input_upper: 1000, input_likely: 250, max_tokens: 250, ..TaskSpec::new(TaskId(id), vec![LaneId(0)]) }
}

/// So many calls at once, and no other limit.
pub(crate) fn wide(width: u32) -> Settings {
    Settings { max_nodes: width, max_concurrent_api: width, ..Settings::default() }
}
