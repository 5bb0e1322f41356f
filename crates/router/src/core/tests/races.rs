//! A launch whose answers, changes, snapshots and hellos arrive in any order, some twice and some never.

use proptest::prelude::*;

use super::*;

const NODES: u32 = 2;

#[derive(Debug, Clone, Copy)]
enum Move {
    /// The allocator carries out a call that has reached it.
    CarryOut,
    /// Its answer arrives, or is lost.
    Answer {
        lost: bool,
    },
    /// A change it has announced arrives.
    Change,
    /// A watch is opened: from here on its snapshot can be taken.
    Watch,
    /// The snapshot is taken.
    Snap,
    /// The snapshot arrives.
    Snapshot,
    Hello {
        node: u32,
    },
    Ship,
    Crash,
    Pass,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => Just(Move::CarryOut),
        4 => any::<bool>().prop_map(|lost| Move::Answer { lost }),
        4 => Just(Move::Change),
        2 => Just(Move::Watch),
        2 => Just(Move::Snap),
        2 => Just(Move::Snapshot),
        4 => (0..NODES).prop_map(|node| Move::Hello { node }),
        4 => Just(Move::Ship),
        1 => Just(Move::Crash),
        2 => Just(Move::Pass),
    ]
}

struct Play {
    world: World,
    swarm: SwarmId,
    known: bool,
    answers: usize,
    changes: usize,
    watch: Option<(Micros, Option<Vec<Allocation>>)>,
    greeted: [bool; NODES as usize],
}

impl Play {
    fn new() -> Self {
        let mut world = World::new();
        world.launch("r1", LaunchSpec { node_count: NODES, ..LaunchSpec::default() });
        let swarm = world.core.by_id.keys().next().unwrap().clone();
        Self { world, swarm, known: false, answers: 0, changes: 0, watch: None, greeted: [false; NODES as usize] }
    }

    fn allocation(&self) -> Allocation {
        World::allocation(&self.swarm, NODES)
    }

    fn play(&mut self, step: Move) {
        match step {
            Move::CarryOut if !self.world.ensures.is_empty() => {
                self.world.ensures.pop();
                self.changes += usize::from(!self.known);
                self.known = true;
                self.answers += 1;
            }
            Move::Answer { lost } if self.answers > 0 => {
                self.answers -= 1;
                let lost = lost.then(|| Failure::new(ErrorCode::BackendUnavailable, "the answer was lost"));
                let answer = lost.map_or_else(|| Ok(self.allocation()), Err);
                self.world.happen(Input::Ensured(self.swarm.clone(), answer));
            }
            Move::Change if self.changes > 0 => {
                self.changes -= 1;
                let allocation = self.allocation();
                self.world.happen(Input::AllocationChanged(allocation));
            }
            Move::Watch => self.watch = Some((self.world.now, None)),
            Move::Snap => {
                let allocations = if self.known { vec![self.allocation()] } else { Vec::new() };
                if let Some((_, taken @ None)) = &mut self.watch {
                    *taken = Some(allocations);
                }
            }
            Move::Snapshot => {
                if let Some((begun_at, Some(allocations))) = self.watch.take() {
                    self.world.happen(Input::AllocatorSnapshot { begun_at, allocations });
                }
            }
            Move::Hello { node } if self.known && !self.greeted[node as usize] => {
                self.greeted[node as usize] = true;
                self.world.write(&World::outbox(&self.swarm, node, 1), "worker_hello", None, json!({}));
            }
            Move::Ship => {
                for node in 0..NODES {
                    self.world.ship(&World::outbox(&self.swarm, node, 1), 1);
                }
            }
            Move::Crash => {
                // Answers to calls of a process that is gone arrive nowhere.
                self.answers = 0;
                self.changes = 0;
                self.world.crash();
            }
            Move::Pass => self.world.pass(2 * SECOND),
            Move::CarryOut | Move::Answer { .. } | Move::Change | Move::Hello { .. } => {}
        }
        assert!(self.world.releases.is_empty(), "released though nobody asked for its end: {:?}", self.world.names());
        assert!(self.world.core.swarms.values().all(|swarm| !swarm.is_over()), "{:?}", self.world.names());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_launch_that_can_come_up_does_so_once(steps in prop::collection::vec(moves(), 0..60)) {
        let mut play = Play::new();
        for step in steps {
            play.play(step);
        }
        for _ in 0..4 {
            play.play(Move::CarryOut);
            play.play(Move::Answer { lost: false });
            for step in [Move::Watch, Move::Snap, Move::Snapshot, Move::Pass, Move::Pass, Move::Pass] {
                play.play(step);
            }
            for node in 0..NODES {
                play.play(Move::Hello { node });
                play.play(Move::Ship);
            }
        }
        prop_assert_eq!(play.world.status(&play.swarm), "running");
        prop_assert_eq!(play.world.count("swarm_launched"), 1);
        invariants::numbers_never_repeat(&play.world.events);
    }
}
