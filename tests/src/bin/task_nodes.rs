//! `cargo xtask chaos dispatch-nodes`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use clap::Parser;
use drover_e2e::task_nodes::{Plan, run};

/// Has pages read on nodes, kills some of them midway, and judges by the site that was read.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 10_000)]
    tasks: usize,
    #[arg(long, default_value_t = 8)]
    nodes: usize,
    #[arg(long, default_value_t = 3)]
    kills: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { tasks, nodes, kills } = Args::parse();
    println!("{tasks} pages on {nodes} nodes, {kills} of them killed");
    let report = run(Plan { tasks, extract_every: 10, nodes, kills }).await?;
    println!("{report:#?}");
    Ok(())
}
