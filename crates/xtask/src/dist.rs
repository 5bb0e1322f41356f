//! Static binaries in a tarball: what an operator copies to a cluster.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::shell::{cargo, installed, program, root, target};

const TRIPLE: &str = "x86_64-unknown-linux-musl";

/// Builds, packs, and checks that what was packed runs.
pub(crate) fn run() -> anyhow::Result<()> {
    toolchain()?;
    let programs = programs()?;
    let packages: Vec<&str> = programs.iter().map(|(package, _)| package.as_str()).collect();
    cargo(&["build", "--profile", "dist", "--target", TRIPLE, "--locked", "--bins"]).packages(&packages).run()?;

    let name = format!("drover-{}-{TRIPLE}", env!("CARGO_PKG_VERSION"));
    let dist = target().join("dist-pack");
    let dir = dist.join(&name);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    let mut files = Vec::new();
    for (_, bin) in &programs {
        let built = target().join(TRIPLE).join("dist").join(bin);
        let bytes = fs::read(&built).with_context(|| format!("{bin} was not built"))?;
        if needs_loader(&bytes) {
            bail!("{bin} is not static: it would need the libraries of the machine that built it");
        }
        files.push(pack(&built, &dir, &format!("bin/{bin}"))?);
    }
    for file in ["LICENSE", "README.md"] {
        files.push(pack(&root().join(file), &dir, file)?);
    }
    // Where they lie in the repository, so that README's links lead somewhere.
    for folder in ["configs", "docs"] {
        for entry in fs::read_dir(root().join(folder))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let file = format!("{folder}/{}", entry.file_name().to_string_lossy());
                files.push(pack(&entry.path(), &dir, &file)?);
            }
        }
    }
    files.sort();
    fs::write(dir.join("SHA256SUMS"), program("sha256sum", &files).within(&dir).read()?)?;
    let archive = format!("{name}.tar.gz");
    let owner = ["--owner=0", "--group=0", "--numeric-owner", "--sort=name"];
    program("tar", &[&["--create", "--gzip", "--file", &archive], &owner[..], &[&name]].concat())
        .within(&dist)
        .run()?;
    let sum = program("sha256sum", &[&archive]).within(&dist).read()?;
    fs::write(dist.join(format!("{archive}.sha256")), sum)?;
    fs::remove_dir_all(&dir)?;
    try_out(&dist, &archive, &name, &programs)?;
    eprintln!("xtask: {}", dist.join(archive).display());
    Ok(())
}

/// Copies a file into the package; returns its name there.
fn pack(from: &Path, dir: &Path, to: &str) -> anyhow::Result<String> {
    let path = dir.join(to);
    fs::create_dir_all(path.parent().unwrap_or(dir))?;
    fs::copy(from, path).with_context(|| format!("cannot pack {to}"))?;
    Ok(to.to_owned())
}

/// Unpacks the archive as its users will, and runs what is in it: every program says its version, and the tour is made.
fn try_out(dist: &Path, archive: &str, name: &str, programs: &[(String, String)]) -> anyhow::Result<()> {
    let (version, dir) = (env!("CARGO_PKG_VERSION"), dist.join(name));
    program("sha256sum", &["--check", "--quiet", &format!("{archive}.sha256")]).within(dist).run()?;
    program("tar", &["--extract", "--file", archive]).within(dist).run()?;
    program("sha256sum", &["--check", "--quiet", "SHA256SUMS"]).within(&dir).run()?;
    for (_, bin) in programs {
        let shown = program(dir.join("bin").join(bin), &["--version"]).read()?;
        if !shown.contains(version) {
            bail!("the packed {bin} says it is {}, not {version}", shown.trim());
        }
    }
    let state = dist.join("state");
    let toured = program(dir.join("bin/drover"), &["demo"]).env("DROVER_STATE_DIR", &state).within(&dir).run();
    if state.exists() {
        fs::remove_dir_all(&state)?;
    }
    toured
}

/// Whether an ELF file asks for a dynamic loader: one of its program headers is PT_INTERP.
fn needs_loader(elf: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = elf.get(at..at + bytes).unwrap_or_default();
        field.iter().rev().fold(0_usize, |number, &byte| number << 8 | usize::from(byte))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).any(|index| number(table + index * size, 4) == 3)
}

/// The target's standard library, and a C compiler for it: ring and SQLite have C in them.
fn toolchain() -> anyhow::Result<()> {
    program("rustup", &["target", "add", TRIPLE]).run()?;
    installed("musl-gcc", "musl-tools")
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

#[cfg(test)]
mod tests {
    use super::needs_loader;

    #[test]
    fn a_program_that_asks_for_a_loader_is_found() {
        // This test is built for the host, where programs are linked dynamically.
        let me = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs_loader(&me));
        assert!(!needs_loader(b"\x7fELF"));
    }
}
