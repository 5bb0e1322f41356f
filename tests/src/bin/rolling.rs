//! `cargo xtask chaos rolling`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::path::PathBuf;

use clap::Parser;
use drover_e2e::rolling::{self, Plan};

/// Ends every daemon in its turn and starts it from a replaced file while prompts run, and judges what their clients saw.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 1000)]
    injections: usize,
    #[arg(long, default_value_t = 4)]
    nodes: u32,
    /// How often every daemon has its turn
    #[arg(long, default_value_t = 3)]
    kills: usize,
    /// The program of another version, which is replaced by the one that lies beside this; once
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { injections, nodes, kills, from } = Args::parse();
    let rounds = if from.is_some() { 1 } else { kills };
    let report = rolling::run(Plan { injections, nodes, rounds, from, gives_up: false }).await?;
    println!("{report:#?}");
    Ok(())
}
