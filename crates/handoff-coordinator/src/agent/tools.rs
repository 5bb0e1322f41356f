//! Tools that agents call under keys: called again under the same key, they give the answer of the first time.

use std::path::PathBuf;
use std::time::Duration;

use drover_types::{Epoch, SessionId};

use crate::core::Call;
use crate::files;
use crate::ownership::Ownership;

/// Longest time that a call may be asked to take.
const MOST: Duration = Duration::from_mins(1);
/// Most bytes of a result.
const MOST_BYTES: u64 = 64 << 10;

/// The built-in tool: keeps a word in the session's directory on the shared file system, once for each key.
///
/// ```text
/// <shared>/<session>/tools/<turn>-<n>     the word, made by link(2): who comes second reads what the first one wrote
/// ```
#[derive(Debug, Clone)]
pub(crate) struct SharedTool {
    root: PathBuf,
}

impl SharedTool {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Carries a call out: `what` is a pause in milliseconds and a word. Nothing when the file system fails or a later owner's
    /// epoch has begun: then the call is made again by whoever owns the session.
    pub(crate) async fn call(
        &self,
        session: SessionId,
        epoch: Epoch,
        call: Call,
        what: String,
        ownership: impl Ownership + Send + 'static,
    ) -> Option<String> {
        let (pause, word) = what.split_once(' ').unwrap_or(("0", &what));
        let (pause, word) = (Duration::from_millis(pause.parse().unwrap_or(0)).min(MOST), word.to_owned());
        tokio::time::sleep(pause).await;
        let dir = self.root.join(session.as_str()).join("tools");
        let kept = tokio::task::spawn_blocking(move || {
            let newest = ownership.newest(&session).ok().flatten()?;
            if newest.epoch > epoch {
                return None;
            }
            let name = format!("{}-{}", call.turn.0, call.n);
            files::make_dir(&dir).ok()?;
            files::publish(&dir, &name, format!("{word}\n").as_bytes()).ok()?;
            // Whose word it is, the file says.
            let word = files::read_small(&dir.join(&name), MOST_BYTES).ok().flatten()?;
            Some(format!("kept {}", String::from_utf8_lossy(&word).trim()))
        });
        kept.await.ok().flatten()
    }
}
