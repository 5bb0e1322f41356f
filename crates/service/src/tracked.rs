//! Tasks with names, so that a shutdown that hangs can say on what.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt as _;
use tokio_util::task::TaskTracker;

#[derive(Clone, Default)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    names: Arc<Mutex<Names>>,
}

#[derive(Default)]
struct Names {
    next: u64,
    running: BTreeMap<u64, &'static str>,
}

impl Tasks {
    /// Runs a task; `panicked` is called with its name when it panics.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that spawns")]
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        panicked: impl FnOnce(&'static str) + Send + 'static,
    ) {
        let id = {
            let mut names = self.names();
            names.next += 1;
            let id = names.next;
            names.running.insert(id, name);
            id
        };
        let names = Arc::clone(&self.names);
        let tracked = self.tracker.track_future(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                panicked(name);
            }
            names.lock().unwrap_or_else(PoisonError::into_inner).running.remove(&id);
        });
        tokio::spawn(tracked);
    }

    /// Returns when every task has ended.
    pub(crate) async fn wait(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// What still runs, each name once with how often.
    pub(crate) fn running(&self) -> String {
        let mut counts = BTreeMap::<&'static str, usize>::new();
        for name in self.names().running.values() {
            *counts.entry(name).or_default() += 1;
        }
        counts.iter().map(|(name, count)| format!("{name} x{count}")).collect::<Vec<_>>().join(", ")
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
