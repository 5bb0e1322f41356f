//! `cargo xtask chaos dispatch`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use clap::Parser;
use drover_e2e::dispatch_chaos::{Plan, run};

/// Kills the dispatcher again and again, and judges by the provider's own ledger what became of money and work.
#[derive(Parser)]
struct Args {
    /// Decides everything random; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    /// Histories, each with one kill
    #[arg(long, default_value_t = 100)]
    kills: u32,
    /// Tasks of the run that is killed in its middle
    #[arg(long, default_value_t = 10_000)]
    tasks: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("seed {seed}: {} kills, {} tasks", args.kills, args.tasks);
    let report = run(&Plan { seed, histories: args.kills, paid: 3000, tasks: args.tasks, width: 100 })?;
    println!("{report:#?}");
    Ok(())
}
