//! What Slurm's controller is asked with twenty swarms, by its own count.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_testkit::lab::{Options, USER};

use super::super::figures::{Figure, Goal};
use crate::slurm::{Seat, Site, with};

pub(super) fn run(short: bool) -> anyhow::Result<Vec<Figure>> {
    let (swarms, minutes) = if short { (3_usize, 1) } else { (20, 2) };
    // Four run and sixteen wait: what waits is looked at more often than what runs.
    let options = Options { nodes: 4, ..Options::default() };
    with(options, Seat::Laptop, "worker: {agent: echo, drain_grace: 1s}\n", async |site| {
        // A launch returns when its swarm is up; sixteen of these wait for a node as long as this lasts.
        let mut launches = Vec::new();
        for _ in 0..swarms {
            let mut launch = site.command(&[
                "launch",
                "--nodes",
                "1",
                "--partition",
                "mi2508x",
                "--time",
                "00:30:00",
                "--detach",
                "--json",
            ]);
            launches.push(Ended(launch.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?));
        }
        // Submitting costs calls too, and takes as long as the budget for them says.
        let begun = Instant::now();
        while site.queue()?.len() < swarms {
            ensure!(begun.elapsed() < Duration::from_mins(10), "not every job is in the queue");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before = asked(site)?;
        tokio::time::sleep(Duration::from_mins(minutes)).await;
        let calls = (asked(site)? - before) as f64 / minutes as f64;
        Ok(vec![Figure {
            name: format!("calls to Slurm's controller with {swarms} swarms, by sdiag"),
            ours: calls,
            ideal: None,
            unit: "/min",
            goal: Goal::Below(f64::from(crate::slurm::CALLS_PER_MINUTE) + 0.5),
        }])
    })
}

/// A command that is ended when it is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many calls of the user the controller has counted.
fn asked(site: &Site) -> anyhow::Result<u64> {
    let text = String::from_utf8(site.lab.root("ctl", "sdiag").output()?.stdout)?;
    let line = text.lines().find(|line| line.trim_start().starts_with(USER)).context("sdiag does not know the user")?;
    let number = line.split("count:").nth(1).and_then(|rest| rest.split_ascii_whitespace().next());
    Ok(number.context("sdiag has no count")?.parse()?)
}
