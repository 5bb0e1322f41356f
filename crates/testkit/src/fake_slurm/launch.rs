//! What runs on the nodes: the keeper of a run (slurmstepd), the step that a process takes before it becomes a program of the
//! job, and `srun`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use drover_service::process::ProcessId;
use rustix::process::{Signal, kill_process_group, setsid};

use super::answer::Answer;
use super::controller::own_command;
use super::model::{Cluster, Job, Phase, Run, Truth};
use super::options::{Opt, flag, may, parse, with};
use super::settings::Dialect;
use super::store::{Dir, Recorded};
use super::text;

/// Waits for the script of a run, and writes down how it ended. One per run, whoever starts another.
pub(crate) fn keep(dir: &Dir, id: u32, number: u32) -> anyhow::Result<()> {
    let _ = setsid();
    let cluster = dir.read()?;
    let job = cluster.jobs.get(&id).context("no such job")?;
    let Some(run) = running(job, number) else { return Ok(()) };
    if !dir.claim_keeper(id, number)? {
        return Ok(());
    }
    let end = match script(dir, &cluster, job, run) {
        Ok(status) => (status.code().unwrap_or(0), status.signal().unwrap_or(0)),
        // What Slurm shows of a job whose output file cannot be opened.
        Err(_) => (0, 53),
    };
    dir.set_script_end(id, number, end)
}

fn running(job: &Job, number: u32) -> Option<&Run> {
    match &job.phase {
        Phase::Running(run) if run.number == number => Some(run),
        _ => None,
    }
}

fn script(dir: &Dir, cluster: &Cluster, job: &Job, run: &Run) -> anyhow::Result<ExitStatus> {
    let node = run.nodes.first().context("a run without nodes")?;
    let directory = Path::new(&job.asked.directory);
    let directory = if directory.is_dir() { directory } else { Path::new("/tmp") };
    let output = output_path(job, job.asked.output.as_deref().unwrap_or("slurm-%j.out"), directory, node);
    let append = job.asked.append || job.restarts > 0;
    let open = |path: &Path| {
        let mut options = OpenOptions::new();
        options.create(true).append(append).write(true).truncate(!append);
        options.open(path).with_context(|| format!("failed to open {}", path.display()))
    };
    let stdout = open(&output)?;
    let stderr = match &job.asked.error {
        Some(path) => open(&output_path(job, path, directory, node))?,
        None => stdout.try_clone()?,
    };
    let mut command = own_command(dir)?;
    command.arg("exec").arg(job.id.to_string()).arg(run.number.to_string()).arg(node).arg("batch");
    command.arg(dir.job(job.id).join("script"));
    command.env_clear().envs(environment(dir, cluster, job, run)?);
    command.current_dir(directory).stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0);
    Ok(command.spawn()?.wait()?)
}

/// A file name with its patterns filled in.
pub(crate) fn output_path(job: &Job, pattern: &str, directory: &Path, node: &str) -> PathBuf {
    let mut name = String::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            name.push(c);
            continue;
        }
        let (mut width, mut number) = (0, None);
        while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
            width = width * 10 + digit as usize;
            chars.next();
        }
        match chars.next() {
            Some('j' | 'A' | 'J') => number = Some(job.id),
            Some('x') => name.push_str(&job.asked.name),
            Some('u') => name.push_str(&job.asked.user),
            Some('N') => name.push_str(node),
            Some('n' | 't' | 's') => number = Some(0),
            Some('%') | None => name.push('%'),
            Some(other) => name.extend(['%', other]),
        }
        let digits = number.map(|number| format!("{number:0width$}"));
        name.extend(digits);
    }
    directory.join(name)
}

/// The environment of a job's script.
fn environment(dir: &Dir, cluster: &Cluster, job: &Job, run: &Run) -> anyhow::Result<BTreeMap<OsString, OsString>> {
    let mut variables: BTreeMap<OsString, OsString> = BTreeMap::new();
    let stored = fs::read(dir.job(job.id).join("environment")).unwrap_or_default();
    for entry in stored.split(|byte| *byte == 0) {
        let text = String::from_utf8_lossy(entry).into_owned();
        if let Some((name, value)) = text.split_once('=') {
            variables.insert(name.into(), value.into());
        }
    }
    let bin = dir.root().join("bin");
    let path =
        variables.get(std::ffi::OsStr::new("PATH")).cloned().unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let mut dirs = vec![bin.clone()];
    dirs.extend(std::env::split_paths(&path).filter(|dir| *dir != bin));
    variables.insert("PATH".into(), std::env::join_paths(dirs)?);
    variables.insert("FAKE_SLURM_DIR".into(), dir.root().into());
    let nodes = text::compress(&run.nodes);
    let count = run.nodes.len();
    let tasks = job.tasks();
    let mut set = |name: &str, value: String| {
        variables.insert(name.into(), value.into());
    };
    for name in ["SLURM_JOB_ID", "SLURM_JOBID"] {
        set(name, job.id.to_string());
    }
    for name in ["SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
        set(name, nodes.clone());
    }
    for name in ["SLURM_JOB_NUM_NODES", "SLURM_NNODES"] {
        set(name, count.to_string());
    }
    if job.asked.tasks.is_some() || job.asked.tasks_per_node.is_some() {
        for name in ["SLURM_NTASKS", "SLURM_NPROCS"] {
            set(name, tasks.to_string());
        }
    }
    if let Some(each) = job.asked.tasks_per_node {
        set("SLURM_NTASKS_PER_NODE", each.to_string());
    }
    let each = u64::from(tasks).div_ceil(count.max(1) as u64);
    set("SLURM_TASKS_PER_NODE", if count > 1 { format!("{each}(x{count})") } else { each.to_string() });
    set("SLURM_JOB_CPUS_PER_NODE", if count > 1 { format!("8(x{count})") } else { "8".to_owned() });
    set("SLURM_CPUS_ON_NODE", "8".to_owned());
    set("SLURM_JOB_NAME", job.asked.name.clone());
    set("SLURM_JOB_PARTITION", job.asked.partition.clone());
    set("SLURM_JOB_ACCOUNT", job.asked.account.clone());
    set("SLURM_JOB_QOS", job.asked.qos.clone());
    set("SLURM_JOB_USER", job.asked.user.clone());
    set("SLURM_JOB_UID", job.asked.uid.to_string());
    set("SLURM_JOB_GID", job.asked.gid.to_string());
    set("SLURM_SUBMIT_DIR", job.asked.directory.clone());
    set("SLURM_SUBMIT_HOST", job.asked.from.0.clone());
    set("SLURM_CLUSTER_NAME", super::CLUSTER.to_owned());
    if dir.settings()?.dialect < Dialect::V24 {
        set("SLURM_WORKING_CLUSTER", format!("{}:{}:6817:9728:109", super::CLUSTER, job.asked.from.0));
    }
    for name in ["SLURM_GTIDS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_PROCID"] {
        set(name, "0".to_owned());
    }
    set("SLURMD_NODENAME", run.nodes.first().cloned().unwrap_or_default());
    set("SLURM_TOPOLOGY_ADDR", run.nodes.first().cloned().unwrap_or_default());
    set("SLURM_TOPOLOGY_ADDR_PATTERN", "node".to_owned());
    if job.restarts > 0 {
        set("SLURM_RESTART_COUNT", job.restarts.to_string());
    }
    if cluster.partition(&job.asked.partition).is_none() {
        variables.remove(std::ffi::OsStr::new("SLURM_JOB_PARTITION"));
    }
    Ok(variables)
}

/// Goes on record as a process of a job, and becomes the program that it is to run. Returns only when that cannot be.
pub(crate) fn exec(dir: &Dir, args: &[String]) -> anyhow::Result<u8> {
    let [id, number, node, step, program, rest @ ..] = args else { anyhow::bail!("exec JOB RUN NODE STEP PROGRAM...") };
    let (id, number): (u32, u32) = (id.parse()?, number.parse()?);
    let recorded = Recorded { process: ProcessId::current(), node: node.clone(), step: step.parse().ok() };
    dir.record(id, number, &recorded)?;
    // On record first, then a look whether the run still goes on: who ends it first says so and then looks for records.
    let cluster = dir.read()?;
    let goes_on = !cluster.stopped && cluster.jobs.get(&id).is_some_and(|job| running(job, number).is_some());
    let there = cluster.node(node).is_some_and(|node| node.truth != Truth::Lost);
    if !goes_on || !there {
        return Ok(1);
    }
    let error = Command::new(program).args(rest).exec();
    complain(&format!("slurmstepd: error: execve(): {program}: {}", strip(&error)));
    Ok(2)
}

/// An error of the system without Rust's addition.
fn strip(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn complain(line: &str) {
    // Nobody is left to be told when standard error is gone.
    let _ = writeln!(std::io::stderr(), "{line}");
}

const SRUN: &[Opt] = &[
    with("nodes", Some('N')),
    with("ntasks", Some('n')),
    with("ntasks-per-node", None),
    with("cpus-per-task", Some('c')),
    with("nodelist", Some('w')),
    with("job-name", Some('J')),
    with("chdir", Some('D')),
    with("output", Some('o')),
    with("error", Some('e')),
    with("input", Some('i')),
    with("export", None),
    with("mpi", None),
    with("cpu-bind", None),
    with("distribution", Some('m')),
    with("open-mode", None),
    with("wait", Some('W')),
    with("time", Some('t')),
    with("mem", None),
    with("gres", None),
    with("gpus-per-node", None),
    may("kill-on-bad-exit", Some('K')),
    may("exclusive", None),
    flag("label", Some('l')),
    flag("unbuffered", Some('u')),
    flag("overlap", None),
    flag("exact", None),
    flag("no-kill", Some('k')),
    flag("quiet", Some('Q')),
    flag("verbose", Some('v')),
    flag("version", Some('V')),
];

struct Task {
    number: u32,
    node: String,
    child: Child,
    end: Option<ExitStatus>,
}

/// `srun` inside a job: one process per task, on the nodes of the job in turn.
pub(crate) fn srun(dir: &Dir, args: &[String]) -> anyhow::Result<Answer> {
    let asked = match parse("srun", SRUN, args, false) {
        Ok(asked) => asked,
        Err(error) => return Ok(Answer::fail(1, format!("{error}\nTry \"srun --help\" for more information\n"))),
    };
    if asked.has("version") {
        let settings = dir.lock()?.settings.clone();
        return Ok(Answer::says(format!("{}\n", settings.dialect.version_line())));
    }
    let [program, rest @ ..] = asked.rest.as_slice() else {
        return Ok(Answer::fail(1, "srun: fatal: No command given to execute.\n"));
    };
    let id: Option<u32> = std::env::var("SLURM_JOB_ID").ok().and_then(|id| id.parse().ok());
    let mut locked = dir.lock()?;
    let Some(job) = id.and_then(|id| locked.cluster.jobs.get_mut(&id)) else {
        return Ok(Answer::fail(1, "srun: fake-slurm starts steps inside of jobs only\n"));
    };
    let Phase::Running(run) = job.phase.clone() else {
        return Ok(Answer::fail(
            1,
            "srun: error: Unable to create step for job: Job/step already completing or completed\n",
        ));
    };
    let nodes = match asked.get("nodes").map(str::parse::<usize>) {
        None => run.nodes.len(),
        Some(Ok(nodes)) if (1..=run.nodes.len()).contains(&nodes) => nodes,
        Some(_) => {
            return Ok(Answer::fail(
                1,
                "srun: error: Unable to create step for job: More processors requested than permitted\n",
            ));
        }
    };
    let each = asked.get("ntasks-per-node").and_then(|each| each.parse::<u32>().ok()).or(job.asked.tasks_per_node);
    let tasks = match (asked.get("ntasks").and_then(|tasks| tasks.parse().ok()), each) {
        (Some(tasks), _) => tasks,
        (None, Some(each)) => each * nodes as u32,
        (None, None) => job.asked.tasks.unwrap_or(1).max(nodes as u32),
    };
    let step = job.steps.len();
    job.steps.push(Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned());
    let job = job.clone();
    locked.save()?;

    let mut running = Vec::new();
    for number in 0..tasks {
        // In blocks, as Slurm does when tasks and nodes are equal in number.
        let at = number as usize * nodes / tasks.max(1) as usize;
        let local = (0..number).filter(|other| *other as usize * nodes / tasks.max(1) as usize == at).count();
        let node = run.nodes[at].clone();
        let mut command = own_command(dir)?;
        command.arg("exec").arg(job.id.to_string()).arg(run.number.to_string()).arg(&node).arg(step.to_string());
        command.arg(program).args(rest).process_group(0);
        if let Some(directory) = asked.get("chdir") {
            command.current_dir(directory);
        }
        for (name, value) in [
            ("SLURM_PROCID", number.to_string()),
            ("SLURM_LOCALID", local.to_string()),
            ("SLURM_NODEID", at.to_string()),
            ("SLURMD_NODENAME", node.clone()),
            ("SLURM_STEP_ID", step.to_string()),
            ("SLURM_STEPID", step.to_string()),
            ("SLURM_STEP_NODELIST", text::compress(&run.nodes[..nodes])),
            ("SLURM_STEP_NUM_NODES", nodes.to_string()),
            ("SLURM_STEP_NUM_TASKS", tasks.to_string()),
            ("SLURM_NTASKS", tasks.to_string()),
            ("SLURM_NPROCS", tasks.to_string()),
        ] {
            command.env(name, value);
        }
        running.push(Task { number, node, child: command.spawn()?, end: None });
    }
    let strict = asked.get("kill-on-bad-exit").is_some_and(|value| value != "0");
    wait_for(dir, &job, &run, &mut running, strict)
}

fn wait_for(dir: &Dir, job: &Job, run: &Run, tasks: &mut [Task], strict: bool) -> anyhow::Result<Answer> {
    let mut worst = 0;
    let mut errors = String::new();
    loop {
        let mut open = 0;
        let mut failed = false;
        for task in &mut *tasks {
            if task.end.is_some() {
                continue;
            }
            let Some(status) = task.child.try_wait()? else {
                open += 1;
                continue;
            };
            // Nobody hears of the end of a task on a node that does not answer.
            if !heard(dir, job, run, &task.node) {
                open += 1;
                continue;
            }
            task.end = Some(status);
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            worst = worst.max(code);
            if code != 0 {
                failed = true;
                let how = match status.signal() {
                    Some(15) => "Terminated".to_owned(),
                    Some(9) => "Killed".to_owned(),
                    Some(signal) => format!("Signal {signal}"),
                    None => format!("Exited with exit code {code}"),
                };
                errors.extend([format!("srun: error: {}: task {}: {how}\n", task.node, task.number)]);
            }
        }
        if failed && strict {
            for task in tasks.iter().filter(|task| task.end.is_none()) {
                let group = i32::try_from(task.child.id()).ok().and_then(rustix::process::Pid::from_raw);
                // Not waited for yet, so that the number is still its own.
                let _ = group.map(|group| kill_process_group(group, Signal::KILL));
            }
        }
        if open == 0 {
            return Ok(Answer { stdout: String::new(), stderr: errors, status: u8::try_from(worst).unwrap_or(1) });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn heard(dir: &Dir, job: &Job, run: &Run, node: &str) -> bool {
    let Ok(cluster) = dir.read() else { return true };
    let goes_on = cluster.jobs.get(&job.id).is_some_and(|job| running(job, run.number).is_some());
    !goes_on || cluster.node(node).is_none_or(|node| node.truth == Truth::Fine)
}
