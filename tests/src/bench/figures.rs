//! What a benchmark prints: one line per figure, with its goal and the ideal of the same run.

use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Latencies in microseconds.
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let mut histogram = Histogram::new_with_bounds(1, 60_000_000, 3)
            .unwrap_or_else(|_| Histogram::new(3).unwrap_or_else(|error| panic!("{error}")));
        histogram.auto(true);
        Self(histogram)
    }
}

impl Latencies {
    /// Enters one.
    pub fn add(&mut self, latency: Duration) {
        self.0.saturating_record(latency.as_micros().max(1) as u64);
    }

    /// The latency below which this share lies, in milliseconds.
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// One figure with what it is held against.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// What it came to.
    pub ours: f64,
    /// The same of the ideal, in the same run.
    pub ideal: Option<f64>,
    /// Its unit.
    pub unit: &'static str,
    /// What it has to be.
    pub goal: Goal,
}

/// Which side of a number is good.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// Less than this.
    Below(f64),
    /// At least this.
    AtLeast(f64),
    /// Shown for comparison only.
    Shown,
}

impl Figure {
    /// Whether the goal is met.
    pub fn met(&self) -> bool {
        match self.goal {
            Goal::Below(limit) => self.ours < limit,
            Goal::AtLeast(limit) => self.ours >= limit,
            Goal::Shown => true,
        }
    }
}

/// All figures as a Markdown table.
pub fn table(figures: &[Figure]) -> String {
    let mut text =
        String::from("| figure | ours | ideal | ours / ideal | goal | met |\n| --- | --- | --- | --- | --- | --- |\n");
    for figure in figures {
        let goal = match figure.goal {
            Goal::Below(limit) => format!("< {limit}"),
            Goal::AtLeast(limit) => format!(">= {limit}"),
            Goal::Shown => "-".to_owned(),
        };
        let (ideal, ratio) =
            figure.ideal.map_or(("-".to_owned(), "-".to_owned()), |ideal| (number(ideal), number(figure.ours / ideal)));
        let met = if figure.met() { "yes" } else { "NO" };
        let ours = number(figure.ours);
        let _ = writeln!(text, "| {} | {ours} {} | {ideal} | {ratio} | {goal} | {met} |", figure.name, figure.unit);
    }
    text
}

fn number(value: f64) -> String {
    if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}
