//! What the allocator remembers: one small file per allocation, `allocator/<swarm>.json` in the state directory.
//!
//! A file is replaced whole and synced before what it announces is done. A file that cannot be understood stops the
//! allocator at its start: going on without it would leave workers that nobody supervises, and the router would take the
//! swarm for ended.
//!
//! Format versions: 1, the first.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use drover_types::{AgentKind, ErrorCode, Failure, JobId, SwarmId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::catalogue::BackendKind;
use crate::core::SwarmRecord;
use crate::files;
use crate::slurm::{Begun, SlurmRecord};

/// The format that is written.
const VERSION: u32 = 1;
/// A record is far smaller; what is larger is no record of ours.
const MAX_BYTES: u64 = 64 << 20;

/// What is remembered of one allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Format version.
    pub(crate) v: u32,
    /// The swarm.
    pub(crate) swarm_id: SwarmId,
    /// The allocation's name.
    pub(crate) job_id: JobId,
    /// Which backend has it.
    pub(crate) backend: BackendKind,
    /// The catalogue entry it was launched on.
    pub(crate) provider: String,
    /// Which agent its workers run.
    pub(crate) agent: AgentKind,
    /// Settings of the worker that the launch overrides.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) settings: BTreeMap<String, String>,
    /// The host whose processes are meant. Pids mean nothing elsewhere.
    pub(crate) host: String,
    /// The boot of that host. Pids and start times mean nothing after the next one.
    pub(crate) boot_id: String,
    /// Hosts of the nodes, by index; of the static backend only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hosts: Vec<String>,
    /// Its job; of the Slurm backend only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slurm: Option<SlurmRecord>,
    /// Nodes and their end.
    #[serde(flatten)]
    pub(crate) swarm: SwarmRecord,
}

/// Why what is remembered cannot be used.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    /// The directory or a file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not a record.
    #[error(
        "{path} is not a record of an allocation ({why}): if its workers are gone, remove the file and start again"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A newer drover wrote it.
    #[error("{path} has format version {version}, this drover reads {VERSION}: start the newer drover that wrote it")]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

impl StoreError {
    /// The same for the caller of a rpc.
    pub(crate) fn failure(&self) -> Failure {
        let cause = std::error::Error::source(self).map_or(String::new(), |source| format!(": {source}"));
        Failure::new(ErrorCode::StoreUnavailable, format!("{self}{cause}"))
            .hint("make room on that disk or make the directory writable, then repeat the request")
    }
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Uses this directory, which exists.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes a record and returns when the disk has it.
    pub(crate) fn save(&self, record: &Record) -> Result<(), StoreError> {
        let name = file_name(&record.swarm_id);
        // No swarm id begins with a dot, so this is nobody's record.
        let fresh = format!(".{}.new", record.swarm_id);
        serde_json::to_vec(record)
            .map_err(io::Error::from)
            .and_then(|bytes| files::replace(&self.dir, &name, &fresh, &bytes))
            .map_err(|source| StoreError::Io { path: self.dir.join(&name), source })
    }

    /// Removes a record.
    pub(crate) fn remove(&self, swarm: &SwarmId) -> Result<(), StoreError> {
        let name = file_name(swarm);
        files::remove(&self.dir, &name).map_err(|source| StoreError::Io { path: self.dir.join(&name), source })
    }

    /// Notes when the last calls to a cluster were made. Not synced: a crash of the host takes longer than a minute.
    pub(crate) fn keep_calls(&self, cluster: &str, begun: &[Begun]) -> io::Result<()> {
        // Begins with a dot, like nothing that is a record.
        files::write_new(&self.dir.join(format!(".calls-{cluster}")), &serde_json::to_vec(begun)?)
    }

    /// When the last calls to a cluster were made; nothing when nobody knows.
    pub(crate) fn calls(&self, cluster: &str) -> Vec<Begun> {
        let text = fs::read(self.dir.join(format!(".calls-{cluster}"))).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Reads every record.
    pub(crate) fn load(&self) -> Result<Vec<Record>, StoreError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            |source| StoreError::Io { path, source }
        };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io(&self.dir))? {
            let path = entry.map_err(io(&self.dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with('.') || path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            records.push(read(&path)?);
        }
        records.sort_by(|a, b| a.swarm_id.cmp(&b.swarm_id));
        Ok(records)
    }
}

fn read(path: &Path) -> Result<Record, StoreError> {
    /// Read first, so that a newer format is recognised whatever else it changed.
    #[derive(Deserialize)]
    struct Versioned {
        v: u32,
    }
    let io = |source| StoreError::Io { path: path.to_owned(), source };
    let damaged = |why: String| StoreError::Damaged { path: path.to_owned(), why };
    if fs::metadata(path).map_err(io)?.len() > MAX_BYTES {
        return Err(damaged("it is far too large".into()));
    }
    let bytes = fs::read(path).map_err(io)?;
    let versioned: Versioned = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if versioned.v > VERSION {
        return Err(StoreError::Newer { path: path.to_owned(), version: versioned.v });
    }
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if path.file_name().and_then(|name| name.to_str()) != Some(&file_name(&record.swarm_id)) {
        return Err(damaged(format!("it is about swarm {}", record.swarm_id)));
    }
    Ok(record)
}

fn file_name(swarm: &SwarmId) -> String {
    format!("{swarm}.json")
}

/// The version that [`Record::v`] gets.
pub(crate) const fn version() -> u32 {
    VERSION
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{NodeRecord, PhaseRecord, Process};
    use drover_types::Generation;

    fn record(swarm: &str) -> Record {
        Record {
            v: VERSION,
            swarm_id: swarm.parse().unwrap(),
            job_id: "local-1".parse().unwrap(),
            backend: BackendKind::Local,
            provider: "local".into(),
            agent: AgentKind::Echo,
            settings: BTreeMap::from([("sandbox_mode".into(), "read-only".into())]),
            host: "h".into(),
            boot_id: "b".into(),
            hosts: Vec::new(),
            slurm: None,
            swarm: SwarmRecord {
                release: None,
                limit: None,
                over_us: None,
                nodes: vec![NodeRecord {
                    generation: Generation(3),
                    phase: PhaseRecord::Running,
                    process: Some(Process { pid: 7, start_time: 99 }),
                    term_sent: false,
                    restarts: 1,
                    ran: true,
                    reason: String::new(),
                }],
            },
        }
    }

    #[test]
    fn what_is_stored_reads_back_and_half_a_write_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().to_owned());
        store.save(&record("b")).unwrap();
        store.save(&record("a.json")).unwrap();
        fs::write(dir.path().join(".c.new"), b"{\"v\":1,").unwrap();
        let begun = serde_json::from_str::<Vec<Begun>>(r#"[[1,"look"],[2,"other"]]"#).unwrap();
        store.keep_calls("hpc", &begun).unwrap();
        assert_eq!((store.calls("hpc"), store.calls("other")), (begun, vec![]));
        assert_eq!(store.load().unwrap(), [record("a.json"), record("b")]);
        store.remove(&"b".parse().unwrap()).unwrap();
        store.remove(&"b".parse().unwrap()).unwrap();
        assert_eq!(store.load().unwrap(), [record("a.json")]);
    }

    #[test]
    fn the_first_format_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"v":1,"swarm_id":"s","job_id":"local-1","backend":"local","provider":"local","agent":"echo",
            "host":"h","boot_id":"b","release":{"force":true,"kill_at_us":5},
            "nodes":[{"generation":2,"phase":"waiting","restarts":1},
                     {"generation":1,"phase":"running","process":{"pid":7,"start_time":9},"restarts":0,"ran":true}]}"#;
        fs::write(dir.path().join("s.json"), text).unwrap();
        let records = Store::new(dir.path().to_owned()).load().unwrap();
        assert_eq!(records[0].swarm.nodes[1].process, Some(Process { pid: 7, start_time: 9 }));
        assert!(records[0].swarm.release.unwrap().force);
    }

    #[test]
    fn a_record_that_is_not_understood_stops_the_start_and_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().to_owned());
        for (text, expected) in [
            ("{\"v\":2,\"anything\":1}", "format version 2"),
            ("{\"v\":1,\"swarm_id\":\"s\"", "remove the file"),
            ("{\"v\":1}", "missing field"),
        ] {
            fs::write(dir.path().join("s.json"), text).unwrap();
            let error = store.load().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("s.json"), "{error}");
        }
        store.save(&record("s")).unwrap();
        fs::rename(dir.path().join("s.json"), dir.path().join("t.json")).unwrap();
        assert!(store.load().unwrap_err().to_string().contains("about swarm s"));
    }
}
