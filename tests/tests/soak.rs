//! The short size of the soak: by what went through and not by the clock, so that a slow machine sees as much as a fast one. Too
//! short to judge memory finely: what is found is a daemon that keeps what it passes on, or a file for each thing done.

use std::time::Duration;

use drover_e2e::soak::{self, Least, Plan};

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_comes_out_and_nothing_leaks_fast() {
    let least = Least { events: 14_000, swarms: 2, sessions: 30, calls: 200 };
    let plan = Plan {
        time: Duration::from_secs(5),
        least,
        // The recent events that a router keeps in memory are about 2,700 of these. 54 MB go by after those and as many again.
        settling_events: 5_000,
        delta_bytes: 6_000,
        swarm_time: Duration::from_secs(3),
        session_turns: 1,
        keep_events: 100_000,
        // What was seen without a leak was 14 at the most, in the router, whose heap takes longer to settle.
        growth_mib: 32.0,
        // A file for each session or for each prompt is more.
        growth_files: 12.0,
        slope_files: 20.0,
    };
    let report = soak::run(plan).await.unwrap_or_else(|error| panic!("{error:#}"));
    println!("{report:#?}");
    // One swarm stands beside those that come and go.
    assert!(report.swarms as u64 > least.swarms && report.events as u64 >= least.events, "{report:?}");
    assert!(report.turns.1 as u64 >= least.sessions && report.calls >= least.calls, "{report:?}");
    assert!(report.compared as u64 >= least.events && report.daemons.len() == 7, "{report:?}");
}
