//! What tests are sure of: that something goes well, and that something comes true before anybody's patience ends.

use std::time::{Duration, Instant};

/// How long anything may take on a machine that is busy and stalls now and then. Whoever judges how fast something is measures that.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What went well; else the test ends with the whole chain of causes.
#[track_caller]
pub fn must<T>(result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Looks until there is something to see.
#[track_caller]
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Looks until it is so.
#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    wait_for(what, || done().then_some(()));
}
