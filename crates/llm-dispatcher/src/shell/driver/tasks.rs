//! Tasks: how they come to the core, and how whoever waits hears of their end.

use std::sync::Arc;
use std::time::Duration;

use drover_service::now_us;
use tokio::sync::mpsc;

use super::{Driver, Open};
use crate::core::{ClientId, Input, Money, Refusal, Status, TaskId, TaskSpec, Verdict};
use crate::shell::client::{Reply, Tagged};
use crate::shell::{Done, Job, Lane, Lanes, Work, words};

impl Driver {
    pub(super) fn submit(&mut self, id: TaskId, client: ClientId, weight: u32, job: Job, reply: Reply) {
        self.learn_lanes();
        let mut spec = TaskSpec::new(id, Vec::new());
        spec.weight = weight;
        spec.priority = job.priority;
        spec.kind = job.kind;
        spec.deadline = job.within.map(|within| self.now() + within);
        // Two calls would mix their pieces.
        spec.hedge = job.hedge && job.stream.is_none();
        spec.streaming = job.stream.is_some();
        match &job.work {
            Work::Call(request) => {
                spec.input_upper = request.input_upper_bound();
                // Four bytes for a token is a fair guess, and the bound is about the bytes.
                spec.input_likely = spec.input_upper / 4;
                spec.max_tokens = u64::from(request.max_tokens);
                let priced = |lane: &&Arc<Lane>| self.any_price || lane.is_priced_for(spec.input_upper);
                let lanes = job.chain.lanes();
                spec.lanes = lanes.iter().filter(priced).map(|lane| lane.id).collect();
                if spec.lanes.is_empty() && self.cap.is_none() {
                    // Without a cap nothing is counted against it.
                    spec.lanes = lanes.iter().map(|lane| lane.id).collect();
                }
                if spec.lanes.is_empty() && !lanes.is_empty() {
                    return self.refuse(Status::Refused(Refusal::UnknownPrice), None, reply);
                }
            }
            Work::Errand(errand) => match (errand.worst_case(), self.lanes.fees()) {
                (Some(worst), Some(fees)) if !worst.is_zero() => {
                    // The lane of fees counts pico-dollars where others count tokens.
                    spec.input_upper = u64::try_from(worst.pico()).unwrap_or(u64::MAX);
                    spec.lanes.push(fees);
                }
                (None, _) if self.cap.is_some() && !self.any_price => {
                    return self.refuse(Status::Refused(Refusal::UnknownPrice), Some(words::NO_FEE), reply);
                }
                _ => spec.lanes.push(Lanes::ERRANDS),
            },
        }
        let open = Open {
            client,
            work: job.work,
            stream: job.stream,
            reply,
            answers: Vec::new(),
            failed: None,
            started_us: None,
            beside: 0,
        };
        self.tasks.insert(id, Box::new(open));
        self.metrics.open_tasks.inc();
        self.tell(Input::Submit { client, task: spec });
    }

    /// Refuses what the core need not see.
    pub(super) fn refuse(&self, status: Status, why: Option<&str>, reply: Reply) {
        let now = now_us();
        self.metrics.task(status_name(status));
        let done = Done {
            status,
            answer: None,
            error: why.map_or_else(|| words::error_of(status, None, None), str::to_owned),
            attempts: 0,
            cost: Money::ZERO,
            lane: None,
            started_us: now,
            ended_us: now,
            busy: Duration::ZERO,
            beside: 0,
            cached: false,
        };
        self.answer(reply, done);
    }

    /// Tells the core of lanes that were added meanwhile.
    pub(super) fn learn_lanes(&mut self) {
        if self.lanes.count() == self.known_lanes {
            return;
        }
        let settings = self.lanes.settings();
        for lane in settings.into_iter().skip(self.known_lanes) {
            self.engine.add_lane(lane);
            self.known_lanes += 1;
        }
    }

    pub(super) fn done(&mut self, task: TaskId, verdict: Verdict) {
        let Some(mut open) = self.tasks.remove(&task) else { return };
        self.metrics.open_tasks.dec();
        self.metrics.task(status_name(verdict.status));
        let won = verdict.winner.and_then(|winner| open.answers.iter().position(|(attempt, ..)| *attempt == winner));
        let (answer, busy) = match won.map(|index| open.answers.swap_remove(index)) {
            Some((_, answer, took)) => (Some(answer), took),
            None => (None, open.failed.as_ref().map_or(Duration::ZERO, |(_, took)| *took)),
        };
        let last = open.failed.as_ref().map(|(error, _)| error.message.as_str());
        let ended_us = now_us();
        let done = Done {
            status: verdict.status,
            answer,
            error: words::error_of(verdict.status, last, self.ledger_fails.as_deref()),
            attempts: verdict.attempts,
            cost: verdict.cost,
            lane: verdict.lane.and_then(|lane| self.lanes.get(lane)).filter(|lane| lane.provider.is_some()),
            started_us: open.started_us.unwrap_or(ended_us),
            ended_us,
            busy,
            beside: open.beside,
            cached: false,
        };
        self.answer(open.reply, done);
    }

    /// Tells whoever waits, if anybody still does.
    pub(super) fn answer(&self, reply: Reply, done: Done) {
        match reply {
            Reply::One(to) => {
                let _ = to.send(done);
            }
            Reply::Tagged { tag, to } => match to.try_send(Tagged { tag, done }) {
                Err(mpsc::error::TrySendError::Full(tagged)) => {
                    // Its owner has handed in more than it has room for; it must not hold up the others.
                    self.ctx.spawn("late answer", async move {
                        let _ = to.send(tagged).await;
                    });
                }
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            },
        }
    }
}

/// The word for a status, in results and metrics.
pub(crate) fn status_name(status: Status) -> &'static str {
    match status {
        Status::Answered => "succeeded",
        Status::Blocked => "blocked",
        Status::Failed(_) => "failed",
        Status::Refused(_) => "refused",
        Status::Cancelled => "cancelled",
    }
}
