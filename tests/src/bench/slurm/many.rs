//! As many hosts as a laboratory has: launched, asked, answered, ended, over one SSH connection and one follower.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use drover_testkit::lab::Options;

use super::super::figures::{Figure, Goal};
use crate::slurm::{Seat, with};

pub(super) fn run(nodes: u32) -> anyhow::Result<Vec<Figure>> {
    let options = Options { nodes, ..Options::default() };
    with(options, Seat::Laptop, "worker: {agent: echo, drain_grace: 2s}\n", async |site| {
        let seconds = |name: &str, begun: Instant| Figure {
            name: format!("{nodes} hosts: {name}"),
            ours: begun.elapsed().as_secs_f64(),
            ideal: None,
            unit: "s",
            goal: Goal::Shown,
        };
        let mut figures = Vec::new();
        let begun = Instant::now();
        let count = nodes.to_string();
        let place = ["--nodes", &count, "--partition", "mi2508x", "--time", "00:30:00"];
        let launched = site.json(&[&["launch", "--detach", "--json"][..], &place].concat())?;
        let swarm = launched["swarm_id"].as_str().context("no swarm")?.to_owned();
        site.wait_status(&swarm, "all are ready", |status| {
            let idle = status["nodes"].as_array().map(|all| all.iter().filter(|node| node["state"] == "idle").count());
            idle == Some(nodes as usize)
        })?;
        figures.push(seconds("first launch, with the upload, until all are ready", begun));
        for round in 0..3 {
            let begun = Instant::now();
            let word = format!("round {round} of them all");
            let said = site.ok(&["inject", &swarm, "--prompt", &word])?;
            let answers = said.stdout.lines().filter(|line| line.ends_with(&word)).count();
            ensure!(answers == nodes as usize, "{answers} of {nodes} answered:\n{}", said.stdout);
            if round == 2 {
                figures.push(seconds("inject to all until every answer is there", begun));
            }
        }
        for (name, seen) in
            [("SSH connections", site.lab.ssh_connections()?), ("followers on the login host", site.followers()?.len())]
        {
            figures.push(Figure {
                name: format!("{nodes} hosts: {name}"),
                ours: seen as f64,
                ideal: Some(1.0),
                unit: "",
                goal: Goal::Below(1.5),
            });
        }
        let begun = Instant::now();
        site.ok(&["terminate", &swarm])?;
        site.wait("Slurm's queue is empty", || Ok(site.queue()?.is_empty().then_some(())))?;
        figures.push(seconds("terminate until Slurm has no job", begun));
        Ok(figures)
    })
}
