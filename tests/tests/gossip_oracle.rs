//! foca as an oracle: an independent implementation of the same family of protocols gets the same scenario, a join and kills
//! without loss. In the end both must agree about who is there.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::{Buf, BufMut};
use drover_e2e::gossip::network::Weather;
use drover_e2e::gossip::scenario::cluster;
use drover_e2e::gossip::world::End;
use drover_membership::core::Settings;
use foca::{
    Codec, Config, Foca, Header, Identity, Incarnation, Member, Message, NoCustomBroadcast, Notification, Runtime,
    State, Timer,
};
use foca_rand::SeedableRng;
use foca_rand::rngs::SmallRng;

/// A node, by its number. One that was given up comes back under the next generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Id {
    node: u16,
    generation: u16,
}

impl Identity for Id {
    type Addr = u16;

    fn renew(&self) -> Option<Self> {
        Some(Self { generation: self.generation + 1, ..*self })
    }

    fn addr(&self) -> u16 {
        self.node
    }

    fn win_addr_conflict(&self, other: &Self) -> bool {
        self.generation > other.generation
    }
}

/// Bytes of its messages; nobody else reads them.
struct Bytes;

#[derive(Debug)]
struct Short;

impl std::error::Error for Short {}

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("too few bytes")
    }
}

fn put_id(id: Id, buf: &mut impl BufMut) {
    buf.put_u16(id.node);
    buf.put_u16(id.generation);
}

fn get_id(buf: &mut impl Buf) -> Result<Id, Short> {
    if buf.remaining() < 4 {
        return Err(Short);
    }
    Ok(Id { node: buf.get_u16(), generation: buf.get_u16() })
}

impl Codec<Id> for Bytes {
    type Error = Short;

    fn encode_header(&mut self, header: &Header<Id>, mut buf: impl BufMut) -> Result<(), Short> {
        if buf.remaining_mut() < 16 {
            return Err(Short);
        }
        put_id(header.src, &mut buf);
        buf.put_u16(header.src_incarnation);
        put_id(header.dst, &mut buf);
        let none = header.src;
        let (tag, number, id) = match header.message {
            Message::Ping(number) => (0, number, none),
            Message::Ack(number) => (1, number, none),
            Message::PingReq { target, probe_number } => (2, probe_number, target),
            Message::IndirectPing { origin, probe_number } => (3, probe_number, origin),
            Message::IndirectAck { target, probe_number } => (4, probe_number, target),
            Message::ForwardedAck { origin, probe_number } => (5, probe_number, origin),
            Message::Announce => (6, 0, none),
            Message::Feed => (7, 0, none),
            Message::Gossip => (8, 0, none),
            Message::Broadcast => (9, 0, none),
            Message::TurnUndead => (10, 0, none),
        };
        buf.put_u8(tag);
        buf.put_u8(number);
        put_id(id, &mut buf);
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Id>, Short> {
        if buf.remaining() < 16 {
            return Err(Short);
        }
        let src = get_id(&mut buf)?;
        let src_incarnation: Incarnation = buf.get_u16();
        let dst = get_id(&mut buf)?;
        let (tag, probe_number) = (buf.get_u8(), buf.get_u8());
        let id = get_id(&mut buf)?;
        let message = match tag {
            0 => Message::Ping(probe_number),
            1 => Message::Ack(probe_number),
            2 => Message::PingReq { target: id, probe_number },
            3 => Message::IndirectPing { origin: id, probe_number },
            4 => Message::IndirectAck { target: id, probe_number },
            5 => Message::ForwardedAck { origin: id, probe_number },
            6 => Message::Announce,
            7 => Message::Feed,
            8 => Message::Gossip,
            9 => Message::Broadcast,
            _ => Message::TurnUndead,
        };
        Ok(Header { src, src_incarnation, dst, message })
    }

    fn encode_member(&mut self, member: &Member<Id>, mut buf: impl BufMut) -> Result<(), Short> {
        if buf.remaining_mut() < 7 {
            return Err(Short);
        }
        put_id(*member.id(), &mut buf);
        buf.put_u16(member.incarnation());
        buf.put_u8(match member.state() {
            State::Alive => 0,
            State::Suspect => 1,
            State::Down => 2,
        });
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Id>, Short> {
        if buf.remaining() < 7 {
            return Err(Short);
        }
        let id = get_id(&mut buf)?;
        let incarnation = buf.get_u16();
        let state = match buf.get_u8() {
            0 => State::Alive,
            1 => State::Suspect,
            _ => State::Down,
        };
        Ok(Member::new(id, incarnation, state))
    }
}

/// What a node wants done, in order.
#[derive(Default)]
struct Wishes {
    sends: Vec<(Id, Vec<u8>)>,
    timers: Vec<(Timer<Id>, Duration)>,
}

impl Runtime<Id> for &mut Wishes {
    fn notify(&mut self, _: Notification<'_, Id>) {}

    fn send_to(&mut self, to: Id, data: &[u8]) {
        self.sends.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, timer: Timer<Id>, after: Duration) {
        self.timers.push((timer, after));
    }
}

enum Happening {
    Data(Vec<u8>),
    Timer(Timer<Id>),
}

/// Virtual time for foca: the same delay for everybody, no loss.
struct Rival {
    now: Duration,
    nodes: Vec<Option<Foca<Id, Bytes, SmallRng, NoCustomBroadcast>>>,
    queue: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    happenings: Vec<Option<Happening>>,
}

impl Rival {
    fn new(seed: u64, nodes: u16) -> Self {
        let size = NonZeroU32::new(u32::from(nodes)).unwrap();
        let start = |node| {
            let rng = SmallRng::seed_from_u64(seed ^ u64::from(node) << 20);
            Some(Foca::new(Id { node, generation: 0 }, Config::new_lan(size), rng, Bytes))
        };
        let nodes_started = (0..nodes).map(start).collect();
        let mut rival =
            Self { now: Duration::ZERO, nodes: nodes_started, queue: BinaryHeap::new(), happenings: Vec::new() };
        for node in 1..usize::from(nodes) {
            rival.act(node, |foca, wishes| foca.announce(Id { node: 0, generation: 0 }, wishes).unwrap());
        }
        rival
    }

    fn act(&mut self, node: usize, act: impl FnOnce(&mut Foca<Id, Bytes, SmallRng, NoCustomBroadcast>, &mut Wishes)) {
        let mut wishes = Wishes::default();
        let Some(foca) = self.nodes[node].as_mut() else { return };
        act(foca, &mut wishes);
        for (to, data) in wishes.sends {
            self.schedule(Duration::from_micros(600), usize::from(to.node), Happening::Data(data));
        }
        for (timer, after) in wishes.timers {
            self.schedule(after, node, Happening::Timer(timer));
        }
    }

    fn schedule(&mut self, after: Duration, node: usize, what: Happening) {
        let number = self.happenings.len() as u64;
        self.happenings.push(Some(what));
        self.queue.push(Reverse((self.now + after, number, node)));
    }

    fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse((at, number, node))) = self.queue.peek().copied()
            && at <= end
        {
            self.queue.pop();
            self.now = at;
            match self.happenings[number as usize].take() {
                // What it refuses is its own affair, for instance data of one whom it has given up.
                Some(Happening::Data(data)) => self.act(node, |foca, wishes| drop(foca.handle_data(&data, wishes))),
                Some(Happening::Timer(timer)) => self.act(node, |foca, wishes| drop(foca.handle_timer(timer, wishes))),
                None => {}
            }
        }
        self.now = end;
    }

    fn view(&self, node: usize) -> Option<BTreeSet<usize>> {
        let foca = self.nodes[node].as_ref()?;
        Some(foca.iter_members().map(|member| usize::from(member.id().node)).collect())
    }
}

#[test]
fn foca_and_the_core_agree_about_who_is_there_after_a_join_and_kills() {
    for (seed, nodes, victims) in [(1, 5, vec![2]), (2, 12, vec![3, 7]), (3, 30, vec![4, 11, 12, 29])] {
        let mut ours = cluster(seed, nodes, Weather::default(), Settings::default());
        let mut theirs = Rival::new(seed, nodes as u16);
        // Its discovery is slow, and it settles what its gossip missed only by the next announce.
        ours.run_for(Duration::from_mins(1));
        theirs.run_for(Duration::from_mins(1));
        let all: BTreeSet<usize> = (0..nodes).collect();
        for node in 0..nodes {
            let others: BTreeSet<usize> = all.iter().copied().filter(|other| *other != node).collect();
            assert_eq!(theirs.view(node).unwrap(), others, "seed {seed}: foca's node {node} before the kills");
            assert_eq!(ours.judge.view(node).into_iter().collect::<BTreeSet<_>>(), others, "seed {seed}: node {node}");
        }
        for victim in victims {
            ours.kill(victim, End::Host, Duration::from_secs(30));
            theirs.nodes[victim] = None;
        }
        ours.run_for(Duration::from_mins(2));
        theirs.run_for(Duration::from_mins(2));
        for node in ours.alive() {
            let mine: BTreeSet<usize> = ours.judge.view(node).into_iter().collect();
            assert_eq!(mine, theirs.view(node).unwrap(), "seed {seed}: node {node}");
        }
        assert_eq!(ours.judge.verdict().broken, Vec::<String>::new());
    }
}
