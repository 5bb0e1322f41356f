//! The archive that is shipped, made of the programs of this build.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use drover_testkit::cluster::program;
use drover_testkit::codex::repository_root;

/// Packs it into a directory, with its checksum and the script that installs it beside it.
pub fn archive(out: &Path) -> PathBuf {
    let xtask = program("drover-xtask").unwrap_or_else(|error| panic!("{error:#}"));
    let built = xtask.parent().unwrap_or(out);
    let output = Command::new(&xtask).args(["dist", "--from"]).arg(built).arg("--out").arg(out).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", xtask.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let script = repository_root().join("deploy/install/install.sh");
    fs::copy(script, out.join("install.sh")).unwrap_or_else(|error| panic!("install.sh: {error}"));
    let found = fs::read_dir(out).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut archives = found.filter(|path| path.to_str().is_some_and(|name| name.ends_with("-debug.tar.gz")));
    archives.next().unwrap_or_else(|| panic!("no archive in {}", out.display()))
}
