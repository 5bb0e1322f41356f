//! The process that starts and ends the jobs of a fake cluster: slurmctld and every slurmd in one.
//!
//! It may be killed at any point: the next command starts another, which goes on from what is stored. It ends by itself when
//! the cluster is stopped, when who made it is gone, or when its directory is.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use drover_service::process::{self, ProcessId};
use rustix::process::{WaitOptions, setsid, wait};

use super::model::{Cluster, Job, Phase, Run};
use super::processes::{self, STOP, signal};
use super::scheduler::{self, Action, Seen, Who};
use super::store::Dir;

/// How often the directory is looked at.
const BEAT: Duration = Duration::from_millis(10);
/// How often jobs on nodes are looked at when nothing has been stored.
const BUSY: Duration = Duration::from_millis(50);
/// The same when there is no job.
const IDLE: Duration = Duration::from_millis(500);
/// A keeper that has not put itself on record after so long is started again.
const START: Duration = Duration::from_secs(10);

const KILL: i32 = 9;
const CONT: i32 = 18;

/// Real milliseconds since 1970.
pub(crate) fn real_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Starts the controller of a cluster unless it runs or the cluster has been stopped.
pub(crate) fn ensure(dir: &Dir, cluster: &Cluster) -> anyhow::Result<()> {
    if cluster.stopped || dir.controller().is_some_and(|controller| process::is_alive(&controller)) {
        return Ok(());
    }
    let mut command = own_command(dir)?;
    command.arg("controller").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.current_dir("/").spawn()?;
    Ok(())
}

/// This very program, to be told what to do on that cluster.
pub(crate) fn own_command(dir: &Dir) -> anyhow::Result<Command> {
    let mut command = Command::new(super::program()?);
    command.arg("--state").arg(dir.root());
    Ok(command)
}

struct Controller {
    dir: Dir,
    /// Keepers that were started, until they are on record.
    started: BTreeMap<(u32, u32), Instant>,
    /// Runs whose processes are stopped, for jobs that are suspended.
    stopped: BTreeSet<(u32, u32)>,
    /// The cluster as it was last seen, to be ended when its directory has gone.
    last: Option<Cluster>,
}

/// Runs until the cluster has ended.
pub(crate) fn run(dir: &Dir) -> anyhow::Result<()> {
    // Not to be ended with the terminal or the group of the command that started this.
    let _ = setsid();
    let Some(_lock) = dir.become_controller()? else { return Ok(()) };
    let mut controller =
        Controller { dir: dir.clone(), started: BTreeMap::new(), stopped: BTreeSet::new(), last: None };
    let mut version = None;
    let mut looked = Instant::now();
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let Ok(current) = dir.version() else {
            controller.end_all();
            return Ok(());
        };
        let pause = controller.pause();
        if version != Some(current) || looked.elapsed() >= pause {
            looked = Instant::now();
            if controller.look()? {
                return Ok(());
            }
            version = dir.version().ok();
        }
        std::thread::sleep(BEAT);
    }
}

impl Controller {
    fn pause(&self) -> Duration {
        let Some(cluster) = &self.last else { return Duration::ZERO };
        let mut pause = IDLE;
        for job in cluster.jobs.values() {
            match job.phase {
                Phase::Ending { .. } => return BEAT,
                Phase::Running(_) | Phase::Waiting { .. } => pause = BUSY,
                Phase::Over { .. } => {}
            }
        }
        pause
    }

    /// Looks at everything and does what is due. Says whether the cluster has ended.
    fn look(&mut self) -> anyhow::Result<bool> {
        // Whatever is seen of the processes is older than the state that it is judged by: a run that has begun in between
        // is not taken for the one before.
        let mut locked = self.dir.lock()?;
        let owner_gone = locked.cluster.owner.is_some_and(|owner| !process::is_alive(&owner));
        if owner_gone && !locked.cluster.stopped {
            locked.cluster.stopped = true;
        }
        if locked.cluster.stopped {
            self.last = Some(locked.cluster.clone());
            self.end_all();
            locked.save()?;
            return Ok(true);
        }
        let now = locked.cluster.clock.at(real_now());
        let seen: BTreeMap<u32, Seen> =
            locked.cluster.jobs.values().filter_map(|job| Some((job.id, self.see(&locked.cluster, job)?))).collect();
        let before = serde_json::to_vec(&locked.cluster)?;
        let actions = scheduler::advance(&mut locked.cluster, &locked.settings, now, &seen);
        for action in actions {
            self.perform(&locked.cluster, &action);
        }
        self.suspend(&locked.cluster);
        self.last = Some(locked.cluster.clone());
        let changed = serde_json::to_vec(&locked.cluster)? != before;
        if changed {
            locked.save()?;
        } else {
            drop(locked);
        }
        self.keep_running()?;
        Ok(false)
    }

    fn see(&self, cluster: &Cluster, job: &Job) -> Option<Seen> {
        let run = match &job.phase {
            Phase::Running(run) | Phase::Ending { run, .. } => run,
            Phase::Waiting { .. } | Phase::Over { .. } => return None,
        };
        let first_answers = run.nodes.first().is_some_and(|name| scheduler::answers(cluster, name));
        if let Phase::Ending { .. } = job.phase {
            let keeper = self.dir.keeper(job.id, run.number);
            let kept = first_answers && keeper.is_some_and(|keeper| process::is_alive(&keeper));
            let alive = kept || !self.living(cluster, job, run, Who::All).is_empty();
            return Some(Seen { alive, ..Seen::default() });
        }
        if !first_answers {
            return Some(Seen::default());
        }
        let keeper = self.dir.keeper(job.id, run.number);
        let gone = keeper.is_some_and(|keeper| !process::is_alive(&keeper));
        // Asked in this order: a keeper says how the script ended before it goes.
        let script = self.dir.script_end(job.id, run.number);
        Some(Seen { script, deserted: gone && script.is_none(), alive: true })
    }

    /// Processes of the present run on nodes that answer.
    fn living(&self, cluster: &Cluster, job: &Job, run: &Run, who: Who) -> Vec<ProcessId> {
        processes::living(&self.dir, job.id, |number, recorded| {
            let chosen = match who {
                Who::All => true,
                Who::Script => recorded.step.is_none(),
                Who::Steps => recorded.step.is_some(),
            };
            chosen && number == run.number && scheduler::answers(cluster, &recorded.node)
        })
    }

    fn perform(&self, cluster: &Cluster, action: &Action) {
        match action {
            // Whatever runs without a keeper is started below, after this has been stored.
            Action::Start(_) => {}
            Action::Signal { job, who, number } => {
                let Some(job) = cluster.jobs.get(job) else { return };
                let Some(run) = job.run() else { return };
                if *who == Who::Script {
                    // The shell itself, not what it has started.
                    for (recorded_run, recorded) in self.dir.recorded(job.id) {
                        if recorded_run == run.number && recorded.step.is_none() {
                            signal(recorded.process, *number);
                        }
                    }
                    return;
                }
                for process in self.living(cluster, job, run, *who) {
                    signal(process, *number);
                }
            }
            Action::Clear { node, keep } => {
                for job in cluster.jobs.keys() {
                    let spared = |run: u32| *keep == Some((*job, run));
                    let there = processes::living(&self.dir, *job, |run, one| one.node == *node && !spared(run));
                    for process in there {
                        signal(process, KILL);
                    }
                }
            }
        }
    }

    /// Starts a keeper for every run that has none.
    fn keep_running(&mut self) -> anyhow::Result<()> {
        let Some(cluster) = self.last.clone() else { return Ok(()) };
        for job in cluster.jobs.values() {
            let Phase::Running(run) = &job.phase else { continue };
            let key = (job.id, run.number);
            if self.dir.keeper(job.id, run.number).is_some() {
                self.started.remove(&key);
            } else if self.started.get(&key).is_none_or(|since| since.elapsed() >= START) {
                self.started.insert(key, Instant::now());
                let mut command = own_command(&self.dir)?;
                command.arg("keeper").arg(job.id.to_string()).arg(run.number.to_string());
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/").spawn()?;
            }
        }
        Ok(())
    }

    /// Stops or wakes what is suspended or no longer so.
    fn suspend(&mut self, cluster: &Cluster) {
        for job in cluster.jobs.values() {
            let Phase::Running(run) = &job.phase else { continue };
            let (key, suspend) = ((job.id, run.number), run.suspended.is_some());
            let changed = if suspend { self.stopped.insert(key) } else { self.stopped.remove(&key) };
            if changed {
                for process in self.living(cluster, job, run, Who::All) {
                    signal(process, if suspend { STOP } else { CONT });
                }
            }
        }
    }

    /// Kills whatever the cluster still runs anywhere.
    fn end_all(&self) {
        let Some(cluster) = &self.last else { return };
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let left: Vec<ProcessId> =
                cluster.jobs.keys().flat_map(|job| processes::living(&self.dir, *job, |_, _| true)).collect();
            if left.is_empty() {
                return;
            }
            for process in left {
                signal(process, KILL);
            }
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            std::thread::sleep(BEAT);
        }
    }
}
