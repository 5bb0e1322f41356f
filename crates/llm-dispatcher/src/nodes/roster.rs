//! Which node does what. Knows no clock, no network and no page; whoever owns it tells it the time.
//!
//! Work goes to the node that is furthest behind its share: shares follow the room that a node has left, in quarters, so that
//! equal nodes get equal numbers whatever their load does in between. A node that comes begins where the one furthest behind is,
//! and so catches nothing up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::kinds::{KINDS, Kinds};
use crate::call::{CallAnswer, CallError, FailureKind};
use crate::core::Kind;

/// Attempts of one piece of work. More nodes than these do not die by accident around it.
const MOST_ATTEMPTS: u32 = 5;
/// What a node may take at once, whatever it offers.
const MOST_AT_ONCE: u32 = 64;
/// How long work waits for a node that can take it when all that are there are out of reach, before it is done here.
const PATIENCE: Duration = Duration::from_secs(10);

/// One piece of work, over all its attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket(pub(super) u64);

/// How a piece of work ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// A node did it.
    Done(Box<Result<CallAnswer, CallError>>),
    /// No node is there.
    Nobody,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Effect {
    /// Tell this stream's node to do this.
    Give { stream: u64, attempt: u64, kind: Kind, url: Arc<str> },
    /// Tell it that this is not wanted any more.
    Void { stream: u64, attempt: u64 },
    /// A result came that is not taken.
    Late,
    /// A piece of work is over. Each is told once.
    Ended { ticket: Ticket, ended: Ended },
}

/// What the membership says of a node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Member {
    pub(super) state: Life,
    /// From 0 to 1.
    pub(super) load: f64,
    pub(super) overloaded: bool,
    /// Tasks that it says it takes.
    pub(super) kinds: Kinds,
}

/// Whether a node lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    /// It keeps what it has and is given no more.
    Suspect,
    /// What it has is void.
    Dead,
}

#[derive(Debug)]
struct Node {
    stream: u64,
    kinds: Kinds,
    at_once: u32,
    under_way: BTreeMap<u64, Ticket>,
    /// Work given so far, each piece counted by its share.
    given: f64,
}

#[derive(Debug)]
struct Work {
    kind: Kind,
    url: Arc<str>,
    attempts: u32,
    /// Where it is being done: node, attempt, since when.
    at: Option<(Arc<str>, u64, Duration)>,
    waiting_since: Duration,
}

/// All nodes and all work.
#[derive(Debug)]
pub(super) struct Roster {
    max_nodes: u32,
    limit: Duration,
    /// Only members are given work.
    gossips: bool,
    nodes: BTreeMap<Arc<str>, Node>,
    members: Option<BTreeMap<String, Member>>,
    work: HashMap<Ticket, Work>,
    waiting: VecDeque<Ticket>,
    next_attempt: u64,
}

impl Roster {
    pub(super) fn new(max_nodes: u32, limit: Duration, gossips: bool) -> Self {
        Self {
            max_nodes: max_nodes.max(1),
            limit,
            gossips,
            nodes: BTreeMap::new(),
            members: None,
            work: HashMap::new(),
            waiting: VecDeque::new(),
            next_attempt: 1,
        }
    }

    /// Nodes that could be given work of some kind.
    pub(super) fn usable(&self) -> u32 {
        self.nodes.keys().filter(|name| KINDS.iter().any(|kind| self.share(name, *kind).is_some())).count() as u32
    }

    /// Whether a node could be given work of this kind.
    fn can(&self, kind: Kind) -> bool {
        self.nodes.keys().any(|name| self.share(name, kind).is_some())
    }

    /// A node offers itself. An earlier stream of the same node is of an earlier start of it.
    pub(super) fn join(
        &mut self,
        now: Duration,
        name: &str,
        stream: u64,
        (kinds, at_once): (Kinds, u32),
        out: &mut Vec<Effect>,
    ) {
        self.drop_node(now, name, out);
        let least = self.nodes.values().map(|node| node.given).reduce(f64::min).unwrap_or(0.0);
        let at_once = at_once.min(MOST_AT_ONCE);
        self.nodes.insert(name.into(), Node { stream, kinds, at_once, under_way: BTreeMap::new(), given: least });
        self.give(now, out);
    }

    /// A stream has ended. Nothing happens when its node has a later one.
    pub(super) fn leave(&mut self, now: Duration, stream: u64, out: &mut Vec<Effect>) {
        let name = self.nodes.iter().find(|(_, node)| node.stream == stream).map(|(name, _)| Arc::clone(name));
        if let Some(name) = name {
            self.drop_node(now, &name, out);
            self.give(now, out);
        }
    }

    /// What the membership says now, of everybody.
    pub(super) fn members(&mut self, now: Duration, members: BTreeMap<String, Member>, out: &mut Vec<Effect>) {
        self.members = Some(members);
        let dead = |name: &Arc<str>| self.member(name).is_some_and(|member| member.state == Life::Dead);
        let dead: Vec<Arc<str>> = self.nodes.keys().filter(|name| dead(name)).cloned().collect();
        for name in dead {
            // Its stream may still stand; should it live after all, it is told, and takes part again when it is alive.
            self.void_all(now, &name, true, out);
        }
        self.give(now, out);
    }

    /// Nothing is known of the members any more.
    pub(super) fn members_unknown(&mut self) {
        self.members = None;
    }

    /// There is work.
    pub(super) fn submit(
        &mut self,
        now: Duration,
        ticket: Ticket,
        (kind, url): (Kind, Arc<str>),
        out: &mut Vec<Effect>,
    ) {
        self.work.insert(ticket, Work { kind, url, attempts: 0, at: None, waiting_since: now });
        self.waiting.push_back(ticket);
        self.give(now, out);
    }

    /// Nobody wants it any more.
    pub(super) fn cancel(&mut self, now: Duration, ticket: Ticket, out: &mut Vec<Effect>) {
        let Some(work) = self.work.remove(&ticket) else { return };
        match work.at {
            Some((name, attempt, _)) => {
                if let Some(node) = self.nodes.get_mut(&name)
                    && node.under_way.remove(&attempt).is_some()
                {
                    out.push(Effect::Void { stream: node.stream, attempt });
                }
            }
            None => self.waiting.retain(|waiting| *waiting != ticket),
        }
        self.give(now, out);
    }

    /// A result. It is taken only from the node and the stream that have the attempt, and once.
    pub(super) fn result(
        &mut self,
        now: Duration,
        stream: u64,
        attempt: u64,
        result: Result<CallAnswer, CallError>,
        out: &mut Vec<Effect>,
    ) {
        let node = self.nodes.iter_mut().find(|(_, node)| node.stream == stream);
        let Some((name, ticket)) =
            node.and_then(|(name, node)| Some((Arc::clone(name), node.under_way.remove(&attempt)?)))
        else {
            out.push(Effect::Late);
            return;
        };
        if self.work.remove(&ticket).is_some() {
            let result = result.map(|answer| read_by(answer, &name));
            out.push(Effect::Ended { ticket, ended: Ended::Done(Box::new(result)) });
        }
        self.give(now, out);
    }

    /// Looks for what takes too long.
    pub(super) fn look(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let slow =
            |work: &Work| work.at.as_ref().filter(|(.., since)| now.saturating_sub(*since) >= self.limit).cloned();
        let late: Vec<(Ticket, Arc<str>, u64)> = self
            .work
            .iter()
            .filter_map(|(ticket, work)| slow(work).map(|(name, attempt, _)| (*ticket, name, attempt)))
            .collect();
        for (ticket, name, attempt) in late {
            if let Some(node) = self.nodes.get_mut(&name)
                && node.under_way.remove(&attempt).is_some()
            {
                out.push(Effect::Void { stream: node.stream, attempt });
            }
            self.again(now, ticket, out);
        }
        for kind in KINDS {
            if self.can(kind) {
                continue;
            }
            let tired = |work: &Work| work.kind == kind && now.saturating_sub(work.waiting_since) >= PATIENCE;
            let tired = |ticket: &Ticket| self.work.get(ticket).is_some_and(tired);
            let tired: Vec<Ticket> = self.waiting.iter().copied().filter(tired).collect();
            for ticket in tired {
                self.end(ticket, Ended::Nobody, out);
            }
        }
        self.give(now, out);
    }

    fn end(&mut self, ticket: Ticket, ended: Ended, out: &mut Vec<Effect>) {
        self.waiting.retain(|waiting| *waiting != ticket);
        if self.work.remove(&ticket).is_some() {
            out.push(Effect::Ended { ticket, ended });
        }
    }

    fn member(&self, name: &str) -> Option<Member> {
        self.members.as_ref()?.get(name).copied()
    }

    /// The share of a node, in quarters of what an idle one gets; `None` when it is given nothing.
    fn share(&self, name: &str, kind: Kind) -> Option<f64> {
        self.nodes.get(name).filter(|node| node.at_once > 0 && node.kinds.has(kind))?;
        if !self.gossips || self.members.is_none() {
            // Whoever holds the members cannot be asked: who has a certificate and a stream is there.
            return Some(1.0);
        }
        let member = self.member(name).filter(|member| member.kinds.has(kind) && member.state == Life::Alive)?;
        if member.overloaded {
            // Only when nobody else has room, see `next`.
            return Some(0.0);
        }
        Some(((1.0 - member.load.clamp(0.0, 1.0)) * 4.0).ceil().clamp(1.0, 4.0) / 4.0)
    }

    /// The node for the next piece of work: of those that have room, whoever is furthest behind its share; an overloaded one
    /// only when there is no other. No more nodes are busy at once than may be.
    fn next(&self, kind: Kind) -> Option<(Arc<str>, f64)> {
        let busy = self.nodes.values().filter(|node| !node.under_way.is_empty()).count() as u32;
        let mut best: Option<(bool, f64, &Arc<str>, f64)> = None;
        for (name, node) in &self.nodes {
            let has_room = (node.under_way.len() as u32) < node.at_once;
            if !has_room || (node.under_way.is_empty() && busy >= self.max_nodes) {
                continue;
            }
            let Some(share) = self.share(name, kind) else { continue };
            let (overloaded, share) = (share == 0.0, if share == 0.0 { 0.25 } else { share });
            let before = best.is_none_or(|(other, given, ..)| (overloaded, node.given) < (other, given));
            if before {
                best = Some((overloaded, node.given, name, share));
            }
        }
        best.map(|(_, _, name, share)| (Arc::clone(name), share))
    }

    /// Gives out what waits, as far as there is room.
    fn give(&mut self, now: Duration, out: &mut Vec<Effect>) {
        // Kinds for which no node has room now. Work of the others goes past that which waits for it.
        let mut full = Kinds::default();
        let mut place = 0;
        while let Some(ticket) = self.waiting.get(place).copied() {
            let Some(kind) = self.work.get(&ticket).map(|work| work.kind) else {
                self.waiting.remove(place);
                continue;
            };
            if full.has(kind) {
                place += 1;
                continue;
            }
            if !self.nodes.values().any(|node| node.kinds.has(kind)) {
                // Nobody who does this was ever there, or the last one has gone: whoever waits does it himself.
                self.end(ticket, Ended::Nobody, out);
                continue;
            }
            let Some((name, share)) = self.next(kind) else {
                full.add(kind);
                if KINDS.iter().all(|kind| full.has(*kind)) {
                    return;
                }
                place += 1;
                continue;
            };
            self.waiting.remove(place);
            let (Some(work), Some(node)) = (self.work.get_mut(&ticket), self.nodes.get_mut(&name)) else { continue };
            let attempt = self.next_attempt;
            self.next_attempt += 1;
            work.attempts += 1;
            work.at = Some((name, attempt, now));
            node.given += 1.0 / share;
            node.under_way.insert(attempt, ticket);
            out.push(Effect::Give { stream: node.stream, attempt, kind, url: Arc::clone(&work.url) });
        }
    }

    fn drop_node(&mut self, now: Duration, name: &str, out: &mut Vec<Effect>) {
        self.void_all(now, name, false, out);
        self.nodes.remove(name);
    }

    /// What the node has goes to others, before all that waits.
    fn void_all(&mut self, now: Duration, name: &str, tell: bool, out: &mut Vec<Effect>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let (stream, void) = (node.stream, std::mem::take(&mut node.under_way));
        for (attempt, ticket) in void.into_iter().rev() {
            if tell {
                out.push(Effect::Void { stream, attempt });
            }
            self.again(now, ticket, out);
        }
    }

    fn again(&mut self, now: Duration, ticket: Ticket, out: &mut Vec<Effect>) {
        let Some(work) = self.work.get_mut(&ticket) else { return };
        (work.at, work.waiting_since) = (None, now);
        if work.attempts >= MOST_ATTEMPTS {
            let what = format!("{MOST_ATTEMPTS} nodes were lost or too slow over this page");
            let error = CallError { maybe_billed: false, ..CallError::new(FailureKind::Timeout, what) };
            return self.end(ticket, Ended::Done(Box::new(Err(error))), out);
        }
        self.waiting.push_front(ticket);
    }
}

/// Says in the answer where it is from.
fn read_by(mut answer: CallAnswer, node: &str) -> CallAnswer {
    if let Some(serde_json::Value::Object(detail)) = &mut answer.structured {
        detail.insert("read_by".to_owned(), node.into());
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::call::Finish;

    const SECOND: Duration = Duration::from_secs(1);

    fn answer() -> CallAnswer {
        CallAnswer { structured: Some(serde_json::json!({})), ..CallAnswer::of("text", Finish::Stop) }
    }

    fn all_kinds() -> Kinds {
        Kinds::of(["fetch", "extract", "dream"])
    }

    fn fetch() -> (Kind, Arc<str>) {
        (Kind::Fetch, "u".into())
    }

    fn alive(load: f64) -> Member {
        Member { state: Life::Alive, load, overloaded: false, kinds: all_kinds() }
    }

    fn members(list: &[(&str, Member)]) -> BTreeMap<String, Member> {
        list.iter().map(|(name, member)| ((*name).to_owned(), *member)).collect()
    }

    /// Attempts that were given: stream and number.
    fn given(out: &mut Vec<Effect>) -> Vec<(u64, u64)> {
        let given = out.iter().filter_map(|effect| match effect {
            Effect::Give { stream, attempt, .. } => Some((*stream, *attempt)),
            _ => None,
        });
        let given = given.collect();
        out.clear();
        given
    }

    fn roster(nodes: u64, at_once: u32) -> (Roster, Vec<Effect>) {
        let mut roster = Roster::new(100, 30 * SECOND, true);
        let mut out = Vec::new();
        let names: Vec<String> = (0..nodes).map(|number| format!("n{number}")).collect();
        for (number, name) in names.iter().enumerate() {
            roster.join(SECOND, name, number as u64, (all_kinds(), at_once), &mut out);
        }
        let all: Vec<(&str, Member)> = names.iter().map(|name| (name.as_str(), alive(0.0))).collect();
        roster.members(SECOND, members(&all), &mut out);
        (roster, out)
    }

    #[test]
    fn of_two_attempts_one_result_is_taken_and_never_that_of_the_dead() {
        let (mut roster, mut out) = roster(2, 4);
        roster.submit(SECOND, Ticket(1), fetch(), &mut out);
        let first = given(&mut out)[0];
        roster.leave(SECOND, first.0, &mut out);
        let second = given(&mut out)[0];
        assert_ne!(first, second);
        roster.result(SECOND, first.0, first.1, Ok(answer()), &mut out);
        roster.result(SECOND, second.0, first.1, Ok(answer()), &mut out);
        assert!(out.drain(..).all(|effect| matches!(effect, Effect::Late)));
        roster.result(SECOND, second.0, second.1, Ok(answer()), &mut out);
        let [Effect::Ended { ticket: Ticket(1), ended: Ended::Done(done) }] = &out[..] else { panic!("{out:?}") };
        assert_eq!(
            (**done).as_ref().unwrap().structured,
            Some(serde_json::json!({"read_by": format!("n{}", second.0)}))
        );
        out.clear();
        roster.result(SECOND, second.0, second.1, Ok(answer()), &mut out);
        assert!(matches!(out[..], [Effect::Late]));
    }

    #[test]
    fn the_membership_says_who_is_given_work_and_how_much() {
        let (mut roster, mut out) = roster(4, 1000);
        let list = [
            ("n0", alive(0.1)),
            ("n1", alive(0.8)),
            ("n2", Member { overloaded: true, ..alive(0.9) }),
            ("n3", Member { kinds: Kinds::default(), ..alive(0.0) }),
        ];
        roster.members(SECOND, members(&list), &mut out);
        for number in 0..50 {
            roster.submit(SECOND, Ticket(number), fetch(), &mut out);
        }
        let mut counts = [0; 4];
        for (stream, _) in given(&mut out) {
            counts[stream as usize] += 1;
        }
        assert_eq!(counts, [40, 10, 0, 0], "by the room they have, in quarters");
        // Suspect: it keeps what it has. Dead: others get it, and it is told.
        let suspect = [("n0", Member { state: Life::Suspect, ..alive(0.1) }), ("n1", alive(0.8))];
        roster.members(SECOND, members(&suspect), &mut out);
        assert!(given(&mut out).is_empty());
        let dead = [("n0", Member { state: Life::Dead, ..alive(0.1) }), ("n1", alive(0.8))];
        roster.members(SECOND, members(&dead), &mut out);
        assert_eq!(out.iter().filter(|effect| matches!(effect, Effect::Void { stream: 0, .. })).count(), 40);
        assert!(given(&mut out).iter().all(|(stream, _)| *stream == 1));
    }

    #[test]
    fn each_kind_goes_to_a_node_that_takes_it_and_holds_up_no_other() {
        let (mut roster, mut out) = (Roster::new(10, 30 * SECOND, true), Vec::new());
        let extract = || (Kind::Extract, Arc::from("u"));
        // A node of an older version: nobody takes the other kind, and that is known at once.
        roster.join(SECOND, "old", 0, (Kinds::of(["fetch"]), 1), &mut out);
        roster.members(SECOND, members(&[("old", alive(0.0))]), &mut out);
        roster.submit(SECOND, Ticket(1), extract(), &mut out);
        assert!(matches!(out[..], [Effect::Ended { ticket: Ticket(1), ended: Ended::Nobody }]), "{out:?}");
        out.clear();
        roster.join(SECOND, "new", 1, (all_kinds(), 1), &mut out);
        let both = [("old", Member { kinds: Kinds::of(["fetch"]), ..alive(0.0) }), ("new", alive(0.0))];
        roster.members(SECOND, members(&both), &mut out);
        for number in 2..5 {
            roster.submit(SECOND, Ticket(number), extract(), &mut out);
        }
        roster.submit(SECOND, Ticket(5), fetch(), &mut out);
        let given: Vec<(u64, Kind)> = out
            .iter()
            .filter_map(|effect| match effect {
                Effect::Give { stream, kind, .. } => Some((*stream, *kind)),
                _ => None,
            })
            .collect();
        assert_eq!(given, [(1, Kind::Extract), (0, Kind::Fetch)], "the page goes past what waits for the other node");
        // The only one that takes it is not alive any more: after a while it is done without.
        out.clear();
        roster.members(SECOND, members(&[("old", both[0].1)]), &mut out);
        roster.look(SECOND + PATIENCE, &mut out);
        let nobody = |effect: &&Effect| matches!(effect, Effect::Ended { ended: Ended::Nobody, .. });
        assert_eq!(out.iter().filter(nobody).count(), 2, "{out:?}");
    }

    #[test]
    fn no_more_nodes_are_busy_than_may_be_and_the_same_ones_go_on() {
        let mut out = Vec::new();
        let (mut roster, _) = roster(6, 2);
        roster.max_nodes = 2;
        let mut used = BTreeSet::new();
        for round in 0..20 {
            for number in 0..5 {
                roster.submit(SECOND, Ticket(round * 10 + number), fetch(), &mut out);
            }
            loop {
                let now = given(&mut out);
                if now.is_empty() {
                    break;
                }
                let busy = roster.nodes.values().filter(|node| !node.under_way.is_empty()).count();
                assert!(busy <= 2, "{busy}");
                for (stream, attempt) in now {
                    used.insert(stream);
                    roster.result(SECOND, stream, attempt, Ok(answer()), &mut out);
                }
            }
            assert!(roster.work.is_empty() && roster.waiting.is_empty());
        }
        assert!(used.len() >= 2);
    }

    #[test]
    fn without_nodes_it_is_said_at_once_and_what_is_too_slow_moves_on_but_not_for_ever() {
        let mut roster = Roster::new(10, 30 * SECOND, true);
        let mut out = Vec::new();
        roster.submit(SECOND, Ticket(1), fetch(), &mut out);
        assert!(matches!(out[..], [Effect::Ended { ticket: Ticket(1), ended: Ended::Nobody }]));
        out.clear();
        let (mut roster, mut out) = self::roster(1, 1);
        roster.submit(SECOND, Ticket(2), fetch(), &mut out);
        let mut now = SECOND;
        let mut attempts = given(&mut out).len();
        let ended = loop {
            now += 31 * SECOND;
            roster.look(now, &mut out);
            if let Some(Effect::Ended { ended, .. }) = out.iter().find(|effect| matches!(effect, Effect::Ended { .. }))
            {
                break format!("{ended:?}");
            }
            attempts += given(&mut out).len();
        };
        assert_eq!(attempts, MOST_ATTEMPTS as usize);
        assert!(ended.contains("5 nodes"), "{ended}");
    }

    proptest! {
        /// Whatever comes and goes: each piece of work ends once, nothing is lost, and nodes that stay get equal numbers.
        #[test]
        fn work_ends_once_whatever_happens(steps in proptest::collection::vec((0_u8..12, 0_u64..8), 1..400)) {
            let (mut roster, mut out) = roster(8, 3);
            let mut stream_of: Vec<u64> = (0..8).collect();
            let (mut next_stream, mut next_ticket) = (100, 0);
            let mut open: BTreeSet<(u64, u64)> = BTreeSet::new();
            let mut ended: BTreeMap<u64, u32> = BTreeMap::new();
            let mut now = SECOND;
            let mut settle = |out: &mut Vec<Effect>, open: &mut BTreeSet<(u64, u64)>| {
                for effect in out.drain(..) {
                    match effect {
                        Effect::Give { stream, attempt, .. } => { open.insert((stream, attempt)); }
                        Effect::Ended { ticket, .. } => *ended.entry(ticket.0).or_default() += 1,
                        Effect::Void { .. } | Effect::Late => {}
                    }
                }
            };
            for (step, which) in steps {
                now += SECOND / 10;
                match step {
                    0..=4 => {
                        roster.submit(now, Ticket(next_ticket), fetch(), &mut out);
                        next_ticket += 1;
                    }
                    5..=8 => {
                        // Results also of attempts that are void by now.
                        if let Some(key) = open.pop_first() {
                            roster.result(now, key.0, key.1, Ok(answer()), &mut out);
                        }
                    }
                    9 => roster.leave(now, stream_of[which as usize], &mut out),
                    10 => {
                        stream_of[which as usize] = next_stream;
                        roster.join(now, &format!("n{which}"), next_stream, (all_kinds(), 3), &mut out);
                        next_stream += 1;
                    }
                    _ => roster.look(now, &mut out),
                }
                settle(&mut out, &mut open);
                for node in roster.nodes.values() {
                    prop_assert!(node.under_way.len() <= 3);
                }
            }
            while let Some(key) = open.pop_first() {
                roster.result(now, key.0, key.1, Ok(answer()), &mut out);
                settle(&mut out, &mut open);
            }
            prop_assert!(roster.work.is_empty() && roster.waiting.is_empty(), "{roster:?}");
            prop_assert_eq!(ended.len() as u64, next_ticket);
            prop_assert!(ended.values().all(|times| *times == 1));
        }
    }
}
