//! Whether a cluster is as drover needs it: what `drover doctor --cluster` looks at.
//!
//! Each look is one command on the login host, or one short job on a compute host. What cannot be looked at because of an
//! earlier finding is left out rather than guessed.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use drover_ssh::{Command, Exit, Output, Remote, RemotePath, Source, SshError, Upload};
use drover_types::{ErrorCode, Failure};

use super::install::{self, Program};
use super::{ClusterSettings, SiteReport};

/// Slurm is asked for so long; a controller that is down keeps its clients waiting for about 15 s.
const ASKING: Duration = Duration::from_secs(40);
/// A login may take so long; a person waits for this answer.
const LOGIN: Duration = Duration::from_secs(15);
/// How long a job for one look may wait for a node, in seconds, as `srun` wants it.
const IMMEDIATE: &str = "--immediate=20";
/// A node may take its time to start a step.
const JOB: Duration = Duration::from_secs(90);
/// The oldest Slurm whose answers were looked at.
const OLDEST: (u32, u32) = (20, 11);

/// What to do about a directory that takes nothing.
const WRITABLE: &str = "workspace_root must be a directory of yours that is writable there and has room";

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// It is as it should be.
    pub ok: bool,
    /// When it is not: launches work all the same, or some of them do.
    pub minor: bool,
    /// What was seen.
    pub detail: String,
    /// What to do.
    pub hint: String,
}

impl Finding {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, ok: true, minor: false, detail: detail.into(), hint: String::new() }
    }

    fn wrong(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, ok: false, minor: false, detail: detail.into(), hint: hint.into() }
    }

    fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { minor: true, ..Self::wrong(name, detail, hint) }
    }

    fn of(name: &'static str, failure: Failure) -> Self {
        Self::wrong(name, failure.message, failure.hint)
    }
}

/// What still counts as well.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    /// How far a clock of the cluster may be off ours.
    pub skew: Duration,
    /// How long a record may take to be durable on the shared file system.
    pub write: Duration,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { skew: Duration::from_secs(5), write: Duration::from_millis(500) }
    }
}

/// What is to be looked at beside the cluster itself.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// The partition of launches that name none.
    pub partition: Option<String>,
    /// Whether workers will run codex.
    pub codex: bool,
    /// Where codex is configured to be.
    pub codex_bin: Option<String>,
    /// Where its settings and credentials are configured to be; unset: where workers find them by themselves.
    pub codex_home: Option<String>,
    /// Install codex in this version where workers need it and have none.
    pub install_codex: Option<String>,
    /// What counts as well.
    pub thresholds: Thresholds,
}

/// Looks at everything, in order.
pub async fn check(settings: &ClusterSettings, wishes: &Wishes) -> Vec<Finding> {
    let program = {
        let path = settings.program.clone();
        tokio::task::spawn_blocking(move || Program::read(&path)).await
    };
    let program = match program.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        Ok(program) => program,
        Err(error) => {
            let detail = format!("{} cannot be read: {error}", settings.program.display());
            return vec![Finding::wrong(
                "cluster program",
                detail,
                "name the drover to place with cluster.slurm.program",
            )];
        }
    };
    let remote = match settings.connect(&program.place(&settings.base)) {
        Ok(remote) => remote,
        Err(error) => return vec![Finding::of("cluster login", settings.of_ssh(&error))],
    };
    let look = Look { settings, remote, wishes };
    let mut findings = vec![look.login().await];
    if !findings[0].ok {
        return findings;
    }
    let slurm = look.version().await;
    let there = slurm.ok || slurm.minor;
    findings.push(slurm);
    let mut jobs = false;
    if there {
        let squeue = look.squeue().await;
        let answers = squeue.ok;
        findings.push(squeue);
        if answers {
            let partition = look.partition().await;
            jobs = partition.ok;
            findings.push(partition);
            if jobs {
                let signal = look.signal().await;
                jobs = signal.ok;
                findings.push(signal);
            }
        }
    }
    look.files(&program, jobs, &mut findings).await;
    findings
}

struct Look<'a> {
    settings: &'a ClusterSettings,
    remote: Arc<dyn Remote>,
    wishes: &'a Wishes,
}

impl Look<'_> {
    async fn ask(&self, command: Command) -> Result<Output, SshError> {
        self.remote.run(command.deadline(ASKING)).await
    }

    /// Nobody is there to answer questions when a swarm is launched at night.
    async fn login(&self) -> Finding {
        const NAME: &str = "cluster login";
        match self.remote.run(Command::new("true").deadline(LOGIN)).await {
            Ok(output) if output.success() => {
                Finding::ok(NAME, format!("{} works without questions", self.settings.way))
            }
            Ok(output) => {
                let detail = format!("`true` ended with {}: {}", output.exit, output.complaint());
                Finding::wrong(NAME, detail, "the account cannot run commands there")
            }
            Err(error) => Finding::of(NAME, self.settings.of_ssh(&error)),
        }
    }

    async fn version(&self) -> Finding {
        const NAME: &str = "cluster slurm";
        let hint = "sbatch must be on the PATH of a command that ssh runs (`ssh HOST which sbatch`); \
                    shells read other files then than at a login";
        let output = match self.ask(Command::new("sbatch").arg("--version")).await {
            Ok(output) if output.success() => output,
            Ok(output) if matches!(output.exit, Exit::Code(126 | 127)) => {
                return Finding::wrong(NAME, format!("no sbatch: {}", output.complaint()), hint);
            }
            Ok(output) => {
                let detail = format!("sbatch does not work: {}: {}", output.exit, output.complaint());
                return Finding::wrong(
                    NAME,
                    detail,
                    "try `sbatch --version` on the login host; its site configures Slurm there",
                );
            }
            Err(error) => return Finding::of(NAME, self.settings.of_ssh(&error)),
        };
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match version_of(&text) {
            Some(version) if version >= OLDEST => Finding::ok(NAME, text),
            Some(_) => {
                let detail = format!("{text} is older than {}.{:02}", OLDEST.0, OLDEST.1);
                Finding::wrong(NAME, detail, "ask the site for a later Slurm")
            }
            None => Finding::warning(NAME, format!("{text:?} tells no version"), "launch something small first"),
        }
    }

    async fn squeue(&self) -> Finding {
        const NAME: &str = "cluster squeue";
        match self.ask(Command::new("squeue").args(["--me", "--noheader", "--format=%i"])).await {
            Ok(output) if output.success() => {
                let jobs =
                    String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.trim().is_empty()).count();
                Finding::ok(NAME, format!("answers; {jobs} of your jobs are in the queue"))
            }
            Ok(output) => {
                let hint = "the state of jobs is known only while squeue works on the login host; when its controller is down, wait";
                Finding::wrong(NAME, format!("{}: {}", output.exit, output.complaint()), hint)
            }
            Err(error) => Finding::of(NAME, self.settings.of_ssh(&error)),
        }
    }

    async fn partition(&self) -> Finding {
        const NAME: &str = "cluster partition";
        let Some(partition) = &self.wishes.partition else {
            return Finding::ok(NAME, "none is configured: launches have to name one (--partition)");
        };
        let command = Command::new("sinfo").arg("--noheader").arg("--format=%P|%a|%l|%D|%t");
        let output = match self.ask(command).await {
            Ok(output) if output.success() => output,
            Ok(output) => return Finding::wrong(NAME, output.complaint(), "sinfo must work on the login host"),
            Err(error) => return Finding::of(NAME, self.settings.of_ssh(&error)),
        };
        judge_partition(partition, &String::from_utf8_lossy(&output.stdout))
    }

    /// Without a word before the end a worker could not hand its last records over.
    async fn signal(&self) -> Finding {
        const NAME: &str = "cluster --signal";
        let mut command = Command::new("sbatch").args([
            "--test-only",
            "--signal=TERM@60",
            "--nodes=1",
            "--ntasks-per-node=1",
            "--time=00:05:00",
            "--wrap=true",
        ]);
        if let Some(partition) = &self.wishes.partition {
            command = command.arg(format!("--partition={partition}"));
        }
        match self.ask(command).await {
            Ok(output) if output.success() => Finding::ok(NAME, "--signal=TERM@60 is accepted"),
            Ok(output) => {
                let hint = "a job like ours would be refused; the words of sbatch say why (an account, a time limit, a policy of the site)";
                Finding::wrong(NAME, format!("sbatch --test-only: {}", output.complaint()), hint)
            }
            Err(error) => Finding::of(NAME, self.settings.of_ssh(&error)),
        }
    }

    /// The program, the shared directory and the hosts, seen from both sides.
    async fn files(&self, program: &Program, jobs: bool, findings: &mut Vec<Finding>) {
        let placed = match install::place(&*self.remote, self.settings, program).await {
            Ok(placed) => placed,
            Err(failure) if failure.code == ErrorCode::StoreUnavailable => {
                let finding = Finding::wrong("cluster write", failure.message, WRITABLE);
                return findings.push(finding);
            }
            Err(failure) => return findings.push(Finding::of("cluster program", failure)),
        };
        let (probe, begun) = (self.probe(&placed.path), now());
        let answer = install::run(&*self.remote, self.settings, probe).await;
        let report = match answer.and_then(|answer| self.report(&answer)) {
            Ok(report) => report,
            Err(failure) => return findings.push(Finding::of("cluster program", failure)),
        };
        let how = if placed.sent { format!("placed in {:.1?}", placed.took) } else { "in place".to_owned() };
        findings.push(if report.version == drover_types::VERSION {
            Finding::ok("cluster program", format!("{}, {how}, runs on {}", placed.path, report.host))
        } else {
            let (theirs, ours) = (&report.version, drover_types::VERSION);
            let detail = format!("{}, {how}, is of version {theirs}, this one is {ours}", placed.path);
            Finding::warning(
                "cluster program",
                detail,
                "build the file that cluster.slurm.program names anew, from this version",
            )
        });
        let login = judge(&report, "login host", begun, now(), &self.wishes.thresholds);
        let writable = report.write_us.is_some();
        findings.extend(login);
        if jobs && writable {
            self.compute(&placed.path, findings).await;
        }
    }

    fn probe(&self, program: &str) -> Command {
        Command::new(program).args(["site", "probe", "--json", "--dir", &self.settings.base]).deadline(ASKING)
    }

    fn report(&self, answer: &[u8]) -> Result<SiteReport, Failure> {
        // A prologue of the site may print something first.
        let text = String::from_utf8_lossy(answer);
        let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
        serde_json::from_str(line)
            .map_err(|error| self.settings.unavailable(format!("what our program answered makes no sense: {error}")))
    }

    /// One short job: does a node see what the login host writes, what time is it there, is codex there?
    async fn compute(&self, program: &str, findings: &mut Vec<Finding>) {
        let (report, begun, ended) = match self.look_from_a_node(program).await {
            Ok(seen) => seen,
            Err(finding) => return findings.push(finding),
        };
        findings.push(judge_sight(&self.settings.base, &report));
        // Waiting for the node is part of the time between question and answer; what is off by less cannot be told.
        findings.extend(judge(&report, "compute host", begun, ended, &self.wishes.thresholds));
        if self.wishes.codex {
            findings.push(judge_codex(&report));
            self.install_codex(program, &report, findings).await;
        }
    }

    /// Where codex is missing and wanted, it is installed, and looked for again.
    async fn install_codex(&self, program: &str, report: &SiteReport, findings: &mut Vec<Finding>) {
        const NAME: &str = "cluster codex";
        let Some(version) = &self.wishes.install_codex else { return };
        // One that is there and has no credentials is not mended by another one.
        if report.codex_found || self.wishes.codex_bin.is_some() {
            return;
        }
        findings.pop();
        match super::codex::provide(&*self.remote, self.settings, program, version).await {
            Ok(installed) => {
                let how = if installed.installed { "installed" } else { "was installed" };
                let detail = format!("codex {} {how} at {}", installed.version, installed.path);
                findings.push(Finding::ok(NAME, detail));
                if let Ok((report, ..)) = self.look_from_a_node(program).await {
                    findings.push(judge_codex(&report));
                }
            }
            Err(failure) => findings.push(Finding { minor: true, ..Finding::of(NAME, failure) }),
        }
    }

    /// What a compute host is like, and between which moments it was looked at.
    async fn look_from_a_node(&self, program: &str) -> Result<(SiteReport, Duration, Duration), Finding> {
        const NAME: &str = "shared directory";
        let mark = format!(".drover-seen-{:016x}", now().as_nanos() as u64);
        let path = format!("{}/{mark}", self.settings.base);
        let upload =
            RemotePath::new(path.clone()).map(|to| Upload::new(Source::Bytes(Bytes::from_static(b"seen\n")), to));
        let written = match upload {
            Ok(upload) => self.remote.upload(upload).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            return Err(Finding::of(NAME, self.settings.of_ssh(&error)));
        }
        let mut job = Command::new("srun").args(["--quiet", "--nodes=1", "--ntasks=1", "--time=00:02:00", IMMEDIATE]);
        if let Some(partition) = &self.wishes.partition {
            job = job.arg(format!("--partition={partition}"));
        }
        job = job.args([program, "site", "probe", "--json", "--dir", &self.settings.base, "--sees", &mark]);
        if self.wishes.codex {
            job = job.arg("--codex");
            if let Some(bin) = &self.wishes.codex_bin {
                job = job.arg("--codex-bin").arg(bin);
            }
            if let Some(home) = &self.wishes.codex_home {
                job = job.arg("--codex-home").arg(home);
            }
        }
        let begun = now();
        let ran = self.remote.run(job.deadline(JOB)).await;
        let ended = now();
        let _ = self.ask(Command::new("rm").args(["-f", "--", &path])).await;
        let output = match ran {
            Ok(output) => output,
            Err(error) => return Err(Finding::of(NAME, self.settings.of_ssh(&error))),
        };
        if !output.success() {
            return Err(of_failed_job(&self.settings.base, &output));
        }
        let report = self.report(&output.stdout).map_err(|failure| Finding::of(NAME, failure))?;
        Ok((report, begun, ended))
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The first two numbers behind the program's name, as in `slurm 22.05.8` or `slurm-wlm 22.05.8`.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let numbers = text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut parts = numbers.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What `sinfo` says of a partition: name, availability, time limit, number of nodes and their state, one line for each state.
fn judge_partition(partition: &str, told: &str) -> Finding {
    const NAME: &str = "cluster partition";
    let rows = told.lines().filter_map(|line| {
        let mut fields = line.trim().split('|');
        // The default partition is marked with a star.
        Some((fields.next()?.trim_end_matches('*'), fields.next()?, fields.next()?, fields.next()?, fields.next()?))
    });
    let (mut names, mut limit, mut up, mut nodes, mut idle) = (Vec::new(), "", false, 0_u64, 0_u64);
    for (name, available, time, count, state) in rows {
        if !names.contains(&name) {
            names.push(name);
        }
        if name == partition {
            let count: u64 = count.parse().unwrap_or(0);
            (limit, up, nodes) = (time, available == "up", nodes + count);
            idle += if state == "idle" { count } else { 0 };
        }
    }
    if !names.contains(&partition) {
        let hint = format!("this cluster has: {}", names.join(", "));
        return Finding::wrong(NAME, format!("there is no partition {partition}"), hint);
    }
    if !up {
        return Finding::wrong(
            NAME,
            format!("{partition} is not up"),
            "choose another, or wait until the site opens it",
        );
    }
    Finding::ok(NAME, format!("{partition}: {nodes} nodes, {idle} of them idle, time limit {limit}"))
}

/// The clock of a host and its way to the disk.
fn judge(report: &SiteReport, host: &str, begun: Duration, ended: Duration, limits: &Thresholds) -> Vec<Finding> {
    let mut findings = Vec::new();
    let its = Duration::from_micros(report.now_us);
    // It was read at some moment between question and answer.
    let (off, way) = if its < begun {
        (begun.saturating_sub(its), "behind")
    } else if its > ended {
        (its.saturating_sub(ended), "ahead of")
    } else {
        (Duration::ZERO, "with")
    };
    let shown = format!("{host} {}: at least {off:.1?} {way} this machine's clock", report.host);
    findings.push(if off <= limits.skew {
        Finding::ok(
            "cluster clock",
            if off.is_zero() { format!("{host} {}: agrees with ours", report.host) } else { shown },
        )
    } else {
        Finding::warning(
            "cluster clock",
            shown,
            "times of events will be off; let the site, or this machine, set its clock (NTP)",
        )
    });
    let kind = report.file_system.as_deref().unwrap_or("local disk");
    findings.push(match report.write_us.map(Duration::from_micros) {
        None => Finding::wrong(
            "cluster write",
            format!("{host} {} cannot write: {}", report.host, report.write_error),
            WRITABLE,
        ),
        Some(took) if took > limits.write => Finding::warning(
            "cluster write",
            format!("{host} {}: a record takes {took:.1?} to be durable ({kind})", report.host),
            "every prompt waits for this; choose a faster shared file system with workspace_root",
        ),
        Some(took) => Finding::ok("cluster write", format!("{host} {}: {took:.1?} for a record ({kind})", report.host)),
    });
    findings
}

fn judge_sight(base: &str, report: &SiteReport) -> Finding {
    const NAME: &str = "shared directory";
    if report.sees == Some(true) {
        return Finding::ok(NAME, format!("{base} is the same on {}", report.host));
    }
    Finding::wrong(
        NAME,
        format!("{} does not see in {base} what the login host wrote there", report.host),
        "workspace_root must lie on the file system that login and compute hosts share",
    )
}

/// A job for one look that did not get as far as our program.
fn of_failed_job(base: &str, output: &Output) -> Finding {
    const NAME: &str = "shared directory";
    let said = output.complaint();
    let busy = ["nable to allocate resources", "immediate", "Immediate", "unavailable"];
    if ["No such file", "not found", "execve", "ermission denied"].iter().any(|sign| said.contains(sign)) {
        let detail = format!("a compute host cannot run what was placed in {base}: {said}");
        return Finding::wrong(
            NAME,
            detail,
            "workspace_root must lie on the file system that login and compute hosts share, without noexec",
        );
    }
    if busy.iter().any(|sign| said.contains(sign)) {
        return Finding::warning(
            NAME,
            format!("no compute host was free to look from: {said}"),
            "run this again when the partition has an idle node",
        );
    }
    Finding::wrong(NAME, format!("srun ended with {}: {said}", output.exit), "try `srun hostname` on the login host")
}

fn judge_codex(report: &SiteReport) -> Finding {
    match &report.codex {
        Some(bin) => Finding::ok(
            "cluster codex",
            format!("{}: {}, and it has credentials", report.host, Path::new(bin).display()),
        ),
        None => Finding::warning(
            "cluster codex",
            format!("{}: {}", report.host, report.codex_error),
            report.codex_hint.clone(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> SiteReport {
        SiteReport {
            host: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            now_us: 1_000_000_000,
            file_system: Some("nfs".to_owned()),
            sees: Some(true),
            write_us: Some(2_000),
            write_error: String::new(),
            codex: Some("/opt/codex".to_owned()),
            codex_found: true,
            codex_error: String::new(),
            codex_hint: String::new(),
        }
    }

    fn judged(report: &SiteReport) -> [Finding; 2] {
        let (begun, ended) = (Duration::from_secs(999), Duration::from_secs(1001));
        judge(report, "compute host", begun, ended, &Thresholds::default()).try_into().unwrap()
    }

    #[test]
    fn a_clock_is_off_only_by_what_the_question_cannot_have_taken() {
        for (now, ok) in [(1000, true), (1005, true), (994, true), (1007, false), (993, false), (0, false)] {
            let report = SiteReport { now_us: now * 1_000_000, ..report() };
            let [clock, _] = judged(&report);
            assert_eq!(clock.ok, ok, "{now}: {clock:?}");
        }
        let [clock, _] = judged(&SiteReport { now_us: 880_000_000, ..report() });
        assert!(clock.detail.contains("119.0s behind") && clock.hint.contains("NTP"), "{clock:?}");
    }

    #[test]
    fn a_directory_that_is_slow_or_cannot_be_written_is_told() {
        assert!(judged(&report())[1].ok);
        let [_, slow] = judged(&SiteReport { write_us: Some(3_000_000), ..report() });
        assert!(!slow.ok && slow.minor && slow.detail.contains("3.0s") && slow.detail.contains("nfs"), "{slow:?}");
        let full = SiteReport { write_us: None, write_error: "Disk quota exceeded".to_owned(), ..report() };
        let [_, full] = judged(&full);
        assert!(!full.ok && !full.minor && full.detail.contains("quota"), "{full:?}");
    }

    #[test]
    fn partitions_are_read_from_what_sinfo_prints() {
        let told =
            "debug*|up|30:00|2|idle\nmi2508x|up|12:00:00|6|alloc\nmi2508x|up|12:00:00|3|idle\nold|drain|1:00|4|idle\n";
        let found = judge_partition("mi2508x", told);
        assert!(found.ok && found.detail.contains("9 nodes, 3 of them idle, time limit 12:00:00"), "{found:?}");
        assert!(judge_partition("debug", told).ok, "the default partition has a star");
        let missing = judge_partition("mi25", told);
        assert!(!missing.ok && missing.hint.contains("debug, mi2508x, old"), "{missing:?}");
        assert!(!judge_partition("old", told).ok);
    }

    #[test]
    fn versions_are_read_however_the_program_is_called() {
        for (text, version) in [
            ("slurm 20.11.4", Some((20, 11))),
            ("slurm-wlm 22.05.8", Some((22, 5))),
            ("slurm 24.11.5-1", Some((24, 11))),
            ("sbatch: command not found", None),
        ] {
            assert_eq!(version_of(text), version, "{text}");
        }
    }
}
