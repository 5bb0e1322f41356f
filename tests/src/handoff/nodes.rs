//! Real daemons of a few nodes on this machine: each has its membership and its sessions, with certificates, and all share a directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_membership::core::NodeKey;
use drover_membership::core::lease::{Charter, SignedCharter, Voter};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{
    Answer, ExplainRequest, ExplainResponse, GetStatusRequest, GetStatusResponse, HandoffRequest, HandoffResponse,
    ListSessionsRequest, OpenSession, SendRequest, Session,
};
use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{GetLeaderRequest, GetStatusRequest as MembershipStatus};
use drover_proto::transfer::TellRequest;
use drover_proto::transfer::transfer_service_client::TransferServiceClient;
use drover_service::pki::{Authority, Identity, IdentityHandle};
use drover_service::{MAX_MESSAGE_BYTES, StateDir, Target, address_book, connect, connect_node};
use drover_testkit::cluster::{program, scratch_dir, signal};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

/// The client of one node's door.
pub type Door = HandoffServiceClient<Channel>;

/// Longest wait for anything on a busy machine.
pub const LIMIT: Duration = Duration::from_mins(1);

/// What the nodes are to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many there are.
    pub nodes: usize,
    /// Further lines of the `swarm` section.
    pub swarm: String,
    /// Further environment of the daemons of sessions.
    pub environment: Vec<(String, String)>,
    /// One of them leads.
    pub led: bool,
    /// Usage of processor and memory that all memberships take for measured.
    pub usage: Option<(f64, f64)>,
}

impl Plan {
    /// So many nodes that find each other and give each other up fast.
    pub fn fast(nodes: usize) -> Self {
        let swarm = "  discovery: { gossip_interval: 200ms, node_timeout: 1s, dead_node_timeout: 60s JOIN }\n  \
                     handoff: { timeout: 20s, max_retries: 1, retry_delay: 200ms }\n  rpc: { timeout: 2s }\n  \
                     load_monitor: { enabled: false, max_sessions: 100000 }\n";
        Self { nodes, swarm: swarm.to_owned(), environment: Vec::new(), led: false, usage: None }
    }

    /// The same with a leader. Each vote waits for a sync of the voter's disk: votes get the time that a busy disk takes for that.
    pub fn led(nodes: usize) -> Self {
        let Self { swarm, .. } = Self::fast(nodes);
        let swarm =
            swarm.replace("gossip_interval: 200ms, node_timeout: 1s", "gossip_interval: 500ms, node_timeout: 2s");
        Self { swarm, led: true, ..Self::fast(nodes) }
    }
}

/// The daemons of one node.
struct Node {
    membership: Option<Child>,
    sessions: Option<Child>,
}

/// A few nodes. Dropping them ends every process that was started for them.
pub struct Nodes {
    dir: TempDir,
    state: StateDir,
    authority: Authority,
    plan: Plan,
    running: Vec<Node>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.running.iter_mut().flat_map(|node| [&mut node.sessions, &mut node.membership]).flatten() {
            // One that is stopped has to go on to end.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for index in 0..self.running.len() {
                for what in ["sessions", "membership"] {
                    let log = fs::read_to_string(self.path(index, what)).unwrap_or_default();
                    let lines: Vec<&str> = log.lines().collect();
                    eprint(&format!("--- {what} of {}", self.name(index)));
                    eprint(&lines[lines.len().saturating_sub(25)..].join("\n"));
                }
            }
        }
    }
}

#[expect(clippy::print_stderr, reason = "a failed proof says what the daemons said last")]
fn eprint(text: &str) {
    eprintln!("{text}");
}

impl Nodes {
    /// Starts them and waits until each takes sessions and knows the others.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let dir = scratch_dir("sessions-")?;
        let state = StateDir::open(&dir.path().join("state"))?;
        let authority = Authority::open_or_create_at(&dir.path().join("pki"))?;
        let count = plan.nodes;
        let mut nodes = Self { dir, state, authority, plan, running: Vec::new() };
        for index in 0..count {
            nodes
                .authority
                .issue(&nodes.name(index), Duration::from_hours(24))?
                .store(&nodes.path(index, "identity"))?;
            nodes.running.push(Node { membership: None, sessions: None });
        }
        if nodes.plan.led {
            nodes.charter()?;
        }
        nodes.start_membership(0, "")?;
        let seed = nodes.gossip_addr(0).await?;
        for index in 1..count {
            nodes.start_membership(index, &seed)?;
        }
        for index in 0..count {
            nodes.start_sessions(index)?;
        }
        for index in 0..count {
            nodes.wait_for_peers(index, count - 1).await?;
        }
        Ok(nodes)
    }

    /// Gives every node the charter of an epoch: what the login side does at launch.
    fn charter(&self) -> anyhow::Result<()> {
        let all = 0..self.plan.nodes;
        let mut voters: Vec<Voter> =
            all.clone().map(|index| Voter { key: NodeKey::of(&self.name(index)), seat: 1 }).collect();
        voters.sort_unstable();
        let charter = Charter { epoch: 1, voters };
        let cluster = self.authority.cluster_id();
        let signed = SignedCharter::new(&charter, &cluster, |message| self.authority.sign(message))?;
        let text = serde_json::to_vec(&signed)?;
        for index in all {
            fs::write(self.path(index, "identity").join("charter.json"), &text)?;
        }
        Ok(())
    }

    /// Who leads, as a node says; waits until somebody does.
    pub async fn leader(&self, index: usize) -> anyhow::Result<usize> {
        let until = Instant::now() + LIMIT;
        loop {
            let asked = self.membership(index).get_leader(GetLeaderRequest {}).await;
            if let Ok(answer) = &asked {
                let leader = self.index(&answer.get_ref().node_id);
                if leader < self.plan.nodes {
                    return Ok(leader);
                }
            }
            if Instant::now() >= until {
                let log = fs::read_to_string(self.path(index, "membership")).unwrap_or_default();
                bail!("nobody leads: {asked:?}\n{log}");
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn membership(&self, index: usize) -> MembershipServiceClient<Channel> {
        let target = Target::Daemon { state: self.state.clone(), name: format!("gossip-membership-lab+{index}") };
        MembershipServiceClient::new(connect(target))
    }

    /// What a node's daemon of sessions has written into its log.
    pub fn said(&self, index: usize) -> String {
        fs::read_to_string(self.path(index, "sessions")).unwrap_or_default()
    }

    /// Where a node's door listens.
    pub fn listens(&self, index: usize) -> anyhow::Result<String> {
        let entry = address_book::read(&self.state, &format!("handoff-coordinator-lab+{index}"));
        Ok(entry.with_context(|| format!("{} does not run", self.name(index)))?.listen)
    }

    fn path(&self, index: usize, what: &str) -> PathBuf {
        self.dir.path().join(format!("{index}-{what}"))
    }

    /// What a node is called.
    pub fn name(&self, index: usize) -> String {
        format!("lab/{index}")
    }

    /// Index of a node by its name.
    pub fn index(&self, name: &str) -> usize {
        name.strip_prefix("lab/").and_then(|index| index.parse().ok()).unwrap_or(usize::MAX)
    }

    /// The directory that all share.
    pub fn shared(&self) -> PathBuf {
        self.dir.path().join("shared")
    }

    /// A node's own directory of sessions.
    pub fn disk(&self, index: usize) -> PathBuf {
        self.path(index, "disk")
    }

    /// Starts a node's membership. `seed`: another's address, or nothing.
    pub fn start_membership(&mut self, index: usize, seed: &str) -> anyhow::Result<()> {
        let join = if seed.is_empty() { String::new() } else { format!(", join_addrs: [\"{seed}\"]") };
        let config =
            format!("swarm:\n  bind_port: 0\n  listen: 127.0.0.1:0\n{}", self.plan.swarm.replace("JOIN", &join));
        fs::write(self.path(index, "drover.yaml"), config)?;
        let mut command = self.command(index, "drover-gossip-membership", "membership")?;
        if let Some((processor, memory)) = self.plan.usage {
            let file = self.path(index, "usage");
            fs::write(&file, format!("{processor} {memory}\n"))?;
            command.env("DROVER_USAGE_FILE", file);
        }
        let child = command.spawn()?;
        self.running[index].membership = Some(child);
        Ok(())
    }

    /// Starts a node's daemon of sessions.
    pub fn start_sessions(&mut self, index: usize) -> anyhow::Result<()> {
        let mut command = self.command(index, "drover-handoff-coordinator", "sessions")?;
        command.arg("--listen").arg("127.0.0.1:0");
        command.env("DROVER_SESSIONS_DIR", self.disk(index)).env("DROVER_SHARED_SESSIONS", self.shared());
        command.envs(self.plan.environment.iter().map(|(key, value)| (key, value)));
        self.running[index].sessions = Some(command.spawn()?);
        Ok(())
    }

    fn command(&self, index: usize, name: &str, log: &str) -> anyhow::Result<Command> {
        let mut command = Command::new(program(name)?);
        let log = File::options().create(true).append(true).open(self.path(index, log))?;
        command
            .arg("--config")
            .arg(self.path(index, "drover.yaml"))
            .arg("--identity")
            .arg(self.path(index, "identity"))
            .env("DROVER_STATE_DIR", self.state.path())
            .env("DROVER_SWARM_ID", "lab")
            .env("DROVER_NODE_ID", index.to_string())
            .env("DROVER_MEMBERSHIP_DIR", self.path(index, "gossip"))
            .env("DROVER_LOG", "info,drover_handoff_coordinator=debug")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Ok(command)
    }

    async fn gossip_addr(&self, index: usize) -> anyhow::Result<String> {
        let mut client = self.membership(index);
        let until = Instant::now() + LIMIT;
        loop {
            if let Ok(Ok(status)) = timeout(Duration::from_secs(2), client.get_status(MembershipStatus {})).await
                && !status.get_ref().advertised_addr.is_empty()
            {
                return Ok(status.into_inner().advertised_addr);
            }
            if Instant::now() >= until {
                bail!("the membership of {} does not come up", self.name(index));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Says something to a node as another node, one that has a certificate and follows no rule.
    pub async fn tell_as_stranger(&self, index: usize, messages: Vec<TellRequest>) -> anyhow::Result<()> {
        let dir = self.dir.path().join("stranger");
        self.authority.issue("lab/99", Duration::from_hours(1))?.store(&dir)?;
        let identity = IdentityHandle::new(Identity::load(&dir)?);
        let entry = address_book::read(&self.state, &format!("handoff-coordinator-lab+{index}"));
        let addr = entry.context("it does not run")?.listen.parse()?;
        let mut client = TransferServiceClient::new(connect_node(&identity, addr, &self.name(index)));
        timeout(LIMIT, client.tell(tokio_stream::iter(messages))).await??;
        Ok(())
    }

    /// Process id of a node's membership.
    pub fn membership_pid(&self, index: usize) -> anyhow::Result<u32> {
        let child = self.running[index].membership.as_ref();
        Ok(child.with_context(|| format!("{} has no membership", self.name(index)))?.id())
    }

    /// The door of a node.
    pub fn door(&self, index: usize) -> Door {
        let target = Target::Daemon { state: self.state.clone(), name: format!("handoff-coordinator-lab+{index}") };
        HandoffServiceClient::new(connect(target)).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// How a node says that it is.
    pub async fn status(&self, index: usize) -> anyhow::Result<GetStatusResponse> {
        let mut door = self.door(index);
        Ok(timeout(Duration::from_secs(5), door.get_status(GetStatusRequest {})).await??.into_inner())
    }

    /// Waits until a node knows so many others that take sessions.
    pub async fn wait_for_peers(&self, index: usize, peers: usize) -> anyhow::Result<()> {
        let until = Instant::now() + LIMIT;
        loop {
            let status = self.status(index).await;
            if matches!(&status, Ok(status) if status.peers as usize >= peers) {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!("{} does not know {peers} others: {status:?}", self.name(index));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a signal to a node's daemon of sessions.
    pub fn signal(&self, index: usize, what: Signal) -> anyhow::Result<()> {
        Ok(signal(self.pid(index)?, what)?)
    }

    /// Process id of a node's daemon of sessions.
    pub fn pid(&self, index: usize) -> anyhow::Result<u32> {
        let child = self.running[index].sessions.as_ref();
        Ok(child.with_context(|| format!("{} does not run", self.name(index)))?.id())
    }

    /// Kills a node's daemon of sessions with SIGKILL.
    pub fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        if let Some(mut child) = self.running[index].sessions.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Kills all daemons of a node with SIGKILL: the host is gone.
    pub fn kill_host(&mut self, index: usize) -> anyhow::Result<()> {
        self.kill(index)?;
        if let Some(mut child) = self.running[index].membership.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Whether an entry of a node's daemon of sessions stands in the address book.
    pub fn is_up(&self, index: usize) -> bool {
        address_book::read(&self.state, &format!("handoff-coordinator-lab+{index}")).is_some()
    }

    /// Says something through a node's door, which opens the session when it is new, and waits for the answer.
    pub async fn say(&self, door: usize, session: &str, request: &str, prompt: &str) -> anyhow::Result<Said> {
        let ask = || {
            let open = OpenSession { agent: "echo".to_owned(), ..OpenSession::default() };
            SendRequest {
                session_id: session.to_owned(),
                request_id: request.to_owned(),
                prompt: prompt.to_owned(),
                open: Some(open),
                ..SendRequest::default()
            }
        };
        let until = Instant::now() + LIMIT;
        let mut said = Said::default();
        loop {
            let broken = match listen(&mut self.door(door), ask(), &mut said).await {
                Ok(()) => return Ok(said),
                Err(broken) => broken,
            };
            // What a client does whose door is gone: asks again under the same name.
            if Instant::now() >= until {
                bail!("{request} of {session} is not answered through {}: {broken:#}", self.name(door));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Moves a session and waits until it has arrived.
    pub async fn hand_over(&self, door: usize, session: &str, to: usize) -> anyhow::Result<HandoffResponse> {
        let request = HandoffRequest { session_id: session.to_owned(), to: self.name(to) };
        Ok(timeout(LIMIT, self.door(door).handoff(request)).await??.into_inner())
    }

    /// Every session, as a node tells of it.
    pub async fn sessions(&self, door: usize) -> anyhow::Result<Vec<Session>> {
        let request = ListSessionsRequest { all: true, closed: true };
        Ok(timeout(LIMIT, self.door(door).list_sessions(request)).await??.into_inner().sessions)
    }

    /// Why a session is where it is, as a node tells of it.
    pub async fn explain(&self, door: usize, session: &str) -> anyhow::Result<ExplainResponse> {
        let request = ExplainRequest { session_id: session.to_owned() };
        Ok(timeout(LIMIT, self.door(door).explain(request)).await??.into_inner())
    }

    /// The newest epoch of a session, its owner and why it claimed, from the files.
    pub fn owner(&self, session: &str) -> Option<(u64, usize, String)> {
        newest_owner(&self.shared(), session).map(|(epoch, name, cause)| (epoch, self.index(&name), cause))
    }
}

/// The newest record of a session's owners, read without any of our code.
pub fn newest_owner(shared: &Path, session: &str) -> Option<(u64, String, String)> {
    let dir = fs::read_dir(shared.join(session).join("owners")).ok()?;
    let names = dir.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let newest = names.filter(|name| !name.starts_with('.')).max()?;
    let text = fs::read_to_string(shared.join(session).join("owners").join(newest)).ok()?;
    let record: serde_json::Value = serde_json::from_str(&text).ok()?;
    let word = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    Some((record["epoch"].as_u64()?, word(&record["owner"]["node"])?, word(&record["cause"]["type"])?))
}

/// What came back of one turn.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// What was streamed.
    pub text: String,
    /// How it ended.
    pub answer: Answer,
    /// Nodes that accepted it.
    pub accepted: Vec<String>,
    /// How often the session was elsewhere.
    pub moved: u32,
}

pub(super) async fn listen(door: &mut Door, mut request: SendRequest, said: &mut Said) -> anyhow::Result<()> {
    request.offset = said.text.len() as u64;
    let mut stream = timeout(LIMIT, door.send(request)).await??.into_inner();
    while let Some(response) = timeout(LIMIT, stream.message()).await?? {
        match response.update.context("an empty update")? {
            Update::Accepted(accepted) => said.accepted.push(accepted.node_id),
            Update::Text(text) => {
                said.text.truncate(text.offset as usize);
                said.text += &text.text;
            }
            Update::Moved(_) => said.moved += 1,
            Update::Answer(answer) => {
                said.answer = answer;
                return Ok(());
            }
        }
    }
    bail!("the stream ended without an answer")
}
