//! drover beside a real Slurm: an instance on the login host of a laboratory, or on the laptop that reaches nothing but its SSH.
//!
//! Whoever works with one does so in the network of that host: sockets that are opened there, and programs that are started
//! there, see what it sees.

pub mod chaos;
pub mod codex;
mod faults;
mod judge;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::GetInfoRequest;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::{MAX_MESSAGE_BYTES, Target, connect};
use drover_testkit::cluster::{Cluster, RouterClient, program, signal};
use drover_testkit::lab::{Options, SlurmLab, USER};
use rustix::process::Signal;
use serde_json::Value;
use tonic::transport::Channel;

use crate::cli::Ran;

/// Where its router listens, so that it is found again after a restart; nobody else is in its network.
const ROUTER: &str = "127.0.0.1:7401";
/// How long anything may take that takes a second on a quiet machine.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// The directory of drover on the shared file system, below the user's home.
const SUBDIR: &str = "codeswarm";
/// The cluster's name in the catalogue.
const NAME: &str = "lab";
/// How often Slurm's controller may be asked.
pub const CALLS_PER_MINUTE: u32 = 60;

/// On which host drover is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seat {
    /// On the login host itself, as the user.
    Login,
    /// On a machine that has SSH to the login host and nothing else.
    Laptop,
}

/// A laboratory and a running instance of drover. Dropping it ends both.
pub struct Site {
    seat: Seat,
    up: Option<Child>,
    cluster: Option<Cluster>,
    /// The laboratory.
    pub lab: SlurmLab,
}

/// Brings up a laboratory and an instance in it, and does the work in the network of that instance. `more` is configuration
/// beside what the place itself needs, in YAML.
pub fn with<T: Send>(
    options: Options,
    seat: Seat,
    more: &str,
    work: impl AsyncFnOnce(&mut Site) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    prepared(options, seat, more, async |site| {
        site.up().await?;
        work(site).await
    })
}

/// The same with an instance of which nothing runs yet.
pub fn prepared<T: Send>(
    options: Options,
    seat: Seat,
    more: &str,
    work: impl AsyncFnOnce(&mut Site) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let lab = SlurmLab::start(options)?;
    let host = lab.network(if seat == Seat::Login { "login" } else { "laptop" });
    host.within(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let mut site = Site::prepare(lab, seat, more)?;
            work(&mut site).await.map_err(|error| {
                let logs = site.logs();
                error.context(logs)
            })
        })
    })?
}

impl Site {
    fn prepare(lab: SlurmLab, seat: Seat, more: &str) -> anyhow::Result<Self> {
        let config = |way: &str| {
            format!(
                "router: {{listen: \"{ROUTER}\"}}\nsecurity: {{allow_uids: [0]}}\n\
                 launch_providers: [{{id: {NAME}, backend: slurm}}]\ncluster:\n  slurm: {{{way}, workspace_root: /home/{USER}, \
                 cluster_subdir: {SUBDIR}, poll: 2s, calls_per_minute: {CALLS_PER_MINUTE}}}\n{more}"
            )
        };
        let mut site = Self { seat, up: None, cluster: None, lab };
        if seat == Seat::Login {
            strip(&site.disk("login").join("drover"))?;
            fs::write(site.disk("login").join("drover.yaml"), config("ssh: none"))?;
        } else {
            let mut cluster = Cluster::prepare("{}")?;
            let (home, drover) = (cluster.dir().join("home"), cluster.dir().join("drover"));
            strip(&drover)?;
            let way = format!("login_host: login, program: \"{}\"", drover.display());
            fs::write(cluster.dir().join("drover.yaml"), config(&way))?;
            fs::create_dir_all(home.join(".ssh"))?;
            fs::copy(site.lab.ssh_config(), home.join(".ssh/config"))?;
            cluster.set_env("HOME", home);
            // Of whoever runs this; nothing of theirs is to be used.
            cluster.set_env("SSH_AUTH_SOCK", "");
            cluster.set_env("SSH_ASKPASS", "");
            site.cluster = Some(cluster);
        }
        Ok(site)
    }

    /// The directory of the laptop's instance.
    pub fn dir(&self) -> PathBuf {
        self.cluster.as_ref().map_or_else(|| self.disk("login"), |cluster| cluster.dir().to_owned())
    }

    /// Our directory on the shared file system, as the file server has it.
    pub fn base(&self) -> anyhow::Result<PathBuf> {
        Ok(self.lab.home()?.join(SUBDIR))
    }

    /// The same as hosts have it.
    pub fn base_there(&self) -> String {
        format!("/home/{USER}/{SUBDIR}")
    }

    /// The way to the follower on the login host, as the router takes it.
    pub fn follower(&self) -> anyhow::Result<Channel> {
        let cluster = self.cluster.as_ref().context("the login host has no way to itself")?;
        let name = format!("outbox-follower@{NAME}");
        Ok(connect(Target::Daemon { state: cluster.state().clone(), name }))
    }

    /// The disk of a host, which the host has as `/var/tmp`.
    pub fn disk(&self, host: &str) -> PathBuf {
        self.lab.dir().join("hosts").join(host).join("disk")
    }

    /// A `drover` command of this instance.
    pub fn command(&self, args: &[&str]) -> Command {
        if let Some(cluster) = &self.cluster {
            return cluster.command(args);
        }
        let mut command = self.lab.user("login", "env");
        command.args(["DROVER_STATE_DIR=/var/tmp/state", "DROVER_CONFIG=/var/tmp/drover.yaml", "/var/tmp/drover"]);
        command.args(args);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<Ran> {
        let output = self.command(args).output().with_context(|| format!("failed to run drover {args:?}"))?;
        Ok(output.into())
    }

    /// Runs a command that must succeed.
    pub fn ok(&self, args: &[&str]) -> anyhow::Result<Ran> {
        let ran = self.run(args)?;
        ensure!(ran.code == 0, "drover {args:?} exited {}:\n{}{}", ran.code, ran.stdout, ran.stderr);
        Ok(ran)
    }

    /// The one JSON document that a command prints.
    pub fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let ran = self.ok(args)?;
        serde_json::from_str(&ran.stdout).with_context(|| format!("drover {args:?} printed {}", ran.stdout))
    }

    /// Starts `drover up` and waits until every daemon answers.
    pub async fn up(&mut self) -> anyhow::Result<()> {
        ensure!(self.up.is_none(), "drover up runs already");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.up_log())?;
        let mut command = self.command(&["up"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.up = Some(command.spawn()?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.router().get_info(GetInfoRequest {}).await.map(tonic::Response::into_inner);
            match info {
                Ok(info) if info.allocator_error.is_empty() && info.follower_error.is_empty() => return Ok(()),
                _ if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(50)).await,
                other => bail!("the daemons are not ready: {other:?}"),
            }
        }
    }

    /// Kills every daemon of the instance at once, as if its host had lost its power. Swarms go on.
    pub fn power_off(&mut self) -> anyhow::Result<()> {
        // First the one that would start the others again.
        let starters = self.processes("up")?;
        let mut up = self.up.take().context("drover up does not run")?;
        for pid in starters {
            signal(pid, Signal::KILL)?;
        }
        for name in ["router", "slurm-allocator", "outbox-follower"] {
            for pid in self.processes(name)? {
                let _ = signal(pid, Signal::KILL);
            }
        }
        up.wait()?;
        Ok(())
    }

    /// Processes of a daemon of the instance, or of `up`.
    pub fn processes(&self, name: &str) -> anyhow::Result<Vec<u32>> {
        if let Some(cluster) = &self.cluster {
            return Ok(match (name, &self.up) {
                ("up", Some(up)) => vec![up.id()],
                _ => cluster.daemon(name).map(|id| id.pid).into_iter().collect(),
            });
        }
        let wanted = if name == "up" { "drover up".to_owned() } else { format!("daemon {name}") };
        self.named("login", &wanted)
    }

    /// Followers on the login host.
    pub fn followers(&self) -> anyhow::Result<Vec<u32>> {
        self.named("login", "daemon outbox-follower")
    }

    /// Processes of a host with these words in their command line, which are no wrappers.
    pub fn named(&self, host: &str, words: &str) -> anyhow::Result<Vec<u32>> {
        let all = self.lab.processes(host)?;
        let ours =
            |argv: &str| argv.contains(words) && argv.split(' ').next().is_some_and(|word| word.ends_with("drover"));
        Ok(all.into_iter().filter(|(_, argv)| ours(argv)).map(|(pid, _)| pid).collect())
    }

    /// A client of its router. To be used in the network of the instance.
    pub fn router(&self) -> RouterClient {
        RouterServiceClient::new(connect(Target::Address(ROUTER.to_owned())))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// What `status` says of a swarm.
    pub fn status(&self, swarm: &str) -> anyhow::Result<Value> {
        self.json(&["status", swarm, "--json"])
    }

    /// Waits until the status of a swarm is as described.
    pub fn wait_status(&self, swarm: &str, what: &str, is: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let mut last = Value::Null;
        self.wait(what, || {
            last = self.status(swarm)?;
            Ok(is(&last).then(|| last.clone()))
        })
        .with_context(|| format!("the status was {last:#}"))
    }

    /// Waits until a look finds what it looks for.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The user's jobs in Slurm's queue: number and state.
    pub fn queue(&self) -> anyhow::Result<Vec<(String, String)>> {
        let text = self.lab.run("login", &["squeue", "--me", "--noheader", "--format=%i %T"])?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(job, state)| (job.into(), state.into()))
            .collect())
    }

    fn up_log(&self) -> PathBuf {
        self.dir().join("up.log")
    }

    /// The last lines of every log of the instance, for failures.
    pub fn logs(&self) -> String {
        if let Some(cluster) = &self.cluster {
            return cluster.logs();
        }
        let mut files = vec![self.up_log()];
        let listed = fs::read_dir(self.disk("login").join("state/logs")).into_iter().flatten().flatten();
        files.extend(listed.map(|entry| entry.path()));
        let tail = |file: &PathBuf| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {}\n{}\n", file.display(), lines[lines.len().saturating_sub(30)..].join("\n"))
        };
        files.iter().map(tail).collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.up.is_some() {
            let _ = self.power_off();
        }
    }
}

/// The program, without the names that only a debugger needs: more than half of it.
fn strip(to: &Path) -> anyhow::Result<()> {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(program("drover")?).status().context("strip")?;
    ensure!(stripped.success(), "the program could not be stripped");
    // Whoever is root here may have taken the right to run it from everybody else.
    Ok(fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o755))?)
}
