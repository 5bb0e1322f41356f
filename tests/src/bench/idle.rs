//! What the login-side daemons cost while nothing happens.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;
use drover_testkit::cluster::Cluster;

use super::figures::{Figure, Goal};
use crate::soak::resident_mib;
use crate::stage::Stage;

/// CPU and memory over this time, with a swarm of this many quiet nodes.
pub async fn run(nodes: u32, time: Duration) -> anyhow::Result<Vec<Figure>> {
    let stage = Stage::start().await?;
    stage.launch(nodes).await?;
    // The allocator of the stage is played; the real one idles beside it in an instance of its own.
    let cluster = Cluster::start("{}").await?;
    let allocator = cluster.daemon("slurm-allocator").context("no allocator")?;
    let pids = [stage.process("router")?.pid, stage.process("outbox-follower")?.pid, allocator.pid];
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = cpu_seconds(&pids)?;
    tokio::time::sleep(time).await;
    let used = cpu_seconds(&pids)? - before;
    Ok(vec![
        Figure {
            name: format!("idle CPU of router, follower and allocator together, {nodes} quiet nodes"),
            ours: used / time.as_secs_f64() * 100.0,
            ideal: None,
            unit: "% of a core",
            goal: Goal::Below(2.0),
        },
        Figure {
            name: format!("resident memory of the router, {nodes} quiet nodes"),
            ours: resident_mib(pids[0])?,
            ideal: None,
            unit: "MiB",
            goal: Goal::Below(64.0),
        },
    ])
}

fn cpu_seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let mut total = 0.0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let behind_name = &stat[stat.rfind(')').context("no name in stat")? + 1..];
        let fields: Vec<&str> = behind_name.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        total += (ticks(11) + ticks(12)) / ticks_per_second;
    }
    Ok(total)
}
