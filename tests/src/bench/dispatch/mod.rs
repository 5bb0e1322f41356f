//! The dispatcher beside the ideal: real processes, and a mock provider whose own ledger and stamps are the judge.

mod driver;
mod faults;
mod limits;
mod rig;
mod rivals;
mod speed;
mod table;

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;

use super::figures::{Figure, Goal};

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Batches: tasks, width, and the least share of the ideal.
    pub batches: &'static [(usize, u32, f64)],
    /// The batch whose processor time counts.
    pub costed: (usize, u32),
    /// How often what is short is done.
    pub repeats: usize,
    /// How long the front is flooded.
    pub flood: Duration,
    /// Tasks that wait while memory is looked at.
    pub queued: usize,
    /// How long they wait before the look: memory that only the start needed is given back within ten seconds.
    pub rest: Duration,
    /// Tasks of the large file, and how long it is read.
    pub from_file: usize,
    /// See `from_file`.
    pub reading: Duration,
    /// Length of the run against a strict bucket.
    pub paced: Duration,
    /// How long the rate is looked at after a change of the limit.
    pub settled: Duration,
    /// Widths that are not told, and how long each lasts.
    pub widths: &'static [u32],
    /// See `widths`.
    pub phase: Duration,
    /// Batches with slow calls.
    pub seeds: u32,
    /// Tasks against a provider with faults.
    pub faulty: usize,
    /// Times that the client with one task asks.
    pub lonely: usize,
    /// Rows of the mission's table.
    pub rows: usize,
    /// Calls made through each rival.
    pub rivalled: usize,
}

impl Plan {
    /// What the figures of `docs/benchmarks.md` were measured with.
    pub const FULL: Self = Self {
        batches: &[(100, 10, 0.995), (1000, 10, 0.995), (1000, 100, 0.97), (10_000, 1000, 0.90)],
        costed: (1000, 100),
        repeats: 5,
        flood: Duration::from_secs(5),
        queued: 10_000,
        rest: Duration::from_secs(11),
        from_file: 1_000_000,
        reading: Duration::from_secs(20),
        paced: Duration::from_secs(20),
        settled: Duration::from_secs(5),
        widths: &[60, 300, 20, 120],
        phase: Duration::from_secs(30),
        seeds: 50,
        faulty: 10_000,
        lonely: 20,
        rows: 6,
        rivalled: 3000,
    };
    /// To see that it works; its figures mean nothing.
    pub const SHORT: Self = Self {
        batches: &[(40, 20, 0.0)],
        costed: (40, 20),
        repeats: 1,
        flood: Duration::from_millis(200),
        queued: 500,
        rest: Duration::ZERO,
        from_file: 20_000,
        reading: Duration::from_millis(500),
        paced: Duration::from_millis(500),
        settled: Duration::from_secs(1),
        widths: &[20, 40],
        phase: Duration::from_secs(1),
        seeds: 1,
        faulty: 200,
        lonely: 2,
        rows: 1,
        rivalled: 20,
    };
}

/// A part of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Share of the ideal and processor time of runs.
    Speed,
    /// The front.
    Front,
    /// Memory.
    Memory,
    /// Providers that count calls.
    Limits,
    /// Slow calls, faults, fairness.
    Faults,
    /// The mission's table.
    Table,
    /// Other programs for the same job, in the same run; they are installed with pip.
    Rivals,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: &[Self] =
        &[Self::Speed, Self::Front, Self::Memory, Self::Table, Self::Limits, Self::Faults, Self::Rivals];
}

/// Runs these parts of the plan.
pub async fn run(plan: Plan, parts: &'static [Part]) -> anyhow::Result<Vec<Figure>> {
    let all = tokio::task::spawn_blocking(move || {
        let figures = parts.iter().map(|part| match part {
            Part::Speed => speed::makespan(&plan),
            Part::Front => speed::front(&plan),
            Part::Memory => speed::memory(&plan),
            Part::Limits => limits::run(&plan),
            Part::Faults => {
                let all = [faults::slow(&plan)?, faults::faults(&plan)?, faults::fairness(&plan)?];
                Ok(all.concat())
            }
            Part::Table => table::run(&plan),
            Part::Rivals => rivals::run(&plan),
        });
        figures.collect::<anyhow::Result<Vec<_>>>()
    });
    Ok(all.await.context("the benchmark panicked")??.concat())
}

fn figure(name: impl Into<String>, ours: f64, unit: &'static str, goal: Goal) -> Figure {
    Figure { name: name.into(), ours, ideal: None, unit, goal }
}

fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: &[f64], quantile: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let index = ((values.len() as f64 * quantile).ceil() as usize).clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// Minutes without a word look like a program that hangs.
fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
