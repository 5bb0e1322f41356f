//! The one task that owns the core, the link and the socket.

mod asks;
mod bind;
mod credentials;
mod datagrams;
mod effects;
mod look;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_service::pki::{Identity, RING_LABEL};
use drover_service::{Context, now_us};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::info;

use self::bind::{advertised, bind, until};
use self::credentials::Unsigned;
use super::clock::Clock;
use super::election::{self, Election};
use super::handle::{Handle, Job, Phase};
use super::link::{Link, PlainLink};
use super::notes::Notes;
use super::socket::Socket;
use super::streams::{Dial, Ended};
use super::{seeds, snapshot};
use crate::core::regions::{Regional, WideTiming};
use crate::core::{
    Command, Core, Effect, Engine as _, Input, NodeKey, Record, Reply, SignedRecord, Signer, Snapshot, Time, Verifier,
};
use crate::metrics::Metrics;
use crate::seal::{BootSecrets, Certified, Moment, NodeSigner, Sealer};
use crate::settings::Settings;

pub(crate) use self::bind::without_node;
pub(crate) use self::credentials::Credentials;

/// Version of the protocol, as `members` shows it.
const PROTOCOL: u16 = 1;
/// Requests of ours over connections that may be under way at a time.
const STREAMS: usize = 32;
/// How long the good-bye may take when the daemon is told to stop.
const GOODBYE: Duration = Duration::from_secs(2);

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
    /// By what records of others are believed.
    certified: Option<Certified>,
    /// A newer key ring is being fetched.
    pub(super) fetching: bool,
    settings: Settings,
    /// Newest record of every node that the core knows.
    peers: HashMap<NodeKey, Arc<SignedRecord>>,
    /// What became of requests of ours over connections.
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
            () = sleep.as_mut() => {
                node.input(Input::Timer);
                node.dial.let_go();
            }
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
        let (signer, verifier): (Box<dyn Signer>, Box<dyn Verifier>) = match (&credentials, &certified) {
            (Credentials::Certified(handle), Some(certified)) => {
                (Box::new(NodeSigner::new(handle.clone())), Box::new(certified.clone()))
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
        let link = match (identity, certified.clone()) {
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
            certified,
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
            charter: self.settings.charter.clone().unwrap_or_else(|| identity_dir.join(election::CHARTER)),
            identity: identity.clone(),
            dial: self.dial.clone(),
        };
        let election = Election::start(setup, self.handle.clone(), &self.ctx);
        let _ = self.handle.shared.election.set(election);
    }

    /// Another identity is in force: this node's record shows its certificate from now on, and others are believed by what it trusts.
    pub(crate) fn renew_identity(&mut self, identity: &Arc<Identity>) {
        if let Some(certified) = &self.certified {
            certified.renew(identity);
        }
        if let Some(sealer) = self.link.sealer_mut() {
            sealer.renew(Arc::clone(identity));
        }
        self.dial.hang_up(None);
        self.input(Input::Command(Command::Recheck));
        if *self.core.local().cert != *identity.cert() {
            self.update(None, None);
        }
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

    pub(super) fn now(&self) -> Time {
        self.clock.now()
    }

    fn moment(&self) -> Moment {
        Moment { now: self.clock.now(), unix_us: now_us() }
    }
}
