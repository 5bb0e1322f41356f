//! Ten analyses, one after another and then side by side, by a provider that only pretends; and how much faster that was.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::dispatch::{self as pb, dispatch_request, dispatch_response};
use tokio_stream::iter;

use crate::dispatcher::{self, Rpc};

/// How many analyses.
pub(super) const COUNT: usize = 10;
/// How long the provider pretends to think.
pub(super) const LATENCY: &str = "150ms";

/// The ten, done twice.
pub(super) struct Seen {
    /// One after another.
    sequential: Duration,
    /// Side by side.
    parallel: Duration,
    /// How many were under way at once at most.
    widest: u32,
}

impl Seen {
    /// How many times faster. What was under way at once bounds it: more would be a mistake of measurement.
    fn speedup(&self) -> f64 {
        let ratio = self.sequential.as_secs_f64() / self.parallel.as_secs_f64().max(1e-6);
        ratio.min(f64::from(self.widest))
    }

    /// It was clearly faster.
    pub(super) fn is_well(&self) -> bool {
        self.speedup() > 2.0
    }

    /// In a line.
    pub(super) fn words(&self) -> String {
        format!(
            "{COUNT} in {:.2} s, one after another {:.2} s: {:.1} times as fast, {} at once; simulated",
            self.parallel.as_secs_f64(),
            self.sequential.as_secs_f64(),
            self.speedup(),
            self.widest
        )
    }
}

/// Does them both ways, with equal prompts.
pub(super) async fn both_ways(rpc: &mut Rpc) -> anyhow::Result<Seen> {
    let (sequential, _) = once(rpc, 1).await?;
    let (parallel, summary) = once(rpc, 0).await?;
    Ok(Seen { sequential, parallel, widest: summary.widest })
}

async fn once(rpc: &mut Rpc, concurrency: u32) -> anyhow::Result<(Duration, pb::RunSummary)> {
    let open = pb::OpenRun { concurrency, provider: "sim".to_owned(), source: "demo".to_owned(), ..Default::default() };
    let tasks = (1..=COUNT)
        .map(|number| pb::Task { prompt: format!("Analyse technology {number} of {COUNT}."), ..Default::default() });
    let requests = [
        dispatch_request::Request::Open(open),
        dispatch_request::Request::Tasks(pb::TaskBatch { tasks: tasks.collect() }),
    ];
    let requests = requests.map(|request| pb::DispatchRequest { request: Some(request) });
    let began = Instant::now();
    let answers = rpc.dispatch(iter(requests)).await.map_err(|status| dispatcher::of_status(&status))?;
    let mut answers = answers.into_inner();
    let mut summary = None;
    while let Some(answer) = answers.message().await.map_err(|status| dispatcher::of_status(&status))? {
        if let Some(dispatch_response::Response::Summary(last)) = answer.response {
            summary = Some(last);
        }
    }
    let took = began.elapsed();
    let summary = summary.context("the run ended without a summary")?;
    ensure!(summary.succeeded == COUNT as u64, "{} of {COUNT} analyses succeeded", summary.succeeded);
    Ok((took, summary))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speedup_is_never_above_what_was_under_way_at_once() {
        let seen = |sequential, parallel, widest| Seen {
            sequential: Duration::from_millis(sequential),
            parallel: Duration::from_millis(parallel),
            widest,
        };
        assert!((seen(2000, 250, 10).speedup() - 8.0).abs() < 1e-9);
        assert!((seen(2000, 100, 10).speedup() - 10.0).abs() < 1e-9);
        assert!(seen(2000, 250, 10).words().contains("8.0 times as fast, 10 at once; simulated"));
        assert!(!seen(2000, 1900, 10).is_well());
    }
}
