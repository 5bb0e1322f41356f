//! Past events for subscribers, beside the writer where the file system allows it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_types::{ErrorCode, Failure};
use rusqlite::Connection;

use super::events::{EventReader, Page, Wanted};
use super::queue::{Command, StoreHandle};
use super::schema::{Place, Sharing, StoreError};

/// Connections that are kept for later.
const MOST_KEPT: usize = 4;
/// How long one is kept that nobody uses. Each has files open, and a cache.
pub(crate) const UNUSED: Duration = Duration::from_secs(10);

/// Reads past events.
#[derive(Clone)]
pub(crate) struct Past {
    way: Way,
}

#[derive(Clone)]
enum Way {
    /// Connections of our own.
    Beside(Arc<Pool>),
    /// The writer reads for us.
    Through(StoreHandle),
}

struct Pool {
    place: Place,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    conn: Connection,
    reader: EventReader,
    since: Instant,
}

impl Past {
    pub(crate) fn new(place: &Place, store: &StoreHandle) -> Self {
        let way = match place.sharing {
            Sharing::Wal => Way::Beside(Arc::new(Pool { place: place.clone(), idle: Mutex::default() })),
            Sharing::Exclusive => Way::Through(store.clone()),
        };
        Self { way }
    }

    /// Closes what nobody has used for a while.
    pub(crate) fn close_unused(&self, now: Instant) {
        if let Way::Beside(pool) = &self.way {
            pool.close_unused(now);
        }
    }

    /// Reads the next events.
    pub(crate) async fn read(&self, wanted: Wanted) -> Result<Page, Failure> {
        match &self.way {
            Way::Through(store) => store.ask(|reply| Command::Read(wanted, reply)).await,
            Way::Beside(pool) => {
                let pool = Arc::clone(pool);
                match tokio::task::spawn_blocking(move || pool.read(&wanted)).await {
                    Ok(read) => read.map_err(|error| unreadable(&error)),
                    Err(error) => Err(Failure::new(ErrorCode::Internal, format!("reading events failed: {error}"))),
                }
            }
        }
    }
}

impl Pool {
    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, wanted: &Wanted) -> Result<Page, StoreError> {
        let kept = self.idle().pop();
        let (conn, mut reader) = match kept {
            Some(kept) => (kept.conn, kept.reader),
            None => (self.place.open_reader()?, EventReader::default()),
        };
        let page = reader.read(&conn, wanted).map_err(self.place.error("read"))?;
        let mut idle = self.idle();
        if idle.len() < MOST_KEPT {
            idle.push(Idle { conn, reader, since: Instant::now() });
        }
        Ok(page)
    }

    /// The one that was used last is used next, so the others grow old.
    fn close_unused(&self, now: Instant) {
        self.idle().retain(|idle| now.saturating_duration_since(idle.since) < UNUSED);
    }
}

/// What a subscriber is told when the log cannot be read.
pub(crate) fn unreadable(error: &StoreError) -> Failure {
    Failure::new(ErrorCode::StoreUnavailable, error.to_string())
        .hint("check the disk of the state directory; `drover doctor` does")
}

#[cfg(test)]
mod tests {
    use super::super::schema;
    use super::*;

    #[tokio::test]
    async fn connections_that_nobody_uses_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let place = schema::place(dir.path());
        // While nobody writes there is nothing to read beside.
        let _writer = place.open().unwrap();
        let pool = Pool { place, idle: Mutex::default() };
        let wanted = Wanted { after: 0, last: 0, swarm: None };
        std::thread::scope(|scope| {
            for _ in 0..2 * MOST_KEPT {
                scope.spawn(|| pool.read(&wanted).unwrap());
            }
        });
        let kept = pool.idle().len();
        assert!((1..=MOST_KEPT).contains(&kept), "{kept}");
        pool.close_unused(Instant::now());
        assert_eq!(pool.idle().len(), kept, "they may be wanted again soon");
        pool.close_unused(Instant::now() + UNUSED);
        assert!(pool.idle().is_empty());
        pool.read(&wanted).unwrap();
    }
}
