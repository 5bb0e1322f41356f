//! `drover site codex`: codex in the shared file system of a cluster, whole or not at all.
//!
//! ```text
//! <base>/tools/codex/<version>/node_modules/…    as npm lays it out; put in place by one rename
//! <base>/tools/bin/codex                         leads to the native program in there
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use drover_allocator::TOOLS;
use drover_allocator::cluster::CodexInstalled;
use drover_config::WorkerConfig;

use crate::args::SiteCodex;
use crate::codex;
use crate::fault::Fault;

/// Some hundred megabytes, on a slow file system.
const INSTALLING: Duration = Duration::from_mins(14);

/// Installs it, unless it is there.
pub(super) async fn install(args: SiteCodex) -> Result<CodexInstalled, Fault> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
    if !args.version.starts_with(|c: char| c.is_ascii_digit()) || !args.version.chars().all(plain) {
        return Err(Fault::usage(format!("{:?} is no version", args.version)));
    }
    let all = args.base.join("tools/codex");
    let place = all.join(&args.version);
    let failed = |error: io::Error| {
        Fault::failed(format!("{} cannot be written: {error}", all.display()))
            .hint("workspace_root must be a directory of yours that is writable there and has 500 MB of room")
    };
    if let Some(path) = native(&place) {
        lead_to(&args.base, &path).map_err(failed)?;
        return Ok(CodexInstalled { path: path.display().to_string(), version: args.version, installed: false });
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&all).map_err(failed)?;
    let fresh = all.join(format!(".{}.{}", args.version, std::process::id()));
    fs::create_dir(&fresh).map_err(failed)?;
    let filled = fill(&fresh, &args).await.and_then(|()| {
        native(&fresh).map(drop).ok_or_else(|| Fault::failed("what was fetched has no program for this machine"))
    });
    // Somebody else may have been faster, with the same.
    let placed = filled.and_then(|()| match fs::rename(&fresh, &place) {
        Err(error) if native(&place).is_none() => Err(failed(error)),
        _ => Ok(()),
    });
    let _ = fs::remove_dir_all(&fresh);
    placed?;
    let path = native(&place).ok_or_else(|| Fault::failed("codex is gone as soon as it was installed"))?;
    lead_to(&args.base, &path).map_err(failed)?;
    Ok(CodexInstalled { path: path.display().to_string(), version: args.version, installed: true })
}

/// The native program of what npm has laid out there.
fn native(dir: &Path) -> Option<PathBuf> {
    let codex_bin = Some(dir.join("node_modules/.bin/codex"));
    codex::find(&WorkerConfig { codex_bin, ..WorkerConfig::default() }).ok()
}

fn lead_to(base: &Path, program: &Path) -> io::Result<()> {
    let bin = base.join(TOOLS);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&bin)?;
    let fresh = bin.join(format!(".codex.{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    symlink(program, &fresh)?;
    fs::rename(fresh, bin.join("codex"))
}

async fn fill(dir: &Path, args: &SiteCodex) -> Result<(), Fault> {
    let package = format!("@openai/codex@{}", args.version);
    let mut command = if let Some(archive) = &args.from {
        let mut tar = tokio::process::Command::new("tar");
        tar.arg("-xzf").arg(archive);
        tar
    } else {
        let mut npm = tokio::process::Command::new("npm");
        npm.args(["install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--include=optional"]);
        npm.args(["--prefix", ".", &package]);
        npm
    };
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let run = command.current_dir(dir).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(INSTALLING, run)
        .await
        .map_err(|_| Fault::failed(format!("{name} did not end within {} minutes", INSTALLING.as_secs() / 60)))?
        .map_err(|error| Fault::failed(format!("{name} cannot be run on the login host: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = said.trim().lines().rev().take(3).collect();
    Err(Fault::failed(format!("{name} ended with {}: {}", output.status, last.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// An archive with a program of that content.
    fn archive(dir: &Path, content: &str) -> PathBuf {
        let bin = dir.join("node_modules/.bin");
        fs::create_dir_all(&bin).unwrap();
        fs::write(bin.join("codex"), content).unwrap();
        fs::set_permissions(bin.join("codex"), fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.join("codex.tgz");
        let tar =
            std::process::Command::new("tar").arg("-czf").arg(&path).arg("node_modules").current_dir(dir).status();
        assert!(tar.unwrap().success());
        path
    }

    #[tokio::test]
    async fn it_is_installed_once_and_an_archive_without_it_leaves_nothing() {
        let (dir, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let base = dir.path().join("a base");
        let args = |from: &Path, version: &str| SiteCodex {
            base: base.clone(),
            version: version.to_owned(),
            from: Some(from.to_owned()),
        };
        let broken = source.path().join("broken.tgz");
        fs::write(&broken, "no archive").unwrap();
        let fault = install(args(&broken, "1.2.3")).await.unwrap_err();
        assert!(fault.message.contains("tar ended with"), "{}", fault.message);
        assert_eq!(fs::read_dir(base.join("tools/codex")).unwrap().count(), 0);

        let good = archive(source.path(), "#!/bin/sh\necho codex\n");
        let first = install(args(&good, "1.2.3")).await.unwrap();
        let link = base.join("tools/bin/codex");
        assert_eq!((first.installed, fs::read_link(&link).unwrap()), (true, PathBuf::from(&first.path)));
        assert_eq!(fs::read_dir(base.join("tools/codex")).unwrap().count(), 1);
        let again = install(args(&broken, "1.2.3")).await.unwrap();
        assert_eq!((again.installed, again.path), (false, first.path));
        for bad in ["../x", "latest", "1;x", ""] {
            assert!(install(args(&good, bad)).await.is_err(), "{bad}");
        }
    }
}
