//! The short size of the soak: long enough to see every event come out of three swarms, too short to judge memory finely.

use std::time::Duration;

use drover_e2e::soak::{self, Plan};

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_comes_out_and_nothing_leaks_fast() {
    let plan = Plan {
        time: Duration::from_secs(8),
        swarm_time: Duration::from_secs(3),
        keep_events: 100_000,
        growth_mib: 32.0,
        growth_of_memory_mib: 32.0,
        // Swarms that have ended keep theirs open for longer than this takes.
        growth_files: 32.0,
        slope_files: 64.0,
    };
    let report = soak::run(plan).await.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(report.swarms >= 3 && report.prompts > 20 && report.compared > 1000, "{report:?}");
    assert!(report.turns.0 > 5 && report.calls > 50 && report.daemons.len() == 7, "{report:?}");
}
