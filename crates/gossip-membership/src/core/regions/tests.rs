//! Two regions of real engines, with a wide-area link between them that is slow, and cut now and then.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::core::{Cause, Core, Event, Record, Settings, Signer, Untrusted};

struct Paper;

impl Signer for Paper {
    fn sign(&mut self, record: Record) -> SignedRecord {
        SignedRecord::new(record, [0; 64], Arc::from(*b"-"))
    }
}

impl Verifier for Paper {
    fn check(&mut self, _: &SignedRecord) -> Result<(), Untrusted> {
        Ok(())
    }
}

enum Happens {
    Input(usize, Input),
    Timer(usize),
    /// The answer to a stream comes back to the one who asked.
    Reply(usize, u32, Outcome),
}

struct World {
    now: Time,
    next: u64,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    stored: BTreeMap<u64, Happens>,
    nodes: Vec<Option<Regional<Core>>>,
    addrs: Vec<SocketAddr>,
    keys: Vec<NodeKey>,
    regions: Vec<&'static str>,
    calls: BTreeMap<u64, (usize, u32)>,
    cut: bool,
    events: Vec<(Time, usize, Event)>,
    crossed: usize,
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl World {
    fn new(sizes: [usize; 2]) -> Self {
        let mut world = Self {
            now: Time(1_000_000),
            next: 0,
            queue: BinaryHeap::new(),
            stored: BTreeMap::new(),
            nodes: Vec::new(),
            addrs: Vec::new(),
            keys: Vec::new(),
            regions: Vec::new(),
            calls: BTreeMap::new(),
            cut: false,
            events: Vec::new(),
            crossed: 0,
        };
        for (region, size) in ["east", "west"].into_iter().zip(sizes) {
            for _ in 0..size {
                world.start(region);
            }
        }
        world
    }

    fn start(&mut self, region: &'static str) {
        let index = self.nodes.len();
        let addr = SocketAddr::from(([10, 0, 0, index as u8 + 1], 7946));
        let record = Record {
            node_id: format!("s/{index}"),
            boot: 1,
            incarnation: 1,
            addr,
            rpc_port: 1,
            protocol: 1,
            region: region.to_owned(),
            capabilities: BTreeMap::new(),
            labels: BTreeMap::new(),
            dh_public: [0; 32],
            leaving: false,
            timestamp_us: 0,
        };
        // All know only the very first node, which is in the one region.
        let seeds = if index == 0 { Vec::new() } else { vec![SocketAddr::from(([10, 0, 0, 1], 7946))] };
        let settings = Settings::default();
        let timing = WideTiming::new(settings.gossip_interval, settings.dead_node_timeout);
        self.keys.push(record.key());
        self.addrs.push(addr);
        self.regions.push(region);
        let core =
            Core::new(self.now, settings, record, seeds, Box::new(Paper), Box::new(Paper), index as u64).unwrap();
        self.nodes.push(Some(Regional::new(core, timing, Box::new(Paper), index as u64)));
        self.later(Duration::ZERO, Happens::Timer(index));
    }

    fn later(&mut self, span: Duration, what: Happens) {
        self.next += 1;
        self.stored.insert(self.next, what);
        self.queue.push(Reverse((self.now + span, self.next)));
    }

    fn way(&self, from: usize, to: usize) -> Option<Duration> {
        match self.regions[from] == self.regions[to] {
            true => Some(ms(1)),
            false if self.cut => None,
            false => Some(ms(100)),
        }
    }

    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse((time, id))) = self.queue.peek().copied() {
            if time > end {
                break;
            }
            self.queue.pop();
            self.now = time;
            match self.stored.remove(&id) {
                Some(Happens::Timer(index))
                    if self.nodes[index].as_ref().is_some_and(|node| node.deadline() <= time) =>
                {
                    self.input(index, Input::Timer);
                }
                Some(Happens::Input(index, input)) => self.input(index, input),
                Some(Happens::Reply(index, id, outcome)) => self.input(index, Input::StreamEnded { id, outcome }),
                Some(Happens::Timer(_)) | None => {}
            }
        }
        self.now = end;
    }

    fn input(&mut self, index: usize, input: Input) {
        let Some(node) = &mut self.nodes[index] else { return };
        let mut out = Vec::new();
        node.handle(self.now, input, &mut out);
        let due = node.deadline().since(self.now);
        self.later(due.min(Duration::from_secs(100)), Happens::Timer(index));
        for effect in out {
            self.effect(index, effect);
        }
    }

    fn effect(&mut self, index: usize, effect: Effect) {
        let find = |world: &Self, key: NodeKey| world.keys.iter().position(|known| *known == key).unwrap();
        match effect {
            Effect::Send { to, message } => {
                let to = find(self, to);
                self.crossed += usize::from(self.regions[index] != self.regions[to]);
                if let Some(way) = self.way(index, to) {
                    let from = self.keys[index];
                    self.later(way, Happens::Input(to, Input::Datagram { from, message }));
                }
            }
            Effect::Hello { addr } => {
                let Some(to) = self.addrs.iter().position(|known| *known == addr) else { return };
                let (Some(way), Some(other), Some(me)) = (self.way(index, to), &self.nodes[to], &self.nodes[index])
                else {
                    return;
                };
                let (theirs, mine) = (other.local().clone(), me.local().clone());
                self.later(way * 2, Happens::Input(index, Input::Contact { record: theirs }));
                self.later(way * 3, Happens::Input(to, Input::Contact { record: mine }));
            }
            Effect::Stream { id, to, request } => {
                let to = find(self, to);
                let outcome = match (self.way(index, to), &self.nodes[to]) {
                    (Some(_), None) => Outcome::Refused,
                    (None, _) => Outcome::Silent,
                    (Some(way), Some(_)) => {
                        let call = self.next;
                        self.calls.insert(call, (index, id));
                        let from = self.keys[index];
                        self.later(way * 2, Happens::Input(to, Input::StreamAsked { id: call, from, request }));
                        return;
                    }
                };
                self.later(ms(400), Happens::Reply(index, id, outcome));
            }
            Effect::Reply { id, reply } => {
                let (to, stream) = self.calls[&id];
                let outcome = match reply {
                    Reply::Pulled(answer) => Outcome::Pulled(answer),
                    Reply::Pushed => Outcome::Pushed,
                    Reply::Pong => Outcome::Pong,
                };
                match self.way(index, to) {
                    Some(way) => self.later(way, Happens::Reply(to, stream, outcome)),
                    None => self.later(ms(400), Happens::Reply(to, stream, Outcome::Silent)),
                }
            }
            Effect::Event(event) => self.events.push((self.now, index, event)),
            _ => {}
        }
    }

    /// How many of all others each running node sees alive.
    fn alive_seen(&self) -> Vec<usize> {
        let alive = |node: &Regional<Core>| node.members().filter(|member| member.state == State::Alive).count();
        self.nodes.iter().flatten().map(alive).collect()
    }

    /// When each node missed that one.
    fn missed(&self, gone: usize, since: Time) -> BTreeMap<usize, Duration> {
        let lost = |event: &Event| matches!(event, Event::Left { record, cause: Cause::Dead } if record.key == self.keys[gone]);
        let told = self.events.iter().filter(|(time, _, event)| *time >= since && lost(event));
        told.map(|(time, index, _)| (*index, time.since(since))).collect()
    }
}

#[test]
fn all_see_all_and_only_gateways_cross_the_border() {
    let mut world = World::new([7, 6]);
    world.run(Duration::from_secs(15));
    assert_eq!(world.alive_seen(), vec![12; 13]);
    assert_eq!(world.crossed, 0, "no datagram crosses");
    let gateways: Vec<Vec<NodeKey>> = world.nodes.iter().flatten().map(Regional::gateways).collect();
    assert!(gateways[..7].iter().all(|others| *others == gateways[0] && others.len() == 3));
    assert!(gateways[7..].iter().all(|others| *others == gateways[7]));

    // The most telling victim: the first gateway, which tells the others.
    let gone = world.keys.iter().position(|key| *key == gateways[0][0]).unwrap();
    world.nodes[gone] = None;
    let since = world.now;
    world.run(Duration::from_secs(15));
    let missed = world.missed(gone, since);
    assert_eq!(missed.len(), 12, "{missed:?}");
    let worst =
        |region: &str| missed.iter().filter(|(index, _)| world.regions[**index] == region).map(|(_, time)| *time).max();
    let (near, far) = (worst("east").unwrap(), worst("west").unwrap());
    assert!(near < Duration::from_secs(6), "{near:?}");
    assert!(far < near + Duration::from_secs(8), "{near:?} {far:?}");
    let others = world.events.iter().filter(|(time, _, event)| *time >= since && matches!(event, Event::Left { .. }));
    assert_eq!(others.count(), 12, "nobody else was missed");
}

#[test]
fn a_link_that_is_cut_makes_the_other_region_suspect_and_no_more() {
    let mut world = World::new([4, 3]);
    world.run(Duration::from_secs(12));
    world.cut = true;
    let since = world.now;
    world.run(Duration::from_secs(25));
    assert_eq!(world.alive_seen(), [3, 3, 3, 3, 2, 2, 2], "nothing is placed over there");
    world.cut = false;
    world.run(Duration::from_secs(10));
    assert_eq!(world.alive_seen(), vec![6; 7], "healed within 10 s");
    let lost = world.events.iter().filter(|(time, _, event)| *time >= since && matches!(event, Event::Left { .. }));
    assert_eq!(lost.count(), 0);

    world.cut = true;
    world.run(Duration::from_secs(90));
    let seen: Vec<usize> = world.nodes.iter().flatten().map(|node| node.members().count()).collect();
    assert_eq!(seen, [3, 3, 3, 3, 2, 2, 2], "forgotten in the end");
}
