//! How far a run is, for people at a terminal: rate, time left, cost.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use drover_proto::dispatch as pb;

use crate::app::App;
use crate::dispatcher::usd;
use crate::render::screen::Live;

pub(super) struct Progress {
    bar: Option<Live>,
    total: Option<u64>,
    began: Instant,
    done: u64,
    /// Those that were done now, not before.
    fresh: u64,
    cost: f64,
}

impl Progress {
    pub(super) fn new(app: &App, total: Option<u64>) -> Self {
        let bar = app.screen.is_live().then(|| match total {
            Some(total) => app.screen.bar(total, "tasks"),
            None => app.screen.spinner(""),
        });
        Self { bar, total, began: Instant::now(), done: 0, fresh: 0, cost: 0.0 }
    }

    pub(super) fn count(&mut self, result: &pb::TaskResult) {
        self.done += 1;
        if !result.resumed {
            self.fresh += 1;
            self.cost += usd(result.cost_pico_usd);
        }
    }

    pub(super) fn show(&self, open_tasks: u32) {
        let Some(bar) = &self.bar else { return };
        bar.at(self.done);
        bar.say(&words(self.done, self.fresh, self.total, self.began.elapsed(), self.cost, open_tasks));
    }

    pub(super) fn end(&mut self) {
        self.bar = None;
    }
}

/// Rate, time left and cost, in a line.
pub(in crate::commands) fn words(
    done: u64,
    fresh: u64,
    total: Option<u64>,
    elapsed: Duration,
    cost: f64,
    open_tasks: u32,
) -> String {
    let rate = fresh as f64 / elapsed.as_secs_f64().max(0.001);
    let mut said = match total {
        Some(_) => format!("{rate:.1}/s"),
        None => format!("{done} done  {rate:.1}/s  {open_tasks} open"),
    };
    if let Some(total) = total.filter(|&total| total > done && rate > 0.0) {
        let left = (total - done) as f64 / rate;
        let _ = write!(said, "  {} left", time(left));
    }
    let _ = write!(said, "  {cost:.4} USD");
    said
}

fn time(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tells_the_rate_the_time_left_and_the_cost() {
        let said = words(40, 20, Some(100), Duration::from_secs(10), 0.5, 3);
        assert_eq!(said, "2.0/s  30 s left  0.5000 USD");
        assert_eq!(words(7, 7, None, Duration::from_secs(1), 0.0, 3), "7 done  7.0/s  3 open  0.0000 USD");
        assert_eq!((time(59.6), time(3725.0)), ("1 min 00 s".to_owned(), "1 h 02 min".to_owned()));
    }
}
