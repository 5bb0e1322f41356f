//! What every daemon says of its own process, read when somebody asks: since when it runs, its memory, its processor time,
//! its open files.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Registers them, and which version this is.
pub(crate) fn register(registry: &mut Registry) {
    registry.register("build", "Which version this is", Info::new([("version", drover_types::VERSION)]));
    registry.register_collector(Box::new(Process::new()));
}

#[derive(Debug)]
struct Process {
    page_bytes: u64,
    ticks_per_second: u64,
    started: f64,
}

impl Process {
    fn new() -> Self {
        let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
        let booted = fs::read_to_string("/proc/stat")
            .ok()
            .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<u64>().ok());
        let ticks = crate::process::start_time(std::process::id()).unwrap_or_default();
        let started = booted.unwrap_or_default() as f64 + ticks as f64 / ticks_per_second as f64;
        Self { page_bytes: rustix::param::page_size() as u64, ticks_per_second, started }
    }
}

/// The numbers of one look; what cannot be read is left out.
fn look() -> (Option<u64>, Option<u64>, Option<usize>) {
    let resident = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    let ticks = fs::read_to_string("/proc/self/stat").ok().and_then(|text| {
        // Behind the program's name in parentheses the fields count from 3; 14 and 15 are the times of user and system.
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    });
    // The directory itself is open while it is read.
    let files = fs::read_dir("/proc/self/fd").ok().map(|files| files.count().saturating_sub(1));
    (resident, ticks, files)
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (resident, ticks, files) = look();
        let started = "When this process was started, in seconds of Unix time";
        ConstGauge::new(self.started).encode(encoder.encode_descriptor(
            "process_start_time",
            started,
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?)?;
        if let Some(pages) = resident {
            let bytes = i64::try_from(pages.saturating_mul(self.page_bytes)).unwrap_or(i64::MAX);
            let help = "Memory of this process that is in the machine";
            ConstGauge::new(bytes).encode(encoder.encode_descriptor(
                "process_resident_memory",
                help,
                Some(&Unit::Bytes),
                MetricType::Gauge,
            )?)?;
        }
        if let Some(ticks) = ticks {
            let seconds = ticks as f64 / self.ticks_per_second as f64;
            ConstCounter::new(seconds).encode(encoder.encode_descriptor(
                "process_cpu",
                "Processor time that this process has used",
                Some(&Unit::Seconds),
                MetricType::Counter,
            )?)?;
        }
        if let Some(files) = files {
            let files = i64::try_from(files).unwrap_or(i64::MAX);
            ConstGauge::new(files).encode(encoder.encode_descriptor(
                "process_open_fds",
                "Files and sockets that this process has open",
                None,
                MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let mut registry = Registry::with_prefix("drover");
        register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.split(' ').next() == Some(name));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).split(' ').nth(1).unwrap().parse().unwrap()
        };
        let now = crate::now_us() as f64 / 1e6;
        let age = now - value("drover_process_start_time_seconds");
        // The kernel's time of boot is in whole seconds.
        assert!((-2.0..86_400.0).contains(&age), "started {age} s ago");
        assert!(value("drover_process_resident_memory_bytes") > 1e6, "{text}");
        assert!(value("drover_process_open_fds") >= 3.0, "{text}");
        assert!(value("drover_process_cpu_seconds_total") >= 0.0, "{text}");
        assert!(text.contains(&format!("drover_build_info{{version=\"{}\"}} 1", drover_types::VERSION)), "{text}");
    }
}
