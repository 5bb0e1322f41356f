//! Worker processes as the kernel knows them: found, watched and signalled without ever trusting a pid.
//!
//! A pid may belong to somebody else tomorrow. A process is therefore named by pid and start time, held by a pidfd where
//! the kernel has them (signals through it cannot hit a successor), and compared again right before a signal where it has
//! not.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Child;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::core::Process;

/// How often a process is looked at where the kernel has no pidfds.
const POLL: Duration = Duration::from_millis(200);

/// What `/proc/<pid>/stat` says of a process, dead or alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    state: u8,
    group: u32,
    session: u32,
    start_time: u64,
}

impl Stat {
    fn is_dead(self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The program's name stands in parentheses and may hold anything, also parentheses; the fields behind it count from 3.
fn parse_stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    Some(Stat {
        state: *fields.first()?.as_bytes().first()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// Whether exactly this process runs. A zombie does not.
pub(super) fn is_alive(process: Process) -> bool {
    stat(process.pid).is_some_and(|stat| stat.start_time == process.start_time && !stat.is_dead())
}

/// Which boot of this host this is; start times are counted from it.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

/// One process, held so that its end is seen and no successor is hit.
#[derive(Debug)]
pub(super) struct Handle {
    process: Process,
    /// `None` where the kernel has no pidfds.
    fd: Option<AsyncFd<OwnedFd>>,
}

impl Handle {
    /// A child that was not waited for yet: until then its pid is nobody else's.
    pub(super) fn of_child(child: &Child) -> io::Result<Self> {
        let pid = child.id();
        let stat = stat(pid).ok_or(io::ErrorKind::NotFound)?;
        let fd = open(pid)?;
        Ok(Self { process: Process { pid, start_time: stat.start_time }, fd })
    }

    /// A process that somebody else started; `None` when it is gone.
    pub(super) fn adopt(process: Process) -> io::Result<Option<Self>> {
        let fd = match open(process.pid) {
            Ok(fd) => fd,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Compared after the pidfd is open: from here on the two cannot come apart.
        Ok(is_alive(process).then_some(Self { process, fd }))
    }

    pub(super) fn process(&self) -> Process {
        self.process
    }

    /// Returns when the process has ended, reaped or not.
    pub(super) async fn ended(&self) {
        if let Some(fd) = &self.fd
            && fd.readable().await.is_ok()
        {
            return;
        }
        while is_alive(self.process) {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Sends a signal to this process; false when it has ended.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<bool> {
        match &self.fd {
            Some(fd) => sent(pidfd_send_signal(fd.get_ref().as_fd(), signal)),
            None => signal_by_pid(self.process, signal),
        }
    }
}

/// A pidfd in the reactor; `None` where the kernel has none.
#[expect(deprecated, reason = "its successor is an unsafe function; an OwnedFd stays open while it is registered")]
fn open(pid: u32) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    match pidfd_open(raw(pid)?, PidfdFlags::empty()) {
        Ok(fd) => Ok(Some(AsyncFd::with_interest(fd, Interest::READABLE)?)),
        // NOSYS: before Linux 5.3; PERM: a sandbox without the call.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn raw(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn sent(result: rustix::io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn signal_by_pid(process: Process, signal: Signal) -> io::Result<bool> {
    if !is_alive(process) {
        return Ok(false);
    }
    sent(rustix::process::kill_process(raw(process.pid)?, signal))
}

/// Sends a signal to exactly this process; false when it has ended.
fn signal_once(process: Process, signal: Signal) -> io::Result<bool> {
    match pidfd_open(raw(process.pid)?, PidfdFlags::empty()) {
        Ok(fd) if is_alive(process) => sent(pidfd_send_signal(fd.as_fd(), signal)),
        Ok(_) | Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(_) => signal_by_pid(process, signal),
    }
}

/// Kills a worker and everything in its process group and session.
pub(super) fn kill_tree(process: Process) -> io::Result<()> {
    signal_once(process, Signal::KILL)?;
    kill_leftovers(process);
    Ok(())
}

/// Kills what a worker that is gone has left in its process group and session: an agent program that went on would work
/// in the same directory as the agent of the next generation. Returns how many were killed.
pub(super) fn kill_leftovers(leader: Process) -> usize {
    let mut killed = 0;
    // Again as long as there are some: one of them may have forked while we looked.
    for _ in 0..8 {
        let found = leftovers(leader);
        if found.is_empty() {
            break;
        }
        killed += found.into_iter().filter(|&process| signal_once(process, Signal::KILL).unwrap_or(false)).count();
    }
    killed
}

fn leftovers(leader: Process) -> Vec<Process> {
    // A number stays taken as long as a group or session of that name exists. So when another process has it now,
    // nothing of the old group is left, and what bears the number is not ours.
    if stat(leader.pid).is_some_and(|stat| stat.start_time != leader.start_time) {
        return Vec::new();
    }
    processes()
        .filter(|(pid, stat)| {
            *pid != leader.pid
                && !stat.is_dead()
                && (stat.group == leader.pid || stat.session == leader.pid)
                && stat.start_time >= leader.start_time
        })
        .map(|(pid, stat)| Process { pid, start_time: stat.start_time })
        .collect()
}

fn processes() -> impl Iterator<Item = (u32, Stat)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
}

/// The oldest process whose environment has all of these and that leads its process group: a worker that was started and
/// has not told anybody yet.
pub(super) fn by_environment(wanted: &[(&str, String)]) -> Option<Process> {
    let wanted: Vec<Vec<u8>> = wanted.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect();
    processes()
        .filter(|(pid, stat)| !stat.is_dead() && stat.group == *pid)
        .filter(|(pid, _)| {
            // Unreadable for processes of other users, which are not ours.
            let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { return false };
            wanted.iter().all(|wanted| environment.split(|&byte| byte == 0).any(|found| found == wanted.as_slice()))
        })
        .min_by_key(|(pid, stat)| (stat.start_time, *pid))
        .map(|(pid, stat)| Process { pid, start_time: stat.start_time })
}

/// Whether a file can be executed, as far as its mode says.
pub(super) fn is_program(path: &std::path::Path) -> bool {
    path.as_os_str().as_bytes().contains(&b'/')
        && path.is_file()
        && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").stdin(Stdio::null()).process_group(0).spawn().unwrap()
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let tail = "S 1 22 33 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        let expected = Stat { state: b'S', group: 22, session: 33, start_time: 4711 };
        for name in ["sh", "a) R 9 9", "((", ""] {
            assert_eq!(parse_stat(&format!("7 ({name}) {tail}")), Some(expected), "{name}");
        }
        assert_eq!(parse_stat("7 (sh) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[tokio::test]
    async fn the_end_of_a_child_is_seen_before_it_is_reaped_and_a_zombie_is_dead() {
        let mut child = sleeper();
        let handle = Handle::of_child(&child).unwrap();
        assert!(is_alive(handle.process()));
        assert!(handle.signal(Signal::KILL).unwrap());
        tokio::time::timeout(Duration::from_secs(5), handle.ended()).await.unwrap();
        assert!(!is_alive(handle.process()));
        assert!(Handle::adopt(handle.process()).unwrap().is_none());
        child.wait().unwrap();
        assert!(!handle.signal(Signal::TERM).unwrap());
    }

    #[tokio::test]
    async fn a_pid_with_another_start_time_is_nobody() {
        let mut child = sleeper();
        let real = Handle::of_child(&child).unwrap().process();
        let forged = Process { start_time: real.start_time - 1, ..real };
        assert!(!is_alive(forged));
        assert!(Handle::adopt(forged).unwrap().is_none());
        assert!(!signal_once(forged, Signal::KILL).unwrap());
        assert!(!signal_by_pid(forged, Signal::KILL).unwrap());
        kill_tree(forged).unwrap();
        assert!(is_alive(real), "a process was hit that is not meant");
        kill_tree(real).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_a_dead_worker_left_behind_is_found_and_killed() {
        let mut leader =
            Command::new("sh").args(["-c", "sleep 600 & sleep 600 & wait"]).process_group(0).spawn().unwrap();
        let pid = leader.id();
        let process = Process { pid, start_time: stat(pid).unwrap().start_time };
        let deadline = Instant::now() + Duration::from_secs(5);
        while leftovers(process).len() < 2 {
            assert!(Instant::now() < deadline, "the children did not appear");
            std::thread::yield_now();
        }
        leader.kill().unwrap();
        leader.wait().unwrap();
        assert!(kill_leftovers(process) >= 2);
        while !leftovers(process).is_empty() {
            assert!(Instant::now() < deadline, "children are left");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_worker_that_told_nobody_is_found_by_its_environment() {
        let mark = uuid::Uuid::new_v4().to_string();
        let mut child = Command::new("sleep").arg("600").env("DROVER_JOB_ID", &mark).process_group(0).spawn().unwrap();
        let found = by_environment(&[("DROVER_JOB_ID", mark.clone())]);
        assert_eq!(found.map(|process| process.pid), Some(child.id()));
        assert_eq!(by_environment(&[("DROVER_JOB_ID", mark), ("DROVER_NODE_ID", "0".into())]), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
