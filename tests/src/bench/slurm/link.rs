//! Throughput: a gibibyte in a thousand outboxes to a client that stores nothing, beside `ssh login cat` of the same files.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use drover_testkit::lab::Options;
use drover_testkit::netns::Wan;

use super::super::figures::{Figure, Goal};
use super::{SWARM, count, cpu_seconds, follow, outboxes, warm};
use crate::slurm::{Seat, Site, with};

pub(super) fn run(short: bool) -> anyhow::Result<Vec<Figure>> {
    let (nodes, bytes) = if short { (20, 200_000) } else { (1000, 1 << 20) };
    with(Options { nodes: 1, ..Options::default() }, Seat::Laptop, "", async |site| {
        let one = outboxes(site, nodes, bytes)?;
        let all = one * u64::from(nodes);
        warm(site).await?;
        let mut figures = Vec::new();
        for (name, kbit_per_s, goal) in
            [("1 Gbit/s", 1_000_000.0, Goal::AtLeast(0.8)), ("a link without a limit", 0.0, Goal::Shown)]
        {
            site.lab.wan(Wan { kbit_per_s, ..Wan::default() })?;
            let ideal = cat(site, all)?;
            let pids = [site.processes("slurm-allocator")?, site.followers()?].concat();
            let before = cpu_seconds(&pids)?;
            let begun = Instant::now();
            let (_open, mut stream) = follow(site, nodes).await?;
            let took = count(&mut stream, all, begun).await?.as_secs_f64();
            let used = cpu_seconds(&pids)? - before;
            let mib = |seconds: f64| all as f64 / f64::from(1 << 20) / seconds;
            let what = format!("{nodes} outboxes, {:.0} MiB, {name}", all as f64 / f64::from(1 << 20));
            figures.push(Figure {
                name: format!("{what}: through follower and SSH"),
                ours: mib(took),
                ideal: Some(mib(ideal)),
                unit: "MiB/s",
                goal: Goal::Shown,
            });
            figures.push(Figure {
                name: format!("{what}: share of `ssh login cat`"),
                ours: ideal / took,
                ideal: None,
                unit: "",
                goal: if short { Goal::Shown } else { goal },
            });
            figures.push(Figure {
                name: format!("{what}: processor time of follower and allocator"),
                ours: used,
                ideal: None,
                unit: "s",
                goal: Goal::Shown,
            });
        }
        Ok(figures)
    })
}

/// Seconds that the bytes take through the `ssh` of the machine.
fn cat(site: &Site, wanted: u64) -> anyhow::Result<f64> {
    let mut command = Command::new("ssh");
    command.arg("-F").arg(site.lab.ssh_config()).arg("login");
    command.arg(format!("cat {}/mailbox/{SWARM}/*/outbox/1/*.jsonl", site.base_there()));
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = child.stdout.take().context("no output")?;
    let (mut buffer, mut seen) = (vec![0; 256 << 10], 0);
    loop {
        let read = output.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        seen += read as u64;
    }
    ensure!(child.wait()?.success() && seen == wanted, "cat gave {seen} of {wanted} bytes");
    Ok(begun.elapsed().as_secs_f64())
}
