//! Answers that are given again to exactly the same question: nothing is asked, and nothing is paid for.
//!
//! "The same" means every byte of it: the conversation, the instructions, every parameter, tools, schema, the models that may
//! answer, and where they are. An answer of a fallback is not kept, nor one that was searched for, nor one that was withheld:
//! the next one may be better. Questions that are asked at the same time are asked once; the others wait for that answer.
//!
//! ```text
//! question ── key ──> in memory? ── on disk? ── somebody asking it right now? ── else ask, and keep what was answered
//! ```
//!
//! It is off unless it is configured: whoever asks twice may want two answers. Prompts are not kept, only what their hash is and
//! what was answered.

mod disk;
mod kept;
mod key;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_service::{Context, now_us};
use tokio::sync::oneshot;
use tracing::warn;

use crate::call::Delta;
use crate::core::{Money, Status};
use crate::metrics::Metrics;
use crate::shell::{Done, Job, Work};

use disk::Disk;
use kept::Kept;
pub(crate) use key::Key;
use memory::Memory;

/// Most of the answers that are held in memory, whatever the disk may hold.
const IN_MEMORY: u64 = 64 << 20;

/// How much is kept, and how long.
#[derive(Debug, Clone)]
pub(crate) struct CacheSettings {
    /// Bytes of answers.
    pub(crate) max_bytes: u64,
    /// Older answers are not given.
    pub(crate) ttl: Duration,
    /// Whatever decides over an answer beside the request itself: where providers are, and how they are spoken to.
    pub(crate) salt: String,
}

/// The cache. Clones are the same.
#[derive(Clone)]
pub(crate) struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    settings: CacheSettings,
    ctx: Context,
    metrics: Metrics,
    memory: Mutex<Memory>,
    /// Questions that are being asked, and who waits for their answers.
    flights: Mutex<HashMap<Key, Vec<oneshot::Sender<Landed>>>>,
    /// None when the disk cannot be used: then answers are kept for as long as this process lives.
    disk: Option<Disk>,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

/// How a question ended that somebody else was asking.
#[derive(Debug, Clone)]
enum Landed {
    Answered(Arc<Kept>),
    /// It has no answer, or none that may be kept.
    Not,
}

enum Entered {
    Hit(Arc<Kept>),
    Lead(Flight),
    Follow(oneshot::Receiver<Landed>),
}

impl Cache {
    /// The cache in a directory. Without the disk it works all the same, and forgets at the end of the process.
    pub(crate) fn open(dir: &Path, settings: CacheSettings, metrics: Metrics, ctx: &Context) -> Self {
        let disk = Disk::open(dir, settings.max_bytes, settings.ttl);
        if let Err(error) = &disk {
            warn!(%error, "answers are kept in memory only");
        }
        let memory = Mutex::new(Memory::new(settings.max_bytes.min(IN_MEMORY)));
        let inner = Inner { settings, ctx: ctx.clone(), metrics, memory, flights: Mutex::default(), disk: disk.ok() };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn ctx(&self) -> &Context {
        &self.inner.ctx
    }

    /// The key of a job whose answer may be kept.
    pub(crate) fn key(&self, job: &Job) -> Option<Key> {
        match &job.work {
            Work::Call(request) if job.cache && !request.grounded => {
                Some(key::of(&self.inner.settings.salt, &job.chain, request))
            }
            Work::Call(_) | Work::Errand(_) => None,
        }
    }

    /// Gives a job its answer: a kept one, that of somebody who asks the same at this moment, or the one that `make` gets.
    pub(crate) async fn through<F: Future<Output = Done>>(&self, key: Key, job: Job, make: impl Fn(Job) -> F) -> Done {
        let began = tokio::time::Instant::now();
        if job.stream.is_some() {
            return self.streamed(key, job, make).await;
        }
        loop {
            match self.enter(key) {
                Entered::Hit(kept) => return self.hit(&job, &kept, "hit"),
                Entered::Lead(flight) => {
                    if let Some(kept) = self.on_disk(key).await {
                        flight.land(&Landed::Answered(Arc::clone(&kept)));
                        return self.hit(&job, &kept, "hit");
                    }
                    self.inner.metrics.cache("miss");
                    let first = job.chain.first().map(|lane| lane.id);
                    let done = make(job).await;
                    match (done.status, Kept::of(&done, first)) {
                        (_, Some(kept)) => {
                            let kept = Arc::new(kept);
                            self.keep(key, &kept);
                            flight.land(&Landed::Answered(kept));
                        }
                        // Whoever asked has gone away, and that says nothing about the question: another one asks it.
                        (Status::Cancelled, None) => drop(flight),
                        (_, None) => flight.land(&Landed::Not),
                    }
                    return done;
                }
                Entered::Follow(landing) => {
                    let left = job.within.map(|within| within.saturating_sub(began.elapsed()));
                    let landed = match left {
                        Some(left) => match tokio::time::timeout(left, landing).await {
                            Ok(landed) => landed,
                            Err(_) => return too_late(),
                        },
                        None => landing.await,
                    };
                    let mut job = job.clone();
                    job.within = job.within.map(|within| within.saturating_sub(began.elapsed()));
                    match landed {
                        Ok(Landed::Answered(kept)) => return self.hit(&job, &kept, "shared"),
                        Ok(Landed::Not) => return make(job).await,
                        Err(_) => {}
                    }
                }
            }
        }
    }

    /// A job whose answer goes out in pieces: a kept answer is one piece. It does not wait for somebody else's, which would
    /// hold back its first word until their last.
    async fn streamed<F: Future<Output = Done>>(&self, key: Key, job: Job, make: impl Fn(Job) -> F) -> Done {
        let kept = match self.look(key) {
            Some(kept) => Some(kept),
            None => self.on_disk(key).await,
        };
        if let Some(kept) = kept {
            if let Some(stream) = &job.stream {
                for delta in kept.deltas() {
                    let delta: Delta = delta;
                    // A reader that went away is noticed by whoever waits for the end.
                    let _ = stream.send(delta).await;
                }
            }
            return self.hit(&job, &kept, "hit");
        }
        self.inner.metrics.cache("miss");
        let first = job.chain.first().map(|lane| lane.id);
        let done = make(job).await;
        if let Some(kept) = Kept::of(&done, first) {
            self.keep(key, &Arc::new(kept));
        }
        done
    }

    fn look(&self, key: Key) -> Option<Arc<Kept>> {
        let now = now_us() / 1_000_000;
        locked(&self.inner.memory).get(&key).filter(|kept| kept.is_fresh(now, self.inner.settings.ttl))
    }

    fn enter(&self, key: Key) -> Entered {
        // Under this lock nobody lands between the look and the entry.
        let mut flights = locked(&self.inner.flights);
        if let Some(kept) = self.look(key) {
            return Entered::Hit(kept);
        }
        if let Some(waiting) = flights.get_mut(&key) {
            let (tell, told) = oneshot::channel();
            waiting.push(tell);
            return Entered::Follow(told);
        }
        flights.insert(key, Vec::new());
        Entered::Lead(Flight { cache: self.clone(), key, landed: false })
    }

    async fn on_disk(&self, key: Key) -> Option<Arc<Kept>> {
        let kept = Arc::new(self.inner.disk.as_ref()?.get(key).await?);
        if !kept.is_fresh(now_us() / 1_000_000, self.inner.settings.ttl) {
            return None;
        }
        locked(&self.inner.memory).put(key, Arc::clone(&kept));
        Some(kept)
    }

    fn keep(&self, key: Key, kept: &Arc<Kept>) {
        locked(&self.inner.memory).put(key, Arc::clone(kept));
        if let Some(disk) = &self.inner.disk {
            disk.put(key, kept);
        }
    }

    /// What came of a job whose answer was there.
    fn hit(&self, job: &Job, kept: &Kept, how: &'static str) -> Done {
        self.inner.metrics.cache(how);
        let now = now_us();
        Done {
            status: Status::Answered,
            answer: Some(kept.answer.clone()),
            error: String::new(),
            attempts: 0,
            cost: Money::ZERO,
            lane: job.chain.first().cloned(),
            started_us: now,
            ended_us: now,
            busy: Duration::ZERO,
            beside: 0,
            cached: true,
        }
    }
}

/// Somebody who asks, for all that wait. When it is dropped, one of them asks instead.
struct Flight {
    cache: Cache,
    key: Key,
    landed: bool,
}

impl Flight {
    fn land(mut self, how: &Landed) {
        self.landed = true;
        let waiting = locked(&self.cache.inner.flights).remove(&self.key);
        for tell in waiting.into_iter().flatten() {
            // Some have gone away meanwhile.
            let _ = tell.send(how.clone());
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            locked(&self.cache.inner.flights).remove(&self.key);
        }
    }
}

fn too_late() -> Done {
    let now = now_us();
    Done {
        status: Status::Failed(crate::core::Reason::Deadline),
        answer: None,
        error: "the deadline came before an answer to the same question, which is being asked".to_owned(),
        attempts: 0,
        cost: Money::ZERO,
        lane: None,
        started_us: now,
        ended_us: now,
        busy: Duration::ZERO,
        beside: 0,
        cached: false,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
