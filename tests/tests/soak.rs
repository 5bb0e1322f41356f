//! The short size of the soak: long enough to see every event come out, too short to judge memory finely.

use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_comes_out_and_nothing_leaks_fast() {
    let report = drover_e2e::soak::run(Duration::from_secs(8), 32.0).await.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(report.prompts > 20 && report.events > report.prompts * 100, "{report:?}");
}
