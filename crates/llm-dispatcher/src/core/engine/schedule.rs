//! Whose turn it is, and whether there is room, leave and money for it.

use std::time::Duration;

use super::parts::{Attempt, Pending, Task, Ticket};
use super::{Engine, SHORT_FOR};
use crate::call::FailureKind;
use crate::core::api::{Effect, Reason, Refusal, StartKind, Status};
use crate::core::budget::Funds;
use crate::core::money::Money;
use crate::core::queue::UNIT;
use crate::core::task::{AttemptId, LaneId, TaskId};

/// Whether a chain has a lane that works.
enum Lead {
    /// This one.
    Lane(LaneId),
    /// None at present.
    Wait(Option<Duration>),
    /// None, and waiting does not help.
    Dead(FailureKind),
}

/// A turn that can be had.
struct Turn {
    route: u32,
    ticket: Ticket,
    lane: LaneId,
    /// Its place in the order between chains, and whether it counts; what came back was counted before.
    tag: u64,
    counts: bool,
}

/// What became of an attempt to pay for a call.
enum Paid {
    Yes,
    Wait,
    Exhausted { needed: Money, left: Money },
}

/// A lane that is to be left alone for longer than this is passed over when another of the chain works.
const WORTH_WAITING: Duration = Duration::from_secs(5);

impl Engine {
    /// Starts all that can be started.
    pub(super) fn pump(&mut self, out: &mut Vec<Effect>) {
        self.turn_wake = None;
        self.start_hedges(out);
        // Chains whose next task waits for money.
        let mut unpaid: Vec<u32> = Vec::new();
        while self.workers.has_room()
            && let Some(turn) = self.choose(&unpaid, out)
        {
            let Turn { route, ticket, lane, tag, counts } = turn;
            match self.pay(lane, ticket.task) {
                Paid::Yes => {
                    self.routes.get_mut(route).queue.pop();
                    if counts {
                        self.count_turn(route, ticket.task, tag);
                    }
                    self.launch(ticket.task, lane, false, out);
                }
                Paid::Wait => unpaid.push(route),
                Paid::Exhausted { needed, left } => {
                    self.say_exhausted(out);
                    self.routes.get_mut(route).queue.pop();
                    if let Some(cheaper) = self.pay_elsewhere(route, lane, ticket.task) {
                        self.launch(ticket.task, cheaper, false, out);
                    } else {
                        self.give_up_unpaid(ticket.task, needed, left, out);
                    }
                }
            }
        }
        if self.purse.is_short() && !unpaid.is_empty() {
            self.wake_at(self.short_since + SHORT_FOR);
        }
    }

    /// The turn that is next among the chains that can have one. Tasks whose chain is dead are ended on the way.
    fn choose(&mut self, unpaid: &[u32], out: &mut Vec<Effect>) -> Option<Turn> {
        let mut best: Option<Turn> = None;
        let mut best_served = 0;
        let mut from = 0;
        while let Some(&route) = self.routes.busy.range(from..).next() {
            from = route + 1;
            if unpaid.contains(&route) {
                continue;
            }
            let Some((ticket, client)) = self.head(route) else {
                self.routes.busy.remove(&route);
                continue;
            };
            let lane = match self.lead(route) {
                Lead::Lane(lane) => lane,
                Lead::Wait(until) => {
                    if let Some(until) = until {
                        self.wake_at(until);
                    }
                    continue;
                }
                Lead::Dead(kind) => {
                    self.routes.get_mut(route).queue.pop();
                    self.give_up_dead(ticket.task, kind, out);
                    from = route;
                    continue;
                }
            };
            let Some(task) = self.tasks.get(&ticket.task) else { continue };
            let tokens = task.tokens;
            if !self.has_room(lane) {
                continue;
            }
            let ready = self.lanes[usize::from(lane.0)].limiter.ready_at(tokens);
            if ready > self.now {
                self.wake_at(ready);
                continue;
            }
            let (tag, counts) = match client {
                Some(client) => (self.clients.get(&client).map_or(0, |client| client.tag).max(self.share_time), true),
                None => (0, false),
            };
            let served = self.routes.get(route).served;
            if best.as_ref().is_none_or(|best| (tag, served) < (best.tag, best_served)) {
                best = Some(Turn { route, ticket, lane, tag, counts });
                best_served = served;
            }
        }
        best
    }

    fn head(&mut self, route: u32) -> Option<(Ticket, Option<crate::core::task::ClientId>)> {
        let tasks = &self.tasks;
        let alive = |ticket: &Ticket| tasks.get(&ticket.task).is_some_and(|task| waits(task, *ticket, Pending::Queued));
        self.routes.get_mut(route).queue.head(alive).map(|(ticket, client)| (*ticket, client))
    }

    /// The first lane of a chain that works.
    fn lead(&self, route: u32) -> Lead {
        let mut wake: Option<Duration> = None;
        let mut dead = None;
        let mut waiting = false;
        let mut paused_lane = None;
        for &id in &self.routes.get(route).lanes {
            let lane = &self.lanes[usize::from(id.0)];
            if !lane.breaker.allows(self.now) {
                if let Some(kind) = lane.breaker.hard() {
                    dead = dead.or(Some(kind));
                    continue;
                }
                waiting = true;
                if let crate::core::BreakerState::Open { until } = lane.breaker.state() {
                    wake = Some(wake.map_or(until, |wake| wake.min(until)));
                }
                continue;
            }
            let paused = lane.limiter.paused_until().saturating_sub(self.now);
            if paused > self.settings.retry.patience {
                dead = dead.or(Some(FailureKind::RateLimited));
                continue;
            }
            if paused > WORTH_WAITING {
                paused_lane = paused_lane.or(Some(id));
                continue;
            }
            return Lead::Lane(id);
        }
        if let Some(id) = paused_lane {
            return Lead::Lane(id);
        }
        match dead {
            Some(kind) if !waiting => Lead::Dead(kind),
            _ => Lead::Wait(wake),
        }
    }

    fn has_room(&self, id: LaneId) -> bool {
        let lane = &self.lanes[usize::from(id.0)];
        lane.in_flight < lane.width.limit(self.now)
            && (!lane.settings.api || self.api_in_flight < self.settings.max_concurrent_api.max(1))
    }

    fn wake_at(&mut self, when: Duration) {
        self.turn_wake = Some(self.turn_wake.map_or(when, |wake| wake.min(when)));
    }

    /// Reserves the worst case of a call.
    fn pay(&mut self, id: LaneId, name: TaskId) -> Paid {
        let Some(task) = self.tasks.get(&name) else { return Paid::Wait };
        let worst = self.lanes[usize::from(id.0)].worst(task);
        if self.purse.is_short() && self.now >= self.short_since + SHORT_FOR {
            self.purse.ask_again();
        }
        match self.purse.reserve(worst, &mut self.wishes) {
            Funds::Reserved => Paid::Yes,
            Funds::Wait => Paid::Wait,
            Funds::Exhausted { left } => Paid::Exhausted { needed: worst, left },
        }
    }

    /// Whether a later lane of the chain is cheap enough for what is left.
    fn pay_elsewhere(&mut self, route: u32, not: LaneId, name: TaskId) -> Option<LaneId> {
        let lanes = self.routes.get(route).lanes.clone();
        let tokens = self.tasks.get(&name)?.tokens;
        lanes.into_iter().skip_while(|&lane| lane != not).skip(1).find(|&id| {
            let lane = &self.lanes[usize::from(id.0)];
            let usable = lane.breaker.allows(self.now) && lane.limiter.ready_at(tokens) <= self.now;
            usable && self.has_room(id) && matches!(self.pay(id, name), Paid::Yes)
        })
    }

    fn give_up_unpaid(&mut self, name: TaskId, needed: Money, left: Money, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&name) else { return };
        task.pending = Pending::Nothing;
        task.stamp += 1;
        if !task.live.is_empty() {
            return;
        }
        let status = if task.starts == 0 {
            Status::Refused(Refusal::Budget { needed, left })
        } else {
            Status::Failed(Reason::Budget { needed, left })
        };
        self.complete(name, status, None, out);
    }

    fn give_up_dead(&mut self, name: TaskId, kind: FailureKind, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&name) else { return };
        task.pending = Pending::Nothing;
        task.stamp += 1;
        if task.live.is_empty() {
            self.complete(name, Status::Failed(Reason::Call(kind)), None, out);
        }
    }

    fn count_turn(&mut self, route: u32, name: TaskId, tag: u64) {
        self.turns += 1;
        self.routes.get_mut(route).served = self.turns;
        self.share_time = self.share_time.max(tag);
        if let Some(task) = self.tasks.get(&name)
            && let Some(client) = self.clients.get_mut(&task.client)
        {
            client.tag = tag + (UNIT / u64::from(task.weight)).max(1);
        }
    }

    /// Hedges go before the queue: the task had its turn.
    fn start_hedges(&mut self, out: &mut Vec<Effect>) {
        let mut from = LaneId(0);
        while let Some(&id) = self.active.range(from..).next() {
            from = LaneId(id.0 + 1);
            while self.workers.has_room()
                && let Some(&ticket) = self.lanes[usize::from(id.0)].hedges.front()
            {
                let lane = &self.lanes[usize::from(id.0)];
                let Some(task) = self.tasks.get(&ticket.task).filter(|task| waits(task, ticket, Pending::Hedge)) else {
                    self.lanes[usize::from(id.0)].hedges.pop_front();
                    continue;
                };
                if !lane.breaker.allows(self.now) || !self.has_room(id) {
                    break;
                }
                let ready = lane.limiter.ready_at(task.tokens);
                if ready > self.now {
                    self.wake_at(ready);
                    break;
                }
                self.lanes[usize::from(id.0)].hedges.pop_front();
                if matches!(self.pay(id, ticket.task), Paid::Yes) {
                    self.launch(ticket.task, id, true, out);
                } else {
                    // A hedge is a luxury; it does not wait for money.
                    self.leave_queue(ticket.task);
                }
            }
        }
    }

    /// Starts a call that is paid for.
    fn launch(&mut self, name: TaskId, id: LaneId, hedge: bool, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&name) else { return };
        let Some(worker) = self.workers.take(task.kind) else { return };
        let attempt = AttemptId(self.next_attempt);
        self.next_attempt += 1;
        let lane = &mut self.lanes[usize::from(id.0)];
        let kind = match (task.starts, hedge) {
            (0, _) => StartKind::First,
            (_, true) => StartKind::Hedge,
            (_, false) => StartKind::Retry,
        };
        match kind {
            StartKind::First => {
                self.retry_budget.first_try();
                lane.hedge_budget.first_try();
                task.first_start = Some(self.now);
            }
            StartKind::Retry => lane.counts.retries += 1,
            StartKind::Hedge => {
                lane.counts.hedges += 1;
                task.hedges += 1;
            }
        }
        task.starts += 1;
        task.pending = Pending::Nothing;
        task.stamp += 1;
        task.live.push(attempt);
        if task.lane != Some(id) {
            task.lane = Some(id);
            task.lane_failures = 0;
        }
        lane.counts.starts += 1;
        lane.in_flight += 1;
        lane.limiter.take(self.now, task.tokens);
        lane.width.started(attempt, lane.in_flight);
        lane.breaker.started(attempt);
        lane.running(task.kind).attempts.insert(attempt);
        self.active.insert(id);
        self.api_in_flight += u32::from(lane.settings.api);
        let last = self.now + lane.settings.timeout;
        let deadline = task.deadline.map_or(last, |(due, _)| due.min(last));
        self.attempts.insert(
            attempt,
            Attempt {
                task: name,
                lane: id,
                kind: task.kind,
                worker,
                started: self.now,
                reserved: lane.worst(task),
                day: self.purse.today(),
                tokens: task.tokens,
                aborting: false,
                slow: false,
                hedged: false,
                first_byte: false,
            },
        );
        out.push(Effect::Start { attempt, task: name, lane: id, worker, kind, deadline });
    }
}

fn waits(task: &Task, ticket: Ticket, pending: Pending) -> bool {
    task.stamp == ticket.stamp && task.pending == pending
}
