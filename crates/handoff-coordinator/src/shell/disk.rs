//! All sessions' files: what is to be done with one session is done in its order, what concerns several at the same time.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_service::Context;
use drover_types::{Failure, SessionId};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::Job;
use super::session_disk::{Places, SessionDisk};
use crate::core::Input;

/// Threads that wait for disks at the same time.
const THREADS: usize = 8;

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
    ctx: Context,
}

impl Disk {
    pub(crate) fn new(places: Places, jobs: mpsc::Sender<Job>, ctx: &Context) -> Self {
        let threads = Arc::new(Semaphore::new(THREADS));
        Self { inner: Arc::new(Inner { lanes: Mutex::default(), places, jobs, threads, ctx: ctx.clone() }) }
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
        told.await.map_err(|_| Failure::new(drover_types::ErrorCode::ShuttingDown, "sessions are ending here"))
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
