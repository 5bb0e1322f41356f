//! The benchmarks run: in a size at which their figures mean nothing, so only their checks count (every answer by its id,
//! every event seen, in order).

use std::time::Duration;

use drover_e2e::bench::figures::Figure;
use drover_e2e::bench::{control, events, idle, inject, waits};

fn printed(figures: anyhow::Result<Vec<Figure>>, count: usize) {
    let figures = figures.unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(figures.len(), count);
    let measured = |figure: &Figure| figure.ours.is_finite() && figure.ideal.is_none_or(|ideal| ideal > 0.0);
    assert!(figures.iter().all(measured), "{figures:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_and_inject() {
    printed(control::run(1).await, 3);
    printed(inject::run(20, 1).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_and_idle() {
    printed(events::run(8_000).await, 2);
    printed(idle::run(20, Duration::from_secs(1)).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn told_and_polled() {
    printed(waits::run(waits::Plan::SHORT).await, 8);
}
