//! Starts worker processes: which program, with which environment, in which session, logging where.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use drover_mailbox::Mailbox;
use drover_types::{AgentKind, Generation, JobId, NodeIndex, SwarmId};

use super::process::is_program;
use crate::board::Board;
use crate::files::make_dir;
use crate::membership::Membership;

/// Names another program than our own as the worker; for tests and for trying out a build.
const WORKER_BIN: &str = "DROVER_WORKER_BIN";
/// What a worker gets of our environment, beside what the configuration names. `CODEX_HOME` is the documented default of
/// `worker.codex_home`.
const PASSED_ON: [&str; 7] = ["PATH", "HOME", "USER", "LANG", "CODEX_HOME", "DROVER_LOG", "DROVER_LOG_FORMAT"];
/// A log larger than this is put aside when the next worker starts; one older log is kept.
const LOG_BYTES: u64 = 8 << 20;
/// How much of a log's end is looked at for the reason of a failure.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 4;

/// One start.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) swarm: SwarmId,
    pub(super) job: JobId,
    pub(super) agent: AgentKind,
    pub(super) settings: BTreeMap<String, String>,
    pub(super) node: NodeIndex,
    pub(super) generation: Generation,
}

/// What every start of this allocator has in common.
#[derive(Debug)]
pub(super) struct Launcher {
    nodes: PathBuf,
    mailbox: Mailbox,
    environment: BTreeMap<OsString, OsString>,
    setsid: Option<PathBuf>,
    membership: Option<Arc<Membership>>,
}

/// A program and the arguments that make it a worker.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    args: &'static [&'static str],
}

impl Launcher {
    /// `nodes` is the directory of the nodes' working directories, `agent_env` the variables that agents may see.
    pub(super) fn new(
        state: &Path,
        nodes: PathBuf,
        mailbox: Mailbox,
        config_file: Option<&Path>,
        agent_env: &[String],
    ) -> Self {
        let named = PASSED_ON.iter().map(OsString::from).chain(agent_env.iter().map(OsString::from));
        let mut environment: BTreeMap<OsString, OsString> =
            named.filter_map(|name| std::env::var_os(&name).map(|value| (name, value))).collect();
        // Overrides of configuration keys hold for the workers as they do for us.
        let overrides = std::env::vars_os().filter(|(name, _)| {
            name.to_str().and_then(|name| name.strip_prefix("DROVER_")).is_some_and(|key| key.contains("__"))
        });
        environment.extend(overrides);
        environment.insert("DROVER_STATE_DIR".into(), state.into());
        environment.insert("DROVER_MAILBOX".into(), mailbox.root().into());
        if let Some(file) = config_file {
            environment.insert("DROVER_CONFIG".into(), file.into());
        }
        Self { nodes, mailbox, environment, setsid: find_on_path("setsid"), membership: None }
    }

    /// Nodes get an identity for the gossip, and a charter.
    pub(super) fn with_membership(mut self, membership: &Arc<Membership>) -> Self {
        self.membership = Some(Arc::clone(membership));
        self
    }

    /// A swarm of so many nodes is about to start.
    pub(super) fn before_launch(&self, swarm: &SwarmId, nodes: u32, board: &Board) {
        if let Some(membership) = &self.membership {
            membership.before_launch(swarm, nodes, membership.others_live(board, swarm));
        }
    }

    /// Takes back the identities of a swarm that has ended.
    pub(super) fn withdraw(&self, swarm: &SwarmId, nodes: u32) {
        for node in (0..nodes).map(NodeIndex) {
            Membership::withdraw(&self.identity_dir(swarm, node));
        }
    }

    fn identity_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.node_dir(swarm, node).join("identity")
    }

    /// Working directory of a node.
    pub(super) fn node_dir(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.swarm_dir(swarm).join(format!("{:02}", node.0))
    }

    /// Everything of a swarm's nodes.
    pub(super) fn swarm_dir(&self, swarm: &SwarmId) -> PathBuf {
        self.nodes.join(swarm.as_str())
    }

    /// Where the nodes' mailbox is.
    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    fn log_file(&self, swarm: &SwarmId, node: NodeIndex) -> PathBuf {
        self.swarm_dir(swarm).join(format!("{:02}.log", node.0))
    }

    /// Says what is wrong when no worker could be started at all.
    pub(super) fn check() -> Result<(), String> {
        find_program().map(|_| ())
    }

    /// Starts one worker. It leads its own session, so that neither our end nor a terminal's reaches it.
    pub(super) fn start(&self, order: &Order) -> Result<Child, String> {
        let program = find_program()?;
        let node_dir = self.node_dir(&order.swarm, order.node);
        make_dir(&node_dir).map_err(|error| format!("{} cannot be made: {error}", node_dir.display()))?;
        let log = self.open_log(order).map_err(|error| format!("its log cannot be opened: {error}"))?;
        let stdout = log.try_clone().map_err(|error| format!("its log cannot be opened: {error}"))?;
        let mut command = if let Some(setsid) = &self.setsid {
            let mut command = Command::new(setsid);
            command.arg(&program.path);
            command
        } else {
            let mut command = Command::new(&program.path);
            command.process_group(0);
            command
        };
        command
            .args(program.args)
            .env_clear()
            .envs(&self.environment)
            .env("DROVER_SWARM_ID", order.swarm.as_str())
            .env("DROVER_NODE_ID", order.node.to_string())
            .env("DROVER_GENERATION", order.generation.to_string())
            .env("DROVER_JOB_ID", order.job.as_str())
            .env("DROVER_NODE_DIR", node_dir)
            .env("DROVER_AGENT", order.agent.as_str())
            // Not the node's directory: what an agent writes there must not be read as our configuration.
            .current_dir(self.swarm_dir(&order.swarm))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(log);
        let identity = self.membership.as_ref().and_then(|membership| {
            membership.identity(&self.identity_dir(&order.swarm, order.node), &order.swarm, order.node)
        });
        if let Some(dir) = identity {
            command.env("DROVER_IDENTITY", dir);
        }
        for (key, value) in &order.settings {
            command.env(format!("DROVER_WORKER__{}", key.to_ascii_uppercase()), value);
        }
        command.spawn().map_err(|error| format!("{}: {error}", program.path.display()))
    }

    fn open_log(&self, order: &Order) -> io::Result<File> {
        let path = self.log_file(&order.swarm, order.node);
        if fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_BYTES) {
            fs::rename(&path, path.with_extension("log.1"))?;
        }
        OpenOptions::new().create(true).append(true).mode(0o600).open(path)
    }

    /// Where a node's log is and its last lines, on one line; empty when there is none.
    pub(super) fn log_words(&self, swarm: &SwarmId, node: NodeIndex) -> String {
        let path = self.log_file(swarm, node);
        let Ok(bytes) = read_end(&path) else { return String::new() };
        match last_lines(&bytes) {
            none if none.is_empty() => format!("its log is {}", path.display()),
            lines => format!("its log {} ends: {lines}", path.display()),
        }
    }
}

fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whole words for people: no colours, no control characters, no half line at the front when there are others.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<String> = text.lines().map(without_escapes).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join(" | ")
}

fn without_escapes(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // A colour ends with its first letter.
            for c in chars.by_ref() {
                if c.is_ascii_alphabetic() {
                    break;
                }
            }
        } else if !c.is_control() {
            plain.push(c);
        }
    }
    plain.trim().to_owned()
}

fn find_program() -> Result<Program, String> {
    let exe = std::env::current_exe().map_err(|error| format!("our own program cannot be found: {error}"))?;
    let within_drover = std::env::args_os().nth(1).is_some_and(|word| word == "daemon");
    choose_program(std::env::var_os(WORKER_BIN).map(PathBuf::from), &exe, within_drover)
}

/// The worker is the program named, or this very file when it is the one that holds every daemon, or the one beside it.
fn choose_program(named: Option<PathBuf>, exe: &Path, within_drover: bool) -> Result<Program, String> {
    if let Some(path) = named.filter(|path| !path.as_os_str().is_empty()) {
        if is_program(&path) {
            return Ok(Program { path, args: &[] });
        }
        return Err(format!("{WORKER_BIN} names {}, which is no program: correct or unset it", path.display()));
    }
    // A file that was replaced while it ran is known to the kernel by a name with this at its end.
    let exe = match exe.to_str().and_then(|name| name.strip_suffix(" (deleted)")) {
        Some(name) if !exe.exists() => PathBuf::from(name),
        _ => exe.to_owned(),
    };
    if (within_drover || exe.file_name().is_some_and(|name| name == "drover")) && is_program(&exe) {
        return Ok(Program { path: exe, args: &["daemon", "worker"] });
    }
    let sibling = exe.with_file_name("drover-worker");
    if is_program(&sibling) {
        return Ok(Program { path: sibling, args: &[] });
    }
    Err(format!(
        "there is no worker program at {}: install drover-worker there, or start drover itself",
        sibling.display()
    ))
}

fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|candidate| is_program(candidate))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn program(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_worker_is_found_also_after_an_upgrade_under_our_feet() {
        let dir = tempfile::tempdir().unwrap();
        let drover = program(dir.path(), "drover", 0o755);
        let worker = &["daemon", "worker"];
        assert_eq!(choose_program(None, &drover, false).unwrap(), Program { path: drover.clone(), args: worker });
        let deleted = dir.path().join("drover (deleted)");
        assert_eq!(choose_program(None, &deleted, false).unwrap(), Program { path: drover.clone(), args: worker });

        let allocator = program(dir.path(), "drover-slurm-allocator", 0o755);
        let error = choose_program(None, &allocator, false).unwrap_err();
        assert!(error.contains("drover-worker"), "{error}");
        assert_eq!(choose_program(None, &allocator, true).unwrap().args, worker);
        let sibling = program(dir.path(), "drover-worker", 0o755);
        assert_eq!(choose_program(None, &allocator, false).unwrap(), Program { path: sibling, args: &[] });

        let plain = program(dir.path(), "notes", 0o600);
        for wrong in [plain.clone(), dir.path().join("nosuch"), dir.path().to_owned()] {
            let error = choose_program(Some(wrong.clone()), &drover, false).unwrap_err();
            assert!(error.contains(WORKER_BIN) && error.contains(wrong.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn the_end_of_a_log_is_one_plain_line() {
        assert_eq!(last_lines(b""), "");
        assert_eq!(last_lines(b"a\nb\n\nc\nd\ne\n"), "b | c | d | e");
        assert_eq!(last_lines(b"\x1b[31mred\x1b[0m \x07bell\r\n\xff\n"), "red bell | \u{fffd}");
    }
}
