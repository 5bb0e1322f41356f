//! Checks of the machine: configuration, state directory, disk, clock, memory.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use drover_config::Config;
use drover_service::StateDir;
use drover_types::AgentKind;

use super::Check;
use crate::fault::Fault;
use crate::files;
use crate::render::words::size;

/// The configuration loads; a broken one is replaced by the default for the checks that follow.
pub(super) fn config(path: Option<&Path>) -> (Check, Config) {
    match drover_config::load(path) {
        Ok(loaded) => {
            let mut check = Check::ok("configuration", loaded.source.to_string());
            if !loaded.warnings.is_empty() {
                check = check.hint(loaded.warnings.join("; "));
            }
            (check, loaded.config)
        }
        Err(error) => {
            let hint = "correct the file; `drover daemon router --check-config --config FILE` checks it again";
            (Check::wrong("configuration", error.to_string(), hint), Config::default())
        }
    }
}

/// Where launches go that name no cluster, or the one that was asked about.
pub(super) fn cluster(config: &Config, asked: Option<&str>) -> Check {
    const NAME: &str = "cluster";
    let catalogue = drover_allocator::providers(config);
    let usable: Vec<&str> =
        catalogue.iter().filter(|entry| entry.disabled_reason.is_none()).map(|entry| entry.id.as_str()).collect();
    let others = match usable.as_slice() {
        [] => "add an entry with backend local or static to launch_providers".to_owned(),
        ids => format!("launch with --cluster on one of: {}", ids.join(", ")),
    };
    let found = match asked {
        Some(id) => catalogue.iter().find(|entry| entry.id == id),
        None => catalogue.first(),
    };
    let Some(entry) = found else {
        let what = asked.map_or_else(|| "the catalogue is empty".to_owned(), |id| format!("no entry is called {id:?}"));
        return Check::wrong(NAME, what, others);
    };
    let shown = format!("{} ({}, {})", entry.id, entry.label, entry.backend.as_str());
    if let Some(reason) = &entry.disabled_reason {
        return Check::wrong(NAME, format!("{shown} cannot be used: {reason}"), others);
    }
    if let (false, Some(root)) = (entry.hosts.is_empty(), &entry.workspace_root)
        && Path::new(root).is_absolute()
        && let Err(error) = files::try_writing(Path::new(root))
    {
        let hint = "mount that file system here and make it writable: the hosts' workers and this side meet in it";
        return Check::wrong(NAME, format!("{shown}: {root} cannot be written: {error}"), hint);
    }
    Check::ok(NAME, shown)
}

/// Ours, private, and writable. A missing one is made by the first command that needs it.
pub(super) fn state_dir(path: &Path) -> Check {
    const NAME: &str = "state directory";
    let shown = path.display();
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return match existing_parent(path).map(|parent| files::try_writing(&parent)) {
                Some(Ok(())) => {
                    Check::ok(NAME, format!("{shown} does not exist yet")).hint("the first command makes it")
                }
                Some(Err(error)) => Check::wrong(
                    NAME,
                    format!("{shown} cannot be made: {error}"),
                    "choose another with DROVER_STATE_DIR",
                ),
                None => Check::wrong(NAME, format!("{shown} cannot be made"), "choose another with DROVER_STATE_DIR"),
            };
        }
        Err(error) => return Check::wrong(NAME, format!("{shown}: {error}"), "choose another with DROVER_STATE_DIR"),
    };
    let me = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Check::wrong(
            NAME,
            format!("{shown} is not a directory"),
            "move it away, or choose another with DROVER_STATE_DIR",
        );
    }
    if meta.uid() != me {
        let detail = format!("{shown} belongs to uid {}, not to uid {me}", meta.uid());
        return Check::wrong(NAME, detail, "choose another with DROVER_STATE_DIR; a foreign one is never used");
    }
    let mode = meta.mode() & 0o777;
    // First whether it can be written: on a read-only file system its mode could not be mended either.
    if let Err(error) = files::try_writing(path) {
        let fault = Fault::cannot_write(path, &error);
        return Check::wrong(NAME, format!("{shown} cannot be written: {error}"), fault.hint);
    }
    if mode & 0o077 != 0 {
        let detail = format!("{shown} has mode {mode:04o}: other users can look into it");
        return Check::wrong(NAME, detail, format!("chmod 700 {shown}, or drover doctor --fix"));
    }
    Check::ok(NAME, format!("{shown}, mode {mode:04o}"))
}

/// A directory of ours that nobody else can look into; whether it can be written is another matter.
pub(super) fn is_private(path: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    fs::metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == me && meta.mode().trailing_zeros() >= 6)
}

/// Makes the directory, or makes it private and writable. False when that is not ours to do.
pub(super) fn repair_state_dir(path: &Path) -> bool {
    let ours = fs::metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw());
    if ours {
        return fs::set_permissions(path, fs::Permissions::from_mode(0o700)).is_ok();
    }
    !path.exists() && StateDir::open(path).is_ok()
}

fn existing_parent(path: &Path) -> Option<PathBuf> {
    path.ancestors().skip(1).find(|parent| parent.is_dir()).map(Path::to_owned)
}

/// Below this nothing is safe to start.
const LEAST_FREE: u64 = 64 << 20;
/// Below this it is worth a word.
const LITTLE_FREE: u64 = 1 << 30;

/// Room for the event log and the mailbox.
pub(super) fn space(path: &Path) -> Check {
    const NAME: &str = "free space";
    let dir = if path.exists() { Some(path.to_owned()) } else { existing_parent(path) };
    match dir.map(rustix::fs::statvfs) {
        Some(Ok(stat)) => space_of(stat.f_bavail.saturating_mul(stat.f_frsize), path),
        Some(Err(error)) => {
            Check::wrong(NAME, format!("{}: {error}", path.display()), "choose another with DROVER_STATE_DIR")
        }
        None => Check::wrong(
            NAME,
            format!("{} has no parent directory", path.display()),
            "choose another with DROVER_STATE_DIR",
        ),
    }
}

fn space_of(free: u64, path: &Path) -> Check {
    const NAME: &str = "free space";
    let detail = format!("{} free for {}", size(free), path.display());
    if free < LEAST_FREE {
        return Check::wrong(NAME, detail, "free some space, or choose another place with DROVER_STATE_DIR");
    }
    let check = Check::ok(NAME, detail);
    if free < LITTLE_FREE {
        check.hint("not much: router.keep_events and router.keep_events_for limit the event log")
    } else {
        check
    }
}

/// A network file system works, with care; it is good to know.
pub(super) fn file_system(path: &Path) -> Check {
    const NAME: &str = "file system";
    let dir = if path.exists() { Some(path.to_owned()) } else { existing_parent(path) };
    match dir.map(|dir| drover_mailbox::is_network_fs(&dir)) {
        Some(Ok(found)) => file_system_of(found),
        Some(Err(error)) => Check::wrong(NAME, error.to_string(), "choose another place with DROVER_STATE_DIR"),
        None => Check::wrong(NAME, "unknown", "choose another place with DROVER_STATE_DIR"),
    }
}

fn file_system_of(network: Option<&str>) -> Check {
    match network {
        None => Check::ok("file system", "local"),
        Some(kind) => Check::ok("file system", format!("{kind}, a network file system"))
            .hint("a state directory on a local disk is faster and safer: set DROVER_STATE_DIR; only the mailbox must be shared"),
    }
}

/// Nothing was made before this: 55 years of 365 days after 1970, towards the end of 2024.
const EPOCH_OF_SENSE: Duration = Duration::from_hours(55 * 365 * 24);
/// Files of our own from further in the future mean that the clock went back.
const TOLERANCE: Duration = Duration::from_mins(5);

/// The clock is not far off: certificates, retention and ages depend on it.
pub(super) fn clock(state: &Path) -> Check {
    let newest = fs::read_dir(state.join("run"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.metadata().ok()?.modified().ok())
        .max();
    clock_of(SystemTime::now(), newest)
}

fn clock_of(now: SystemTime, newest: Option<SystemTime>) -> Check {
    const NAME: &str = "clock";
    let hint = "set the clock (timedatectl set-ntp true), then look again";
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let shown = crate::render::json::timestamp(since.as_micros() as u64);
    if since < EPOCH_OF_SENSE {
        return Check::wrong(NAME, format!("it says {shown}, which is long ago"), hint);
    }
    let ahead = newest.and_then(|newest| newest.duration_since(now).ok()).unwrap_or_default();
    if ahead > TOLERANCE {
        return Check::wrong(
            NAME,
            format!("it says {shown}, but our files are {} s newer than that", ahead.as_secs()),
            hint,
        );
    }
    Check::ok(NAME, shown)
}

/// What one codex with its tools takes, roughly.
const PER_CODEX: u64 = 400 << 20;
const PER_ECHO: u64 = 20 << 20;

/// Memory for at least one node of the agent.
pub(super) fn memory(agent: AgentKind) -> Check {
    match free_memory() {
        Ok(free) => memory_of(free, agent),
        Err(error) => Check::wrong("memory", format!("cannot be read: {error}"), "look whether /proc is mounted"),
    }
}

/// Bytes that further processes may take.
pub(in crate::commands) fn free_memory() -> Result<u64, String> {
    let mut system = sysinfo::System::new().map_err(|error| error.to_string())?;
    system.refresh_memory();
    // Inside a job the limit of its control group counts, not what the machine has. It is that of this process: the
    // limits of the whole system are those of the root group, which has none.
    let limit = own_limits(&mut system).map_or(u64::MAX, |limits| limits.free_memory);
    Ok(limit.min(system.available_memory()))
}

fn own_limits(system: &mut sysinfo::System) -> Option<sysinfo::CGroupLimits> {
    let me = sysinfo::get_current_pid().ok()?;
    let nothing_more = sysinfo::ProcessRefreshKind::nothing();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[me]), false, nothing_more);
    system.process(me)?.cgroup_limits()
}

fn memory_of(free: u64, agent: AgentKind) -> Check {
    const NAME: &str = "memory";
    let each = if agent == AgentKind::Codex { PER_CODEX } else { PER_ECHO };
    let room = free / each;
    let detail = format!("{} free, room for about {room} {agent} nodes of {} each", size(free), size(each));
    if room == 0 {
        return Check::wrong(
            NAME,
            detail,
            "end other programs, or launch on other machines; a node without memory is killed in the middle of a turn",
        );
    }
    Check::ok(NAME, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_state_directory_is_found_and_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let missing = state_dir(&path);
        assert!(missing.ok && missing.detail.contains("does not exist yet"), "{missing:?}");

        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let open = state_dir(&path);
        assert!(!open.ok && open.detail.contains("0755") && open.hint.contains("chmod 700"), "{open:?}");
        assert!(repair_state_dir(&path));
        assert!(state_dir(&path).ok);

        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(state_dir(&file).hint.contains("move it away"));
        assert!(!state_dir(&file.join("below")).ok);
    }

    #[test]
    fn a_foreign_state_directory_is_never_used() {
        if !rustix::process::geteuid().is_root() {
            return; // Only root can make a directory that belongs to somebody else.
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        let check = state_dir(dir.path());
        assert!(!check.ok && check.detail.contains("65534") && check.hint.contains("DROVER_STATE_DIR"), "{check:?}");
        assert!(!repair_state_dir(dir.path()));
    }

    #[test]
    fn a_read_only_place_is_found_by_trying() {
        // The kernel refuses new files here, even to root.
        let check = state_dir(Path::new("/proc/self/drover"));
        assert!(!check.ok && check.hint.contains("DROVER_STATE_DIR"), "{check:?}");
    }

    #[test]
    fn a_full_disk_is_wrong_and_a_nearly_full_one_is_said() {
        let path = Path::new("/state");
        assert!(!space_of(LEAST_FREE - 1, path).ok && space_of(LEAST_FREE - 1, path).hint.contains("free some space"));
        assert!(space_of(LEAST_FREE, path).hint.contains("router.keep_events"));
        assert_eq!(space_of(LITTLE_FREE, path).hint, "");
        assert!(space(Path::new("/")).detail.contains("free for /"));
    }

    #[test]
    fn a_network_file_system_is_named() {
        let check = file_system_of(Some("nfs"));
        assert!(check.ok && check.detail.contains("nfs") && check.hint.contains("DROVER_STATE_DIR"), "{check:?}");
        assert_eq!(file_system(Path::new("/proc/nowhere")).detail, "local");
    }

    #[test]
    fn a_clock_that_went_back_is_found_by_our_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        let file = fs::File::create(run.join("router.json")).unwrap();
        assert!(clock(dir.path()).ok);
        file.set_modified(SystemTime::now() + Duration::from_hours(2)).unwrap();
        let check = clock(dir.path());
        assert!(!check.ok && check.detail.contains("newer") && check.hint.contains("set the clock"), "{check:?}");
        assert!(!clock_of(SystemTime::UNIX_EPOCH, None).ok);
    }

    #[test]
    fn too_little_memory_for_one_node_is_wrong() {
        let check = memory_of(PER_CODEX - 1, AgentKind::Codex);
        assert!(!check.ok && check.hint.contains("killed in the middle of a turn"), "{check:?}");
        assert!(memory_of(PER_CODEX, AgentKind::Codex).ok && memory_of(PER_ECHO, AgentKind::Echo).ok);
        assert!(!memory(AgentKind::Echo).detail.is_empty());
    }

    #[test]
    fn a_cluster_that_cannot_be_used_is_said_with_the_others() {
        let load = |text: &str| Config::from_text("test.yaml", text, &std::collections::BTreeMap::new()).unwrap().0;
        assert!(cluster(&Config::default(), None).ok);
        let config = load(
            "launch_providers:\n  - {id: hpc, backend: slurm}\n  - {id: here, backend: local}\n\
             cluster: {slurm: {login_host: h, workspace_root: /w, cluster_subdir: c}}\n",
        );
        for asked in [None, Some("hpc"), Some("here")] {
            let check = cluster(&config, asked);
            assert!(check.ok, "{check:?}");
        }
        let check = cluster(&config, Some("nosuch"));
        assert!(!check.ok && check.hint.contains("here"), "{check:?}");
        let gone = cluster(&load("cluster: {hosts: [n1], workspace_root: /proc/nowhere}\n"), None);
        assert!(!gone.ok && gone.detail.contains("/proc/nowhere") && gone.hint.contains("mount"), "{gone:?}");
    }

    #[test]
    fn a_broken_configuration_is_shown_where_it_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drover.yaml");
        fs::write(&path, "router:\n  lissten: 127.0.0.1:1\n").unwrap();
        let (check, _) = config(Some(&path));
        assert!(!check.ok && check.detail.contains("lissten") && check.detail.contains("drover.yaml"), "{check:?}");
        assert!(check.hint.contains("--check-config"));
    }
}
