//! Reads how busy the machine is, as far as this process may use it.

use std::fs;

use sysinfo::{MemoryRefreshKind, System};

use super::cgroup::{self, Cgroups, Cpu};
use super::score::Usage;

/// The machine, or the part of it that a batch system gave us.
pub struct Machine {
    system: Option<System>,
    groups: Cgroups,
    /// Processors that this process may run on; empty when that is not known.
    allowed: Vec<usize>,
    /// The last reading of the limited processor time, with its moment in microseconds.
    last: Option<(u64, Cpu)>,
}

/// What of the machine is ours.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Processors.
    pub cpus: f64,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Machine {
    /// Opens what there is to read. Processor time is counted from now on.
    pub fn open() -> Self {
        let mut system = System::new().ok();
        if let Some(system) = &mut system {
            system.refresh_cpu_usage();
        }
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
        Self { system, groups: Cgroups::of_this_process(), allowed: cgroup::cpu_list(allowed), last: None }
    }

    /// How busy it was since the last reading. `now_us` is any clock that does not jump.
    pub fn read(&mut self, now_us: u64) -> (Usage, Limits) {
        let (cpu, cpus) = self.cpu(now_us);
        let (memory, memory_bytes) = self.memory();
        (Usage { cpu, memory }, Limits { cpus, memory_bytes })
    }

    /// The busier of two: the processors that we may run on, and the processor time that we may spend.
    fn cpu(&mut self, now_us: u64) -> (f64, f64) {
        let (mut busy, mut count) = (0.0, 0.0);
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            let all = system.cpus();
            let ours: Vec<f64> = all
                .iter()
                .enumerate()
                .filter(|(index, _)| self.allowed.is_empty() || self.allowed.contains(index))
                .map(|(_, cpu)| f64::from(cpu.usage()) / 100.0)
                .collect();
            count = ours.len() as f64;
            busy = if ours.is_empty() { 0.0 } else { ours.iter().sum::<f64>() / count };
        }
        let Some(limited) = self.groups.cpu() else { return (busy, count) };
        let before = self.last.replace((now_us, limited));
        let spent = before.filter(|(then, _)| now_us > *then).map_or(0.0, |(then, before)| {
            let used = limited.used_us.saturating_sub(before.used_us) as f64;
            used / (now_us - then) as f64 / limited.limit
        });
        (busy.max(spent), if count > 0.0 { count.min(limited.limit) } else { limited.limit })
    }

    /// The fuller of two: the machine's memory, and the memory that we may use of it.
    fn memory(&mut self) -> (f64, u64) {
        let (mut full, mut total) = (0.0, 0);
        if let Some(system) = &mut self.system {
            system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
            total = system.total_memory();
            if total > 0 {
                full = 1.0 - system.available_memory() as f64 / total as f64;
            }
        }
        match self.groups.memory() {
            Some(limited) => {
                let bytes = if total > 0 { total.min(limited.limit) } else { limited.limit };
                (full.max(limited.used as f64 / limited.limit as f64), bytes)
            }
            None => (full, total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_read() {
        let mut machine = Machine::open();
        let (usage, limits) = machine.read(1);
        assert!((0.0..=1.0).contains(&usage.cpu), "{usage:?}");
        assert!(usage.memory > 0.0 && usage.memory <= 1.0, "{usage:?}");
        assert!(limits.cpus > 0.0 && limits.memory_bytes > 1 << 20, "{limits:?}");
    }
}
