//! The beacon of a swarm: one file whose times say from afar that some outbox of the swarm may have grown.
//!
//! On a network file system nobody is told of changes, and looking at each of a thousand quiet outboxes is a thousand questions to
//! the server. A worker therefore flashes the beacon of its swarm after it has appended, and whoever reads asks for one
//! file instead of a thousand. A flash says "look", never "there is something": what is true is in the outboxes. Within
//! [`PAUSE`] of a flash there is no second one, so a reader that saw one looks a second time later.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drover_types::SwarmId;
use rustix::fs::{AtFlags, CWD, StatxFlags, Timespec, Timestamps, UTIME_NOW, statx, utimensat};
use rustix::io::Errno;

use crate::{Mailbox, fs};

/// Two flashes of one worker are at least this far apart.
pub const PAUSE: Duration = Duration::from_secs(5);

/// A worker's side of its swarm's beacon.
#[derive(Debug)]
pub struct Beacon {
    path: PathBuf,
    /// Whether anybody needs it; not known before the first flash.
    needed: Option<bool>,
    flashed: Option<Instant>,
}

/// When a beacon was last flashed. Says something only in comparison with another one of the same beacon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flash {
    inode: u64,
    changed: (i64, u32),
}

impl Beacon {
    /// Says that an outbox has grown. Where the system itself tells of changes, and shortly after the last time, this does nothing.
    pub fn flash(&mut self) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let needed = match self.needed {
            Some(needed) => needed,
            None => *self.needed.insert(fs::is_network_fs(directory)?.is_some()),
        };
        if !needed || self.flashed.is_some_and(|flashed| flashed.elapsed() < PAUSE) {
            return Ok(());
        }
        self.flash_now()?;
        self.flashed = Some(Instant::now());
        Ok(())
    }

    fn flash_now(&self) -> io::Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        loop {
            match utimensat(CWD, &self.path, &times, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => match fs::create_new(&self.path) {
                    Ok(_) => return Ok(()),
                    // Another worker was faster; ours is said too.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                },
                other => return Ok(other?),
            }
        }
    }
}

impl Mailbox {
    /// The beacon of a swarm, for one of its workers.
    pub fn beacon(&self, swarm: &SwarmId) -> Beacon {
        Beacon { path: self.beacon_path(swarm), needed: None, flashed: None }
    }

    /// When the beacon of a swarm was last flashed; `None` when it has none. One question to the server, whatever this client believes.
    pub fn flashed(&self, swarm: &SwarmId) -> io::Result<Option<Flash>> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
        match statx(CWD, self.beacon_path(swarm), flags, StatxFlags::INO | StatxFlags::MTIME) {
            Ok(found) => {
                let changed = (found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec);
                Ok(Some(Flash { inode: found.stx_ino, changed }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn beacon_path(&self, swarm: &SwarmId) -> PathBuf {
        self.swarm_dir(swarm).join("beacon")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flash_is_seen_and_a_second_one_soon_after_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path());
        let swarm: SwarmId = "s".parse().unwrap();
        std::fs::create_dir(mailbox.swarm_dir(&swarm)).unwrap();
        assert_eq!(mailbox.flashed(&swarm).unwrap(), None);

        let mut beacon = mailbox.beacon(&swarm);
        beacon.flash().unwrap();
        assert_eq!(mailbox.flashed(&swarm).unwrap(), None, "the system tells of changes here");

        beacon.needed = Some(true);
        beacon.flash().unwrap();
        let first = mailbox.flashed(&swarm).unwrap().unwrap();
        beacon.flash().unwrap();
        assert_eq!(mailbox.flashed(&swarm).unwrap(), Some(first), "not twice within the pause");
        let mut other = mailbox.beacon(&swarm);
        other.needed = Some(true);
        // Times of files come in steps of some milliseconds.
        let deadline = Instant::now() + Duration::from_secs(10);
        while mailbox.flashed(&swarm).unwrap() == Some(first) {
            assert!(Instant::now() < deadline, "another worker's flash is not seen");
            (other.flashed, beacon.flashed) = (None, None);
            other.flash().unwrap();
        }
    }

    #[test]
    fn a_swarm_that_is_gone_has_no_beacon_and_gets_none() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path().join("mailbox"));
        let swarm: SwarmId = "s".parse().unwrap();
        assert_eq!(mailbox.flashed(&swarm).unwrap(), None);
        let mut beacon = mailbox.beacon(&swarm);
        beacon.needed = Some(true);
        beacon.flash().unwrap_err();
        assert!(!mailbox.root().exists());
    }
}
