//! Static binaries and what belongs to them, in a tarball and in a Debian package: what an operator installs.
//!
//! ```text
//! cargo build (musl) ──> pack.rs: the tree as it will lie below the prefix ──> tar, sums, SBOM ──> tried out as a user would,
//!                                                                       └──> cargo-deb, when it is there ──> and on a fresh Debian
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::pack::{self, Daemons, Tree};
use crate::shell::{cargo, has, installed, program, root, target};

const TRIPLE: &str = "x86_64-unknown-linux-musl";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Packs programs that are built already, the daemons as links to `drover`, and tries nothing out.
pub(crate) struct Ready {
    /// Where the programs are.
    pub(crate) from: PathBuf,
    /// Where the archive goes.
    pub(crate) out: PathBuf,
}

/// Builds, packs, and checks that what was packed runs.
pub(crate) fn run(ready: Option<Ready>) -> anyhow::Result<()> {
    let programs = programs()?;
    if let Some(Ready { from, out }) = ready {
        let tree = Tree { name: format!("drover-{VERSION}-debug"), out };
        let archive = tree.pack(&from, Daemons::Links(&names(&programs)), "x86_64-unknown-linux-gnu")?;
        eprintln!("xtask: {}", archive.display());
        return Ok(());
    }
    toolchain()?;
    let packages: Vec<&str> = programs.iter().map(|(package, _)| package.as_str()).collect();
    cargo(&["build", "--profile", "dist", "--target", TRIPLE, "--locked", "--bins"]).packages(&packages).run()?;
    let built = target().join(TRIPLE).join("dist");
    for (_, bin) in &programs {
        let bytes = fs::read(built.join(bin)).with_context(|| format!("{bin} was not built"))?;
        if needs_loader(&bytes) {
            bail!("{bin} is not static: it would need the libraries of the machine that built it");
        }
    }
    let tree = Tree { name: format!("drover-{VERSION}-{TRIPLE}"), out: target().join("dist-pack") };
    let archive = tree.pack(&built, Daemons::Files(&names(&programs)), TRIPLE)?;
    try_out(&tree, &programs)?;
    eprintln!("xtask: {}", archive.display());
    let package = debian(&tree)?;
    fresh_debian(&archive, package.as_deref())
}

fn names(programs: &[(String, String)]) -> Vec<&str> {
    programs.iter().map(|(_, bin)| bin.as_str()).filter(|bin| *bin != "drover").collect()
}

/// A Debian package of the same tree. What goes where stands beside the command line's manifest.
fn debian(tree: &Tree) -> anyhow::Result<Option<PathBuf>> {
    if !has("cargo", &["deb", "--version"]) {
        eprintln!("xtask: cargo-deb is not installed, no Debian package is made (cargo install cargo-deb)");
        return Ok(None);
    }
    // cargo-deb wants fixed names, wherever cargo builds.
    let stage = root().join("target/dist-deb");
    fs::create_dir_all(stage.parent().unwrap_or(&stage))?;
    if stage.is_symlink() {
        fs::remove_file(&stage)?;
    }
    std::os::unix::fs::symlink(tree.dir(), &stage)?;
    pack::compress_manuals(&stage)?;
    let package = tree.out.join(format!("drover_{VERSION}_amd64.deb"));
    let made = cargo(&["deb", "--package", "drover-cli", "--no-build", "--no-strip", "--target", TRIPLE, "--output"])
        .arg(&package)
        .run();
    fs::remove_file(&stage)?;
    made?;
    let inside = program("dpkg-deb", &["--contents"]).arg(&package).read()?;
    for wanted in
        ["./usr/bin/drover-router", "./lib/systemd/system/drover-router@.service", "./usr/share/man/man1/drover.1.gz"]
    {
        if !inside.contains(wanted) {
            bail!("{} lacks {wanted}:\n{inside}", package.display());
        }
    }
    pack::sum(&tree.out, &package.file_name().unwrap_or_default().to_string_lossy())?;
    eprintln!("xtask: {}", package.display());
    Ok(Some(package))
}

/// Installs, uses and removes them on a Debian that has nothing else.
fn fresh_debian(archive: &Path, package: Option<&Path>) -> anyhow::Result<()> {
    if !has("sh", &["-c", "test $(id -u) = 0 && command -v debootstrap"]) {
        eprintln!(
            "xtask: only root with debootstrap can try them on a fresh Debian, so that is left out (deploy/install/try)"
        );
        return Ok(());
    }
    let mut attempt = program(root().join("deploy/install/try"), &[archive]).env("FRESH", target().join("debian.tar"));
    if let Some(package) = package {
        attempt = attempt.arg("--package").arg(package);
    }
    attempt.run()
}

/// Unpacks the archive as its users will, and runs what is in it: every program says its version, and the tour is made.
fn try_out(tree: &Tree, programs: &[(String, String)]) -> anyhow::Result<()> {
    let archive = tree.archive_name();
    fs::remove_dir_all(tree.dir())?;
    program("sha256sum", &["--check", "--quiet", &format!("{archive}.sha256")]).within(&tree.out).run()?;
    program("tar", &["--extract", "--file", &archive]).within(&tree.out).run()?;
    program("sha256sum", &["--check", "--quiet", "SHA256SUMS"]).within(&tree.dir()).run()?;
    for (_, bin) in programs {
        let shown = program(tree.dir().join("bin").join(bin), &["--version"]).read()?;
        if !shown.contains(VERSION) {
            bail!("the packed {bin} says it is {}, not {VERSION}", shown.trim());
        }
    }
    let state = tree.out.join("state");
    let toured =
        program(tree.dir().join("bin/drover"), &["demo"]).env("DROVER_STATE_DIR", &state).within(&tree.dir()).run();
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

/// A directory, or the one that the root of the repository has by this name.
pub(crate) fn place(dir: &Path) -> PathBuf {
    root().join(dir)
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
