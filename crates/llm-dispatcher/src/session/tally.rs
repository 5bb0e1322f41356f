//! What a run sums up to.

use std::time::Duration;

use drover_proto::dispatch as pb;

use crate::shell::Done;

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) tasks: u64,
    succeeded: u64,
    failed: u64,
    resumed: u64,
    cached: u64,
    calls: u64,
    cost_pico: u128,
    /// Calls that gave an answer, one after another.
    sequential: Duration,
    widest: u32,
}

impl Tally {
    /// An answer of an earlier part of the run.
    pub(super) fn resumed(&mut self, result: &pb::TaskResult) {
        self.resumed += 1;
        self.count(result);
    }

    /// A task is over.
    pub(super) fn over(&mut self, result: &pb::TaskResult, done: Option<&Done>) {
        self.count(result);
        let Some(done) = done else { return };
        self.cached += u64::from(done.cached);
        self.calls += u64::from(done.attempts);
        self.cost_pico += done.cost.pico();
        self.sequential += done.busy;
        self.widest = self.widest.max(done.beside);
    }

    fn count(&mut self, result: &pb::TaskResult) {
        if result.status == "succeeded" {
            self.succeeded += 1;
        } else {
            self.failed += 1;
        }
    }

    pub(super) fn summary(&self, wall: Duration) -> pb::RunSummary {
        pb::RunSummary {
            tasks: self.tasks,
            succeeded: self.succeeded,
            failed: self.failed,
            resumed: self.resumed,
            wall_ms: wall.as_millis() as u64,
            sequential_ms: self.sequential.as_millis() as u64,
            speedup: speedup(self.sequential, wall, self.widest),
            cost_pico_usd: u64::try_from(self.cost_pico).unwrap_or(u64::MAX),
            widest: self.widest,
            calls: self.calls,
            cached: self.cached,
        }
    }
}

/// How many times faster than one after another. No more than were under way at once can have helped: whatever the clocks say
/// beyond that is a mistake of measurement.
fn speedup(sequential: Duration, wall: Duration, widest: u32) -> f64 {
    if widest == 0 || wall.is_zero() {
        return 0.0;
    }
    (sequential.as_secs_f64() / wall.as_secs_f64()).min(f64::from(widest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speedup_is_never_above_what_was_under_way_at_once() {
        let second = Duration::from_secs(1);
        assert!((speedup(second * 10, second * 2, 10) - 5.0).abs() < 1e-9);
        assert!((speedup(second * 10, second / 10, 10) - 10.0).abs() < 1e-9);
        assert!(speedup(second, second, 0).abs() < 1e-9);
        assert!(speedup(second, Duration::ZERO, 3).abs() < 1e-9);
    }
}
