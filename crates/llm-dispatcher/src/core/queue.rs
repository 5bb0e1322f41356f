//! A queue that is fair between clients by weight, and between priorities within a client.
//!
//! Start-time fair queueing: every client has a tag, the virtual time at which its next task begins. The lowest tag is served,
//! its tag grows by one over its weight, and the virtual time is the tag served last. A client that comes new, or back, starts
//! at the virtual time: it neither waits behind what others have piled up nor gets back what it did not use. The same rule,
//! one level down, shares a client's turn between its priorities. Push and pop cost the logarithm of the number of clients.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::ids::IdMap;
use super::task::{ClientId, Priority};

/// One task of weight one, in virtual time.
pub(super) const UNIT: u64 = 1 << 20;

/// After so many tasks with a deadline in a row, one without goes.
const URGENT_RUN: u32 = 8;

/// Items of many clients, handed out fairly. Items that nobody wants any more stay in their place until they come to its head,
/// where the caller says that they are dead.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// What was served once and came back: it goes before all others, and is not counted again.
    returned: VecDeque<T>,
    flows: IdMap<ClientId, Flow<T>>,
    /// Clients that have something here, by tag.
    order: BTreeSet<(u64, ClientId)>,
    /// Clients that have nothing here but whose tag still counts, because it lies ahead of the virtual time.
    resting: BTreeSet<(u64, ClientId)>,
    virtual_time: u64,
    /// Sum of the weights of clients in `order`.
    weights: u64,
    /// Items that are wanted, those that came back included.
    live: usize,
}

#[derive(Debug)]
struct Flow<T> {
    tag: u64,
    weight: u32,
    lines: [Line<T>; 3],
    /// Virtual time between the priorities.
    virtual_time: u64,
}

#[derive(Debug)]
struct Line<T> {
    tag: u64,
    /// Those with a deadline, the earliest first.
    urgent: BTreeMap<(Duration, u64), T>,
    /// Those without, in their order.
    plain: VecDeque<T>,
    urgent_run: u32,
    next: u64,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { tag: 0, urgent: BTreeMap::new(), plain: VecDeque::new(), urgent_run: 0, next: 0 }
    }
}

impl<T> Line<T> {
    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.plain.is_empty()
    }

    fn plain_is_due(&self) -> bool {
        self.urgent.is_empty() || (self.urgent_run >= URGENT_RUN && !self.plain.is_empty())
    }

    fn head(&self) -> Option<&T> {
        if self.plain_is_due() { self.plain.front() } else { self.urgent.first_key_value().map(|(_, item)| item) }
    }

    fn pop(&mut self) -> Option<T> {
        if self.plain_is_due() {
            self.urgent_run = 0;
            let item = self.plain.pop_front();
            if self.plain.is_empty() {
                self.plain = VecDeque::new();
            }
            return item;
        }
        self.urgent_run += 1;
        self.urgent.pop_first().map(|(_, item)| item)
    }
}

impl<T> Flow<T> {
    fn is_empty(&self) -> bool {
        self.lines.iter().all(Line::is_empty)
    }

    /// Which priority is served next.
    fn turn(&self) -> Option<usize> {
        (0..self.lines.len())
            .rev()
            .filter(|&index| !self.lines[index].is_empty())
            .min_by_key(|&index| self.lines[index].tag)
    }
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            returned: VecDeque::new(),
            flows: IdMap::default(),
            order: BTreeSet::new(),
            resting: BTreeSet::new(),
            virtual_time: 0,
            weights: 0,
            live: 0,
        }
    }
}

impl<T> FairQueue<T> {
    /// How many items are here and wanted.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Nothing is here that is wanted.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Puts an item at the end of its client's line, or among those with a deadline.
    pub fn push(&mut self, client: ClientId, weight: u32, priority: Priority, deadline: Option<Duration>, item: T) {
        self.live += 1;
        let weight = weight.max(1);
        let start = self.virtual_time;
        let flow = self.flows.entry(client).or_insert_with(|| Flow {
            tag: start,
            weight,
            lines: std::array::from_fn(|_| Line::default()),
            virtual_time: 0,
        });
        let was_empty = flow.is_empty();
        if was_empty {
            self.resting.remove(&(flow.tag, client));
            flow.tag = flow.tag.max(start);
            self.order.insert((flow.tag, client));
            self.weights += u64::from(weight);
        } else {
            self.weights = self.weights - u64::from(flow.weight) + u64::from(weight);
        }
        flow.weight = weight;
        let line = &mut flow.lines[priority as usize];
        if line.is_empty() {
            line.tag = line.tag.max(flow.virtual_time);
        }
        match deadline {
            Some(deadline) => {
                line.urgent.insert((deadline, line.next), item);
                line.next += 1;
            }
            None => line.plain.push_back(item),
        }
    }

    /// Puts back what was handed out: it goes first.
    pub fn push_returned(&mut self, item: T) {
        self.live += 1;
        self.returned.push_back(item);
    }

    /// Says that one item which is still here is not wanted any more.
    pub fn forget_one(&mut self) {
        self.live = self.live.saturating_sub(1);
    }

    /// The item that goes next, when there is a wanted one, and what decides when its client goes; `None` for what came back,
    /// which goes at once.
    pub fn head(&mut self, alive: impl Fn(&T) -> bool) -> Option<(&T, Option<ClientId>)> {
        while self.returned.front().is_some_and(|item| !alive(item)) {
            self.returned.pop_front();
        }
        if self.returned.is_empty() {
            self.returned.shrink_to(64);
            loop {
                let &(_, client) = self.order.first()?;
                let flow = self.flows.get_mut(&client)?;
                let Some(turn) = flow.turn() else {
                    self.rest(client);
                    continue;
                };
                if flow.lines[turn].head().is_some_and(&alive) {
                    break;
                }
                flow.lines[turn].pop();
                if flow.is_empty() {
                    self.rest(client);
                }
            }
            let &(_, client) = self.order.first()?;
            let flow = self.flows.get(&client)?;
            return Some((flow.lines[flow.turn()?].head()?, Some(client)));
        }
        self.returned.front().map(|item| (item, None))
    }

    /// Hands out what [`Self::head`] showed.
    pub fn pop(&mut self) -> Option<T> {
        if let Some(item) = self.returned.pop_front() {
            self.live = self.live.saturating_sub(1);
            return Some(item);
        }
        let &(tag, client) = self.order.first()?;
        let flow = self.flows.get_mut(&client)?;
        let turn = flow.turn()?;
        let item = flow.lines[turn].pop()?;
        self.live = self.live.saturating_sub(1);
        flow.virtual_time = flow.lines[turn].tag;
        flow.lines[turn].tag += UNIT / u64::from(Priority::ALL[turn].weight());
        self.order.remove(&(tag, client));
        self.virtual_time = self.virtual_time.max(tag);
        flow.tag = tag + (UNIT / u64::from(flow.weight)).max(1);
        if flow.is_empty() {
            self.weights -= u64::from(flow.weight);
            self.resting.insert((flow.tag, client));
        } else {
            self.order.insert((flow.tag, client));
        }
        self.forget_rested();
        Some(item)
    }

    /// How many items are probably served before one that this client puts in now.
    pub fn ahead(&self, client: ClientId, weight: u32, priority: Priority, urgent: bool) -> usize {
        let flow = self.flows.get(&client);
        let own = flow.map_or(0, |flow| {
            let higher = flow.lines.iter().skip(priority as usize + 1);
            let higher: usize = higher.map(|line| line.plain.len() + line.urgent.len()).sum();
            let line = &flow.lines[priority as usize];
            higher + line.urgent.len() + if urgent { line.urgent.len() / URGENT_RUN as usize } else { line.plain.len() }
        });
        let weight = u64::from(weight.max(1));
        let own_weight = flow.filter(|flow| !flow.is_empty()).map_or(0, |flow| u64::from(flow.weight));
        let others = self.weights.saturating_sub(own_weight);
        // While this client is served once more than `own` times, the others are served in proportion to their weights.
        let between = ((own as u64 + 1) * others).div_ceil(weight) as usize;
        (self.returned.len() + own + between).min(self.live)
    }

    fn rest(&mut self, client: ClientId) {
        if let Some(flow) = self.flows.get(&client)
            && self.order.remove(&(flow.tag, client))
        {
            self.weights -= u64::from(flow.weight);
            self.resting.insert((flow.tag, client));
        }
        self.forget_rested();
    }

    /// A tag that the virtual time has passed says nothing any more.
    fn forget_rested(&mut self) {
        while let Some(&(tag, client)) = self.resting.first()
            && (tag <= self.virtual_time || self.order.is_empty())
        {
            self.resting.pop_first();
            self.flows.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(queue: &mut FairQueue<u64>, count: usize) -> Vec<u64> {
        let mut served = Vec::new();
        for _ in 0..count {
            if queue.head(|_| true).is_none() {
                break;
            }
            served.extend(queue.pop());
        }
        served
    }

    #[test]
    fn a_client_that_comes_later_goes_next() {
        let mut queue = FairQueue::default();
        for item in 0..10_000 {
            queue.push(ClientId(1), 1, Priority::Normal, None, item);
        }
        serve(&mut queue, 5000);
        queue.push(ClientId(2), 1, Priority::Normal, None, 77_777);
        assert!(queue.ahead(ClientId(3), 1, Priority::Normal, false) <= 2);
        assert!(serve(&mut queue, 2).contains(&77_777));
    }

    #[test]
    fn shares_are_as_the_weights() {
        let mut queue = FairQueue::default();
        for client in 1..=50 {
            for _ in 0..5000 {
                queue.push(ClientId(client), client as u32, Priority::Normal, None, client);
            }
        }
        let total: u64 = (1..=50).sum();
        let served = serve(&mut queue, 10 * total as usize);
        for client in 1..=50 {
            let count = served.iter().filter(|&&item| item == client).count() as u64;
            assert!(count.abs_diff(10 * client) <= 1, "client {client} of weight {client} got {count}");
        }
    }

    #[test]
    fn coming_one_at_a_time_gains_nothing() {
        let mut queue = FairQueue::default();
        for item in 0..1000 {
            queue.push(ClientId(1), 1, Priority::Normal, None, item);
        }
        let mut mine = 0;
        for _ in 0..100 {
            queue.push(ClientId(2), 1, Priority::Normal, None, 9999);
            for item in serve(&mut queue, 1) {
                mine += u32::from(item == 9999);
            }
        }
        assert!((49..=51).contains(&mine), "{mine} of 100 turns");
    }

    #[test]
    fn priorities_share_a_turn_and_none_starves() {
        let mut queue = FairQueue::default();
        for (priority, item) in [(Priority::Low, 0), (Priority::Normal, 1), (Priority::High, 2)] {
            for _ in 0..1000 {
                queue.push(ClientId(1), 1, priority, None, item);
            }
        }
        let served = serve(&mut queue, 210);
        let count = |wanted| served.iter().filter(|&&item| item == wanted).count();
        assert_eq!(served[0], 2);
        assert!(
            (9..=11).contains(&count(0)) && (39..=41).contains(&count(1)),
            "{} {} {}",
            count(0),
            count(1),
            count(2)
        );
    }

    #[test]
    fn the_earliest_deadline_goes_first_and_those_without_are_not_forgotten() {
        let mut queue = FairQueue::default();
        queue.push(ClientId(1), 1, Priority::Normal, None, 1000);
        for seconds in (1..=20).rev() {
            queue.push(ClientId(1), 1, Priority::Normal, Some(Duration::from_secs(seconds)), seconds);
        }
        let served = serve(&mut queue, 21);
        assert_eq!(served[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(served[8], 1000);
        assert_eq!(served[20], 20);
    }

    #[test]
    fn dead_items_are_passed_over_and_nothing_stays_of_clients_that_are_gone() {
        let mut queue = FairQueue::default();
        for client in 0..1000 {
            queue.push(ClientId(client), 1, Priority::Normal, None, client);
            queue.push(ClientId(client), 1, Priority::Normal, None, client + 10_000);
        }
        let mut seen = 0;
        while queue.head(|item| item % 2 == 0).is_some() {
            assert_eq!(queue.pop().map(|item| item % 2), Some(0));
            seen += 1;
        }
        assert_eq!(seen, 1000);
        assert!(queue.flows.is_empty() && queue.order.is_empty() && queue.resting.is_empty() && queue.weights == 0);
    }
}
