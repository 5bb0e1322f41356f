//! Carries out what the core decides: one loop that feeds it and performs its effects in order.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use drover_config::WorkerConfig;
use drover_service::now_us;
use drover_types::{ErrorCode, Failure, OutboxId};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::agent::{AgentCommand, AgentEvent};
use crate::core::{Core, Delivery, Effect, Exit, Input, Status, Timer, kind};
use crate::inbox::InboxControl;
use crate::membership::{Ears, Word};
use crate::metrics::Metrics;
use crate::slurm;
use crate::spans::Spans;
use crate::store::{Store, StoreError};

/// Agent events taken in one go; their records are written with one system call.
const BATCH: usize = 4096;
/// Pause after a failed write; it doubles up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Somebody's word to end.
#[derive(Debug)]
pub(crate) struct Drain {
    /// Why, for the record.
    pub(crate) reason: String,
    /// Not even the running turn may go on.
    pub(crate) force: bool,
}

/// Where inputs come from.
pub(crate) struct Feeds {
    pub(crate) events: mpsc::Receiver<AgentEvent>,
    pub(crate) inbox: mpsc::Receiver<Vec<Delivery>>,
    pub(crate) drains: mpsc::Receiver<Drain>,
    pub(crate) words: mpsc::Receiver<Word>,
    pub(crate) shutdown: CancellationToken,
}

/// Where effects go.
pub(crate) struct Shell<S> {
    core: Core,
    /// Away only while it works on a thread that may block.
    store: Option<Store<S>>,
    effects: Vec<Effect>,
    commands: mpsc::Sender<AgentCommand>,
    /// Commands that the agent has not taken yet.
    outgoing: VecDeque<AgentCommand>,
    timers: BTreeMap<Timer, Instant>,
    retry: Option<Retry>,
    exit: Option<(Exit, Instant)>,
    /// Says whether a later generation of this node has begun.
    superseded: Arc<dyn Fn() -> bool + Send + Sync>,
    inbox: InboxControl,
    status: watch::Sender<Status>,
    /// What the membership beside this worker hears of it, beside the status.
    ring: watch::Sender<Option<Arc<str>>>,
    hello: watch::Sender<Option<Arc<Value>>>,
    metrics: Metrics,
    spans: Spans,
    told_dropped: u64,
}

struct Retry {
    at: Instant,
    delay: Duration,
}

impl<S: crate::store::Sink> Shell<S> {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another part of the outside, and none goes without the others"
    )]
    pub(crate) fn new(
        node: OutboxId,
        (core, effects): (Core, Vec<Effect>),
        store: Store<S>,
        commands: mpsc::Sender<AgentCommand>,
        superseded: Arc<dyn Fn() -> bool + Send + Sync>,
        inbox: InboxControl,
        status: watch::Sender<Status>,
        metrics: Metrics,
    ) -> Self {
        Self {
            core,
            store: Some(store),
            effects,
            commands,
            outgoing: VecDeque::new(),
            timers: BTreeMap::new(),
            retry: None,
            exit: None,
            superseded,
            inbox,
            status,
            ring: watch::Sender::new(None),
            hello: watch::Sender::new(None),
            metrics,
            spans: Spans::new(node),
            told_dropped: 0,
        }
    }

    /// What the membership beside this worker listens to.
    pub(crate) fn ears(&self) -> Ears {
        Ears { status: self.status.subscribe(), ring: self.ring.subscribe(), hello: self.hello.subscribe() }
    }

    /// Runs until the core says exit, and then until the agent has ended.
    pub(crate) async fn drive(mut self, mut feeds: Feeds) -> anyhow::Result<()> {
        let ended = self.serve(&mut feeds).await;
        self.inbox.stop();
        self.stop_agent(&mut feeds.events).await;
        match ended? {
            Exit::Drained => Ok(()),
            Exit::Failed(failure) if failure.hint.is_empty() => Err(anyhow!("{failure}")),
            Exit::Failed(failure) => Err(anyhow!("{failure}; {}", failure.hint)),
        }
    }

    async fn serve(&mut self, feeds: &mut Feeds) -> anyhow::Result<Exit> {
        let mut events = Vec::with_capacity(BATCH);
        let (mut agent_lives, mut signalled) = (true, false);
        let commands = self.commands.clone();
        self.perform().await?;
        loop {
            self.publish();
            if let Some((exit, give_up_at)) = &self.exit {
                if !self.is_behind() {
                    return Ok(exit.clone());
                }
                if Instant::now() >= *give_up_at {
                    return Err(anyhow!("the worker ended, but its last records could not be written"));
                }
            }
            let may_send = self.outgoing.front().is_some_and(|command| self.may_send(command));
            let (timer, retry) = (self.timers.values().min().copied(), self.retry.as_ref().map(|retry| retry.at));
            let last_words = self.exit.as_ref().map(|(_, at)| *at);
            tokio::select! {
                count = feeds.events.recv_many(&mut events, BATCH), if agent_lives => {
                    if count == 0 {
                        agent_lives = false;
                        self.handle(Input::AgentGone);
                    }
                    for event in events.drain(..) {
                        self.handle(Input::Agent(event));
                    }
                }
                batch = feeds.inbox.recv() => match batch {
                    Some(batch) => batch.into_iter().for_each(|delivery| self.handle(Input::Inbox(delivery))),
                    None => return Err(anyhow!("the inbox reader ended; look for a panic in the worker's log")),
                },
                permit = commands.reserve(), if may_send => match permit {
                    Ok(permit) => if let Some(command) = self.outgoing.pop_front() { permit.send(command) },
                    // That the agent is gone is learnt from its events.
                    Err(_) => self.outgoing.clear(),
                },
                () = until(timer) => self.fire_timers(),
                () = until(retry) => {}
                () = until(last_words) => {}
                Some(drain) = feeds.drains.recv() => self.drain(drain),
                Some(Word { kind, data }) = feeds.words.recv() => self.handle(Input::Word { kind, data }),
                () = feeds.shutdown.cancelled(), if !signalled => {
                    signalled = true;
                    let why = slurm::why_told(|name| std::env::var(name).ok(), SystemTime::now());
                    self.handle(Input::Drain { reason: why.to_owned() });
                }
            }
            self.perform().await?;
        }
    }

    fn handle(&mut self, input: Input) {
        self.core.handle(Instant::now().into_std(), input, &mut self.effects);
    }

    fn drain(&mut self, Drain { reason, force }: Drain) {
        self.handle(Input::Drain { reason });
        if force {
            // The timer may have been set before, or its order may wait to be carried out: no turn gets two graces.
            self.effects.push(Effect::CancelTimer(Timer::DrainGrace));
            self.handle(Input::Timer(Timer::DrainGrace));
        }
    }

    fn fire_timers(&mut self) {
        let now = Instant::now();
        let due: Vec<Timer> =
            self.timers.iter().filter(|(_, at)| **at <= now).map(|(timer, _)| timer.clone()).collect();
        for timer in due {
            self.timers.remove(&timer);
            self.handle(Input::Timer(timer));
        }
    }

    /// A prompt goes to the agent only when everything written before it is on disk.
    fn may_send(&self, command: &AgentCommand) -> bool {
        !matches!(command, AgentCommand::Begin { .. } | AgentCommand::Steer { .. }) || !self.is_behind()
    }

    fn is_behind(&self) -> bool {
        self.store.as_ref().is_some_and(Store::is_behind)
    }

    /// Carries out all effects, and those that follow from how that went.
    async fn perform(&mut self) -> anyhow::Result<()> {
        while !self.effects.is_empty() || self.may_write() {
            self.refuse_when_superseded().await?;
            self.apply();
            if !self.may_write() {
                continue;
            }
            match self.flush().await {
                Ok(()) => self.wrote(),
                Err(error) => self.failed_to_write(&error),
            }
        }
        Ok(())
    }

    fn may_write(&self) -> bool {
        self.is_behind() && self.retry.as_ref().is_none_or(|retry| retry.at <= Instant::now())
    }

    /// A later worker of this node may be at work already: then nothing may be begun here.
    async fn refuse_when_superseded(&self) -> anyhow::Result<()> {
        let begins =
            |effect: &Effect| matches!(effect, Effect::Agent(AgentCommand::Begin { .. } | AgentCommand::Steer { .. }));
        if self.effects.iter().any(begins) {
            let superseded = Arc::clone(&self.superseded);
            if tokio::task::spawn_blocking(move || superseded()).await? {
                return Err(anyhow!("a later worker of this node has begun; this one leaves the field to it"));
            }
        }
        Ok(())
    }

    fn apply(&mut self) {
        let Some(store) = &mut self.store else { return };
        let ts = now_us();
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Write { injection, trace, kind, data } => {
                    let trace = self.spans.trace_of(injection.as_ref(), trace.as_ref(), &kind, &data);
                    store.write(ts, injection.as_ref(), trace, &kind, &data);
                    if kind == kind::WORKER_HELLO {
                        self.hello.send_replace(Some(Arc::new(data["detail"].clone())));
                    }
                }
                Effect::SyncOutbox => store.sync_outbox(),
                Effect::Journal(entry) => {
                    self.spans.note(&entry);
                    store.journal(entry);
                }
                Effect::SyncJournal => store.sync_journal(),
                Effect::Agent(command) => self.outgoing.push_back(command),
                Effect::Keyring(ring) => {
                    self.ring.send_replace(Some(ring));
                }
                Effect::SetTimer(timer, at) => {
                    self.timers.insert(timer, Instant::from_std(at));
                }
                Effect::CancelTimer(timer) => {
                    self.timers.remove(&timer);
                }
                Effect::Exit(exit) => self.exit = Some((exit, Instant::now() + WorkerConfig::LAST_WORDS)),
            }
        }
    }

    async fn flush(&mut self) -> Result<(), StoreError> {
        let Some(mut store) = self.store.take() else { return Ok(()) };
        let ended = tokio::task::spawn_blocking(move || {
            let flushed = store.flush(now_us());
            (store, flushed)
        })
        .await;
        match ended {
            Ok((store, flushed)) => {
                self.store = Some(store);
                flushed
            }
            // Only a panic or the end of the runtime: there is no store any more to go on with.
            Err(error) => std::panic::resume_unwind(error.try_into_panic().unwrap_or_else(|error| Box::new(error))),
        }
    }

    fn wrote(&mut self) {
        if self.retry.take().is_none() {
            return;
        }
        let dropped = self.store.as_ref().map_or(0, |store| store.written().dropped);
        info!(dropped, "the mailbox can be written again");
        if dropped > self.told_dropped {
            let message =
                format!("{} records were given up while the mailbox could not be written", dropped - self.told_dropped);
            let failure =
                Failure::new(ErrorCode::StoreUnavailable, message).hint("answers and ends of turns are complete");
            self.told_dropped = dropped;
            self.handle(Input::Said(failure));
        }
        self.handle(Input::Store { writable: true });
    }

    fn failed_to_write(&mut self, error: &StoreError) {
        self.metrics.store_failed();
        let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        if let Some(retry) = &mut self.retry {
            debug!(%error, source, "still not");
            retry.delay = (retry.delay * 2).min(LONGEST_RETRY);
            retry.at = Instant::now() + retry.delay;
        } else {
            error!(%error, source, "records are kept in memory and no prompt is begun until it can be written; free some space");
            self.retry = Some(Retry { at: Instant::now() + FIRST_RETRY, delay: FIRST_RETRY });
            self.handle(Input::Store { writable: false });
        }
        // The turn may be over before the disk is back, so these prompts wait for one of their own.
        for command in std::mem::take(&mut self.outgoing) {
            match command {
                AgentCommand::Steer { injection, prompt, .. } => {
                    self.handle(Input::Agent(AgentEvent::SteerRefused { injection, prompt }));
                }
                other => self.outgoing.push_back(other),
            }
        }
    }

    fn publish(&mut self) {
        let status = self.core.status();
        if let Some(store) = &self.store {
            self.metrics.update(self.core.counts(), &status, store.written());
        }
        self.inbox.set_hot(self.core.is_hot());
        self.status.send_if_modified(|old| {
            let news = *old != status;
            if news {
                *old = status;
            }
            news
        });
    }

    /// Asks the agent to end and waits for it; what it still says no longer matters.
    async fn stop_agent(&mut self, events: &mut mpsc::Receiver<AgentEvent>) {
        let deadline = Instant::now() + WorkerConfig::AGENT_STOP;
        let stopped = timeout_at(deadline, async {
            let ended = async { while events.recv().await.is_some() {} };
            tokio::pin!(ended);
            tokio::select! {
                () = &mut ended => return,
                // An agent that is gone cannot be asked.
                _ = self.commands.send(AgentCommand::Stop) => {}
            }
            ended.await;
        });
        if stopped.await.is_err() {
            warn!("the agent did not end in time and is left to die with this process");
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests;
