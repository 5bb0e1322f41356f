//! Processes of the demo, found by where they work, so that none outlives it.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use drover_service::process::{self, ProcessId};
use rustix::process::Signal;

use crate::supervise::signal;

/// How long processes may take to end by themselves after everything was told to.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// Waits until no process of this state directory is left and kills those that stay. Says how many had to be killed.
pub(super) async fn end_all(state: &Path, patience: Duration) -> usize {
    let deadline = Instant::now() + patience;
    loop {
        let left = processes_of(state);
        if left.is_empty() {
            return 0;
        }
        if Instant::now() >= deadline {
            let killed = left.into_iter().filter(|id| signal(*id, Signal::KILL)).count();
            // Their children may show only now.
            for id in processes_of(state) {
                signal(id, Signal::KILL);
            }
            return killed;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Processes of ours that were started for this state directory, or that work inside it.
fn processes_of(state: &Path) -> Vec<ProcessId> {
    let me = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let mine = pid != me && (works_in(&entry.path(), state) || was_started_for(&entry.path(), state));
            mine.then(|| process::of(pid)).flatten()
        })
        .collect()
}

fn works_in(process: &Path, state: &Path) -> bool {
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(state))
}

fn was_started_for(process: &Path, state: &Path) -> bool {
    // Other users' processes cannot be read, and are not ours.
    let Ok(environment) = fs::read(process.join("environ")) else { return false };
    environment.split(|&byte| byte == 0).any(|variable| {
        let value = variable
            .strip_prefix(b"DROVER_STATE_DIR=")
            .or_else(|| variable.strip_prefix(b"DROVER_NODE_DIR="))
            .or_else(|| variable.strip_prefix(b"DROVER_MAILBOX="));
        value.is_some_and(|value| Path::new(std::ffi::OsStr::from_bytes(value)).starts_with(state))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_processes_of_the_demo_are_ended() {
        let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sleeper = |dir: &Path| {
            let mut command = std::process::Command::new("sleep");
            command.arg("60").current_dir(dir).spawn().unwrap()
        };
        let ours_path = fs::canonicalize(ours.path()).unwrap();
        let mut mine = sleeper(&ours_path);
        let mut theirs = sleeper(other.path());
        let mut by_name = std::process::Command::new("sleep");
        let mut by_name = by_name.arg("60").env("DROVER_NODE_DIR", ours_path.join("nodes/x")).spawn().unwrap();
        assert_eq!(end_all(&ours_path, Duration::from_millis(100)).await, 2);
        mine.wait().unwrap();
        by_name.wait().unwrap();
        assert!(theirs.try_wait().unwrap().is_none());
        theirs.kill().unwrap();
        theirs.wait().unwrap();
        assert_eq!(end_all(&ours_path, Duration::from_millis(100)).await, 0);
    }
}
