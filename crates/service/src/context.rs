//! What a running daemon is handed: its state directory, its tasks, its metrics, and the word to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use drover_config::SecurityConfig;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::address_book::{self, Entry};
use crate::channel::{Target, connect};
use crate::pki::IdentityHandle;
use crate::process::{self, ProcessId};
use crate::state_dir::StateDir;
use crate::tls::Nodes;
use crate::token::{Token, TokenError};
use crate::tracked::Tasks;

/// Where a daemon's parts register their metrics.
pub type SharedRegistry = Arc<Mutex<Registry>>;

/// Handed to a daemon and to everything it starts. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

struct Inner {
    instance: String,
    shutdown: CancellationToken,
    tasks: Tasks,
    state: StateDir,
    registry: SharedRegistry,
    refused: Counter,
    nodes: Nodes,
    allowed_uids: Arc<BTreeSet<u32>>,
    observer_uids: Arc<BTreeSet<u32>>,
    token_file: Option<PathBuf>,
    explicit_listen: Option<SocketAddr>,
    failure: Mutex<Option<anyhow::Error>>,
    config_file: OnceLock<PathBuf>,
    entry: Mutex<Option<Entry>>,
    stand_ins: Mutex<BTreeMap<String, Entry>>,
}

impl Context {
    pub(crate) fn new(
        instance: String,
        state: StateDir,
        security: &SecurityConfig,
        explicit_listen: Option<SocketAddr>,
    ) -> Self {
        let mut registry = Registry::with_prefix("drover");
        let refused = Counter::default();
        registry.register("refused_connections", "Connections of users that are not allowed", refused.clone());
        crate::own_metrics::register(&mut registry);
        let nodes = Nodes::new(&mut registry);
        let mut allowed_uids: BTreeSet<u32> = security.allow_uids.iter().copied().collect();
        allowed_uids.insert(rustix::process::geteuid().as_raw());
        Self {
            inner: Arc::new(Inner {
                instance,
                shutdown: CancellationToken::new(),
                tasks: Tasks::default(),
                state,
                registry: Arc::new(Mutex::new(registry)),
                refused,
                nodes,
                allowed_uids: Arc::new(allowed_uids),
                observer_uids: Arc::new(security.metrics_uids.iter().copied().collect()),
                token_file: security.token_file.clone(),
                explicit_listen,
                failure: Mutex::new(None),
                config_file: OnceLock::new(),
                entry: Mutex::new(None),
                stand_ins: Mutex::default(),
            }),
        }
    }

    /// A context for tests: its own state directory, no signals.
    pub fn for_test(name: &'static str, state_dir: &Path) -> Self {
        Self::for_test_with(name, state_dir, &SecurityConfig::default())
    }

    /// A context for tests of who may connect.
    pub fn for_test_with(name: &'static str, state_dir: &Path, security: &SecurityConfig) -> Self {
        crate::daemon::install_crypto();
        let state = StateDir::open(state_dir).unwrap_or_else(|error| panic!("{error}"));
        Self::new(name.to_owned(), state, security, None)
    }

    /// Name of this daemon in the address book: `router`, or `worker-<swarm>-<index>`.
    pub fn instance(&self) -> &str {
        &self.inner.instance
    }

    /// Cancelled when the daemon is to end: streams end, loops leave, stores flush.
    pub fn shutdown(&self) -> &CancellationToken {
        &self.inner.shutdown
    }

    /// Runs a task that the shutdown waits for. A panic in it ends the daemon with an error.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let ctx = self.clone();
        self.inner.tasks.spawn(name, task, move |name| ctx.fail(anyhow::anyhow!("task {name} panicked")));
    }

    /// A part cannot go on: the daemon shuts down and exits with 1. The first reason is kept.
    pub fn fail(&self, why: anyhow::Error) {
        error!(error = format!("{why:#}"), "cannot go on");
        self.inner.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.inner.shutdown.cancel();
    }

    /// The state directory.
    pub fn state(&self) -> &StateDir {
        &self.inner.state
    }

    /// Where metrics are registered.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.inner.registry)
    }

    /// The configuration file in effect; `None` with the built-in one. What a child process gets as `DROVER_CONFIG`.
    pub fn config_file(&self) -> Option<&Path> {
        self.inner.config_file.get().map(PathBuf::as_path)
    }

    pub(crate) fn set_config_file(&self, path: &Path) {
        let _ = self.inner.config_file.set(path.to_owned());
    }

    /// Gives this daemon an identity, before it binds: from then on its port also takes connections of nodes, and it may listen
    /// beyond loopback.
    pub fn use_identity(&self, identity: IdentityHandle) {
        self.inner.nodes.set_identity(identity);
    }

    /// The identity of this daemon, when it has one.
    pub fn identity(&self) -> Option<&IdentityHandle> {
        self.inner.nodes.identity()
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.inner.nodes
    }

    /// `--listen`, when it was given.
    pub fn explicit_listen(&self) -> Option<SocketAddr> {
        self.inner.explicit_listen
    }

    /// A channel to another daemon of this instance. It connects when first used, and looks the daemon up in the address
    /// book at every connect, so a restart on another port is followed.
    pub fn channel(&self, peer: &'static str) -> tonic::transport::Channel {
        connect(Target::Daemon { state: self.state().clone(), name: peer.to_owned() })
    }

    /// Adds the address of the JSON-line control plane to this daemon's entry in the address book.
    pub fn publish_control(&self, addr: SocketAddr) -> std::io::Result<()> {
        self.update_entry(|entry| entry.control = Some(addr.to_string()))
    }

    pub(crate) fn publish_listen(&self, addr: SocketAddr) -> std::io::Result<()> {
        self.update_entry(|entry| entry.listen = addr.to_string())
    }

    fn update_entry(&self, change: impl FnOnce(&mut Entry)) -> std::io::Result<()> {
        let mut slot = self.inner.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = slot.get_or_insert_with(|| self.blank_entry());
        change(entry);
        address_book::write(self.state(), entry)
    }

    /// Enters an address under a name of its own: a daemon on another host is reached through us. The entry goes with us.
    pub fn publish_stand_in(&self, name: &str, addr: SocketAddr) -> std::io::Result<()> {
        let entry = Entry { name: name.to_owned(), listen: addr.to_string(), ..self.blank_entry() };
        address_book::write(self.state(), &entry)?;
        self.inner.stand_ins.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), entry);
        Ok(())
    }

    fn blank_entry(&self) -> Entry {
        let me = ProcessId::current();
        Entry {
            name: self.inner.instance.clone(),
            pid: me.pid,
            start_time: me.start_time,
            host: process::hostname(),
            version: drover_types::VERSION.to_owned(),
            listen: String::new(),
            control: None,
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    pub(crate) fn unpublish(&self) {
        if let Some(entry) = self.inner.entry.lock().unwrap_or_else(PoisonError::into_inner).take() {
            address_book::remove(self.state(), &entry);
        }
        let stand_ins = std::mem::take(&mut *self.inner.stand_ins.lock().unwrap_or_else(PoisonError::into_inner));
        for entry in stand_ins.values() {
            address_book::remove(self.state(), entry);
        }
    }

    /// The secret that the router wants to be shown, for whoever calls it.
    pub fn token(&self) -> Result<Token, TokenError> {
        Token::load(self.inner.token_file.as_deref())
    }

    pub(crate) fn allowed_uids(&self) -> Arc<BTreeSet<u32>> {
        Arc::clone(&self.inner.allowed_uids)
    }

    pub(crate) fn observer_uids(&self) -> Arc<BTreeSet<u32>> {
        Arc::clone(&self.inner.observer_uids)
    }

    pub(crate) fn refused_connections(&self) -> Counter {
        self.inner.refused.clone()
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        &self.inner.tasks
    }

    pub(crate) fn take_failure(&self) -> Option<anyhow::Error> {
        self.inner.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
