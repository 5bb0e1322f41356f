//! `cargo xtask chaos handoff`: the long size of the faults of real sessions.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::{Duration, Instant};

use clap::Parser;
use drover_e2e::handoff::{faults, figures, orders, partition, speed};

/// Sessions on real daemons that are killed and stopped at every step of a move.
#[derive(Parser)]
struct Args {
    /// Decides everything random; fresh when not given, and always printed
    #[arg(long)]
    seed: Option<u64>,
    /// Strikes at moments that chance chooses
    #[arg(long, alias = "kills", default_value_t = 200)]
    strikes: usize,
    /// Only these faults; may be repeated
    #[arg(long = "fault")]
    faults: Vec<String>,
}

/// The faults by their names. The numbers are those of the cases that each of them covers.
const FAULTS: [&str; 24] = [
    "01-source-before-answer",
    "02-source-while-copying",
    "02-source-late-in-the-copy",
    "05-target-while-copying",
    "05-target-late-in-the-copy",
    "03-04-06-07-any-step",
    "07-host-gone-after-claim",
    "08-owners-unreachable",
    "09-13-no-rules",
    "10-partition",
    "11-source-stopped",
    "12-several-places",
    "13-large-history",
    "14-tool-in-flight",
    "15-target-leaves",
    "15-target-suspected",
    "16-turns-during-moves",
    "17-drain",
    "17-drain-orders",
    "listener-that-does-not-read",
    "felt-1-mib",
    "felt-10-mib",
    "balance",
    "100-mib-beside-a-stream",
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| rand::random::<u64>() >> 16);
    println!("seed {seed}");
    let wanted = |name: &str| args.faults.is_empty() || args.faults.iter().any(|fault| name.contains(fault.as_str()));
    let mut failed = Vec::new();
    for name in FAULTS.into_iter().filter(|name| wanted(name)) {
        let begun = Instant::now();
        let outcome = match name {
            "01-source-before-answer" => faults::source_killed_before_the_answer().await,
            "02-source-while-copying" => faults::killed_while_copying(false, 24, 0.0).await,
            "02-source-late-in-the-copy" => faults::killed_while_copying(false, 48, 0.8).await,
            "05-target-while-copying" => faults::killed_while_copying(true, 24, 0.0).await,
            "05-target-late-in-the-copy" => faults::killed_while_copying(true, 48, 0.8).await,
            "03-04-06-07-any-step" => faults::struck_at_any_step(seed, args.strikes).await,
            "07-host-gone-after-claim" => faults::host_gone_after_the_claim().await,
            "08-owners-unreachable" => faults::owners_cannot_be_reached().await,
            "09-13-no-rules" => faults::a_node_that_follows_no_rule().await,
            "15-target-leaves" => faults::target_in_doubt_while_copying(false, 24).await,
            "15-target-suspected" => faults::target_in_doubt_while_copying(true, 24).await,
            "11-source-stopped" => faults::source_stopped_for(Duration::from_mins(1)).await,
            "10-partition" => partition::both_sides_reach_clients(seed, 6).await,
            "12-several-places" => faults::ordered_to_several_places().await,
            "13-large-history" => faults::large_history(100).await,
            "14-tool-in-flight" => faults::tool_in_flight().await,
            "16-turns-during-moves" => faults::turns_during_moves(50).await,
            "felt-1-mib" => figures::freeze(1, args.strikes).await,
            "felt-10-mib" => figures::freeze(10, args.strikes).await,
            "17-drain-orders" => orders::a_drain_outlives_everybody(200).await,
            "listener-that-does-not-read" => orders::a_listener_that_does_not_read().await,
            "100-mib-beside-a-stream" => speed::beside_a_stream(100).await.map(|found| found.to_string()),
            "balance" => figures::balance(200, 20).await,
            _ => faults::emptied(1000).await,
        };
        let took = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(said) => println!("{name}: {said} ({took:.1} s)"),
            Err(error) => {
                println!("{name}: FAILED ({took:.1} s): {error:#}");
                failed.push(name);
            }
        }
    }
    anyhow::ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
