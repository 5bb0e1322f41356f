//! Every test, and an honest account of those that could not run.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};

use crate::shell::{cargo, has, in_ci, installed, program, root, target};

/// Where tests that cannot run here write a line: their name, a tab, and why.
fn skipped_file() -> PathBuf {
    target().join("skipped-tests.txt")
}

/// Installs what system tests need, builds everything once, runs the tests, and tells what was left out.
pub(crate) fn run(filter: Option<&str>) -> anyhow::Result<()> {
    fs::create_dir_all(target())?;
    fs::write(skipped_file(), "").context("cannot clear the list of skipped tests")?;
    for tool in ["codex", "buf"] {
        if let Err(error) = install(tool) {
            // The tests that need it say so themselves, and with CI=true they fail.
            eprintln!("xtask: {tool} could not be installed: {error:#}");
        }
    }
    // The laboratory of network namespaces, and whom membership is measured against.
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables"), ("python3", "python3"), ("serf", "serf")] {
        if let Err(error) = installed(tool, package) {
            eprintln!("xtask: {tool} could not be installed: {error:#}");
        }
    }
    // A real Slurm, for the laboratory that plays a cluster. Its script knows the packages, and that none may start a service.
    if let Err(error) = program(root().join("deploy/lab/packages"), &["--sacct"]).run() {
        eprintln!("xtask: Slurm could not be installed: {error:#}");
    }
    // Tests start the real programs, also those of crates without tests of their own. Tests and programs in one call: in
    // two, the test-only dependencies switch features on, and half of everything would be compiled again.
    cargo(&["build", "--workspace", "--all-targets", "--locked"]).run()?;
    let outcome = tests(filter);
    let skipped = fs::read_to_string(skipped_file()).unwrap_or_default();
    let mut skipped: Vec<&str> = skipped.lines().filter(|line| !line.is_empty()).collect();
    skipped.sort_unstable();
    skipped.dedup();
    for line in &skipped {
        let (name, why) = line.split_once('\t').unwrap_or((line, "it did not say why"));
        eprintln!("xtask: could not run {name}: {why}");
    }
    outcome?;
    if in_ci() && !skipped.is_empty() {
        bail!("{} tests could not run, and with CI=true nothing may be skipped", skipped.len());
    }
    if skipped.is_empty() {
        eprintln!("xtask: every test has run");
    }
    Ok(())
}

/// Documentation examples first: what CI reads as the result is the summary at the end.
fn tests(filter: Option<&str>) -> anyhow::Result<()> {
    if filter.is_none() {
        cargo(&["test", "--workspace", "--doc", "--locked", "--quiet"]).run()?;
    }
    let nextest = has("cargo", &["nextest", "--version"]);
    let mut args = if nextest {
        vec!["nextest", "run", "--config-file", ".ci/nextest.toml", "--no-fail-fast"]
    } else {
        eprintln!("xtask: cargo-nextest is not installed, cargo test does as well, but slower");
        vec!["test", "--all-targets", "--no-fail-fast"]
    };
    args.extend(["--workspace", "--locked"]);
    args.extend(filter);
    cargo(&args).run()
}

/// A program from npm, at the version that `tests/<tool>/package-lock.json` pins, below `target/<tool>`.
fn install(tool: &str) -> anyhow::Result<()> {
    let (from, to) = (root().join("tests").join(tool), root().join("target").join(tool));
    let lock =
        fs::read(from.join("package-lock.json")).with_context(|| format!("no tests/{tool}/package-lock.json"))?;
    let done = to.join("installed");
    if fs::read(&done).is_ok_and(|installed| installed == lock) {
        return Ok(());
    }
    installed("npm", "npm")?;
    fs::create_dir_all(&to)?;
    for file in ["package.json", "package-lock.json"] {
        fs::copy(from.join(file), to.join(file))?;
    }
    program("npm", &["ci", "--no-audit", "--no-fund", "--loglevel=error"]).within(&to).run()?;
    fs::write(done, lock)?;
    Ok(())
}
