//! Build, test and bench chores: plain cargo calls in the right order, so that people and CI run the same thing.
//!
//! Nothing here is part of drover, and nothing here knows how a proof works: the long proofs are programs of their own.
#![expect(clippy::print_stderr, reason = "a chore tells a person what it does")]

mod dist;
mod lint;
mod proof;
mod shell;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", after_help = "Example: cargo xtask test")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Formatting, clippy with warnings as errors, dependency rules when cargo-deny is there, and our own rules
    Lint,
    /// Every test; installs what they need when it may, and names at the end each one it could not run
    Test {
        /// Only tests whose name has this in it
        filter: Option<String>,
    },
    /// Figures beside the ideal of the same run; without a name, all of them
    Bench {
        /// Which figures
        names: Vec<String>,
        /// A few seconds in all, to see that it works
        #[arg(long)]
        short: bool,
    },
    /// Kills things while work runs, and judges what became of the work
    Chaos {
        /// Which proof
        name: String,
        /// How many kills
        #[arg(long)]
        rounds: Option<u32>,
        /// Decides everything random; fresh when not given, and always printed
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Long runs that watch for growth
    Soak {
        /// Which proof
        name: String,
    },
    /// Static binaries in a tarball, with checksums
    Dist,
    /// Writes the pages that are made from code
    Docs,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().chore {
        Chore::Lint => lint::run(),
        Chore::Test { filter } => test::run(filter.as_deref()),
        Chore::Bench { names, short } => proof::bench(&names, short),
        Chore::Chaos { name, rounds, seed } => proof::chaos(&name, rounds, seed),
        Chore::Soak { name } => proof::soak(&name),
        Chore::Dist => dist::run(),
        Chore::Docs => docs(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The page is compared in a test of the crate that makes it; told so, the test writes it instead.
fn docs() -> anyhow::Result<()> {
    shell::cargo(&["test", "--package", "drover-config", "--test", "reference"]).env("DROVER_WRITE_DOCS", "1").run()
}
