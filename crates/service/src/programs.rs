//! Which program is a daemon of ours, for those who start one.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// A program and the arguments that make it the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// What goes before all other arguments.
    pub args: Vec<String>,
}

/// The daemon of this name as this very file, when it is the one that holds every daemon, or as the file beside it.
pub fn find(name: &str) -> Result<Program, String> {
    let exe = std::env::current_exe().map_err(|error| format!("our own program cannot be found: {error}"))?;
    let within_drover = std::env::args_os().nth(1).is_some_and(|word| word == "daemon");
    choose(name, &exe, within_drover)
}

/// The file that holds every daemon: this very one, or `drover` beside it.
pub fn whole() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|error| format!("our own program cannot be found: {error}"))?;
    choose_whole(&exe, std::env::args_os().nth(1).is_some_and(|word| word == "daemon"))
}

fn choose_whole(exe: &Path, within_drover: bool) -> Result<PathBuf, String> {
    let exe = on_disk(exe);
    if (within_drover || exe.file_name().is_some_and(|name| name == "drover")) && is_program(&exe) {
        return Ok(exe);
    }
    let beside = exe.with_file_name("drover");
    if is_program(&beside) {
        return Ok(beside);
    }
    Err(format!("{} is one daemon alone, and there is no `drover`, which holds all of them, beside it", exe.display()))
}

/// A file that was replaced while it ran is known to the kernel by a name with a remark at its end.
fn on_disk(exe: &Path) -> PathBuf {
    match exe.to_str().and_then(|name| name.strip_suffix(" (deleted)")) {
        Some(name) if !exe.exists() => PathBuf::from(name),
        _ => exe.to_owned(),
    }
}

fn choose(name: &str, exe: &Path, within_drover: bool) -> Result<Program, String> {
    let exe = on_disk(exe);
    if (within_drover || exe.file_name().is_some_and(|name| name == "drover")) && is_program(&exe) {
        return Ok(Program { path: exe, args: vec!["daemon".to_owned(), name.to_owned()] });
    }
    let sibling = exe.with_file_name(format!("drover-{name}"));
    if is_program(&sibling) {
        return Ok(Program { path: sibling, args: Vec::new() });
    }
    Err(format!("there is no program at {}: install drover-{name} there, or start drover itself", sibling.display()))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_daemon_is_found_in_this_file_or_beside_it_also_after_an_upgrade() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, mode| {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let worker = program("drover-worker", 0o755);
        let error = choose_whole(&worker, false).unwrap_err();
        assert!(error.contains("one daemon alone"), "{error}");
        let drover = program("drover", 0o755);
        assert_eq!(choose_whole(&worker, false).as_ref(), Ok(&drover));
        assert_eq!(choose_whole(&dir.path().join("drover (deleted)"), false).as_ref(), Ok(&drover));
        assert_eq!(choose_whole(&worker, true).as_ref(), Ok(&worker));
        let multi = Program { path: drover.clone(), args: vec!["daemon".into(), "gossip-membership".into()] };
        assert_eq!(choose("gossip-membership", &drover, false).as_ref(), Ok(&multi));
        assert_eq!(choose("gossip-membership", &dir.path().join("drover (deleted)"), false), Ok(multi));
        let error = choose("gossip-membership", &worker, false).unwrap_err();
        assert!(error.contains("install drover-gossip-membership"), "{error}");
        program("drover-gossip-membership", 0o600);
        choose("gossip-membership", &worker, false).unwrap_err();
        let sibling = program("drover-gossip-membership", 0o755);
        assert_eq!(choose("gossip-membership", &worker, false), Ok(Program { path: sibling, args: Vec::new() }));
        assert_eq!(choose("gossip-membership", &worker, true).unwrap().path, worker);
    }
}
