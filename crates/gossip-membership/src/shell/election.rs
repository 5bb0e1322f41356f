//! The election in the daemon: one task owns the state machine of [`crate::core::lease`], carries its messages over connections between
//! nodes, and keeps on disk what it promised.
//!
//! A node takes part when it has an identity and a charter: the file `charter.json` beside the identity, which the login side puts
//! there at launch and replaces when it gives out a new one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drover_proto::gossip as pb;
use drover_proto::gossip::gossip_service_client::GossipServiceClient;
use drover_proto::membership::GetLeaderResponse;
use drover_service::pki::IdentityHandle;
use drover_service::{Context, now_us};
use drover_types::Failure;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tonic::transport::Channel;
use tracing::{info, warn};

use super::handle::Handle;
use super::node::Node;
use super::snapshot::{make_private, replace};
use super::streams::{Dial, Peer, signed};
use crate::core::lease;
use crate::core::lease::{
    Ballot, Charter, Durable, Effect, Guards, Input, Lease, Notary, PeerState, Reply, Request, SignedCharter, Standing,
    Start, Timing,
};
use crate::core::{Command, Engine as _, NodeKey, SignedRecord, State, Time};
use crate::wire;

/// Calls of other nodes that may wait; more are refused, and asked again by themselves.
const CALLS: usize = 64;
/// How long a node that leaves tries to hand over its part.
const GOODBYE: Duration = Duration::from_secs(3);
/// The label by which a leader says in its record that it leads.
const LEADER_LABEL: &str = "drover.leader";
/// Name of the charter beside the identity.
pub(super) const CHARTER: &str = "charter.json";
const LEASE: &str = "lease.json";

/// A question of another node.
struct Call {
    from: NodeKey,
    request: Request,
    answer: oneshot::Sender<Reply>,
}

/// The election, from outside. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Election {
    calls: mpsc::Sender<Call>,
    seen: watch::Receiver<Seen>,
}

/// What the last look at the state machine showed.
#[derive(Debug, Clone, Default)]
struct Seen {
    leader: Option<(NodeKey, Ballot)>,
    /// When the lease ends that makes or shows the leader; `None` when only its record says that it leads.
    until: Option<Instant>,
    voters: Vec<NodeKey>,
    chartered: bool,
}

/// What the task begins with.
pub(super) struct Setup {
    pub(super) me: NodeKey,
    pub(super) boot: u64,
    pub(super) period: Duration,
    pub(super) dir: PathBuf,
    /// File in which the charter is looked for.
    pub(super) charter: PathBuf,
    pub(super) identity: IdentityHandle,
    pub(super) dial: Dial,
}

impl Election {
    /// Starts the task.
    pub(super) fn start(setup: Setup, handle: Handle, ctx: &Context) -> Self {
        let (calls, incoming) = mpsc::channel(CALLS);
        let (tell, seen) = watch::channel(Seen::default());
        ctx.spawn("election", run(setup, handle, incoming, tell, ctx.clone()));
        Self { calls, seen }
    }

    /// Answers a question of another node.
    pub(super) async fn asked(&self, from: NodeKey, message: &[u8]) -> Result<Vec<u8>, tonic::Status> {
        let request =
            wire::decode_request(message).map_err(|error| tonic::Status::invalid_argument(error.to_string()))?;
        let (answer, answered) = oneshot::channel();
        let full = |_| tonic::Status::unavailable("the election has too much to do, or has ended");
        self.calls.try_send(Call { from, request, answer }).map_err(full)?;
        let reply = answered.await.map_err(|_| tonic::Status::unavailable("the election has ended"))?;
        let mut bytes = Vec::new();
        wire::encode_reply(&reply, &mut bytes);
        Ok(bytes)
    }
}

impl Handle {
    /// Who leads, as far as this node knows.
    pub(crate) async fn leader(&self) -> Result<GetLeaderResponse, Failure> {
        let Some(election) = self.shared.election.get() else {
            let reason = "there is no election without an identity of the instance".to_owned();
            return Ok(GetLeaderResponse { reason, ..Default::default() });
        };
        let seen = election.seen.borrow().clone();
        let left = seen.until.map(|until| until.saturating_duration_since(Instant::now()));
        let leader = seen.leader.filter(|_| left != Some(Duration::ZERO));
        let reason = match (leader, seen.chartered) {
            (Some(_), _) => "",
            (None, false) => "this node has no charter of the login side yet",
            (None, true) => "nobody holds a lease of a majority of the voters",
        };
        let mut keys = seen.voters.clone();
        keys.extend(leader.map(|(key, _)| key));
        let names = self.with(move |node| node.names(&keys)).await?;
        let name = |key: &NodeKey| names.get(key).cloned().unwrap_or_else(|| key.to_string());
        Ok(GetLeaderResponse {
            node_id: leader.map(|(key, _)| name(&key)).unwrap_or_default(),
            epoch: leader.map_or(0, |(_, ballot)| ballot.epoch),
            term: leader.map_or(0, |(_, ballot)| ballot.term),
            remaining_ms: left.map_or(0, |left| left.as_millis() as u64),
            reason: reason.to_owned(),
            voters: seen.voters.iter().map(name).collect(),
        })
    }
}

/// What the election takes from the gossip.
struct Electorate {
    peers: Vec<lease::Peer>,
    records: HashMap<NodeKey, Arc<SignedRecord>>,
}

impl Node {
    fn names(&self, keys: &[NodeKey]) -> HashMap<NodeKey, String> {
        let local = self.core.local();
        let name = |key: &NodeKey| {
            let record = if *key == local.key { Some(local) } else { self.core.record(*key) };
            record.map(|record| (*key, record.record.node_id.clone()))
        };
        keys.iter().filter_map(name).collect()
    }

    fn electorate(&self) -> Electorate {
        let mut peers = Vec::new();
        let mut records = HashMap::new();
        for member in self.core.members() {
            let state = match member.state {
                State::Alive => PeerState::Alive,
                State::Suspect => PeerState::Suspect,
                State::Dead => PeerState::Dead,
                State::Left => PeerState::Left,
            };
            let key = member.record.key;
            peers.push(lease::Peer { key, state, region: member.record.record.region.as_str().into() });
            records.insert(key, member.record);
        }
        let local = self.core.local();
        peers.push(lease::Peer {
            key: local.key,
            state: PeerState::Alive,
            region: local.record.region.as_str().into(),
        });
        Electorate { peers, records }
    }

    /// Says in this node's record that it leads, or no longer.
    fn claim_leadership(&mut self, ballot: Option<Ballot>) {
        let mut labels = self.core.local().record.labels.clone();
        match ballot {
            Some(ballot) => labels.insert(LEADER_LABEL.to_owned(), format!("{}.{}", ballot.epoch, ballot.term)),
            None => labels.remove(LEADER_LABEL),
        };
        if labels != self.core.local().record.labels {
            let update = Command::Update { capabilities: None, labels: Some(labels) };
            self.input(crate::core::Input::Command(update));
        }
    }
}

fn claim_of(record: &SignedRecord) -> Option<Ballot> {
    let (epoch, term) = record.record.labels.get(LEADER_LABEL)?.split_once('.')?;
    Some(Ballot { epoch: epoch.parse().ok()?, term: term.parse().ok()? })
}

struct Authority(IdentityHandle);

impl Notary for Authority {
    fn check(&self, signed: &SignedCharter) -> Option<Charter> {
        let identity = self.0.current();
        let cluster = identity.cluster_id();
        identity.trust().authority_keys().find_map(|key| signed.verify(key, &cluster))
    }
}

/// The state machine with its surroundings.
struct Task {
    lease: Lease,
    handle: Handle,
    ctx: Context,
    dial: Dial,
    me: NodeKey,
    period: Duration,
    lease_file: PathBuf,
    charter_file: PathBuf,
    charter_seen: Vec<u8>,
    records: HashMap<NodeKey, Arc<SignedRecord>>,
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
    next_call: u64,
    replies: mpsc::Sender<(NodeKey, Option<Reply>)>,
    /// Connections, with the boot of the node that they lead to.
    clients: HashMap<NodeKey, (u64, GossipServiceClient<Channel>)>,
    tell: watch::Sender<Seen>,
}

/// Never stands still, not even while the machine is suspended: a lease must not outlive what others wait for.
fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    Time(time.tv_sec.cast_unsigned() * 1_000_000 + time.tv_nsec.cast_unsigned() / 1000)
}

async fn run(setup: Setup, handle: Handle, mut calls: mpsc::Receiver<Call>, tell: watch::Sender<Seen>, ctx: Context) {
    let Setup { me, boot, period, dir, charter, identity, dial } = setup;
    let lease_file = dir.join(LEASE);
    let durable = match read_durable(&lease_file) {
        Ok(durable) => durable,
        Err(error) => {
            // Without its memory this node could vote twice: it takes no part.
            let message =
                format!("cannot read {}: {error}; this node takes no part in the election", lease_file.display());
            handle.shared.notes.holds(now_us(), "election", message);
            return;
        }
    };
    let start = Start {
        me,
        boot,
        seat: std::env::var("DROVER_GENERATION").ok().and_then(|text| text.parse().ok()).unwrap_or(1),
        durable,
        timing: Timing::new(period),
        seed: rand::random(),
        notary: Box::new(Authority(identity)),
        guards: Guards::default(),
    };
    let (replies, mut answers) = mpsc::channel(CALLS);
    let mut task = Task {
        lease: Lease::new(start, now()),
        handle,
        ctx: ctx.clone(),
        dial,
        me,
        period,
        lease_file,
        charter_file: charter,
        charter_seen: Vec::new(),
        records: HashMap::new(),
        waiting: HashMap::new(),
        next_call: 0,
        replies,
        clients: HashMap::new(),
        tell,
    };
    let mut looks = tokio::time::interval(period);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut end: Option<Instant> = None;
    loop {
        let (time, here) = (now(), Instant::now());
        let due = task.lease.deadline(time).map_or(here + period, |due| here + due.since(time).min(period));
        let went_on = tokio::select! {
            () = tokio::time::sleep_until(due) => task.input(Input::Timer).await,
            Some(call) = calls.recv() => task.called(call).await,
            Some((from, reply)) = answers.recv() => task.answered(from, reply).await,
            _ = looks.tick() => task.look(end.is_some()).await,
            () = ctx.shutdown().cancelled(), if end.is_none() => {
                end = Some(Instant::now() + GOODBYE);
                task.input(Input::Leave).await
            }
        };
        let gone = task.lease.standing(now()) == Standing::Gone;
        if !went_on || end.is_some_and(|end| gone || Instant::now() >= end) {
            return;
        }
    }
}

impl Task {
    /// Takes what the gossip sees, and a charter when there is a new one.
    async fn look(&mut self, ending: bool) -> bool {
        let file = self.charter_file.clone();
        let read = tokio::task::spawn_blocking(move || std::fs::read(file)).await;
        if let Ok(Ok(bytes)) = read
            && bytes != self.charter_seen
        {
            match serde_json::from_slice::<SignedCharter>(&bytes) {
                Ok(signed) => {
                    if !self.input(Input::Charter(signed)).await {
                        return false;
                    }
                }
                Err(error) => warn!(file = %self.charter_file.display(), %error, "the charter cannot be read"),
            }
            self.charter_seen = bytes;
        }
        if ending {
            return true;
        }
        let Ok(Electorate { peers, records }) = self.handle.with(|node| node.electorate()).await else { return true };
        let claims: Vec<(NodeKey, Ballot)> =
            records.iter().filter_map(|(key, record)| Some((*key, claim_of(record)?))).collect();
        self.records = records;
        for (leader, ballot) in claims {
            if !self.input(Input::Claim { leader, ballot }).await {
                return false;
            }
        }
        self.input(Input::View(peers)).await
    }

    async fn called(&mut self, call: Call) -> bool {
        self.next_call += 1;
        self.waiting.insert(self.next_call, call.answer);
        self.input(Input::Request { call: self.next_call, from: call.from, request: call.request }).await
    }

    /// Lets the state machine know, and carries out what it decides, in that order. False when it cannot go on.
    async fn input(&mut self, input: Input) -> bool {
        let mut effects = Vec::new();
        self.lease.handle(now(), input, &mut effects);
        for effect in effects {
            match effect {
                Effect::Persist(durable) => {
                    if !self.persist(durable).await {
                        return false;
                    }
                }
                Effect::Ask { to, request } => self.ask(to, &request),
                Effect::Answer { call, reply } => {
                    if let Some(answer) = self.waiting.remove(&call) {
                        let _ = answer.send(reply);
                    }
                }
                Effect::Standing(standing) => self.stands(standing),
            }
        }
        self.tell.send_replace(self.seen());
        true
    }

    async fn persist(&mut self, durable: Durable) -> bool {
        let file = self.lease_file.clone();
        let write = move || {
            if let Some(dir) = file.parent() {
                make_private(dir)?;
            }
            replace(&file, &serde_json::to_vec(&durable)?, true)
        };
        let written = tokio::task::spawn_blocking(write).await;
        let Err(error) = written.unwrap_or_else(|error| Err(std::io::Error::other(error))) else { return true };
        // What was to be promised has not been said, and is not said any more by this process.
        let message = format!("cannot write {}: {error}; this node has left the election", self.lease_file.display());
        self.handle.shared.notes.holds(now_us(), "election", message);
        self.tell.send_replace(Seen::default());
        false
    }

    /// Sends a question. The connection stays for the next one, for a new one costs a candidate half a round on a wide-area link;
    /// after a call without an answer a new one is made, for a line that was cut may be slow to notice that it is whole again.
    fn ask(&mut self, to: NodeKey, request: &Request) {
        let Some(record) = self.records.get(&to) else { return };
        let peer = Peer { record: Arc::clone(record), own: self.me };
        let known = self.clients.get(&to).filter(|(boot, _)| *boot == record.record.boot);
        let mut client = known.map_or_else(|| self.dial.client(&peer), |(_, client)| client.clone());
        self.clients.insert(to, (record.record.boot, client.clone()));
        let mut message = Vec::new();
        wire::encode_request(request, &mut message);
        let (replies, limit) = (self.replies.clone(), self.period * 2);
        self.ctx.spawn("election call", async move {
            let call = async {
                let answer = client.lease(signed(peer.own, pb::LeaseRequest { message: message.into() })).await.ok()?;
                wire::decode_reply(&answer.into_inner().message).ok()
            };
            let reply = tokio::time::timeout(limit, call).await.ok().flatten();
            let _ = replies.send((to, reply)).await;
        });
    }

    async fn answered(&mut self, from: NodeKey, reply: Option<Reply>) -> bool {
        let Some(reply) = reply else {
            self.clients.remove(&from);
            return true;
        };
        self.input(Input::Reply { from, reply }).await
    }

    fn stands(&self, standing: Standing) {
        let ballot = match standing {
            Standing::Leads { ballot } => {
                info!(epoch = ballot.epoch, term = ballot.term, "this node leads");
                Some(ballot)
            }
            Standing::Follows { leader, ballot } => {
                info!(epoch = ballot.epoch, term = ballot.term, leader = %leader, "another node leads");
                None
            }
            Standing::Leaderless => {
                info!("nobody leads");
                None
            }
            Standing::Gone => None,
        };
        let handle = self.handle.clone();
        self.ctx.spawn("leader label", async move {
            let _ = handle.with(move |node| node.claim_leadership(ballot)).await;
        });
    }

    fn seen(&self) -> Seen {
        let time = now();
        let ends = || Some(Instant::now() + self.lease.remaining(time));
        let (leader, until) = match self.lease.standing(time) {
            Standing::Leads { ballot } => (Some((self.me, ballot)), ends()),
            Standing::Follows { leader, ballot } => {
                (Some((leader, ballot)), if self.lease.is_voter() { ends() } else { None })
            }
            Standing::Leaderless | Standing::Gone => (None, None),
        };
        let voters = self.lease.voters().voters.iter().map(|voter| voter.key).collect();
        Seen { leader, until, voters, chartered: self.lease.durable().charter.is_some() }
    }
}

fn read_durable(file: &Path) -> std::io::Result<Option<Durable>> {
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
