//! Processes by pid and start time: a pid alone may have been given to somebody else.

use std::fs;

use serde::{Deserialize, Serialize};

/// A process that cannot be mistaken for a later one of the same pid on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid.
    pub pid: u32,
    /// Clock ticks between boot and its start.
    pub start_time: u64,
}

impl ProcessId {
    /// This process.
    pub fn current() -> Self {
        let pid = std::process::id();
        Self { pid, start_time: start_time(pid).unwrap_or(0) }
    }
}

/// The process that has this pid now, unless it is dead.
pub fn of(pid: u32) -> Option<ProcessId> {
    start_time(pid).map(|start_time| ProcessId { pid, start_time })
}

/// When the process that has this pid now was started; `None` when there is none or it is a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name stands in parentheses and may hold anything; the fields behind it count from 3.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

/// Whether exactly this process still runs. A zombie does not.
pub fn is_alive(id: &ProcessId) -> bool {
    start_time(id.pid) == Some(id.start_time)
}

/// The name of a program by pid, for messages.
pub fn program(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim().to_owned())
}

/// This host's name.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_a_zombie_is_dead() {
        let me = ProcessId::current();
        assert!(is_alive(&me));
        assert!(!is_alive(&ProcessId { start_time: me.start_time + 1, ..me }));

        let mut child = std::process::Command::new("true").spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while of(child.id()).is_some() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(of(child.id()), None, "an unreaped child counts as dead");
        child.wait().unwrap();
    }
}
