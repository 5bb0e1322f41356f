//! `cargo xtask chaos local`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use clap::Parser;
use drover_e2e::chaos::{self, Plan};

/// Kills daemons, workers and agents while prompts run, and judges what became of each prompt.
#[derive(Parser)]
struct Args {
    /// Decides everything random; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, default_value_t = 200)]
    kills: usize,
    #[arg(long, default_value_t = 1000)]
    injections: usize,
    #[arg(long, default_value_t = 8)]
    nodes: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(rand::random);
    let gap_kills = args.kills / 4;
    println!("seed {seed}: {} kills, {} prompts, {} nodes", args.kills, args.injections, args.nodes);
    let Args { kills, injections, nodes, .. } = args;
    let plan = Plan { seed, kills, injections, nodes, gap_kills, forget: false };
    let report = chaos::run(plan).await?;
    println!("{report:#?}");
    Ok(())
}
