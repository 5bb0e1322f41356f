//! Where the tests find the real Codex CLI.
//!
//! The version is pinned by `tests/codex/package-lock.json`. [`INSTALL`] puts it below `target/codex`, which git does not see.

use std::path::{Path, PathBuf};

/// One line of shell, run in the root of the repository, that installs the pinned version.
pub const INSTALL: &str = "mkdir -p target/codex && cp tests/codex/package*.json target/codex/ && \
                           npm ci --prefix target/codex --no-audit --no-fund";

/// The native codex binary for tests.
///
/// `$CODEX_BIN` wins, then what [`INSTALL`] has put below `target/codex`. Without either the caller skips its test, and
/// this notes it; with `CI=true` nothing may be skipped, so the test fails instead.
pub fn codex_bin() -> Option<PathBuf> {
    let found = match std::env::var_os("CODEX_BIN") {
        Some(path) => Some(PathBuf::from(path)),
        None => installed_below(&repository_root().join("target/codex")),
    };
    if let Some(path) = found.filter(|path| path.is_file()) {
        return Some(path);
    }
    crate::skip(&crate::this_test(), &format!("no codex binary: set CODEX_BIN or run `{INSTALL}`"));
    None
}

/// The root of the repository that this crate was built in.
pub fn repository_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

/// The native binary of an npm installation, whatever the platform package is called.
pub fn installed_below(prefix: &Path) -> Option<PathBuf> {
    let scope = prefix.join("node_modules/@openai");
    for package in std::fs::read_dir(scope).ok()?.flatten() {
        let Ok(triples) = std::fs::read_dir(package.path().join("vendor")) else { continue };
        for triple in triples.flatten() {
            let binary = triple.path().join("bin/codex");
            if binary.is_file() {
                return Some(binary);
            }
        }
    }
    None
}
