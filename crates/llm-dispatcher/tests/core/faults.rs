//! Providers that fail, are slow, or are down.

use std::time::Duration;

use crate::provider::{Bucket, Says, SimLane};
use crate::sim::{Sim, ms, rounds, seconds, seeds, task, wide};
use drover_llm_dispatcher::core::{BreakerState, LaneId, Status, Warning};

#[test]
fn no_task_is_lost_or_answered_twice_among_faults() {
    for seed in seeds(rounds(0, 50)) {
        let lane = SimLane { errors: 0.10, resets: 0.05, hung: 0.02, garbage: 0.01, ..SimLane::default() };
        let mut sim = Sim::new(wide(100), vec![lane], seed);
        for id in 0..10_000 {
            sim.submit(id % 7, task(id));
        }
        let wall = sim.run_tasks();
        // The simulator itself refuses a second verdict.
        assert_eq!(sim.answered(), 10_000, "seed {seed}");
        let ideal = seconds(sim.starts as f64 / 100.0 * 0.204);
        println!("seed {seed}: {wall:?}, {} calls, {} hedges, ideal {ideal:?}", sim.starts, sim.hedges);
        assert!(wall <= ideal.mul_f64(1.15), "seed {seed}: {wall:?} for {} calls, ideal {ideal:?}", sim.starts);
        assert!(sim.starts <= 10_000 * 135 / 100, "seed {seed}: {} calls for 10000 tasks", sim.starts);
        let opened = sim.warnings.iter().filter(|(_, warning)| matches!(warning, Warning::BreakerOpen { .. })).count();
        assert_eq!(opened, 0, "seed {seed}: a provider that mostly works was left alone");
    }
}

#[test]
fn slow_calls_cost_a_batch_little() {
    let mut walls = Vec::new();
    let mut starts = 0;
    let seeds = seeds(50);
    for &seed in &seeds {
        let lane = SimLane { slow_share: 0.05, ..SimLane::default() };
        let mut sim = Sim::new(wide(100), vec![lane], seed);
        for id in 0..100 {
            sim.submit(1, task(id));
        }
        walls.push(sim.run_tasks());
        starts += sim.starts;
        assert_eq!(sim.answered(), 100);
    }
    walls.sort_unstable();
    let median = walls[walls.len() / 2];
    let p95 = walls[walls.len() * 95 / 100];
    let extra = starts as f64 / (100 * seeds.len()) as f64 - 1.0;
    println!("median {median:?}, p95 {p95:?}, {extra:.4} extra calls");
    assert!(median <= ms(460), "median {median:?}");
    assert!(p95 <= ms(720), "p95 {p95:?}");
    assert!(extra <= 0.06, "{extra:.4} extra calls");
}

#[test]
fn answers_that_come_one_after_the_other_are_not_slow() {
    let mut walls = Vec::new();
    let (mut starts, mut batches) = (0, 0);
    for seed in seeds(rounds(20, 50)) {
        // The last of a hundred is heard 50 ms after the first.
        let lane = SimLane { slow_share: 0.05, serial: Duration::from_micros(500), ..SimLane::default() };
        let mut sim = Sim::new(wide(100), vec![lane], seed);
        for id in 0..100 {
            sim.submit(1, task(id));
        }
        walls.push(sim.run_tasks());
        starts += sim.starts;
        batches += 1;
    }
    walls.sort_unstable();
    let (median, p95) = (walls[walls.len() / 2], walls[walls.len() * 95 / 100 - 1]);
    let extra = starts as f64 / f64::from(100 * batches) - 1.0;
    println!("median {median:?}, p95 {p95:?}, {extra:.4} extra calls");
    assert!(median <= ms(520), "median {median:?}");
    assert!(p95 <= ms(820), "p95 {p95:?}");
    assert!(extra <= 0.07, "{extra:.4} extra calls");
}

#[test]
fn hedges_stay_in_proportion_however_answers_are_spread() {
    for seed in seeds(rounds(0, 20)) {
        let lane = SimLane { sigma: 0.6, ..SimLane::default() };
        let mut sim = Sim::new(wide(50), vec![lane], seed);
        for id in 0..5000 {
            sim.submit(1, task(id));
        }
        sim.run_tasks();
        assert!(sim.hedges <= 5000 * 6 / 100, "seed {seed}: {} hedges", sim.hedges);
        assert!(sim.hedges >= 100, "seed {seed}: {} hedges", sim.hedges);
    }
}

#[test]
fn when_the_whole_provider_is_slow_hedging_is_off() {
    let mut sim = Sim::new(wide(50), vec![SimLane::default()], 3);
    for id in 0..4000 {
        sim.submit(1, task(id));
    }
    sim.change_at(seconds(2.0), 0, |lane, _| lane.usual = ms(2000), 0.0);
    sim.run_until(seconds(2.0));
    let before = sim.hedges;
    sim.run_until(seconds(8.0));
    let during = sim.hedges - before;
    assert!(during <= 13, "{during} hedges of a provider that is slow as a whole");
    assert!(sim.warnings.iter().any(|(_, warning)| matches!(warning, Warning::HedgingOff { .. })));
    sim.run_tasks();
    assert_eq!(sim.answered(), 4000);
}

#[test]
fn tasks_that_must_not_run_twice_are_never_hedged() {
    let lane = SimLane { slow_share: 0.1, ..SimLane::default() };
    let mut sim = Sim::new(wide(20), vec![lane], 5);
    for id in 0..500 {
        let mut spec = task(id);
        spec.hedge = false;
        sim.submit(1, spec);
    }
    sim.run_tasks();
    assert_eq!((sim.hedges, sim.starts), (0, 500));
}

#[test]
fn an_outage_is_left_for_the_next_of_the_chain_and_found_to_be_over() {
    for seed in seeds(rounds(1, 20)) {
        let lanes = vec![SimLane::default(), SimLane::default()];
        let mut sim = Sim::new(wide(20), lanes, seed);
        for id in 0..3000 {
            let mut spec = task(id);
            spec.lanes = vec![LaneId(0), LaneId(1)];
            sim.submit(1, spec);
        }
        sim.change_at(seconds(3.0), 0, |lane, _| lane.down = true, 0.0);
        sim.change_at(seconds(10.0), 0, |lane, _| lane.down = false, 0.0);
        sim.run_until(seconds(2.9));
        assert!(sim.lanes[1].accepted.is_empty(), "the first lane works");
        sim.run_until(seconds(10.0));
        let first = sim.lanes[1].accepted[0];
        assert!(first <= seconds(4.0), "seed {seed}: the second lane took over at {first:?}");
        let steady = sim.lanes[1].accepted.iter().filter(|&&at| at > seconds(4.0) && at <= seconds(9.0)).count();
        assert!(steady >= 450, "seed {seed}: {steady} of 500 calls in five seconds of outage");
        sim.run_tasks();
        assert_eq!(sim.answered(), 3000, "seed {seed}");
        let back = sim.lanes[0].accepted.iter().find(|&&at| at > seconds(10.0)).copied();
        assert!(back.is_some_and(|at| at < seconds(18.0)), "seed {seed}: back at {back:?}");
        assert_eq!(sim.engine.lane(LaneId(0)).unwrap().breaker, BreakerState::Closed);
    }
}

#[test]
fn an_outage_without_a_second_lane_loses_nothing() {
    let mut sim = Sim::new(wide(50), vec![SimLane::default()], 9);
    for id in 0..1000 {
        sim.submit(1, task(id));
    }
    sim.change_at(seconds(1.0), 0, |lane, _| lane.down = true, 0.0);
    sim.change_at(seconds(60.0), 0, |lane, _| lane.down = false, 0.0);
    sim.run_tasks();
    assert_eq!(sim.answered(), 1000);
    assert!(sim.starts <= 1250, "{} calls: a provider that is down is left alone", sim.starts);
}

#[test]
fn calls_that_never_end_are_broken_off() {
    let mut lane = SimLane { hung: 1.0, ..SimLane::default() };
    lane.settings.timeout = Duration::from_secs(5);
    let mut sim = Sim::new(wide(10), vec![lane], 2);
    sim.submit(1, task(0));
    sim.change_at(seconds(4.0), 0, |lane, _| lane.hung = 0.0, 0.0);
    sim.run_tasks();
    let ended = sim.ended[&task(0).id];
    assert_eq!((ended.verdict.status, ended.verdict.attempts), (Status::Answered, 2));
    assert!(ended.at < seconds(5.5), "{:?}", ended.at);
}

#[test]
fn a_lane_that_asks_for_a_long_pause_is_passed_over_meanwhile() {
    let lanes = vec![
        SimLane { requests: Some(Bucket::new(2.0, 10.0)), says: Says::RetryAfter, ..SimLane::default() },
        SimLane::default(),
    ];
    let mut sim = Sim::new(wide(10), lanes, 1);
    for id in 0..200 {
        let mut spec = task(id);
        spec.lanes = vec![LaneId(0), LaneId(1)];
        sim.submit(1, spec);
    }
    let wall = sim.run_tasks();
    assert_eq!(sim.answered(), 200);
    assert!(wall < seconds(6.0), "{wall:?} though the second lane was free");
    assert!(sim.lanes[0].refused.len() <= 10, "{} refusals", sim.lanes[0].refused.len());
}
