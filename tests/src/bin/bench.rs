//! `cargo xtask bench NAME`: figures beside the ideal of the same run, as a Markdown table.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use drover_e2e::bench::{control, dispatch, events, figures, gossip, idle, inject, slurm, waits};
use drover_e2e::mounts;

/// Measures the local swarm beside the ideal.
#[derive(Parser)]
struct Args {
    /// Which figures; all of them when none is named
    #[arg(value_enum)]
    names: Vec<Name>,
    /// So many joins instead of a hundred
    #[arg(long, value_name = "COUNT")]
    joins: Option<usize>,
    /// A few seconds in all, to see that it works
    #[arg(long)]
    short: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Name {
    Control,
    Events,
    Waits,
    Inject,
    Idle,
    Handoff,
    Gossip,
    GossipSpeed,
    GossipJoins,
    GossipVerdicts,
    GossipRegions,
    Slurm,
    SlurmLaunch,
    SlurmLink,
    SlurmWaits,
    SlurmIdle,
    SlurmCalls,
    SlurmMany,
    SlurmCodex,
    Dispatch,
    DispatchSpeed,
    DispatchFront,
    DispatchMemory,
    DispatchTable,
    DispatchLimits,
    DispatchFaults,
    DispatchRivals,
}

impl Name {
    /// All, each once: the others are parts of the one before them.
    const WHOLE: &[Self] = &[
        Self::Control,
        Self::Events,
        Self::Waits,
        Self::Inject,
        Self::Idle,
        Self::Handoff,
        Self::Gossip,
        Self::Slurm,
        Self::Dispatch,
    ];

    /// The parts of the dispatcher's benchmark that a name stands for.
    fn of_dispatch(self) -> &'static [dispatch::Part] {
        match self {
            Self::DispatchSpeed => &[dispatch::Part::Speed],
            Self::DispatchFront => &[dispatch::Part::Front],
            Self::DispatchMemory => &[dispatch::Part::Memory],
            Self::DispatchTable => &[dispatch::Part::Table],
            Self::DispatchLimits => &[dispatch::Part::Limits],
            Self::DispatchFaults => &[dispatch::Part::Faults],
            Self::DispatchRivals => &[dispatch::Part::Rivals],
            _ => dispatch::Part::ALL,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let names = if args.names.is_empty() { Name::WHOLE.to_vec() } else { args.names };
    let plan = if args.short { gossip::Plan::SHORT } else { gossip::Plan::FULL };
    let plan = gossip::Plan { joins: args.joins.unwrap_or(plan.joins), ..plan };
    let mut all = Vec::new();
    for name in names {
        all.extend(match (name, args.short) {
            (Name::Control, short) => control::run(if short { 1 } else { 10 }).await?,
            (Name::Events, short) => events::run(if short { 20_000 } else { 1_000_000 }).await?,
            (Name::Waits, true) => waits::run(waits::Plan::SHORT).await?,
            (Name::Waits, false) => {
                let fuse = mounts::fuse().inspect_err(|why| println!("left out, polling through FUSE: {why}\n"));
                waits::run(waits::Plan { mounted: fuse.is_ok(), ..waits::Plan::FULL }).await?
            }
            (Name::Inject, true) => inject::run(50, 1).await?,
            (Name::Inject, false) => inject::run(1000, 7).await?,
            (Name::Handoff, short) => drover_e2e::handoff::speed::figures(short).await?,
            (Name::Gossip, _) => gossip::run(plan, gossip::Part::ALL).await?,
            (Name::GossipSpeed, _) => gossip::run(plan, &[gossip::Part::Speed]).await?,
            (Name::GossipJoins, _) => gossip::run(plan, &[gossip::Part::Joins]).await?,
            (Name::GossipVerdicts, _) => gossip::run(plan, &[gossip::Part::Verdicts]).await?,
            (Name::GossipRegions, _) => gossip::run(plan, &[gossip::Part::Regions]).await?,
            (Name::Slurm, short) => slurm::run(slurm::Part::ALL, short).await?,
            (Name::SlurmLaunch, short) => slurm::run(&[slurm::Part::Launch], short).await?,
            (Name::SlurmLink, short) => slurm::run(&[slurm::Part::Link], short).await?,
            (Name::SlurmWaits, short) => slurm::run(&[slurm::Part::Waits], short).await?,
            (Name::SlurmIdle, short) => slurm::run(&[slurm::Part::Idle], short).await?,
            (Name::SlurmCalls, short) => slurm::run(&[slurm::Part::Calls], short).await?,
            (Name::SlurmMany, short) => slurm::run(&[slurm::Part::Many], short).await?,
            (Name::SlurmCodex, short) => slurm::run(&[slurm::Part::Codex], short).await?,
            (
                Name::Dispatch
                | Name::DispatchSpeed
                | Name::DispatchFront
                | Name::DispatchMemory
                | Name::DispatchTable
                | Name::DispatchLimits
                | Name::DispatchFaults
                | Name::DispatchRivals,
                short,
            ) => {
                let plan = if short { dispatch::Plan::SHORT } else { dispatch::Plan::FULL };
                dispatch::run(plan, name.of_dispatch()).await?
            }
            (Name::Idle, true) => idle::run(50, Duration::from_secs(2)).await?,
            (Name::Idle, false) => idle::run(1000, Duration::from_secs(30)).await?,
        });
    }
    print!("{}", figures::table(&all));
    Ok(if all.iter().all(figures::Figure::met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
