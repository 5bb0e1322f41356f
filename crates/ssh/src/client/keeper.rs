//! The task that keeps one connection up, and what it shares with those who use it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use russh::client::Handle;
use russh::keys::PrivateKey;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::connect::{self, Client, Failure};
use crate::{HostConfig, Settings, State};

/// A connection that lived shorter than this counts as one more failure: a server that drops us at once is not asked
/// again at once.
const SHORT_LIFE: Duration = Duration::from_secs(5);

/// What the keeper, the commands and the tunnels share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) config: HostConfig,
    pub(super) state: watch::Sender<State>,
    pub(super) tasks: TaskTracker,
    /// Keys that were asked a passphrase for, so that nobody is asked again after each loss of the connection.
    pub(super) opened_keys: Mutex<HashMap<PathBuf, Arc<PrivateKey>>>,
    link: watch::Sender<Standing>,
    wanted: Notify,
}

#[derive(Debug, Clone)]
enum Standing {
    Connecting,
    Up(Arc<Live>),
    Refused { why: String, hint: String, at: Instant },
}

/// What a command gets when it asks for the connection.
pub(super) enum Link {
    Up(Arc<Live>),
    Refused { why: String, hint: String },
}

/// A connection that is logged in.
pub(super) struct Live {
    pub(super) handle: Handle<Client>,
    /// Cancelled when it is gone; cancelling it ends it.
    pub(super) dead: CancellationToken,
    pub(super) sessions: Arc<Semaphore>,
    /// Told when a session has ended and the server may take another.
    pub(super) freed: Notify,
    why: Arc<OnceLock<String>>,
    forbidden: AtomicBool,
    max_sessions: usize,
    /// Connections to the hosts on the way, which end with this one.
    _hops: Vec<Handle<Client>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("dead", &self.dead.is_cancelled()).finish_non_exhaustive()
    }
}

impl Live {
    pub(super) fn new(
        handle: Handle<Client>,
        dead: CancellationToken,
        why: Arc<OnceLock<String>>,
        hops: Vec<Handle<Client>>,
        max_sessions: usize,
    ) -> Self {
        let max_sessions = max_sessions.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            handle,
            dead,
            sessions: Arc::new(Semaphore::new(max_sessions)),
            freed: Notify::new(),
            why,
            forbidden: AtomicBool::new(false),
            max_sessions,
            _hops: hops,
        }
    }

    /// Why it is gone.
    pub(super) fn why(&self) -> String {
        self.why.get().cloned().unwrap_or_else(|| "the server closed it".to_owned())
    }

    pub(super) fn why_waiting(&self) -> String {
        match self.sessions.available_permits() {
            0 => format!("all {} sessions are in use", self.max_sessions),
            _ => "the server has not started it".to_owned(),
        }
    }

    pub(super) fn forwards(&self) -> bool {
        !self.forbidden.load(Ordering::Relaxed)
    }

    pub(super) fn forbid_forwarding(&self) {
        self.forbidden.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn new(settings: Settings, config: HostConfig) -> Self {
        Self {
            settings,
            config,
            state: watch::Sender::new(State::Connecting { attempt: 0, why: None }),
            tasks: TaskTracker::new(),
            opened_keys: Mutex::default(),
            link: watch::Sender::new(Standing::Connecting),
            wanted: Notify::new(),
        }
    }

    /// Waits for a connection, or for the word that there will be none until a person acts.
    pub(super) async fn link(&self) -> Link {
        let mut link = self.link.subscribe();
        let asked = Instant::now();
        loop {
            let standing = link.borrow_and_update().clone();
            match standing {
                Standing::Up(live) if !live.dead.is_cancelled() => return Link::Up(live),
                Standing::Refused { why, hint, at } => {
                    if at + self.settings.refused_pause > asked {
                        return Link::Refused { why, hint };
                    }
                    // A person may have acted meanwhile.
                    self.wanted.notify_one();
                }
                Standing::Up(_) | Standing::Connecting => {}
            }
            // The sender lives in `self`.
            let _ = link.changed().await;
        }
    }

    /// Why there is no connection, for those who waited in vain.
    pub(super) fn why_not(&self) -> String {
        match &*self.state.borrow() {
            State::Connecting { why: Some(why), attempt } => format!("no connection after {attempt} attempts: {why}"),
            State::Refused { why, .. } => why.clone(),
            State::Connecting { .. } | State::Up { .. } => "the host has not answered yet".to_owned(),
        }
    }

    pub(super) fn opened(&self, path: &std::path::Path) -> Option<Arc<PrivateKey>> {
        self.opened_keys.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
    }

    pub(super) fn remember_opened(&self, path: PathBuf, key: &Arc<PrivateKey>) {
        self.opened_keys.lock().unwrap_or_else(PoisonError::into_inner).insert(path, Arc::clone(key));
    }
}

/// Connects, again and again, until it is told to stop.
pub(super) async fn keep(shared: Arc<Shared>, stop: CancellationToken) {
    let host = shared.settings.host.clone();
    let mut failures = 0;
    let mut why = None;
    loop {
        shared.state.send_replace(State::Connecting { attempt: failures, why: why.clone() });
        shared.link.send_replace(Standing::Connecting);
        let connected = tokio::select! {
            connected = connect::connect(&shared) => connected,
            () = stop.cancelled() => return,
        };
        match connected {
            Ok(live) => {
                info!(%host, "ssh connection is up");
                let live = Arc::new(live);
                let since = Instant::now();
                shared.state.send_replace(State::Up { since: SystemTime::now() });
                shared.link.send_replace(Standing::Up(Arc::clone(&live)));
                tokio::select! {
                    () = live.dead.cancelled() => {}
                    () = stop.cancelled() => {
                        live.dead.cancel();
                        return;
                    }
                }
                let lost = live.why();
                warn!(%host, why = %lost, "ssh connection was lost");
                failures = if since.elapsed() < SHORT_LIFE { failures + 1 } else { 0 };
                why = Some(lost);
            }
            Err(Failure::Refused { why: reason, hint }) => {
                warn!(%host, why = %reason, %hint, "ssh connection is refused");
                shared.state.send_replace(State::Refused { why: reason.clone(), hint: hint.clone() });
                shared.link.send_replace(Standing::Refused { why: reason.clone(), hint, at: Instant::now() });
                why = Some(reason);
                tokio::select! {
                    () = shared.wanted.notified() => {}
                    () = stop.cancelled() => return,
                }
                continue;
            }
            Err(Failure::Passing(reason)) => {
                failures += 1;
                debug!(%host, failures, why = %reason, "ssh connection failed");
                why = Some(reason);
            }
        }
        if failures > 0 {
            shared.state.send_replace(State::Connecting { attempt: failures, why: why.clone() });
            tokio::select! {
                () = sleep(shared.settings.retry.pause(failures)) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}
