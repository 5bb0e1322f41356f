//! Finds the codex program to run.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use drover_config::WorkerConfig;
use drover_types::{ErrorCode, Failure};

/// The version that drover is tested with.
pub const TESTED_VERSION: &str = "0.169.0";

/// The native codex binary: the configured one, or `codex` on PATH.
///
/// The command that npm installs is a Node program around the native binary. Killing it with SIGKILL leaves the native
/// one running, so the native one is looked up and run directly.
pub fn find_binary(config: &WorkerConfig) -> Result<PathBuf, Failure> {
    let path = match &config.codex_bin {
        Some(path) if is_program(path) => path.clone(),
        Some(path) => return Err(missing(format!("{} is not a program that can be run", path.display()))),
        None => {
            let dirs = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&dirs)
                .map(|dir| dir.join("codex"))
                .find(|path| is_program(path))
                .ok_or_else(|| missing("no program named codex on PATH".to_owned()))?
        }
    };
    if !is_node_script(&path) {
        return Ok(path);
    }
    native_beside(&path).ok_or_else(|| {
        missing(format!("{} is npm's wrapper and the native binary beside it is missing", path.display()))
    })
}

fn missing(message: String) -> Failure {
    Failure::new(ErrorCode::CodexMissing, message).hint(format!(
        "install it with `npm install -g @openai/codex@{TESTED_VERSION}`, or set worker.codex_bin to the binary, \
         or launch with `--agent echo`, which needs none"
    ))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn is_node_script(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(128).read_to_end(&mut head));
    let first = head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    read.is_ok() && first.starts_with(b"#!") && first.windows(4).any(|word| word == b"node")
}

/// Node looks for the platform's package in every `node_modules` above the wrapper; so do we.
fn native_beside(wrapper: &Path) -> Option<PathBuf> {
    let (os, target_os) =
        if cfg!(target_os = "macos") { ("darwin", "apple-darwin") } else { ("linux", "unknown-linux-musl") };
    let (arch, target_arch) = if cfg!(target_arch = "aarch64") { ("arm64", "aarch64") } else { ("x64", "x86_64") };
    let binary = Path::new("vendor").join(format!("{target_arch}-{target_os}")).join("bin/codex");
    let package = format!("codex-{os}-{arch}");

    let real = std::fs::canonicalize(wrapper).ok()?;
    let in_modules = real.ancestors().map(|dir| dir.join("node_modules/@openai").join(&package).join(&binary));
    let own = real.ancestors().skip(1).take(2).map(|dir| dir.join(&binary));
    in_modules.chain(own).find(|path| is_program(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn found(path: &Path) -> Result<PathBuf, Failure> {
        find_binary(&WorkerConfig { codex_bin: Some(path.to_owned()), ..WorkerConfig::default() })
    }

    #[test]
    fn the_wrapper_is_never_run() {
        let dir = tempfile::tempdir().unwrap();
        let modules = std::fs::canonicalize(dir.path()).unwrap().join("node_modules");
        let wrapper = modules.join("@openai/codex/bin/codex.js");
        program(&wrapper, "#!/usr/bin/env node\n");
        let link = modules.join(".bin/codex");
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&wrapper, &link).unwrap();

        let failure = found(&link).unwrap_err();
        assert_eq!(failure.code, ErrorCode::CodexMissing);

        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        if (os, arch) == ("linux", "x86_64") {
            let native = modules.join("@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex");
            program(&native, "\x7fELF");
            assert_eq!(found(&link).unwrap(), native);
        }
        // Somebody's own wrapper is theirs to answer for.
        let own = modules.join("codex");
        program(&own, "#!/bin/sh\nexec codex\n");
        assert_eq!(found(&own).unwrap(), own);
    }

    #[test]
    fn a_missing_binary_names_the_way_out() {
        let failure = found(Path::new("/nowhere/codex")).unwrap_err();
        assert_eq!(failure.code, ErrorCode::CodexMissing);
        assert!(failure.message.contains("/nowhere/codex"), "{failure}");
        assert!(failure.hint.contains("--agent echo") && failure.hint.contains(TESTED_VERSION), "{}", failure.hint);
    }
}
