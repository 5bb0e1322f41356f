//! What CI checks before it runs a test.

use std::fs;

use anyhow::bail;

use crate::shell::{cargo, has, program, root};

/// Runs every check.
pub(crate) fn run() -> anyhow::Result<()> {
    cargo(&["fmt", "--all", "--check"]).run()?;
    own_rules()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]).run()?;
    if has("cargo", &["deny", "--version"]) {
        // Advisories need a database from the network: `cargo deny check` looks at them too.
        cargo(&["deny", "check", "bans", "licenses", "sources"]).run()
    } else {
        eprintln!("xtask: cargo-deny is not installed, its checks are left out (cargo install cargo-deny)");
        Ok(())
    }
}

/// Rules that no tool has: no file names a path of somebody's machine, and lock files name no download address.
fn own_rules() -> anyhow::Result<()> {
    eprintln!("xtask: own rules");
    let listed = program("git", &["ls-files", "--cached", "--others", "--exclude-standard"]).read()?;
    let mut found = Vec::new();
    for name in listed.lines() {
        // A file that was deleted and is still in the index, or no text: nothing to read.
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        for (index, line) in text.lines().enumerate() {
            if let Some(why) = wrong(name, line) {
                found.push(format!("{name}:{}: {why}", index + 1));
            }
        }
    }
    if !found.is_empty() {
        bail!("{}\n{} lines to mend", found.join("\n"), found.len());
    }
    Ok(())
}

/// Directories of the machines that this is written on; in pieces, so that this file may hold them.
const MACHINE_PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/")];

fn wrong(file: &str, line: &str) -> Option<&'static str> {
    let part_of_path = |c: char| c.is_alphanumeric() || "/._-~$}".contains(c);
    let alone = |needle: &str| line.match_indices(needle).any(|(at, _)| !line[..at].ends_with(part_of_path));
    if MACHINE_PATHS.iter().any(|path| alone(path)) {
        return Some("names a path of one machine");
    }
    let line = line.trim_start();
    if file.ends_with("package-lock.json") && line.starts_with("\"resolved\"") {
        return Some("names a download address (npm config set omit-lockfile-registry-resolved true)");
    }
    if file.ends_with("Cargo.lock")
        && line.starts_with("source = ")
        && !line.contains("github.com/rust-lang/crates.io-index")
    {
        return Some("comes from elsewhere than crates.io");
    }
    let settings = [".npmrc", "pip.conf", ".cargo/config.toml", "sources.list"].iter().any(|end| file.ends_with(end));
    if settings && line.contains("://") {
        return Some("names a registry");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_one_machine_are_found_and_examples_are_not() {
        for line in MACHINE_PATHS.iter().map(|path| format!("see `{path}x`")) {
            assert!(wrong("README.md", &line).is_some(), "{line}");
        }
        // Put together, so that no line of this file looks like a path of a machine.
        let deeper = ["\"/shared/me", "~", "$HOME"].map(|root| format!("{root}{}x", MACHINE_PATHS[0]));
        for line in deeper.iter().map(String::as_str).chain(["/work1/drover", "https://x.test/home/"]) {
            assert_eq!(wrong("README.md", line), None, "{line}");
        }
        assert!(wrong("tests/x/package-lock.json", "      \"resolved\": \"https://x.test/a.tgz\",").is_some());
        assert!(wrong("Cargo.lock", "source = \"registry+https://x.test/index\"").is_some());
        assert_eq!(wrong("Cargo.lock", "source = \"registry+https://github.com/rust-lang/crates.io-index\""), None);
    }
}
