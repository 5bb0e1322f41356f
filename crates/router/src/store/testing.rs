//! A disk for tests of the core: the real tables, in memory.

use std::sync::Arc;

use rusqlite::Connection;

use super::events::{EventReader, EventWriter, Wanted};
use super::rows;
use super::schema::{Place, Sharing};
use crate::core::effects::Event;
use crate::core::input::Prior;
use crate::core::{Core, Restored};

pub(crate) struct Disk {
    place: Place,
    conn: Connection,
    words: EventWriter,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let place = Place { path: ":memory:".into(), sharing: Sharing::Wal, max_pages: Arc::default() };
        let conn = place.open().unwrap();
        Self { place, conn, words: EventWriter::default() }
    }

    pub(crate) fn write(&mut self, events: &[Event], core: &Core) {
        self.conn.execute_batch("BEGIN").unwrap();
        self.words.write(&self.conn, events).unwrap();
        rows::write_changes(&self.conn, core).unwrap();
        self.conn.execute_batch("COMMIT").unwrap();
    }

    pub(crate) fn read(&self) -> Restored {
        rows::read_all(&self.conn, &self.place).unwrap()
    }

    pub(crate) fn prior_request(&self, id: &str) -> Option<Prior> {
        rows::prior_request(&self.conn, id).unwrap()
    }

    pub(crate) fn prior_injection(&self, id: &str) -> Option<Prior> {
        rows::prior_injection(&self.conn, id).unwrap()
    }

    /// When each event was stored and when it happened, as readers of the past see it.
    pub(crate) fn times(&self) -> Vec<(u64, u64)> {
        let mut times = Vec::new();
        let mut after = 0;
        loop {
            let wanted = Wanted { after, last: i64::MAX.cast_unsigned(), swarm: None };
            let page = EventReader::default().read(&self.conn, &wanted).unwrap();
            let Some(last) = page.events.last() else { return times };
            after = last.seq;
            times.extend(page.events.iter().map(|event| (event.at, event.happened)));
        }
    }

    pub(crate) fn events(&self) -> Vec<u64> {
        let mut select = self.conn.prepare("SELECT seq FROM events ORDER BY seq").unwrap();
        select.query_map([], |row| row.get::<_, i64>(0)).unwrap().map(|seq| seq.unwrap().cast_unsigned()).collect()
    }
}
