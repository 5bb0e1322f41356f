//! Real processes on the hosts of a laboratory: our membership daemon, and Debian's serf beside it at the same nominal timings
//! (probe every second, full exchange every 30 s).
//!
//! Both are watched in the same way: by the lines that they print, stamped when they are read.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_membership::core::NodeKey;
use drover_membership::core::lease::{Charter, SignedCharter, Voter};
use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{GetLeaderRequest, GetLeaderResponse};
use drover_service::pki::Authority;
use drover_service::{Target, connect};
use drover_testkit::cluster::{program, scratch_dir};
use drover_testkit::netns::{Host, Lab, Program};
use tempfile::TempDir;

/// Whose processes they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// `drover-gossip-membership`, sealed, with load scores.
    Ours,
    /// `serf agent`, encrypted.
    Serf,
}

/// UDP port of the gossip, of both.
const PORT: u16 = 7946;
/// TCP port of our daemon.
pub const RPC_PORT: u16 = 7954;

/// One process per host of a laboratory. Dropping it ends them.
pub struct Nodes {
    contender: Contender,
    hosts: Vec<Host>,
    programs: Vec<Option<Program>>,
    dir: TempDir,
    authority: Option<Authority>,
    more: Vec<(&'static str, String)>,
}

impl Nodes {
    /// Prepares everything that a start needs, so that no start waits for it.
    pub fn prepare(contender: Contender, lab: &Lab) -> anyhow::Result<Self> {
        Self::prepare_with(contender, lab, &[], |_| String::new())
    }

    /// Like [`Nodes::prepare`], with environment variables and lines of the `swarm` section for our daemons.
    pub fn prepare_with(
        contender: Contender,
        lab: &Lab,
        environment: &[(&'static str, String)],
        settings: impl Fn(&Host) -> String,
    ) -> anyhow::Result<Self> {
        let dir = scratch_dir("gossip-")?;
        let hosts = lab.hosts().to_vec();
        let authority = match contender {
            Contender::Ours => Some(Authority::open_or_create_at(&dir.path().join("pki"))?),
            Contender::Serf => None,
        };
        let programs = hosts.iter().map(|_| None).collect();
        let nodes = Self { contender, hosts, programs, dir, authority, more: environment.to_vec() };
        for (index, host) in nodes.hosts.iter().enumerate() {
            let Some(authority) = &nodes.authority else { continue };
            authority.issue(&nodes.name(index), Duration::from_hours(24))?.store(&nodes.path(index, "identity"))?;
            fs::create_dir_all(nodes.path(index, "state"))?;
            let config = format!(
                "swarm:\n  bind_addr: {}\n  bind_port: {PORT}\n  listen: 0.0.0.0:{RPC_PORT}\n{}",
                host.addr,
                settings(host)
            );
            fs::write(nodes.path(index, "drover.yaml"), config)?;
        }
        Ok(nodes)
    }

    fn path(&self, index: usize, what: &str) -> PathBuf {
        self.dir.path().join(format!("{index}-{what}"))
    }

    /// The instance's authority, when they are ours.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Directory for files of the test.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Sets an environment variable of our daemons for the starts to come.
    pub fn environment(&mut self, key: &'static str, value: String) {
        self.more.push((key, value));
    }

    /// Gives every node the charter of an epoch: what the login side does at launch.
    pub fn charter(&self, epoch: u64, voters: &[usize]) -> anyhow::Result<()> {
        let authority = self.authority.as_ref().context("only our nodes have charters")?;
        let mut voters: Vec<Voter> =
            voters.iter().map(|&index| Voter { key: NodeKey::of(&self.name(index)), seat: 1 }).collect();
        voters.sort_unstable();
        let charter = Charter { epoch, voters };
        let signed = SignedCharter::new(&charter, &authority.cluster_id(), |message| authority.sign(message))?;
        let text = serde_json::to_vec(&signed)?;
        (0..self.len()).try_for_each(|index| {
            let file = self.path(index, "identity").join("charter.json");
            fs::write(file.with_extension("fresh"), &text)?;
            Ok(fs::rename(file.with_extension("fresh"), file)?)
        })
    }

    /// Who leads, as a node says when it is asked on its own host.
    pub fn leader(&self, index: usize) -> anyhow::Result<GetLeaderResponse> {
        self.host(index).within(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let channel = connect(Target::Address(format!("127.0.0.1:{RPC_PORT}")));
                let asked = async { MembershipServiceClient::new(channel).get_leader(GetLeaderRequest {}).await };
                let answer = tokio::time::timeout(Duration::from_secs(3), asked).await.context("no answer in 3 s")?;
                Ok(answer?.into_inner())
            })
        })?
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// What a node is called.
    pub fn name(&self, index: usize) -> String {
        format!("lab/{index:02}")
    }

    /// The host of a node.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// The process of a node that runs.
    pub fn program(&self, index: usize) -> anyhow::Result<&Program> {
        self.programs[index].as_ref().with_context(|| format!("{} does not run", self.name(index)))
    }

    /// The nodes that run.
    pub fn running(&self) -> Vec<usize> {
        (0..self.len()).filter(|&index| self.programs[index].is_some()).collect()
    }

    /// Starts a node that knows one other.
    pub fn start(&mut self, index: usize, seed: usize) -> anyhow::Result<Instant> {
        let host = &self.hosts[index];
        let seed = SocketAddr::from((self.hosts[seed].addr, PORT));
        let command = match self.contender {
            Contender::Ours => {
                let mut command = host.command(program("drover-gossip-membership")?);
                command.arg("--config").arg(self.path(index, "drover.yaml"));
                command.env("DROVER_STATE_DIR", self.path(index, "state"));
                command.env("DROVER_IDENTITY", self.path(index, "identity"));
                command.env("DROVER_GOSSIP_ID", self.name(index)).env("DROVER_SEEDS", seed.to_string());
                command.env("DROVER_LOG", "info").env("NO_COLOR", "1");
                command.envs(self.more.iter().map(|(key, value)| (key, value)));
                command
            }
            Contender::Serf => {
                let mut command = host.command("serf");
                let bind = format!("-bind={}:{PORT}", host.addr);
                let key = "-encrypt=ZHJvdmVyLWdvc3NpcC1iZW5jaG1hcmsta2V5LTMyLi4=";
                let (node, join) = (format!("-node={}", self.name(index)), format!("-retry-join={seed}"));
                command.args(["agent", &node, &bind, "-rpc-addr=127.0.0.1:7373", key, &join, "-retry-interval=1s"]);
                command
            }
        };
        let begun = Instant::now();
        self.programs[index] = Some(host.spawn(command)?);
        Ok(begun)
    }

    /// Starts all: the first, and when that is up the others at once, which know the first. When the last was started.
    pub fn start_all(&mut self) -> anyhow::Result<Instant> {
        let begun = self.start(0, 0)?;
        let ready = match self.contender {
            Contender::Ours => "gossip bound",
            Contender::Serf => "Serf agent starting",
        };
        let first = self.program(0)?;
        if first.printed(begun, begun + Duration::from_secs(20), |line| line.contains(ready)).is_none() {
            bail!("{} did not come up:\n{}", self.name(0), first.tail(20));
        }
        let mut last = begun;
        for index in 1..self.len() {
            last = self.start(index, 0)?;
        }
        Ok(last)
    }

    /// When each of the running nodes knew all others; an error when one does not by then.
    pub fn all_joined(&self, limit: Duration) -> anyhow::Result<Instant> {
        let (running, since) = (self.running(), Instant::now().checked_sub(Duration::from_hours(1)));
        let (since, deadline) = (since.unwrap_or_else(Instant::now), Instant::now() + limit);
        let mut last = None;
        for &index in &running {
            for &other in running.iter().filter(|other| **other != index) {
                let name = self.name(other);
                let program = self.program(index)?;
                let Some((when, _)) = program.printed(since, deadline, |line| self.is_join(line, &name)) else {
                    bail!("{} does not know {name} after {limit:?}:\n{}", self.name(index), program.tail(12));
                };
                last = last.max(Some(when));
            }
        }
        last.context("nobody runs")
    }

    /// How long it took until each of the others has given this node up, which was killed then.
    pub fn all_know_gone(&self, gone: usize, since: Instant, limit: Duration) -> anyhow::Result<Duration> {
        let mut last = since;
        for index in self.running() {
            last = last.max(self.knows_gone(index, gone, since, limit)?);
        }
        Ok(last - since)
    }

    /// When a node gave up another.
    pub fn knows_gone(&self, index: usize, gone: usize, since: Instant, limit: Duration) -> anyhow::Result<Instant> {
        let (name, program) = (self.name(gone), self.program(index)?);
        match program.printed(since, since + limit, |line| self.is_loss_of(line, &name)) {
            Some((when, _)) => Ok(when),
            None => bail!("{} has not missed {name} after {limit:?}:\n{}", self.name(index), program.tail(12)),
        }
    }

    /// Waits until all running nodes have seen this one come back.
    pub fn all_see_back(&self, back: usize, since: Instant, limit: Duration) -> anyhow::Result<()> {
        let name = self.name(back);
        for index in self.running().into_iter().filter(|index| *index != back) {
            let program = self.program(index)?;
            if program.printed(since, since + limit, |line| self.is_join(line, &name)).is_none() {
                bail!("{} does not see {name} back after {limit:?}:\n{}", self.name(index), program.tail(12));
            }
        }
        Ok(())
    }

    /// Kills a node with SIGKILL.
    pub fn kill(&mut self, index: usize) -> anyhow::Result<Instant> {
        self.programs[index].take().with_context(|| format!("node {index} does not run"))?.kill()
    }

    /// Verdicts against anybody since then, by all who run.
    pub fn verdicts(&self, since: Instant) -> usize {
        let is_verdict = |line: &str| self.is_loss(line);
        self.programs.iter().flatten().map(|program| program.count(since, is_verdict)).sum()
    }

    /// Some of the lines that tell of verdicts, for people.
    pub fn pids(&self, indexes: &[usize]) -> Vec<u32> {
        indexes.iter().filter_map(|index| self.programs[*index].as_ref().map(Program::pid)).collect()
    }

    fn is_join(&self, line: &str, name: &str) -> bool {
        match self.contender {
            Contender::Ours => line.contains("event=\"NodeJoined\"") && names(line, name),
            Contender::Serf => line.contains("EventMemberJoin: ") && names(line, name),
        }
    }

    fn is_loss(&self, line: &str) -> bool {
        match self.contender {
            Contender::Ours => line.contains("event=\"NodeLeft\""),
            Contender::Serf => line.contains("EventMemberFailed: "),
        }
    }

    fn is_loss_of(&self, line: &str, name: &str) -> bool {
        self.is_loss(line) && names(line, name)
    }
}

fn names(line: &str, name: &str) -> bool {
    line.split(['"', ' ']).any(|word| word == name)
}
