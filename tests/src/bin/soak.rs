//! `cargo xtask soak local`: ten minutes at full rate, twenty swarms, and more events than the log keeps.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Duration;

use clap::Parser;
use drover_e2e::soak::{self, Least, Plan};

/// Runs swarms at full rate and watches what grows.
#[derive(Parser)]
struct Args {
    /// Which proof; there is one
    #[arg(value_parser = ["local"], default_value = "local")]
    name: String,
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// How long each swarm lives
    #[arg(long, default_value_t = 30)]
    swarm_seconds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    println!("{}: {} s at full rate", args.name, args.seconds);
    let plan = Plan {
        time: Duration::from_secs(args.seconds),
        least: Least::default(),
        settling_events: 0,
        delta_bytes: 300,
        swarm_time: Duration::from_secs(args.swarm_seconds),
        session_turns: usize::MAX,
        keep_events: 1_000_000,
        growth_mib: 1.0,
        growth_files: 4.0,
        slope_files: 2.0,
    };
    let report = soak::run(plan).await?;
    println!("{report:#?}");
    Ok(())
}
