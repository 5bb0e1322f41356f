//! `cargo xtask bench NAME`: figures beside the ideal of the same run, as a Markdown table.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use drover_e2e::bench::{control, events, figures, gossip, idle, inject, waits};
use drover_e2e::mounts;

/// Measures the local swarm beside the ideal.
#[derive(Parser)]
struct Args {
    /// Which figures; all of them when none is named
    #[arg(value_enum)]
    names: Vec<Name>,
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
    Gossip,
    GossipSpeed,
    GossipVerdicts,
    GossipRegions,
}

impl Name {
    /// All, each once: the last three are parts of the one before them.
    const WHOLE: &[Self] = &[Self::Control, Self::Events, Self::Waits, Self::Inject, Self::Idle, Self::Gossip];
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let names = if args.names.is_empty() { Name::WHOLE.to_vec() } else { args.names };
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
            (Name::Gossip, short) => gossip::run(size(short), gossip::Part::ALL).await?,
            (Name::GossipSpeed, short) => gossip::run(size(short), &[gossip::Part::Speed]).await?,
            (Name::GossipVerdicts, short) => gossip::run(size(short), &[gossip::Part::Verdicts]).await?,
            (Name::GossipRegions, short) => gossip::run(size(short), &[gossip::Part::Regions]).await?,
            (Name::Idle, true) => idle::run(50, Duration::from_secs(2)).await?,
            (Name::Idle, false) => idle::run(1000, Duration::from_secs(30)).await?,
        });
    }
    print!("{}", figures::table(&all));
    Ok(if all.iter().all(figures::Figure::met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn size(short: bool) -> gossip::Plan {
    if short { gossip::Plan::SHORT } else { gossip::Plan::FULL }
}
