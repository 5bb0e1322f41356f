//! The short size of the dispatcher's kill proof: the same code, fewer rounds, one fixed seed and one fresh one.

use drover_e2e::dispatch_chaos::{Plan, Report, run};

#[expect(clippy::print_stdout, reason = "the figures of a run belong to its log")]
fn short(seed: u64, tasks: usize) -> Report {
    println!("seed {seed}");
    let plan = Plan { seed, histories: 1, paid: 3000, tasks, width: 50 };
    // A failure names the seed.
    let report = run(&plan).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    println!("{report:#?}");
    report
}

#[test]
fn the_cap_holds_and_nothing_is_paid_for_again_with_a_fixed_seed() {
    let report = short(11, 2000);
    assert!(report.resumed > 500 && report.finished_before > 0, "{report:?}");
}

#[test]
fn the_cap_holds_and_nothing_is_paid_for_again_with_a_fresh_seed() {
    let report = short(rand::random(), 0);
    assert!(report.least_used >= 0.97 && report.most_spent <= 1.0, "{report:?}");
}
