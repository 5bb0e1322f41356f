//! Emptying a node: which session goes where, and how fast.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use drover_types::SessionId;

use super::ids::NodeId;

/// A session that failed to move to a node this often is not sent there again: the first time may have been chance.
const MAX_FAILURES: u32 = 2;

/// A node that takes sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Its name.
    pub node: NodeId,
    /// Sessions that it has now.
    pub sessions: u32,
    /// How much it takes compared with the others.
    pub weight: u32,
}

/// One session and where it is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The session.
    pub session: SessionId,
    /// Its new node.
    pub to: NodeId,
}

/// A plan under way: it hands out assignments no faster than allowed, and a session whose move failed again, behind the others.
#[derive(Debug)]
pub struct DrainPlan {
    waiting: VecDeque<SessionId>,
    /// Sessions that each node has or is to get, with its weight.
    held: BTreeMap<NodeId, (u32, u32)>,
    under_way: BTreeMap<SessionId, NodeId>,
    /// Where each session could not go, and how often.
    failed: BTreeMap<(SessionId, NodeId), u32>,
    /// Sessions that no node took.
    stuck: Vec<SessionId>,
    most: usize,
    pause: Duration,
    next: Duration,
}

impl DrainPlan {
    /// A plan for these sessions. At most `most` are under way at a time, and at most `per_second` begin in a second.
    pub fn new(
        sessions: impl IntoIterator<Item = SessionId>,
        targets: impl IntoIterator<Item = Share>,
        most: usize,
        per_second: u32,
    ) -> Self {
        Self {
            waiting: sessions.into_iter().collect(),
            held: targets.into_iter().map(|share| (share.node, (share.sessions, share.weight.max(1)))).collect(),
            under_way: BTreeMap::new(),
            failed: BTreeMap::new(),
            stuck: Vec::new(),
            most: most.max(1),
            pause: Duration::from_secs(1) / per_second.max(1),
            next: Duration::ZERO,
        }
    }

    /// The next session that may set out now.
    pub fn next(&mut self, now: Duration) -> Option<Assignment> {
        if self.under_way.len() >= self.most || now < self.next {
            return None;
        }
        while let Some(session) = self.waiting.pop_front() {
            let gave_up = |node: &NodeId| {
                self.failed.get(&(session.clone(), node.clone())).is_some_and(|times| *times >= MAX_FAILURES)
            };
            // The emptiest for its weight: (held + 1) / weight is least. In whole numbers, so that everybody comes to the same.
            let to = self
                .held
                .iter()
                .filter(|(node, _)| !gave_up(node))
                .min_by(|(a, (held_a, weight_a)), (b, (held_b, weight_b))| {
                    let left = u64::from(held_a + 1) * u64::from(*weight_b);
                    let right = u64::from(held_b + 1) * u64::from(*weight_a);
                    left.cmp(&right).then(a.cmp(b))
                })
                .map(|(node, _)| node.clone());
            let Some(to) = to else {
                self.stuck.push(session);
                continue;
            };
            if let Some((held, _)) = self.held.get_mut(&to) {
                *held += 1;
            }
            self.under_way.insert(session.clone(), to.clone());
            self.next = now + self.pause;
            return Some(Assignment { session, to });
        }
        None
    }

    /// A session has arrived, or could not go there. One that could not waits behind the others.
    pub fn ended(&mut self, session: &SessionId, arrived: bool) {
        let Some(to) = self.under_way.remove(session) else { return };
        if arrived {
            return;
        }
        if let Some((held, _)) = self.held.get_mut(&to) {
            *held -= 1;
        }
        *self.failed.entry((session.clone(), to)).or_default() += 1;
        self.waiting.push_back(session.clone());
    }

    /// A node can take no more.
    pub fn gone(&mut self, node: &NodeId) {
        self.held.remove(node);
    }

    /// Nothing waits and nothing is under way.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    /// Sessions that no node took.
    pub fn stuck(&self) -> &[SessionId] {
        &self.stuck
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn sessions(count: usize) -> Vec<SessionId> {
        (0..count).map(|n| format!("s{n}").parse().unwrap()).collect()
    }

    fn share(node: &str, sessions: u32, weight: u32) -> Share {
        Share { node: NodeId::new(node), sessions, weight }
    }

    /// Carries a plan out in virtual time; the first move of every `fails`-th session fails.
    fn carry_out(mut plan: DrainPlan, fails: usize) -> (BTreeMap<NodeId, u32>, Duration, usize) {
        let (mut now, mut arrived, mut widest) = (Duration::ZERO, BTreeMap::new(), 0);
        let mut fail: BTreeSet<SessionId> = sessions(1000).into_iter().step_by(fails).collect();
        let mut under_way: VecDeque<(Duration, Assignment)> = VecDeque::new();
        while !plan.is_done() {
            while let Some(assignment) = plan.next(now) {
                under_way.push_back((now + Duration::from_millis(300), assignment));
            }
            widest = widest.max(under_way.len());
            now += Duration::from_millis(10);
            while under_way.front().is_some_and(|(at, _)| *at <= now) {
                let (_, Assignment { session, to }) = under_way.pop_front().unwrap();
                let ok = !fail.remove(&session);
                plan.ended(&session, ok);
                if ok {
                    *arrived.entry(to).or_default() += 1;
                }
            }
            assert!(now < Duration::from_mins(10));
        }
        assert!(plan.stuck().is_empty());
        (arrived, now, widest)
    }

    #[test]
    fn a_thousand_sessions_spread_evenly_and_no_faster_than_allowed() {
        for fails in [7, 1000] {
            let targets = [share("a", 0, 1), share("b", 0, 1), share("c", 0, 1)];
            let (arrived, took, widest) = carry_out(DrainPlan::new(sessions(1000), targets, 8, 100), fails);
            assert_eq!(arrived.values().sum::<u32>(), 1000);
            assert!(arrived.values().all(|count| (300..=367).contains(count)), "within a tenth of even: {arrived:?}");
            assert!(widest <= 8, "{widest} at a time");
            assert!(took >= Duration::from_millis(9_990), "took {took:?}");
        }
    }

    #[test]
    fn those_that_have_less_or_can_take_more_get_more() {
        let targets = [share("full", 100, 1), share("empty", 0, 1), share("large", 100, 2)];
        let (arrived, ..) = carry_out(DrainPlan::new(sessions(200), targets, 100, 10_000), 1000);
        let total = |node: &str, had: u32| had + arrived.get(&NodeId::new(node)).copied().unwrap_or(0);
        assert_eq!((total("full", 100), total("empty", 0), total("large", 100)), (100, 100, 200));
    }

    #[test]
    fn a_session_that_nobody_takes_is_named() {
        let mut plan = DrainPlan::new(sessions(1), [share("a", 0, 1), share("b", 0, 1)], 1, 1);
        for at in 0..4 {
            let assignment = plan.next(Duration::from_secs(at)).unwrap();
            plan.ended(&assignment.session, false);
        }
        assert_eq!(plan.next(Duration::from_secs(4)), None);
        assert!(plan.is_done());
        assert_eq!(plan.stuck(), sessions(1));
    }
}
