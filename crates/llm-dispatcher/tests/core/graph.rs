//! Plans of many tasks, carried out by the engine over lanes that fail: who works on whose result.

use std::collections::HashMap;
use std::time::Duration;

use crate::provider::SimLane;
use crate::sim::{Sim, ms, rounds, seconds, seeds, task, wide};
use drover_llm_dispatcher::core::{
    Graph, Kind, LaneId, Missing, NodeId, NodeState, PhaseSpec, Status, TaskId, Yield, pipeline,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SEARCH: PhaseSpec = PhaseSpec { kind: Kind::Search, barrier: false, source: true, missing: Missing::Skip };
const FETCH: PhaseSpec = PhaseSpec { kind: Kind::Fetch, barrier: false, source: true, missing: Missing::Skip };
const ANALYZE: PhaseSpec = PhaseSpec { kind: Kind::Analyze, barrier: false, source: false, missing: Missing::Proceed };

/// What a task produced: the subjects whose words are in it.
type Words = Vec<u32>;

struct Research {
    /// By node: what came of it.
    words: HashMap<NodeId, Words>,
    graph: Graph,
    wall: Duration,
}

/// Runs a plan. `empty` is the share of searches and fetches that find nothing.
fn research(sim: &mut Sim, mut graph: Graph, empty: f64, seed: u64, next: &mut u64) -> Research {
    let mut rng = SmallRng::seed_from_u64(seed);
    let began = sim.now;
    let mut words: HashMap<NodeId, Words> = HashMap::new();
    let mut inputs: HashMap<TaskId, (NodeId, Words)> = HashMap::new();
    loop {
        while let Some(node) = graph.next_ready() {
            let spec = graph.spec(node).unwrap().clone();
            let provenance = graph.provenance(node).unwrap();
            // What a worker is given: its own subject, and the words of those that its provenance names and that came.
            let mut given: Words = spec.subject.into_iter().collect();
            for source in provenance.sources {
                if source.came == Some(Yield::Result) {
                    given.extend(&words[&source.node]);
                }
            }
            let mut task = task(*next);
            *next += 1;
            task.kind = spec.kind.unwrap();
            task.lanes = vec![LaneId(u16::from(matches!(task.kind, Kind::Search | Kind::Fetch)))];
            inputs.insert(task.id, (node, given));
            graph.started(node, task.id);
            sim.submit(1, task);
        }
        if graph.is_over() {
            break;
        }
        assert!(sim.step(seconds(1e7)), "seed {seed}: the plan is stuck");
        // In an order that has nothing to do with that of the plan.
        let over: Vec<TaskId> = inputs.keys().filter(|task| sim.ended.contains_key(task)).copied().collect();
        for id in over {
            let (node, given) = inputs.remove(&id).unwrap();
            let source = graph.spec(node).unwrap().source;
            let came = match sim.ended.remove(&id).unwrap().verdict.status {
                Status::Answered if source && rng.random_bool(empty) => Yield::Nothing,
                Status::Answered => Yield::Result,
                _ => Yield::Failed,
            };
            assert_eq!(graph.finished(id, came), Some(node));
            words.insert(node, given);
        }
    }
    Research { words, graph, wall: sim.now.saturating_sub(began) }
}

#[test]
fn no_subject_is_ever_paired_with_the_result_of_another() {
    let lane = SimLane { errors: 0.05, resets: 0.05, slow_share: 0.05, ..SimLane::default() };
    let seed = seeds(0)[0];
    // One engine does them all, as it would in a daemon.
    let mut sim = Sim::new(wide(16), vec![lane.clone(), lane], seed);
    let mut next = 0;
    let (mut ungrounded, mut skipped) = (0, 0);
    for round in 0..rounds(500, 10_000) {
        let mut rng = SmallRng::seed_from_u64(seed + round);
        let subjects = rng.random_range(1..6);
        let barrier = PhaseSpec { barrier: rng.random_bool(0.3), ..FETCH };
        let plan = Graph::new(pipeline(subjects, &[SEARCH, barrier, ANALYZE], true)).unwrap();
        let done = research(&mut sim, plan, 0.25, seed + round, &mut next);
        for index in 0..done.graph.len() as u32 {
            let node = NodeId(index);
            let spec = done.graph.spec(node).unwrap();
            match done.graph.state(node).unwrap() {
                NodeState::Skipped => skipped += 1,
                NodeState::Passed => {}
                NodeState::Ended(..) => {
                    let words = &done.words[&node];
                    let Some(subject) = spec.subject else { continue };
                    assert!(
                        words.iter().all(|&word| word == subject),
                        "round {round}: {node:?} of {subject} has {words:?}"
                    );
                    let provenance = done.graph.provenance(node).unwrap();
                    assert_eq!(provenance.subject, Some(subject));
                    assert!(provenance.sources.iter().all(|source| source.subject == Some(subject)));
                    if spec.kind == Some(Kind::Analyze) {
                        // An answer that rests on no page is marked, and one that rests on one is not.
                        assert_eq!(provenance.grounded, words.len() == 3, "round {round}: {words:?}");
                        ungrounded += u64::from(!provenance.grounded);
                    }
                }
                state => panic!("round {round}: {node:?} is left {state:?}"),
            }
        }
    }
    assert!(ungrounded > 100 && skipped > 50, "{ungrounded} ungrounded, {skipped} skipped");
}

#[test]
fn phases_without_barriers_save_the_time_that_is_there_to_save() {
    for (sigma, saved) in [(0.0, 0.16), (0.6, 0.22)] {
        let mut walls = [Duration::ZERO; 2];
        let rounds = if sigma > 0.0 { 30 } else { 1 };
        for seed in 0..rounds {
            for (wall, barrier) in walls.iter_mut().zip([false, true]) {
                let lane = SimLane { sigma, spread: 0.0, network: (ms(0), ms(0)), ..SimLane::default() };
                let mut settings = wide(10);
                settings.hedge.max = 0;
                let mut sim = Sim::new(settings, vec![lane.clone(), lane], 1 + seed);
                let phase = PhaseSpec { barrier, ..ANALYZE };
                let plan = Graph::new(pipeline(15, &[phase, phase, phase], false)).unwrap();
                *wall += research(&mut sim, plan, 0.0, 1 + seed, &mut 0).wall;
            }
        }
        let share = 1.0 - walls[0].as_secs_f64() / walls[1].as_secs_f64();
        println!("sigma {sigma}: {share:.3} saved");
        assert!(share >= saved, "sigma {sigma}: {share:.3} saved");
    }
}
