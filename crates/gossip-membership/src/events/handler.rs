//! One configured action: its queue, and the task that works it off.

use std::collections::VecDeque;
use std::process::Stdio;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use drover_config::EventHandlerConfig;
use drover_service::Context;
use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::Event;
use crate::metrics::Metrics;

/// Why an action came to nothing.
#[derive(Debug, Error)]
enum ActionError {
    #[error("cannot start {program}")]
    Start {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("ended with {0}")]
    Status(std::process::ExitStatus),
    #[error("lost sight of the program")]
    Wait(#[source] std::io::Error),
    #[error("answered with {0}")]
    Answer(reqwest::StatusCode),
    #[error("cannot post the event")]
    Post(#[source] reqwest::Error),
    #[error("took longer than {0:?}")]
    Timeout(Duration),
}

#[derive(Debug, Clone)]
enum Action {
    Command(Vec<String>),
    Webhook { url: String, client: Arc<OnceLock<reqwest::Client>> },
}

/// A handler that was started.
#[derive(Debug)]
pub(super) struct Handler {
    on: Vec<String>,
    queue: Arc<Queue>,
    metrics: Metrics,
    name: Arc<str>,
}

#[derive(Debug)]
struct Queue {
    capacity: usize,
    waiting: Mutex<VecDeque<Arc<Event>>>,
    filled: Notify,
}

impl Handler {
    pub(super) fn start(config: &EventHandlerConfig, capacity: usize, ctx: &Context, metrics: &Metrics) -> Self {
        let action = match &config.webhook {
            Some(url) => Action::Webhook { url: url.clone(), client: Arc::default() },
            None => Action::Command(config.command.clone()),
        };
        // An address may carry a token behind its host: neither log nor metrics show more than the host.
        let name: Arc<str> = match &action {
            Action::Webhook { url, .. } => url.split('/').take(3).collect::<Vec<_>>().join("/").into(),
            Action::Command(command) => command.first().map_or("", String::as_str).into(),
        };
        let queue = Arc::new(Queue { capacity: capacity.max(1), waiting: Mutex::default(), filled: Notify::new() });
        let task = work(Arc::clone(&queue), action, config.timeout.get(), ctx.clone(), metrics.clone(), name.clone());
        ctx.spawn("event handler", task);
        Self { on: config.on.clone(), queue, metrics: metrics.clone(), name }
    }

    /// Puts an event into the queue when it is one of those wanted; never waits.
    pub(super) fn offer(&self, event: &Arc<Event>) {
        if !self.on.is_empty() && !self.on.iter().any(|wanted| wanted == event.kind.name()) {
            return;
        }
        let mut waiting = self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= self.queue.capacity {
            waiting.pop_front();
            self.metrics.handled("dropped");
            debug!(handler = %self.name, "queue is full: the oldest event is dropped");
        }
        waiting.push_back(Arc::clone(event));
        drop(waiting);
        self.queue.filled.notify_one();
    }
}

async fn work(queue: Arc<Queue>, action: Action, timeout: Duration, ctx: Context, metrics: Metrics, name: Arc<str>) {
    loop {
        let next = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(event) = next else {
            tokio::select! {
                () = queue.filled.notified() => continue,
                () = ctx.shutdown().cancelled() => return,
            }
        };
        let result = tokio::select! {
            result = action.run(&event, timeout) => result,
            () = ctx.shutdown().cancelled() => return,
        };
        match result {
            Ok(()) => metrics.handled("done"),
            Err(error) => {
                metrics.handled(if matches!(error, ActionError::Timeout(_)) { "timeout" } else { "failed" });
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                warn!(handler = %name, event = event.kind.name(), node_id = event.kind.node_id(), cause, "event handler {error}");
            }
        }
    }
}

impl Action {
    async fn run(&self, event: &Event, timeout: Duration) -> Result<(), ActionError> {
        match self {
            Self::Command(command) => run_command(command, event, timeout).await,
            Self::Webhook { url, client } => {
                let client = if let Some(client) = client.get() {
                    client
                } else {
                    let fresh = drover_service::web::client().build().map_err(ActionError::Post)?;
                    client.get_or_init(|| fresh)
                };
                let request = client.post(url).header("content-type", "application/json").timeout(timeout);
                let answer = request.body(event.to_json()).send().await.map_err(|error| {
                    if error.is_timeout() {
                        ActionError::Timeout(timeout)
                    } else {
                        ActionError::Post(error.without_url())
                    }
                })?;
                if answer.status().is_success() { Ok(()) } else { Err(ActionError::Answer(answer.status())) }
            }
        }
    }
}

/// Ends a program with all that it started, whatever way we leave.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

async fn run_command(command: &[String], event: &Event, timeout: Duration) -> Result<(), ActionError> {
    let (program, args) = command.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
    let mut child = Command::new(program)
        .args(args)
        .env("DROVER_EVENT", event.kind.name())
        .env("DROVER_EVENT_NODE_ID", event.kind.node_id())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        // A group of its own, so that a timeout ends its children too.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ActionError::Start { program: program.to_owned(), source })?;
    let mut group = Group(child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())));
    let (stdin, json) = (child.stdin.take(), event.to_json());
    let whole = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read its input may end all the same.
            let _ = stdin.write_all(json.as_bytes()).await;
        }
        child.wait().await
    };
    let status = tokio::time::timeout(timeout, whole).await.map_err(|_| ActionError::Timeout(timeout))?;
    // It has ended and was waited for: its number may be somebody else's from now on.
    group.0 = None;
    let status = status.map_err(ActionError::Wait)?;
    if status.success() { Ok(()) } else { Err(ActionError::Status(status)) }
}
