//! The directory that holds the state of a fake cluster.
//!
//! ```text
//! DIR/cluster.json      the cluster; replaced whole by rename, so that a program killed at any point leaves the old or the new
//! DIR/settings.json     what a test changes
//! DIR/lock              held while either of them is changed; the kernel lets go of it when its holder dies
//! DIR/controller.json   the process that starts and ends jobs; controller.lock is held by it
//! DIR/calls.log         one line per call of a command
//! DIR/jobs/ID/          script, environment, and for each run the processes that it consists of
//! DIR/bin/              sbatch, squeue, ... to be put on PATH
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use drover_service::process::ProcessId;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, getpid, kill_process};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::model::Cluster;
use super::settings::Settings;

/// Where a cluster is kept.
#[derive(Debug, Clone)]
pub struct Dir {
    root: PathBuf,
}

/// The cluster while nobody else may change it. Dropping it lets go without saving.
#[derive(Debug)]
pub struct Locked {
    dir: Dir,
    /// The cluster as it was stored.
    pub cluster: Cluster,
    /// The settings as they were stored.
    pub settings: Settings,
    /// Saving kills this program before anything has changed, to show that this harms nobody.
    pub(crate) dies_writing: bool,
    _lock: File,
}

/// One call of a command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// Real milliseconds since 1970.
    pub at_ms: i64,
    /// Which command.
    pub command: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// What was made to go wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// A process of a job. It writes this itself, before it becomes the program that it is to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recorded {
    /// The process; its pid is also its group's.
    pub process: ProcessId,
    /// The node that it is on.
    pub node: String,
    /// The step that it is a task of; `None` for the batch script.
    pub step: Option<u32>,
}

impl Dir {
    /// A directory that has or will have a cluster in it.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a new cluster. Refuses to replace one.
    pub fn create(&self, cluster: &Cluster, settings: &Settings) -> anyhow::Result<()> {
        fs::create_dir_all(self.root.join("jobs"))?;
        let lock = self.take_lock()?;
        anyhow::ensure!(!self.root.join("cluster.json").exists(), "{} has a cluster already", self.root.display());
        replace(&self.root.join("settings.json"), settings)?;
        replace(&self.root.join("cluster.json"), cluster)?;
        drop(lock);
        Ok(())
    }

    /// Waits until nobody changes the cluster, and reads it.
    pub fn lock(&self) -> anyhow::Result<Locked> {
        let lock = self.take_lock()?;
        Ok(Locked {
            dir: self.clone(),
            cluster: self.read()?,
            settings: self.settings()?,
            dies_writing: false,
            _lock: lock,
        })
    }

    fn take_lock(&self) -> anyhow::Result<File> {
        let path = self.root.join("lock");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("{} is no fake cluster", self.root.display()))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// The cluster as it was last saved.
    pub fn read(&self) -> anyhow::Result<Cluster> {
        read(&self.root.join("cluster.json"))
    }

    pub(crate) fn settings(&self) -> anyhow::Result<Settings> {
        read(&self.root.join("settings.json"))
    }

    /// Tells whether something was saved since the last time that this said the same.
    pub(crate) fn version(&self) -> io::Result<(u64, std::time::SystemTime)> {
        use std::os::unix::fs::MetadataExt as _;
        let cluster = fs::metadata(self.root.join("cluster.json"))?;
        Ok((cluster.ino(), cluster.modified()?))
    }

    /// Puts a call on record.
    pub(crate) fn note(&self, call: &Call) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(call)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().create(true).append(true).open(self.root.join("calls.log"))?;
        Ok(file.write_all(&line)?)
    }

    /// Every call so far.
    pub fn calls(&self) -> anyhow::Result<Vec<Call>> {
        let text = match fs::read_to_string(self.root.join("calls.log")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text?,
        };
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// What belongs to a job.
    pub(crate) fn job(&self, id: u32) -> PathBuf {
        self.root.join("jobs").join(id.to_string())
    }

    /// What belongs to one run of a job.
    pub(crate) fn run(&self, id: u32, run: u32) -> PathBuf {
        self.job(id).join(format!("run-{run}"))
    }

    /// Puts this very process on record as one of a job's.
    pub(crate) fn record(&self, id: u32, run: u32, recorded: &Recorded) -> anyhow::Result<()> {
        let dir = self.run(id, run).join("processes");
        fs::create_dir_all(&dir)?;
        replace(&dir.join(format!("{}.json", recorded.process.pid)), recorded)
    }

    /// The processes on record, of the runs that have not been cleared away.
    pub(crate) fn recorded(&self, id: u32) -> Vec<(u32, Recorded)> {
        let mut found = Vec::new();
        for run in fs::read_dir(self.job(id)).into_iter().flatten().flatten() {
            let name = run.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("run-")?.parse().ok()) else { continue };
            for file in fs::read_dir(run.path().join("processes")).into_iter().flatten().flatten() {
                if file.path().extension().is_some_and(|end| end == "json")
                    && let Ok(recorded) = read(&file.path())
                {
                    found.push((number, recorded));
                }
            }
        }
        found
    }

    /// How the script of a run ended: status and signal.
    pub(crate) fn script_end(&self, id: u32, run: u32) -> Option<(i32, i32)> {
        read(&self.run(id, run).join("end.json")).ok()
    }

    /// Says how the script of a run ended.
    pub(crate) fn set_script_end(&self, id: u32, run: u32, end: (i32, i32)) -> anyhow::Result<()> {
        replace(&self.run(id, run).join("end.json"), &end)
    }

    /// The process that waits for the script of a run.
    pub(crate) fn keeper(&self, id: u32, run: u32) -> Option<ProcessId> {
        read(&self.run(id, run).join("keeper.json")).ok()
    }

    /// Puts this process on record as the one that waits for the script of a run, unless there is one.
    pub(crate) fn claim_keeper(&self, id: u32, run: u32) -> anyhow::Result<bool> {
        let dir = self.run(id, run);
        fs::create_dir_all(&dir)?;
        let mine = dir.join(format!("keeper-{}.json", std::process::id()));
        replace(&mine, &ProcessId::current())?;
        // Whole, and the first one only.
        let claimed = fs::hard_link(&mine, dir.join("keeper.json"));
        fs::remove_file(&mine)?;
        match claimed {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            claimed => claimed.map(|()| true).map_err(Into::into),
        }
    }

    /// The process that starts and ends jobs.
    pub fn controller(&self) -> Option<ProcessId> {
        read(&self.root.join("controller.json")).ok()
    }

    /// Becomes the process that starts and ends jobs, unless there is one.
    pub(crate) fn become_controller(&self) -> anyhow::Result<Option<File>> {
        let file = OpenOptions::new().create(true).append(true).open(self.root.join("controller.lock"))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        replace(&self.root.join("controller.json"), &ProcessId::current())?;
        Ok(Some(file))
    }
}

impl Locked {
    /// Stores the cluster and lets go of it.
    pub fn save(self) -> anyhow::Result<()> {
        replace_dying(&self.dir.root.join("cluster.json"), &self.cluster, self.dies_writing)
    }

    /// Stores the settings.
    pub fn save_settings(&self) -> anyhow::Result<()> {
        replace(&self.dir.root.join("settings.json"), &self.settings)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("failed to understand {}", path.display()))
}

fn replace<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    replace_dying(path, value, false)
}

fn replace_dying<T: Serialize>(path: &Path, value: &T, dies: bool) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(value)?)?;
    if dies {
        kill_process(getpid(), Signal::KILL)?;
    }
    Ok(fs::rename(&new, path)?)
}
