//! Calls that take long: those that take too long are broken off, those that are slow get a second try beside them.

use std::time::Duration;

use super::Engine;
use super::parts::{Pending, Running, Ticket};
use crate::call::{FailureKind, LimitHints};
use crate::core::api::{Effect, Warning};
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
                self.hedge_slow(id, kind);
                self.give_up_stalled(id, kind, out);
            }
            let lane = &mut self.lanes[usize::from(id.0)];
            if lane.in_flight == 0 && lane.hedges.is_empty() {
                for running in lane.running.iter_mut().flatten() {
                    running.stalling.clear();
                    running.unhedged.clear();
                }
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
                let slow = self.threshold(running).and_then(|threshold| {
                    let next = running.attempts.range(AttemptId(running.judged)..).next();
                    next.and_then(started).map(|at| at + threshold)
                });
                let stalled = self
                    .stall(running)
                    .and_then(|stall| running.stalling.iter().find_map(started).map(|at| at + stall));
                [too_slow, slow, stalled].into_iter().flatten().min()
            })
        };
        self.active.iter().flat_map(due).min()
    }

    /// From when on a call is slow, when that is known and something is done about it.
    fn threshold(&self, running: &Running) -> Option<Duration> {
        running.tail.threshold(running.attempts.len()).filter(|_| self.settings.hedge.max > 0)
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
        let Some(running) = &self.lanes[usize::from(id.0)].running[kind.index()] else { return };
        let Some(threshold) = self.threshold(running) else { return };
        let Some(running) = &mut self.lanes[usize::from(id.0)].running[kind.index()] else { return };
        let running = running.as_mut();
        if running.threshold.replace(threshold).is_some_and(|before| before < threshold) {
            // More is known of what is usual: some calls were only late among many others.
            while let Some(&attempt) = running.attempts.range(..AttemptId(running.judged)).next_back() {
                let Some(call) = self.attempts.get_mut(&attempt).filter(|call| call.started + threshold > self.now)
                else {
                    break;
                };
                call.slow = false;
                running.slow -= 1;
                running.judged = attempt.0;
            }
            let slow = |last: &mut AttemptId| last.0 >= running.judged;
            while running.stalling.pop_back_if(slow).is_some() {}
            while running.unhedged.pop_back_if(slow).is_some() {}
        }
        for &attempt in running.attempts.range(AttemptId(running.judged)..) {
            let Some(call) = self.attempts.get_mut(&attempt) else { continue };
            if call.started + threshold > self.now {
                break;
            }
            call.slow = true;
            running.slow += 1;
            running.judged = attempt.0 + 1;
            if self.tasks.get(&call.task).is_some_and(|task| task.hedge) {
                running.stalling.push_back(attempt);
                if !call.hedged {
                    running.unhedged.push_back(attempt);
                }
            }
        }
        let off = running.tail.all_slow(&self.settings.hedge, running.slow);
        if off && !running.tail.off {
            out.push(Effect::Warn(Warning::HedgingOff { lane: id }));
        }
        running.tail.off = off;
    }

    /// Second tries beside slow ones, as far as the budget goes; those for which it has nothing wait until it does.
    fn hedge_slow(&mut self, id: LaneId, kind: Kind) {
        loop {
            let Some(running) = &self.lanes[usize::from(id.0)].running[kind.index()] else { return };
            let Some(&attempt) = running.unhedged.front().filter(|_| !running.tail.off) else { return };
            if self.may_hedge(attempt) {
                if !self.lanes[usize::from(id.0)].hedge_budget.take() {
                    return;
                }
                self.hedge(id, attempt);
            }
            self.lanes[usize::from(id.0)].running(kind).unhedged.pop_front();
        }
    }

    /// How long a call may take before it counts as stalled.
    fn stall(&self, running: &Running) -> Option<Duration> {
        let stall = self.settings.hedge.stall;
        let threshold = self.threshold(running).filter(|_| stall > 0.0 && !running.tail.off);
        threshold.map(|threshold| threshold.mul_f64(stall))
    }

    fn give_up_stalled(&mut self, id: LaneId, kind: Kind, out: &mut Vec<Effect>) {
        loop {
            let Some(running) = &self.lanes[usize::from(id.0)].running[kind.index()] else { return };
            let Some(&attempt) = running.stalling.front() else { return };
            if let Some(call) = self.attempts.get(&attempt).filter(|call| !call.aborting && !call.first_byte) {
                if self.stall(running).is_none_or(|stall| call.started + stall > self.now) {
                    return;
                }
                self.failed(attempt, FailureKind::Timeout, &LimitHints::default(), out);
                self.abort(attempt, out);
            }
            self.lanes[usize::from(id.0)].running(kind).stalling.pop_front();
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
        let Some(call) = self.attempts.get_mut(&attempt) else { return };
        call.hedged = true;
        let name = call.task;
        let Some(task) = self.tasks.get_mut(&name) else { return };
        task.pending = Pending::Hedge;
        self.lanes[usize::from(id.0)].hedges.push_back(Ticket { task: name, stamp: task.stamp });
        self.active.insert(id);
    }
}
