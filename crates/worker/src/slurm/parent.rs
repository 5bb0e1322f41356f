//! What `srun` starts: the small parent of a node's workers, which starts another when one has died.
//!
//! ```text
//! srun ── parent ── worker, generation n      dies: the next is n + 1, after a pause
//!           └─ <swarm>/nodes/<NN>/worker.json  what became of it, for the allocator
//! ```
//!
//! Slurm itself would leave the node of a dead worker idle until the job is put back into the queue. The parent never works against a job
//! that took its place elsewhere: a worker that it starts again gets a generation by number, and that can be claimed once only. Once a
//! generation is not one of its own, it ends.
//!
//! A signal of Slurm reaches both. The parent passes on its own end by letting go of a pipe, which does not count as a second
//! signal.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use drover_config::{Config, WorkerConfig};
use drover_mailbox::Mailbox;
use drover_service::{Context, ExitWith, LIFELINE, process, programs};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use serde::Serialize;
use std::os::unix::process::ExitStatusExt as _;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::node::Identity;

/// The longest pause between two starts.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that cannot begin at all, for its command line or configuration, cannot begin the next time either.
const HOPELESS: [i32; 2] = [64, 78];
/// The compute node on which Slurm launches a job: on the network that the job's nodes share.
const LAUNCH_NODE: &str = "SLURM_LAUNCH_NODE_IPADDR";
const WORD_FILE: &str = "worker.json";

/// The node that is kept.
pub(crate) struct Parent {
    identity: Identity,
    /// Its part of the swarm's directory on the shared file system.
    own: Option<PathBuf>,
    restarts: u32,
    /// The newest generation before any of ours.
    before: Option<Generation>,
    pids: BTreeSet<u32>,
}

/// What became of the node's worker. Read by the allocator: fields are added, never renamed.
#[derive(Debug, Serialize)]
struct Word<'a> {
    v: u32,
    host: String,
    generation: Generation,
    state: &'a str,
    reason: &'a str,
    restarts: u32,
}

/// What is to follow the end of a worker.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// All is over, in order.
    Done,
    /// Another worker, after a pause.
    Again { pause: Duration, reason: String },
    /// No other worker: it would fare no better.
    GiveUp { reason: String },
}

impl Parent {
    /// Of this node. `dir` is the directory of the swarm on the shared file system.
    pub(crate) fn new(identity: Identity, dir: Option<&Path>) -> Self {
        let own = dir.map(|dir| dir.join("nodes").join(format!("{:02}", identity.node.0)));
        Self { identity, own, restarts: 0, before: None, pids: BTreeSet::new() }
    }

    /// Keeps the node until it has ended, in order or not.
    pub(crate) async fn keep(
        mut self,
        config: &WorkerConfig,
        env: &[(String, String)],
        ctx: &Context,
    ) -> anyhow::Result<()> {
        self.before = self.newest().await?.map(|(generation, _)| generation);
        let mut exactly = None;
        loop {
            let begun = Instant::now();
            let (mut child, line) = self.start(exactly, env).context("the worker cannot be started")?;
            let ended = tokio::select! {
                ended = child.wait() => ended,
                () = ctx.shutdown().cancelled() => {
                    drop(line);
                    let status = child.wait().await.context("the end of the worker cannot be learnt")?;
                    let newest = self.newest().await.ok().flatten();
                    let why = super::why_told(|name| std::env::var(name).ok(), SystemTime::now());
                    self.tell("ended", why, newest).await;
                    return if status.success() { Ok(()) } else { Err(failed(status)) };
                }
            };
            let status = ended.context("the end of the worker cannot be learnt")?;
            if begun.elapsed() >= config.healthy_after.get() {
                self.restarts = 0;
            }
            let newest = self.newest().await?;
            let ours = self.is_ours(newest.as_ref());
            match decide(status, self.restarts, config, ours) {
                Next::Done => {
                    info!(%status, "the worker has ended");
                    self.tell("ended", &format!("worker ended with {status}"), newest).await;
                    return if ours || status.success() { Ok(()) } else { Err(failed(status)) };
                }
                Next::GiveUp { reason } => {
                    warn!(reason, "the node is given up");
                    self.tell("failed", &reason, newest).await;
                    return Err(failed(status));
                }
                Next::Again { pause, reason } => {
                    warn!(reason, "the worker has died");
                    self.restarts += 1;
                    exactly = newest
                        .as_ref()
                        .filter(|_| newest.as_ref().map(|(at, _)| *at) != self.before)
                        .map(|(at, _)| at.next());
                    self.tell("restarting", &reason, newest).await;
                    if ctx.shutdown().run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn start(
        &mut self,
        exactly: Option<Generation>,
        env: &[(String, String)],
    ) -> io::Result<(Child, Option<ChildStdin>)> {
        let program = programs::find("worker").map_err(io::Error::other)?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.args)
            .env("DROVER_NODE_ID", self.identity.node.0.to_string())
            .env("DROVER_JOB_ID", self.identity.job.as_str())
            .env("DROVER_NODE_DIR", &self.identity.node_dir)
            .env(LIFELINE, "stdin")
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped());
        match exactly {
            Some(generation) => command.env("DROVER_GENERATION", generation.to_string()),
            None => command.env_remove("DROVER_GENERATION"),
        };
        if let Some(dir) = self.own.as_ref().filter(|dir| dir.join("identity.json").is_file()) {
            command.env("DROVER_IDENTITY", dir);
        }
        let mut child = command.spawn()?;
        self.pids.extend(child.id());
        let line = child.stdin.take();
        Ok((child, line))
    }

    /// The newest generation of the node, and who has it. A file system that is away is tried until it is back.
    async fn newest(&self) -> anyhow::Result<Option<(Generation, Option<drover_mailbox::Owner>)>> {
        let (mailbox, swarm, node) = (self.identity.mailbox.clone(), self.identity.swarm.clone(), self.identity.node);
        let looked = tokio::task::spawn_blocking(move || newest(&mailbox, &swarm, node)).await?;
        looked.context("the mailbox cannot be read")
    }

    /// Nobody has claimed the node since, or one of our workers was the last who did.
    fn is_ours(&self, newest: Option<&(Generation, Option<drover_mailbox::Owner>)>) -> bool {
        let Some((generation, owner)) = newest else { return true };
        let mine = |owner: &drover_mailbox::Owner| owner.host == process::hostname() && self.pids.contains(&owner.pid);
        self.before == Some(*generation) || owner.as_ref().is_some_and(mine)
    }

    /// Says what became of the worker. Whoever cannot be told is told by Slurm, later and less.
    async fn tell(&self, state: &str, reason: &str, newest: Option<(Generation, Option<drover_mailbox::Owner>)>) {
        let Some(own) = self.own.clone() else { return };
        let generation = newest.map_or(Generation(0), |(generation, _)| generation);
        let word = Word { v: 1, host: process::hostname(), generation, state, reason, restarts: self.restarts };
        let Ok(text) = serde_json::to_vec(&word) else { return };
        let written = tokio::task::spawn_blocking(move || {
            let fresh = own.join(format!(".{WORD_FILE}.{}", std::process::id()));
            std::fs::create_dir_all(&own)?;
            std::fs::write(&fresh, text)?;
            std::fs::rename(fresh, own.join(WORD_FILE))
        });
        if let Ok(Err(error)) = written.await {
            warn!(%error, "the allocator cannot be told");
        }
    }
}

fn newest(
    mailbox: &Mailbox,
    swarm: &SwarmId,
    node: NodeIndex,
) -> io::Result<Option<(Generation, Option<drover_mailbox::Owner>)>> {
    let Some(generation) = mailbox.generations(swarm, node)?.last().copied() else { return Ok(None) };
    let owner = mailbox.owner(&OutboxId { swarm: swarm.clone(), node, generation })?;
    Ok(Some((generation, owner)))
}

fn failed(status: ExitStatus) -> anyhow::Error {
    let code = status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1);
    ExitWith { code, message: format!("the worker ended with {status}") }.into()
}

fn decide(status: ExitStatus, restarts: u32, config: &WorkerConfig, ours: bool) -> Next {
    if status.success() || !ours {
        return Next::Done;
    }
    let how = match status.signal() {
        Some(signal) => format!("was killed by signal {signal}"),
        None => format!("ended with {status}"),
    };
    if status.code().is_some_and(|code| HOPELESS.contains(&code)) {
        return Next::GiveUp { reason: format!("worker {how}: its configuration cannot be used there") };
    }
    let most = config.max_restarts;
    if restarts >= most {
        return Next::GiveUp { reason: format!("worker {how}; given up after {restarts} restarts") };
    }
    let pause = config.restart_delay.get().saturating_mul(1 << restarts.min(20)).min(LONGEST_PAUSE);
    let reason = format!("worker {how}; restart {} of {most} in {:.1}s", restarts + 1, pause.as_secs_f64());
    Next::Again { pause, reason }
}

/// What the configuration does not say and a task of Slurm can find out: an address that the job's other nodes can reach.
pub(crate) fn addresses(config: &Config, variable: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let swarm = config.swarm.clone().unwrap_or_default();
    let ours = swarm.advertise_addr.is_none() && swarm.bind_addr.parse::<IpAddr>().is_ok_and(|addr| addr.is_loopback());
    let reach = || {
        let launch: IpAddr = variable(LAUNCH_NODE)?.parse().ok()?;
        // Nothing is sent: the kernel says from where it would be.
        let any: IpAddr = if launch.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((launch, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|addr| !addr.is_loopback())
    };
    match reach().filter(|_| ours) {
        Some(addr) => {
            ["BIND_ADDR", "ADVERTISE_ADDR"].map(|key| (format!("DROVER_SWARM__{key}"), addr.to_string())).into()
        }
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(raw: i32) -> ExitStatus {
        ExitStatus::from_raw(raw)
    }

    #[test]
    fn a_worker_that_died_is_followed_by_another_until_there_were_enough() {
        let config = WorkerConfig { max_restarts: 2, ..WorkerConfig::default() };
        assert_eq!(decide(status(0), 0, &config, true), Next::Done);
        assert!(
            matches!(decide(status(9), 0, &config, true), Next::Again { reason, .. } if reason.contains("signal 9"))
        );
        let Next::Again { pause, reason } = decide(status(1 << 8), 1, &config, true) else { panic!() };
        assert_eq!((pause, reason.contains("restart 2 of 2")), (config.restart_delay.get() * 2, true));
        assert!(matches!(decide(status(9), 2, &config, true), Next::GiveUp { .. }));
        for hopeless in HOPELESS {
            assert!(matches!(decide(status(hopeless << 8), 0, &config, true), Next::GiveUp { .. }));
        }
        assert_eq!(decide(status(9), 0, &config, false), Next::Done, "somebody else has the node");
    }

    #[test]
    fn a_node_is_ours_until_somebody_else_claims_it() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity {
            swarm: "s".parse().unwrap(),
            node: NodeIndex(0),
            generation: None,
            job: "1".parse().unwrap(),
            mailbox: Mailbox::new(dir.path()),
            node_dir: dir.path().join("node"),
            agent: drover_types::AgentKind::Echo,
            proof: None,
        };
        let mut parent = Parent::new(identity, None);
        let owner = |host: &str, pid| Some(drover_mailbox::Owner { host: host.to_owned(), pid, start_time: 1 });
        parent.before = Some(Generation(2));
        parent.pids.insert(7);
        assert!(parent.is_ours(None) && parent.is_ours(Some(&(Generation(2), owner("elsewhere", 9)))));
        assert!(parent.is_ours(Some(&(Generation(3), owner(&process::hostname(), 7)))));
        for other in [owner("elsewhere", 7), owner(&process::hostname(), 8), None] {
            assert!(!parent.is_ours(Some(&(Generation(3), other))));
        }
    }

    #[test]
    fn an_address_is_found_only_where_nobody_chose_one() {
        let config = |text: &str| Config::from_text("t", text, &std::collections::BTreeMap::new()).unwrap().0;
        let none = |_: &str| None;
        assert_eq!(addresses(&config("{}"), none), []);
        let loopback = |_: &str| Some("127.0.0.1".to_owned());
        assert_eq!(addresses(&config("{}"), loopback), [], "others cannot reach that");
        let wrong = |_: &str| Some("n1".to_owned());
        assert_eq!(addresses(&config("{}"), wrong), []);
        assert_eq!(addresses(&config("swarm: {bind_addr: 10.0.0.7}"), loopback), []);
    }
}
