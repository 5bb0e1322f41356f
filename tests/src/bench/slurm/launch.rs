//! From `drover launch` on the laptop to the first word of an agent on a compute host.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use drover_proto::router::WatchEventsRequest;
use drover_testkit::codex::{installed_below, repository_root};
use drover_testkit::lab::Options;

use super::super::figures::{Figure, Goal, Latencies};
use crate::slurm::{Seat, Site, codex, with};

pub(super) fn run(short: bool) -> anyhow::Result<Vec<Figure>> {
    let mut figures = one(None, short)?;
    if let Some(program) = installed_below(&repository_root().join("target/codex")) {
        figures.extend(one(Some(&program), short)?);
    }
    Ok(figures)
}

/// With codex, or with echo.
fn one(program: Option<&Path>, short: bool) -> anyhow::Result<Vec<Figure>> {
    let agent = if program.is_some() { "codex" } else { "echo" };
    let more = format!(
        "worker: {{agent: {agent}, drain_grace: 1s, codex_bin: {}, codex_home: {}}}\n",
        codex::program(),
        codex::settings()
    );
    with(Options::default(), Seat::Laptop, &more, async |site| {
        let mock = program.map(|program| codex::install(site, program)).transpose()?;
        let first = first_word(site).await?;
        let mut latencies = Latencies::default();
        for _ in 0..if short { 1 } else { 7 } {
            latencies.add(first_word(site).await?);
        }
        if let Some(mock) = mock {
            ensure!(mock.violations().is_empty(), "{:?}", mock.violations());
        }
        let later = latencies.quantile_ms(0.5) / 1000.0;
        let figure = |name: &str, ours: f64, goal: Goal| Figure {
            name: format!("launch of 4 nodes with {agent}: {name}"),
            ours,
            ideal: None,
            unit: "s",
            goal,
        };
        let goal = if short { Goal::Shown } else { Goal::Below(3.0) };
        Ok(vec![
            figure("to the first streamed word, Slurm's own time included, median", later, goal),
            figure("slowest", latencies.quantile_ms(1.0) / 1000.0, Goal::Shown),
            figure("more at the first, for connection, upload and follower", first.as_secs_f64() - later, Goal::Shown),
        ])
    })
}

/// How long a launch takes to the first streamed word.
async fn first_word(site: &Site) -> anyhow::Result<std::time::Duration> {
    let request = WatchEventsRequest { from_now: true, follow: true, ..Default::default() };
    let mut events = site.router().watch_events(request).await?.into_inner();
    while !events.message().await?.context("the stream ended")?.live {}
    let begun = Instant::now();
    let place = ["--nodes", "4", "--partition", "mi2508x", "--time", "00:10:00"];
    let mut command = site.command(&[&["launch", "--prompt", "begin @mock say='here we go'"][..], &place].concat());
    let launching = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (took, swarm) = loop {
        let batch = events.message().await?.context("the stream ended")?;
        if let Some(word) = batch.events.iter().find(|event| event.event == "assistant_delta") {
            break (begun.elapsed(), word.swarm_id.clone());
        }
        let failed = batch.events.iter().find(|event| event.event == "swarm_launch_failed");
        ensure!(failed.is_none(), "{failed:?}");
    };
    let output = launching.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    site.ok(&["terminate", &swarm])?;
    site.wait("Slurm's queue is empty", || Ok(site.queue()?.is_empty().then_some(())))?;
    Ok(took)
}
