//! Runs `drover` commands as a person would and reads what they print.

use std::process::Output;

use anyhow::{Context as _, ensure};
use drover_testkit::cluster::Cluster;
use serde_json::Value;

/// What a command printed and how it ended.
pub struct Ran {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a command to its end. The daemons run elsewhere, so blocking here is harmless.
pub fn run(cluster: &Cluster, args: &[&str]) -> anyhow::Result<Ran> {
    let output = cluster.command(args).output().with_context(|| format!("failed to run drover {args:?}"))?;
    Ok(output.into())
}

/// Runs a command that must succeed.
pub fn ok(cluster: &Cluster, args: &[&str]) -> anyhow::Result<Ran> {
    let ran = run(cluster, args)?;
    ensure!(ran.code == 0, "drover {args:?} exited {}:\n{}{}\n{}", ran.code, ran.stdout, ran.stderr, cluster.logs());
    Ok(ran)
}

/// The one JSON document that a command prints.
pub fn json(cluster: &Cluster, args: &[&str]) -> anyhow::Result<Value> {
    let ran = ok(cluster, args)?;
    serde_json::from_str(&ran.stdout).with_context(|| format!("drover {args:?} printed {}", ran.stdout))
}

/// The JSON lines that a command prints.
pub fn json_lines(cluster: &Cluster, args: &[&str]) -> anyhow::Result<Vec<Value>> {
    let ran = ok(cluster, args)?;
    ran.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}
