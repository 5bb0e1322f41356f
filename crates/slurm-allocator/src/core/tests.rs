//! Tables for single decisions, and a model of the world for what must hold whatever happens.

use std::time::{Duration, Instant};

use drover_types::{Generation, NodeIndex};
use proptest::prelude::*;

use super::*;
use crate::allocation::WorkerState;

const NODE: NodeIndex = NodeIndex(0);

fn policy() -> Policy {
    Policy {
        max_restarts: 3,
        restart_delay: Duration::from_secs(1),
        healthy_after: Duration::from_mins(1),
        kill_after: Duration::from_secs(15),
        keep_over: Duration::from_hours(1),
    }
}

fn process(pid: u32) -> Process {
    Process { pid, start_time: u64::from(pid) * 10 }
}

fn spawned(generation: u32) -> Input {
    Input::Spawned { node: NODE, generation: Generation(generation), process: process(generation) }
}

fn ended(generation: u32) -> Input {
    let (how, tail) = ("ended with signal 9".into(), "its log ends: last words".into());
    Input::Ended { node: NODE, generation: Generation(generation), how, tail }
}

/// A swarm of one node and a clock that only moves when told to.
struct Bench {
    swarm: Swarm,
    now: Instant,
}

impl Bench {
    fn running() -> Self {
        let mut bench = Self::new(policy());
        assert_eq!(bench.step(None).effects, [Effect::Spawn { node: NODE, generation: Generation(1) }]);
        bench.step(Some(spawned(1)));
        bench
    }

    fn new(policy: Policy) -> Self {
        let now = Instant::now() + Duration::from_secs(10_000);
        Self { swarm: Swarm::new(policy, 1, None, now), now }
    }

    fn step(&mut self, input: Option<Input>) -> Step {
        if let Some(input) = input {
            self.swarm.apply(self.now, 0.5, input);
        }
        self.swarm.advance(self.now)
    }

    fn after(&mut self, time: Duration) -> Step {
        self.now += time;
        self.step(None)
    }

    fn node(&self) -> AllocatedNode {
        self.swarm.nodes("h").remove(0)
    }

    fn signals(step: &Step) -> Vec<Kill> {
        let kill = |effect: &Effect| match effect {
            Effect::Signal { kill, .. } => Some(*kill),
            _ => None,
        };
        step.effects.iter().filter_map(kill).collect()
    }
}

#[test]
fn a_dead_worker_comes_back_as_the_next_generation_and_says_so() {
    let mut bench = Bench::running();
    let step = bench.step(Some(ended(1)));
    assert!(step.store && step.effects.is_empty());
    let node = bench.node();
    assert_eq!((node.state, node.pid, node.restarts), (WorkerState::Restarting, 0, 1));
    assert_eq!(node.reason, "worker ended with signal 9; restart 1 of 3 in 1s");
    assert_eq!(bench.after(Duration::from_millis(999)), Step::default());
    let step = bench.after(Duration::from_millis(1));
    assert_eq!(step, Step { store: true, effects: vec![Effect::Spawn { node: NODE, generation: Generation(2) }] });
    bench.step(Some(spawned(2)));
    assert_eq!((bench.node().state, bench.node().generation), (WorkerState::Running, Generation(2)));
    assert_eq!(bench.swarm.state().0, AllocationState::Running);
}

#[test]
fn it_is_given_up_after_the_last_restart_with_the_end_of_its_log() {
    let mut bench = Bench::running();
    for generation in 1..=3 {
        bench.step(Some(ended(generation)));
        bench.after(Duration::from_secs(30));
        bench.step(Some(spawned(generation + 1)));
    }
    bench.step(Some(ended(4)));
    let node = bench.node();
    assert_eq!(node.state, WorkerState::Failed);
    assert_eq!(node.reason, "worker ended with signal 9; given up after 3 restarts; its log ends: last words");
    let (state, reason) = bench.swarm.state();
    assert!(state == AllocationState::Failed && reason.contains("last words"), "{reason}");
    assert!(bench.after(Duration::from_secs(1000)).effects.is_empty());
}

#[test]
fn a_worker_that_ran_long_enough_has_its_restarts_forgiven() {
    let mut bench = Bench::running();
    for generation in 1..20 {
        bench.step(Some(ended(generation)));
        assert_eq!(bench.node().restarts, 1);
        bench.after(Duration::from_secs(1));
        bench.step(Some(spawned(generation + 1)));
        assert_eq!(bench.swarm.next_deadline(), Some(bench.now + Duration::from_mins(1)));
        bench.after(Duration::from_mins(1));
        assert_eq!(bench.node().restarts, 0);
    }
}

#[test]
fn a_release_drains_once_then_kills_until_it_is_gone() {
    let mut bench = Bench::running();
    assert_eq!(Bench::signals(&bench.step(Some(Input::Release { force: false }))), [Kill::Term]);
    assert_eq!(bench.swarm.state().0, AllocationState::Completing);
    bench.step(Some(Input::TermSent { node: NODE, generation: Generation(1) }));
    assert_eq!(Bench::signals(&bench.step(Some(Input::Release { force: false }))), []);
    assert_eq!(bench.swarm.next_deadline(), Some(bench.now + Duration::from_secs(15)));
    assert_eq!(Bench::signals(&bench.after(Duration::from_secs(15))), [Kill::Kill]);
    assert_eq!(Bench::signals(&bench.after(Duration::from_secs(4))), []);
    assert_eq!(Bench::signals(&bench.after(Duration::from_secs(1))), [Kill::Kill]);
    assert!(bench.step(Some(ended(1))).store);
    assert_eq!((bench.node().state, bench.swarm.state().0), (WorkerState::Exited, AllocationState::Completed));
    assert_eq!(bench.after(Duration::from_secs(3599)).effects, []);
    assert_eq!(bench.after(Duration::from_secs(1)).effects, [Effect::Forget]);
}

#[test]
fn force_kills_at_once_also_in_the_middle_of_a_drain() {
    let mut bench = Bench::running();
    assert_eq!(Bench::signals(&bench.step(Some(Input::Release { force: true }))), [Kill::Kill]);
    let mut bench = Bench::running();
    bench.step(Some(Input::Release { force: false }));
    assert_eq!(Bench::signals(&bench.step(Some(Input::Release { force: true }))), [Kill::Kill]);
}

#[test]
fn a_time_limit_drains_the_swarm_also_when_the_allocator_was_restarted_meanwhile() {
    let minute = Duration::from_mins(1);
    let mut bench = Bench::new(policy());
    bench.swarm = Swarm::new(policy(), 1, Some(10 * minute), bench.now);
    bench.step(None);
    bench.step(Some(spawned(1)));
    assert_eq!(bench.swarm.next_deadline(), Some(bench.now + 10 * minute));
    bench.after(4 * minute);
    // Restored twice, the second time with a clock that went back an hour: that prolongs nothing beyond the limit.
    let record = bench.swarm.record(bench.now, 4_000_000_000);
    bench.swarm = Swarm::restore(policy(), &record, bench.now, 4_000_000_000);
    assert_eq!(bench.swarm.next_deadline(), Some(bench.now + 6 * minute));
    let back = Swarm::restore(policy(), &record, bench.now, 0);
    assert_eq!(back.next_deadline(), Some(bench.now + 10 * minute));
    assert_eq!(Bench::signals(&bench.after(Duration::from_millis(6 * 60_000 - 1))), []);
    let step = bench.after(Duration::from_millis(1));
    assert!(step.store);
    assert_eq!(Bench::signals(&step), [Kill::Term]);
    let (state, reason) = bench.swarm.state();
    assert_eq!(state, AllocationState::Completing);
    assert!(reason.starts_with("its time limit of 00:10:00 was reached"), "{reason}");
    let record = bench.swarm.record(bench.now, 5_000_000_000);
    bench.swarm = Swarm::restore(policy(), &record, bench.now, 5_000_000_000);
    bench.step(Some(ended(1)));
    let over = bench.swarm.state();
    assert_eq!(over, (AllocationState::Completed, "its time limit of 00:10:00 was reached".to_owned()));
}

#[test]
fn a_release_while_a_start_is_under_way_ends_what_comes_of_it() {
    for (input, signals, state) in [
        (spawned(1), vec![Kill::Term], WorkerState::Running),
        (
            Input::NotStarted { node: NODE, generation: Generation(1), why: "x".into(), counts: true },
            vec![],
            WorkerState::Exited,
        ),
    ] {
        let mut bench = Bench::new(policy());
        bench.step(None);
        assert_eq!(Bench::signals(&bench.step(Some(Input::Release { force: false }))), []);
        assert_eq!(bench.swarm.state().0, AllocationState::Completing);
        assert_eq!(Bench::signals(&bench.step(Some(input))), signals);
        assert_eq!(bench.node().state, state);
    }
}

#[test]
fn a_restart_of_the_allocator_does_not_send_a_second_term_nor_forget_an_unsent_one() {
    for (told, expected) in [(true, vec![]), (false, vec![Kill::Term])] {
        let mut bench = Bench::running();
        bench.step(Some(Input::Release { force: false }));
        if told {
            bench.step(Some(Input::TermSent { node: NODE, generation: Generation(1) }));
        }
        let record = bench.swarm.record(bench.now, 1_000_000);
        bench.now += Duration::from_secs(5);
        bench.swarm = Swarm::restore(policy(), &record, bench.now, 6_000_000);
        let found = Input::Found { node: NODE, generation: Generation(1), process: Some(process(1)) };
        assert_eq!(Bench::signals(&bench.step(Some(found))), expected);
        assert_eq!(Bench::signals(&bench.after(Duration::from_secs(9))), []);
        assert_eq!(Bench::signals(&bench.after(Duration::from_secs(1))), [Kill::Kill]);
    }
}

#[test]
fn a_start_that_is_our_own_trouble_uses_up_no_restart() {
    let mut bench = Bench::new(policy());
    bench.step(None);
    for generation in 1..10 {
        let why = "disk full".to_owned();
        let input = Input::NotStarted { node: NODE, generation: Generation(generation), why, counts: false };
        bench.step(Some(input));
        assert_eq!((bench.node().state, bench.node().restarts), (WorkerState::Pending, 0));
        assert!(bench.node().reason.contains("disk full"));
        let step = bench.after(Duration::from_secs(2));
        assert_eq!(step.effects, [Effect::Spawn { node: NODE, generation: Generation(generation + 1) }]);
    }
}

#[test]
fn late_words_about_an_earlier_generation_change_nothing() {
    let mut bench = Bench::running();
    bench.step(Some(ended(1)));
    bench.after(Duration::from_secs(1));
    bench.step(Some(spawned(2)));
    let before = bench.node();
    for late in [ended(1), spawned(1), Input::TermSent { node: NODE, generation: Generation(1) }] {
        assert_eq!(bench.step(Some(late)), Step::default());
    }
    assert_eq!(bench.node(), before);
    let nobody = Input::NotStarted { node: NodeIndex(9), generation: Generation(1), why: String::new(), counts: true };
    assert_eq!(bench.step(Some(nobody)), Step::default());
}

#[test]
fn launching_says_ready_once() {
    let mut bench = Bench::new(policy());
    let mut stages = Vec::new();
    let mut collect = |step: Step| {
        stages.extend(step.effects.into_iter().filter_map(|effect| match effect {
            Effect::Progress { stage, message } => Some((stage, message)),
            _ => None,
        }));
    };
    collect(bench.step(None));
    collect(bench.step(Some(spawned(1))));
    collect(bench.step(Some(ended(1))));
    collect(bench.after(Duration::from_secs(1)));
    collect(bench.step(Some(spawned(2))));
    let expected = [("submitting", "node 0 is process 1; 1 of 1 run"), ("ready", "1 of 1 workers run")];
    assert_eq!(stages, expected.map(|(stage, message)| (stage, message.to_owned())));
}

/// What really is there, beside what the supervisor believes.
#[derive(Debug, Default)]
struct Reality {
    /// Living process of each node, with its generation.
    alive: Vec<Option<(Generation, Process)>>,
    /// The highest generation that was ever started.
    highest: Vec<Generation>,
    next_pid: u32,
    released: bool,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    /// Time passes.
    Wait(u64),
    /// A worker dies, and that is reported at once.
    Die(u8),
    /// A worker dies while nobody looks; the next restart finds out.
    DieUnseen(u8),
    /// The next start of a node fails.
    FailStart,
    /// The next start of a node succeeds, and the allocator is killed before it hears of it.
    CrashAfterStart,
    /// The allocator is killed and started again.
    Crash,
    /// The record cannot be written for one step.
    DiskFull,
    Release(bool),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u64..40_000).prop_map(Event::Wait),
        4 => (0u8..3).prop_map(Event::Die),
        1 => (0u8..3).prop_map(Event::DieUnseen),
        1 => Just(Event::FailStart),
        2 => Just(Event::CrashAfterStart),
        2 => Just(Event::Crash),
        1 => Just(Event::DiskFull),
        1 => any::<bool>().prop_map(Event::Release),
    ]
}

struct Model {
    swarm: Swarm,
    origin: Instant,
    now: Instant,
    disk: SwarmRecord,
    reality: Reality,
    fail_start: bool,
    crash_after_start: bool,
    disk_full: bool,
}

const NODES: u32 = 3;

impl Model {
    fn new() -> Self {
        let now = Instant::now() + Duration::from_secs(100_000);
        let swarm = Swarm::new(policy(), NODES, None, now);
        let disk = swarm.record(now, 1_000_000_000);
        let count = NODES as usize;
        let reality = Reality { alive: vec![None; count], highest: vec![Generation(0); count], ..Reality::default() };
        let mut model = Self {
            swarm,
            origin: now,
            now,
            disk,
            reality,
            fail_start: false,
            crash_after_start: false,
            disk_full: false,
        };
        model.settle(Vec::new());
        model
    }

    /// The same clock as Unix time; any origin will do.
    fn us(&self) -> u64 {
        1_000_000_000 + self.now.duration_since(self.origin).as_micros() as u64
    }

    fn settle(&mut self, mut inputs: Vec<Input>) {
        loop {
            for input in inputs.drain(..) {
                self.swarm.apply(self.now, 0.5, input);
            }
            let step = self.swarm.advance(self.now);
            let mut stored = true;
            if step.store {
                if std::mem::take(&mut self.disk_full) {
                    self.swarm.not_stored();
                    stored = false;
                } else {
                    self.disk = self.swarm.record(self.now, self.us());
                }
            }
            let mut crash = false;
            for effect in step.effects {
                if let Effect::Spawn { node, generation } = effect {
                    assert!(step.store, "a start was not stored");
                    inputs.push(if stored {
                        self.start(node, generation, &mut crash)
                    } else {
                        Input::NotStarted { node, generation, why: "disk".into(), counts: false }
                    });
                    if crash {
                        break;
                    }
                } else if let Effect::Signal { node, generation, process, kill } = effect {
                    let alive = self.reality.alive[node.0 as usize];
                    assert!(self.reality.released, "a worker was signalled unasked");
                    if alive.is_some_and(|(_, real)| real == process) && kill == Kill::Kill {
                        self.reality.alive[node.0 as usize] = None;
                        let (how, tail) = ("ended with signal 9".into(), String::new());
                        inputs.push(Input::Ended { node, generation, how, tail });
                    }
                }
            }
            if crash {
                return self.crash();
            }
            if inputs.is_empty() {
                return;
            }
        }
    }

    fn start(&mut self, node: NodeIndex, generation: Generation, crash: &mut bool) -> Input {
        let index = node.0 as usize;
        assert!(!self.reality.released, "a released swarm started a worker");
        assert!(self.reality.alive[index].is_none(), "two workers of node {node} at once");
        assert!(generation > self.reality.highest[index], "generation {generation} of node {node} was used before");
        if std::mem::take(&mut self.fail_start) {
            return Input::NotStarted { node, generation, why: "no".into(), counts: true };
        }
        self.reality.next_pid += 1;
        let process = process(self.reality.next_pid);
        self.reality.alive[index] = Some((generation, process));
        self.reality.highest[index] = generation;
        *crash = std::mem::take(&mut self.crash_after_start);
        Input::Spawned { node, generation, process }
    }

    fn crash(&mut self) {
        self.swarm = Swarm::restore(policy(), &self.disk.clone(), self.now, self.us());
        let found = (0..NODES).map(|index| {
            let stored = self.disk.nodes[index as usize].generation;
            let generation = stored.max(self.reality.highest[index as usize]);
            let alive = self.reality.alive[index as usize].filter(|(alive, _)| *alive == generation);
            Input::Found { node: NodeIndex(index), generation, process: alive.map(|(_, process)| process) }
        });
        let found = found.collect();
        self.settle(found);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Wait(millis) => {
                self.now += Duration::from_millis(millis);
                self.settle(Vec::new());
            }
            Event::Die(index) => {
                if let Some((generation, _)) = self.reality.alive[index as usize].take() {
                    let (how, tail) = ("ended with signal 9".into(), String::new());
                    self.settle(vec![Input::Ended { node: NodeIndex(index.into()), generation, how, tail }]);
                }
            }
            Event::DieUnseen(index) => {
                self.reality.alive[index as usize] = None;
                self.crash();
            }
            Event::FailStart => self.fail_start = true,
            Event::CrashAfterStart => self.crash_after_start = true,
            Event::Crash => self.crash(),
            Event::DiskFull => self.disk_full = true,
            Event::Release(force) => {
                // As the shell does it: what is not on disk was not promised.
                let mut trial = self.swarm.clone();
                trial.apply(self.now, 0.5, Input::Release { force });
                let _ = trial.advance(self.now);
                if !std::mem::take(&mut self.disk_full) {
                    self.reality.released = true;
                    self.settle(vec![Input::Release { force }]);
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        for (index, node) in self.swarm.nodes("h").iter().enumerate() {
            if let Some((generation, process)) = self.reality.alive[index] {
                assert_eq!(node.state, WorkerState::Running, "a living worker is not known: {node:?}");
                assert_eq!((node.generation, node.pid), (generation, process.pid));
            }
            assert!(node.restarts <= policy().max_restarts);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_node_never_has_two_workers_generations_grow_and_released_stays_released(
        events in prop::collection::vec(event(), 1..60)
    ) {
        let mut model = Model::new();
        for event in events {
            model.happen(event);
        }
        // Whatever happened, a release comes to its end.
        model.disk_full = false;
        model.happen(Event::Release(true));
        model.happen(Event::Wait(10_000));
        prop_assert!(model.reality.alive.iter().all(Option::is_none));
        let state = model.swarm.state().0;
        prop_assert!(matches!(state, AllocationState::Completed | AllocationState::Failed), "{state:?}");
        model.happen(Event::Crash);
        model.happen(Event::Wait(3_601_000));
        prop_assert_eq!(model.swarm.state().0, state);
    }
}
