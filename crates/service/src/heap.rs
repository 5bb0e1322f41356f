//! Keeps a daemon as large as what it holds. The allocator gives back what is free at the end of a heap, and nothing between two things that
//! are in use: after a burst the pages between what stayed would be ours for as long as the process lives.

use std::time::Duration;

use tracing::{debug, warn};

use crate::context::Context;

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(30);
/// What is worth the trouble. A daemon that does nothing grows by nothing and is left in peace.
const WORTH: u64 = 512 << 10;

/// Gives back free memory now and then, for as long as the daemon runs.
pub(crate) fn keep_small(ctx: &Context) {
    let shutdown = ctx.shutdown().clone();
    ctx.spawn("heap", async move {
        let mut low = drover_memory::own_bytes().unwrap_or_default();
        while shutdown.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
            let Ok(now) = drover_memory::own_bytes() else { return };
            if now < low.saturating_add(WORTH) {
                low = low.min(now);
                continue;
            }
            // It waits for every thread that allocates, and takes as long as it takes to look through the heaps.
            if tokio::task::spawn_blocking(drover_memory::release_heap).await.is_err() {
                return warn!("free memory cannot be given back");
            }
            low = drover_memory::own_bytes().unwrap_or(now);
            debug!(before = now, after = low, "gave back free memory");
        }
    });
}
