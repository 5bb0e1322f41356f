//! One thread that reads a share of a stream's outboxes, in the order that the schedule says.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use drover_mailbox::{Chunk, Cursor, Mailbox, StreamReader, is_network_fs, is_surely_local, lines};
use drover_proto::mailbox::FollowResponse;
use drover_types::{OutboxId, SwarmId};
use rustix::io::Errno;
use tokio::sync::OwnedSemaphorePermit;
use tracing::warn;

use crate::follow::Outgoing;
use crate::metrics::Metrics;
use crate::refs::{self, NodeKey};
use crate::schedule::{self, Found, Key, Schedule, Why};
use crate::settings::Settings;
use crate::watch::{Cover, Token, Watches};

/// About what one response carries: enough to be cheap per line, little enough that outboxes take turns.
const CHUNK_BYTES: usize = 256 << 10;

/// What a lane is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    Follow(OutboxId, Cursor),
    Drop(OutboxId),
    SetHot(NodeKey, bool),
    Forget(SwarmId),
}

/// How others reach a lane while it sleeps or reads. What is told here twice is kept once.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    news: Mutex<News>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct News {
    commands: Vec<(Vec<Command>, Option<OwnedSemaphorePermit>)>,
    /// Outboxes that changed, and since when.
    told: HashMap<Key, Instant>,
    /// Outboxes whose watch has come to its end: what was watched is gone.
    uncovered: Vec<Key>,
    stop: bool,
}

impl Bell {
    /// Hands over commands. The permit is given back when the lane has taken them.
    pub(crate) fn command(&self, commands: Vec<Command>, permit: Option<OwnedSemaphorePermit>) {
        self.lock().commands.push((commands, permit));
        self.rung.notify_one();
    }

    pub(crate) fn tell(&self, key: Key) {
        let mut news = self.lock();
        if news.told.is_empty() {
            self.rung.notify_one();
        }
        news.told.entry(key).or_insert_with(Instant::now);
    }

    /// As `tell`; and there will be no further word before the outbox is covered anew.
    pub(crate) fn uncover(&self, key: Key) {
        self.lock().uncovered.push(key);
        self.tell(key);
    }

    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.rung.notify_one();
    }

    /// Sleeps until there is news or until `until`. `None`: the lane is to end.
    fn wait(&self, until: Option<Instant>) -> Option<News> {
        let mut news = self.lock();
        loop {
            if news.stop {
                return None;
            }
            if !news.commands.is_empty() || !news.told.is_empty() {
                return Some(std::mem::take(&mut *news));
            }
            let Some(until) = until else {
                news = self.rung.wait(news).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return Some(News::default());
            };
            news = self.rung.wait_timeout(news, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One followed outbox.
struct Followed {
    id: OutboxId,
    reader: StreamReader,
    cover: Option<Cover>,
    /// Try to have it covered at the next look.
    wants_cover: bool,
    /// When the system first told of a change that was not read yet.
    told: Option<Instant>,
    /// Its last look failed, and that was logged.
    failing: bool,
    unread: u64,
    /// Place in the order of use, when its file is open.
    used: Option<u64>,
}

pub(crate) struct Lane {
    bell: Arc<Bell>,
    mailbox: Mailbox,
    watches: Arc<Watches>,
    schedule: Schedule,
    followed: HashMap<Key, Followed>,
    /// Open files by last use.
    open: BTreeSet<(u64, Key)>,
    uses: u64,
    max_open: usize,
    /// What a watch is worth on the mailbox's file system.
    watched: schedule::Cover,
    metrics: Metrics,
    outgoing: Outgoing,
}

impl Lane {
    pub(crate) fn new(
        settings: &Settings,
        max_open: usize,
        watches: Arc<Watches>,
        metrics: Metrics,
        outgoing: Outgoing,
    ) -> Self {
        Self {
            bell: Arc::new(Bell::default()),
            mailbox: Mailbox::new(&settings.mailbox),
            watches,
            // Where the mailbox cannot be judged, everything is looked at.
            schedule: Schedule::new(
                settings.hot_poll,
                settings.cold_poll,
                matches!(is_network_fs(&settings.mailbox), Ok(Some(_))),
                Instant::now(),
            ),
            followed: HashMap::new(),
            open: BTreeSet::new(),
            uses: 0,
            max_open: max_open.max(1),
            watched: match is_surely_local(&settings.mailbox) {
                Ok(true) => schedule::Cover::Whole,
                _ => schedule::Cover::Partly,
            },
            metrics,
            outgoing,
        }
    }

    pub(crate) fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    /// Reads until it is told to stop or nobody takes the responses any more. Blocks its thread.
    pub(crate) fn run(mut self) {
        while let Some(news) = self.bell.wait(self.schedule.wake_at(Instant::now())) {
            for (commands, _permit) in news.commands {
                for command in commands {
                    self.obey(command);
                }
            }
            for key in news.uncovered {
                self.uncover(key);
            }
            let now = Instant::now();
            for (key, since) in news.told {
                if let Some(followed) = self.followed.get_mut(&key) {
                    followed.told.get_or_insert(since);
                    self.schedule.told(key, now);
                }
            }
            while let Some(swarm) = self.schedule.next_beacon(now) {
                self.metrics.beacons.inc();
                // One that cannot be asked is none: then its outboxes are.
                let said = self.mailbox.flashed(&swarm).unwrap_or(None);
                self.schedule.beacon(&swarm, said, Instant::now());
            }
            if let Some((key, why)) = self.schedule.next(now)
                && !self.look(key, why)
            {
                return;
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Follow(id, cursor) => {
                let key = self.schedule.add(&id, Instant::now());
                self.drop_followed(key);
                let reader = StreamReader::new(self.mailbox.outbox_dir(&id), cursor);
                let followed = Followed {
                    id,
                    reader,
                    cover: None,
                    wants_cover: true,
                    told: None,
                    failing: false,
                    unread: 0,
                    used: None,
                };
                self.followed.insert(key, followed);
                self.metrics.outboxes.inc();
            }
            Command::Drop(id) => {
                if let Some(key) = self.schedule.remove(&id) {
                    self.drop_followed(key);
                }
            }
            Command::SetHot(node, hot) => self.schedule.set_hot(&node, hot),
            Command::Forget(swarm) => {
                for key in self.schedule.forget(&swarm) {
                    self.drop_followed(key);
                }
            }
        }
    }

    fn drop_followed(&mut self, key: Key) {
        self.close(key);
        let Some(followed) = self.followed.remove(&key) else { return };
        if let Some(cover) = followed.cover {
            self.watches.uncover(cover, &Token { bell: self.bell(), key });
        }
        self.metrics.outboxes.dec();
        self.metrics.unread_bytes.dec_by(followed.unread.cast_signed());
    }

    /// One look at one outbox. False when the stream is over.
    fn look(&mut self, key: Key, why: Why) -> bool {
        let Some(mut followed) = self.followed.remove(&key) else { return true };
        self.metrics.looks.get_or_create(&[("why", why.as_str())]).inc();
        if followed.cover.as_ref().is_some_and(|cover| !cover.is_direct()) {
            self.give_back_cover(&mut followed, key);
        }
        // Watch first, then look: what comes in between is told.
        if followed.cover.is_none() && (std::mem::take(&mut followed.wants_cover) || why == Why::Cold) {
            followed.cover = self.cover(&followed, key);
        }
        if !followed.reader.is_open() {
            self.close_down_to(self.max_open - 1);
        }
        let told = followed.told.take();
        let result = followed.reader.next_chunk(CHUNK_BYTES);
        let unread = followed.reader.unread();
        self.metrics.unread_bytes.inc_by(unread.cast_signed() - followed.unread.cast_signed());
        followed.unread = unread;
        let (found, alive) = match result {
            Ok(Some(chunk)) => {
                followed.failing = false;
                let more = followed.unread > 0 || chunk.next_segment != chunk.segment;
                let alive = self.hand_out(&followed.id, chunk);
                if let Some(told) = told {
                    self.metrics.told_seconds.observe(told.elapsed().as_secs_f64());
                }
                (if more { Found::More } else { Found::Quiet }, alive)
            }
            Ok(None) => {
                followed.failing = false;
                let missing = !followed.reader.is_open() && !followed.reader.dir().exists();
                if missing && followed.cover.as_ref().is_some_and(Cover::is_direct) {
                    // It was removed. From now on wait for a new one to appear.
                    self.give_back_cover(&mut followed, key);
                    followed.cover = self.cover(&followed, key);
                }
                let cursor = followed.reader.cursor();
                let found = match (missing, cursor.segment, cursor.offset) {
                    (true, ..) => Found::Missing,
                    (false, 1, 0) => Found::Empty,
                    _ => Found::Quiet,
                };
                (found, true)
            }
            Err(error) => (self.failed(&mut followed, &error), true),
        };
        let cover = if followed.cover.is_some() { self.watched } else { schedule::Cover::None };
        let keep_open = found == Found::More || self.schedule.is_hot(&followed.id);
        self.note_use(key, &mut followed, keep_open);
        self.followed.insert(key, followed);
        self.schedule.looked(key, found, cover, Instant::now());
        alive
    }

    fn cover(&self, followed: &Followed, key: Key) -> Option<Cover> {
        self.watches.cover(followed.reader.dir(), &Token { bell: self.bell(), key })
    }

    fn give_back_cover(&self, followed: &mut Followed, key: Key) {
        if let Some(cover) = followed.cover.take() {
            self.watches.uncover(cover, &Token { bell: self.bell(), key });
            followed.wants_cover = true;
        }
    }

    /// The watch of an outbox has come to its end; the look that follows sets up a new one.
    fn uncover(&mut self, key: Key) {
        if let Some(mut followed) = self.followed.remove(&key) {
            self.give_back_cover(&mut followed, key);
            self.followed.insert(key, followed);
        }
    }

    fn hand_out(&self, id: &OutboxId, chunk: Chunk) -> bool {
        self.metrics.bytes.inc_by(chunk.lines.len() as u64);
        self.metrics.lines.inc_by(lines(&chunk.lines).count() as u64);
        if let Some(damage) = &chunk.damage {
            self.metrics.damage.inc();
            warn!(swarm_id = %id.swarm, node_id = %id.node, generation = %id.generation, damage, "outbox is damaged; going on behind it");
        }
        self.outgoing.send(FollowResponse {
            outbox: Some(refs::outbox_ref(id)),
            segment: chunk.segment,
            start_offset: chunk.start_offset,
            lines: chunk.lines,
            next_segment: chunk.next_segment,
            next_offset: chunk.next_offset,
            damage: chunk.damage.unwrap_or_default(),
        })
    }

    fn failed(&mut self, followed: &mut Followed, error: &io::Error) -> Found {
        self.metrics.read_errors.inc();
        followed.reader.reopen();
        let errno = Errno::from_io_error(error);
        if errno == Some(Errno::MFILE) || errno == Some(Errno::NFILE) {
            // Somebody else in this process or on this host holds too many; give back what is not needed right now.
            self.close_all();
        }
        if !std::mem::replace(&mut followed.failing, true) {
            let dir: PathBuf = followed.reader.dir().to_owned();
            warn!(swarm_id = %followed.id.swarm, node_id = %followed.id.node, dir = %dir.display(), %error, "cannot read an outbox; trying again");
        }
        Found::Failed
    }

    /// Enters a just used file at the end of the order of use, or closes it.
    fn note_use(&mut self, key: Key, followed: &mut Followed, keep_open: bool) {
        if let Some(used) = followed.used.take() {
            self.open.remove(&(used, key));
            self.metrics.open_files.dec();
        }
        if !keep_open {
            followed.reader.reopen();
        }
        if followed.reader.is_open() {
            self.uses += 1;
            followed.used = Some(self.uses);
            self.open.insert((self.uses, key));
            self.metrics.open_files.inc();
        }
    }

    fn close(&mut self, key: Key) {
        if let Some(followed) = self.followed.get_mut(&key) {
            followed.reader.reopen();
            if let Some(used) = followed.used.take() {
                self.open.remove(&(used, key));
                self.metrics.open_files.dec();
            }
        }
    }

    fn close_down_to(&mut self, most: usize) {
        while self.open.len() > most
            && let Some(&(_, key)) = self.open.first()
        {
            self.close(key);
        }
    }

    fn close_all(&mut self) {
        for (_, key) in std::mem::take(&mut self.open) {
            // The one that is being looked at is out of the map; it is entered anew after the look.
            if let Some(followed) = self.followed.get_mut(&key) {
                followed.reader.reopen();
                followed.used = None;
                self.metrics.open_files.dec();
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let keys: Vec<Key> = self.followed.keys().copied().collect();
        for key in keys {
            self.drop_followed(key);
        }
    }
}
