//! One session's files on this node, and what the core wants done with them. Blocks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use drover_types::{Epoch, SessionId};
use tracing::{debug, warn};

use crate::core::{
    Appended, Cause, ClaimOutcome, Digest, HandoffId, Input, Installed, Looked, OwnerRecord, Reserved, Turn,
};
use crate::ownership::{Ownership as _, Ready, SharedFiles, claim_outcome, look_outcome};
use crate::session::{Opening, Outcome, Record, SessionState};
use crate::store::{
    DueCheckpoint, IncomingCopy, Journals, LogReader, Prompt, Recall, SessionLog, SessionStore, StoreError, records,
};

/// Bytes after which the records so far are put into pieces.
const CHECKPOINT: u64 = 4 << 20;
/// The same after so many owners.
const EPOCHS: u64 = 32;
/// What must stay free on the disk beside a session that comes in.
const SPARE: u64 = 64 << 20;

/// Where things are, for all sessions.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// This node's directory.
    pub(crate) node: PathBuf,
    /// The one that all nodes share.
    pub(crate) shared: PathBuf,
    pub(crate) ownership: SharedFiles,
    /// Most bytes of one session's records.
    pub(crate) most: u64,
}

impl Places {
    pub(crate) fn dir(&self, session: &SessionId) -> PathBuf {
        self.node.join(session.as_str())
    }

    pub(crate) fn log(&self, session: &SessionId) -> PathBuf {
        self.dir(session).join("log.jsonl")
    }

    /// A session's files as its newest owner left them, read without being it.
    pub(crate) fn read_foreign(&self, session: &SessionId) -> Result<Option<SessionState>, StoreError> {
        let newest = self.ownership.newest(session).ok().flatten();
        let Some(newest) = newest else { return Ok(None) };
        let path = crate::files::scratch(&self.dir(session), "read");
        let journals = Journals::new(&self.shared, session.clone());
        let log = journals.read(newest.epoch.next(), &path);
        let state = log.and_then(|log| records(&log)).map(|all| SessionState::of(session, &all).ok());
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir(self.dir(session));
        state
    }
}

/// How a turn ended, or where that is to be looked for.
#[derive(Debug)]
pub(crate) enum Answered {
    Is(Outcome),
    Within(LogReader),
}

/// What is kept of one session on this node.
#[derive(Debug)]
pub(crate) struct SessionDisk {
    session: SessionId,
    store: Option<SessionStore>,
    copy: Option<(HandoffId, IncomingCopy)>,
    /// What came in whole, until its claim is decided.
    installed: Option<(HandoffId, IncomingCopy)>,
    /// The record with which it is claimed.
    ready: Option<Ready>,
    pieces_len: u64,
    pieces_epoch: Epoch,
    /// Whoever makes a checkpoint of it holds this.
    pieces: Weak<()>,
}

impl SessionDisk {
    pub(crate) fn new(session: SessionId) -> Self {
        Self {
            session,
            store: None,
            copy: None,
            installed: None,
            ready: None,
            pieces_len: 0,
            pieces_epoch: Epoch(0),
            pieces: Weak::new(),
        }
    }

    /// Nothing of it need be remembered.
    pub(crate) fn is_empty(&self) -> bool {
        self.store.is_none() && self.copy.is_none() && self.installed.is_none()
    }

    pub(crate) fn look(&self, places: &Places) -> Input {
        let outcome = look_outcome(&places.ownership.newest(&self.session));
        if outcome == Looked::Unknown {
            warn!(session_id = %self.session, "the owners on the shared file system cannot be read");
        }
        Input::Looked { session: self.session.clone(), outcome }
    }

    pub(crate) fn claim(&mut self, places: &Places, record: &OwnerRecord) -> Input {
        let result = places.ownership.claim_with(record, self.ready.take());
        if let Err(error) = &result {
            warn!(session_id = %self.session, %error, "a claim is not decided");
        }
        let outcome = claim_outcome(&result);
        let arriving = match record.cause {
            Cause::Moved { handoff } => self.installed.take_if(|(of, _)| *of == handoff).map(|(_, copy)| copy),
            _ => None,
        };
        match (&outcome, arriving) {
            (ClaimOutcome::Won, arriving) => {
                if let Err(error) = self.begin(places, record, arriving) {
                    // The first append tries again from the journals.
                    warn!(session_id = %self.session, %error, "the session's files cannot be opened yet");
                }
            }
            (ClaimOutcome::Lost(_), Some(copy)) => drop(copy.discard()),
            (ClaimOutcome::Unknown, Some(copy)) => {
                if let Cause::Moved { handoff } = record.cause {
                    self.installed = Some((handoff, copy));
                }
            }
            (_, None) => {}
        }
        Input::Claimed { session: self.session.clone(), epoch: record.epoch, outcome }
    }

    fn begin(
        &mut self,
        places: &Places,
        record: &OwnerRecord,
        arriving: Option<IncomingCopy>,
    ) -> Result<(), StoreError> {
        let path = places.log(&self.session);
        match (record.cause.clone(), arriving) {
            // Nothing more is written, or what there is is read next.
            (Cause::Closed | Cause::Recovered | Cause::TakenOver, _) => return Ok(()),
            (Cause::Opened, _) => self.open(places, SessionLog::create(&path)?, record.epoch),
            (Cause::Moved { .. }, Some(copy)) => {
                let log = copy.adopt(&path)?;
                self.open(places, log, record.epoch);
            }
            (Cause::Reclaimed { .. }, _) if self.store.is_some() => {
                self.store = self.store.take().map(|store| store.next_epoch(record.epoch));
                return Ok(());
            }
            (Cause::Moved { .. } | Cause::Reclaimed { .. }, _) => self.read_journals(places, record.epoch)?,
        }
        Ok(())
    }

    fn open(&mut self, places: &Places, log: SessionLog, epoch: Epoch) {
        let journals = Journals::new(&places.shared, self.session.clone());
        self.pieces_len = log.sum().len;
        self.store = Some(SessionStore::begin(log, journals, epoch, places.most));
    }

    fn read_journals(&mut self, places: &Places, epoch: Epoch) -> Result<(), StoreError> {
        let journals = Journals::new(&places.shared, self.session.clone());
        let log = journals.read(epoch, &places.log(&self.session))?;
        self.open(places, log, epoch);
        Ok(())
    }

    pub(crate) fn load(&mut self, places: &Places, epoch: Epoch) -> Input {
        let read = self.read_journals(places, epoch);
        if let Err(error) = &read {
            warn!(session_id = %self.session, %error, "the session's journals cannot be read; tried again");
            self.store = None;
        }
        let log = self.store.as_ref().map(|store| Box::new(store.sum().clone()));
        Input::Loaded { session: self.session.clone(), epoch, log }
    }

    pub(crate) fn append(&mut self, places: &Places, epoch: Epoch, first: u64, batch: &Arc<Vec<Record>>) -> Input {
        let outcome = self.try_append(places, epoch, first, batch).unwrap_or_else(|error| {
            warn!(session_id = %self.session, %error, "records cannot be kept; tried again");
            Appended::Unknown
        });
        Input::Appended { session: self.session.clone(), epoch, first, outcome }
    }

    fn try_append(
        &mut self,
        places: &Places,
        epoch: Epoch,
        first: u64,
        batch: &Arc<Vec<Record>>,
    ) -> Result<Appended, StoreError> {
        if self.store.as_ref().is_none_or(|store| store.epoch() != epoch) {
            self.read_journals(places, epoch)?;
        }
        match &mut self.store {
            Some(store) => store.append(first, batch, &places.ownership),
            None => Ok(Appended::Unknown),
        }
    }

    /// A checkpoint that is to be made now, somewhere where no turn waits for it, and what says that it is being made.
    pub(crate) fn due(&mut self) -> Option<(DueCheckpoint, Arc<()>)> {
        let store = self.store.as_ref().filter(|_| self.pieces.strong_count() == 0)?;
        let (len, epoch) = (store.sum().len, store.epoch());
        // Many short journals of many owners take long to read, one after the other.
        let many = epoch.0.is_multiple_of(EPOCHS) && self.pieces_epoch != epoch;
        if len < self.pieces_len + CHECKPOINT && !many {
            return None;
        }
        let due = store.checkpoint().unwrap_or_else(|error| {
            warn!(session_id = %self.session, %error, "no checkpoint");
            None
        })?;
        let made = Arc::new(());
        (self.pieces_len, self.pieces_epoch, self.pieces) = (len, epoch, Arc::downgrade(&made));
        Some((due, made))
    }

    pub(crate) fn reserve(&mut self, places: &Places, handoff: HandoffId, len: u64, fresh: bool) -> Input {
        if let Some((_, copy)) = self.copy.take() {
            drop(copy.discard());
        }
        let path = places.dir(&self.session).join("copy.jsonl");
        let room = free_bytes(&places.node).is_none_or(|free| free >= len + SPARE);
        let outcome = match room.then(|| IncomingCopy::begin(&path, fresh, len, places.most)) {
            None => Reserved::NoSpace,
            Some(Err(error)) => {
                warn!(session_id = %self.session, %error, "no place for a session that was to come");
                Reserved::NoSpace
            }
            Some(Ok(copy)) => {
                let have = copy.len();
                self.copy = Some((handoff, copy));
                Reserved::Room(have)
            }
        };
        Input::Reserved { handoff, outcome }
    }

    pub(crate) fn write(&mut self, handoff: HandoffId, offset: u64, bytes: &Bytes) -> Input {
        let len = match self.copy.as_mut().filter(|(of, _)| *of == handoff) {
            None => None,
            Some((_, copy)) => match copy.write(offset, bytes) {
                Ok(len) => Some(len),
                Err(error) => {
                    warn!(session_id = %self.session, %error, "a piece of a session was not taken");
                    None
                }
            },
        };
        Input::Written { handoff, len }
    }

    pub(crate) fn install(
        &mut self,
        places: &Places,
        handoff: HandoffId,
        len: u64,
        digest: Digest,
        record: OwnerRecord,
    ) -> Input {
        let outcome = match self.copy.take_if(|(of, _)| *of == handoff) {
            None => Installed::Failed,
            Some((_, copy)) => match self.keep(places, &copy, len, digest, record) {
                Ok(true) => {
                    let sum = Box::new(copy.log().sum().clone());
                    self.installed = Some((handoff, copy));
                    Installed::Done(sum)
                }
                Ok(false) => {
                    drop(copy.discard());
                    Installed::Differs
                }
                Err(error) => {
                    warn!(session_id = %self.session, %error, "a session that came cannot be kept");
                    drop(copy.discard());
                    Installed::Failed
                }
            },
        };
        Input::Installed { handoff, outcome }
    }

    /// Has the disk keep a copy, and at the same time the record with which it will be claimed: nobody is served meanwhile.
    fn keep(
        &mut self,
        places: &Places,
        copy: &IncomingCopy,
        len: u64,
        digest: Digest,
        record: OwnerRecord,
    ) -> Result<bool, StoreError> {
        std::thread::scope(|scope| {
            let ready = scope.spawn(|| places.ownership.ready(record));
            let whole = copy.whole(len, digest);
            // A record that cannot lie ready is written when it is claimed.
            self.ready = ready.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).ok();
            whole
        })
    }

    pub(crate) fn discard(&mut self, handoff: HandoffId) {
        self.ready = None;
        for copy in [&mut self.copy, &mut self.installed] {
            if let Some((_, copy)) = copy.take_if(|(of, _)| *of == handoff)
                && let Err(error) = copy.discard()
            {
                debug!(session_id = %self.session, %error, "a copy stays behind");
            }
        }
    }

    /// Another node serves it: what is here can be made again from what all nodes share.
    pub(crate) fn release(&mut self, places: &Places, epoch: Epoch) {
        if self.store.take_if(|store| store.epoch() <= epoch).is_none() {
            return;
        }
        let dir = places.dir(&self.session);
        let _ = std::fs::remove_file(places.log(&self.session));
        if self.is_empty() {
            let _ = std::fs::remove_dir_all(&dir);
        }
    }

    /// What an earlier process left here, unless it has come into use again.
    pub(crate) fn remove_unused(&self, places: &Places) {
        if self.is_empty()
            && let Err(error) = std::fs::remove_dir_all(places.dir(&self.session))
        {
            warn!(session_id = %self.session, %error, "what is left of a session that went elsewhere cannot be removed");
        }
    }

    fn recall(&self) -> Option<&Recall> {
        self.store.as_ref().map(|store| store.log().recall())
    }

    pub(crate) fn prompt(&self, turn: Turn) -> Option<Prompt> {
        self.recall()?.prompt(turn).cloned()
    }

    /// What a call is to do.
    pub(crate) fn call(&self, call: crate::core::Call) -> Option<String> {
        self.recall()?.call(call).map(str::to_owned)
    }

    /// What a call has answered.
    pub(crate) fn result(&self, call: crate::core::Call) -> Option<String> {
        self.recall()?.result(call).map(str::to_owned)
    }

    pub(crate) fn answer(&self, turn: Turn) -> Option<Answered> {
        match self.recall()?.answer(turn) {
            Some(outcome) => Some(Answered::Is(outcome.clone())),
            None => self.reader().map(Answered::Within),
        }
    }

    /// The log as it is now.
    pub(crate) fn reader(&self) -> Option<LogReader> {
        self.store.as_ref()?.log().reader().ok()
    }

    /// What the session was opened with, and the manifest of its files.
    pub(crate) fn begun(&self) -> Option<(Opening, Option<String>)> {
        let opening = self.store.as_ref()?.sum().outline.opening()?.clone();
        Some((opening, self.recall()?.files().map(str::to_owned)))
    }
}

/// Bytes that this user may still write below a directory; nothing when the file system does not say.
fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
