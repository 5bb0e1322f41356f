//! Assignment files; their format is described one level up.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use drover_types::{AgentKind, JobId, NodeIndex, SwarmId};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::store::Record;

const VERSION: u32 = 1;

/// What a host's worker is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Assigned {
    pub(super) swarm_id: SwarmId,
    pub(super) node_id: NodeIndex,
    pub(super) job_id: JobId,
    pub(super) agent: AgentKind,
    #[serde(default)]
    pub(super) settings: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) release: Option<ReleaseOrder>,
    /// Directory of the node's identity, below the mailbox root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) identity: Option<PathBuf>,
}

/// The worker is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReleaseOrder {
    pub(super) force: bool,
}

impl Assigned {
    pub(super) fn of(record: &Record, node: usize, release: Option<ReleaseOrder>) -> Self {
        Self {
            swarm_id: record.swarm_id.clone(),
            node_id: NodeIndex(node as u32),
            job_id: record.job_id.clone(),
            agent: record.agent,
            settings: record.settings.clone(),
            release,
            identity: None,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    v: u32,
    host: String,
    revision: u64,
    assignment: Option<Assigned>,
}

/// What a host's worker says of itself; the part that we look at.
#[derive(Debug, Deserialize)]
struct WorkerFile {
    revision: u64,
    serving: Option<Serving>,
}

#[derive(Debug, Deserialize)]
struct Serving {
    swarm_id: SwarmId,
}

/// The directory of assignment files.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
}

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where workers say what they do.
    pub(super) fn workers(&self) -> PathBuf {
        self.dir.join("workers")
    }

    /// Where a host's identity lies, below the mailbox root.
    pub(super) fn identity(host: &str) -> PathBuf {
        Path::new("static").join(format!("{host}.identity"))
    }

    /// What a host is assigned to, by whomever.
    pub(super) fn read(&self, host: &str) -> io::Result<Option<Assigned>> {
        Ok(self.document(host)?.and_then(|document| document.assignment))
    }

    /// Whether the host's worker has seen what is written now, and says that it does not serve this swarm. A worker's file
    /// that is missing or damaged says nothing.
    pub(super) fn says_gone(&self, host: &str, swarm: &SwarmId) -> io::Result<bool> {
        let Some(document) = self.document(host)? else { return Ok(false) };
        let bytes = match std::fs::read(self.workers().join(format!("{host}.json"))) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let said: Option<WorkerFile> = serde_json::from_slice(&bytes).ok();
        Ok(said.is_some_and(|said| {
            said.revision >= document.revision && said.serving.is_none_or(|serving| serving.swarm_id != *swarm)
        }))
    }

    /// Replaces a host's assignment. A worker sees the old file or the new one, never half of one: the new one is synced
    /// under another name and then renamed within the directory, which is atomic on every file system.
    pub(super) fn write(&self, host: &str, assignment: Option<&Assigned>) -> io::Result<()> {
        let found = self.document(host)?;
        if found.as_ref().is_some_and(|document| document.assignment.as_ref() == assignment) {
            return Ok(());
        }
        let document = Document {
            v: VERSION,
            host: host.to_owned(),
            revision: found.map_or(0, |document| document.revision) + 1,
            assignment: assignment.cloned(),
        };
        files::make_dir(&self.dir)?;
        let bytes = serde_json::to_vec(&document)?;
        files::replace(&self.dir, &format!("{host}.json"), &format!(".{host}.new"), &bytes)
    }

    fn document(&self, host: &str) -> io::Result<Option<Document>> {
        check_host(host)?;
        let path = self.dir.join(format!("{host}.json"));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
        let document: Document = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if document.v > VERSION {
            return Err(bad(format!("format version {}, this drover knows {VERSION}", document.v)));
        }
        Ok(Some(document))
    }
}

/// A host's name becomes a file's.
fn check_host(host: &str) -> io::Result<()> {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if host.is_empty() || host.len() > 253 || host.starts_with(['.', '-']) || !host.bytes().all(harmless) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{host:?} is no host name: correct cluster.hosts"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(release: Option<ReleaseOrder>) -> Assigned {
        Assigned {
            swarm_id: "s".parse().unwrap(),
            node_id: NodeIndex(1),
            job_id: "static-1".parse().unwrap(),
            agent: AgentKind::Echo,
            settings: BTreeMap::new(),
            release,
            identity: None,
        }
    }

    #[test]
    fn the_file_is_what_a_worker_reads() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().join("static"));
        assert_eq!(files.read("n1").unwrap(), None);
        files.write("n1", Some(&assigned(None))).unwrap();
        let text = std::fs::read_to_string(dir.path().join("static/n1.json")).unwrap();
        assert_eq!(
            text,
            r#"{"v":1,"host":"n1","revision":1,"assignment":{"swarm_id":"s","node_id":1,"job_id":"static-1","agent":"echo","settings":{},"release":null}}"#
        );
        files.write("n1", Some(&assigned(None))).unwrap();
        files.write("n1", Some(&assigned(Some(ReleaseOrder { force: true })))).unwrap();
        assert_eq!(files.read("n1").unwrap(), Some(assigned(Some(ReleaseOrder { force: true }))));
        files.write("n1", None).unwrap();
        let text = std::fs::read_to_string(dir.path().join("static/n1.json")).unwrap();
        assert_eq!(text, r#"{"v":1,"host":"n1","revision":3,"assignment":null}"#);
        assert_eq!(std::fs::read_dir(dir.path().join("static")).unwrap().count(), 1);
    }

    #[test]
    fn a_worker_says_that_it_is_gone_only_with_the_newest_assignment_in_hand() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().to_owned());
        let swarm = "s".parse().unwrap();
        files.write("n1", Some(&assigned(Some(ReleaseOrder { force: false })))).unwrap();
        assert!(!files.says_gone("n1", &swarm).unwrap());
        std::fs::create_dir(dir.path().join("workers")).unwrap();
        let serving = |swarm: &str| format!(r#"{{"swarm_id":"{swarm}","node_id":0,"generation":1}}"#);
        for (revision, serving, gone) in
            [(0, "null".into(), false), (1, "null".into(), true), (1, serving("s"), false), (1, serving("t"), true)]
        {
            let text = format!(
                r#"{{"v":1,"host":"n1","machine":"m","pid":1,"start_time":1,"revision":{revision},"serving":{serving}}}"#
            );
            std::fs::write(dir.path().join("workers/n1.json"), text).unwrap();
            assert_eq!(files.says_gone("n1", &swarm).unwrap(), gone, "{revision} {serving}");
        }
        std::fs::write(dir.path().join("workers/n1.json"), "{\"revision\":9").unwrap();
        assert!(!files.says_gone("n1", &swarm).unwrap());
    }

    #[test]
    fn a_host_cannot_name_another_file_and_damage_is_not_taken_for_free() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().to_owned());
        for bad in ["", "..", "a/b", "../x", "-n", "a b"] {
            assert!(files.read(bad).is_err() && files.write(bad, None).is_err(), "{bad:?}");
        }
        for text in ["{\"v\":1", "{\"v\":2,\"host\":\"n1\",\"revision\":1,\"assignment\":null}"] {
            std::fs::write(dir.path().join("n1.json"), text).unwrap();
            assert!(files.read("n1").unwrap_err().to_string().contains("n1.json"));
        }
    }
}
