//! `drover site`: what a drover elsewhere asks of the copy of itself that it has placed on a cluster.
//!
//! It runs on a login or compute host, over SSH or under `srun`, and answers with one line of JSON. Everything that needs more
//! than one step on such a host is here and not in a script that is sent there: the login shells of accounts differ.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use drover_allocator::cluster::{FollowerFound, SiteReport};
use drover_allocator::ground::{self, Ground};
use drover_service::process::{self, ProcessId};
use drover_service::{StateDir, address_book};
use rustix::process::Signal;

use crate::app::{self, App};
use crate::args::{Site, SiteAction, SiteFollower, SiteProbe};
use crate::fault::{Exit, Fault};
use crate::start::{self, Recipe};
use crate::supervise::signal;
use crate::{codex, files, probe};

const FOLLOWER: &str = "outbox-follower";
/// How long a follower that is replaced may take to end in order; it gives itself less.
const ENDING: Duration = Duration::from_secs(15);
/// A program that nobody has used for so long is taken away. Jobs that may be started again still name theirs.
const KEPT_FOR: Duration = Duration::from_hours(30 * 24);
/// Programs that are kept however old they are.
const KEPT: usize = 3;
/// Says when a program was last used.
const USED: &str = "used";
/// More is asked of nobody: a bundle of skills for the nodes of one swarm.
const MOST_ASKED: u64 = 256 << 20;
/// Writes of which the middle one counts.
const WRITES: usize = 5;

pub(super) async fn run(app: &App, args: Site) -> anyhow::Result<Exit> {
    let answer = match args.action {
        SiteAction::Follower(args) => serde_json::to_string(&follower(&args).await?)?,
        SiteAction::Ground(args) => serde_json::to_string(&ground(args).await?)?,
        SiteAction::Codex(args) => serde_json::to_string(&super::site_codex::install(args).await?)?,
        SiteAction::Probe(args) => serde_json::to_string(&look(args).await)?,
    };
    app.screen.out(&answer)?;
    Ok(Exit::Done)
}

/// Does what an allocator elsewhere would do itself if the file system were mounted there.
async fn ground(args: SiteFollower) -> Result<ground::Answer, Fault> {
    if let Ok(own) = app::own_file() {
        keep_programs(&own);
    }
    let mut asked = String::new();
    let read = std::io::stdin().take(MOST_ASKED).read_to_string(&mut asked);
    read.map_err(|error| Fault::usage(format!("cannot read what is to be done: {error}")))?;
    let request = serde_json::from_str(&asked)
        .map_err(|error| Fault::usage(format!("what is to be done makes no sense: {error}")))?;
    let base = args.base.clone();
    let answered = tokio::task::spawn_blocking(move || Ground::at(&base).answer(request)).await;
    answered.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
        Fault::failed(format!("{} cannot be used: {error}", args.base.display()))
            .hint("check workspace_root: the file system must be mounted, writable and not full")
    })
}

/// Where the follower of this host keeps its state. Each login host has its own: a lock or a pid means nothing on another.
fn state_dir(base: &Path) -> Result<StateDir, Fault> {
    let path = base.join("hosts").join(process::hostname());
    StateDir::open(&path).map_err(|error| {
        Fault::failed(error.to_string()).hint("the directory on the shared file system must be yours and writable")
    })
}

/// Finds the follower of this host, or starts it. One of an earlier version is replaced.
async fn follower(args: &SiteFollower) -> Result<FollowerFound, Fault> {
    let state = state_dir(&args.base)?;
    let mut settings = String::new();
    std::io::stdin()
        .read_to_string(&mut settings)
        .map_err(|error| Fault::usage(format!("cannot read the settings: {error}")))?;
    let own = app::own_file().map_err(|error| Fault::failed(format!("cannot find this program's file: {error}")))?;
    keep_programs(&own);
    let _lock = start::only_one(&state).await?;
    let mut replaced = false;
    if let Some(entry) = address_book::read(&state, FOLLOWER).filter(|entry| entry.host == process::hostname()) {
        let id = ProcessId { pid: entry.pid, start_time: entry.start_time };
        if Build::of_process(&entry.version, entry.pid) >= Build::own(&own) {
            probe::healthz(&entry.listen).await.map_err(|why| {
                Fault::new(Exit::Unreachable, format!("the follower (pid {}) does not answer: {why}", entry.pid))
                    .hint(format!("look at {}", files::log_path(&state, FOLLOWER).display()))
            })?;
            return found(&entry, false, false);
        }
        end(id).await;
        replaced = true;
    }
    start_follower(args, &state, &settings).await?;
    let entry = address_book::read(&state, FOLLOWER)
        .ok_or_else(|| Fault::new(Exit::Unreachable, "the follower ended as soon as it was started"))?;
    found(&entry, true, replaced)
}

fn found(entry: &address_book::Entry, started: bool, replaced: bool) -> Result<FollowerFound, Fault> {
    let listen = entry
        .listen
        .parse()
        .map_err(|_| Fault::failed(format!("the follower's address {:?} is none", entry.listen)))?;
    Ok(FollowerFound {
        listen,
        host: entry.host.clone(),
        pid: entry.pid,
        version: entry.version.clone(),
        started,
        replaced,
    })
}

async fn start_follower(args: &SiteFollower, state: &StateDir, settings: &str) -> Result<(), Fault> {
    let fault = |error: std::io::Error| Fault::cannot_write(state.path(), &error);
    let config = state.join("run").map_err(fault)?.join("site.json");
    let write = || {
        let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&config)?;
        file.write_all(settings.as_bytes())
    };
    write().map_err(fault)?;
    let recipe = Recipe { state, config: Some(&config), detached: true, rotate: true };
    let mut command = recipe.command(FOLLOWER).map_err(fault)?;
    // The default port may be wanted by a drover that its user runs on this host by hand.
    command.args(["--listen", "127.0.0.1:0"]).arg("--mailbox").arg(args.base.join("mailbox"));
    command.current_dir("/").stdin(Stdio::null());
    let mut child = command.spawn().map_err(|error| Fault::failed(format!("cannot start the follower: {error}")))?;
    start::healthy(state, FOLLOWER, &mut child, tokio::time::Instant::now() + start::STARTING).await
}

/// Ends a process that is ours, in order if it will.
async fn end(id: ProcessId) {
    signal(id, Signal::TERM);
    let deadline = Instant::now() + ENDING;
    while process::is_alive(&id) {
        if Instant::now() >= deadline {
            signal(id, Signal::KILL);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Which of two programs is the later one: by version, then by when it was placed here. This is an order, so that two people, or
/// one with two machines, never replace each other's follower in turns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Build {
    version: Vec<u64>,
    placed: Option<SystemTime>,
}

impl Build {
    fn new(version: &str, file: &Path) -> Self {
        let numbers = version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect();
        Self { version: numbers, placed: fs::metadata(file).and_then(|meta| meta.modified()).ok() }
    }

    fn own(file: &Path) -> Self {
        Self::new(drover_types::VERSION, file)
    }

    /// A program that was taken away while it runs is older than any that is there.
    fn of_process(version: &str, pid: u32) -> Self {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        Self::new(version, &exe)
    }
}

/// Notes that this program is used, and takes away those that have long not been. Failing here costs disk space only.
fn keep_programs(own: &Path) {
    let (Some(mine), Some(all)) = (own.parent(), own.parent().and_then(Path::parent)) else { return };
    if all.file_name().is_none_or(|name| name != "bin") {
        return; // Not one that was placed: somebody runs this by hand.
    }
    let _ = fs::write(mine.join(USED), "");
    prune(all, mine, SystemTime::now());
}

fn prune(all: &Path, mine: &Path, now: SystemTime) {
    let Ok(dirs) = fs::read_dir(all) else { return };
    let mut others: Vec<(SystemTime, PathBuf)> = dirs
        .filter_map(|dir| {
            let path = dir.ok()?.path();
            let named = path.file_name()?.to_str()?.bytes().all(|byte| byte.is_ascii_hexdigit());
            let meta = fs::metadata(path.join(USED)).or_else(|_| fs::metadata(&path)).ok()?;
            (named && path != mine && path.is_dir()).then_some((meta.modified().ok()?, path))
        })
        .collect();
    others.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
    for (used, path) in others.into_iter().skip(KEPT - 1) {
        if now.duration_since(used).is_ok_and(|age| age > KEPT_FOR) {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// What this host is like.
async fn look(args: SiteProbe) -> SiteReport {
    let mut report = SiteReport {
        host: process::hostname(),
        version: drover_types::VERSION.to_owned(),
        now_us: drover_service::now_us(),
        file_system: drover_mailbox::is_network_fs(&args.dir).ok().flatten().map(str::to_owned),
        sees: args.sees.as_ref().map(|name| args.dir.join(name).exists()),
        write_us: None,
        write_error: String::new(),
        codex: None,
        codex_found: false,
        codex_error: String::new(),
        codex_hint: String::new(),
    };
    match write_time(&args.dir) {
        Ok(time) => report.write_us = Some(time.as_micros() as u64),
        Err(error) => report.write_error = error.to_string(),
    }
    if args.codex {
        // Found as a worker finds it: as configured, on its PATH, and then among what we have installed.
        let installed = Some(args.dir.join(drover_allocator::TOOLS).join("codex")).filter(|path| path.exists());
        let codex_home = args.codex_home.clone();
        let config = |codex_bin| drover_config::WorkerConfig {
            codex_bin,
            codex_home: codex_home.clone(),
            ..drover_config::WorkerConfig::default()
        };
        let (mut settings, chosen) = (config(args.codex_bin.clone()), args.codex_bin.is_some());
        let mut found = codex::find(&settings);
        if let (Err(_), false, Some(installed)) = (&found, chosen, installed) {
            settings = config(Some(installed));
            found = codex::find(&settings);
        }
        report.codex_found = found.is_ok();
        let usable = async {
            let bin = found?;
            codex::usable(&settings, &bin).await.map(|()| bin)
        };
        match usable.await {
            Ok(bin) => report.codex = Some(bin.display().to_string()),
            Err(failure) => (report.codex_error, report.codex_hint) = (failure.message, failure.hint),
        }
    }
    report
}

/// How long one record takes to be durable there.
fn write_time(dir: &Path) -> std::io::Result<Duration> {
    let path = dir.join(format!(".drover-probe-{}-{}", process::hostname(), std::process::id()));
    let mut file = fs::OpenOptions::new().create_new(true).append(true).mode(0o600).open(&path)?;
    let mut write = || {
        let begun = Instant::now();
        file.write_all(&[b'\n'; 4096])?;
        file.sync_data()?;
        Ok::<_, std::io::Error>(begun.elapsed())
    };
    let times: Result<Vec<_>, _> = (0..WRITES).map(|_| write()).collect();
    fs::remove_file(&path)?;
    let mut times = times?;
    times.sort_unstable();
    Ok(times[WRITES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_build_is_one_of_a_later_version_or_placed_later() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, age: u64| {
            let path = dir.path().join(name);
            let placed = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 - age);
            fs::File::create(&path).unwrap().set_modified(placed).unwrap();
            path
        };
        let (old, new) = (file("old", 100), file("new", 10));
        assert!(Build::new("0.10.0", &old) > Build::new("0.9.1", &new), "a later version wins however it was placed");
        assert!(Build::new("0.1.0", &new) > Build::new("0.1.0", &old));
        assert!(Build::new("0.1.0", &new) == Build::new("0.1.0", &new));
        assert!(Build::new("0.1.0", &dir.path().join("gone")) < Build::new("0.1.0", &old));
    }

    #[test]
    fn programs_that_were_not_used_for_long_are_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let all = dir.path();
        let now = SystemTime::now();
        let days = |days: u64| Duration::from_hours(24 * days);
        for (name, age) in [("aa", 400), ("bb", 90), ("cc", 40), ("dd", 20), ("ee", 0), ("not-ours", 900)] {
            fs::create_dir(all.join(name)).unwrap();
            let used = fs::File::create(all.join(name).join(USED)).unwrap();
            used.set_modified(now - days(age)).unwrap();
        }
        prune(all, &all.join("aa"), now);
        let mut left: Vec<_> =
            fs::read_dir(all).unwrap().map(|dir| dir.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["aa", "dd", "ee", "not-ours"], "the one in use and the two newest others stay");
        prune(all, &all.join("ee"), now + days(5));
        assert!(all.join("aa").exists() && all.join("dd").exists(), "few programs are kept however old they are");
    }
}
