//! The short size of the chaos proof: the same code, fewer rounds, one fixed seed and one fresh one.

use drover_e2e::chaos::{self, Plan, Report};

fn plan(seed: u64) -> Plan {
    Plan { seed, kills: 16, injections: 80, nodes: 4, gap_kills: 4, forget: false }
}

#[expect(clippy::print_stdout, reason = "the figures of a run belong to its log")]
async fn short(seed: u64) -> Report {
    // A failure names the seed.
    let report = chaos::run(plan(seed)).await.unwrap_or_else(|error| panic!("{error:#}"));
    println!("{report:#?}");
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nothing_runs_twice_with_a_fixed_seed() {
    assert_eq!(short(7).await.kills.values().sum::<usize>(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nothing_runs_twice_with_a_fresh_seed() {
    let seed = rand::random();
    println!("seed {seed}");
    assert_eq!(short(seed).await.kills.values().sum::<usize>(), 16);
}

/// The proof has teeth: a worker that forgets what it began is caught by the agents' ledgers.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_forgets_what_it_began_is_found_out() {
    let error = chaos::run(Plan { forget: true, ..plan(7) }).await.expect_err("nothing was found");
    let error = format!("{error:#}");
    assert!(error.contains("carried out 2 times"), "{error}");
}
