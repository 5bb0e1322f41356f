//! What the rest of the daemon holds of the node: it asks, and hears of changes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use drover_proto::membership::{GetStatusResponse, LoadReport, Member, RingKey};
use drover_types::{ErrorCode, Failure};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::election::Election;
use super::node::Node;
use super::notes::{Note, Notes};
use crate::core::{NodeKey, Reply, Request};
use crate::events::Dispatcher;
use crate::load::machine::Limits;
use crate::load::{Monitor, Report, Usage};
use crate::metrics::Metrics;

/// Jobs that may wait for the node; whoever brings more waits itself.
const JOBS: usize = 64;
/// Programs of this node that count sessions.
const MOST_REPORTERS: usize = 8;
/// Changes that a slow reader may be behind.
const CHANGES: usize = 256;

/// Something for the node to do between two datagrams; nothing in it may wait. `None` when there is no node.
pub(super) type Job = Box<dyn FnOnce(Option<&mut Node>) + Send>;

/// A change of the view.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// A member is new or has changed.
    Changed(Box<Member>),
    /// A member is forgotten.
    Removed(String),
}

/// Changes of what the node says of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct MetadataChange {
    pub(crate) set_labels: BTreeMap<String, String>,
    pub(crate) remove_labels: Vec<String>,
    pub(crate) set_capabilities: BTreeMap<String, String>,
    pub(crate) remove_capabilities: Vec<String>,
}

/// How far the node has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// `swarm.enabled` is false.
    Disabled,
    /// No socket yet, or no identity.
    Unbound,
    /// Asking the seeds.
    Joining,
    /// Knows others, or was known by them.
    Joined,
    /// Has no seeds and knows nobody.
    Alone,
    /// Has left.
    Left,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Unbound => "unbound",
            Self::Joining => "joining",
            Self::Joined => "joined",
            Self::Alone => "alone",
            Self::Left => "left",
        }
    }
}

/// The load of this node, measured and reported.
#[derive(Debug)]
pub(super) struct LoadState {
    /// Sessions by who counts them.
    pub(super) reports: BTreeMap<String, u32>,
    pub(super) monitor: Monitor,
    pub(super) report: Report,
    pub(super) limits: Limits,
    pub(super) measured: bool,
}

pub(super) struct Shared {
    pub(super) jobs: mpsc::Sender<Job>,
    pub(super) changes: broadcast::Sender<Arc<Change>>,
    /// Addresses that have answered a hello.
    pub(super) answered: watch::Sender<Vec<SocketAddr>>,
    pub(super) notes: Notes,
    pub(super) events: Dispatcher,
    pub(super) metrics: Metrics,
    pub(super) load: Mutex<LoadState>,
    pub(super) phase: watch::Sender<Phase>,
    /// Set once the node takes part in the election.
    pub(super) election: OnceLock<Election>,
}

/// The node, from outside. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(super) shared: Arc<Shared>,
}

impl Handle {
    /// A handle, and the end that the node works off.
    pub(crate) fn new(
        notes: Notes,
        events: Dispatcher,
        metrics: Metrics,
        monitor: Monitor,
        measured: bool,
    ) -> (Self, mpsc::Receiver<Job>) {
        let (jobs, work) = mpsc::channel(JOBS);
        let load = LoadState {
            reports: BTreeMap::new(),
            monitor,
            report: Report::default(),
            limits: Limits::default(),
            measured,
        };
        let shared = Shared {
            jobs,
            changes: broadcast::Sender::new(CHANGES),
            answered: watch::Sender::new(Vec::new()),
            notes,
            events,
            metrics,
            load: Mutex::new(load),
            phase: watch::Sender::new(Phase::Unbound),
            election: OnceLock::new(),
        };
        (Self { shared: Arc::new(shared) }, work)
    }

    /// Lets the node do something and gives what came of it.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Node) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |node| {
            if let Some(node) = node {
                let _ = tell.send(job(node));
            }
        });
        let nobody = || {
            let why = self.shared.notes.list(drover_service::now_us());
            let why = why.into_iter().find(|note| note.current);
            let failure = match &why {
                Some(note) => format!("this node takes no part in the gossip: {}", note.message),
                None => "this node takes no part in the gossip".to_owned(),
            };
            Failure::new(ErrorCode::BackendUnavailable, failure).hint(why.map_or("look at its log", |note| note.hint))
        };
        self.shared.jobs.send(job).await.map_err(|_| nobody())?;
        told.await.map_err(|_| nobody())
    }

    pub(crate) fn changes(&self) -> broadcast::Receiver<Arc<Change>> {
        self.shared.changes.subscribe()
    }

    pub(crate) fn events(&self) -> &Dispatcher {
        &self.shared.events
    }

    pub(crate) fn notes(&self) -> Vec<Note> {
        self.shared.notes.list(drover_service::now_us())
    }

    /// A sample of the machine; the load that follows from it is passed on.
    pub(crate) async fn measured(&self, usage: Usage, limits: Limits) {
        {
            let mut load = self.load();
            load.monitor.sample(usage);
            load.limits = limits;
        }
        self.pass_load_on().await;
    }

    /// A member keeps failing at what another program of this node asks of it.
    pub(crate) async fn suspect(&self, id: String) -> Result<Option<bool>, Failure> {
        self.with(move |node| node.suspect(&id)).await
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.shared.phase.send_replace(phase);
    }

    pub(super) fn load(&self) -> MutexGuard<'_, LoadState> {
        self.shared.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn status(&self) -> GetStatusResponse {
        let status = self.with(|node| node.status()).await.unwrap_or_default();
        GetStatusResponse {
            state: self.shared.phase.borrow().as_str().to_owned(),
            load: Some(load_message(&self.load())),
            ..status
        }
    }

    pub(crate) async fn members(&self) -> Result<Vec<Member>, Failure> {
        self.with(|node| node.members()).await
    }

    /// Asks further nodes; gives the ones that answered, as soon as one did.
    pub(crate) async fn join(&self, addrs: Vec<String>, wait: Duration) -> Result<Vec<String>, Failure> {
        let mut wanted = Vec::new();
        for text in &addrs {
            let found = tokio::net::lookup_host(text).await.map_err(|error| {
                Failure::new(ErrorCode::InvalidRequest, format!("no address for {text:?}: {error}"))
            })?;
            wanted.extend(found);
        }
        let mut answered = self.shared.answered.subscribe();
        let asked = wanted.clone();
        self.with(move |node| node.join(asked)).await?;
        let found = |all: &Vec<SocketAddr>| wanted.iter().any(|addr| all.contains(addr));
        let _ = tokio::time::timeout(wait, answered.wait_for(found)).await;
        let all = self.shared.answered.borrow();
        Ok(wanted.iter().filter(|addr| all.contains(addr)).map(ToString::to_string).collect())
    }

    /// Says good-bye; gives how many were told.
    pub(crate) async fn leave(&self, wait: Duration) -> Result<u32, Failure> {
        let mut phase = self.shared.phase.subscribe();
        let told = self.with(Node::leave).await?;
        let _ = tokio::time::timeout(wait, phase.wait_for(|phase| *phase == Phase::Left)).await;
        Ok(told)
    }

    pub(crate) async fn update_metadata(&self, change: MetadataChange) -> Result<u32, Failure> {
        self.with(move |node| node.update_metadata(change)).await?
    }

    /// Takes the number of sessions in and passes the new load on.
    pub(crate) async fn report_sessions(&self, reporter: String, sessions: u32, max_sessions: u32) -> LoadReport {
        {
            let mut load = self.load();
            if load.reports.len() < MOST_REPORTERS || load.reports.contains_key(&reporter) {
                load.reports.insert(reporter, sessions);
            }
            let all = load.reports.values().fold(0_u32, |all, one| all.saturating_add(*one));
            load.monitor.sessions(all, max_sessions);
        }
        self.pass_load_on().await;
        load_message(&self.load())
    }

    /// Computes the load anew and hands it to the node, which tells the others when it has changed enough.
    pub(super) async fn pass_load_on(&self) {
        let report = {
            let mut load = self.load();
            let was = load.report.overloaded;
            load.report = load.monitor.report();
            match (was, load.report.overloaded) {
                (false, true) => tracing::warn!(reason = load.report.reason, "this node is overloaded"),
                (true, false) => tracing::info!(score = load.report.score, "this node is no longer overloaded"),
                _ => {}
            }
            load.report.clone()
        };
        self.shared.metrics.load.set(report.score);
        self.shared.metrics.overloaded.set(i64::from(report.overloaded));
        // A node that takes no part tells nobody.
        let _ = self.with(move |node| node.load(&report)).await;
    }

    /// A request of another node over a connection.
    pub(crate) async fn asked(&self, from: NodeKey, request: Request) -> Result<Reply, Failure> {
        let told = self.with(move |node| node.asked(from, request)).await?;
        told.await.map_err(|_| Failure::new(ErrorCode::Internal, "the request was not answered"))
    }

    pub(crate) async fn keys(&self) -> Result<Vec<RingKey>, Failure> {
        self.with(|node| node.keys()).await?
    }

    /// Adds a key, or a fresh one; gives its id and the ring.
    pub(crate) async fn add_key(&self, key: Option<[u8; 32]>) -> Result<(u8, Vec<RingKey>), Failure> {
        self.with(move |node| node.add_key(key)).await?
    }

    pub(crate) async fn use_key(&self, id: u8, force: bool) -> Result<Vec<RingKey>, Failure> {
        self.with(move |node| node.use_key(id, force)).await?
    }

    pub(crate) async fn remove_key(&self, id: u8, force: bool) -> Result<Vec<RingKey>, Failure> {
        self.with(move |node| node.remove_key(id, force)).await?
    }

    pub(crate) async fn place(&self, key: String, count: usize, swarm: String) -> Result<Vec<String>, Failure> {
        self.with(move |node| node.place(&key, count, &swarm)).await
    }
}

fn load_message(load: &LoadState) -> LoadReport {
    let Report { score, cpu, memory, sessions, session_count, max_sessions, overloaded, reason } = load.report.clone();
    LoadReport {
        score,
        cpu,
        memory,
        sessions,
        session_count,
        max_sessions,
        overloaded,
        reason,
        cpu_limit: load.limits.cpus,
        memory_limit_bytes: load.limits.memory_bytes,
        measured: load.measured,
    }
}
