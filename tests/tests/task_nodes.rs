//! The short size of the proof that pages are read on nodes.

use drover_e2e::task_nodes::{Plan, run};

/// `worker.run_tasks` is what makes nodes take them.
#[tokio::test(flavor = "multi_thread")]
async fn pages_are_read_on_nodes_and_none_is_lost_or_read_twice_when_nodes_die() {
    let plan = Plan { tasks: 1000, extract_every: 5, nodes: 8, kills: 3 };
    let report = run(plan).await.unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(report.killed.len(), plan.kills, "{report:?}");
}
