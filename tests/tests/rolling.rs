//! The short size of the rolling restart: the same code, fewer prompts, one round.

use drover_e2e::rolling::{self, Plan};

const SHORT: Plan = Plan { injections: 120, nodes: 2, rounds: 1, from: None, gives_up: false };

#[tokio::test(flavor = "multi_thread")]
async fn every_daemon_is_replaced_under_load_and_no_client_sees_more_than_three_failures() {
    let report = rolling::run(SHORT).await.unwrap_or_else(|error| panic!("{error:#}"));
    println!("{report:#?}");
    // Four of the login side and `up`, three of each node.
    assert_eq!(report.replaced.len(), 11, "{report:?}");
    assert!(report.versions[0] != report.versions[1] && report.turns > 10 && report.calls > 10, "{report:?}");
}

/// The proof has teeth: a client that never asks again is disappointed.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_asks_again_sees_the_restarts() {
    let error = rolling::run(Plan { gives_up: true, ..SHORT }).await.expect_err("nothing was seen");
    let error = format!("{error:#}");
    assert!(error.contains("was not taken"), "{error}");
}
