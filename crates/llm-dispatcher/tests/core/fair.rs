//! Shares between clients, deadlines, and workers.

use std::time::Duration;

use crate::provider::{Bucket, SimLane};
use crate::sim::{Sim, ms, rounds, seconds, seeds, task, wide};
use drover_llm_dispatcher::core::{Kind, LaneId, Reason, Refusal, Settings, Status, TaskId};

#[test]
fn one_task_behind_ten_thousand_waits_for_one_answer() {
    for seed in seeds(rounds(1, 20)) {
        let mut sim = Sim::new(wide(10), vec![SimLane::default()], seed);
        for id in 0..10_000 {
            sim.submit(1, task(id));
        }
        for round in 0..20 {
            sim.submit_at(seconds(1.0 + f64::from(round) * 0.37), 2, task(20_000 + u64::from(round as u32)));
        }
        sim.run_until(seconds(12.0));
        for round in 0..20 {
            let id = TaskId(20_000 + round);
            let waited = sim.ended[&id].verdict.waited;
            assert!(waited <= ms(206), "seed {seed}: waited {waited:?} where a call takes 200 ms");
        }
    }
}

#[test]
fn fifty_clients_get_their_shares() {
    for seed in seeds(rounds(0, 20)) {
        let mut sim = Sim::new(wide(20), vec![SimLane { spread: 0.3, ..SimLane::default() }], seed);
        let mut id = 0;
        // The first has had the queue for itself for a while, and has forty times as much to do.
        for client in 0..50_u64 {
            for _ in 0..if client == 0 { 8000 } else { 200 } {
                let mut spec = task(id);
                spec.weight = 1 + (client % 3) as u32;
                if client == 0 {
                    sim.submit(client, spec);
                } else {
                    sim.submit_at(seconds(5.0), client, spec);
                }
                id += 1;
            }
        }
        sim.run_until(seconds(5.0));
        let before = sim.ended.len();
        sim.run_until(seconds(35.0));
        assert!(sim.ended.len() - before > 2700);
        let mut shares = vec![0.0; 50];
        for (task, ended) in &sim.ended {
            if ended.at > seconds(5.0) {
                let client = if task.0 < 8000 { 0 } else { 1 + (task.0 - 8000) / 200 };
                shares[client as usize] += 1.0 / (1.0 + (client % 3) as f64);
            }
        }
        let sum: f64 = shares.iter().sum();
        let squares: f64 = shares.iter().map(|share| share * share).sum();
        let jain = sum * sum / (50.0 * squares);
        assert!(jain >= 0.99, "seed {seed}: Jain index {jain:.4}, {shares:?}");
    }
}

#[test]
fn deadlines_are_met_or_refused_on_arrival() {
    for seed in seeds(3) {
        let mut lane = SimLane { requests: Some(Bucket::new(6000.0, 10.0)), spread: 0.05, ..SimLane::default() };
        lane.settings.requests_per_minute = Some(6000.0);
        let mut sim = Sim::new(wide(30), vec![lane], seed);
        for id in 0..200 {
            sim.submit(1, task(id));
        }
        // Something is known of the provider by then. What comes is more than can be done.
        let mut id = 1000;
        for tick in 0..200_u64 {
            for _ in 0..3 {
                let mut spec = task(id);
                let at = seconds(2.0 + tick as f64 * 0.015);
                spec.deadline = Some(at + ms(300 + id * 37 % 1500));
                sim.submit_at(at, 2 + id % 3, spec);
                id += 1;
            }
        }
        sim.run_tasks();
        let deadlines = sim.ended.iter().filter(|(task, _)| task.0 >= 1000);
        let (mut met, mut refused, mut missed) = (0, 0, 0);
        for (_, ended) in deadlines {
            match ended.verdict.status {
                Status::Answered => met += 1,
                Status::Refused(Refusal::Deadline { expected, allowed }) => {
                    assert!(expected > allowed);
                    refused += 1;
                }
                Status::Failed(Reason::Deadline) => missed += 1,
                other => panic!("seed {seed}: {other:?}"),
            }
        }
        println!("seed {seed}: {met} met, {refused} refused, {missed} missed");
        assert!(met >= 300, "seed {seed}: {met} met, {refused} refused, {missed} missed");
        assert!(missed * 50 <= met, "seed {seed}: {met} met, {refused} refused, {missed} missed");
    }
}

#[test]
fn a_task_whose_deadline_comes_is_ended_then_and_its_call_broken_off() {
    let mut sim = Sim::new(wide(1), vec![SimLane { usual: seconds(10.0), ..SimLane::default() }], 1);
    for id in 0..2 {
        let mut spec = task(id);
        spec.deadline = Some(seconds(3.0));
        sim.submit(1, spec);
    }
    sim.run_tasks();
    assert_eq!(sim.now, seconds(3.0));
    assert!(sim.ended.values().all(|ended| ended.verdict.status == Status::Failed(Reason::Deadline)));
    sim.run();
    assert_eq!(sim.lanes[0].in_flight, 0);
}

#[test]
fn workers_go_on_with_the_next_phase_and_fetches_leave_the_api_alone() {
    let mut fetch = SimLane { usual: ms(50), ..SimLane::default() };
    fetch.settings.api = false;
    let settings = Settings { max_nodes: 10, max_concurrent_api: 5, ..Settings::default() };
    let mut sim = Sim::new(settings, vec![SimLane::default(), fetch], 1);
    for id in 0..100 {
        let mut spec = task(id);
        spec.kind = Kind::Analyze;
        sim.submit(1, spec);
        let mut spec = task(1000 + id);
        spec.kind = Kind::Fetch;
        spec.lanes = vec![LaneId(1)];
        sim.submit(1, spec);
    }
    let wall = sim.run_tasks();
    assert_eq!(sim.lanes[0].most_in_flight, 5, "as many calls to the model as allowed");
    assert!(sim.lanes[1].most_in_flight >= 5, "and the other workers fetch meanwhile");
    assert!(wall <= seconds(4.3), "{wall:?}");
    let stats = sim.engine.stats();
    assert!(stats.workers <= 10 && stats.reused >= 150, "{stats:?}");
}

#[test]
fn a_client_that_is_gone_leaves_nothing_behind() {
    let mut sim = Sim::new(wide(5), vec![SimLane { usual: Duration::from_mins(1), ..SimLane::default() }], 1);
    for id in 0..1000 {
        sim.submit(id % 2, task(id));
    }
    sim.run_until(seconds(1.0));
    let client = drover_llm_dispatcher::core::ClientId(0);
    sim.tell(drover_llm_dispatcher::core::Input::CancelClient { client });
    sim.run_until(seconds(2.0));
    let cancelled = sim.ended.values().filter(|ended| ended.verdict.status == Status::Cancelled).count();
    assert_eq!((cancelled, sim.open.len()), (500, 500));
    // The calls of that client were broken off, so the other has all five places now.
    assert_eq!((sim.lanes[0].in_flight, sim.engine.stats().calls), (5, 5));
    for id in 0..1000 {
        sim.tell(drover_llm_dispatcher::core::Input::Cancel { task: TaskId(id) });
    }
    sim.run();
    let stats = sim.engine.stats();
    assert_eq!((stats.tasks, stats.queued, stats.calls, stats.busy), (0, 0, 0, 0));
    assert_eq!(sim.lanes[0].in_flight, 0);
}
