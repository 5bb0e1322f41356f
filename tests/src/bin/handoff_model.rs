//! `cargo xtask chaos handoff-model`: the long size of the simulated handoffs.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use drover_e2e::handoff::proof;
use drover_e2e::handoff::shared::Missing;

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
    /// Takes a guard away, and says how long it takes until the judge notices; with `--story` tells an episode without it
    #[arg(long)]
    without: Option<Missing>,
}

/// Episodes in which the judge has to notice.
const MOST: u64 = 100_000;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(seed) = args.story {
        let (verdict, story, _) = proof::story(seed, args.without);
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
    if let Some(missing) = args.without {
        let (episodes, text) =
            proof::finds(seed, missing, MOST).with_context(|| format!("{MOST} episodes, and nobody noticed"))?;
        println!("noticed in episode {episodes}, of seed {}: {text}", seed + episodes - 1);
        return Ok(());
    }
    println!("{} moves, each with one fault at another step: all sound\n", proof::every_step(1)?);
    let report = proof::run(seed, args.handoffs, |so_far| {
        let (episodes, handoffs) = (so_far.episodes, so_far.all.started);
        println!("{episodes} episodes, {handoffs} handoffs, {:.0} s", start.elapsed().as_secs_f64());
    })?;
    println!("\n{report}");
    println!("wall time {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
