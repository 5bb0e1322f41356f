//! The short size of the chaos proof: the same code, fewer rounds, one fixed seed and one fresh one.

use drover_e2e::chaos::{self, Plan, Report};

async fn short(seed: u64) -> Report {
    let plan = Plan { seed, kills: 16, injections: 80, nodes: 4, gap_kills: 4 };
    // A failure names the seed.
    chaos::run(plan).await.unwrap_or_else(|error| panic!("{error:#}"))
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
