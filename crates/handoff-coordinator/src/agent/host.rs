//! The conversations of this node: one task each, which runs the turns that the core begins and tells it what came of them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use drover_service::{Context, now_us};
use drover_types::{Epoch, ErrorCode, Failure, SessionId};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Agents, Conversation, History, SharedTool, Start, TurnAsked, TurnDone, TurnOut};
use crate::bundle::{Capturer, Limits, restore};
use crate::core::{Call, HandoffId, Input, Turn};
use crate::session::{Outcome, Record, TurnFault};
use crate::shell::{Disk, Jobs};

/// How long a turn may take to end when its session leaves.
const POLITE: Duration = Duration::from_secs(3);
/// The same when only the turn is to end: longer than an agent takes that ends whatever it has started.
const EARLY: Duration = Duration::from_secs(30);
/// Pause until a call is made again that the file system did not answer.
const AGAIN: Duration = Duration::from_millis(500);

/// What a running turn has said so far.
#[derive(Debug, Default)]
pub(crate) struct LiveTurn {
    text: Mutex<String>,
    len: watch::Sender<usize>,
}

impl LiveTurn {
    pub(crate) fn say(&self, piece: &str) {
        let len = {
            let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(piece);
            text.len()
        };
        self.len.send_replace(len);
    }

    /// Tells when there is more.
    pub(crate) fn watch(&self) -> watch::Receiver<usize> {
        self.len.subscribe()
    }

    /// What stands behind an offset, which lies between two characters.
    pub(crate) fn after(&self, offset: usize) -> Option<String> {
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        text.get(offset..).map(str::to_owned)
    }

    fn begin(&self) {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.len.send_replace(0);
    }
}

type Turns = HashMap<(SessionId, Turn), Weak<LiveTurn>>;

/// What the turns of this node are saying, as long as somebody speaks or listens. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    turns: Arc<Mutex<Turns>>,
}

impl Live {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn, also one that has yet to begin.
    pub(crate) fn of(&self, session: &SessionId, turn: Turn) -> Arc<LiveTurn> {
        let mut turns = self.turns();
        if turns.len() == turns.capacity() {
            turns.retain(|_, turn| turn.strong_count() > 0);
        }
        let entry = turns.entry((session.clone(), turn)).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let live = Arc::new(LiveTurn::default());
            *entry = Arc::downgrade(&live);
            live
        })
    }
}

enum Word {
    Run { turn: Turn, again: bool, early: CancellationToken },
    Park { handoff: HandoffId },
}

/// Words that may wait for a conversation. The core begins a turn when the one before it has ended, so one that is behind by more hangs: it is
/// ended, and another one takes its place.
const WORDS: usize = 4;

type Calls = Arc<Mutex<HashMap<Call, oneshot::Sender<String>>>>;

/// One conversation's task, from outside.
struct Seat {
    epoch: Epoch,
    words: mpsc::Sender<Word>,
    /// The turn that it was given last, and its end before its time.
    given: Option<(Turn, CancellationToken)>,
    /// The turn that runs is to end, because the session leaves.
    interrupt: CancellationToken,
    /// All of it is to end.
    stop: CancellationToken,
    ended: watch::Receiver<bool>,
    calls: Calls,
    /// It takes no further turn.
    ending: bool,
}

/// The conversations of this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    seats: Mutex<HashMap<SessionId, Seat>>,
    agents: Agents,
    disk: Disk,
    jobs: Jobs,
    live: Live,
    tool: SharedTool,
    turns: Arc<Semaphore>,
    most_turns: usize,
    ctx: Context,
}

impl Host {
    /// `turns`: most that run at a time; the others wait.
    pub(crate) fn new(agents: Agents, disk: Disk, jobs: Jobs, live: Live, turns: usize, ctx: &Context) -> Self {
        let tool = SharedTool::new(disk.places().shared.clone());
        let (seats, ctx) = (Mutex::default(), ctx.clone());
        let semaphore = Arc::new(Semaphore::new(turns));
        let inner = Inner { seats, agents, disk, jobs, live, tool, turns: semaphore, most_turns: turns, ctx };
        Self { inner: Arc::new(inner) }
    }

    fn seats(&self) -> MutexGuard<'_, HashMap<SessionId, Seat>> {
        self.inner.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns that run now.
    pub(crate) fn running(&self) -> usize {
        self.inner.most_turns - self.inner.turns.available_permits().min(self.inner.most_turns)
    }

    /// Gives a turn to the session's agent.
    pub(crate) fn run(&self, session: &SessionId, epoch: Epoch, turn: Turn, again: bool) {
        let mut seats = self.seats();
        let early = CancellationToken::new();
        let word = || Word::Run { turn, again, early: early.clone() };
        let fit = seats.get_mut(session).filter(|seat| seat.epoch == epoch && !seat.ending);
        if let Some(seat) = fit
            && seat.words.try_send(word()).is_ok()
        {
            seat.given = Some((turn, early));
            return;
        }
        let before = seats.remove(session).map(|seat| {
            seat.stop.cancel();
            seat.ended
        });
        let mut seat = self.seat(session, epoch, before);
        // The first word of a fresh one always finds room.
        let _ = seat.words.try_send(word());
        seat.given = Some((turn, early));
        seats.insert(session.clone(), seat);
    }

    fn seat(&self, session: &SessionId, epoch: Epoch, before: Option<watch::Receiver<bool>>) -> Seat {
        let (words, heard) = mpsc::channel(WORDS);
        let (over, ended) = watch::channel(false);
        let (interrupt, stop, calls) = (CancellationToken::new(), CancellationToken::new(), Calls::default());
        let talk = Talk {
            host: self.clone(),
            session: session.clone(),
            epoch,
            interrupt: interrupt.clone(),
            stop: stop.clone(),
            calls: Arc::clone(&calls),
            conversation: None,
            capturer: None,
            dir: self.inner.disk.places().dir(session).join("files"),
            travels: false,
        };
        self.inner.ctx.spawn("session", async move {
            if let Some(mut before) = before {
                // Of one session two processes never run side by side.
                let _ = before.wait_for(|ended| *ended).await;
            }
            talk.serve(heard).await;
            over.send_replace(true);
        });
        Seat { epoch, words, given: None, interrupt, stop, ended, calls, ending: false }
    }

    /// Has a turn end early, when it is one that the agent was given.
    pub(crate) fn interrupt(&self, session: &SessionId, epoch: Epoch, turn: Turn) {
        let seats = self.seats();
        let given = seats.get(session).filter(|seat| seat.epoch == epoch).and_then(|seat| seat.given.as_ref());
        if let Some((_, early)) = given.filter(|(given, _)| *given == turn) {
            early.cancel();
        }
    }

    /// Ends the agent's process of a session and then says so.
    pub(crate) fn park(&self, session: &SessionId, epoch: Epoch, handoff: HandoffId) {
        let told = {
            let mut seats = self.seats();
            let seat = seats.get_mut(session).filter(|seat| seat.epoch == epoch && !seat.ending);
            seat.filter(|seat| !seat.words.is_closed()).is_some_and(|seat| {
                seat.ending = true;
                seat.interrupt.cancel();
                let told = seat.words.try_send(Word::Park { handoff }).is_ok();
                if !told {
                    seat.stop.cancel();
                }
                told
            })
        };
        if !told {
            // No process of it runs, or soon none does.
            let ended = self.seats().get(session).map(|seat| seat.ended.clone());
            let (jobs, session) = (self.inner.jobs.clone(), session.clone());
            self.inner.ctx.spawn("park", async move {
                if let Some(mut ended) = ended {
                    let _ = ended.wait_for(|ended| *ended).await;
                }
                jobs.input(Input::Parked { session, epoch, handoff }).await;
            });
        }
    }

    /// The session is not served here any more, not in this epoch.
    pub(crate) fn stop(&self, session: &SessionId, epoch: Epoch) {
        let mut seats = self.seats();
        if let Some(seat) = seats.get(session).filter(|seat| seat.epoch <= epoch) {
            seat.stop.cancel();
            let ended = seat.ended.clone();
            seats.remove(session);
            drop(seats);
            let (host, session) = (self.clone(), session.clone());
            self.inner.ctx.spawn("release", async move {
                let mut ended = ended;
                let _ = ended.wait_for(|ended| *ended).await;
                host.inner.disk.push(&session, move |state, places| {
                    state.release(places, epoch);
                    None
                });
            });
        } else {
            drop(seats);
            self.inner.disk.push(session, move |state, places| {
                state.release(places, epoch);
                None
            });
        }
    }

    /// Calls a tool, until it answers or the session leaves.
    pub(crate) fn call(&self, session: &SessionId, epoch: Epoch, call: Call) {
        let stop = self.seats().get(session).filter(|seat| seat.epoch == epoch).map(|seat| seat.stop.clone());
        let (host, session) = (self.clone(), session.clone());
        self.inner.ctx.spawn("tool", async move {
            let inner = &host.inner;
            let Ok(Some(what)) = inner.disk.ask(&session, move |state, _| state.call(call)).await else { return };
            let stop = stop.unwrap_or_default();
            loop {
                let ownership = inner.disk.places().ownership.clone();
                let made = inner.tool.call(session.clone(), epoch, call, what.clone(), ownership);
                let result = tokio::select! {
                    result = made => result,
                    () = stop.cancelled() => return,
                    () = inner.ctx.shutdown().cancelled() => return,
                };
                if let Some(result) = result {
                    inner.jobs.input(Input::Returned { session, epoch, call, result }).await;
                    return;
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Gives the agent what a tool has answered.
    pub(crate) fn resume(&self, session: &SessionId, epoch: Epoch, call: Call) {
        let waiting = self
            .seats()
            .get(session)
            .filter(|seat| seat.epoch == epoch)
            .and_then(|seat| seat.calls.lock().unwrap_or_else(PoisonError::into_inner).remove(&call));
        let Some(waiting) = waiting else { return };
        let (disk, session) = (self.inner.disk.clone(), session.clone());
        self.inner.ctx.spawn("tool result", async move {
            if let Ok(Some(result)) = disk.ask(&session, move |state, _| state.result(call)).await {
                let _ = waiting.send(result);
            }
        });
    }
}

fn interrupted() -> TurnDone {
    let message = "the turn was interrupted".to_owned();
    TurnDone { outcome: Outcome::Failed { fault: TurnFault::Interrupted, message }, context: Vec::new() }
}

/// How a turn ended that was to end early: with its answer when it had one by then.
fn cut_short(done: TurnDone) -> TurnDone {
    match done.outcome {
        Outcome::Failed { fault: TurnFault::AgentFailed | TurnFault::TurnLost, .. } => {
            TurnDone { context: done.context, ..interrupted() }
        }
        Outcome::Answer(_) | Outcome::Failed { .. } => done,
    }
}

/// One conversation.
struct Talk {
    host: Host,
    session: SessionId,
    epoch: Epoch,
    interrupt: CancellationToken,
    stop: CancellationToken,
    calls: Calls,
    conversation: Option<Box<dyn Conversation>>,
    capturer: Option<Capturer>,
    dir: PathBuf,
    travels: bool,
}

impl Talk {
    async fn serve(mut self, mut heard: mpsc::Receiver<Word>) {
        let shutdown = self.host.inner.ctx.shutdown().clone();
        let mut parked = None;
        loop {
            let word = tokio::select! {
                word = heard.recv() => word,
                () = self.stop.cancelled() => None,
                () = shutdown.cancelled() => None,
            };
            match word {
                None => break,
                Some(Word::Run { turn, again, early }) => {
                    if !self.run(turn, again, early).await {
                        // Only a word to park can be behind it.
                        heard.close();
                    }
                }
                Some(Word::Park { handoff }) => {
                    parked = Some(handoff);
                    break;
                }
            }
        }
        heard.close();
        if let Some(conversation) = self.conversation.take() {
            conversation.end().await;
        }
        while let Ok(word) = heard.try_recv() {
            if let Word::Park { handoff } = word {
                parked = Some(handoff);
            }
        }
        if let Some(handoff) = parked {
            let (session, epoch) = (self.session.clone(), self.epoch);
            self.host.inner.jobs.input(Input::Parked { session, epoch, handoff }).await;
        }
    }

    /// Runs a turn. False: it was broken off, and the conversation with it.
    async fn run(&mut self, turn: Turn, again: bool, early: CancellationToken) -> bool {
        let inner = Arc::clone(&self.host.inner);
        let asked = inner.disk.ask(&self.session, move |state, _| state.prompt(turn)).await;
        let Ok(Some(prompt)) = asked else {
            debug!(session_id = %self.session, turn = turn.0, "a turn that is not to be run any more");
            return true;
        };
        let permit = tokio::select! {
            permit = Arc::clone(&inner.turns).acquire_owned() => permit,
            () = self.stop.cancelled() => return false,
            () = self.interrupt.cancelled() => return false,
            () = early.cancelled() => {
                self.ended(turn, interrupted()).await;
                return true;
            }
        };
        let live = inner.live.of(&self.session, turn);
        live.begin();
        if self.conversation.is_none() {
            match self.begin().await {
                Ok(conversation) => self.conversation = Some(conversation),
                Err(failure) => {
                    warn!(session_id = %self.session, error = %failure, "the agent does not begin");
                    self.ended(turn, TurnDone::failed(failure.to_string())).await;
                    return true;
                }
            }
        }
        if early.is_cancelled() {
            self.ended(turn, interrupted()).await;
            return true;
        }
        let stop = self.interrupt.child_token();
        let asked = TurnAsked { turn, request: prompt.request, prompt: prompt.text, again, stop: stop.clone() };
        let out = self.out(turn, live);
        let Some(conversation) = &mut self.conversation else { return true };
        let (whole, interrupt, shutdown) = (self.stop.clone(), self.interrupt.clone(), inner.ctx.shutdown().clone());
        let wanted_early = early.clone();
        let broken_off = async move {
            let leaves = async {
                tokio::select! {
                    () = whole.cancelled() => {}
                    () = interrupt.cancelled() => {}
                    () = shutdown.cancelled() => {}
                }
            };
            tokio::pin!(leaves);
            tokio::select! {
                () = &mut leaves => {}
                () = wanted_early.cancelled() => {
                    stop.cancel();
                    tokio::select! {
                        () = &mut leaves => {}
                        () = tokio::time::sleep(EARLY) => return,
                    }
                }
            }
            stop.cancel();
            tokio::time::sleep(POLITE).await;
        };
        let done = tokio::select! {
            done = conversation.turn(asked, &out) => Some(done),
            () = broken_off => None,
        };
        drop(permit);
        if self.stop.is_cancelled() || self.interrupt.is_cancelled() {
            return false;
        }
        match done {
            Some(done) if early.is_cancelled() => self.ended(turn, cut_short(done)).await,
            Some(done) => self.ended(turn, done).await,
            None if early.is_cancelled() && !inner.ctx.shutdown().is_cancelled() => {
                // It was asked to end the turn and did not: then it ends itself, and the next turn has another one.
                if let Some(conversation) = self.conversation.take() {
                    conversation.end().await;
                }
                self.ended(turn, interrupted()).await;
            }
            None => return false,
        }
        true
    }

    fn out(&self, turn: Turn, live: Arc<LiveTurn>) -> TurnOut {
        let (session, epoch, calls) = (self.session.clone(), self.epoch, Arc::clone(&self.calls));
        let (jobs, count) = (self.host.inner.jobs.clone(), Arc::new(std::sync::atomic::AtomicU32::new(0)));
        TurnOut::new(live, move |what| {
            let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let call = Call { turn, n };
            let (tell, told) = oneshot::channel();
            calls.lock().unwrap_or_else(PoisonError::into_inner).insert(call, tell);
            let (jobs, session) = (jobs.clone(), session.clone());
            Box::pin(async move {
                jobs.input(Input::Called { session, epoch, call, what }).await;
                told.await.ok()
            })
        })
    }

    async fn begin(&mut self) -> Result<Box<dyn Conversation>, Failure> {
        let inner = &self.host.inner;
        let (disk, session) = (inner.disk.clone(), self.session.clone());
        let gone = || Failure::new(ErrorCode::TurnLost, "the session has left this node");
        let begun = disk.ask(&session, |state, _| state.begun()).await?;
        let (opening, files) = begun.ok_or_else(gone)?;
        let agent = inner.agents.get(opening.agent).cloned().ok_or_else(|| {
            Failure::new(ErrorCode::InvalidRequest, format!("this node has no agent {}", opening.agent))
        })?;
        self.travels = agent.travels();
        let places = disk.places().clone();
        let private = places.dir(&session).join("private");
        let (dir, pieces) = (self.dir.clone(), places.shared.join(session.as_str()).join("files"));
        let (travels, made) = (self.travels, private.clone());
        let prepared = tokio::task::spawn_blocking(move || {
            crate::files::make_dir(&made).map_err(|error| error.to_string())?;
            if let Some(manifest) = files.filter(|_| travels) {
                restore(&pieces, &manifest, &dir, Limits::default()).map_err(|error| error.to_string())?;
            }
            crate::files::make_dir(&dir).map_err(|error| error.to_string())?;
            Ok::<_, String>(Capturer::new(dir, pieces, Limits::default()))
        });
        let prepared = prepared.await.map_err(|error| error.to_string()).and_then(|made| made);
        let broken = |why| Failure::new(ErrorCode::StoreUnavailable, format!("the session's files: {why}"));
        self.capturer = Some(prepared.map_err(broken)?);
        let history = {
            let session = session.clone();
            History::new(move || {
                let (disk, session) = (disk.clone(), session.clone());
                Box::pin(async move { disk.state(&session).await?.ok_or_else(gone) })
            })
        };
        info!(session_id = %session, epoch = self.epoch.0, agent = %opening.agent, "an agent begins");
        agent.begin(Start { session, epoch: self.epoch, dir: self.dir.clone(), private, opening, history }).await
    }

    /// Tells the core, with what the turn leaves behind.
    async fn ended(&mut self, turn: Turn, done: TurnDone) {
        let inner = Arc::clone(&self.host.inner);
        let mut outcome = done.outcome;
        let mut notes: Vec<Record> =
            done.context.into_iter().map(|(key, value)| Record::Context { key, value }).collect();
        if let Some(mut capturer) = self.capturer.take().filter(|_| self.travels) {
            let captured = tokio::task::spawn_blocking(move || {
                let captured = capturer.capture();
                (capturer, captured)
            });
            match captured.await {
                Ok((capturer, Ok(captured))) => {
                    self.capturer = Some(capturer);
                    notes.push(Record::Files { manifest: captured.manifest });
                }
                Ok((capturer, Err(error))) => {
                    self.capturer = Some(capturer);
                    warn!(session_id = %self.session, %error, "the working directory is not kept");
                    let message = format!("the turn ended, and its files cannot be kept: {error}");
                    outcome = Outcome::Failed { fault: TurnFault::AgentFailed, message };
                }
                Err(error) => warn!(session_id = %self.session, %error, "the working directory is not kept"),
            }
        }
        let (session, epoch, at_us) = (self.session.clone(), self.epoch, now_us());
        inner.jobs.input(Input::Ended { session, epoch, turn, outcome, notes, at_us }).await;
    }
}
