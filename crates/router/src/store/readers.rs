//! Past events for subscribers, beside the writer where the file system allows it.

use std::sync::{Arc, Mutex, PoisonError};

use drover_types::{ErrorCode, Failure};
use rusqlite::Connection;

use super::events::{EventReader, Page, Wanted};
use super::queue::{Command, StoreHandle};
use super::schema::{Place, Sharing, StoreError};

/// Connections that are kept for later.
const MOST_KEPT: usize = 4;

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
    idle: Mutex<Vec<(Connection, EventReader)>>,
}

impl Past {
    pub(crate) fn new(place: &Place, store: &StoreHandle) -> Self {
        let way = match place.sharing {
            Sharing::Wal => Way::Beside(Arc::new(Pool { place: place.clone(), idle: Mutex::default() })),
            Sharing::Exclusive => Way::Through(store.clone()),
        };
        Self { way }
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
    fn read(&self, wanted: &Wanted) -> Result<Page, StoreError> {
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (conn, mut reader) = match kept {
            Some(kept) => kept,
            None => (self.place.open_reader()?, EventReader::default()),
        };
        let page = reader.read(&conn, wanted).map_err(self.place.error("read"))?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MOST_KEPT {
            idle.push((conn, reader));
        }
        Ok(page)
    }
}

/// What a subscriber is told when the log cannot be read.
pub(crate) fn unreadable(error: &StoreError) -> Failure {
    Failure::new(ErrorCode::StoreUnavailable, error.to_string())
        .hint("check the disk of the state directory; `drover doctor` does")
}
