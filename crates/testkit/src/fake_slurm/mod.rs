//! A fake Slurm: **not Slurm**, but one program that answers as `sbatch`, `squeue`, `scancel`, `sacct`, `scontrol`, `sinfo` and
//! `srun` do, and runs jobs as processes of this machine.
//!
//! ```text
//! sbatch, squeue, ...  --lock-->  cluster.json  <--lock--  controller  -->  keeper of each run  -->  script  -->  srun  -->  tasks
//!       (bin/)                     settings.json           (by itself)      (slurmstepd)              all on record by pid
//! ```
//!
//! How it answers was recorded from real Slurm of three versions (`crates/slurm-allocator/tests/fixtures/slurm`), and a test
//! compares the two. What goes wrong is chosen by [`Settings`]: latency, an unreachable controller, unknown outcomes, truncated
//! output, a missing or late accounting database, odd states. Nodes can be lost or cut off.
//!
//! It has no priorities, no accounting but what `sacct` shows, no arrays, no heterogeneous jobs; jobs get whole nodes. What it
//! does not know it refuses rather than guesses.

mod answer;
mod commands;
mod controller;
pub mod fixture;
mod launch;
mod model;
mod options;
mod processes;
mod scheduler;
mod settings;
mod store;
mod text;
mod user;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use drover_service::process::{self, ProcessId};
use rustix::process::{Signal, getpid, kill_process};

pub use model::{
    Admin, Asked, Clock, Cluster, EarlySignal, End, Final, Held, Job, Moment, Node, Partition, Phase, Qos, Run, Then,
    Truth,
};
pub use settings::{Accounting, Dialect, Fault, Kind, Settings};
pub use store::{Call, Dir, Locked, Recorded};

use answer::Answer;
use commands::{Context, sacct, sbatch, scancel, scontrol, sinfo, squeue};

/// What the cluster is called.
pub(crate) const CLUSTER: &str = "lab";
/// The host that its commands say they are called on, and that its controller says it is on.
pub(crate) const HOST: &str = "login";
/// The commands that it answers as.
pub const COMMANDS: [&str; 7] = ["sbatch", "squeue", "scancel", "sacct", "scontrol", "sinfo", "srun"];
/// The program.
const PROGRAM: &str = "fake-slurm";

/// A fake cluster that a test has made. Dropping it ends whatever it runs.
#[derive(Debug)]
pub struct FakeSlurm {
    dir: Dir,
}

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes n1, n2, ...
    pub nodes: usize,
    /// Seconds of the cluster per real second.
    pub speed: f64,
    /// How it answers.
    pub settings: Settings,
}

impl Default for Plan {
    fn default() -> Self {
        Self { nodes: 4, speed: 1.0, settings: Settings::default() }
    }
}

impl Plan {
    /// The cluster that the recordings were made on: partitions batch, short (5 minutes) and off (down), account lab, QOS normal
    /// and tiny.
    fn cluster(&self, owner: Option<ProcessId>) -> Cluster {
        let made_ms = controller::real_now();
        let names: Vec<String> = (1..=self.nodes).map(|number| format!("n{number}")).collect();
        let node =
            |name: &String| Node { name: name.clone(), truth: Truth::Fine, since: made_ms, down: false, admin: None };
        let partition = |name: &str, default: bool, up: bool, max_seconds: u64| Partition {
            name: name.to_owned(),
            default,
            up,
            max_seconds: Some(max_seconds),
            default_seconds: Some(max_seconds.min(3600)),
            nodes: names.clone(),
        };
        Cluster {
            owner,
            stopped: false,
            clock: Clock { made_ms, speed: self.speed },
            next_job: 1,
            nodes: names.iter().map(node).collect(),
            partitions: vec![
                partition("batch", true, true, 12 * 3600),
                partition("short", false, true, 300),
                partition("off", false, false, 12 * 3600),
            ],
            accounts: vec!["lab".to_owned()],
            qos: vec![
                Qos { name: "normal".to_owned(), max_jobs: None, max_seconds: None },
                Qos { name: "tiny".to_owned(), max_jobs: Some(1), max_seconds: Some(36_000) },
            ],
            jobs: std::collections::BTreeMap::new(),
        }
    }
}

impl FakeSlurm {
    /// Makes a cluster in a directory, which ends with this process at the latest.
    pub fn start(dir: &Path, plan: &Plan) -> anyhow::Result<Self> {
        let made = make(dir, plan, Some(ProcessId::current()), &program_beside()?)?;
        Ok(Self { dir: made })
    }

    /// The directory with `sbatch` and the others, to be put on PATH.
    pub fn bin(&self) -> PathBuf {
        self.dir.root().join("bin")
    }

    /// PATH with the fake's commands first.
    pub fn path(&self) -> anyhow::Result<std::ffi::OsString> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Ok(std::env::join_paths(std::iter::once(self.bin()).chain(std::env::split_paths(&path)))?)
    }

    /// Where its state is.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// The cluster as it is now.
    pub fn cluster(&self) -> anyhow::Result<Cluster> {
        self.dir.read()
    }

    /// A job as it is now.
    pub fn job(&self, id: u32) -> anyhow::Result<Job> {
        self.cluster()?.jobs.remove(&id).with_context(|| format!("there is no job {id}"))
    }

    /// Changes how it answers.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) -> anyhow::Result<()> {
        let mut locked = self.dir.lock()?;
        change(&mut locked.settings);
        locked.save_settings()
    }

    /// Makes calls go wrong, beside what goes wrong already.
    pub fn fault(&self, command: &str, kind: Kind, times: Option<u32>) -> anyhow::Result<()> {
        let fault = Fault { command: command.to_owned(), kind, after: 0, times };
        self.set(|settings| settings.faults.push(fault))
    }

    /// Changes the cluster.
    pub fn change(&self, change: impl FnOnce(&mut Cluster)) -> anyhow::Result<()> {
        let mut locked = self.dir.lock()?;
        change(&mut locked.cluster);
        locked.save()
    }

    /// Takes the power from a node, cuts it off or brings it back.
    pub fn node(&self, name: &str, truth: Truth) -> anyhow::Result<()> {
        let mut locked = self.dir.lock()?;
        let now = locked.cluster.clock.at(controller::real_now());
        let node = locked.cluster.nodes.iter_mut().find(|node| node.name == name);
        let node = node.with_context(|| format!("there is no node {name}"))?;
        (node.truth, node.since) = (truth, now);
        locked.save()
    }

    /// Every call of a command so far.
    pub fn calls(&self) -> anyhow::Result<Vec<Call>> {
        self.dir.calls()
    }

    /// Living processes of jobs.
    pub fn processes(&self) -> anyhow::Result<Vec<ProcessId>> {
        let cluster = self.cluster()?;
        Ok(cluster.jobs.keys().flat_map(|job| processes::living(&self.dir, *job, |_, _| true)).collect())
    }

    /// Ends everything that it runs.
    pub fn stop(&self) -> anyhow::Result<()> {
        stop(&self.dir)
    }
}

impl Drop for FakeSlurm {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Makes a cluster, its commands and its controller.
fn make(dir: &Path, plan: &Plan, owner: Option<ProcessId>, program: &Path) -> anyhow::Result<Dir> {
    let root = std::path::absolute(dir)?;
    let dir = Dir::at(&root);
    let cluster = plan.cluster(owner);
    fs::create_dir_all(root.join("bin"))?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
    for command in COMMANDS {
        let path = root.join("bin").join(command);
        let text = format!(
            "#!/bin/sh\n# A fake for tests, not Slurm.\nexec {} --state {} {command} \"$@\"\n",
            quoted(program),
            quoted(&root)
        );
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    dir.create(&cluster, &plan.settings)?;
    Ok(dir)
}

fn stop(dir: &Dir) -> anyhow::Result<()> {
    let mut locked = dir.lock()?;
    locked.cluster.stopped = true;
    let jobs: Vec<u32> = locked.cluster.jobs.keys().copied().collect();
    locked.save()?;
    // The controller does the same; it may have been killed.
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let left: Vec<ProcessId> = jobs.iter().flat_map(|job| processes::living(dir, *job, |_, _| true)).collect();
        let controller = dir.controller().filter(process::is_alive);
        if left.is_empty() && controller.is_none() {
            return Ok(());
        }
        for process in left {
            processes::signal(process, 9);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    anyhow::bail!("processes of {} do not end", dir.root().display())
}

/// `fake-slurm`, built beside the test that runs.
fn program_beside() -> anyhow::Result<PathBuf> {
    crate::cluster::program(PROGRAM)
}

/// This very program, when it is `fake-slurm`.
fn program() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?)
}

/// What the program does. It is called by the name of a command, or is given that name:
/// `fake-slurm [--state DIR] COMMAND ARGUMENTS...`, or `fake-slurm new|stop DIR`.
pub fn main(mut args: Vec<String>) -> ExitCode {
    let called =
        args.first().map(|name| Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned());
    args.drain(..args.len().min(1));
    let mut state = std::env::var_os("FAKE_SLURM_DIR").map(PathBuf::from);
    if args.first().is_some_and(|first| first == "--state") && args.len() >= 2 {
        state = Some(PathBuf::from(&args[1]));
        args.drain(..2);
    }
    let command = match called {
        Some(called) if COMMANDS.contains(&called.as_str()) => called,
        _ if args.is_empty() => "--help".to_owned(),
        _ => args.remove(0),
    };
    match dispatch(&command, state, &args) {
        Ok(answer) => say(&answer),
        Err(error) => say(&Answer::fail(70, format!("{PROGRAM}: {error:#}\n"))),
    }
}

fn say(answer: &Answer) -> ExitCode {
    // Whoever asked may be gone.
    let _ = std::io::stdout().write_all(answer.stdout.as_bytes());
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().write_all(answer.stderr.as_bytes());
    ExitCode::from(answer.status)
}

fn dispatch(command: &str, state: Option<PathBuf>, args: &[String]) -> anyhow::Result<Answer> {
    match (command, args) {
        ("--version", _) => return Ok(Answer::says(format!("{PROGRAM}: a fake for tests, not Slurm\n"))),
        ("--help", _) => return Ok(Answer::says(HELP)),
        ("new", [dir, rest @ ..]) => {
            let number = |at: usize| rest.get(at).map(|text| text.parse::<f64>()).transpose();
            let plan =
                Plan { nodes: number(0)?.unwrap_or(4.0) as usize, speed: number(1)?.unwrap_or(1.0), ..Plan::default() };
            let made = make(Path::new(dir), &plan, None, &program()?)?;
            return Ok(Answer::says(format!("PATH={}:$PATH\n", made.root().join("bin").display())));
        }
        ("stop", [dir]) => return stop(&Dir::at(dir)).map(|()| Answer::default()),
        _ => {}
    }
    let dir = Dir::at(state.context("say where its state is: --state DIR, or FAKE_SLURM_DIR")?);
    match (command, args) {
        ("controller", []) => controller::run(&dir).map(|()| Answer::default()),
        ("keeper", [job, run]) => launch::keep(&dir, job.parse()?, run.parse()?).map(|()| Answer::default()),
        ("exec", args) => Ok(Answer { status: launch::exec(&dir, args)?, ..Answer::default() }),
        ("node", [name, truth]) => {
            let truth = match truth.as_str() {
                "fine" => Truth::Fine,
                "lost" => Truth::Lost,
                "cut" => Truth::Cut,
                other => anyhow::bail!("a node is fine, lost or cut, not {other}"),
            };
            let fake = std::mem::ManuallyDrop::new(FakeSlurm { dir });
            fake.node(name, truth).map(|()| Answer::default())
        }
        ("unreachable", [how]) if how == "on" || how == "off" => {
            let mut locked = dir.lock()?;
            locked.settings.faults.retain(|fault| !matches!(fault.kind, Kind::Unreachable { .. }));
            if how == "on" {
                let kind = Kind::Unreachable { after_ms: 0 };
                locked.settings.faults.push(Fault { command: "*".to_owned(), kind, after: 0, times: None });
            }
            locked.save_settings().map(|()| Answer::default())
        }
        ("begin-now", [job]) => {
            let mut locked = dir.lock()?;
            let job = locked.cluster.jobs.get_mut(&job.parse()?).context("no such job")?;
            job.eligible = job.submitted;
            locked.save().map(|()| Answer::default())
        }
        ("accounting", [how]) => {
            let mut locked = dir.lock()?;
            locked.settings.accounting = match how.as_str() {
                "on" => Accounting::On { lag_s: 0 },
                "off" => Accounting::Off,
                "unreachable" => Accounting::Unreachable,
                other => anyhow::bail!("accounting is on, off or unreachable, not {other}"),
            };
            locked.save_settings().map(|()| Answer::default())
        }
        (command, args) if COMMANDS.contains(&command) => call(&dir, command, args),
        _ => anyhow::bail!("no command {command:?}; it answers as {}", COMMANDS.join(", ")),
    }
}

const HELP: &str = "\
A fake for tests, not Slurm. Answers as sbatch, squeue, scancel, sacct, scontrol, sinfo and srun.

fake-slurm new DIR [NODES [SPEED]]    makes a cluster; SPEED: its seconds per real one
fake-slurm stop DIR                   ends what it runs
fake-slurm --state DIR COMMAND ...    what DIR/bin/COMMAND ... does
fake-slurm --state DIR node NAME lost|cut|fine
fake-slurm --state DIR begin-now JOB  a requeued job need not wait
fake-slurm --state DIR unreachable on|off
fake-slurm --state DIR accounting on|off|unreachable
DIR/settings.json                     how it answers, and what goes wrong
DIR/calls.log                         every call
";

/// One call of a Slurm command.
fn call(dir: &Dir, command: &str, args: &[String]) -> anyhow::Result<Answer> {
    let mut locked = dir.lock()?;
    let fault = locked.settings.fault(command);
    if !locked.settings.faults.is_empty() {
        // Also a call that passed unharmed was counted.
        locked.save_settings()?;
    }
    let name = fault.as_ref().map(|fault| format!("{fault:?}"));
    dir.note(&Call { at_ms: controller::real_now(), command: command.to_owned(), args: args.to_vec(), fault: name })?;
    let (latency, dialect) = (locked.settings.latency_ms(command), locked.settings.dialect);
    let slow = if let Some(Kind::Slow { ms } | Kind::Unreachable { after_ms: ms }) = fault { ms } else { 0 };
    // Nobody else waits for this one.
    drop(locked);
    std::thread::sleep(Duration::from_millis(latency + slow));
    match &fault {
        Some(Kind::Unreachable { .. }) => return Ok(unreachable(dialect, command, args)),
        Some(Kind::Timeout { done: false }) => return Ok(timeout(command)),
        Some(Kind::Dies { done: false }) => die(),
        Some(Kind::Says { stdout, stderr, status }) => {
            return Ok(Answer { stdout: stdout.clone(), stderr: stderr.clone(), status: *status });
        }
        _ => {}
    }
    let mut answer = answered(dir, command, args, fault == Some(Kind::DiesWriting))?;
    match fault {
        Some(Kind::Timeout { .. }) => return Ok(timeout(command)),
        Some(Kind::Dies { .. }) => die(),
        Some(Kind::Truncated { bytes }) => {
            let cut = (0..=bytes.min(answer.stdout.len())).rev().find(|at| answer.stdout.is_char_boundary(*at));
            answer.stdout.truncate(cut.unwrap_or(0));
        }
        Some(Kind::Banner { text }) => answer.stdout.insert_str(0, &text),
        _ => {}
    }
    Ok(answer)
}

fn answered(dir: &Dir, command: &str, args: &[String], dies_writing: bool) -> anyhow::Result<Answer> {
    if command == "srun" {
        return launch::srun(dir, args);
    }
    let mut locked = dir.lock()?;
    locked.dies_writing = dies_writing;
    controller::ensure(dir, &locked.cluster)?;
    let now = locked.cluster.clock.at(controller::real_now());
    let mut on = Context { dir, cluster: &mut locked.cluster, settings: &locked.settings, now };
    let changes = matches!(command, "sbatch" | "scancel" | "scontrol");
    let answer = match command {
        "sbatch" => sbatch::run(&mut on, args)?,
        "scancel" => scancel::run(&mut on, args),
        "scontrol" => scontrol::run(&mut on, args),
        "squeue" => squeue::run(&on, args),
        "sacct" => sacct::run(&on, args),
        "sinfo" => sinfo::run(&on, args),
        other => anyhow::bail!("no command {other}"),
    };
    if changes {
        locked.save()?;
    }
    Ok(answer)
}

fn die() -> ! {
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::abort()
}

fn unreachable(dialect: Dialect, command: &str, args: &[String]) -> Answer {
    let why = "Unable to contact slurm controller (connect failure)";
    let text = match command {
        "sbatch" => format!("sbatch: error: Batch job submission failed: {why}\n"),
        "scancel" => {
            let job = args.last().map_or("", String::as_str);
            return Answer::fail(8, format!("scancel: error: Kill job error on job id {job}: {why}\n"));
        }
        "sinfo" => format!("slurm_load_partitions: {why}\n"),
        "scontrol" if args.first().is_some_and(|first| first == "ping") => {
            let host = HOST;
            return Answer {
                stdout: format!("Slurmctld(primary) at {host} is DOWN\n"),
                stderr: String::new(),
                status: u8::from(dialect > Dialect::V20),
            };
        }
        _ => format!("slurm_load_jobs error: {why}\n"),
    };
    Answer::fail(1, text)
}

fn timeout(command: &str) -> Answer {
    let why = "Socket timed out on send/recv operation";
    let text = match command {
        "sbatch" => format!("sbatch: error: Batch job submission failed: {why}\n"),
        "scancel" => format!("scancel: error: {why}\n"),
        "sinfo" => format!("slurm_load_partitions: {why}\n"),
        _ => format!("slurm_load_jobs error: {why}\n"),
    };
    Answer::fail(1, text)
}
