//! Build, test and bench chores: plain cargo calls in the right order, so that people and CI run the same thing.
//!
//! Nothing here is part of drover, and nothing here knows how a proof works: the long proofs are programs of their own.
#![expect(clippy::print_stderr, reason = "a chore tells a person what it does")]

mod dist;
mod lint;
mod pack;
mod proof;
mod sbom;
mod shell;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::dist::Ready;

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
        /// How many kills; of `slurm`: how many prompts during each fault
        #[arg(long)]
        rounds: Option<u32>,
        /// Decides everything random; fresh when not given, and always printed
        #[arg(long)]
        seed: Option<u64>,
        /// Of `slurm`: only this fault; may be given several times
        #[arg(long)]
        fault: Vec<String>,
        /// Of `upgrade`: the commit to come from; the newest tag when not given, or the commit before this one
        #[arg(long, value_name = "COMMIT")]
        from: Option<String>,
    },
    /// Long runs that watch for growth
    Soak {
        /// Which proof
        name: String,
    },
    /// Static binaries and what belongs to them: a tarball, and a Debian package when cargo-deb is there
    Dist {
        /// Pack the programs of this directory instead, the daemons as links to drover; for tests of the installation
        #[arg(long, value_name = "DIR", requires = "out")]
        from: Option<PathBuf>,
        /// Where that archive goes
        #[arg(long, value_name = "DIR", requires = "from")]
        out: Option<PathBuf>,
    },
    /// Writes the pages that are made from code
    Docs,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().chore {
        Chore::Lint => lint::run(),
        Chore::Test { filter } => test::run(filter.as_deref()),
        Chore::Bench { names, short } => proof::bench(&names, short),
        Chore::Chaos { name, rounds, seed, fault, from } => proof::chaos(&name, rounds, seed, &fault, from.as_deref()),
        Chore::Soak { name } => proof::soak(&name),
        Chore::Dist { from, out } => {
            let ready = from.zip(out).map(|(from, out)| Ready { from: dist::place(&from), out: dist::place(&out) });
            dist::run(ready)
        }
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
