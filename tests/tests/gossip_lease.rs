//! The lease of the leader, in virtual time: what must never be, and that the judge would notice. See
//! `tests/src/gossip/lease_sim.rs`.
#![expect(clippy::print_stdout, reason = "a seed that failed has to be known")]

use std::time::Duration;

use drover_e2e::gossip::lease_sim::{Broken, Faults, Plan, Violation, run};

const PLAN: Plan = Plan {
    seed: 0,
    nodes: 7,
    length: Duration::from_mins(10),
    loss: 3,
    faults: Faults::Chaos,
    broken: Broken::Nothing,
};

/// A fixed seed and a fresh one, which is printed.
fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let fresh = rand::random::<u32>();
    println!("fresh seeds from {fresh}");
    (1..=count).chain((0..count).map(move |index| u64::from(fresh) + index))
}

#[test]
fn never_two_leaders_whatever_happens() {
    let (mut leaders, mut sets, mut epochs) = (0, 0, 0);
    for seed in seeds(60) {
        let nodes = 3 + seed as usize % 7;
        let plan = Plan { seed, nodes, loss: [0, 3, 10, 25][seed as usize % 4], ..PLAN };
        let report = run(plan).unwrap_or_else(|violation| panic!("{violation:?} in {plan:?}"));
        leaders += report.leaders;
        sets += report.sets;
        epochs += report.epochs;
    }
    println!("{leaders} leaderships, {sets} voter sets, {epochs} charters");
    // Without these nothing would have been tried.
    assert!(leaders > 120 * 20 && sets > 120 * 10 && epochs > 90, "{leaders} {sets} {epochs}");
}

#[test]
fn the_same_seed_gives_the_same() {
    let plan = Plan { seed: 11, ..PLAN };
    assert_eq!(run(plan), run(plan));
}

#[test]
fn a_killed_leader_has_a_successor_within_ten_seconds() {
    let mut gaps = Vec::new();
    for seed in seeds(15) {
        let plan = Plan {
            seed,
            nodes: 3 + seed as usize % 6,
            loss: [0, 5, 10][seed as usize % 3],
            faults: Faults::KillLeader,
            ..PLAN
        };
        let report = run(plan).unwrap_or_else(|violation| panic!("{violation:?} in {plan:?}"));
        gaps.extend(report.gaps);
    }
    let worst = gaps.iter().max().copied().unwrap_or(0);
    let mean = gaps.iter().sum::<u64>() / gaps.len() as u64;
    println!("{} kills: {:.2} s on average, {:.2} s at worst", gaps.len(), mean as f64 / 1e6, worst as f64 / 1e6);
    assert!(gaps.len() > 30 * 20);
}

#[test]
fn a_minority_has_no_leader_and_the_majority_has_one() {
    let mut gaps = Vec::new();
    for seed in seeds(15) {
        let plan = Plan { seed, nodes: 3 + seed as usize % 5, faults: Faults::CutOff, ..PLAN };
        let report = run(plan).unwrap_or_else(|violation| panic!("{violation:?} in {plan:?}"));
        gaps.extend(report.gaps);
    }
    assert!(gaps.len() > 30 * 10, "{gaps:?}");
    hardly_ever_late(&gaps);
}

/// Ten seconds are the goal here too. Where no vote may be missing and chance loses or splits several in a row it takes longer: fresh seeds find
/// such a gap once in many runs.
#[track_caller]
fn hardly_ever_late(gaps: &[u64]) {
    let late: Vec<&u64> = gaps.iter().filter(|gap| **gap > 10_000_000).collect();
    assert!(late.len() * 200 <= gaps.len(), "{late:?} of {}", gaps.len());
}

/// The first violation in this many runs.
fn broken(broken: Broken, faults: Faults) -> Option<Violation> {
    (1..400).find_map(|seed| run(Plan { seed, nodes: 3 + seed as usize % 5, faults, broken, ..PLAN }).err())
}

#[test]
fn each_guard_is_needed() {
    let forgotten = broken(Broken::VotesForgotten, Faults::Chaos);
    assert!(matches!(forgotten, Some(Violation::TwoInOneTerm(_) | Violation::TwoAtOnce(..))), "{forgotten:?}");
    let ignored = broken(Broken::OldMajorityIgnored, Faults::Chaos);
    assert!(matches!(ignored, Some(Violation::TwoInOneTerm(_) | Violation::TwoAtOnce(..))), "{ignored:?}");
    let at_once = broken(Broken::LeaseNotWaitedOut, Faults::Chaos);
    assert!(matches!(at_once, Some(Violation::TwoAtOnce(..))), "{at_once:?}");
}
