//! Calls that take long: those that take too long are broken off, those that are slow get a second try beside them.

use std::time::Duration;

use super::Engine;
use super::parts::{Pending, Ticket};
use crate::call::{FailureKind, LimitHints};
use crate::core::api::{Effect, Warning};
use crate::core::hedge::Tail;
use crate::core::task::{AttemptId, Kind, LaneId};

impl Engine {
    /// Looks at the calls under way that have become slow, or too slow, by now.
    pub(super) fn judge_running(&mut self, out: &mut Vec<Effect>) {
        let mut from = LaneId(0);
        while let Some(&id) = self.active.range(from..).next() {
            from = LaneId(id.0 + 1);
            for kind in Kind::ALL {
                self.time_out(id, kind, out);
                self.find_slow(id, kind, out);
                self.give_up_stalled(id, kind, out);
            }
            self.hedge_denied(id);
            let lane = &self.lanes[usize::from(id.0)];
            if lane.in_flight == 0 && lane.hedges.is_empty() {
                self.lanes[usize::from(id.0)].denied.clear();
                self.lanes[usize::from(id.0)].running.iter_mut().flatten().for_each(|running| running.slow.clear());
                self.active.remove(&id);
            }
        }
    }

    /// When the next call under way becomes slow or too slow.
    pub(super) fn running_wake(&self) -> Option<Duration> {
        let due = |id: &LaneId| {
            let lane = &self.lanes[usize::from(id.0)];
            lane.running.iter().flatten().filter_map(|running| {
                let started = |attempt: &AttemptId| self.attempts.get(attempt).map(|attempt| attempt.started);
                let too_slow = running.attempts.first().and_then(started).map(|at| at + lane.settings.timeout);
                let slow = running.tail.threshold().filter(|_| self.settings.hedge.max > 0).and_then(|threshold| {
                    let next = running.attempts.range(AttemptId(running.judged)..).next();
                    next.and_then(started).map(|at| at + threshold)
                });
                let stalled = self
                    .stall(&running.tail)
                    .and_then(|stall| running.slow.iter().find_map(started).map(|at| at + stall));
                [too_slow, slow, stalled].into_iter().flatten().min()
            })
        };
        self.active.iter().flat_map(due).min()
    }

    fn time_out(&mut self, id: LaneId, kind: Kind, out: &mut Vec<Effect>) {
        loop {
            let lane = &self.lanes[usize::from(id.0)];
            let Some(running) = &lane.running[kind.index()] else { return };
            let Some(&attempt) = running.attempts.first() else { return };
            let timeout = lane.settings.timeout;
            if self.attempts.get(&attempt).is_some_and(|attempt| attempt.started + timeout > self.now) {
                return;
            }
            // In this order, so that a call which was to find out whether the lane works has found out that it does not.
            self.failed(attempt, FailureKind::Timeout, &LimitHints::default(), out);
            self.abort(attempt, out);
        }
    }

    fn find_slow(&mut self, id: LaneId, kind: Kind, out: &mut Vec<Effect>) {
        if self.settings.hedge.max == 0 {
            return;
        }
        let lane = &mut self.lanes[usize::from(id.0)];
        let Some(running) = &mut lane.running[kind.index()] else { return };
        let running = running.as_mut();
        let Some(threshold) = running.tail.threshold() else { return };
        let mut slow = Vec::new();
        for &attempt in running.attempts.range(AttemptId(running.judged)..) {
            let Some(call) = self.attempts.get_mut(&attempt) else { continue };
            if call.started + threshold > self.now {
                break;
            }
            call.slow = true;
            running.judged = attempt.0 + 1;
            running.tail.slow();
            slow.push(attempt);
        }
        let off = running.tail.all_slow(&self.settings.hedge);
        if off && !running.tail.off && !slow.is_empty() {
            out.push(Effect::Warn(Warning::HedgingOff { lane: id }));
        }
        running.tail.off = off;
        if off {
            return;
        }
        for &attempt in &slow {
            let call = self.attempts.get(&attempt);
            if call.and_then(|call| self.tasks.get(&call.task)).is_some_and(|task| task.hedge) {
                self.lanes[usize::from(id.0)].running(kind).slow.push_back(attempt);
            }
        }
        for attempt in slow {
            if self.may_hedge(attempt) {
                let lane = &mut self.lanes[usize::from(id.0)];
                if lane.denied.is_empty() && lane.hedge_budget.take() {
                    self.hedge(id, attempt);
                } else {
                    self.lanes[usize::from(id.0)].denied.push_back(attempt);
                }
            }
        }
    }

    /// How long a call may take before it counts as stalled.
    fn stall(&self, tail: &Tail) -> Option<Duration> {
        let stall = self.settings.hedge.stall;
        tail.threshold().filter(|_| stall > 0.0 && !tail.off).map(|threshold| threshold.mul_f64(stall))
    }

    fn give_up_stalled(&mut self, id: LaneId, kind: Kind, out: &mut Vec<Effect>) {
        loop {
            let Some(running) = &self.lanes[usize::from(id.0)].running[kind.index()] else { return };
            let Some(&attempt) = running.slow.front() else { return };
            if let Some(call) = self.attempts.get(&attempt).filter(|call| !call.aborting && !call.first_byte) {
                if self.stall(&running.tail).is_none_or(|stall| call.started + stall > self.now) {
                    return;
                }
                self.failed(attempt, FailureKind::Timeout, &LimitHints::default(), out);
                self.abort(attempt, out);
            }
            self.lanes[usize::from(id.0)].running(kind).slow.pop_front();
        }
    }

    /// Slow calls that are still under way when the budget has something again.
    fn hedge_denied(&mut self, id: LaneId) {
        while let Some(&attempt) = self.lanes[usize::from(id.0)].denied.front() {
            if self.may_hedge(attempt) {
                let lane = &mut self.lanes[usize::from(id.0)];
                let kind = self.attempts.get(&attempt).map(|attempt| attempt.kind);
                if kind.is_some_and(|kind| lane.running(kind).tail.off) || !lane.hedge_budget.take() {
                    return;
                }
                self.hedge(id, attempt);
            }
            self.lanes[usize::from(id.0)].denied.pop_front();
        }
    }

    fn may_hedge(&self, attempt: AttemptId) -> bool {
        let Some(call) = self.attempts.get(&attempt) else { return false };
        let Some(task) = self.tasks.get(&call.task) else { return false };
        !call.aborting
            && !call.first_byte
            && task.hedge
            && task.committed.is_none()
            && task.pending == Pending::Nothing
            && task.hedges < self.settings.hedge.max
            && task.live.len() <= self.settings.hedge.max as usize
    }

    fn hedge(&mut self, id: LaneId, attempt: AttemptId) {
        let Some(name) = self.attempts.get(&attempt).map(|call| call.task) else { return };
        let Some(task) = self.tasks.get_mut(&name) else { return };
        task.pending = Pending::Hedge;
        self.lanes[usize::from(id.0)].hedges.push_back(Ticket { task: name, stamp: task.stamp });
        self.active.insert(id);
    }
}
