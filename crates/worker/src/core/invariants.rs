//! What must hold whatever happens: random histories of prompts, steers, interrupts, ends, drains and deaths at any point,
//! also in the middle of a line, with and without the loss of what was not synced.
//!
//! The disk is simulated; what is written to it and read back from it is the real thing (`Store`, `Journal`, `Search`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use drover_mailbox::{Line, decode_line};
use drover_types::Generation;
use proptest::prelude::*;

use super::*;
use crate::agent::AgentCommand;
use crate::journal::{Journal, Memory, Search};
use crate::store::{Sink, Stamp, Store};

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The router delivers a prompt.
    Inject { steer: bool },
    /// The router delivers the last prompt again, under a new number.
    Repeat,
    /// The router asks for an interrupt: of whatever runs, or of one prompt.
    Interrupt { of: Option<u8> },
    /// The worker reads some lines of its inbox.
    Read { lines: u8 },
    /// The agent says something.
    Speak,
    /// The agent ends its turn.
    End { failed: bool },
    /// Time goes by.
    Wait,
    /// The process dies after so many more writes, and its successor perhaps after as many of its own. With the host,
    /// what was not synced is gone.
    Die { writes: u8, again: Option<u8>, host: bool },
    /// The process is told to end, and is started again when it has.
    Drain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => any::<bool>().prop_map(|steer| Step::Inject { steer }),
        1 => Just(Step::Repeat),
        2 => proptest::option::of(any::<u8>()).prop_map(|of| Step::Interrupt { of }),
        6 => (1u8..6).prop_map(|lines| Step::Read { lines }),
        2 => Just(Step::Speak),
        5 => any::<bool>().prop_map(|failed| Step::End { failed }),
        1 => Just(Step::Wait),
        4 => (0u8..14, proptest::option::of(1u8..8), any::<bool>())
            .prop_map(|(writes, again, host)| Step::Die { writes, again, host }),
        1 => Just(Step::Drain),
    ];
    proptest::collection::vec(step, 1..60)
}

#[derive(Debug, Default)]
struct File {
    bytes: Vec<u8>,
    synced: usize,
}

#[derive(Debug, Clone)]
struct Disk {
    file: Arc<Mutex<File>>,
    /// Writes until the process dies; negative: never.
    fuse: Arc<AtomicI64>,
}

impl Disk {
    fn new(fuse: &Arc<AtomicI64>) -> Self {
        Self { file: Arc::default(), fuse: Arc::clone(fuse) }
    }

    /// Whether the process dies in this very call.
    fn dies(&self) -> io::Result<bool> {
        match self.fuse.load(Ordering::Relaxed) {
            left if left < 0 => Ok(false),
            0 => Err(io::Error::other("dead")),
            left => {
                self.fuse.store(left - 1, Ordering::Relaxed);
                Ok(left == 1)
            }
        }
    }

    fn lose_unsynced(&self) {
        let mut file = self.file.lock().unwrap();
        let synced = file.synced;
        file.bytes.truncate(synced);
    }

    fn force_sync(&self) {
        let mut file = self.file.lock().unwrap();
        file.synced = file.bytes.len();
    }

    fn lines_from(&self, offset: u64, mut each: impl FnMut(&[u8])) {
        let file = self.file.lock().unwrap();
        let from = file.bytes.get(offset as usize..).unwrap_or_default();
        from.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")).for_each(&mut each);
    }
}

impl Sink for Disk {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let dies = self.dies()?;
        let mut file = self.file.lock().unwrap();
        file.bytes.extend_from_slice(if dies { &lines[..lines.len() * 2 / 3] } else { lines });
        if dies { Err(io::Error::other("dying")) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let dies = self.dies()?;
        let mut file = self.file.lock().unwrap();
        file.synced = file.bytes.len();
        if dies { Err(io::Error::other("dying")) } else { Ok(()) }
    }

    fn position(&self) -> (u32, u64) {
        (1, self.file.lock().unwrap().bytes.len() as u64)
    }
}

/// One life of the worker.
struct Life {
    core: Core,
    store: Store<Disk>,
    effects: Vec<Effect>,
    /// Lines of the inbox read so far.
    read: usize,
    turn: Option<InjectionId>,
}

struct World {
    inbox: Vec<(u64, Option<InjectionId>, Order)>,
    injected: Vec<InjectionId>,
    outboxes: Vec<Disk>,
    journals: Vec<Disk>,
    fuse: Arc<AtomicI64>,
    now: Instant,
    life: Option<Life>,
    host_dies: bool,
    /// Writes after which the next life ends.
    again: Option<u8>,
    /// What the agent was given to carry out, in order, with whether it came as a turn of its own.
    executed: Vec<(InjectionId, bool)>,
}

impl World {
    fn new() -> Self {
        Self {
            inbox: Vec::new(),
            injected: Vec::new(),
            outboxes: Vec::new(),
            journals: Vec::new(),
            fuse: Arc::new(AtomicI64::new(-1)),
            now: Instant::now(),
            life: None,
            host_dies: false,
            again: None,
            executed: Vec::new(),
        }
    }

    fn deliver(&mut self, injection: Option<InjectionId>, order: Order) {
        self.inbox.push((self.inbox.len() as u64 + 1, injection, order));
    }

    fn die(&mut self) {
        self.life = None;
        self.fuse.store(self.again.take().map_or(-1, i64::from), Ordering::Relaxed);
        if self.again.is_none() && std::mem::take(&mut self.host_dies) {
            self.outboxes.iter().chain(&self.journals).for_each(Disk::lose_unsynced);
        }
    }

    /// Starts the worker, as often as it takes until one gets through its start.
    fn live(&mut self) {
        while self.life.is_none() {
            self.start();
        }
    }

    fn start(&mut self) {
        let generation = self.outboxes.len() as u32 + 1;
        let mut journals = Vec::new();
        for disk in self.journals.iter().rev() {
            let mut journal = Journal::default();
            disk.lines_from(0, |line| journal.read(line));
            let complete = journal.complete;
            journals.push(journal);
            if complete {
                break;
            }
        }
        let memory = Memory::of(journals);
        let mut search = Search::new(&memory.open);
        for (index, outbox) in self.outboxes.iter().enumerate() {
            if let Some(cursor) = search.begins_in(Generation(index as u32 + 1)) {
                outbox.force_sync();
                outbox.lines_from(cursor.offset, |line| search.see(line));
            }
        }
        let (outbox, journal) = (Disk::new(&self.fuse), Disk::new(&self.fuse));
        self.outboxes.push(outbox.clone());
        self.journals.push(journal.clone());
        let stamp = Stamp { job_id: "j".into(), node_id: 0, generation };
        let mut store = Store::new(outbox, journal, stamp, usize::MAX);
        if store.begin_journal(&memory, 0).is_err() {
            return self.die();
        }
        // The snapshot is whole: the worker removes the journals before it.
        let earlier = self.journals.len() - 1;
        self.journals[..earlier].iter().for_each(|disk| *disk.file.lock().unwrap() = File::default());

        let policy = Policy {
            auto_approve: false,
            approval_timeout: Duration::from_secs(1),
            drain_grace: Duration::from_secs(1),
            max_queue: 4,
            hello: serde_json::Map::new(),
        };
        let read = memory.low.offset as usize / 10;
        let mut effects = Vec::new();
        let core = Core::start(policy, memory.low, memory.taken, memory.history, search.lost, &mut effects);
        self.life = Some(Life { core, store, effects, read, turn: None });
        self.perform();
        self.input(Input::Agent(AgentEvent::Ready { detail: json!({}), pid: None }));
    }

    fn input(&mut self, input: Input) {
        let now = self.now;
        if let Some(life) = &mut self.life {
            life.core.handle(now, input, &mut life.effects);
            self.perform();
        }
    }

    fn perform(&mut self) {
        let Some(mut life) = self.life.take() else { return };
        let mut refused = Vec::new();
        for effect in std::mem::take(&mut life.effects) {
            match effect {
                Effect::Write { injection, trace, kind, data } => {
                    life.store.write(0, injection.as_ref(), trace.as_ref(), &kind, &data);
                }
                Effect::Journal(entry) => life.store.journal(entry),
                Effect::SyncOutbox => life.store.sync_outbox(),
                Effect::SyncJournal => life.store.sync_journal(),
                Effect::SetTimer(..) | Effect::CancelTimer(_) | Effect::Keyring(_) => {}
                Effect::Agent(command) => {
                    if life.store.flush(0).is_err() {
                        return self.die();
                    }
                    match command {
                        AgentCommand::Begin { injection, .. } => {
                            assert!(life.turn.is_none(), "two turns at once");
                            self.executed.push((injection.clone(), true));
                            life.turn = Some(injection);
                        }
                        AgentCommand::Steer { injection, into, prompt } => {
                            // Every other steer is refused, as if the turn had just ended.
                            if life.turn.as_ref() == Some(&into) && self.executed.len().is_multiple_of(2) {
                                self.executed.push((injection, false));
                            } else {
                                refused.push(AgentEvent::SteerRefused { injection, prompt });
                            }
                        }
                        AgentCommand::Interrupt { .. }
                        | AgentCommand::Leave { .. }
                        | AgentCommand::Answer { .. }
                        | AgentCommand::Stop => {}
                    }
                }
                Effect::Exit(_) => {
                    let _ = life.store.flush(0);
                    return self.die();
                }
            }
        }
        if life.store.flush(0).is_err() {
            return self.die();
        }
        self.life = Some(life);
        for event in refused {
            self.input(Input::Agent(event));
        }
    }

    fn read(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some(life) = &mut self.life else { return };
            let index = life.read;
            let Some((seq, injection, order)) = self.inbox.get(index).cloned() else { return };
            life.read += 1;
            let place = |index: usize| Place { segment: 1, offset: index as u64 * 10 };
            let delivery = Delivery { start: place(index), end: place(index + 1), seq, injection, trace: None, order };
            self.input(Input::Inbox(delivery));
        }
    }

    fn end(&mut self, outcome: TurnOutcome) {
        let turn = self.life.as_mut().and_then(|life| life.turn.take());
        if let Some(injection) = turn {
            self.input(Input::Agent(AgentEvent::TurnEnded { injection, outcome }));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Inject { steer } => {
                let id: InjectionId = format!("i{}", self.injected.len()).parse().unwrap();
                self.injected.push(id.clone());
                self.deliver(Some(id), Order::Inject { content: "p".into(), steer });
            }
            Step::Repeat => {
                if let Some(id) = self.injected.last().cloned() {
                    self.deliver(Some(id), Order::Inject { content: "p".into(), steer: false });
                }
            }
            Step::Interrupt { of } => {
                let of = of.and_then(|index| self.injected.get(index as usize % self.injected.len().max(1)).cloned());
                self.deliver(of, Order::Interrupt);
            }
            Step::Read { lines } => self.read(lines as usize),
            Step::Speak => {
                if let Some(injection) = self.life.as_ref().and_then(|life| life.turn.clone()) {
                    let data = json!({ "content": "x" });
                    self.input(Input::Agent(AgentEvent::Event { injection, kind: "assistant".into(), data }));
                }
            }
            Step::End { failed: true } => self.end(TurnOutcome::failed(ErrorCode::Internal, "no")),
            Step::End { failed: false } => self.end(TurnOutcome::completed("yes")),
            Step::Wait => {
                self.now += STEER_SETTLE;
                self.input(Input::Timer(Timer::SteerSettle));
            }
            Step::Die { writes, again, host } => {
                self.again = again;
                self.host_dies = host;
                self.fuse.store(i64::from(writes), Ordering::Relaxed);
                if writes == 0 {
                    self.die();
                }
            }
            Step::Drain => {
                self.input(Input::Drain { reason: "r".into() });
                self.end(TurnOutcome::interrupted(""));
            }
        }
        self.live();
    }

    /// Nothing dies any more, and everything comes to its end.
    fn settle(&mut self) {
        self.fuse.store(-1, Ordering::Relaxed);
        (self.host_dies, self.again) = (false, None);
        self.live();
        for _ in 0..self.inbox.len() * 2 + 2 {
            self.read(1);
            self.end(TurnOutcome::completed("yes"));
            self.step(Step::Wait);
        }
    }

    fn check(&self) {
        let mut ends: HashMap<String, Vec<String>> = HashMap::new();
        let mut answers: BTreeMap<String, usize> = BTreeMap::new();
        let mut started = BTreeSet::new();
        for outbox in &self.outboxes {
            let mut expected = 0;
            outbox.lines_from(0, |line| {
                let Ok(Line::Record(record)) = decode_line(line) else { panic!("a broken line in an outbox") };
                expected += 1;
                assert_eq!(record.seq, expected);
                let Some(id) = record.injection_id.as_deref() else { return };
                match record.kind.as_ref() {
                    kind::TURN_COMPLETE => {
                        assert!(answers.contains_key(id), "{id} ended without an answer");
                        let data: Value = serde_json::from_str(record.data.get()).unwrap();
                        ends.entry(id.to_owned()).or_default().push(data["status"].as_str().unwrap().to_owned());
                    }
                    kind::ASSISTANT => *answers.entry(id.to_owned()).or_default() += 1,
                    kind::TURN_STARTED => {
                        started.insert(id.to_owned());
                    }
                    _ => {}
                }
            });
        }
        for id in &self.injected {
            assert_eq!(
                ends.get(id.as_str()).map(Vec::len),
                Some(1),
                "{id} must end exactly once: {:?}",
                ends.get(id.as_str())
            );
        }
        let mut seen = BTreeSet::new();
        for (id, _) in &self.executed {
            assert!(seen.insert(id.clone()), "{id} was carried out twice");
            assert!(started.contains(id.as_str()), "{id} was carried out unannounced");
        }
        // A steered prompt may be refused, and is then the next; all others keep the order of the inbox.
        let steered = |id: &InjectionId| {
            let is = |(of, order): (&Option<InjectionId>, &Order)| {
                of.as_ref() == Some(id) && matches!(order, Order::Inject { steer: true, .. })
            };
            self.inbox.iter().any(|(_, of, order)| is((of, order)))
        };
        let plain: Vec<_> = (self.executed.iter())
            .filter(|(id, own)| *own && !steered(id))
            .filter_map(|(id, _)| self.injected.iter().position(|other| other == id))
            .collect();
        assert!(plain.is_sorted(), "prompts were begun out of order: {plain:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_runs_twice_and_everything_ends_once(steps in steps()) {
        let mut world = World::new();
        world.live();
        for step in steps {
            world.step(step);
        }
        world.settle();
        world.check();
    }
}
