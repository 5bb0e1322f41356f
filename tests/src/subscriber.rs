//! A client that follows the event log through restarts of the router, resuming by sequence number.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_proto::router::{Event, WatchEventsRequest};
use drover_testkit::cluster::RouterClient;
use serde_json::Value;
use tokio::sync::Notify;

/// What has become of one injection, as the events tell.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// How often each event name came.
    pub counts: HashMap<String, u32>,
    /// Sequence number of its `inject_ack`.
    pub acked_at: u64,
    /// Sequence number of its first other event.
    pub first_other: u64,
    /// `status` of its `turn_complete`, or `failed` for an `inject_failed`.
    pub outcome: Option<String>,
    /// Why it failed.
    pub error: String,
}

/// Everything one subscriber has seen.
#[derive(Default)]
pub struct View {
    /// Every sequence number, in order of arrival.
    pub seqs: Vec<u64>,
    /// By injection.
    pub injections: HashMap<String, Seen>,
    /// How often the stream was opened again.
    pub resumed: u32,
}

/// Follows until it is dropped.
pub struct Subscriber {
    view: Arc<Mutex<View>>,
    changed: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

impl Subscriber {
    /// Follows every event from the first on.
    #[expect(clippy::disallowed_methods, reason = "a test program has no tracked tasks; the handle is aborted on drop")]
    pub fn start(router: RouterClient) -> Self {
        let view = Arc::new(Mutex::new(View::default()));
        let changed = Arc::new(Notify::new());
        let task = tokio::spawn(follow(router, Arc::clone(&view), Arc::clone(&changed)));
        Self { view, changed, task }
    }

    /// What it has seen so far.
    pub fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` says so of the view; false when the time is over first.
    pub async fn wait(&self, limit: Duration, mut done: impl FnMut(&View) -> bool) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let changed = self.changed.notified();
            if done(&self.view()) {
                return true;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return done(&self.view());
            }
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(mut router: RouterClient, view: Arc<Mutex<View>>, changed: Arc<Notify>) {
    loop {
        let after_seq = view.lock().unwrap_or_else(PoisonError::into_inner).seqs.last().copied().unwrap_or(0);
        let request = WatchEventsRequest { after_seq, follow: true, ..Default::default() };
        if let Ok(answer) = router.watch_events(request).await {
            let mut stream = answer.into_inner();
            while let Ok(Some(batch)) = stream.message().await {
                let mut view = view.lock().unwrap_or_else(PoisonError::into_inner);
                for event in &batch.events {
                    note(&mut view, event);
                }
                drop(view);
                changed.notify_waiters();
            }
        }
        view.lock().unwrap_or_else(PoisonError::into_inner).resumed += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Enters one event.
pub fn note(view: &mut View, event: &Event) {
    view.seqs.push(event.seq);
    if event.injection_id.is_empty() {
        return;
    }
    let seen = view.injections.entry(event.injection_id.clone()).or_default();
    *seen.counts.entry(event.event.clone()).or_default() += 1;
    if event.event == "inject_ack" {
        seen.acked_at = event.seq;
        return;
    }
    if seen.first_other == 0 {
        seen.first_other = event.seq;
    }
    let field = |name: &str| {
        let data: Value = serde_json::from_slice(&event.data).unwrap_or_default();
        data.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    match event.event.as_str() {
        "turn_complete" => {
            seen.outcome.get_or_insert_with(|| field("status"));
            seen.error = field("error");
        }
        "inject_failed" => {
            seen.outcome.get_or_insert_with(|| "failed".to_owned());
            seen.error = field("error");
        }
        _ => {}
    }
}
