//! From a worker's record to its event at the laptop, without attribute caching and with three seconds of it.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use drover_proto::router::{InjectRequest, WatchEventsRequest};
use drover_testkit::lab::Options;

use super::super::figures::{Figure, Goal, Latencies};
use super::round_trips;
use crate::slurm::{Seat, with};

pub(super) fn run(short: bool) -> anyhow::Result<Vec<Figure>> {
    let mut figures = one(0, short)?;
    figures.extend(one(3, short)?);
    Ok(figures)
}

fn one(cache_seconds: u32, short: bool) -> anyhow::Result<Vec<Figure>> {
    let options = Options { nodes: 4, cache_seconds, ..Options::default() };
    let (deltas, seconds) = if short { (20, 4) } else { (300, 30) };
    with(options, Seat::Laptop, "worker: {agent: echo}\n", async |site| {
        let place = ["--nodes", "4", "--partition", "mi2508x", "--time", "00:10:00"];
        let launched = site.json(&[&["launch", "--detach", "--json"][..], &place].concat())?;
        let swarm = launched["swarm_id"].as_str().context("no swarm")?.to_owned();
        site.wait_status(&swarm, "the swarm runs", |status| status["status"] == "running")?;
        let trip = round_trips(site)?.quantile_ms(0.5);

        let request = WatchEventsRequest { from_now: true, follow: true, ..Default::default() };
        let mut events = site.router().watch_events(request).await?.into_inner();
        while !events.message().await?.context("the stream ended")?.live {}
        let request = InjectRequest {
            swarm_id: swarm,
            content: format!("say\n@echo deltas={deltas} over={seconds}s"),
            ..Default::default()
        };
        // Held, so that the answer is not cut off.
        let _steps = site.router().inject(request).await?;
        let (mut latencies, mut ended, mut seen) = (Latencies::default(), 0, 0);
        while ended < 4 {
            let batch = events.message().await?.context("the stream ended")?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64;
            for event in batch.events {
                if event.event == "assistant_delta" {
                    latencies.add(std::time::Duration::from_micros(now.saturating_sub(event.timestamp_us)));
                    seen += 1;
                }
                ended += usize::from(event.event == "turn_complete");
            }
        }
        ensure!(seen == deltas * 4, "{seen} of {} deltas came", deltas * 4);
        let how = if cache_seconds == 0 { "no caching".to_owned() } else { format!("{cache_seconds} s of caching") };
        let goal = if cache_seconds == 0 { trip + 20.0 } else { 3500.0 };
        let figure = |at: &str, quantile: f64, goal: Goal| Figure {
            name: format!("record to event at the laptop, {how}, {at}; ideal: one round trip"),
            ours: latencies.quantile_ms(quantile),
            ideal: Some(trip),
            unit: "ms",
            goal,
        };
        let goal = if short { Goal::Shown } else { Goal::Below(goal) };
        Ok(vec![figure("median", 0.5, goal), figure("p99", 0.99, Goal::Shown)])
    })
}
