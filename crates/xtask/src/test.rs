//! Every test, and an honest account of those that could not run.

use std::fs;
use std::path::{Path, PathBuf};

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
    // A machine that is booted for the units, what fetches the archive, and who judges and reads the metrics.
    let services = [("systemd-analyze", "systemd"), ("systemd-nspawn", "systemd-container"), ("curl", "curl")];
    for (tool, package) in services {
        if let Err(error) = installed(tool, package) {
            eprintln!("xtask: {tool} could not be installed: {error:#}");
        }
    }
    if let Err(error) = unpacked("prometheus", "usr/bin/promtool") {
        eprintln!("xtask: prometheus could not be unpacked: {error:#}");
    }
    // A load balancer in front of several entries.
    for (package, wanted) in
        [("nginx", "usr/sbin/nginx"), ("libnginx-mod-stream", "usr/lib/nginx/modules/ngx_stream_module.so")]
    {
        if let Err(error) = unpacked(package, wanted) {
            eprintln!("xtask: {package} could not be unpacked: {error:#}");
        }
    }
    // Whom the dispatcher's wire formats are judged by: a mock of providers and a client, neither of them ours.
    for judge in [node_for_tests, || install("aimock"), || install_for_python("openai")] {
        if let Err(error) = judge() {
            eprintln!("xtask: a judge of wire formats could not be installed: {error:#}");
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

/// The files of a Debian package, below `target/<package>`: installing it would bring a service and much else that no test needs.
fn unpacked(package: &str, wanted: &str) -> anyhow::Result<()> {
    let to = root().join("target").join(package);
    if to.join(wanted).is_file() || Path::new("/").join(wanted).is_file() {
        return Ok(());
    }
    if !has("sh", &["-c", "command -v apt-get && command -v dpkg-deb"]) {
        bail!("{package} is missing, and there is no apt-get to fetch it with");
    }
    fs::create_dir_all(&to)?;
    let fetch = || program("apt-get", &["download", "-qq", package]).within(&to).run();
    if fetch().is_err() {
        program("apt-get", &["update", "-qq"]).run()?;
        fetch()?;
    }
    for entry in fs::read_dir(&to)? {
        let file = entry?.path();
        if file.extension().is_some_and(|kind| kind == "deb") {
            program("dpkg-deb", &["--extract"]).arg(&file).arg(&to).run()?;
            fs::remove_file(file)?;
        }
    }
    Ok(())
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

/// The oldest Node.js that the mock of providers runs on.
const NODE: &str = "const [major, minor] = process.versions.node.split('.').map(Number); \
                    process.exit(major > 20 || (major === 20 && minor >= 15) ? 0 : 1)";

/// A Node.js from npm, where the system's own is too old.
fn node_for_tests() -> anyhow::Result<()> {
    if has("node", &["-e", NODE]) { Ok(()) } else { install("node") }
}

/// Packages for Python, at the versions that `tests/<tool>/requirements.txt` pins, below `target/<tool>/site`.
fn install_for_python(tool: &str) -> anyhow::Result<()> {
    let (from, to) = (root().join("tests").join(tool).join("requirements.txt"), root().join("target").join(tool));
    let wanted = fs::read(&from).with_context(|| format!("no tests/{tool}/requirements.txt"))?;
    let done = to.join("installed");
    if fs::read(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    if !has("python3", &["-m", "pip", "--version"]) {
        installed("pip3", "python3-pip")?;
    }
    fs::create_dir_all(&to)?;
    let (from, site) = (from.display().to_string(), to.join("site").display().to_string());
    let quick = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore"];
    let mut args = vec!["-m", "pip", "install", "--upgrade", "--target", &site, "-r", &from];
    args.extend(quick);
    program("python3", &args).run()?;
    fs::write(done, wanted)?;
    Ok(())
}
