//! What those who want something done hold in their hands.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use drover_types::Failure;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::cache::{Cache, Key};
use crate::call::{CallAnswer, CallError, LimitHints};
use crate::core::{AttemptId, ClientId, LeaseId, Money, Status, TaskId};
use crate::ledger::{Day, LedgerError};
use crate::shell::{Chain, Done, Job, Lane, Lanes};

/// Messages that may wait for the driver.
const QUEUE: usize = 1024;
/// Notes that a reader may be behind before it misses some.
const NOTES: usize = 64;

/// What the driver is told.
pub(super) enum Message {
    Submit { task: TaskId, client: ClientId, weight: u32, job: Box<Job>, reply: Reply },
    FirstByte { attempt: AttemptId },
    Headers { attempt: AttemptId, hints: LimitHints },
    Lease { id: LeaseId, granted: Result<(), Refused> },
    Day { day: Day, counted: Result<Money, LedgerError> },
    Look { reply: oneshot::Sender<Snapshot> },
}

/// Why no money was set aside.
pub(super) enum Refused {
    /// So much is left.
    Left(Money),
    /// The ledger cannot be written.
    Ledger(LedgerError),
}

/// How a call ended.
pub(super) enum End {
    /// By itself.
    Called(Box<Result<CallAnswer, CallError>>),
    /// It was broken off.
    Aborted,
}

/// What nobody wants any more. Told through a queue of its own, because whoever goes away cannot wait. That queue needs no bound:
/// each task and each client is told of once at most, so it is never longer than the list of those that were let in, which is
/// bounded, and the driver takes from it before anything else.
pub(super) enum Unwanted {
    Task(TaskId),
    Client(ClientId),
}

/// Where the end of a task is told.
pub(super) enum Reply {
    One(oneshot::Sender<Done>),
    Tagged { tag: u64, to: mpsc::Sender<Tagged> },
}

/// The end of one of many jobs.
#[derive(Debug)]
pub struct Tagged {
    /// What the job was submitted with.
    pub tag: u64,
    /// What came of it.
    pub done: Done,
}

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Stable code.
    pub code: &'static str,
    /// What it is.
    pub message: String,
    /// What to do.
    pub hint: String,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
}

/// How things are.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Tasks that wait.
    pub queued: u64,
    /// Calls under way.
    pub under_way: u64,
    /// Calls since the start.
    pub calls: u64,
    /// Each lane but that of errands.
    pub lanes: Vec<LaneSnapshot>,
    /// Notes, the latest last.
    pub notes: Vec<Note>,
}

/// How one lane is.
#[derive(Debug, Clone)]
pub struct LaneSnapshot {
    /// Which.
    pub lane: Arc<Lane>,
    /// Calls under way.
    pub under_way: u32,
    /// Most calls at once as it is now.
    pub width: u32,
    /// `closed`, `open` or `half_open`.
    pub breaker: &'static str,
}

/// The one who gets things done. Clones are the same.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
    cache: Option<Cache>,
}

struct Inner {
    messages: mpsc::Sender<Message>,
    unwanted: mpsc::UnboundedSender<Unwanted>,
    notes: broadcast::Sender<Note>,
    lanes: Arc<Lanes>,
    next_client: AtomicU64,
    next_task: AtomicU64,
}

/// The driver's ends of the queues.
pub(super) struct Queues {
    pub(super) messages: mpsc::Receiver<Message>,
    pub(super) unwanted: mpsc::UnboundedReceiver<Unwanted>,
    pub(super) notes: broadcast::Sender<Note>,
    /// For the tasks that the driver starts.
    pub(super) tell: mpsc::Sender<Message>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("lanes", &self.inner.lanes).finish_non_exhaustive()
    }
}

impl Pool {
    pub(super) fn new(lanes: Arc<Lanes>) -> (Self, Queues) {
        let (messages, waiting) = mpsc::channel(QUEUE);
        let (unwanted, going) = mpsc::unbounded_channel();
        let (notes, _) = broadcast::channel(NOTES);
        let queues = Queues { messages: waiting, unwanted: going, notes: notes.clone(), tell: messages.clone() };
        let inner =
            Inner { messages, unwanted, notes, lanes, next_client: AtomicU64::new(1), next_task: AtomicU64::new(1) };
        (Self { inner: Arc::new(inner), cache: None }, queues)
    }

    /// The same pool, where an answer that was kept is given again.
    #[must_use]
    pub(crate) fn cached(self, cache: Cache) -> Self {
        Self { cache: Some(cache), ..self }
    }

    /// Where calls can go.
    pub fn lanes(&self) -> &Lanes {
        &self.inner.lanes
    }

    /// The lanes for somebody who may name a provider, a model or both.
    pub fn chain(&self, provider: Option<&str>, model: Option<&str>) -> Result<Chain, Failure> {
        self.inner.lanes.named(provider, model)
    }

    /// A new client. Shares are fair between clients, by weight; whoever stands for one person or one run is one client.
    pub fn client(&self, weight: u32) -> Client {
        let id = ClientId(self.inner.next_client.fetch_add(1, Ordering::Relaxed));
        Client { pool: self.clone(), id, weight: weight.max(1) }
    }

    /// How things are; `None` when the dispatcher is stopping.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, answer) = oneshot::channel();
        self.inner.messages.send(Message::Look { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Notes from now on.
    pub fn notes(&self) -> broadcast::Receiver<Note> {
        self.inner.notes.subscribe()
    }
}

/// One who wants things done. When it is dropped, whatever it still waits for is broken off.
#[derive(Debug)]
pub struct Client {
    pool: Pool,
    id: ClientId,
    weight: u32,
}

impl Client {
    /// The pool that it is a client of.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Does one job. When the future is dropped the job is broken off.
    pub async fn run(&self, job: Job) -> Done {
        match self.kept(&job) {
            Some((cache, key)) => cache.through(key, job, |job| self.pool.run(self.id, self.weight, job)).await,
            None => self.pool.run(self.id, self.weight, job).await,
        }
    }

    /// Hands in one of many jobs; its end comes through `to`, which must have room for as many as are handed in at a time.
    /// `None` when the dispatcher is stopping: then nothing comes.
    pub async fn submit(&self, job: Job, tag: u64, to: &mpsc::Sender<Tagged>) -> Option<TaskId> {
        let Some((cache, key)) = self.kept(&job) else {
            return self.pool.send(self.id, self.weight, job, Reply::Tagged { tag, to: to.clone() }).await;
        };
        let (pool, id, weight, to) = (self.pool.clone(), self.id, self.weight, to.clone());
        let cache = cache.clone();
        cache.ctx().clone().spawn("question", async move {
            let work = cache.through(key, job, |job| pool.run(id, weight, job));
            tokio::select! {
                done = work => {
                    let _ = to.send(Tagged { tag, done }).await;
                }
                () = to.closed() => {}
            }
        });
        Some(self.pool.next_task())
    }

    /// The cache, when the job's answer may come from it.
    fn kept(&self, job: &Job) -> Option<(&Cache, Key)> {
        let cache = self.pool.cache.as_ref()?;
        Some((cache, cache.key(job)?))
    }
}

impl Pool {
    fn next_task(&self) -> TaskId {
        TaskId(self.inner.next_task.fetch_add(1, Ordering::Relaxed))
    }

    async fn run(&self, client: ClientId, weight: u32, job: Job) -> Done {
        let (reply, answer) = oneshot::channel();
        let Some(task) = self.send(client, weight, job, Reply::One(reply)).await else { return stopping() };
        let mut guard = Guard { pool: self, task: Some(task) };
        let done = answer.await;
        guard.task = None;
        done.unwrap_or_else(|_| stopping())
    }

    async fn send(&self, client: ClientId, weight: u32, job: Job, reply: Reply) -> Option<TaskId> {
        let task = self.next_task();
        let message = Message::Submit { task, client, weight, job: Box::new(job), reply };
        self.inner.messages.send(message).await.ok()?;
        Some(task)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.pool.inner.unwanted.send(Unwanted::Client(self.id));
    }
}

/// Breaks a job off unless its end has come.
struct Guard<'a> {
    pool: &'a Pool,
    task: Option<TaskId>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(task) = self.task {
            let _ = self.pool.inner.unwanted.send(Unwanted::Task(task));
        }
    }
}

/// What came of a job that could not be handed in any more.
fn stopping() -> Done {
    let now = drover_service::now_us();
    Done {
        status: Status::Cancelled,
        answer: None,
        error: "the dispatcher is stopping".to_owned(),
        attempts: 0,
        cost: Money::ZERO,
        lane: None,
        started_us: now,
        ended_us: now,
        busy: std::time::Duration::ZERO,
        beside: 0,
        cached: false,
    }
}
