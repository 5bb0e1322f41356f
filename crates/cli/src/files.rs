//! Logs and locks of the processes that this command line starts.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use drover_service::StateDir;
use rustix::fs::{FlockOperation, flock};

/// A lock on a file below `run/`, held until it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock; `None` when another process holds it.
    pub(crate) fn take(state: &StateDir, name: &str) -> io::Result<Option<Self>> {
        let path = state.join("run")?.join(format!("{name}.lock"));
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes who holds it, and which swarm ends with it, for messages. The lock itself is what counts.
    pub(crate) fn sign(&mut self, swarm_id: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        writeln!(self.file, "{}\n{swarm_id}", std::process::id())
    }
}

/// The pid that signed a lock which somebody holds; `None` when nobody holds it.
pub(crate) fn holder(state: &StateDir, name: &str) -> Option<u32> {
    match Lock::take(state, name) {
        Ok(Some(_)) | Err(_) => None,
        Ok(None) => {
            let text = signature(state, name)?;
            Some(text.lines().next().and_then(|pid| pid.trim().parse().ok()).unwrap_or(0))
        }
    }
}

fn signature(state: &StateDir, name: &str) -> Option<String> {
    fs::read_to_string(state.path().join("run").join(format!("{name}.lock"))).ok()
}

/// The swarm that ends with the holder of a lock.
pub(crate) fn swarm_of_holder(state: &StateDir, name: &str) -> Option<String> {
    Some(signature(state, name)?.lines().nth(1)?.trim().to_owned()).filter(|swarm| !swarm.is_empty())
}

/// Finds out whether a directory can be written by writing: permissions alone do not tell of read-only and full disks.
pub(crate) fn try_writing(dir: &Path) -> io::Result<()> {
    let path = dir.join(format!(".drover-probe-{}", std::process::id()));
    let tried = File::create(&path).and_then(|mut file| {
        file.write_all(&[0; 4096])?;
        file.sync_all()
    });
    if path.exists() {
        fs::remove_file(&path)?;
    }
    tried
}

/// Where a daemon's output goes.
pub(crate) fn log_path(state: &StateDir, daemon: &str) -> PathBuf {
    state.path().join("logs").join(format!("{daemon}.log"))
}

/// Opens a daemon's log for appending. With `rotate` the log so far becomes `.log.1`, so that each start has its own.
pub(crate) fn open_log(state: &StateDir, daemon: &str, rotate: bool) -> io::Result<File> {
    state.join("logs")?;
    let path = log_path(state, daemon);
    if rotate && fs::metadata(&path).is_ok_and(|meta| meta.len() > 0) {
        fs::rename(&path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The last lines of a log, for the message about a daemon that did not start.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    const ENOUGH: u64 = 16 << 10;
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
        let mut bytes = Vec::new();
        file.take(ENOUGH).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_names_its_holder_and_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(holder(&state, "up"), None);
        let mut lock = Lock::take(&state, "up").unwrap().unwrap();
        lock.sign("").unwrap();
        assert!(Lock::take(&state, "up").unwrap().is_none());
        assert_eq!((holder(&state, "up"), swarm_of_holder(&state, "up")), (Some(std::process::id()), None));
        lock.sign("0199").unwrap();
        assert_eq!(
            (holder(&state, "up"), swarm_of_holder(&state, "up")),
            (Some(std::process::id()), Some("0199".into()))
        );
        drop(lock);
        assert_eq!(holder(&state, "up"), None);
    }

    #[test]
    fn each_start_has_its_own_log() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        writeln!(open_log(&state, "router", true).unwrap(), "first\nstart").unwrap();
        writeln!(open_log(&state, "router", false).unwrap(), "again").unwrap();
        writeln!(open_log(&state, "router", true).unwrap(), "second").unwrap();
        let path = log_path(&state, "router");
        assert_eq!(tail(&path, 5), "second");
        assert_eq!(tail(&path.with_extension("log.1"), 2), "start\nagain");
    }
}
