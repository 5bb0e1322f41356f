//! Random histories: calls, deliveries that get lost, repeat or arrive late, workers and the router that die at any
//! moment. The workers' own ledger is the judge.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Happening {
    Inject {
        nodes: u8,
        repeat: bool,
    },
    /// One order that has left arrives: written or not, reported or not.
    Arrive {
        which: usize,
        written: bool,
        reported: bool,
    },
    /// A worker takes one step.
    Work {
        node: u32,
    },
    /// A worker dies and is started again.
    Kill {
        node: u32,
    },
    /// The allocator tells of the present generations.
    Tell,
    /// The follower ships some records of some outbox.
    Ship {
        which: usize,
        count: usize,
    },
    /// Records that were shipped before arrive again.
    ShipAgain {
        which: usize,
        from: u64,
        count: usize,
    },
    /// Inputs from here on are committed together with the next one.
    Hold,
    Crash,
    Pass {
        seconds: u8,
    },
}

fn events() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (1..8_u8, any::<bool>()).prop_map(|(nodes, repeat)| Happening::Inject { nodes, repeat }),
        12 => (any::<usize>(), prop::bool::weighted(0.7), prop::bool::weighted(0.7))
            .prop_map(|(which, written, reported)| Happening::Arrive { which, written, reported }),
        20 => (0..NODES).prop_map(|node| Happening::Work { node }),
        2 => (0..NODES).prop_map(|node| Happening::Kill { node }),
        3 => Just(Happening::Tell),
        15 => (any::<usize>(), 1..5_usize).prop_map(|(which, count)| Happening::Ship { which, count }),
        2 => (any::<usize>(), 0..20_u64, 1..9_usize)
            .prop_map(|(which, from, count)| Happening::ShipAgain { which, from, count }),
        2 => Just(Happening::Hold),
        2 => Just(Happening::Crash),
        3 => (0..9_u8).prop_map(|seconds| Happening::Pass { seconds }),
    ]
}

const NODES: u32 = 3;

/// A worker as docs/architecture.md describes it: an inbox, a journal, and a turn.
#[derive(Default)]
struct Worker {
    generation: u32,
    inbox: Vec<(u64, Option<InjectionId>)>,
    read: usize,
    /// Journal: the last inbox number carried out, what was begun, what has ended.
    taken: u64,
    running: Option<InjectionId>,
    queue: VecDeque<InjectionId>,
    words: u32,
}

struct Play {
    world: World,
    swarm: SwarmId,
    workers: Vec<Worker>,
    requests: Vec<(String, Vec<u32>)>,
    executed: Vec<InjectionId>,
    accepted: BTreeSet<InjectionId>,
    hold: bool,
}

impl Play {
    fn new() -> Self {
        let mut world = World::new();
        let swarm = world.running(NODES);
        let workers = (0..NODES).map(|_| Worker { generation: 1, ..Worker::default() }).collect();
        Self {
            world,
            swarm,
            workers,
            requests: Vec::new(),
            executed: Vec::new(),
            accepted: BTreeSet::new(),
            hold: false,
        }
    }

    fn input(&mut self, input: Input) {
        self.world.take(input);
        if !std::mem::take(&mut self.hold) {
            self.world.commit();
        }
    }

    fn play(&mut self, event: &Happening) {
        match *event {
            Happening::Inject { nodes, repeat } => self.inject(nodes, repeat),
            Happening::Arrive { which, written, reported } => self.arrive(which, written, reported),
            Happening::Work { node } => self.work(node),
            Happening::Kill { node } => self.kill(node),
            Happening::Tell => self.tell(),
            Happening::Ship { which, count } => {
                let outboxes: Vec<OutboxId> = self.world.outboxes.keys().cloned().collect();
                let outbox = &outboxes[which % outboxes.len()];
                let Some(cursor) = self.world.following.get(outbox).copied() else { return };
                let Some(chunk) = self.world.ship_from(outbox, cursor.offset, count) else { return };
                let next = Cursor { segment: 1, offset: chunk.next_offset, seq: 0 };
                self.world.following.insert(outbox.clone(), next);
                self.input(Input::Records(chunk));
            }
            Happening::ShipAgain { which, from, count } => {
                let outboxes: Vec<OutboxId> = self.world.outboxes.keys().cloned().collect();
                if let Some(chunk) = self.world.ship_from(&outboxes[which % outboxes.len()], from, count) {
                    self.input(Input::Records(chunk));
                }
            }
            Happening::Hold => self.hold = true,
            Happening::Crash => {
                self.hold = false;
                self.world.crash();
            }
            Happening::Pass { seconds } => self.world.pass(u64::from(seconds) * SECOND),
        }
    }

    fn inject(&mut self, mask: u8, repeat: bool) {
        let (id, nodes) = match self.requests.last() {
            Some(last) if repeat => last.clone(),
            _ => {
                let nodes: Vec<u32> = (0..NODES).filter(|node| mask & (1 << node) != 0).collect();
                let request = (format!("r{}", self.requests.len()), nodes);
                self.requests.push(request.clone());
                request
            }
        };
        let token = self.world.token();
        let order = self.world.inject_order(&id, &self.swarm.clone(), &nodes, &id);
        self.input(Input::Inject(token, Box::new(order)));
        // Only an answer that has left is a promise.
        if self.world.answers.contains_key(&token) {
            self.accepted.extend(self.world.injections(token));
        }
    }

    fn arrive(&mut self, which: usize, written: bool, reported: bool) {
        if self.world.deliveries.is_empty() {
            return;
        }
        let place = which % self.world.deliveries.len();
        let Some(order) = self.world.deliveries.remove(place) else { return };
        if written {
            let inbox = &mut self.workers[order.node.0 as usize].inbox;
            inbox.extend(order.records.iter().map(|record| (record.seq, record.injection.clone())));
        }
        let outcome = match (reported, written) {
            (true, true) => Outcome::Written,
            (true, false) => Outcome::Refused("no".into()),
            (false, _) => Outcome::Uncertain("lost".into()),
        };
        let results = order.records.iter().map(|record| (record.seq, outcome.clone())).collect();
        self.input(Input::Delivered(DeliveryReport { swarm: order.swarm, node: order.node, results }));
    }

    fn work(&mut self, node: u32) {
        let worker = &mut self.workers[node as usize];
        let outbox = World::outbox(&self.swarm, node, worker.generation);
        if let Some((seq, injection)) = worker.inbox.get(worker.read).cloned() {
            worker.read += 1;
            if seq > worker.taken {
                worker.taken = seq;
                worker.queue.extend(injection);
            }
        }
        if let Some(id) = worker.running.clone() {
            worker.words += 1;
            let words = worker.words;
            let generation = worker.generation;
            if words.is_multiple_of(4) {
                worker.running = None;
                self.world.write(&outbox, "assistant", Some(&id), json!({"content": "text"}));
                self.world.write(&outbox, "turn_complete", Some(&id), json!({"status": "completed"}));
            } else {
                let data = json!({ "content": format!("{node}/{generation}/{words}") });
                self.world.write(&outbox, "assistant_delta", Some(&id), data);
            }
        } else if let Some(id) = worker.queue.pop_front() {
            worker.running = Some(id.clone());
            self.executed.push(id.clone());
            self.world.write(&outbox, "turn_started", Some(&id), json!({}));
        }
    }

    fn kill(&mut self, node: u32) {
        let worker = &mut self.workers[node as usize];
        worker.generation += 1;
        let outbox = World::outbox(&self.swarm, node, worker.generation);
        let lost = worker.running.take();
        self.world.write(&outbox, "worker_hello", None, json!({"host": "here"}));
        if let Some(id) = lost {
            self.world.write(&outbox, "assistant", Some(&id), json!({"content": ""}));
            let data = json!({"status": "failed", "code": "turn_lost", "error": "the worker died"});
            self.world.write(&outbox, "turn_complete", Some(&id), data);
        }
    }

    fn tell(&mut self) {
        let mut allocation = World::allocation(&self.swarm, NODES);
        for (node, worker) in allocation.nodes.iter_mut().zip(&self.workers) {
            node.generation = worker.generation;
            node.restarts = worker.generation - 1;
        }
        self.input(Input::AllocationChanged(allocation));
    }

    /// Everything that is under way comes to its end.
    fn finish(&mut self) {
        self.world.commit();
        self.hold = false;
        for _ in 0..400 {
            self.tell();
            while !self.world.deliveries.is_empty() {
                self.arrive(0, true, true);
            }
            for node in 0..NODES {
                self.work(node);
            }
            let outboxes: Vec<OutboxId> = self.world.following.keys().cloned().collect();
            for outbox in outboxes {
                while self.world.ship(&outbox, 3) {}
            }
            let idle = self.workers.iter().all(|worker| worker.running.is_none() && worker.read == worker.inbox.len());
            let open = self.world.core.swarms.values().map(super::super::model::Swarm::open_turns).sum::<usize>();
            if idle && open == 0 && self.world.deliveries.is_empty() {
                break;
            }
            self.world.pass(6 * SECOND);
        }
    }

    fn judge(&self) {
        invariants::hold(&self.world.events);
        let ended = invariants::ends_at_most_once(&self.world.events);
        let mut once = BTreeSet::new();
        for id in &self.executed {
            assert!(once.insert(id), "{id} was executed twice");
        }
        for id in &self.accepted {
            assert!(ended.contains_key(id), "{id} was accepted and never ended: {:?}", self.world.names());
        }
        for id in ended.keys() {
            assert!(
                self.executed.contains(id) == (*ended[id].name == *"turn_complete"),
                "{id} ended as what it was not"
            );
        }
        // Every word of a worker that was shipped is in the log, once; the log on disk is the log that was seen.
        let said = self.world.outboxes.values().flatten().filter(|written| written.name == "assistant_delta").count();
        assert_eq!(self.world.count("assistant_delta"), said);
        assert_eq!(self.world.disk.events(), self.world.events.iter().map(|event| event.seq).collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_happens_twice(history in prop::collection::vec(events(), 1..160)) {
        let mut play = Play::new();
        for event in history {
            play.play(&event);
        }
        play.finish();
        play.judge();
    }
}
