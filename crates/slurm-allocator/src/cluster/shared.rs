//! One cluster, shared by the backend, the relay and whoever else wants something of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_service::Context;
use drover_ssh::{Command, Exit, Pipe, Remote, SshError};
use drover_types::{ErrorCode, Failure, SwarmId};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio::sync::{Notify, oneshot, watch};
use tracing::{info, warn};

use super::install::{self, Placed, Program};
use super::{ClusterSettings, FollowerFound};

/// How far the preparation of a cluster has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Nobody has wanted anything yet.
    Idle,
    /// The login host is being connected to, and looked at for our program.
    Connecting,
    /// The follower is being found or started.
    Starting,
    /// All is there.
    Ready(Ready),
    /// It did not work; the next who wants something tries again.
    Failed(Failure),
}

/// A cluster with everything in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// Our program there.
    pub program: Placed,
    /// Its follower.
    pub follower: FollowerFound,
}

/// What is known of a cluster's jobs beside those of our swarms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Why nobody knows how its jobs fare; empty when it answers.
    pub trouble: String,
    /// Jobs with our mark that belong to no swarm of this instance: id, swarm, state.
    pub orphans: Vec<(u64, SwarmId, String)>,
}

type Outcome = Result<Ready, Failure>;
type Preparation = Shared<BoxFuture<'static, Outcome>>;

/// One cluster. Clones are the same one.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    ctx: Context,
    settings: ClusterSettings,
    state: Mutex<State>,
    stage: watch::Sender<Stage>,
    report: watch::Sender<Report>,
    /// Somebody wants to know how it stands there.
    asked: Notify,
}

#[derive(Default)]
struct State {
    program: Option<Program>,
    remote: Option<Arc<dyn Remote>>,
    /// The last preparation, under way or well ended. Everybody waits for the same one.
    preparation: Option<Preparation>,
    /// Counts preparations, so that an old one is not taken for the present one.
    round: u64,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

impl Cluster {
    /// A cluster that nothing is known of yet.
    pub fn new(ctx: &Context, settings: ClusterSettings) -> Self {
        let stage = watch::Sender::new(Stage::Idle);
        let (report, asked) = (watch::Sender::default(), Notify::new());
        Self { inner: Arc::new(Inner { ctx: ctx.clone(), settings, state: Mutex::default(), stage, report, asked }) }
    }

    /// What it was made of.
    pub fn settings(&self) -> &ClusterSettings {
        &self.inner.settings
    }

    /// How far it has come, now and from now on.
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.inner.stage.subscribe()
    }

    /// What was last seen there. Where the cluster is in use, that is looked at anew soon.
    pub fn report(&self) -> Report {
        if matches!(*self.inner.stage.borrow(), Stage::Ready(_)) || self.inner.settings.own_follower {
            self.inner.asked.notify_one();
        }
        self.inner.report.borrow().clone()
    }

    pub(crate) fn put_report(&self, report: Report) {
        self.inner.report.send_if_modified(|known| {
            let news = *known != report;
            *known = report;
            news
        });
    }

    /// Waits until somebody wants to know how it stands there.
    pub(crate) async fn asked(&self) {
        self.inner.asked.notified().await;
    }

    /// The connection to its login host: one for everybody, made when it is first asked for.
    pub async fn remote(&self) -> Result<Arc<dyn Remote>, Failure> {
        if let Some(remote) = &self.state().remote {
            return Ok(Arc::clone(remote));
        }
        let program = self.program().await?;
        let mut state = self.state();
        // Somebody else may have been faster, and there is to be one connection only.
        if let Some(remote) = &state.remote {
            return Ok(Arc::clone(remote));
        }
        let settings = self.settings();
        let remote = settings.connect(&program.place(&settings.base)).map_err(|error| settings.of_ssh(&error))?;
        state.remote = Some(Arc::clone(&remote));
        Ok(remote)
    }

    /// Our file here, read once.
    async fn program(&self) -> Result<Program, Failure> {
        if let Some(program) = &self.state().program {
            return Ok(program.clone());
        }
        let path = self.settings().program.clone();
        let read = tokio::task::spawn_blocking({
            let path = path.clone();
            move || Program::read(&path)
        });
        let program = read.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
            self.settings().unavailable(format!("the program to place, {}, cannot be read: {error}", path.display()))
        })?;
        self.state().program = Some(program.clone());
        Ok(program)
    }

    /// The cluster with everything in place: connected, our program there, its follower running. Quick when it was so before.
    pub async fn ready(&self) -> Result<Ready, Failure> {
        let preparation = {
            let mut state = self.state();
            match &state.preparation {
                Some(preparation) => preparation.clone(),
                None => self.begin(&mut state),
            }
        };
        preparation.await
    }

    /// As a task of its own: whoever waits may go away, and the upload goes on for the next.
    fn begin(&self, state: &mut State) -> Preparation {
        let (sender, receiver) = oneshot::channel::<Outcome>();
        let preparation: Preparation = receiver
            .map(|outcome| {
                outcome.unwrap_or_else(|_| {
                    Err(Failure::new(ErrorCode::ShuttingDown, "the allocator is shutting down").hint("try again"))
                })
            })
            .boxed()
            .shared();
        state.round += 1;
        let round = state.round;
        state.preparation = Some(preparation.clone());
        let cluster = self.clone();
        let stopping = self.inner.ctx.shutdown().clone();
        self.inner.ctx.spawn("prepare cluster", async move {
            let Some(outcome) = stopping.run_until_cancelled(cluster.prepare()).await else { return };
            match &outcome {
                Ok(ready) => drop(cluster.inner.stage.send_replace(Stage::Ready(ready.clone()))),
                Err(failure) => {
                    warn!(cluster = cluster.settings().name, %failure, "the cluster cannot be used");
                    cluster.inner.stage.send_replace(Stage::Failed(failure.clone()));
                    cluster.forget_round(round);
                }
            }
            let _ = sender.send(outcome);
        });
        preparation
    }

    async fn prepare(&self) -> Outcome {
        let settings = self.settings();
        self.inner.stage.send_replace(Stage::Connecting);
        let program = self.program().await?;
        let remote = self.remote().await?;
        let placed = install::place(&*remote, settings, &program).await?;
        if placed.sent {
            info!(
                cluster = settings.name,
                path = placed.path,
                bytes = program.bytes,
                took_ms = placed.took.as_millis() as u64,
                "program placed on the cluster"
            );
        }
        self.inner.stage.send_replace(Stage::Starting);
        let follower = install::follower(&*remote, settings, &placed.path).await?;
        info!(
            cluster = settings.name, host = follower.host, pid = follower.pid, listen = %follower.listen,
            version = follower.version, started = follower.started, replaced = follower.replaced,
            "the cluster's follower is there"
        );
        Ok(Ready { program: placed, follower })
    }

    /// What was known of the cluster holds no longer, so it is looked at anew. Only if this is still what is known.
    pub(super) fn forget(&self, known: &Ready) {
        let mut state = self.state();
        let current = state.preparation.as_ref().and_then(|preparation| preparation.peek());
        if matches!(current, Some(Ok(ready)) if ready == known) {
            state.preparation = None;
        }
    }

    fn forget_round(&self, round: u64) {
        let mut state = self.state();
        if state.round == round {
            state.preparation = None;
        }
    }

    /// What somebody who has waited long enough is told.
    pub(crate) fn not_yet(&self) -> Failure {
        let name = &self.settings().name;
        let state = self.state().remote.as_ref().map(|remote| remote.state().borrow().clone());
        match state {
            Some(drover_ssh::State::Connecting { why: Some(why), attempt }) => self
                .settings()
                .unavailable(format!("no connection to {name} after {attempt} attempts: {why}; it is tried again")),
            Some(drover_ssh::State::Up { .. }) => {
                let doing = match &*self.inner.stage.borrow() {
                    Stage::Starting => "its follower is being started",
                    _ => "the program is being uploaded",
                };
                self.settings().unavailable(format!("{name} is reached; {doing}"))
            }
            _ => self.settings().unavailable(format!("{name} is still being connected to and prepared")),
        }
    }

    /// Runs our program on the login host, and returns what it printed. One that was taken away there is placed again. What it does
    /// must be safe to repeat.
    pub(crate) async fn run_program(&self, command: impl Fn(&str) -> Command) -> Result<Vec<u8>, Failure> {
        let remote = self.remote().await?;
        let ready = self.ready().await?;
        let output = remote.run(command(&ready.program.path)).await.map_err(|error| self.settings().of_ssh(&error))?;
        if output.exit != Exit::Code(127) {
            // What it says it cannot do it could not do the next time either.
            return install::judge(self.settings(), &ready.program.path, &output, ErrorCode::StoreUnavailable);
        }
        self.forget(&ready);
        let ready = self.ready().await?;
        install::run(&*remote, self.settings(), command(&ready.program.path)).await
    }

    /// Connects to its follower, which is found or started anew when it is not where it was.
    pub(super) async fn reach(&self) -> Result<(Pipe, Ready), Failure> {
        let remote = self.remote().await?;
        let mut again = true;
        loop {
            let ready = self.ready().await?;
            match remote.tunnel(ready.follower.listen).await {
                Ok(pipe) => return Ok((pipe, ready)),
                Err(error) => {
                    self.forget(&ready);
                    if !(again && matches!(error, SshError::Tunnel { .. })) {
                        return Err(self.settings().of_ssh(&error));
                    }
                    again = false;
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
