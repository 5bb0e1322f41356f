//! Whether the agent program `codex` could be used by a node of this machine, asked the way a worker asks it.

use std::path::{Path, PathBuf};

use drover_config::WorkerConfig;
use drover_types::{ErrorCode, Failure};

/// The codex program that workers would run.
pub(crate) fn find(config: &WorkerConfig) -> Result<PathBuf, Failure> {
    drover_worker::codex::find_binary(config)
}

/// Whether that program runs and has what its model provider wants: a login, or a key.
pub(crate) async fn usable(config: &WorkerConfig, bin: &Path) -> Result<(), Failure> {
    let no_room = |error: std::io::Error| {
        Failure::new(ErrorCode::StoreUnavailable, format!("cannot make a temporary directory: {error}"))
            .hint("free space in the temporary directory, or set TMPDIR")
    };
    // Codex writes into its home as soon as it runs, so it gets one that is thrown away.
    let scratch = tempfile::tempdir().map_err(no_room)?;
    let settings = drover_worker::codex_settings(bin.to_owned(), config, scratch.path());
    std::fs::create_dir_all(&settings.cwd).map_err(no_room)?;
    drover_worker::codex::preflight(&settings).await.map_err(|mut failure| {
        if failure.hint.contains(&*scratch.path().to_string_lossy()) {
            failure.hint = format!("try it by hand: {} app-server; --agent echo needs no codex", bin.display());
        }
        failure
    })
}
