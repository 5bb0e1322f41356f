//! How tries and tasks end.

use std::time::Duration;

use rand::Rng;

use super::Engine;
use super::parts::{Attempt, Blame, Pending, Timer};
use crate::call::{FailureKind, LimitHints};
use crate::core::api::{Charge, Effect, Outcome, Reason, Status, Verdict, Warning};
use crate::core::money::Money;
use crate::core::retry::backoff;
use crate::core::task::{AttemptId, LaneId, TaskId};

/// A person hears at most so often that a lane refuses calls.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// So many failures of a task on one lane are enough to try the next one.
const FAILURES_BEFORE_FALLBACK: u32 = 2;

/// A lane that answered something so recently is not in trouble ...
const HEALTHY: Duration = Duration::from_secs(5);

/// ... and a task that failed on it need not wait longer than this.
const LONGEST_WHILE_HEALTHY: Duration = Duration::from_millis(500);

impl Engine {
    pub(super) fn finished(&mut self, id: AttemptId, outcome: &Outcome, out: &mut Vec<Effect>) {
        // The answer to a call that nobody knows changes nothing.
        let Some(attempt) = self.attempts.get(&id) else { return };
        let (name, aborting) = (attempt.task, attempt.aborting);
        let took = self.now.saturating_sub(attempt.started);
        self.feed_lane(id, outcome, out);
        let attempt = match outcome {
            // What a failure means for its task is decided while it is still among its tries.
            Outcome::Failed { kind, hints, .. } if !aborting => {
                self.settle(id, outcome, out);
                self.failed(id, *kind, hints, out);
                self.release(id)
            }
            Outcome::Aborted { .. } if !aborting => {
                self.settle(id, outcome, out);
                self.failed(id, FailureKind::Broken, &LimitHints::default(), out);
                self.release(id)
            }
            _ => {
                self.settle(id, outcome, out);
                self.release(id)
            }
        };
        let Some(attempt) = attempt else { return };
        if aborting {
            return;
        }
        let status = match outcome {
            Outcome::Answered { .. } => Status::Answered,
            Outcome::Blocked { .. } => Status::Blocked,
            Outcome::Failed { .. } | Outcome::Aborted { .. } => return,
        };
        let lane = &mut self.lanes[usize::from(attempt.lane.0)];
        lane.counts.answered += 1;
        lane.answered_at = Some(self.now);
        if status == Status::Answered {
            lane.running(attempt.kind).tail.answered(&self.settings.hedge, took);
        }
        if lane.breaker.succeeded(id) {
            out.push(Effect::Warn(Warning::BreakerClosed { lane: attempt.lane }));
        }
        if let Some(task) = self.tasks.get_mut(&name) {
            task.lane = Some(attempt.lane);
        }
        self.complete(name, status, Some(id), out);
    }

    /// Tells limits and width what the provider's answer says about them.
    fn feed_lane(&mut self, id: AttemptId, outcome: &Outcome, out: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get(&id) else { return };
        let lane_id = attempt.lane;
        let started = attempt.started;
        let reserved = attempt.tokens;
        let newest = AttemptId(self.next_attempt - 1);
        let lane = &mut self.lanes[usize::from(lane_id.0)];
        let with = lane.in_flight;
        let used = |usage: &Option<crate::call::Usage>| {
            usage.map_or(reserved, |usage| usage.input_tokens.saturating_add(usage.output_tokens))
        };
        match outcome {
            Outcome::Answered { usage, hints } => {
                lane.limiter.settle(reserved, used(usage));
                lane.limiter.hint(self.now, started, hints);
                lane.width.answered(id, with);
                lane.refusals = 0;
            }
            Outcome::Blocked { usage } => {
                lane.limiter.settle(reserved, used(usage));
                lane.width.answered(id, with);
                lane.refusals = 0;
            }
            Outcome::Failed { kind: FailureKind::RateLimited, hints, .. } => {
                lane.limiter.settle(reserved, 0);
                lane.counts.refused += 1;
                lane.refusals += 1;
                let delay = hints.delay();
                let others = with.saturating_sub(1);
                let rate = lane.limiter.refused(self.now, started, hints);
                let narrowed = !lane.limiter.is_known()
                    && lane.width.refused(self.now, id, others, newest, delay.unwrap_or_default());
                if others == 0 && delay.is_none() {
                    // Nothing is under way whose end would show that there is room again.
                    let luck = self.rng.random();
                    lane.limiter.pause(self.now + backoff(&self.settings.retry, lane.refusals, luck));
                }
                let due = lane.warned_at.is_none_or(|at| self.now >= at + WARN_EVERY);
                if due && (narrowed || rate.is_some()) {
                    lane.warned_at = Some(self.now);
                    let width = narrowed.then(|| lane.width.current());
                    out.push(Effect::Warn(Warning::RateLimited { lane: lane_id, width, per_minute: rate }));
                }
            }
            Outcome::Failed { kind, hints, charge } => {
                lane.counts.failed += 1;
                if *charge == Charge::Nothing {
                    lane.limiter.settle(reserved, 0);
                }
                lane.limiter.hint(self.now, started, hints);
                if matches!(kind, FailureKind::Connect | FailureKind::Broken | FailureKind::Timeout) {
                    lane.width.ended(id);
                } else {
                    lane.width.answered(id, with);
                }
            }
            Outcome::Aborted { .. } => lane.width.ended(id),
        }
    }

    /// Writes down what a try cost.
    fn settle(&mut self, id: AttemptId, outcome: &Outcome, out: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get(&id) else { return };
        let price = self.lanes[usize::from(attempt.lane.0)].settings.price.unwrap_or_default();
        let (amount, estimated) = match outcome {
            Outcome::Answered { usage: Some(usage), .. }
            | Outcome::Blocked { usage: Some(usage) }
            | Outcome::Failed { charge: Charge::Reported(usage), .. }
            | Outcome::Aborted { charge: Charge::Reported(usage) } => (price.of(usage), false),
            Outcome::Failed { charge: Charge::Nothing, .. } | Outcome::Aborted { charge: Charge::Nothing } => {
                (Money::ZERO, false)
            }
            _ => (attempt.reserved, true),
        };
        let (day, task, lane, reserved) = (attempt.day, attempt.task, attempt.lane, attempt.reserved);
        if let Some(spent) = self.purse.settle(day, reserved, amount, &mut self.wishes) {
            out.push(Effect::Warn(Warning::SpendReached { day, spent }));
        }
        if let Some(task) = self.tasks.get_mut(&task) {
            task.cost += amount;
        }
        out.push(Effect::Charged { attempt: id, task, lane, day, amount, estimated });
    }

    /// Gives back the permits of a try whose end was told.
    fn release(&mut self, id: AttemptId) -> Option<Attempt> {
        let attempt = self.attempts.remove(&id)?;
        let lane = &mut self.lanes[usize::from(attempt.lane.0)];
        lane.in_flight -= 1;
        lane.forget(id, &attempt);
        self.api_in_flight -= u32::from(lane.settings.api);
        self.workers.release(attempt.worker, attempt.kind);
        if let Some(task) = self.tasks.get_mut(&attempt.task) {
            task.live.retain(|&live| live != id);
        }
        Some(attempt)
    }

    /// Breaks a try off. Its permits and its money are held until its end is told.
    pub(super) fn abort(&mut self, id: AttemptId, out: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        if std::mem::replace(&mut attempt.aborting, true) {
            return;
        }
        let lane = &mut self.lanes[usize::from(attempt.lane.0)];
        lane.forget(id, attempt);
        if attempt.slow {
            lane.running(attempt.kind).tail.given_up();
        }
        lane.breaker.ended(self.now, id);
        if let Some(task) = self.tasks.get_mut(&attempt.task) {
            task.live.retain(|&live| live != id);
        }
        out.push(Effect::Abort { attempt: id });
    }

    /// A try failed: what that means for its lane and its task.
    pub(super) fn failed(&mut self, id: AttemptId, kind: FailureKind, hints: &LimitHints, out: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get(&id) else { return };
        let (name, lane) = (attempt.task, attempt.lane);
        let blame = Blame::of(kind);
        self.blame_lane(lane, id, kind, hints, out);
        let Some(task) = self.tasks.get_mut(&name) else { return };
        task.live.retain(|&live| live != id);
        if task.live.is_empty() && task.pending == Pending::Hedge {
            // There is nothing left that a hedge would stand beside.
            self.leave_queue(name);
        }
        let Some(task) = self.tasks.get_mut(&name) else { return };
        let give_up = Status::Failed(Reason::Call(kind));
        if task.committed == Some(id) || blame == Blame::Task {
            // Words have gone out that another try would contradict, or every other try would fail like this one.
            self.complete(name, give_up, None, out);
            return;
        }
        let others = !task.live.is_empty() || task.pending != Pending::Nothing;
        match blame {
            Blame::Number => {
                task.rejections += 1;
                if task.rejections > self.settings.retry.max_rejections {
                    if !others {
                        self.complete(name, give_up, None, out);
                    }
                } else {
                    self.queue_again(name);
                }
            }
            Blame::Lane | Blame::Fit => {
                if self.advance(name, lane) {
                    self.queue_again(name);
                } else if !others {
                    self.complete(name, give_up, None, out);
                }
            }
            Blame::Trouble | Blame::Answer | Blame::Task => {
                task.failures += 1;
                task.lane_failures += 1;
                task.bad_answers += u32::from(blame == Blame::Answer);
                let retry = &self.settings.retry;
                if task.failures >= retry.max_attempts || task.bad_answers >= retry.max_bad_answers {
                    if !others {
                        self.complete(name, give_up, None, out);
                    }
                    return;
                }
                let enough = task.lane_failures >= FAILURES_BEFORE_FALLBACK;
                if enough && self.advance(name, lane) {
                    self.queue_again(name);
                } else {
                    self.back_off(name, lane, give_up, hints, out);
                }
            }
        }
    }

    /// Waits before the same is tried again.
    fn back_off(&mut self, name: TaskId, lane: LaneId, give_up: Status, hints: &LimitHints, out: &mut Vec<Effect>) {
        let luck = self.rng.random();
        let Some(task) = self.tasks.get_mut(&name) else { return };
        if task.pending != Pending::Nothing {
            return;
        }
        let mut wait = backoff(&self.settings.retry, task.lane_failures, luck);
        if self.lanes[usize::from(lane.0)].answered_at.is_some_and(|at| self.now < at + HEALTHY) {
            // Long waits are there to spare a lane that is in trouble.
            wait = wait.min(LONGEST_WHILE_HEALTHY);
        }
        if let Some(asked) = hints.delay() {
            wait = wait.max(asked);
            if asked > self.settings.retry.patience {
                self.lanes[usize::from(lane.0)].limiter.pause(self.now + asked);
            }
        }
        let due = self.now + wait;
        let too_late =
            task.deadline.is_some_and(|(deadline, _)| due >= deadline) || wait > self.settings.retry.patience;
        if too_late {
            let others = !task.live.is_empty();
            if self.advance(name, lane) {
                self.queue_again(name);
            } else if !others {
                self.complete(name, give_up, None, out);
            }
            return;
        }
        let key = self.arm(due, Timer::Retry(name));
        if let Some(task) = self.tasks.get_mut(&name) {
            task.pending = Pending::Backoff(key);
        }
    }

    /// Goes on with the rest of the chain. Says whether there is one.
    fn advance(&mut self, name: TaskId, lane: LaneId) -> bool {
        let Some(task) = self.tasks.get_mut(&name) else { return false };
        if task.pending != Pending::Nothing {
            return true;
        }
        let Some(rest) = self.routes.after(task.route, lane) else { return false };
        task.route = rest;
        task.lane_failures = 0;
        true
    }

    fn blame_lane(
        &mut self,
        id: LaneId,
        attempt: AttemptId,
        kind: FailureKind,
        hints: &LimitHints,
        out: &mut Vec<Effect>,
    ) {
        let luck = self.rng.random();
        let started = self.attempts.get(&attempt).map(|attempt| attempt.started);
        let lane = &mut self.lanes[usize::from(id.0)];
        // A call that hung while others were answered says nothing about the lane as a whole. At the end of a batch
        // such calls are all that is left.
        let alone = kind == FailureKind::Timeout && started < lane.answered_at;
        let opened = match Blame::of(kind) {
            Blame::Number => {
                lane.breaker.ended(self.now, attempt);
                None
            }
            Blame::Trouble if alone => {
                lane.breaker.ended(self.now, attempt);
                None
            }
            Blame::Trouble => lane.breaker.failed(self.now, attempt, lane.in_flight, luck),
            Blame::Answer | Blame::Fit | Blame::Task => {
                if lane.breaker.succeeded(attempt) {
                    out.push(Effect::Warn(Warning::BreakerClosed { lane: id }));
                }
                None
            }
            Blame::Lane => {
                let news = lane.breaker.hard().is_none();
                let until = lane.breaker.trip(self.now, hints.delay(), kind);
                news.then_some(until)
            }
        };
        if let Some(until) = opened {
            out.push(Effect::Warn(Warning::BreakerOpen { lane: id, until }));
        }
    }

    /// Ends a task: its tries are broken off and the verdict is given. Nothing happens when it is over already.
    pub(super) fn complete(&mut self, name: TaskId, status: Status, winner: Option<AttemptId>, out: &mut Vec<Effect>) {
        if !self.tasks.contains_key(&name) {
            return;
        }
        self.leave_queue(name);
        let Some(task) = self.tasks.get_mut(&name) else { return };
        let live = std::mem::take(&mut task.live);
        let mut cost = task.cost;
        for attempt in live {
            if Some(attempt) != winner {
                cost += self.attempts.get(&attempt).map_or(Money::ZERO, |attempt| attempt.reserved);
                self.abort(attempt, out);
            }
        }
        let Some(task) = self.tasks.remove(&name) else { return };
        if let Some(key) = task.deadline {
            self.timers.remove(&key);
        }
        if let Some(client) = self.clients.get_mut(&task.client) {
            client.tasks.remove(&name);
            if client.tasks.is_empty() {
                self.clients.remove(&task.client);
            }
        }
        let verdict = Verdict {
            status,
            winner,
            lane: task.lane,
            attempts: task.starts,
            hedges: task.hedges,
            cost,
            waited: task.first_start.unwrap_or(self.now).saturating_sub(task.submitted),
        };
        out.push(Effect::Done { task: name, verdict });
    }
}
