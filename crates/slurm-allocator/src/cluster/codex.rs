//! Codex on a cluster: installed once into the shared file system, at the version that drover was tested with.
//!
//! The site's own npm is asked first, since it knows the site's mirror and proxy. Login hosts without npm, or without a way to a
//! registry, get what this machine's npm fetches. Credentials are nobody's business here: people log in to codex there.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use drover_ssh::{Command, Remote, RemotePath, Source, Upload};
use drover_types::Failure;

use super::answers::CodexInstalled;
use super::{ClusterSettings, install};

/// Some hundred megabytes from a registry, written to a slow file system.
const INSTALLING: Duration = Duration::from_mins(15);
/// The same over a slow line.
const SENDING: Duration = Duration::from_mins(30);

/// Sees to it that codex lies where workers look for it.
pub(super) async fn provide(
    remote: &dyn Remote,
    settings: &ClusterSettings,
    program: &str,
    version: &str,
) -> Result<CodexInstalled, Failure> {
    let with_their_npm = match unpack(remote, settings, program, version, None).await {
        Ok(installed) => return Ok(installed),
        Err(failure) => failure,
    };
    let sent = send(remote, settings, program, version).await;
    sent.map_err(|ours| {
        settings
            .unavailable(format!("{}; and from here: {}", with_their_npm.message, ours.message))
            .hint(format!("install npm's @openai/codex@{version} there by hand, and name it with worker.codex_bin"))
    })
}

async fn unpack(
    remote: &dyn Remote,
    settings: &ClusterSettings,
    program: &str,
    version: &str,
    archive: Option<&str>,
) -> Result<CodexInstalled, Failure> {
    let mut command = Command::new(program)
        .args(["site", "codex", "--json", "--base", &settings.base, "--version", version])
        .deadline(INSTALLING);
    if let Some(archive) = archive {
        command = command.args(["--from", archive]);
    }
    let answer = install::run(remote, settings, command).await?;
    let text = String::from_utf8_lossy(&answer);
    let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    serde_json::from_str(line)
        .map_err(|error| settings.unavailable(format!("what our program answered makes no sense: {error}")))
}

/// Fetches it here and sends it.
async fn send(
    remote: &dyn Remote,
    settings: &ClusterSettings,
    program: &str,
    version: &str,
) -> Result<CodexInstalled, Failure> {
    let failed = |message: String| settings.unavailable(message);
    let machine = remote.run(Command::new("uname").arg("-m")).await.map_err(|error| settings.of_ssh(&error))?;
    let cpu = match String::from_utf8_lossy(&machine.stdout).trim() {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => return Err(failed(format!("there is no codex for a processor of the kind {other:?}"))),
    };
    let dir = std::env::temp_dir().join(format!("drover-codex-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir(&dir).map_err(|error| failed(format!("{} cannot be made: {error}", dir.display())))?;
    let result = async {
        let package = format!("@openai/codex@{version}");
        let cpu = format!("--cpu={cpu}");
        let npm = [
            "install",
            "--no-save",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--include=optional",
            "--force",
            "--os=linux",
            &cpu,
            "--prefix",
            ".",
            &package,
        ];
        here(&dir, "npm", &npm).await.map_err(failed)?;
        here(&dir, "tar", &["-czf", "codex.tgz", "node_modules"]).await.map_err(failed)?;
        let to = format!("{}/tools/codex-{version}-{cpu}.tgz", settings.base, cpu = &cpu[6..]);
        let place = RemotePath::new(to.clone()).map_err(|error| settings.of_ssh(&error))?;
        let upload = Upload::new(Source::File(dir.join("codex.tgz")), place).deadline(SENDING);
        remote.upload(upload).await.map_err(|error| settings.of_ssh(&error))?;
        let installed = unpack(remote, settings, program, version, Some(&to)).await;
        let _ = remote.run(Command::new("rm").args(["-f", "--", &to])).await;
        installed
    };
    let result = result.await;
    let _ = std::fs::remove_dir_all(&dir);
    result
}

/// Runs a program of this machine to its end.
async fn here(dir: &Path, program: &str, args: &[&str]) -> Result<(), String> {
    let run = tokio::process::Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(INSTALLING, run)
        .await
        .map_err(|_| format!("{program} did not end within {} minutes", INSTALLING.as_secs() / 60))?
        .map_err(|error| format!("{program} cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: String = said.trim().lines().rev().take(3).collect::<Vec<_>>().join("; ").chars().take(300).collect();
    Err(format!("{program} ended with {}: {last}", output.status))
}
