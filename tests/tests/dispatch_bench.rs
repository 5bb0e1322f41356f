//! The dispatcher's benchmark runs: in a size at which its figures mean nothing, so only its checks count (every task has one
//! answer). Table and limits take a minute in any size, and only `cargo xtask bench` runs them.

use drover_e2e::bench::dispatch::{Part, Plan, run};

async fn printed(parts: &'static [Part], count: usize) {
    let figures = run(Plan::SHORT, parts).await.unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(figures.len(), count);
    assert!(figures.iter().all(|figure| figure.ours.is_finite()), "{figures:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn speed_front_and_memory() {
    printed(&[Part::Speed, Part::Front, Part::Memory], 12).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_calls_faults_and_fairness() {
    printed(&[Part::Faults], 9).await;
}
