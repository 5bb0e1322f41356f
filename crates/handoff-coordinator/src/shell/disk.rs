//! All sessions' files: what is to be done with one session is done in its order, what concerns several at the same time.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_service::Context;
use drover_types::{ErrorCode, Failure, SessionId};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::warn;

use super::Job;
use super::session_disk::{Answered, Places, SessionDisk};
use crate::core::{Input, Turn};
use crate::session::{Outcome, Record, SessionState};

/// Threads that wait for disks at the same time.
const THREADS: usize = 8;
/// Checkpoints that may wait for their turn; those of further sessions are due again at their next record.
const CHECKPOINTS: usize = 16;

type Op = Box<dyn FnOnce(&mut SessionDisk, &Places) -> Option<Input> + Send>;

#[derive(Default)]
struct Lane {
    queue: VecDeque<Op>,
    /// Somebody works on it, and has its state.
    busy: bool,
    state: Option<Box<SessionDisk>>,
}

/// The files of all sessions. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Disk {
    inner: Arc<Inner>,
}

struct Inner {
    lanes: Mutex<HashMap<SessionId, Lane>>,
    places: Places,
    jobs: mpsc::Sender<Job>,
    threads: Arc<Semaphore>,
    /// Room for checkpoints that wait, and the one that is made: they are many bytes, and turns wait for the same disk.
    waiting: Arc<Semaphore>,
    making: Arc<Semaphore>,
    ctx: Context,
}

impl Disk {
    pub(crate) fn new(places: Places, jobs: mpsc::Sender<Job>, ctx: &Context) -> Self {
        let [threads, waiting, making] = [THREADS, CHECKPOINTS, 1].map(|permits| Arc::new(Semaphore::new(permits)));
        let (lanes, ctx) = (Mutex::default(), ctx.clone());
        Self { inner: Arc::new(Inner { lanes, places, jobs, threads, waiting, making, ctx }) }
    }

    pub(crate) fn places(&self) -> &Places {
        &self.inner.places
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<SessionId, Lane>> {
        self.inner.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has something done with a session's files, after what was asked for before; what comes of it goes to the core.
    pub(crate) fn push(
        &self,
        session: &SessionId,
        op: impl FnOnce(&mut SessionDisk, &Places) -> Option<Input> + Send + 'static,
    ) {
        let begin = {
            let mut lanes = self.lanes();
            let lane = lanes.entry(session.clone()).or_default();
            lane.queue.push_back(Box::new(op));
            !std::mem::replace(&mut lane.busy, true)
        };
        if begin {
            let (disk, session) = (self.clone(), session.clone());
            self.inner.ctx.spawn("disk", async move {
                let Ok(_permit) = Arc::clone(&disk.inner.threads).acquire_owned().await else { return };
                // A panic in it ends the daemon by the task that waits for it.
                let worked = tokio::task::spawn_blocking(move || disk.work(&session)).await;
                if let Err(error) = worked
                    && error.is_panic()
                {
                    std::panic::resume_unwind(error.into_panic());
                }
            });
        }
    }

    /// Asks something of a session's files, after what was asked for before.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        session: &SessionId,
        ask: impl FnOnce(&mut SessionDisk, &Places) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        self.push(session, move |state, places| {
            let _ = tell.send(ask(state, places));
            None
        });
        told.await.map_err(|_| over())
    }

    /// How a turn ended; nothing when that is not known here. Looks through the whole log for one of long ago, while its session goes on.
    pub(crate) async fn answer(&self, session: &SessionId, turn: Turn) -> Result<Option<Outcome>, Failure> {
        let reader = match self.ask(session, move |state, _| state.answer(turn)).await? {
            Some(Answered::Within(reader)) => reader,
            Some(Answered::Is(outcome)) => return Ok(Some(outcome)),
            None => return Ok(None),
        };
        let look = move || {
            let mut found = None;
            let read = reader.for_each(|record| {
                if let Record::Ended { turn: of, outcome, .. } = record
                    && of == turn
                {
                    found = Some(outcome);
                }
            });
            read.ok().and(found)
        };
        tokio::task::spawn_blocking(look).await.map_err(|_| over())
    }

    /// A session as its records add up to; nothing when it is not served here. It goes on meanwhile.
    pub(crate) async fn state(&self, session: &SessionId) -> Result<Option<SessionState>, Failure> {
        let Some(reader) = self.ask(session, |state, _| state.reader()).await? else { return Ok(None) };
        let session = session.clone();
        let read = move || {
            let mut all = Vec::new();
            reader.for_each(|record| all.push(record)).ok()?;
            SessionState::of(&session, &all).ok()
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| over())
    }

    /// Has a checkpoint of a session made when it is due. Nobody waits for it.
    pub(crate) fn checkpoint(&self, session: &SessionId, state: &mut SessionDisk) {
        let Ok(room) = Arc::clone(&self.inner.waiting).try_acquire_owned() else { return };
        let Some((due, made)) = state.due() else { return };
        let (making, ctx, session) = (Arc::clone(&self.inner.making), self.inner.ctx.clone(), session.clone());
        self.inner.ctx.spawn("checkpoint", async move {
            let making = tokio::select! {
                making = making.acquire_owned() => making,
                () = ctx.shutdown().cancelled() => return,
            };
            match tokio::task::spawn_blocking(move || due.make()).await {
                Ok(Err(error)) => warn!(session_id = %session, %error, "no checkpoint"),
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Ok(Ok(_)) | Err(_) => {}
            }
            drop((making, room, made));
        });
    }

    /// Works until nothing is left to do for this session.
    fn work(&self, session: &SessionId) {
        let mut state = self.lanes().get_mut(session).and_then(|lane| lane.state.take());
        loop {
            let op = {
                let mut lanes = self.lanes();
                let Some(lane) = lanes.get_mut(session) else { return };
                if let Some(op) = lane.queue.pop_front() {
                    op
                } else {
                    if state.as_ref().is_none_or(|state| state.is_empty()) {
                        lanes.remove(session);
                    } else {
                        lane.busy = false;
                        lane.state = state.take();
                    }
                    return;
                }
            };
            let state = state.get_or_insert_with(|| Box::new(SessionDisk::new(session.clone())));
            if let Some(input) = op(state, &self.inner.places) {
                // Without the core the daemon is at its end.
                let _ = self.inner.jobs.blocking_send(Job::Input(input));
            }
        }
    }
}

fn over() -> Failure {
    Failure::new(ErrorCode::ShuttingDown, "sessions are ending here")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use drover_types::{AgentKind, Epoch};
    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::core::{Appended, Cause, ClaimOutcome, NodeId, Owner, OwnerRecord};
    use crate::ownership::SharedFiles;
    use crate::session::Opening;

    const LIMIT: Duration = Duration::from_mins(1);

    struct Desk {
        dir: tempfile::TempDir,
        disk: Disk,
        told: mpsc::Receiver<Job>,
        session: SessionId,
        records: u64,
    }

    impl Desk {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let ctx = Context::for_test("disk", &dir.path().join("state"));
            let (node, shared) = (dir.path().join("node"), dir.path().join("shared"));
            let ownership = SharedFiles::new(&shared).unwrap();
            let (jobs, told) = mpsc::channel(16);
            let disk = Disk::new(Places { node, shared, ownership, most: 1 << 30 }, jobs, &ctx);
            let mut desk = Self { dir, disk, told, session: "talk".parse().unwrap(), records: 0 };
            let owner = Owner { node: NodeId::new("swarm/0"), boot: 1 };
            let record = OwnerRecord {
                session: desk.session.clone(),
                epoch: Epoch(1),
                owner: owner.clone(),
                cause: Cause::Opened,
            };
            desk.disk.push(&desk.session, move |state, places| Some(state.claim(places, &record)));
            let claimed = desk.input().await;
            assert!(matches!(claimed, Input::Claimed { outcome: ClaimOutcome::Won, .. }), "{claimed:?}");
            let (capabilities, metadata) = (std::collections::BTreeSet::new(), std::collections::BTreeMap::new());
            let opening = Opening { agent: AgentKind::Echo, replayable: true, capabilities, metadata, at_us: 0 };
            desk.append(vec![Record::Epoch { epoch: Epoch(1), owner, follows: None }, Record::Opened { opening }])
                .await;
            desk
        }

        async fn input(&mut self) -> Input {
            match timeout(LIMIT, self.told.recv()).await {
                Ok(Some(Job::Input(input))) => input,
                _ => panic!("nothing came of it"),
            }
        }

        /// What the core's effect does; waits until it is done.
        async fn append(&mut self, records: Vec<Record>) {
            let (first, disk, id) = (self.records + 1, self.disk.clone(), self.session.clone());
            self.records += records.len() as u64;
            let records = Arc::new(records);
            self.disk.push(&self.session, move |state, places| {
                let input = state.append(places, Epoch(1), first, &records);
                disk.checkpoint(&id, state);
                Some(input)
            });
            let appended = self.input().await;
            assert!(matches!(appended, Input::Appended { outcome: Appended::Done { .. }, .. }), "{appended:?}");
        }

        async fn turn(&mut self, number: u32, answer: String) {
            let turn = Turn(number);
            let (request, prompt) = (format!("r{number}").parse().unwrap(), String::new());
            let outcome = Outcome::Answer(answer);
            let accepted = Record::Accepted { turn, request, prompt, at_us: 0 };
            self.append(vec![accepted, Record::Begun { turn }, Record::Ended { turn, outcome, at_us: 0 }]).await;
        }

        fn checkpoints(&self) -> usize {
            std::fs::read_dir(self.dir.path().join("shared/talk/checkpoints")).map_or(0, Iterator::count)
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn turns_go_on_while_a_checkpoint_waits_and_it_is_made() {
        let mut desk = Desk::new().await;
        // Another session's is being made, and its disk is slow.
        let other = Arc::clone(&desk.disk.inner.making).acquire_owned().await.unwrap();
        for number in 0..8 {
            desk.turn(number, "a".repeat(1 << 20)).await;
        }
        assert_eq!(desk.checkpoints(), 0);
        assert_eq!(desk.disk.inner.waiting.available_permits(), CHECKPOINTS - 1, "one waits, and no second one of it");
        drop(other);
        let until = Instant::now() + LIMIT;
        while desk.checkpoints() == 0 || desk.disk.inner.waiting.available_permits() < CHECKPOINTS {
            assert!(Instant::now() < until, "no checkpoint");
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(desk.checkpoints(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_answer_of_long_ago_is_found_beside_the_turns() {
        let mut desk = Desk::new().await;
        for number in 0..80 {
            desk.turn(number, format!("answer {number}")).await;
        }
        for number in [0, 15, 16, 79] {
            let found = desk.disk.answer(&desk.session, Turn(number)).await.unwrap();
            assert_eq!(found, Some(Outcome::Answer(format!("answer {number}"))));
        }
        assert_eq!(desk.disk.answer(&desk.session, Turn(80)).await.unwrap(), None);
        let state = desk.disk.state(&desk.session).await.unwrap().unwrap();
        assert_eq!(state.messages.len(), 160);
        let elsewhere = "elsewhere".parse().unwrap();
        assert_eq!(desk.disk.answer(&elsewhere, Turn(0)).await.unwrap(), None);
    }
}
