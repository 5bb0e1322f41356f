//! The loop of the writer's thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure};
use rusqlite::Connection;
use tokio::sync::mpsc;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::events::{EventReader, EventWriter};
use super::queue::{Call, Command, Reply, stopping};
pub(crate) use super::retention::Retention;
use super::retention::{delete_some, first_kept};
use super::rows;
use super::schema::{Place, StoreError};
use super::waiters::{Callers, Steps, Waiters};
use crate::core::effects::{Answer, Effects, Micros, Out, Step};
use crate::core::input::Input;
use crate::core::model::{Settings, SwarmKey};
use crate::core::{Core, describe_ended};
use crate::log::EventLog;
use crate::metrics::Metrics;
use crate::registry::Shared;

/// Most commands of one commit.
const MOST_COMMANDS: usize = 2048;
/// Most events of one commit; a call that waits behind them waits this long at most.
const MOST_EVENTS: usize = 10_000;
/// How often a store that failed is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// How often old events are looked for.
const RETAIN_EVERY: Duration = Duration::from_secs(30);

/// Carries out what a commit allows.
pub(crate) trait Orders: Send {
    /// One of the effects that leave the process.
    fn perform(&mut self, out: Out);
    /// What the allocator says has been missed: ask for all of it again.
    fn ask_allocations_again(&mut self);
}

/// What the writer needs to know.
#[derive(Debug, Clone)]
pub(crate) struct StoreSettings {
    pub(crate) place: Place,
    pub(crate) core: Settings,
    pub(crate) keep: Retention,
    /// Bytes of recent events that are kept in memory.
    pub(crate) ring_bytes: u64,
}

/// Who made a call.
enum Caller {
    Stream(Steps),
    One(Reply<Answer>),
}

impl Caller {
    fn refuse(self, failure: Failure) {
        // A caller that has left needs no answer.
        match self {
            Self::Stream(steps) => drop(steps.try_send(Step::Fail(failure))),
            Self::One(reply) => drop(reply.send(Err(failure))),
        }
    }
}

/// Owns the database and the core.
pub(crate) struct Writer<O> {
    settings: StoreSettings,
    conn: Connection,
    core: Core,
    shared: Arc<Shared>,
    metrics: Metrics,
    orders: O,
    clock: fn() -> Micros,
    fx: Effects,
    words: EventWriter,
    reader: EventReader,
    callers: Callers<Caller>,
    waiters: Waiters,
    /// Since when nothing can be written, and when to try again.
    failing: Option<Instant>,
    next_retention: Instant,
    stopping: bool,
}

impl<O: Orders> Writer<O> {
    /// Opens the database and builds the core from it.
    pub(crate) fn open(
        settings: StoreSettings,
        orders: O,
        metrics: Metrics,
        clock: fn() -> Micros,
    ) -> Result<(Self, Arc<Shared>), StoreError> {
        let conn = settings.place.open()?;
        let core = Core::restore(settings.core.clone(), rows::read_all(&conn, &settings.place)?);
        let last = core.book.seq;
        let first = first_kept(&conn, last).map_err(settings.place.error("read"))?;
        let shared = Arc::new(Shared::new(EventLog::new(settings.ring_bytes, first, last)));
        info!(
            path = %settings.place.path.display(), sharing = ?settings.place.sharing, last_seq = last,
            swarms = core.swarms.len(), open_injections = core.book.injections.len(), "event log is open"
        );
        let mut writer = Self {
            settings,
            conn,
            core,
            shared: Arc::clone(&shared),
            metrics,
            orders,
            clock,
            fx: Effects::new(Box::new(Uuid::new_v4)),
            words: EventWriter::default(),
            reader: EventReader::default(),
            callers: Callers::default(),
            waiters: Waiters::default(),
            failing: None,
            next_retention: Instant::now(),
            stopping: false,
        };
        // Before anybody can ask: an empty picture would say that there are no swarms.
        writer.publish();
        Ok((writer, shared))
    }

    /// Works until it is told to stop.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.core.resume((self.clock)(), &mut self.fx);
        self.publish();
        self.commit();
        let mut batch = Vec::new();
        while !self.stopping {
            let Some(first) = commands.blocking_recv() else { break };
            let mut weight = 0;
            let mut next = Some(first);
            while let Some(command) = next {
                weight += if let Command::Records(chunk, _) = &command { chunk.records.len() } else { 1 };
                batch.push(command);
                next =
                    if batch.len() < MOST_COMMANDS && weight < MOST_EVENTS { commands.try_recv().ok() } else { None };
            }
            self.take(&mut batch);
            self.retain_events();
        }
        commands.close();
        while let Ok(command) = commands.try_recv() {
            refuse(command, &stopping());
        }
        self.waiters.fail_all(&stopping());
        if let Err((_, error)) = self.conn.close() {
            warn!(%error, "failed to close the event log");
        }
    }

    /// Takes one batch to its end, good or bad.
    fn take(&mut self, batch: &mut Vec<Command>) {
        // Reading needs no commit; it is answered at the end, when the core shows what the batch led to.
        let mut reads = Vec::new();
        // Held to the end of the batch: the follower may send on when these are on disk.
        let mut permits = Vec::new();
        for command in batch.drain(..) {
            let now = (self.clock)();
            match command {
                Command::Stop => self.stopping = true,
                command @ (Command::Explain(..) | Command::Read(..)) => reads.push(command),
                Command::Happened(input) => self.happened(now, input),
                command if self.failing.is_some() => refuse(command, &self.unavailable()),
                Command::Records(chunk, permit) => {
                    permits.push(permit);
                    self.core.handle(now, Input::Records(chunk), &mut self.fx);
                }
                Command::Call(call) => self.call(now, call),
            }
        }
        if self.failing.is_none() {
            self.commit();
        }
        drop(permits);
        for read in reads {
            self.read(read);
        }
    }

    fn happened(&mut self, now: Micros, input: Input) {
        let tick = matches!(input, Input::Tick);
        if tick {
            self.waiters.forget_gone();
        }
        if self.failing.is_none() {
            self.core.handle(now, input, &mut self.fx);
            return;
        }
        // What cannot be written down must not be known. Who answers is not written down.
        match input {
            Input::FollowerUp(side) => drop(self.core.book.followers.set(&side, now, "")),
            Input::FollowerDown(side, why) => drop(self.core.book.followers.set(&side, now, &why)),
            Input::AllocatorSnapshot { .. } => drop(self.core.book.allocator.set(now, "")),
            Input::AllocatorDown(why) => drop(self.core.book.allocator.set(now, &why)),
            Input::Tick if self.failing.is_some_and(|retry| Instant::now() >= retry) => self.recover(),
            _ => {}
        }
    }

    /// Looks up what was asked before, then lets the core decide.
    fn call(&mut self, now: Micros, mut call: Call) {
        if let Err(error) = self.look_up(&mut call) {
            warn!(%error, "failed to look up an earlier request");
            let failure = Failure::new(ErrorCode::StoreUnavailable, format!("failed to read the event log: {error}"))
                .hint("check the disk of the state directory; the same request can be repeated");
            return refuse(Command::Call(call), &failure);
        }
        let input = match call {
            Call::Launch(order, steps) => Input::Launch(self.callers.add(Caller::Stream(steps)), order),
            Call::Inject(order, steps) => Input::Inject(self.callers.add(Caller::Stream(steps)), order),
            Call::Terminate(order, steps) => Input::Terminate(self.callers.add(Caller::Stream(steps)), order),
            Call::Interrupt(order, reply) => Input::Interrupt(self.callers.add(Caller::One(reply)), order),
            Call::Resolve(order, reply) => Input::Resolve(self.callers.add(Caller::One(reply)), order),
        };
        self.core.handle(now, input, &mut self.fx);
    }

    fn look_up(&self, call: &mut Call) -> rusqlite::Result<()> {
        match call {
            Call::Launch(order, _) => order.prior = self.prior(&order.request_id)?,
            Call::Inject(order, _) => {
                order.prior = self.prior(&order.request_id)?;
                if let Some(id) = order.injection_id.as_ref().filter(|id| !self.core.book.injections.contains_key(id)) {
                    order.prior_injection = rows::prior_injection(&self.conn, id.as_str())?;
                }
            }
            Call::Terminate(..) | Call::Interrupt(..) | Call::Resolve(..) => {}
        }
        Ok(())
    }

    fn prior(&self, request_id: &str) -> rusqlite::Result<Option<crate::core::input::Prior>> {
        if request_id.is_empty() || self.core.book.requests.contains_key(request_id) {
            return Ok(None);
        }
        rows::prior_request(&self.conn, request_id)
    }

    /// Writes what the batch led to, then lets it out.
    fn commit(&mut self) {
        let begun = Instant::now();
        if (!self.fx.events.is_empty() || !self.core.book.dirty.is_clean())
            && let Err(error) = self.write()
        {
            self.fail(&error);
            return;
        }
        if !self.fx.events.is_empty() {
            self.metrics.committed(self.fx.events.len(), begun.elapsed());
        }
        self.publish();
        self.core.committed();
        self.shared.log.push(std::mem::take(&mut self.fx.events));
        for out in std::mem::take(&mut self.fx.out) {
            self.let_out(out);
        }
        // A call that the core did not answer would leave its caller waiting for ever.
        for caller in self.callers.take_all() {
            caller.refuse(Failure::new(ErrorCode::Internal, "the call was not answered"));
        }
    }

    fn let_out(&mut self, out: Out) {
        match out {
            Out::Answer(token, answer) => {
                if let Some(Caller::One(reply)) = self.callers.take(token) {
                    // A caller that has left needs no answer.
                    drop(reply.send(answer));
                }
            }
            Out::Refuse(token, failure) => {
                if let Some(caller) = self.callers.take(token) {
                    caller.refuse(failure);
                }
            }
            Out::Attach { token, topic, backlog, expect } => {
                if let Some(Caller::Stream(steps)) = self.callers.take(token) {
                    self.waiters.attach(steps, topic, &backlog, expect);
                }
            }
            Out::Step(topic, step) => self.waiters.step(&topic, &step),
            out => self.orders.perform(out),
        }
    }

    fn write(&mut self) -> rusqlite::Result<()> {
        self.conn.execute_batch("BEGIN IMMEDIATE")?;
        self.words.write(&self.conn, &self.fx.events)?;
        rows::write_changes(&self.conn, &self.core)?;
        self.conn.execute_batch("COMMIT")
    }

    /// Shows readers what the commit changed.
    fn publish(&mut self) {
        let dirty = &self.core.book.dirty;
        let members = !dirty.members.is_empty() || dirty.members_view || dirty.all_members;
        if !dirty.views.is_empty() || dirty.approvals_view || dirty.links_view || members {
            let next = self.shared.registry.load().next(&self.core);
            self.shared.registry.store(Arc::new(next));
        }
        if members {
            self.shared.members_bell.send_replace(());
        }
    }

    /// Nothing of the batch happened: callers are told, and the memory goes back to what is on disk.
    fn fail(&mut self, error: &rusqlite::Error) {
        if !self.conn.is_autocommit() {
            // It may have been rolled back by itself.
            drop(self.conn.execute_batch("ROLLBACK"));
        }
        self.metrics.store_errors.inc();
        let why = format!("failed to write {}: {error}", self.settings.place.path.display());
        error!(error = why, "the event log cannot be written; nothing of the last batch is lost or done");
        self.shared.store_error.store(Arc::new(why));
        self.fx.clear();
        self.words.forget();
        let failure = self.unavailable();
        for caller in self.callers.take_all() {
            caller.refuse(failure.clone());
        }
        self.failing = Some(Instant::now() + TRY_AGAIN);
        match self.restored() {
            Ok(core) => self.core = core,
            // Not even readable: what we remember is good enough to explain things with until it is again.
            Err(error) => error!(%error, "the event log cannot be read either"),
        }
    }

    fn restored(&self) -> Result<Core, StoreError> {
        let restored = rows::read_all(&self.conn, &self.settings.place)?;
        let mut core = Core::restore(self.settings.core.clone(), restored);
        core.keep_links(self.core.book.allocator.clone(), self.core.book.followers.clone());
        core.book.ring.clone_from(&self.core.book.ring);
        Ok(core)
    }

    /// Tries whether the store can be written again, and goes on where it stopped.
    fn recover(&mut self) {
        self.failing = Some(Instant::now() + TRY_AGAIN);
        let attempt = || -> Result<Connection, StoreError> {
            let conn = self.settings.place.open()?;
            // As large as a small batch: a few free bytes are no room to work in.
            conn.execute_batch(
                "BEGIN IMMEDIATE; INSERT OR REPLACE INTO meta (name, value) VALUES ('probe', zeroblob(131072)); COMMIT;
                 DELETE FROM meta WHERE name = 'probe';",
            )
            .map_err(self.settings.place.error("write"))?;
            Ok(conn)
        };
        let recovered = attempt().and_then(|conn| {
            self.conn = conn;
            self.restored()
        });
        match recovered {
            Ok(core) => {
                self.core = core;
                self.failing = None;
                self.shared.store_error.store(Arc::default());
                info!("the event log can be written again");
                self.orders.ask_allocations_again();
                self.core.resume((self.clock)(), &mut self.fx);
            }
            Err(error) => {
                self.shared.store_error.store(Arc::new(error.to_string()));
            }
        }
    }

    fn unavailable(&self) -> Failure {
        Failure::new(ErrorCode::StoreUnavailable, self.shared.store_error.load().to_string()).hint(format!(
            "make room on the disk of {} or make it writable; the router goes on by itself, and the same request can be repeated",
            self.settings.place.path.display()
        ))
    }

    /// Answers what only reads.
    fn read(&mut self, command: Command) {
        match command {
            Command::Explain(subject, reply) => {
                let mut answer = self.explain(&subject);
                if self.failing.is_some()
                    && let Ok(explanation) = &mut answer
                {
                    let failure = self.unavailable();
                    explanation
                        .because
                        .insert(0, format!("The router cannot write its event log: {}.", failure.message));
                    explanation.next.insert(0, failure.hint);
                } else if let Ok(explanation) = &mut answer {
                    let why = self.shared.unwritable();
                    if !why.is_empty() {
                        let because = format!("The router cannot write its audit log, and refuses commands: {why}.");
                        explanation.because.insert(0, because);
                    }
                }
                drop(reply.send(answer));
            }
            Command::Read(wanted, reply) => {
                let page = self.reader.read(&self.conn, &wanted).map_err(self.settings.place.error("read"));
                drop(reply.send(page.map_err(|error| super::readers::unreadable(&error))));
            }
            _ => {}
        }
    }

    fn explain(&self, subject: &str) -> Result<pb::ExplainResponse, Failure> {
        let explained = self.core.explanation(subject, (self.clock)());
        match &explained {
            Err(failure) if failure.code == ErrorCode::UnknownInjection => {}
            _ => return explained,
        }
        let swarm = |key: SwarmKey| {
            self.core.swarms.get(&key).map_or_else(|| "(forgotten)".to_owned(), |swarm| swarm.head.id.to_string())
        };
        match rows::injection_by_prefix(&self.conn, subject.trim()) {
            Ok(Some((key, stored))) => Ok(describe_ended(&swarm(key), &stored)),
            _ => explained,
        }
    }

    /// Lets old events go, now and then.
    fn retain_events(&mut self) {
        if self.failing.is_some() || Instant::now() < self.next_retention {
            return;
        }
        // Events that are kept for a short time are looked for as often.
        let every = RETAIN_EVERY.min(Duration::from_micros(self.settings.keep.age).max(Duration::from_secs(1)));
        let (first, last) = (self.shared.log.first_kept(), self.shared.log.last());
        match delete_some(&self.conn, self.settings.keep, (self.clock)(), first, last) {
            Ok((kept_from, more)) => {
                self.shared.log.set_first_kept(kept_from);
                self.next_retention = Instant::now() + if more { Duration::from_millis(50) } else { every };
            }
            Err(error) => {
                warn!(%error, "failed to delete old events");
                self.next_retention = Instant::now() + every;
            }
        }
    }
}

/// Answers what cannot be done.
fn refuse(command: Command, failure: &Failure) {
    match command {
        Command::Call(Call::Launch(_, steps) | Call::Inject(_, steps) | Call::Terminate(_, steps)) => {
            Caller::Stream(steps).refuse(failure.clone());
        }
        Command::Call(Call::Interrupt(_, reply) | Call::Resolve(_, reply)) => {
            Caller::One(reply).refuse(failure.clone());
        }
        Command::Explain(_, reply) => drop(reply.send(Err(failure.clone()))),
        Command::Read(_, reply) => drop(reply.send(Err(failure.clone()))),
        Command::Happened(_) | Command::Records(..) | Command::Stop => {}
    }
}
