//! Keeps daemons alive as children of this process: `up` and `demo`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use drover_service::process::{self, ProcessId};
use drover_service::{StateDir, address_book};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fault::Fault;
use crate::start::{self, Recipe};
use crate::{client, files, probe};

/// How long a daemon that was told to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(12);

/// How long to wait before the next start of a daemon that keeps dying.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    deaths: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(30);

    /// A daemon that has answered was well: what ended it came from outside, and waiting would only cost time.
    pub(crate) fn after(&mut self, answered: bool) -> Duration {
        if answered {
            self.deaths = 0;
        }
        let pause = Self::FIRST.saturating_mul(1 << self.deaths.min(16)).min(Self::LONGEST);
        self.deaths += 1;
        pause
    }
}

/// What happens to the daemons.
#[derive(Debug)]
pub(crate) enum Notice {
    /// It runs already, started by an earlier command; it is watched from here on.
    TakenOver { daemon: &'static str, pid: u32 },
    /// It ended unasked.
    Died { daemon: &'static str, how: String, again_in: Duration },
    /// It runs again.
    Restarted { daemon: &'static str, pid: u32 },
    /// It never served: starting it again would not help.
    GaveUp { fault: Fault },
    /// It did not end when told to and was killed.
    Killed { daemon: &'static str },
}

/// Daemons that are kept alive until `stop`.
#[derive(Debug)]
pub(crate) struct Supervisor {
    tasks: TaskTracker,
    stop: CancellationToken,
    notices: mpsc::Receiver<Notice>,
    /// Read while waiting for something else, and not told yet.
    kept: VecDeque<Notice>,
    state: StateDir,
}

impl Supervisor {
    /// Starts the daemons, or takes over those that run.
    pub(crate) fn start(state: &StateDir, config: Option<&Path>, names: &[&'static str]) -> Self {
        let tasks = TaskTracker::new();
        let stop = CancellationToken::new();
        // What is not read in time is lost: it is a line for people, and must not hold up a restart.
        let (notices, receiver) = mpsc::channel(64);
        for &daemon in names {
            let keeper = Keeper {
                daemon,
                state: state.clone(),
                config: config.map(Path::to_owned),
                stop: stop.clone(),
                notices: notices.clone(),
                backoff: Backoff::default(),
                served: false,
                starts: 0,
            };
            tasks.spawn(keeper.keep());
        }
        tasks.close();
        Self { tasks, stop, notices: receiver, kept: VecDeque::new(), state: state.clone() }
    }

    /// The next thing that happens to a daemon.
    pub(crate) async fn notice(&mut self) -> Option<Notice> {
        match self.kept.pop_front() {
            Some(notice) => Some(notice),
            None => self.notices.recv().await,
        }
    }

    /// Waits until every daemon answers; fails when one gives up or the time is over.
    pub(crate) async fn healthy(&mut self, names: &[&'static str]) -> Result<(), Fault> {
        let deadline = Instant::now() + start::STARTING;
        let mut why = String::new();
        for &daemon in names {
            loop {
                while let Ok(notice) = self.notices.try_recv() {
                    match notice {
                        Notice::GaveUp { fault } => return Err(fault),
                        other => self.kept.push_back(other),
                    }
                }
                if let Some(entry) = address_book::read(&self.state, daemon) {
                    match probe::healthz(&entry.listen).await {
                        Ok(()) => break,
                        Err(reason) => why = reason,
                    }
                }
                if Instant::now() >= deadline {
                    let log = files::log_path(&self.state, daemon);
                    let why = if why.is_empty() { "it does not listen" } else { &why };
                    return Err(Fault::failed(format!("{daemon} does not answer: {why}"))
                        .hint(format!("its log is {}", log.display())));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    /// Ends every daemon: asks first, kills after the grace period. Says which had to be killed.
    pub(crate) async fn stop(mut self) -> Vec<&'static str> {
        self.stop.cancel();
        self.tasks.wait().await;
        let mut killed = Vec::new();
        while let Ok(notice) = self.notices.try_recv() {
            if let Notice::Killed { daemon } = notice {
                killed.push(daemon);
            }
        }
        killed
    }
}

/// Keeps one daemon alive.
struct Keeper {
    daemon: &'static str,
    state: StateDir,
    config: Option<PathBuf>,
    stop: CancellationToken,
    notices: mpsc::Sender<Notice>,
    backoff: Backoff,
    /// It has answered at least once.
    served: bool,
    starts: u32,
}

/// How a run of the daemon ended.
enum End {
    Asked,
    Died { how: String, answered: bool },
    Hopeless(Fault),
}

impl Keeper {
    async fn keep(mut self) {
        loop {
            let end = match address_book::read(&self.state, self.daemon) {
                Some(entry) if entry.host == process::hostname() && client::fits(&entry.version) => {
                    self.watch(ProcessId { pid: entry.pid, start_time: entry.start_time }).await
                }
                Some(entry) if entry.host == process::hostname() => {
                    // Left over from before an update: its successor takes its place.
                    self.end(ProcessId { pid: entry.pid, start_time: entry.start_time }).await;
                    continue;
                }
                _ => self.run().await,
            };
            let (how, answered) = match end {
                End::Asked => return,
                End::Hopeless(fault) => {
                    self.tell(Notice::GaveUp { fault });
                    return;
                }
                End::Died { how, answered } => (how, answered),
            };
            let again_in = self.backoff.after(answered);
            self.tell(Notice::Died { daemon: self.daemon, how, again_in });
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(again_in) => {}
            }
        }
    }

    fn tell(&self, notice: Notice) {
        let _ = self.notices.try_send(notice);
    }

    /// Watches a daemon that is not our child.
    async fn watch(&mut self, id: ProcessId) -> End {
        self.served = true;
        self.tell(Notice::TakenOver { daemon: self.daemon, pid: id.pid });
        while process::is_alive(&id) {
            tokio::select! {
                () = self.stop.cancelled() => {
                    self.end(id).await;
                    return End::Asked;
                }
                () = tokio::time::sleep(Duration::from_millis(250)) => {}
            }
        }
        End::Died { how: "it ended".to_owned(), answered: true }
    }

    /// Runs the daemon as our child.
    async fn run(&mut self) -> End {
        let recipe =
            Recipe { state: &self.state, config: self.config.as_deref(), detached: false, rotate: self.starts == 0 };
        self.starts += 1;
        let spawned = recipe.command(self.daemon).and_then(|command| {
            let mut command = tokio::process::Command::from(command);
            // A Ctrl-C in the terminal is ours to answer; the daemons are told by us, in order.
            command.process_group(0).stdin(Stdio::null());
            // If this process has to leave at once, its daemons do too; they are made for that.
            command.kill_on_drop(true).spawn()
        });
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) if self.served => {
                return End::Died { how: format!("cannot start: {error}"), answered: false };
            }
            Err(error) => return End::Hopeless(Fault::failed(format!("cannot start {}: {error}", self.daemon))),
        };
        let id = child.id().and_then(process::of);
        if self.starts > 1
            && let Some(id) = id
        {
            self.tell(Notice::Restarted { daemon: self.daemon, pid: id.pid });
        }
        let mut look = tokio::time::interval(Duration::from_millis(100));
        let mut answered = false;
        let status: std::io::Result<ExitStatus> = loop {
            tokio::select! {
                status = child.wait() => break status,
                () = self.stop.cancelled() => {
                    if let Some(id) = id {
                        signal(id, Signal::TERM);
                    }
                    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
                        self.tell(Notice::Killed { daemon: self.daemon });
                        let _ = child.kill().await;
                    }
                    return End::Asked;
                }
                _ = look.tick(), if !answered => answered = self.listened(id),
            }
        };
        // It may have died between two looks; what was killed leaves its entry behind.
        answered |= self.listened(id);
        let how = match &status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        self.served |= answered;
        match status {
            Ok(status) if !self.served => End::Hopeless(start::did_not_start(&self.state, self.daemon, status)),
            _ => End::Died { how, answered },
        }
    }

    /// This process has written where it listens.
    fn listened(&self, id: Option<ProcessId>) -> bool {
        let entry = address_book::read_any(&self.state, self.daemon);
        entry.is_some_and(|entry| id == Some(ProcessId { pid: entry.pid, start_time: entry.start_time }))
    }

    /// Ends a process that is not our child.
    async fn end(&self, id: ProcessId) {
        signal(id, Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while process::is_alive(&id) {
            if Instant::now() >= deadline {
                self.tell(Notice::Killed { daemon: self.daemon });
                signal(id, Signal::KILL);
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Sends a signal to exactly this process; nothing when it is gone. True when it was sent.
pub(crate) fn signal(id: ProcessId, signal: Signal) -> bool {
    let pid = i32::try_from(id.pid).ok().and_then(Pid::from_raw);
    process::is_alive(&id) && pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_keeps_dying_is_started_ever_more_slowly_until_it_is_well() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..9).map(|_| backoff.after(false).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000]);
        assert_eq!(backoff.after(true), Backoff::FIRST);
        for _ in 0..100 {
            assert!(backoff.after(false) <= Backoff::LONGEST);
        }
    }

    #[test]
    fn a_signal_reaches_only_the_process_that_was_meant() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = process::of(child.id()).unwrap();
        assert!(
            !signal(ProcessId { start_time: id.start_time + 1, ..id }, Signal::KILL),
            "another process of that pid"
        );
        assert!(signal(id, Signal::KILL));
        child.wait().unwrap();
        assert!(!signal(id, Signal::KILL));
    }
}
