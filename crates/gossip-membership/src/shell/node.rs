//! The one task that owns the core, the link and the socket.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_proto::membership::{GetStatusResponse, Member};
use drover_service::pki::{IdentityHandle, RING_LABEL};
use drover_service::{Context, now_us};
use drover_types::{ErrorCode, Failure};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info};

use super::clock::Clock;
use super::election::{self, Election};
use super::handle::{Change, Handle, Job, MetadataChange, Phase};
use super::link::{Link, PlainLink};
use super::notes::Notes;
use super::socket::{BindError, MAX_DATAGRAM, Socket, address_towards};
use super::streams::{self, Dial, Ended, Peer};
use super::view::{self, Seen};
use super::{seeds, snapshot};
use crate::core::placement::{Item, Slot, rank};
use crate::core::regions::{Regional, WideTiming};
use crate::core::{
    Cause, Command, Core, Effect, Engine as _, Event, Input, Load, NodeKey, Note, Outcome, Record, Reply, Request,
    SignedRecord, Signer, Snapshot, State, Time, Untrusted, Verifier,
};
use crate::events::Kind;
use crate::load::Report;
use crate::metrics::Metrics;
use crate::seal::{BootSecrets, Certified, Moment, NodeSigner, Opened, Refusal, Sealer};
use crate::settings::Settings;
use crate::wire;

/// Version of the protocol, as `members` shows it.
const PROTOCOL: u16 = 1;
/// Requests of ours over connections that may be under way at a time.
const STREAMS: usize = 32;
/// Addresses whose answer to a hello is remembered.
const ANSWERED: usize = 256;
/// How long the good-bye may take when the daemon is told to stop.
const GOODBYE: Duration = Duration::from_secs(2);
/// A socket that cannot be bound is tried again after a pause of these bounds.
const BIND_AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Clocks that differ by more are worth a word.
const SKEW_US: i64 = 60_000_000;

/// Who this node is, and by what it proves it.
pub(crate) enum Credentials {
    /// By nothing.
    Plain,
    /// By a certificate of the instance.
    Certified(IdentityHandle),
}

impl Credentials {
    /// Names the cluster, shortly.
    fn cluster(&self) -> String {
        match self {
            Self::Plain => String::new(),
            Self::Certified(identity) => {
                let [a, b, c, d, ..] = identity.current().cluster_id();
                format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
            }
        }
    }
}

/// Everything that the node starts from.
pub(crate) struct Start {
    pub(crate) node_id: String,
    pub(crate) settings: Settings,
    pub(crate) credentials: Credentials,
    pub(crate) dial: Dial,
    /// Port of gRPC.
    pub(crate) rpc_port: u16,
}

/// A node that runs.
pub(crate) struct Node {
    pub(super) handle: Handle,
    pub(super) ctx: Context,
    clock: Clock,
    pub(super) core: Regional<Core>,
    pub(super) link: Link,
    socket: Socket,
    pub(super) dial: Dial,
    pub(super) credentials: Credentials,
    /// A newer key ring is being fetched.
    pub(super) fetching: bool,
    settings: Settings,
    /// Newest record of every node that the core knows.
    peers: HashMap<NodeKey, Arc<SignedRecord>>,
    /// Loads of others; the core tells them as events.
    ended: mpsc::Sender<(u32, Ended, NodeKey)>,
    running: usize,
    replies: HashMap<u64, oneshot::Sender<Reply>>,
    next_reply: u64,
    writer: snapshot::Writer,
    refused: BTreeMap<&'static str, u64>,
    pauses: u64,
    /// Configured seeds, by address: only of these it is worth saying that they are silent.
    seeds: Vec<SocketAddr>,
    effects: Vec<Effect>,
    plain: Vec<u8>,
    sealed: Vec<u8>,
}

/// Serves jobs, with a node as soon as there is one, until the daemon stops.
pub(crate) async fn run(start: Start, handle: Handle, mut jobs: mpsc::Receiver<Job>, ctx: Context) {
    let Some(socket) = bind(&start.settings, &handle, &mut jobs, &ctx).await else { return };
    let (ended, mut outcomes) = mpsc::channel(STREAMS);
    let mut node = match Node::new(start, handle, socket, ended, &ctx) {
        Ok(node) => node,
        Err(error) => return ctx.fail(error),
    };
    node.begin();
    node.join_election();
    let sleep = tokio::time::sleep_until(Instant::now());
    tokio::pin!(sleep);
    let mut good_bye: Option<Instant> = None;
    loop {
        let due = node.clock.instant(node.core.deadline());
        if sleep.deadline() != due {
            sleep.as_mut().reset(due);
        }
        tokio::select! {
            readable = node.socket.readable() => if readable.is_ok() { node.receive() },
            () = sleep.as_mut() => node.input(Input::Timer),
            job = jobs.recv() => match job {
                Some(job) => job(Some(&mut node)),
                None => return,
            },
            Some((id, ended, peer)) = outcomes.recv() => node.stream_ended(id, ended, peer),
            () = ctx.shutdown().cancelled(), if good_bye.is_none() => {
                good_bye = Some(Instant::now() + GOODBYE);
                node.leave();
            }
            () = until(good_bye) => return,
        }
        if good_bye.is_some() && node.has_left() {
            return;
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Tries until the socket is there. Meanwhile jobs are told that there is no node.
async fn bind(settings: &Settings, handle: &Handle, jobs: &mut mpsc::Receiver<Job>, ctx: &Context) -> Option<Socket> {
    let default = drover_config::SwarmConfig::DEFAULT_BIND_PORT;
    let wanted = SocketAddr::new(settings.bind_addr, settings.bind_port.unwrap_or(default));
    let (mut pause, longest) = BIND_AGAIN;
    loop {
        let error = match Socket::bind(wanted, settings.bind_port.is_some(), &handle.shared.metrics) {
            Ok(socket) => {
                handle.shared.notes.over("cannot_bind");
                return Some(socket);
            }
            Err(error) => error,
        };
        let what = match error {
            BindError::Taken(addr) => format!("the gossip cannot bind UDP {addr}: another program has it"),
            BindError::Other(..) => format!("the gossip cannot bind: {error}"),
        };
        handle.shared.notes.holds(now_us(), "cannot_bind", what);
        let again = Instant::now() + pause;
        pause = (pause * 2).min(longest);
        if !jobs_without_node(Some(again), jobs, ctx).await {
            return None;
        }
    }
}

/// Answers jobs without a node until the daemon stops.
pub(crate) async fn without_node(jobs: &mut mpsc::Receiver<Job>, ctx: &Context) {
    jobs_without_node(None, jobs, ctx).await;
}

/// Answers jobs without a node, up to a moment or for ever; false when the daemon stops.
async fn jobs_without_node(end: Option<Instant>, jobs: &mut mpsc::Receiver<Job>, ctx: &Context) -> bool {
    loop {
        tokio::select! {
            () = ctx.shutdown().cancelled() => return false,
            () = until(end) => return true,
            job = jobs.recv() => match job {
                Some(job) => job(None),
                None => return false,
            },
        }
    }
}

/// Signs nothing: for networks whose nodes believe each other.
struct Unsigned;

impl Signer for Unsigned {
    fn sign(&mut self, record: Record) -> SignedRecord {
        // Records of members always have a certificate; this one is none.
        SignedRecord::new(record, [0; 64], Arc::from(*b"-"))
    }
}

impl Verifier for Unsigned {
    fn check(&mut self, _: &SignedRecord) -> Result<(), Untrusted> {
        Ok(())
    }
}

impl Node {
    fn new(
        start: Start,
        handle: Handle,
        socket: Socket,
        ended: mpsc::Sender<(u32, Ended, NodeKey)>,
        ctx: &Context,
    ) -> anyhow::Result<Self> {
        let Start { node_id, settings, credentials, dial, rpc_port } = start;
        let clock = Clock::start();
        let path = settings.dir.join("snapshot.json");
        let last = snapshot::read(&path, &node_id);
        let addr = SocketAddr::new(advertised(&settings, &socket)?, socket.addr().port());
        let mut labels = settings.labels.clone();
        let identity = match &credentials {
            Credentials::Plain => None,
            Credentials::Certified(handle) => {
                Some((handle.current(), BootSecrets::generate().context("no random numbers")?))
            }
        };
        if let Some((identity, _)) = &identity {
            labels.insert(RING_LABEL.to_owned(), identity.ring().summary().to_string());
        }
        let record = Record {
            boot: Snapshot::next_boot(last.as_ref(), now_us()),
            node_id: node_id.clone(),
            incarnation: 1,
            addr,
            rpc_port,
            protocol: PROTOCOL,
            region: settings.region.clone(),
            capabilities: settings.capabilities.clone(),
            labels,
            dh_public: identity.as_ref().map_or([0; 32], |(_, secrets)| secrets.dh_public()),
            leaving: false,
            timestamp_us: now_us(),
        };
        let certified =
            identity.as_ref().map(|(identity, _)| Certified::new(identity, Arc::new(|| now_us() / 1_000_000)));
        let (signer, verifier): (Box<dyn Signer>, Box<dyn Verifier>) = match (&identity, &certified) {
            (Some((identity, _)), Some(certified)) => {
                (Box::new(NodeSigner::new(Arc::clone(identity))), Box::new(certified.clone()))
            }
            _ => (Box::new(Unsigned), Box::new(Unsigned)),
        };
        let timing = crate::core::Settings {
            gossip_interval: settings.gossip_interval,
            node_timeout: settings.node_timeout,
            dead_node_timeout: settings.dead_node_timeout,
            push_pull_interval: settings.push_pull_interval,
            ..crate::core::Settings::default()
        };
        let known: Vec<SocketAddr> = last.iter().flat_map(|last| last.members.iter().map(|(_, addr)| *addr)).collect();
        let core = Core::new(clock.now(), timing, record, known.clone(), signer, verifier, rand::random())
            .context("this node's own record cannot be made")?;
        let judge: Box<dyn Verifier> = match &certified {
            Some(certified) => Box::new(certified.clone()),
            None => Box::new(Unsigned),
        };
        let wide = WideTiming::new(settings.gossip_interval, settings.dead_node_timeout);
        let core = Regional::new(core, wide, judge, rand::random());
        let own = Arc::clone(core.local());
        let link = match (identity, certified) {
            // Nodes with an identity may still gossip in the clear, when that is asked for.
            (Some((identity, secrets)), Some(certified)) if !settings.plaintext => {
                let ring = identity.ring().clone();
                Link::Sealed(Box::new(Sealer::new(identity, certified, ring, secrets, own)))
            }
            _ => Link::Plain(PlainLink::new(own)),
        };
        let shared = &handle.shared;
        info!(node_id, gossip = %socket.addr(), advertised = %addr, sealed = link.sealer().is_some(), known = known.len(), "gossip bound");
        handle.set_phase(if settings.seeds.is_empty() && known.is_empty() { Phase::Alone } else { Phase::Joining });
        Ok(Self {
            writer: snapshot::Writer::new(path, &node_id, ctx, &shared.notes, &shared.metrics),
            handle,
            ctx: ctx.clone(),
            clock,
            core,
            link,
            socket,
            dial,
            credentials,
            fetching: false,
            settings,
            peers: HashMap::new(),
            ended,
            running: 0,
            replies: HashMap::new(),
            next_reply: 0,
            refused: BTreeMap::new(),
            pauses: 0,
            seeds: Vec::new(),
            effects: Vec::new(),
            plain: Vec::new(),
            sealed: Vec::new(),
        })
    }

    fn begin(&mut self) {
        self.input(Input::Timer);
        self.count();
        let (addrs, names): (Vec<String>, Vec<String>) =
            self.settings.seeds.iter().cloned().partition(|seed| seed.parse::<SocketAddr>().is_ok());
        self.join(addrs.iter().filter_map(|addr| addr.parse().ok()).collect());
        if !names.is_empty() {
            self.ctx.spawn("seeds", seeds::resolve(self.handle.clone(), names, self.ctx.clone()));
        }
    }

    /// Takes part in the election, if others can know that it is this node that speaks.
    fn join_election(&self) {
        let (Credentials::Certified(identity), Some(identity_dir)) = (&self.credentials, &self.settings.identity)
        else {
            return;
        };
        let local = self.core.local();
        let setup = election::Setup {
            me: local.key,
            boot: local.record.boot,
            period: self.settings.gossip_interval,
            dir: self.settings.dir.clone(),
            identity_dir: identity_dir.clone(),
            identity: identity.clone(),
            dial: self.dial.clone(),
        };
        let election = Election::start(setup, self.handle.clone(), &self.ctx);
        let _ = self.handle.shared.election.set(election);
    }

    pub(super) fn notes(&self) -> &Notes {
        &self.handle.shared.notes
    }

    fn metrics(&self) -> &Metrics {
        &self.handle.shared.metrics
    }

    /// Lets the core know, and carries out what it decides.
    pub(super) fn input(&mut self, input: Input) {
        let now = self.clock.now();
        let mut effects = std::mem::take(&mut self.effects);
        self.core.handle(now, input, &mut effects);
        for effect in effects.drain(..) {
            self.perform(now, effect);
        }
        self.effects = effects;
    }

    fn receive(&mut self) {
        // What comes is opened while the socket is read; the core's turn is after each datagram.
        let mut batch = Vec::new();
        self.socket.drain(|from, datagram| batch.push((from, datagram.to_vec())));
        for (from, datagram) in batch {
            self.datagram(from, &datagram);
        }
    }

    fn datagram(&mut self, from: SocketAddr, datagram: &[u8]) {
        if datagram.len() > MAX_DATAGRAM {
            return self.refused_here(Refusal::Oversized, from);
        }
        let mut plain = std::mem::take(&mut self.plain);
        match self.link.open(self.moment(), from, datagram, &mut plain) {
            Ok(Opened::Message(key)) => match wire::decode(&plain) {
                Ok(message) => self.input(Input::Datagram { from: key, message }),
                Err(_) => self.refused_here(Refusal::Malformed, from),
            },
            Ok(Opened::Contact { record, answer }) => {
                if answer {
                    self.socket.send(from, &plain);
                }
                self.contact(from, record);
            }
            Ok(Opened::Answer) => self.socket.send(from, &plain),
            Ok(Opened::Hint(why)) => self.refused_there(why, from),
            Err(why) => {
                if !plain.is_empty() {
                    self.socket.send(from, &plain);
                }
                self.refused_here(why, from);
            }
        }
        self.plain = plain;
    }

    pub(super) fn now(&self) -> Time {
        self.clock.now()
    }

    fn moment(&self) -> Moment {
        Moment { now: self.clock.now(), unix_us: now_us() }
    }

    fn contact(&mut self, from: SocketAddr, record: Arc<SignedRecord>) {
        self.notes().over("seed_unreachable");
        self.handle.shared.answered.send_if_modified(|all| {
            let fresh = !all.contains(&from);
            if fresh {
                if all.len() == ANSWERED {
                    all.remove(0);
                }
                all.push(from);
            }
            fresh
        });
        self.input(Input::Contact { record });
    }

    fn count_refusal(&mut self, reason: &'static str) {
        *self.refused.entry(reason).or_default() += 1;
        self.metrics().refuse(reason);
    }

    /// A datagram was dropped.
    fn refused_here(&mut self, why: Refusal, from: SocketAddr) {
        self.count_refusal(why.code());
        debug!(reason = why.code(), %from, "datagram dropped");
        let code = match why {
            Refusal::UnknownKey => "wrong_key",
            Refusal::WrongCluster => "wrong_cluster",
            Refusal::BadCert | Refusal::ForeignName => "bad_certificate",
            Refusal::ExpiredCert | Refusal::Future => "clock_off",
            Refusal::Plaintext => "plaintext_peer",
            _ => return,
        };
        self.notes().notice(now_us(), code, format!("a datagram of {from} was dropped: {why}"));
    }

    /// Another node says that it dropped one of ours.
    fn refused_there(&self, why: Refusal, from: SocketAddr) {
        let code = match why {
            Refusal::UnknownKey => "wrong_key",
            Refusal::WrongCluster => "wrong_cluster",
            Refusal::BadCert | Refusal::ForeignName => "bad_certificate",
            Refusal::ExpiredCert | Refusal::Future => "clock_off",
            // A node that has just started knows nobody yet.
            _ => return,
        };
        self.notes().notice(now_us(), code, format!("{from} drops what this node sends: {why}"));
    }

    fn perform(&mut self, now: Time, effect: Effect) {
        match effect {
            Effect::Send { to, message } => self.send(to, &message),
            Effect::Hello { addr } => {
                let mut sealed = std::mem::take(&mut self.sealed);
                self.link.hello(self.moment(), addr, &mut sealed);
                if !sealed.is_empty() {
                    self.socket.send(addr, &sealed);
                }
                self.sealed = sealed;
            }
            Effect::Stream { id, to, request } => self.stream(id, to, request),
            Effect::Reply { id, reply } => {
                if let Some(tell) = self.replies.remove(&id) {
                    let _ = tell.send(reply);
                }
            }
            Effect::Learn(record) => {
                self.link.learn(&record);
                self.look_for_ring(&record);
                self.peers.insert(record.key, record);
            }
            Effect::Forget(key) => {
                self.link.forget(key);
                if let Some(record) = self.peers.remove(&key) {
                    self.tell(|| Change::Removed(record.record.node_id.clone()));
                }
                self.count();
            }
            Effect::Local(record) => {
                self.link.local(&record);
                self.tell_local(now);
            }
            Effect::Event(event) => self.event(now, &event),
            Effect::Persist => self.writer.put(self.core.snapshot()),
            Effect::LeaveDone => self.handle.set_phase(Phase::Left),
            Effect::Note(note) => self.note(&note),
        }
    }

    fn send(&mut self, to: NodeKey, message: &crate::core::Message) {
        let Some(addr) = self.peers.get(&to).map(|record| record.record.addr) else { return };
        let (mut plain, mut sealed) = (std::mem::take(&mut self.plain), std::mem::take(&mut self.sealed));
        plain.clear();
        wire::encode(message, &mut plain);
        self.link.seal(to, &plain, &mut sealed);
        if !sealed.is_empty() {
            self.socket.send(addr, &sealed);
        }
        (self.plain, self.sealed) = (plain, sealed);
    }

    fn stream(&mut self, id: u32, to: NodeKey, request: Request) {
        let kind = match request {
            Request::Pull(_) => "pull",
            Request::Push(_) => "push",
            Request::Ping => "ping",
        };
        let peer = self.peer(to);
        let (Some(peer), true) = (peer, self.running < STREAMS) else {
            return self.fail_stream(id);
        };
        self.running += 1;
        self.metrics().stream(kind);
        let (dial, tell, ping) = (self.dial.clone(), self.ended.clone(), self.settings.gossip_interval);
        self.ctx.spawn("exchange", async move {
            let ended = streams::ask(dial, peer, request, ping).await;
            // There is a place for each that may be under way.
            let _ = tell.try_send((id, ended, to));
        });
    }

    /// The outcome comes with the next turn, never while the core is still speaking.
    fn fail_stream(&self, id: u32) {
        let (tell, key) = (self.ended.clone(), NodeKey::default());
        let ended = Ended { outcome: Outcome::Silent, skew_us: None, why: None };
        self.ctx.spawn("exchange", async move {
            let _ = tell.send((id, ended, key)).await;
        });
    }

    fn stream_ended(&mut self, id: u32, ended: Ended, peer: NodeKey) {
        if peer != NodeKey::default() {
            self.running = self.running.saturating_sub(1);
        }
        let name = self.peers.get(&peer).map(|record| record.record.node_id.clone()).unwrap_or_default();
        if let Some(why) = &ended.why {
            self.metrics().stream("failed");
            debug!(node_id = name, why, "exchange over a connection came to nothing");
        }
        if let Some(skew) = ended.skew_us {
            self.handle.compare_clocks(&name, skew);
        }
        self.input(Input::StreamEnded { id, outcome: ended.outcome });
    }

    fn event(&mut self, now: Time, event: &Event) {
        let load_of = |node: &Self, key| node.seen(key).and_then(|seen| seen.load).unwrap_or_default();
        let (kind, key) = match event {
            Event::Joined(record) => {
                self.handle.set_phase(Phase::Joined);
                (Some(Kind::NodeJoined(view::info(&record.record, load_of(self, record.key)))), record.key)
            }
            Event::Left { record, cause } => {
                let cause = match cause {
                    Cause::Dead => "it did not answer",
                    Cause::Left => "it said good-bye",
                    Cause::Restarted => "it was started again",
                };
                info!(node_id = record.record.node_id, cause, "node is gone");
                (Some(Kind::NodeLeft(record.record.node_id.clone())), record.key)
            }
            Event::Suspect(record) => (Some(Kind::NodeSuspect(record.record.node_id.clone())), record.key),
            Event::Alive(record) => {
                (Some(Kind::NodeAlive(view::info(&record.record, load_of(self, record.key)))), record.key)
            }
            Event::Updated(record) => (None, record.key),
            Event::Load { key, .. } => (None, *key),
        };
        if let Some(kind) = kind {
            self.handle.shared.events.publish(now_us(), kind);
            self.count();
        }
        if let (Some(record), Some(seen)) = (self.core.record(key).cloned(), self.seen(key)) {
            self.tell(|| Change::Changed(Box::new(view::member(&record.record, seen, now))));
        }
    }

    fn note(&mut self, note: &Note) {
        let now = now_us();
        match *note {
            Note::SeedSilent { addr, attempts } if self.seeds.contains(&addr) => {
                let message = format!("seed {addr} does not answer, tried {attempts} times");
                self.notes().notice(now, "seed_unreachable", message);
            }
            Note::SeedSilent { addr, .. } => debug!(%addr, "a node of the last run does not answer"),
            Note::OwnPause(lag) => {
                self.pauses += 1;
                self.metrics().own_pauses.inc();
                info!(?lag, "this process did not run for a while; nobody is given up for that time");
            }
            Note::Refuted { incarnation, accuser } => {
                info!(incarnation, %accuser, "this node was thought to be dead and has said that it is not");
            }
            Note::Rival { addr } => {
                let message = format!("another process at {addr} runs under the name of this node");
                self.notes().notice(now, "name_taken", message);
            }
            Note::Untrusted { key, reason } => {
                self.count_refusal("untrusted");
                let code = if reason == Untrusted::ExpiredCert { "clock_off" } else { "bad_certificate" };
                self.notes().notice(now, code, format!("a record of node {key} is not believed: {reason}"));
            }
            Note::StrangerAccused { .. } => {
                self.count_refusal("stranger");
            }
            Note::UpdateRefused(error) => tracing::warn!(%error, "metadata was not changed"),
            Note::Exchanged { with, news } => debug!(%with, news, "state exchanged"),
            Note::ProbeFailed { target, refused } => debug!(%target, refused, "no answer to a probe"),
            Note::Health(score) => {
                self.metrics().local_health.set(i64::from(score));
                debug!(score, "health of this node");
            }
        }
    }

    fn seen(&self, key: NodeKey) -> Option<Seen> {
        if key == self.core.local().key {
            return Some(self.seen_local());
        }
        // The core has no look-up by key beside the record; a change is rare enough to go through all.
        self.core.members().find(|member| member.record.key == key).map(|member| Seen {
            state: member.state,
            since: member.since,
            load: member.heard.map(|_| member.load),
            local: false,
        })
    }

    fn seen_local(&self) -> Seen {
        let report = &self.handle.load().report;
        let load = Load { score: Load::score_of(report.score), overloaded: report.overloaded, seq: 0 };
        let state = if self.core.local().record.leaving { State::Left } else { State::Alive };
        Seen { state, since: Time::ZERO, load: Some(load), local: true }
    }

    fn tell(&self, change: impl FnOnce() -> Change) {
        let changes = &self.handle.shared.changes;
        if changes.receiver_count() > 0 {
            let _ = changes.send(Arc::new(change()));
        }
    }

    fn tell_local(&self, now: Time) {
        self.tell(|| Change::Changed(Box::new(view::member(&self.core.local().record, self.seen_local(), now))));
    }

    fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        let states = self.core.members().map(|member| member.state).chain([self.seen_local().state]);
        for state in states {
            let name = match state {
                State::Alive => "alive",
                State::Suspect => "suspect",
                State::Dead => "dead",
                State::Left => "left",
            };
            *counts.entry(name).or_default() += 1;
        }
        counts
    }

    fn count(&self) {
        self.metrics().members(&self.counts());
    }

    pub(super) fn key(&self) -> NodeKey {
        self.core.local().key
    }

    pub(super) fn status(&self) -> GetStatusResponse {
        let counts = self.counts();
        let count = |state| counts.get(state).copied().unwrap_or_default() as u32;
        GetStatusResponse {
            node_id: self.core.local().record.node_id.clone(),
            gossip_addr: self.socket.addr().to_string(),
            advertised_addr: self.core.local().record.addr.to_string(),
            cluster: self.credentials.cluster(),
            alive: count("alive"),
            suspect: count("suspect"),
            dead: count("dead"),
            left: count("left"),
            refused: self.refused.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
            sealed: self.link.sealer().is_some(),
            local_health: u32::from(self.core.inner().health()),
            own_pauses: self.pauses,
            ..GetStatusResponse::default()
        }
    }

    pub(super) fn members(&self) -> Vec<Member> {
        let now = self.clock.now();
        let mut members = vec![view::member(&self.core.local().record, self.seen_local(), now)];
        members.extend(self.core.members().map(|member| {
            let seen = Seen {
                state: member.state,
                since: member.since,
                load: member.heard.map(|_| member.load),
                local: false,
            };
            view::member(&member.record.record, seen, now)
        }));
        members.sort_by(|a, b| a.node_id.cmp(&b.node_id));
        members
    }

    pub(super) fn join(&mut self, addrs: Vec<SocketAddr>) {
        let own = self.core.local().record.addr;
        let addrs: Vec<SocketAddr> = addrs.into_iter().filter(|addr| *addr != own).collect();
        if addrs.is_empty() {
            return;
        }
        for addr in &addrs {
            if !self.seeds.contains(addr) {
                self.seeds.push(*addr);
            }
        }
        self.handle.shared.phase.send_if_modified(|phase| {
            let alone = *phase == Phase::Alone;
            if alone {
                *phase = Phase::Joining;
            }
            alone
        });
        self.input(Input::Command(Command::Join(addrs)));
    }

    /// Begins to leave; gives how many others are told.
    pub(super) fn leave(&mut self) -> u32 {
        let told = self.core.members().filter(|member| member.state.is_up()).count();
        self.input(Input::Command(Command::Leave));
        told as u32
    }

    fn has_left(&self) -> bool {
        *self.handle.shared.phase.borrow() == Phase::Left
    }

    pub(super) fn update_metadata(&mut self, change: MetadataChange) -> Result<u32, Failure> {
        let ours = |key: &&String| key.starts_with("drover.");
        let named = change.set_labels.keys().chain(change.set_capabilities.keys()).chain(&change.remove_labels);
        if let Some(key) = named.clone().find(ours) {
            let message =
                format!("{key:?} belongs to drover itself: choose a key that does not begin with \"drover.\"");
            return Err(Failure::new(ErrorCode::InvalidRequest, message));
        }
        let local = &self.core.local().record;
        let (mut labels, mut capabilities) = (local.labels.clone(), local.capabilities.clone());
        for (map, set, remove) in [
            (&mut labels, change.set_labels, change.remove_labels),
            (&mut capabilities, change.set_capabilities, change.remove_capabilities),
        ] {
            map.retain(|key, _| !remove.contains(key));
            map.extend(set);
        }
        // The core would refuse the same, and only note it.
        let candidate = Record { labels: labels.clone(), capabilities: capabilities.clone(), ..local.clone() };
        candidate.encode().map_err(|error| Failure::new(ErrorCode::InvalidRequest, error.to_string()))?;
        self.input(Input::Command(Command::Update { capabilities: Some(capabilities), labels: Some(labels) }));
        Ok(self.core.local().record.incarnation)
    }

    pub(super) fn peer(&self, key: NodeKey) -> Option<Peer> {
        Some(Peer { record: Arc::clone(self.peers.get(&key)?), own: self.core.local().key })
    }

    pub(super) fn load(&mut self, report: &Report) {
        let load = Load { score: Load::score_of(report.score), overloaded: report.overloaded, seq: 0 };
        self.input(Input::Command(Command::Load(load)));
        self.tell_local(self.clock.now());
    }

    /// Another node asks over a connection; the answer comes through the receiver.
    pub(super) fn asked(&mut self, from: NodeKey, request: Request) -> oneshot::Receiver<Reply> {
        let (tell, told) = oneshot::channel();
        self.next_reply += 1;
        let id = self.next_reply;
        self.replies.insert(id, tell);
        self.input(Input::StreamAsked { id, from, request });
        // Answered in the same call, or never.
        self.replies.remove(&id);
        told
    }

    pub(super) fn place(&self, key: &str, count: usize, swarm: &str) -> Vec<String> {
        let local = self.core.local();
        let others = self.core.members().filter(|member| member.state == State::Alive).map(|member| member.record);
        let here = (!local.record.leaving).then(|| Arc::clone(local));
        let fitting: BTreeMap<NodeKey, Arc<SignedRecord>> = others
            .chain(here)
            .filter(|record| swarm.is_empty() || record.record.labels.get("swarm_id").is_some_and(|id| id == swarm))
            .map(|record| (record.key, record))
            .collect();
        let ranked = rank(Item::new("key", key), fitting.keys().copied().map(Slot::even));
        ranked.iter().take(count).filter_map(|key| Some(fitting.get(key)?.record.node_id.clone())).collect()
    }
}

impl Handle {
    /// Says so when the clock of another node differs from ours by much; `skew_us` is theirs minus ours.
    pub(crate) fn compare_clocks(&self, node_id: &str, skew_us: i64) {
        if skew_us.abs() <= SKEW_US {
            return;
        }
        let (by, how) = (skew_us.unsigned_abs() / 1_000_000, if skew_us > 0 { "ahead of" } else { "behind" });
        let message = format!("the clock of {node_id} is {by} s {how} this node's");
        self.shared.notes.notice(now_us(), "clock_off", message);
    }
}

/// The address that the others are told.
fn advertised(settings: &Settings, socket: &Socket) -> anyhow::Result<std::net::IpAddr> {
    let bound = socket.addr().ip();
    if let Some(addr) = settings.advertise_addr {
        return Ok(addr);
    }
    if !bound.is_unspecified() {
        return Ok(bound);
    }
    let any: SocketAddr =
        if bound.is_ipv4() { ([192, 0, 2, 1], 9).into() } else { ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 9).into() };
    let seed = settings.seeds.iter().find_map(|seed| seed.parse().ok()).unwrap_or(any);
    address_towards(seed).context("set swarm.advertise_addr: the address that others reach this node at is not clear")
}
