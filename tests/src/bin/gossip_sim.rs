//! `cargo xtask chaos gossip`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::{Duration, Instant};

use clap::Parser;
use drover_e2e::gossip::network::Weather;
use drover_e2e::gossip::proof::{self, Size};
use drover_e2e::gossip::scenario::mass_join;
use drover_e2e::gossip::world::World;
use drover_membership::core::Settings;

/// Thousands of kills in simulated clusters, and what the survivors told of them.
#[derive(Parser)]
struct Args {
    /// Decides everything; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    /// Kills among loss, stops, restarts, joins and good-byes
    #[arg(long, default_value_t = 10_000)]
    kills: usize,
    /// Only lets that many nodes join at once, and says how long it took; 10000 need 12 GiB
    #[arg(long)]
    join: Option<usize>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // Runs count up from it.
    let seed = args.seed.unwrap_or_else(|| rand::random::<u64>() >> 16);
    println!("seed {seed}");
    let start = Instant::now();
    if let Some(nodes) = args.join {
        let mut world = World::new(seed, Weather::default(), Settings::default());
        world.judged = nodes <= 2000;
        let span = mass_join(&mut world, nodes).unwrap_or(Duration::MAX);
        println!(
            "join of {nodes}: {:.2} virtual s, {:.0} s of wall time",
            span.as_secs_f64(),
            start.elapsed().as_secs_f64()
        );
        return Ok(());
    }
    let figures = proof::run(seed, &Size::long(args.kills))?;
    println!("{figures}");
    println!("wall time {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
