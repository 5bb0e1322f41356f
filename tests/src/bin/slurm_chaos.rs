//! `cargo xtask chaos slurm`: the size whose figures stand in `docs/benchmarks.md`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Duration;

use clap::{Parser, ValueEnum};
use drover_e2e::slurm::Seat;
use drover_e2e::slurm::chaos::{Fault, Outcome, Plan, all, run};
use drover_testkit::lab::{Options, usable};

/// Breaks a real Slurm, its hosts and the way to it while prompts run, and judges what became of each prompt. Needs root.
#[derive(Parser)]
struct Args {
    /// Decides everything random; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    /// What is done, one after the other; everything when not given
    #[arg(long, value_enum)]
    fault: Vec<Fault>,
    /// Prompts during each fault
    #[arg(long, alias = "kills", default_value_t = 500)]
    injections: usize,
    #[arg(long, default_value_t = 8)]
    nodes: u32,
    /// How long lasts what lasts
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// For how long hosts believe what they know of shared files
    #[arg(long, default_value_t = 3)]
    cache: u32,
    /// From where drover is used
    #[arg(long, value_enum, default_value = "laptop")]
    from: From,
}

#[derive(Clone, Copy, ValueEnum)]
enum From {
    Laptop,
    Login,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    usable(&Options::default()).map_err(anyhow::Error::msg)?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let seat = match args.from {
        From::Laptop => Seat::Laptop,
        From::Login => Seat::Login,
    };
    let faults = if args.fault.is_empty() { all(seat) } else { args.fault };
    let (injections, nodes) = (args.injections, args.nodes);
    let cache_seconds = args.cache;
    println!(
        "seed {seed}: {injections} prompts to {nodes} nodes during each of {} faults, files cached for {cache_seconds} s",
        faults.len()
    );
    println!("| fault | carried out | failed | refused | generation | last state | settled after | took |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let tell = |outcome: &Outcome| {
        let Outcome { fault, completed, failed, refused, generation, state, settled, took } = outcome;
        let name = fault.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let (settled, took) = (settled.as_secs_f64(), took.as_secs_f64());
        println!(
            "| {name} | {completed} | {failed} | {refused} | {generation} | {state} | {settled:.1} s | {took:.0} s |"
        );
    };
    let long = Duration::from_secs(args.seconds);
    let margin = Duration::from_secs(8);
    run(&Plan { seed, seat, nodes, injections, margin, long, cache_seconds, faults }, tell)?;
    Ok(())
}
