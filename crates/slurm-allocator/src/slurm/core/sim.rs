//! Random histories of a whole cluster in virtual time: a controller that is slow, away, forgetful; answers that are lost; `sbatch`
//! that takes effect long after it was given up; jobs that start, fail, are put back and cancelled from outside; an allocator that
//! is killed anywhere and begins again from its records; a disk that takes no writes.
//!
//! What must hold, always: one submission never makes two jobs; a swarm never has two living jobs; a swarm that is over has none;
//! no minute has more calls than allowed. And at the end of every history: what is not over has its job, what was released is over.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::SwarmId;

use super::{Answer, Call, CallId, Core, Input, JobRecord, Micros, Past, QueueList, Queued, SECOND, Settings};
use crate::slurm::core::swarm::refusal;
use crate::slurm::state::{Class, JobState};
use crate::slurm::tag::Tag;

const CALLS: u32 = 30;
/// Until when things go wrong.
const CHAOS: Micros = 180 * SECOND;
/// When every loose end must have been found.
const END: Micros = 600 * SECOND;
/// The longest that an `sbatch` lives.
const SBATCH: Micros = 46 * SECOND;

/// A small generator of its own, so that a seed means the same history for ever.
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n.max(1)
    }

    fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    fn seconds(&mut self, from: u64, to: u64) -> Micros {
        from * SECOND + self.below((to - from).max(1) * SECOND)
    }
}

#[derive(Debug, Clone)]
struct Job {
    tag: Tag,
    state: &'static str,
    ended: Option<Micros>,
}

impl Job {
    fn lives(&self) -> bool {
        self.ended.is_none()
    }
}

#[derive(Debug, Clone)]
enum Event {
    /// A call reaches the controller, or does not.
    Reach {
        call: CallId,
        life: u32,
        what: Call,
        lose: bool,
        answer_at: Micros,
    },
    /// An answer reaches the allocator, if it is still the one that asked.
    Tell {
        call: CallId,
        life: u32,
        answer: Answer,
    },
    Launch(usize),
    Release(usize, bool),
    Begin(u64),
    End(u64, &'static str),
    PutBack(u64),
    Down(bool),
    Crash,
    Rise,
    DiskFull(bool),
}

struct World {
    dice: Dice,
    now: Micros,
    events: BTreeMap<(Micros, u64), Event>,
    serial: u64,
    jobs: BTreeMap<u64, Job>,
    up: bool,
    disk_full: bool,
    has_history: bool,
    /// How long the queue and the controller show a job that has ended.
    shows_ended: Micros,
    core: Option<Core>,
    /// Counts the allocators that there were.
    life: u32,
    disk: BTreeMap<SwarmId, JobRecord>,
    unsaved: BTreeSet<SwarmId>,
    calls: Vec<Micros>,
    launched: BTreeSet<SwarmId>,
    released: BTreeSet<SwarmId>,
    trace: Vec<String>,
    keeps_trace: bool,
}

fn settings() -> Settings {
    Settings {
        poll: 60 * SECOND,
        calls_per_minute: CALLS,
        keep_over: 1_000_000 * SECOND,
        horizon: 60 * SECOND,
        quiet: 60 * SECOND,
    }
}

fn swarm(n: usize) -> SwarmId {
    format!("s{n}").parse().unwrap()
}

impl World {
    fn new(seed: u64, keeps_trace: bool) -> Self {
        let mut dice = Dice(seed);
        let shows_ended = if dice.percent(30) { 0 } else { 300 * SECOND };
        let mut world = Self {
            now: 1_000_000 * SECOND,
            events: BTreeMap::new(),
            serial: 0,
            jobs: BTreeMap::new(),
            up: true,
            disk_full: false,
            has_history: dice.percent(60),
            shows_ended,
            core: None,
            life: 0,
            disk: BTreeMap::new(),
            unsaved: BTreeSet::new(),
            calls: Vec::new(),
            launched: BTreeSet::new(),
            released: BTreeSet::new(),
            trace: Vec::new(),
            keeps_trace,
            dice,
        };
        world.core = Some(Core::new(settings(), world.now));
        let start = world.now;
        let swarms = 1 + world.dice.below(3) as usize;
        for n in 0..swarms {
            let at = world.dice.seconds(0, 60);
            world.at(start + at, Event::Launch(n));
            if world.dice.percent(60) {
                let (later, force) = (at + world.dice.seconds(0, 200), world.dice.percent(30));
                world.at(start + later, Event::Release(n, force));
            }
        }
        for _ in 0..world.dice.below(3) {
            let at = world.dice.seconds(0, 200);
            world.at(start + at, Event::Down(true));
            let length = world.dice.seconds(1, 60);
            world.at(start + at + length, Event::Down(false));
        }
        for _ in 0..world.dice.below(3) {
            let at = world.dice.seconds(0, 220);
            world.at(start + at, Event::Crash);
        }
        if world.dice.percent(20) {
            let at = world.dice.seconds(0, 100);
            world.at(start + at, Event::DiskFull(true));
            let length = world.dice.seconds(1, 60);
            world.at(start + at + length, Event::DiskFull(false));
        }
        world
    }

    fn at(&mut self, at: Micros, event: Event) {
        self.serial += 1;
        self.events.insert((at, self.serial), event);
    }

    fn chaos(&self) -> bool {
        self.now < 1_000_000 * SECOND + CHAOS
    }

    fn say(&mut self, words: impl FnOnce() -> String) {
        if self.keeps_trace {
            let at = self.now as f64 / 1e6 - 1e6;
            self.trace.push(format!("{at:9.3} {}", words()));
        }
    }

    fn run(&mut self) {
        let end = 1_000_000 * SECOND + END;
        loop {
            self.drive();
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let wake = self.core.as_ref().and_then(Core::next_deadline);
            let unsaved = (self.core.is_some() && !self.unsaved.is_empty()).then_some(self.now + 2 * SECOND);
            let Some(next) = [event, wake, unsaved].into_iter().flatten().min() else { break };
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            while let Some(entry) = self.events.first_entry()
                && entry.key().0 <= self.now
            {
                let event = entry.remove();
                self.say(|| format!("{event:?}"));
                self.happen(event);
            }
        }
        self.judge_end();
    }

    /// The shell: stores, then calls.
    fn drive(&mut self) {
        loop {
            let Some(core) = &mut self.core else { return };
            let step = core.advance(self.now);
            let mut again = false;
            let to_store: BTreeSet<SwarmId> = step.store.into_iter().chain(std::mem::take(&mut self.unsaved)).collect();
            for swarm in to_store {
                if self.disk_full {
                    self.unsaved.insert(swarm);
                } else if let Some(record) = self.core.as_ref().and_then(|core| core.record(&swarm)) {
                    self.disk.insert(swarm, record);
                }
            }
            // Killed between the record and the calls that it announces.
            if self.chaos() && !step.calls.is_empty() && self.dice.percent(1) {
                self.happen(Event::Crash);
                return;
            }
            for (id, call) in step.calls {
                let unsaved = matches!(&call, Call::Submit(tag) if self.unsaved.contains(&tag.swarm));
                if unsaved {
                    if let Some(core) = &mut self.core {
                        core.not_made(self.now, id, "the disk is full");
                    }
                    again = true;
                    continue;
                }
                self.call(id, call);
            }
            self.judge();
            if !again {
                return;
            }
        }
    }

    fn call(&mut self, id: CallId, call: Call) {
        self.calls.extend(std::iter::repeat_n(self.now, call.requests() as usize));
        let recent = self.calls.iter().rev().take_while(|&&at| at + 60 * SECOND > self.now).count();
        assert!(recent <= CALLS as usize, "{recent} requests in a minute");
        self.say(|| format!("call {call:?}"));
        let chaos = self.chaos();
        let slow = if chaos && self.dice.percent(10) { 18 } else { 1 };
        let mut reach_at = self.now + self.dice.below(slow * SECOND);
        let mut answer_at = reach_at + self.dice.below(slow * SECOND);
        let lose = chaos && self.dice.percent(12);
        if lose && matches!(call, Call::Submit(_)) && self.dice.percent(50) {
            // Given up by us, still at work on the login host.
            answer_at = self.now + self.dice.below(10 * SECOND);
            reach_at = self.now + self.dice.below(SBATCH);
        }
        let life = self.life;
        self.at(reach_at, Event::Reach { call: id, life, what: call, lose, answer_at: answer_at.max(self.now + 1) });
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Reach { call, life, what, lose, answer_at } => {
                let lost = |why: &str| match &what {
                    Call::Submit(_) => Answer::Unsure(why.to_owned()),
                    _ => Answer::NotDone(why.to_owned()),
                };
                let never_arrives = lose && self.dice.percent(40);
                let answer = match () {
                    () if never_arrives => lost("cut before"),
                    () if !self.up => Answer::NotDone("connect failure".to_owned()),
                    () => self.controller(&what),
                };
                let answer = if lose { lost("cut") } else { answer };
                self.at(answer_at.max(if lose { 0 } else { self.now }), Event::Tell { call, life, answer });
            }
            Event::Tell { call, life, answer } => {
                if life == self.life
                    && let Some(core) = &mut self.core
                {
                    core.apply(self.now, Input::Answered { call, answer });
                }
            }
            Event::Launch(n) => {
                let Some(core) = &mut self.core else { return self.at(self.now + SECOND, Event::Launch(n)) };
                if self.disk_full {
                    return self.at(self.now + SECOND, Event::Launch(n)); // Refused; the router asks again.
                }
                core.apply(self.now, Input::Launch { swarm: swarm(n), nodes: 2, limit: None });
                self.launched.insert(swarm(n));
            }
            Event::Release(n, force) => {
                let known = self.core.as_ref().is_some_and(|core| core.record(&swarm(n)).is_some());
                if !known || self.disk_full {
                    return self.at(self.now + SECOND, Event::Release(n, force));
                }
                if let Some(core) = &mut self.core {
                    core.apply(self.now, Input::Release { swarm: swarm(n), force });
                }
                self.released.insert(swarm(n));
            }
            Event::Begin(job) => self.begin(job),
            Event::End(job, word) => self.end(job, word),
            Event::PutBack(id) => {
                if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.state == "RUNNING") {
                    job.state = "PENDING";
                    let at = self.now + self.dice.seconds(1, 40);
                    self.at(at, Event::Begin(id));
                }
            }
            Event::Down(down) => self.up = !down,
            Event::DiskFull(full) => self.disk_full = full,
            Event::Crash => {
                if self.core.take().is_some() {
                    self.life += 1;
                    self.unsaved.clear();
                    let at = self.now + self.dice.seconds(0, 40);
                    self.at(at, Event::Rise);
                }
            }
            Event::Rise => {
                let mut core = Core::new(settings(), self.now);
                for (swarm, record) in &self.disk {
                    core.restore(swarm.clone(), record, self.now);
                }
                self.core = Some(core);
                // Each allocator has a budget of its own.
                self.calls.clear();
            }
        }
    }

    fn controller(&mut self, call: &Call) -> Answer {
        match call {
            Call::Queue => Answer::Queue(self.queue()),
            Call::Submit(tag) => {
                if self.chaos() && self.dice.percent(4) {
                    return Answer::Rejected(refusal("Invalid partition name specified"));
                }
                let same: Vec<_> = self.jobs.values().filter(|job| job.tag == *tag).collect();
                assert!(same.is_empty(), "a second job of {tag}");
                let twin = self.jobs.values().any(|job| job.tag.swarm == tag.swarm && job.lives());
                assert!(!twin, "a second living job of swarm {}", tag.swarm);
                let id = 100 + self.jobs.len() as u64;
                self.jobs.insert(id, Job { tag: tag.clone(), state: "PENDING", ended: None });
                let at = self.now + self.dice.seconds(0, 90);
                self.at(at, Event::Begin(id));
                if self.chaos() && self.dice.percent(10) {
                    let at = self.now + self.dice.seconds(0, 100);
                    self.at(at, Event::End(id, "CANCELLED"));
                }
                Answer::Submitted { job: id }
            }
            Call::Cancel { job, kill } => match self.jobs.get(job).map(|job| (job.state, job.lives())) {
                Some(("PENDING", true)) if !kill => {
                    self.end(*job, "CANCELLED");
                    Answer::Cancelled
                }
                Some(("RUNNING", true)) => {
                    if let Some(found) = self.jobs.get_mut(job) {
                        found.state = "COMPLETING";
                    }
                    let at = self.now + self.dice.seconds(0, 30);
                    self.at(at, Event::End(*job, "CANCELLED"));
                    Answer::Cancelled
                }
                Some((_, true)) => Answer::Cancelled,
                _ => Answer::NoSuchJob,
            },
            Call::History { .. } if !self.has_history => Answer::Unsupported("disabled".to_owned()),
            Call::History { names, .. } => {
                let lag = 3 * SECOND;
                let rows = self.jobs.iter().filter(|(_, job)| names.contains(&job.tag.name()));
                let row = |(&id, job): (&u64, &Job)| {
                    let late = job.ended.is_some_and(|ended| ended + lag > self.now);
                    let state = JobState::parse(if late { "RUNNING" } else { job.state });
                    Past { id, tag: Some(job.tag.clone()), state, exit: "0:0".to_owned() }
                };
                Answer::History(rows.map(row).collect())
            }
            Call::Show { job } => match self.jobs.get(job).filter(|job| self.is_shown(job)) {
                Some(found) => Answer::Shown(Some(Past {
                    id: *job,
                    tag: Some(found.tag.clone()),
                    state: JobState::parse(found.state),
                    exit: "1:0".to_owned(),
                })),
                None => Answer::NoSuchJob,
            },
        }
    }

    fn is_shown(&self, job: &Job) -> bool {
        job.ended.is_none_or(|ended| ended + self.shows_ended > self.now)
    }

    fn queue(&mut self) -> QueueList {
        let whole = !(self.chaos() && self.dice.percent(3));
        let mut jobs: Vec<Queued> = self
            .jobs
            .iter()
            .filter(|(_, job)| self.is_shown(job))
            .map(|(&id, job)| Queued {
                id,
                tag: Some(job.tag.clone()),
                state: JobState::parse(job.state),
                reason: "Resources".to_owned(),
                hosts: "n[1-2]".to_owned(),
                starts: String::new(),
            })
            .collect();
        if !whole {
            // Lines that could not be read.
            jobs.retain(|_| false);
        }
        QueueList { jobs, whole }
    }

    fn begin(&mut self, id: u64) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.state == "PENDING" && job.lives()) else { return };
        job.state = "RUNNING";
        if self.chaos() {
            let at = self.now + self.dice.seconds(1, 200);
            match self.dice.below(10) {
                0 => self.at(at, Event::End(id, "COMPLETED")),
                1 => self.at(at, Event::End(id, "NODE_FAIL")),
                2 => self.at(at, Event::End(id, "TIMEOUT")),
                3 => self.at(at, Event::PutBack(id)),
                _ => {}
            }
        }
    }

    fn end(&mut self, id: u64, word: &'static str) {
        let now = self.now;
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.lives()) {
            job.state = word;
            job.ended = Some(now);
        }
    }

    /// What holds at every moment.
    fn judge(&self) {
        let Some(core) = &self.core else { return };
        for job in self.jobs.values().filter(|job| job.lives()) {
            let over = core.view(&job.tag.swarm).is_some_and(|view| view.over);
            assert!(!over, "swarm {} is over and its job lives: {job:?}", job.tag.swarm);
        }
    }

    fn judge_end(&self) {
        let core = self.core.as_ref().expect("an allocator runs");
        for swarm in &self.launched {
            let view = core.view(swarm).unwrap_or_else(|| panic!("swarm {swarm} was forgotten"));
            let living: Vec<u64> =
                self.jobs.iter().filter(|(_, job)| job.tag.swarm == *swarm && job.lives()).map(|(&id, _)| id).collect();
            if view.over {
                assert!(living.is_empty(), "swarm {swarm} is over, its job {living:?} lives");
            } else {
                assert_eq!(view.job.into_iter().collect::<Vec<_>>(), living, "swarm {swarm}: {view:?}");
                assert!(!self.released.contains(swarm), "swarm {swarm} was released: {view:?}");
                assert_eq!(JobState::parse(&view.word).class(), Class::Running, "swarm {swarm}: {view:?}");
            }
        }
        assert!(core.orphans().is_empty(), "{:?}", core.orphans());
    }
}

fn play(seed: u64, keeps_trace: bool) -> Result<World, Vec<String>> {
    let mut world = World::new(seed, keeps_trace);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
    match outcome {
        Ok(()) => Ok(world),
        Err(_) => Err(world.trace),
    }
}

#[test]
fn ten_thousand_histories_make_no_second_job_and_lose_none() {
    const HISTORIES: u64 = 10_000;
    let fresh = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seeds = |n: u64| if n < HISTORIES / 2 { n } else { fresh.wrapping_add(n) };
    let counts = std::thread::scope(|scope| {
        let half = |odd: u64| {
            scope.spawn(move || {
                let mut counts = [0_usize; 3];
                for seed in (0..HISTORIES).filter(|n| n % 2 == odd).map(seeds) {
                    let Ok(world) = play(seed, false) else {
                        let trace = play(seed, true).err().unwrap_or_default();
                        panic!("history {seed} went wrong:\n{}", trace.join("\n"));
                    };
                    counts[0] += world.jobs.len();
                    counts[1] += world.life as usize;
                    counts[2] += world.calls.len();
                }
                counts
            })
        };
        let (a, b) = (half(0), half(1));
        [a.join().unwrap(), b.join().unwrap()]
    });
    let sum = |at: usize| counts[0][at] + counts[1][at];
    // The histories are about something: jobs were made, allocators killed, calls made.
    assert!(sum(0) > 10_000 && sum(1) > 5_000 && sum(2) > 50_000, "{counts:?}");
}
