//! A real Slurm cluster on this machine, for tests: a controller, a login host and compute nodes, each in namespaces of its own,
//! and a laptop that reaches nothing but the login host's SSH server.
//!
//! `deploy/lab/` makes and breaks it; this is the handle. Every laboratory has a name of its own, so that several can be up at
//! once, and ends with its [`SlurmLab`] or, should that be killed, with the process that made it. It needs root, and the packages that
//! `deploy/lab/packages` installs. What it is and what it is not: `docs/lab.md`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, ensure};
use drover_service::process::{self, ProcessId};

use crate::cluster::{fill, tail};
use crate::netns::{self, Host, Link, Wan};

/// The user of the cluster, who is nobody on this machine.
pub const USER: &str = "labuser";
/// The user's number.
pub const USER_ID: u32 = 20077;

/// What a laboratory is to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Compute nodes, `n1` and so on.
    pub nodes: u32,
    /// The partition that all of them are in.
    pub partition: String,
    /// With an accounting database, so that `sacct` answers. Starts in seconds instead of half a second.
    pub sacct: bool,
    /// For how long every host believes what it knows of the shared directory's files, as over NFS; 0: not at all.
    pub cache_seconds: u32,
    /// How much the shared directory holds; 0 for no limit.
    pub quota_mib: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 4, partition: "mi2508x".to_owned(), sacct: false, cache_seconds: 0, quota_mib: 0 }
    }
}

impl Options {
    fn args(&self) -> Vec<String> {
        let mut args = vec!["--nodes".to_owned(), self.nodes.to_string(), "--partition".to_owned()];
        args.push(self.partition.clone());
        if self.sacct {
            args.push("--sacct".to_owned());
        }
        args.extend(["--cache".to_owned(), self.cache_seconds.to_string()]);
        args.extend(["--quota".to_owned(), self.quota_mib.to_string()]);
        args
    }
}

/// Why such a laboratory cannot be had here; `Ok` when it can. Installs what is missing when it may.
pub fn usable(options: &Options) -> Result<(), String> {
    netns::usable(&["python3"])?;
    let mut packages = Command::new(scripts().join("packages"));
    if options.sacct {
        packages.arg("--sacct");
    }
    finished(packages).map(drop).map_err(|error| format!("{error:#}"))
}

/// A running cluster. Dropping it ends every process of it and removes its namespaces and files.
pub struct SlurmLab {
    name: String,
    /// The network in which it was started. Its scripts run there, wherever its user is: who is on a host ends with that host.
    origin: File,
    dir: PathBuf,
    options: Options,
    wan: Wan,
    link: Option<Link>,
}

impl SlurmLab {
    /// Brings it up and waits until every node is idle.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let me = ProcessId::current();
        let name = format!("t{}-{}-{}", me.pid, me.start_time, COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(format!("/var/tmp/drover-slurm-{name}"));
        let origin = File::open("/proc/thread-self/ns/net")?;
        let lab = Self { name, origin, dir, options, wan: Wan::default(), link: None };
        lab.up()?;
        Ok(lab)
    }

    /// Starts what does not run: hosts that were crashed, services that were killed. Waits until they are of use.
    pub fn up(&self) -> anyhow::Result<()> {
        let mut up = self.script("up");
        up.args(self.options.args()).args(["--owner", &std::process::id().to_string()]);
        finished(up).map(drop).with_context(|| self.logs())
    }

    /// Its name, as the variable `LAB` of the scripts in `deploy/lab/`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its files lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The compute nodes.
    pub fn nodes(&self) -> Vec<String> {
        (1..=self.options.nodes).map(|index| format!("n{index}")).collect()
    }

    /// A command that will run as the user on a host, in the user's home, with the environment of a fresh login. Its process is not the
    /// program's own, and killing it does not end the program.
    pub fn user(&self, host: &str, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.script("on");
        command.arg(host).arg(program).stdin(Stdio::null());
        command
    }

    /// The same as root.
    pub fn root(&self, host: &str, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.script("on");
        command.args(["--root", host]).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a command as the user on a host and gives what it printed, without the last line's end. Fails when it does.
    pub fn run(&self, host: &str, argv: &[&str]) -> anyhow::Result<String> {
        let (program, args) = argv.split_first().context("no command")?;
        let mut command = self.user(host, program);
        command.args(args);
        text(&finished(command)?)
    }

    /// The laptop: a network with a way to the login host's SSH server. What runs on it is this machine's in every other respect.
    pub fn laptop(&self) -> Host {
        self.network("laptop")
    }

    /// The network of a host, to put a socket in or to read counters of.
    pub fn network(&self, host: &str) -> Host {
        let node: Option<u8> = host.strip_prefix('n').and_then(|index| index.parse().ok());
        let addr = match (host, node) {
            ("laptop", _) => Ipv4Addr::new(10, 77, 1, 1),
            ("login", _) => Ipv4Addr::new(10, 77, 0, 3),
            (_, Some(index)) => Ipv4Addr::new(10, 77, 0, 10 + index),
            _ => Ipv4Addr::new(10, 77, 0, 2),
        };
        Host::existing(self.namespace(host), self.namespace("switch"), host.to_owned(), addr)
    }

    /// Where the laptop finds the login host.
    pub fn login_addr(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 1, 2)
    }

    /// A configuration for `ssh` and what reads the same files; it knows the host `login`, the user's key and the host's.
    pub fn ssh_config(&self) -> PathBuf {
        self.dir.join("laptop/ssh_config")
    }

    /// A command of the laptop that runs this on the login host.
    pub fn ssh(&self, argv: &[&str]) -> Command {
        let mut command = self.laptop().command("ssh");
        command.arg("-F").arg(self.ssh_config()).arg("login").args(argv).stdin(Stdio::null());
        command
    }

    /// The user's home as the file server has it, whatever hosts have cached.
    pub fn home(&self) -> anyhow::Result<PathBuf> {
        let server = self.first_process("switch")?;
        Ok(PathBuf::from(format!("/proc/{}/root{}/shared/{USER}", server.pid, self.dir.display())))
    }

    /// A power cut of a host. [`SlurmLab::up`] starts it again.
    pub fn crash(&self, host: &str) -> anyhow::Result<()> {
        self.fault(&["crash", host])
    }

    /// Loses every frame from and to a host, in silence. Of the laptop: see [`SlurmLab::cut_wan`].
    pub fn cut(&self, host: &str) -> anyhow::Result<()> {
        ensure!(host != "laptop", "the laptop's link is cut by cut_wan");
        self.fault(&["cut", host])
    }

    /// Ends a cut.
    pub fn mend(&self, host: &str) -> anyhow::Result<()> {
        self.fault(&["mend", host])
    }

    /// Kills a service with SIGKILL and what it started not: `slurmctld` on `ctl`, `slurmd` on a node, `sshd` on `login`.
    pub fn kill(&self, host: &str, service: &str) -> anyhow::Result<()> {
        self.fault(&["kill", host, service])
    }

    /// Starts a service that does not run.
    pub fn begin(&self, host: &str, service: &str) -> anyhow::Result<()> {
        self.fault(&["start", host, service])
    }

    /// Ends every session of the SSH server at once; the server goes on.
    pub fn hang_up(&self) -> anyhow::Result<()> {
        self.fault(&["hangup"])
    }

    /// Makes the way from the laptop to the login host like this, for connections that are open too. Delay, jitter and loss are by a
    /// program that carries the frames, a rate alone is by the kernel.
    pub fn wan(&mut self, wan: Wan) -> anyhow::Result<()> {
        self.wan = wan;
        self.fault(&["rate", "none"])?;
        if (Wan { kbit_per_s: 0.0, ..wan }) == Wan::default() {
            self.link = None;
            self.fault(&["mend", "laptop"])?;
            if wan.kbit_per_s > 0.0 {
                self.fault(&["rate", &format!("{}kbit", wan.kbit_per_s)])?;
            }
            return Ok(());
        }
        if self.link.is_none() {
            // Two ways between the same bridges would be a loop.
            self.fault(&["cut", "laptop"])?;
            self.link = Some(Link::start(&self.namespace("switch"), ["wan0", "wan1"])?);
        }
        self.link.as_mut().context("no link")?.set(wan)
    }

    /// Loses every frame between the laptop and the login host, in silence.
    pub fn cut_wan(&mut self) -> anyhow::Result<()> {
        match &mut self.link {
            Some(link) => link.cut(),
            None => self.fault(&["cut", "laptop"]),
        }
    }

    /// Ends that.
    pub fn mend_wan(&mut self) -> anyhow::Result<()> {
        self.wan(self.wan)
    }

    /// Leaves no byte free in a shared directory with a quota.
    pub fn fill(&self) -> anyhow::Result<()> {
        ensure!(self.options.quota_mib > 0, "this laboratory has no quota");
        Ok(fill(&self.home()?.join("filler"))?)
    }

    /// Gives the space back.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.home()?.join("filler"))?)
    }

    /// Everything that runs on a host, by pid as seen from outside and by its command line.
    pub fn processes(&self, host: &str) -> anyhow::Result<Vec<(u32, String)>> {
        let space = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid"));
        let wanted = space(self.first_process(host)?.pid)?;
        let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let ours = pids.filter(|pid| process::of(*pid).is_some() && space(*pid).is_ok_and(|found| found == wanted));
        let named = ours.map(|pid| {
            let argv = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (pid, String::from_utf8_lossy(&argv).replace('\0', " ").trim_end().to_owned())
        });
        Ok(named.collect())
    }

    /// How many SSH connections of the laptop are open.
    pub fn ssh_connections(&self) -> anyhow::Result<usize> {
        let table = self.laptop().within(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
        // Local and remote address in hexadecimal, then the state; 01 is established, port 0x16 is 22.
        let open = |line: &&str| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            words.get(2).is_some_and(|remote| remote.ends_with(":0016")) && words.get(3) == Some(&"01")
        };
        Ok(table.lines().filter(open).count())
    }

    /// The first process of a host.
    pub fn first_process(&self, host: &str) -> anyhow::Result<ProcessId> {
        let text = fs::read_to_string(self.dir.join("run").join(format!("{host}.pid")))
            .with_context(|| format!("no host {host}"))?;
        let (pid, start_time) = text.trim().split_once(' ').context("what the host noted is no process")?;
        let id = ProcessId { pid: pid.parse()?, start_time: start_time.parse()? };
        ensure!(process::is_alive(&id), "the host {host} does not run");
        Ok(id)
    }

    /// The last lines of every log, for failures.
    pub fn logs(&self) -> String {
        let mut files: Vec<PathBuf> =
            fs::read_dir(self.dir.join("log")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        files.sort_unstable();
        let tails = files.iter().map(|file| (file, tail(file, 15))).filter(|(_, tail)| !tail.is_empty());
        tails.map(|(file, tail)| format!("--- {}\n{tail}\n", file.display())).collect::<Vec<_>>().concat()
    }

    fn namespace(&self, host: &str) -> String {
        format!("drover-slurm-{}-{host}", self.name)
    }

    fn script(&self, name: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/fd/{}", std::process::id(), self.origin.as_raw_fd()));
        command.arg("--").arg(scripts().join(name)).env("LAB", &self.name);
        command
    }

    fn fault(&self, args: &[&str]) -> anyhow::Result<()> {
        let mut fault = self.script("fault");
        fault.args(args);
        finished(fault).map(drop)
    }
}

impl Drop for SlurmLab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut stderr = std::io::stderr();
            let _ = std::io::Write::write_all(&mut stderr, self.logs().as_bytes());
        }
        self.link = None;
        if let Err(error) = finished(self.script("down")) {
            let mut stderr = std::io::stderr();
            let _ = std::io::Write::write_fmt(&mut stderr, format_args!("{error:#}\n"));
        }
    }
}

/// Where the scripts are that do all this.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/lab")
}

fn finished(mut command: Command) -> anyhow::Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output)
}

fn text(output: &Output) -> anyhow::Result<String> {
    Ok(std::str::from_utf8(&output.stdout)?.trim_end_matches('\n').to_owned())
}
