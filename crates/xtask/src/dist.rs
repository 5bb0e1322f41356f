//! Static binaries in a tarball: what an operator copies to a cluster.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::shell::{cargo, has, program, root, target};

const TRIPLE: &str = "x86_64-unknown-linux-musl";

/// Builds, packs, and checks that what was packed runs.
pub(crate) fn run() -> anyhow::Result<()> {
    toolchain()?;
    let programs = programs()?;
    let packages: Vec<&str> = programs.iter().map(|(package, _)| package.as_str()).collect();
    cargo(&["build", "--profile", "dist", "--target", TRIPLE, "--locked", "--bins"]).packages(&packages).run()?;

    let version = env!("CARGO_PKG_VERSION");
    let name = format!("drover-{version}-{TRIPLE}");
    let dist = target().join("dist-pack");
    let dir = dist.join(&name);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(dir.join("bin"))?;
    fs::create_dir_all(dir.join("configs"))?;
    let built = target().join(TRIPLE).join("dist");
    let mut files: Vec<String> = Vec::new();
    for (_, bin) in &programs {
        fs::copy(built.join(bin), dir.join("bin").join(bin)).with_context(|| format!("{bin} was not built"))?;
        files.push(format!("bin/{bin}"));
    }
    for entry in fs::read_dir(root().join("configs"))? {
        let path = entry?.path();
        let file = format!("configs/{}", path.file_name().unwrap_or_default().to_string_lossy());
        fs::copy(&path, dir.join(&file))?;
        files.push(file);
    }
    for file in ["LICENSE", "README.md", "docs/configuration.md", "docs/errors.md", "docs/USER_GUIDE.md"] {
        let from = root().join(file);
        let to = PathBuf::from(file).file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::copy(&from, dir.join(&to)).with_context(|| format!("cannot pack {file}"))?;
        files.push(to);
    }
    files.sort();
    let sums = program("sha256sum", &files).within(&dir).read()?;
    fs::write(dir.join("SHA256SUMS"), sums)?;
    program("sha256sum", &["--check", "--quiet", "SHA256SUMS"]).within(&dir).run()?;
    let archive = format!("{name}.tar.gz");
    program("tar", &["--create", "--gzip", "--owner=0", "--group=0", "--sort=name", "--file", &archive, &name])
        .within(&dist)
        .run()?;
    let shown = program(dir.join("bin/drover"), &["--version"]).read()?;
    if !shown.contains(version) {
        bail!("the packed drover says it is {}, not {version}", shown.trim());
    }
    eprintln!("xtask: {}", dist.join(archive).display());
    Ok(())
}

/// The target's standard library, and a C compiler for it: ring and SQLite have C in them.
fn toolchain() -> anyhow::Result<()> {
    program("rustup", &["target", "add", TRIPLE]).run()?;
    if has("sh", &["-c", "command -v musl-gcc"]) {
        return Ok(());
    }
    if !has("sh", &["-c", "test $(id -u) = 0 && command -v apt-get"]) {
        bail!("musl-gcc is missing: install musl-tools");
    }
    program("apt-get", &["update", "-qq"]).run()?;
    program("apt-get", &["install", "-y", "-qq", "musl-tools"]).env("DEBIAN_FRONTEND", "noninteractive").run()
}

/// Package and name of every program that is shipped: those called drover or drover-something.
fn programs() -> anyhow::Result<Vec<(String, String)>> {
    let text = cargo(&["metadata", "--no-deps", "--format-version", "1", "--locked"]).read()?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata gave no JSON")?;
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let Some(owner) = package["name"].as_str() else { continue };
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_bin = target["kind"].as_array().into_iter().flatten().any(|kind| kind == "bin");
            let Some(name) = target["name"].as_str().filter(|_| is_bin) else { continue };
            if name == "drover" || (name.starts_with("drover-") && name != "drover-xtask") {
                found.push((owner.to_owned(), name.to_owned()));
            }
        }
    }
    if found.is_empty() {
        bail!("this workspace has no programs");
    }
    Ok(found)
}
