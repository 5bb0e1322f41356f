//! `cargo xtask chaos handoff-model`: the long size of the simulated handoffs.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Instant;

use clap::Parser;
use drover_e2e::handoff::proof;

/// Handoffs among kills, stops, cuts, lost and late messages, and file systems that fail, in simulated swarms.
#[derive(Parser)]
struct Args {
    /// Decides everything; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    /// Handoffs that set out
    #[arg(long, alias = "kills", default_value_t = 1_000_000)]
    handoffs: u64,
    /// Only tells the story of the episode of this seed
    #[arg(long)]
    story: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(seed) = args.story {
        let (verdict, story, _) = proof::story(seed, None);
        for line in story {
            println!("{line}");
        }
        println!("{verdict:#?}");
        return Ok(());
    }
    // Episodes count up from it.
    let seed = args.seed.unwrap_or_else(|| rand::random::<u64>() >> 16);
    println!("seed {seed}");
    let start = Instant::now();
    println!("{} moves, each with one fault at another step: all sound\n", proof::every_step(1)?);
    println!("{}", proof::run(seed, args.handoffs)?);
    println!("wall time {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
