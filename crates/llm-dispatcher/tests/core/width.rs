//! How many calls a provider takes at once, when it does not say.

use crate::provider::{Bucket, Says, SimLane};
use crate::sim::{Sim, rounds, seconds, seeds, task, wide};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Calls that were taken, could have been taken by one who knew the limit at every moment, and were refused.
#[derive(Default)]
struct Found {
    taken: f64,
    possible: f64,
    refused: f64,
}

impl Found {
    fn share(&self) -> f64 {
        self.taken / self.possible
    }
}

/// A limit between 5 and 500 that is another one every thirty seconds.
fn unknown_width(seed: u64, phases: usize, says: Says) -> Found {
    let mut rng = SmallRng::seed_from_u64(seed);
    let limits: Vec<u32> = (0..phases).map(|_| (5.0 * 100_f64.powf(rng.random())) as u32).collect();
    let mut lane = SimLane { width: Some(limits[0]), says, spread: 0.1, ..SimLane::default() };
    lane.settings.start_width = Some(10);
    let mut sim = Sim::new(wide(600), vec![lane], seed);
    let end = 30.0 * phases as f64;
    let mut best = 0.0;
    for (phase, &limit) in limits.iter().enumerate() {
        sim.change_at(seconds(30.0 * phase as f64), 0, |lane, to| lane.width = Some(to as u32), f64::from(limit));
        // A call holds its place for the time that the provider needs.
        best += 30.0 * f64::from(limit) / sim.lanes[0].usual.as_secs_f64();
    }
    // There is always something to do, and not all of it is in the queue from the start.
    let mut next = 0;
    let mut at = 0.0;
    while at < end {
        while sim.open.len() < 1500 {
            sim.submit(1, task(next));
            next += 1;
        }
        at += 0.25;
        sim.run_until(seconds(at));
        sim.ended.clear();
        sim.first_start.clear();
    }
    let lane = &sim.lanes[0];
    Found { taken: lane.accepted.len() as f64, possible: best, refused: lane.refused.len() as f64 }
}

#[test]
fn an_unknown_width_that_changes_is_found_again_and_again() {
    let mut all = Found::default();
    for seed in seeds(rounds(1, 50)) {
        let found = unknown_width(seed, 3, Says::Nothing);
        println!("seed {seed}: {:.4} of the oracle, {} of {} refused", found.share(), found.refused, found.taken);
        assert!(found.share() >= 0.90, "seed {seed}: {:.4} of the oracle", found.share());
        // Under a limit of five the one more that is tried each second is a greater share of all.
        let allowed = 0.005 * found.taken + 3.0 * 60.0;
        assert!(found.refused <= allowed, "seed {seed}: {} of {} refused", found.refused, found.taken);
        all.taken += found.taken;
        all.possible += found.possible;
        all.refused += found.refused;
    }
    let refused = all.refused / (all.refused + all.taken);
    println!("{:.4} of the oracle, {refused:.5} refused", all.share());
    assert!(all.share() >= 0.92, "{:.4} of the oracle", all.share());
    assert!(refused < 0.005 || rounds(0, 1) == 0, "{refused:.4} refused");
}

#[test]
fn an_unknown_rate_is_found_by_its_width() {
    for seed in seeds(rounds(1, 20)) {
        let mut lane =
            SimLane { requests: Some(Bucket::new(6000.0, 20.0)), says: Says::RetryAfter, ..SimLane::default() };
        lane.settings.start_width = Some(10);
        let mut sim = Sim::new(wide(300), vec![lane], seed);
        for id in 0..9000 {
            sim.submit(1, task(id));
        }
        sim.run_until(seconds(60.0));
        let lane = &sim.lanes[0];
        let share = lane.accepted.len() as f64 / 6000.0;
        let refused = lane.refused.len() as f64 / lane.accepted.len() as f64;
        println!("seed {seed}: {share:.4} of the rate, {refused:.4} refused");
        assert!(share >= 0.92, "seed {seed}: {share:.4} of the rate");
        assert!(refused < 0.05, "seed {seed}: {refused:.4} refused");
    }
}

#[test]
fn a_width_that_is_wide_enough_stays() {
    let mut sim = Sim::new(wide(100), vec![SimLane { width: Some(100), ..SimLane::default() }], 1);
    for id in 0..2000 {
        sim.submit(1, task(id));
    }
    let wall = sim.run_tasks();
    assert_eq!(sim.refused(), 0);
    assert!(wall < seconds(4.2), "{wall:?} for 20 rounds of 200 ms");
}
