//! `cargo xtask soak local`: ten minutes at full rate.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Duration;

use clap::Parser;
use drover_e2e::soak;

/// Runs a swarm at full rate and watches what grows.
#[derive(Parser)]
struct Args {
    /// Which proof; there is one
    #[arg(value_parser = ["local"], default_value = "local")]
    name: String,
    #[arg(long, default_value_t = 600)]
    seconds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    println!("{}: {} s at full rate", args.name, args.seconds);
    let report = soak::run(Duration::from_secs(args.seconds), 1.0).await?;
    println!("{report:#?}");
    Ok(())
}
