//! What makes the core a running daemon: clock, disks, network and agents.
//!
//! ```text
//! doors (gRPC) ─┐                        ┌─> waiters   whoever waits for a reply
//! links  <──────┤   ┌──────────────┐     ├─> disk      journals, logs, owners: blocking, in order for each session
//! membership ───┼──>│ one task that │────>├─> links     other nodes
//! disk ─────────┤   │ has the core  │     ├─> host      agents
//! agents ───────┘   └──────────────┘     └─> events    for people
//!        jobs                    effects
//! ```
//!
//! The task never waits for anything but jobs and time: whatever takes long is done elsewhere and comes back as a job.

mod disk;
mod drain;
mod ear;
mod events;
mod interrupt;
mod links;
mod members;
mod ops;
mod orders;
mod planner;
mod post;
mod route;
mod session_disk;
mod sessions;
mod takeover;
mod transfer;
mod view;
mod waiters;
mod wire;

pub use wire::understood;

use std::sync::Arc;
use std::time::Duration;

use drover_service::Context;
use drover_service::pki::IdentityHandle;
use drover_types::{AgentKind, ErrorCode, Failure};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

pub(crate) use disk::Disk;
pub(crate) use events::{code as failure_code, why_name};
pub(crate) use members::{Card, follow as follow_members};
pub(crate) use ops::Door;
pub(crate) use planner::plan;
pub(crate) use post::serve as serve_post;
pub(crate) use session_disk::Places;
pub(crate) use takeover::adopt_orphans;
pub(crate) use transfer::NodeDoor;
pub(crate) use view::View;

use crate::agent::{Agents, Host, Live};
use crate::core::{Effect, Engine, Input, Owner, Settings};
use crate::metrics::Metrics;
use crate::shell::drain::Drains;
use crate::shell::events::Events;
use crate::shell::links::Links;
use crate::shell::orders::Orders;
use crate::shell::waiters::Waiters;

/// Jobs that may wait for the core; whoever brings more waits.
const JOBS: usize = 1024;

/// Something for the task that has the core.
pub(crate) enum Job {
    Input(Input),
    With(Box<dyn FnOnce(&Engine) + Send>),
}

/// The way to the core. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Jobs(mpsc::Sender<Job>);

impl Jobs {
    /// Gives the core an input; without a core the daemon is at its end.
    pub(crate) async fn input(&self, input: Input) {
        let _ = self.0.send(Job::Input(input)).await;
    }

    /// Looks at the core.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Engine) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let over = || Failure::new(ErrorCode::ShuttingDown, "sessions are ending here");
        let (tell, told) = oneshot::channel();
        let job = Job::With(Box::new(move |engine| drop(tell.send(look(engine)))));
        self.0.send(job).await.map_err(|_| over())?;
        told.await.map_err(|_| over())
    }
}

/// Everything of the shell. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Shell {
    pub(crate) me: Owner,
    pub(crate) ctx: Context,
    pub(crate) settings: Arc<Settings>,
    pub(crate) jobs: Jobs,
    pub(crate) disk: Disk,
    pub(crate) host: Host,
    pub(crate) live: Live,
    pub(crate) view: View,
    pub(crate) waiters: Waiters,
    pub(crate) links: Links,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    pub(crate) agents: Agents,
    /// Agent of a session that is opened without naming one.
    pub(crate) default_agent: AgentKind,
    pub(crate) identity: Option<IdentityHandle>,
    /// How long one who listens to a turn may read nothing.
    pub(crate) patience: Duration,
    /// The drain of this node.
    pub(crate) drains: Drains,
    /// Which nodes are to be empty.
    pub(crate) orders: Orders,
    /// Name of this node's membership in the address book.
    pub(crate) membership: String,
}

/// What a shell begins with.
pub(crate) struct Parts {
    pub(crate) me: Owner,
    pub(crate) settings: Settings,
    pub(crate) places: Places,
    pub(crate) agents: Agents,
    pub(crate) default_agent: AgentKind,
    pub(crate) turns: usize,
    pub(crate) patience: Duration,
    pub(crate) membership: String,
    pub(crate) bytes_per_second: u64,
    pub(crate) identity: Option<IdentityHandle>,
    pub(crate) metrics: Metrics,
}

impl Shell {
    /// Starts the task that has the core.
    pub(crate) fn start(parts: Parts, ctx: &Context) -> Self {
        let Parts { me, settings, places, agents, default_agent, turns, patience, membership, .. } = parts;
        let (bytes_per_second, identity, metrics) = (parts.bytes_per_second, parts.identity, parts.metrics);
        let orders = Orders::new(&places.shared);
        let (jobs, taken) = mpsc::channel(JOBS);
        let disk = Disk::new(places, jobs.clone(), ctx);
        let jobs = Jobs(jobs);
        let (live, view) = (Live::default(), View::new(me.node.clone()));
        let host = Host::new(agents.clone(), disk.clone(), jobs.clone(), live.clone(), turns, ctx);
        let links = Links::new(
            me.node.clone(),
            identity.clone(),
            view.clone(),
            disk.places().clone(),
            bytes_per_second,
            metrics.clone(),
            ctx,
        );
        let shell = Self {
            me: me.clone(),
            ctx: ctx.clone(),
            settings: Arc::new(settings.clone()),
            jobs,
            disk,
            host,
            live,
            view,
            waiters: Waiters::default(),
            links,
            events: Events::new(me.node.clone()),
            metrics,
            agents,
            default_agent,
            identity,
            patience,
            drains: Drains::new(),
            orders,
            membership,
        };
        let engine = Engine::new(Duration::ZERO, me, settings, rand::random());
        ctx.spawn("core", shell.clone().drive(engine, taken));
        shell
    }

    async fn drive(self, mut engine: Engine, mut jobs: mpsc::Receiver<Job>) {
        let begun = Instant::now();
        let mut effects = Vec::new();
        loop {
            let deadline = engine.deadline();
            let due = begun.checked_add(deadline).filter(|_| deadline != Duration::MAX);
            let job = tokio::select! {
                job = jobs.recv() => job,
                () = until(due) => Some(Job::Input(Input::Tick)),
                () = self.ctx.shutdown().cancelled() => return,
            };
            match job {
                None => return,
                Some(Job::With(look)) => look(&engine),
                Some(Job::Input(input)) => {
                    engine.handle(begun.elapsed(), input, &mut effects);
                    for effect in effects.drain(..) {
                        self.perform(effect);
                    }
                    self.metrics.held.set(i64::try_from(engine.held()).unwrap_or(i64::MAX));
                }
            }
        }
    }

    /// Has an effect carried out, without waiting for it.
    fn perform(&self, effect: Effect) {
        match effect {
            Effect::Reply { to, reply, .. } => self.waiters.tell(to, reply),
            Effect::Send { to, message } => self.links.send(&to, message),
            Effect::SendChunk { to, handoff, session, offset, len } => {
                self.links.send_chunk(&to, handoff, session, offset, len);
            }
            Effect::Look { session } => self.disk.push(&session, |state, places| Some(state.look(places))),
            Effect::Claim { record } => {
                self.disk.push(&record.session.clone(), move |state, places| Some(state.claim(places, &record)));
            }
            Effect::Load { session, epoch } => {
                self.disk.push(&session, move |state, places| Some(state.load(places, epoch)));
            }
            Effect::Append { session, epoch, first, records } => {
                let (metrics, disk, id) = (self.metrics.clone(), self.disk.clone(), session.clone());
                self.disk.push(&session, move |state, places| {
                    let input = state.append(places, epoch, first, &records);
                    metrics.appended(&input);
                    disk.checkpoint(&id, state);
                    Some(input)
                });
            }
            Effect::Park { session, epoch, handoff } => self.host.park(&session, epoch, handoff),
            Effect::Reserve { handoff, session, len, fresh } => {
                self.disk.push(&session, move |state, places| Some(state.reserve(places, handoff, len, fresh)));
            }
            Effect::Write { handoff, session, offset, bytes } => {
                self.disk.push(&session, move |state, _| Some(state.write(handoff, offset, &bytes)));
            }
            Effect::Install { handoff, len, digest, record } => {
                self.disk.push(&record.session.clone(), move |state, places| {
                    Some(state.install(places, handoff, len, digest, *record))
                });
            }
            Effect::Discard { handoff, session } => self.disk.push(&session, move |state, _| {
                state.discard(handoff);
                None
            }),
            Effect::Run { session, epoch, turn, again } => self.host.run(&session, epoch, turn, again),
            Effect::Interrupt { session, epoch, turn } => self.host.interrupt(&session, epoch, turn),
            Effect::Call { session, epoch, call } => self.host.call(&session, epoch, call),
            Effect::Resume { session, epoch, call } => self.host.resume(&session, epoch, call),
            Effect::Stop { session, epoch } => self.host.stop(&session, epoch),
            Effect::Suspect { node } => {
                self.metrics.suspected.inc();
                self.events.suspected(&node);
                self.view.suspect(&node);
            }
            Effect::Event(event) => {
                self.metrics.event(&event);
                self.events.add(&event);
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
