//! The score, the threshold and the reason; no clock and no files.

use std::collections::VecDeque;
use std::fmt::Write as _;

/// A node that is overloaded stays so until its score is below this share of the threshold: 0.65 for a threshold of 0.8.
/// Without the gap a node at the threshold would flap, and whoever hands sessions over with it.
const RETURN_BELOW: f64 = 0.65 / 0.8;

/// What of the configuration makes the score.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Weight of the processor.
    pub cpu_weight: f64,
    /// Weight of the memory.
    pub memory_weight: f64,
    /// Weight of the sessions.
    pub session_weight: f64,
    /// Score from which the node is overloaded.
    pub threshold: f64,
    /// Samples that the score averages over.
    pub sample_size: usize,
    /// Sessions that count as a full node.
    pub max_sessions: u32,
}

/// One sample of the machine, each from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Share of the processors in use.
    pub cpu: f64,
    /// Share of the memory in use.
    pub memory: f64,
}

/// The load at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// The weighted sum, from 0 to 1.
    pub score: f64,
    /// Processor, averaged over the samples.
    pub cpu: f64,
    /// Memory, averaged over the samples.
    pub memory: f64,
    /// Sessions in relation to the most there may be, from 0 to 1.
    pub sessions: f64,
    /// Sessions that run.
    pub session_count: u32,
    /// Most sessions that there may be.
    pub max_sessions: u32,
    /// At or over the threshold, and since then not clearly below it.
    pub overloaded: bool,
    /// Why it is overloaded; empty when it is not.
    pub reason: String,
}

/// Keeps the samples and says how loaded the node is.
#[derive(Debug)]
pub struct Monitor {
    settings: Settings,
    samples: VecDeque<Usage>,
    sessions: u32,
    max_sessions: u32,
    overloaded: bool,
}

impl Monitor {
    /// A monitor without samples: until one comes, only sessions count.
    pub fn new(settings: Settings) -> Self {
        let max_sessions = settings.max_sessions.max(1);
        Self { settings, samples: VecDeque::new(), sessions: 0, max_sessions, overloaded: false }
    }

    /// Takes a sample in.
    pub fn sample(&mut self, usage: Usage) {
        while self.samples.len() >= self.settings.sample_size.max(1) {
            self.samples.pop_front();
        }
        self.samples.push_back(Usage { cpu: share(usage.cpu), memory: share(usage.memory) });
    }

    /// Takes the number of sessions in; a most of 0 leaves that as it was.
    pub fn sessions(&mut self, sessions: u32, max_sessions: u32) {
        self.sessions = sessions;
        if max_sessions > 0 {
            self.max_sessions = max_sessions;
        }
    }

    /// The load now. Passing the threshold is remembered from one report to the next.
    pub fn report(&mut self) -> Report {
        let s = &self.settings;
        let count = self.samples.len().max(1) as f64;
        let cpu = self.samples.iter().map(|sample| sample.cpu).sum::<f64>() / count;
        let memory = self.samples.iter().map(|sample| sample.memory).sum::<f64>() / count;
        let sessions = share(f64::from(self.sessions) / f64::from(self.max_sessions));
        let parts = [
            ("processor", cpu, s.cpu_weight, String::new()),
            ("memory", memory, s.memory_weight, String::new()),
            ("sessions", sessions, s.session_weight, format!(" ({} of {})", self.sessions, self.max_sessions)),
        ];
        let score = share(parts.iter().map(|(_, value, weight, _)| value * weight).sum());
        let limit = if self.overloaded { s.threshold * RETURN_BELOW } else { s.threshold };
        // Sums of products of decimal fractions miss a threshold that they reach on paper by the last bit.
        self.overloaded = score + 1e-9 >= limit;
        Report {
            score,
            cpu,
            memory,
            sessions,
            session_count: self.sessions,
            max_sessions: self.max_sessions,
            overloaded: self.overloaded,
            reason: if self.overloaded { reason(score, s.threshold, parts) } else { String::new() },
        }
    }
}

/// The sum and its parts, the largest first.
fn reason(score: f64, threshold: f64, mut parts: [(&str, f64, f64, String); 3]) -> String {
    parts.sort_by(|(_, a, wa, _), (_, b, wb, _)| (b * wb).total_cmp(&(a * wa)));
    let mut text = format!("load {score:.2} ");
    let _ = if score + 1e-9 >= threshold {
        write!(text, "has reached the threshold {threshold:.2}: ")
    } else {
        write!(text, "is not yet below {:.2}, from where a node counts as relieved: ", threshold * RETURN_BELOW)
    };
    for (index, (name, value, weight, detail)) in parts.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{name} {:.0} %{detail} x {weight}", value * 100.0);
    }
    text
}

fn share(value: f64) -> f64 {
    if value.is_finite() { value.clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settings() -> Settings {
        Settings {
            cpu_weight: 0.3,
            memory_weight: 0.3,
            session_weight: 0.4,
            threshold: 0.8,
            sample_size: 60,
            max_sessions: 10,
        }
    }

    fn score_of(settings: Settings, cpu: f64, memory: f64, sessions: u32) -> Report {
        let mut monitor = Monitor::new(settings);
        monitor.sample(Usage { cpu, memory });
        monitor.sessions(sessions, 0);
        monitor.report()
    }

    #[test]
    fn the_score_is_the_weighted_sum() {
        for (cpu, memory, sessions, expected) in [
            (0.0, 0.0, 0, 0.0),
            (1.0, 0.0, 0, 0.3),
            (0.0, 1.0, 0, 0.3),
            (0.0, 0.0, 10, 0.4),
            (0.5, 0.2, 5, 0.15 + 0.06 + 0.2),
            (1.0, 1.0, 10, 1.0),
            (7.0, -1.0, 30, 0.7),
        ] {
            let report = score_of(settings(), cpu, memory, sessions);
            assert!((report.score - expected).abs() < 1e-9, "{cpu} {memory} {sessions}: {}", report.score);
        }
        let weights = Settings { cpu_weight: 1.0, memory_weight: 0.0, session_weight: 0.0, ..settings() };
        assert!((score_of(weights, 0.25, 1.0, 10).score - 0.25).abs() < 1e-9);
    }

    #[test]
    fn the_score_averages_over_the_last_samples() {
        let mut monitor = Monitor::new(Settings { sample_size: 3, ..settings() });
        for cpu in [1.0, 1.0, 0.0, 0.5, 1.0] {
            monitor.sample(Usage { cpu, memory: 0.0 });
        }
        assert!((monitor.report().cpu - 0.5).abs() < 1e-9, "the mean of the last three of them");
        let mut monitor = Monitor::new(Settings { sample_size: 0, ..settings() });
        monitor.sample(Usage { cpu: 1.0, memory: 0.0 });
        monitor.sample(Usage { cpu: 0.0, memory: 0.5 });
        assert!(monitor.report().cpu.abs() < 1e-9, "at least the last one counts, and only it");
    }

    #[test]
    fn a_node_is_overloaded_from_the_threshold_until_clearly_below_it() {
        // load_threshold is 0.8: at it a node is overloaded, and below 0.65 it is not any more.
        let mut monitor = Monitor::new(Settings { sample_size: 1, ..settings() });
        let mut at = |usage: f64, sessions| {
            monitor.sample(Usage { cpu: usage, memory: usage });
            monitor.sessions(sessions, 0);
            monitor.report()
        };
        assert!(!at(0.66, 10).overloaded, "0.796");
        let full = at(2.0 / 3.0, 10);
        assert!(full.overloaded, "0.8 exactly");
        assert!(
            full.reason.contains("threshold 0.80") && full.reason.contains("sessions 100 % (10 of 10)"),
            "{full:?}"
        );
        assert!(full.reason.find("sessions") < full.reason.find("processor"), "the largest part first: {full:?}");
        let less = at(0.45, 10);
        assert!(
            less.overloaded && less.reason.contains("0.65"),
            "0.67 is below the threshold, and not clearly: {less:?}"
        );
        let relieved = at(0.4, 10);
        assert!(!relieved.overloaded && relieved.reason.is_empty(), "0.64: {relieved:?}");
        assert!(!at(0.6, 10).overloaded, "0.76, coming from below");
    }

    #[test]
    fn the_worker_may_say_how_many_sessions_it_takes() {
        let mut monitor = Monitor::new(settings());
        monitor.sessions(2, 4);
        assert!((monitor.report().sessions - 0.5).abs() < 1e-9);
        monitor.sessions(1, 0);
        assert!((monitor.report().sessions - 0.25).abs() < 1e-9, "0 leaves what was said before");
    }

    proptest! {
        #[test]
        fn a_score_is_always_a_share(cpu in any::<f64>(), memory in any::<f64>(), sessions in any::<u32>(), max in any::<u32>()) {
            let mut monitor = Monitor::new(settings());
            monitor.sample(Usage { cpu, memory });
            monitor.sessions(sessions, max);
            let report = monitor.report();
            prop_assert!((0.0..=1.0).contains(&report.score));
            prop_assert_eq!(report.overloaded, !report.reason.is_empty());
        }
    }
}
