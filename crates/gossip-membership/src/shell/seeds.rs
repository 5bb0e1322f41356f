//! Finds the addresses of the seeds. A name that does not resolve yet is tried again: at a launch it often appears late.

use std::time::Duration;

use drover_service::{Context, now_us};
use tracing::debug;

use super::handle::Handle;

const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Gives each seed to the node as soon as its address is known.
pub(super) async fn resolve(handle: Handle, seeds: Vec<String>, ctx: Context) {
    let (mut left, mut pause) = (seeds, FIRST_PAUSE);
    loop {
        let mut unknown = Vec::new();
        for seed in left {
            match tokio::net::lookup_host(&seed).await.map(Iterator::collect::<Vec<_>>) {
                Ok(addrs) if !addrs.is_empty() => {
                    debug!(seed, ?addrs, "seed found");
                    if handle.with(move |node| node.join(addrs)).await.is_err() {
                        return;
                    }
                }
                found => {
                    let why = found.err().map_or_else(|| "it has none".to_owned(), |error| error.to_string());
                    let message = format!("seed {seed} has no address yet: {why}");
                    handle.shared.notes.notice(now_us(), "seed_unreachable", message);
                    unknown.push(seed);
                }
            }
        }
        if unknown.is_empty() {
            return;
        }
        left = unknown;
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            () = ctx.shutdown().cancelled() => return,
        }
    }
}
