//! Calls: how they begin, and what is made of their end.

use std::panic::AssertUnwindSafe;
use std::task::{Poll, Waker};

use drover_service::now_us;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Call, Driver, ENDED_TOGETHER};
use crate::call::{CallError, FailureKind, Finish};
use crate::core::{AttemptId, Charge, Input, LaneId, Outcome, StartKind, TaskId};
use crate::shell::attempt;
use crate::shell::client::End;

impl Driver {
    pub(super) fn call(&mut self, attempt: AttemptId, task: TaskId, lane: LaneId, kind: StartKind) {
        let (Some(open), Some(to)) = (self.tasks.get_mut(&task), self.lanes.get(lane)) else {
            // A task that nobody knows has been cancelled, and its call is over before it began.
            self.end_at_once(attempt);
            return;
        };
        let beside = self.under_way.entry(open.client).or_default();
        *beside += 1;
        open.beside = open.beside.max(*beside);
        open.started_us.get_or_insert_with(now_us);
        self.calls += 1;
        self.metrics.under_way.inc();
        self.metrics.call(match kind {
            StartKind::First => "first",
            StartKind::Retry => "retry",
            StartKind::Hedge => "hedge",
        });
        let (keep, kept) = oneshot::channel();
        let call = Call { task, client: open.client, began: Instant::now(), keep: Some(keep) };
        let work = open.work.clone();
        let stream = open.stream.clone();
        self.attempts.insert(attempt, call);
        let ctx = self.ctx.clone();
        let making = AssertUnwindSafe(attempt::make(attempt, work, to, stream, kept, self.queues.tell.clone()));
        let making = making.catch_unwind().map(move |made| {
            made.unwrap_or_else(|_| {
                ctx.fail(anyhow::anyhow!("a call panicked"));
                (attempt, End::Aborted)
            })
        });
        let mut making: BoxFuture<'static, (AttemptId, End)> = Box::pin(making);
        // It begins now, and not behind all those that have something to read. Who is to be woken for it is told when it is looked
        // at among the others, which is before this task waits for anything.
        let begun = making.as_mut().poll(&mut std::task::Context::from_waker(Waker::noop()));
        self.running.push(match begun {
            Poll::Pending => making,
            Poll::Ready(end) => Box::pin(std::future::ready(end)),
        });
    }

    /// Tells the core that a call ended before it began.
    pub(super) fn end_at_once(&self, attempt: AttemptId) {
        let error = CallError { maybe_billed: false, ..CallError::new(FailureKind::Unsupported, "nobody wants it") };
        self.running.push(Box::pin(std::future::ready((attempt, End::Called(Box::new(Err(error)))))));
    }

    pub(super) fn all_ended(&mut self, ended: &mut Vec<(AttemptId, End)>) {
        for (attempt, end) in ended.drain(..) {
            self.finished(attempt, end);
        }
    }

    pub(super) fn finished(&mut self, attempt: AttemptId, end: End) {
        let Some(call) = self.attempts.remove(&attempt) else { return };
        let took = call.began.elapsed();
        self.metrics.under_way.dec();
        if let Some(count) = self.under_way.get_mut(&call.client) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&call.client);
            }
        }
        let mut usage = None;
        let outcome = match end {
            End::Aborted => Outcome::Aborted { charge: Charge::Unknown },
            End::Called(result) => match *result {
                Ok(answer) => {
                    usage = answer.usage;
                    let hints = answer.hints;
                    let blocked = matches!(answer.finish, Finish::Blocked(_));
                    if let Some(task) = self.tasks.get_mut(&call.task) {
                        task.answers.push((attempt, answer, took));
                    }
                    if blocked { Outcome::Blocked { usage } } else { Outcome::Answered { usage, hints } }
                }
                Err(error) => {
                    usage = error.usage;
                    let charge = match error.usage {
                        Some(usage) => Charge::Reported(usage),
                        None if error.maybe_billed => Charge::Unknown,
                        None => Charge::Nothing,
                    };
                    let outcome = Outcome::Failed { kind: error.kind, charge, hints: error.hints };
                    if let Some(task) = self.tasks.get_mut(&call.task) {
                        task.failed = Some((error, took));
                    }
                    outcome
                }
            },
        };
        self.counted.extend(usage.map(|usage| (attempt, usage)));
        self.tell(Input::Finished { attempt, outcome });
    }
}

/// Calls that have ended by now, as many as are looked at together.
pub(super) fn poll_ended(
    running: &mut FuturesUnordered<BoxFuture<'static, (AttemptId, End)>>,
    cx: &mut std::task::Context<'_>,
    ended: &mut Vec<(AttemptId, End)>,
) -> Poll<()> {
    while ended.len() < ENDED_TOGETHER
        && let Poll::Ready(Some(end)) = running.poll_next_unpin(cx)
    {
        ended.push(end);
    }
    if ended.is_empty() { Poll::Pending } else { Poll::Ready(()) }
}
