//! Where our daemons listen: one small file per daemon below `run/` of the state directory.
//!
//! The directory is private to the user, so an entry can be believed; whether its process still lives is looked up on
//! every read, by pid and start time, and only for entries of this host.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::process::{self, ProcessId};
use crate::state_dir::StateDir;

/// What a daemon says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the daemon, such as `router`.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// When it was started, in clock ticks since boot.
    pub start_time: u64,
    /// The host it runs on.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Address of gRPC, `/healthz` and `/metrics`.
    pub listen: String,
    /// Address of the JSON-line control plane; the router's only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<String>,
    /// The user it runs as.
    pub uid: u32,
}

impl Entry {
    /// Whether its process still runs. Of another host nothing is known, so that counts as running.
    pub fn is_alive(&self) -> bool {
        self.host != process::hostname() || process::is_alive(&ProcessId { pid: self.pid, start_time: self.start_time })
    }
}

fn path(state: &StateDir, name: &str) -> PathBuf {
    state.path().join("run").join(format!("{name}.json"))
}

/// The entry of a daemon whose process lives.
pub fn read(state: &StateDir, name: &str) -> Option<Entry> {
    read_any(state, name).filter(Entry::is_alive)
}

/// The entry of a daemon, alive or not.
pub fn read_any(state: &StateDir, name: &str) -> Option<Entry> {
    serde_json::from_slice(&fs::read(path(state, name)).ok()?).ok()
}

/// Every entry, alive or not, ordered by name.
pub fn list(state: &StateDir) -> Vec<Entry> {
    let Ok(files) = fs::read_dir(state.path().join("run")) else { return Vec::new() };
    let mut entries: Vec<Entry> = files
        .filter_map(|file| {
            let name = file.ok()?.file_name().into_string().ok()?;
            read_any(state, name.strip_suffix(".json")?)
        })
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}

pub(crate) fn write(state: &StateDir, entry: &Entry) -> io::Result<()> {
    let target = path(state, &entry.name);
    state.join("run")?;
    // Readers must never see half an entry; the state directory belongs to one host, so a rename is safe here.
    let fresh = target.with_extension(format!("{}.new", entry.pid));
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(entry)?)?;
    fs::rename(fresh, target)
}

pub(crate) fn remove(state: &StateDir, entry: &Entry) {
    // Only our own entry: a successor may have written its own already.
    if read_any(state, &entry.name).is_some_and(|found| found.pid == entry.pid && found.start_time == entry.start_time)
    {
        let _ = fs::remove_file(path(state, &entry.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_living_process_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let me = ProcessId::current();
        let mut entry = Entry {
            name: "router".into(),
            pid: me.pid,
            start_time: me.start_time,
            host: process::hostname(),
            version: "0".into(),
            listen: "127.0.0.1:1".into(),
            control: None,
            uid: 0,
        };
        write(&state, &entry).unwrap();
        assert_eq!(read(&state, "router").as_ref(), Some(&entry));

        entry.start_time += 1; // The pid lives, but it is another process.
        write(&state, &entry).unwrap();
        assert_eq!(read(&state, "router"), None);
        assert_eq!(read_any(&state, "router").as_ref(), Some(&entry));

        fs::write(path(&state, "router"), b"{\"name\": \"rou").unwrap();
        assert_eq!(read(&state, "router"), None, "a torn file is no entry");
    }
}
