//! Ownership as files on a file system that all nodes reach.
//!
//! ```text
//! <root>/<session>/owners/<epoch>.json     one line: session, epoch, owner, cause; made by link(2), never changed
//! ```
//!
//! A record is written under a name of its own and synced, then linked to the name of its epoch: link(2) is atomic and
//! exclusive on every file system that we know, network ones included. Whether it succeeded is read from the file and not
//! believed from the call, because a repeated request of a network file system may be told that the name is taken, by itself.
//! A client of a network file system may answer a lookup from memory; what it changes in a directory makes it ask anew, so every look
//! at a file system that other hosts may change makes and removes a name first.

use std::io;
use std::path::{Path, PathBuf};

use drover_types::{Epoch, SessionId};

use super::{Claimed, Ownership, OwnershipError};
use crate::core::{NodeId, OwnerRecord};
use crate::files;

/// A record is far smaller.
const MAX_BYTES: u64 = 4096;
/// Names the file system; no session can be called that.
const STORE_NAME: &str = ".store";

/// The adapter; cheap to clone, holds no file open.
#[derive(Debug, Clone)]
pub struct SharedFiles {
    root: PathBuf,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OwnershipError {
    let path = path.to_owned();
    move |source| OwnershipError::Files { what, path, source }
}

impl SharedFiles {
    /// Below this directory, which is made when it is missing.
    pub fn new(root: impl Into<PathBuf>) -> Result<Self, OwnershipError> {
        let root = root.into();
        files::make_dir(&root).map_err(failed("make", &root))?;
        Ok(Self { root })
    }

    fn dir(&self, session: &SessionId) -> PathBuf {
        self.root.join(session.as_str()).join("owners")
    }

    /// The newest epoch of which there is a file.
    fn newest_epoch(dir: &Path) -> Result<Option<Epoch>, OwnershipError> {
        if !files::look_anew(dir).map_err(failed("look into", dir))? {
            return Ok(None);
        }
        let mut newest = None;
        for entry in std::fs::read_dir(dir).map_err(failed("list", dir))? {
            let name = entry.map_err(failed("list", dir))?.file_name();
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let number = name.strip_suffix(".json").filter(|number| number.len() == 20);
            let Some(epoch) = number.and_then(|number| number.parse().ok()).filter(|epoch| *epoch > 0) else {
                return Err(OwnershipError::Foreign { path: dir.join(name), why: "its name is no epoch".into() });
            };
            newest = newest.max(Some(Epoch(epoch)));
        }
        Ok(newest)
    }

    /// The newest record of every session.
    pub fn all(&self) -> Result<Vec<OwnerRecord>, OwnershipError> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(failed("list", &self.root))? {
            let name = entry.map_err(failed("list", &self.root))?.file_name();
            // What is no session's name is none of ours.
            let Some(session) = name.to_str().and_then(|name| name.parse::<SessionId>().ok()) else { continue };
            all.extend(self.newest(&session)?);
        }
        Ok(all)
    }

    /// Every owner that a session ever had, oldest first.
    pub fn history(&self, session: &SessionId) -> Result<Vec<OwnerRecord>, OwnershipError> {
        let dir = self.dir(session);
        let newest = Self::newest_epoch(&dir)?.unwrap_or_default();
        let read = (1..=newest.0).filter_map(|epoch| Self::read(&dir, session, Epoch(epoch)).transpose());
        read.collect()
    }

    /// What this file system is called, so that nodes know whether they share it. Made by whoever asks first.
    pub fn name(&self) -> Result<String, OwnershipError> {
        let path = self.root.join(STORE_NAME);
        let fresh = format!("{:016x}\n", rand::random::<u64>());
        if !path.exists() {
            files::publish(&self.root, STORE_NAME, fresh.as_bytes()).map_err(failed("make", &path))?;
        }
        let read = files::read_small(&path, MAX_BYTES).map_err(failed("read", &path))?;
        let name = read.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default().trim().to_owned();
        let known = name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let why = "it is to hold the name of this file system".to_owned();
        if known { Ok(name) } else { Err(OwnershipError::Foreign { path, why }) }
    }

    fn read(dir: &Path, session: &SessionId, epoch: Epoch) -> Result<Option<OwnerRecord>, OwnershipError> {
        let path = dir.join(name(epoch));
        let foreign = |why: String| OwnershipError::Foreign { path: path.clone(), why };
        let bytes = match files::read_small(&path, MAX_BYTES) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {
                return Err(foreign(error.to_string()));
            }
            Err(error) => return Err(failed("read", &path)(error)),
        };
        if !bytes.ends_with(b"\n") {
            return Err(foreign("it ends in the middle".into()));
        }
        let record: OwnerRecord = serde_json::from_slice(&bytes).map_err(|error| foreign(error.to_string()))?;
        if record.session != *session || record.epoch != epoch {
            return Err(foreign(format!("it is about epoch {} of session {}", record.epoch, record.session)));
        }
        Ok(Some(record))
    }
}

/// A record that lies ready: to claim with it takes a link and no further wait for the disk.
#[derive(Debug)]
pub(crate) struct Ready {
    record: OwnerRecord,
    content: files::Unnamed,
}

impl SharedFiles {
    /// Brings a record to the disk that may be claimed soon. Nobody sees it, and it is gone when this is dropped.
    pub(crate) fn ready(&self, record: OwnerRecord) -> Result<Ready, OwnershipError> {
        let dir = self.dir(&record.session);
        files::make_dir(&dir).map_err(failed("make", &dir))?;
        let content = files::Unnamed::write(&dir, &line(&record, &dir)?).map_err(failed("write", &dir))?;
        Ok(Ready { record, content })
    }

    /// [`Ownership::claim`], with what lies ready when it is the same.
    pub(crate) fn claim_with(&self, record: &OwnerRecord, ready: Option<Ready>) -> Result<Claimed, OwnershipError> {
        let dir = self.dir(&record.session);
        files::make_dir(&dir).map_err(failed("make", &dir))?;
        // Only a directory that a client of a network file system remembers wrongly needs the closer look.
        let follows = record.epoch == Epoch(1) || dir.join(name(Epoch(record.epoch.0.saturating_sub(1)))).exists();
        let newest = if follows { None } else { Self::newest_epoch(&dir)? };
        if !follows && newest.unwrap_or_default().next() < record.epoch {
            let (session, epoch, newest) = (record.session.clone(), record.epoch, newest.unwrap_or_default());
            return Err(OwnershipError::Gap { session, epoch, newest });
        }
        if newest.is_none_or(|newest| newest < record.epoch) {
            // Taken or not: the file says whose it is.
            let published = match ready.filter(|ready| ready.record == *record) {
                Some(ready) => ready.content.publish(&dir, &name(record.epoch)),
                None => files::publish(&dir, &name(record.epoch), &line(record, &dir)?),
            };
            published.map_err(failed("write", &dir))?;
        }
        // Also finds out a claim of long ago that comes only now, when there are later epochs.
        match self.newest(&record.session)? {
            Some(newest) if newest == *record => Ok(Claimed::Won),
            Some(newest) => Ok(Claimed::Lost(newest)),
            None => Err(OwnershipError::Foreign { path: dir, why: "its records are gone".into() }),
        }
    }
}

fn line(record: &OwnerRecord, dir: &Path) -> Result<Vec<u8>, OwnershipError> {
    let mut line = serde_json::to_vec(record).map_err(io::Error::from).map_err(failed("write", dir))?;
    line.push(b'\n');
    Ok(line)
}

fn name(epoch: Epoch) -> String {
    format!("{:020}.json", epoch.0)
}

impl Ownership for SharedFiles {
    fn newest(&self, session: &SessionId) -> Result<Option<OwnerRecord>, OwnershipError> {
        let dir = self.dir(session);
        match Self::newest_epoch(&dir)? {
            Some(epoch) => Self::read(&dir, session, epoch),
            None => Ok(None),
        }
    }

    fn claim(&self, record: &OwnerRecord) -> Result<Claimed, OwnershipError> {
        self.claim_with(record, None)
    }

    fn owned_by(&self, node: &NodeId) -> Result<Vec<OwnerRecord>, OwnershipError> {
        let mut owned = self.all()?;
        owned.retain(|newest| newest.owner.node == *node);
        Ok(owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Cause, Owner};

    fn record(epoch: u64, node: &str) -> OwnerRecord {
        OwnerRecord {
            session: "s1".parse().unwrap(),
            epoch: Epoch(epoch),
            owner: Owner { node: NodeId::new(node), boot: 1 },
            cause: Cause::TakenOver,
        }
    }

    #[test]
    fn the_first_claim_of_an_epoch_wins_and_may_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let files = SharedFiles::new(dir.path()).unwrap();
        let (a, b) = (record(1, "x/0"), record(1, "x/1"));
        assert_eq!(files.newest(&a.session).unwrap(), None);
        assert_eq!(files.claim(&a).unwrap(), Claimed::Won);
        assert_eq!(files.claim(&b).unwrap(), Claimed::Lost(a.clone()));
        assert_eq!(files.claim(&a).unwrap(), Claimed::Won);
        assert!(matches!(files.claim(&record(3, "x/0")), Err(OwnershipError::Gap { newest: Epoch(1), .. })));
        let next = record(2, "x/1");
        assert_eq!(files.claim(&next).unwrap(), Claimed::Won);
        assert_eq!(files.claim(&a).unwrap(), Claimed::Lost(next.clone()), "a claim of long ago decides nothing");
        assert_eq!(files.owned_by(&next.owner.node).unwrap(), [next]);
        assert_eq!(files.owned_by(&a.owner.node).unwrap(), []);
        let left = std::fs::read_dir(dir.path().join("s1/owners")).unwrap().count();
        assert_eq!(left, 2, "nothing is left behind");
        let causes: Vec<_> = files.history(&a.session).unwrap().into_iter().map(|record| record.epoch.0).collect();
        assert_eq!(causes, [1, 2]);
        assert_eq!(files.name().unwrap(), SharedFiles::new(dir.path()).unwrap().name().unwrap());
        assert_eq!(files.all().unwrap().len(), 1);
    }

    #[test]
    fn a_record_that_lies_ready_is_seen_only_when_it_is_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let files = SharedFiles::new(dir.path()).unwrap();
        let (a, b) = (record(1, "x/0"), record(1, "x/1"));
        let (ready, late) = (files.ready(a.clone()).unwrap(), files.ready(b.clone()).unwrap());
        assert_eq!(files.newest(&a.session).unwrap(), None);
        assert_eq!(files.claim_with(&a, Some(ready)).unwrap(), Claimed::Won);
        assert_eq!(files.claim_with(&b, Some(late)).unwrap(), Claimed::Lost(a.clone()));
        let other = files.ready(record(3, "x/1")).unwrap();
        assert_eq!(files.claim_with(&record(2, "x/1"), Some(other)).unwrap(), Claimed::Won, "another's is not taken");
        drop(files.ready(record(3, "x/0")).unwrap());
        let left = std::fs::read_dir(dir.path().join("s1/owners")).unwrap().count();
        assert_eq!(left, 2, "nothing is left behind");
        assert_eq!(files.newest(&a.session).unwrap(), Some(record(2, "x/1")));
    }

    #[test]
    fn what_is_no_record_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let files = SharedFiles::new(dir.path()).unwrap();
        let own = record(1, "x/0");
        files.claim(&own).unwrap();
        let owners = dir.path().join("s1/owners");
        let path = owners.join(name(Epoch(2)));
        let whole = std::fs::read(owners.join(name(Epoch(1)))).unwrap();
        let large = vec![b'x'; 10_000];
        for bad in [&whole[..whole.len() - 1], &whole[..9], b"", b"{}\n", &whole, &large] {
            std::fs::write(&path, bad).unwrap();
            for result in [files.newest(&own.session).map(drop), files.claim(&record(2, "x/1")).map(drop)] {
                assert!(
                    matches!(&result, Err(OwnershipError::Foreign { path: named, .. }) if *named == path),
                    "{result:?}"
                );
            }
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(owners.join(name(Epoch(1))), &path).unwrap();
        assert!(files.newest(&own.session).is_err(), "a link is followed nowhere");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(owners.join("2.json"), &whole).unwrap();
        assert!(matches!(files.newest(&own.session), Err(OwnershipError::Foreign { .. })));
    }
}
