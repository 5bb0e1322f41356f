//! Which processes a job consists of, and signals to them.
//!
//! A process of a job puts itself on record before it becomes the program that it is to run. Only these, what is in their
//! groups and what descends from them is ever signalled; a pid that has been given to somebody else is recognised by its start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use drover_service::process::{self, ProcessId};
use rustix::process::{Pid, Signal, kill_process};

use super::store::{Dir, Recorded};

/// Stops a process.
pub(crate) const STOP: i32 = 19;

struct Row {
    parent: u32,
    group: u32,
    start_time: u64,
}

/// The processes of this machine at one moment, without the dead.
pub(crate) struct Table {
    rows: BTreeMap<u32, Row>,
}

impl Table {
    /// Looks at them.
    pub(crate) fn now() -> Self {
        let mut rows = BTreeMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let Some(behind) = stat.rfind(')') else { continue };
            let fields: Vec<&str> = stat[behind + 1..].split_ascii_whitespace().collect();
            let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
            if let (Some(parent), Some(group), Some(start_time)) = (number(1), number(2), number(19))
                && !matches!(fields.first(), Some(&("Z" | "X")))
            {
                rows.insert(pid, Row { parent: parent as u32, group: group as u32, start_time });
            }
        }
        Self { rows }
    }

    /// What belongs to one recorded process: itself, its group, and what descends from these, except what is on record by
    /// itself.
    pub(crate) fn family(&self, of: &Recorded, dir: &Dir, job: u32, others: &BTreeSet<u32>) -> Vec<ProcessId> {
        let leader = of.process;
        let alive = self.rows.get(&leader.pid).is_some_and(|row| row.start_time == leader.start_time);
        let member = |pid: u32, row: &Row| {
            row.group == leader.pid
                && row.start_time >= leader.start_time
                // A group whose leader has ended may be a later one of the same number.
                && (alive || is_ours(pid, dir, job))
        };
        let mut found: BTreeSet<u32> =
            self.rows.iter().filter(|(pid, row)| member(**pid, row)).map(|(pid, _)| *pid).collect();
        let mut new: Vec<u32> = found.iter().copied().collect();
        while let Some(parent) = new.pop() {
            for (pid, row) in &self.rows {
                if row.parent == parent && !others.contains(pid) && found.insert(*pid) {
                    new.push(*pid);
                }
            }
        }
        found.retain(|pid| *pid == leader.pid || !others.contains(pid));
        let known = found.into_iter().filter_map(|pid| Some((pid, self.rows.get(&pid)?)));
        known.map(|(pid, row)| ProcessId { pid, start_time: row.start_time }).collect()
    }
}

fn is_ours(pid: u32, dir: &Dir, job: u32) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let has = |wanted: &[u8]| environment.split(|byte| *byte == 0).any(|entry| entry == wanted);
    let state = [b"FAKE_SLURM_DIR=", dir.root().as_os_str().as_encoded_bytes()].concat();
    has(&state) && has(format!("SLURM_JOB_ID={job}").as_bytes())
}

/// Living processes of a job: those of its records that `wanted` chooses by run, and what belongs to them.
pub(crate) fn living(dir: &Dir, job: u32, wanted: impl Fn(u32, &Recorded) -> bool) -> Vec<ProcessId> {
    let recorded = dir.recorded(job);
    let chosen: Vec<&Recorded> =
        recorded.iter().filter(|(run, recorded)| wanted(*run, recorded)).map(|(_, recorded)| recorded).collect();
    if chosen.is_empty() {
        return Vec::new();
    }
    let table = Table::now();
    let leaders: BTreeSet<u32> = recorded.iter().map(|(_, recorded)| recorded.process.pid).collect();
    chosen.into_iter().flat_map(|one| table.family(one, dir, job, &leaders)).collect()
}

/// Sends a signal, by number, to exactly this process. One that has ended is left alone.
pub(crate) fn signal(to: ProcessId, number: i32) {
    // A program of the fake that stood still with the lock in its hand would stop the whole cluster.
    if number == STOP && fs::read_link(format!("/proc/{}/exe", to.pid)).ok() == std::env::current_exe().ok() {
        return;
    }
    let pid = i32::try_from(to.pid).ok().and_then(Pid::from_raw);
    if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(number))
        && process::is_alive(&to)
    {
        // It may end in between: nothing is lost by that.
        let _ = kill_process(pid, signal);
    }
}

/// The number of a signal by its name, with or without `SIG`, or by number.
pub(crate) fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let known = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ABRT", 6),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("ALRM", 14),
        ("TERM", 15),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("URG", 23),
        ("XCPU", 24),
    ];
    known.iter().find(|(word, _)| *word == name).map(|(_, number)| *number)
}
