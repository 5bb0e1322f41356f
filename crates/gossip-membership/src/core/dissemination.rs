//! News and how often it has been told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::effect::Effect;
use super::engine::Core;
use super::message::{MAX_RUMORS, Message, Rumor};
use super::record::{NodeKey, SignedRecord};
use super::settings::Settings;
use super::time::Time;

/// What makes two rumours the same piece of news. Accusations by different accusers are different: they confirm each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Alive,
    Suspect(NodeKey),
    Dead,
}

/// Order in which rumours are told: urgent first, then those told least, then the newest.
type Rank = (bool, u16, u64);

#[derive(Debug, Default)]
pub(super) struct Rumors {
    queue: BTreeMap<Rank, Rumor>,
    index: BTreeMap<(NodeKey, Tag), Rank>,
    counter: u64,
}

impl Rumors {
    /// Most that wait; the least useful are dropped, and the exchange of state makes up for them.
    const MOST: usize = 2048;

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// A backlog that one datagram does not hold.
    fn is_long(&self) -> bool {
        self.queue.len() > 2
    }

    pub(super) fn push(&mut self, rumor: Rumor, urgent: bool) {
        let subject = rumor.subject();
        let tag = match &rumor {
            Rumor::Alive { .. } => Tag::Alive,
            Rumor::Suspect(accusation) => Tag::Suspect(accusation.accuser),
            Rumor::Dead(_) => Tag::Dead,
        };
        if matches!(tag, Tag::Suspect(_)) {
            self.remove(subject, tag);
        } else {
            // A newer claim and a verdict make everything said before about the node pointless.
            self.forget(subject);
        }
        self.counter += 1;
        let rank = (!urgent, 0, u64::MAX - self.counter);
        self.queue.insert(rank, rumor);
        self.index.insert((subject, tag), rank);
        if self.queue.len() > Self::MOST
            && let Some((_, rumor)) = self.queue.pop_last()
        {
            self.unindex(&rumor);
        }
    }

    /// Nothing more is told about a node.
    pub(super) fn forget(&mut self, subject: NodeKey) {
        let all = (subject, Tag::Alive)..=(subject, Tag::Dead);
        let tags: Vec<Tag> = self.index.range(all).map(|((_, tag), _)| *tag).collect();
        for tag in tags {
            self.remove(subject, tag);
        }
    }

    fn remove(&mut self, subject: NodeKey, tag: Tag) {
        if let Some(rank) = self.index.remove(&(subject, tag)) {
            self.queue.remove(&rank);
        }
    }

    fn unindex(&mut self, rumor: &Rumor) {
        let tag = match rumor {
            Rumor::Alive { .. } => Tag::Alive,
            Rumor::Suspect(accusation) => Tag::Suspect(accusation.accuser),
            Rumor::Dead(_) => Tag::Dead,
        };
        self.index.remove(&(rumor.subject(), tag));
    }

    /// Adds what fits to `chosen`, and counts it as told; what has been told to `limit` nodes is dropped.
    pub(super) fn fill(&mut self, chosen: &mut Vec<Rumor>, payload: usize, limit: u16) {
        let mut room = payload.saturating_sub(chosen.iter().map(Rumor::size).sum());
        let mut told: Vec<Rank> = Vec::new();
        // Looks a little further than the first that does not fit, but never through a long queue.
        for (rank, rumor) in self.queue.iter().take(2 * MAX_RUMORS) {
            if chosen.len() + told.len() >= MAX_RUMORS {
                break;
            }
            let size = rumor.size();
            if size > room || chosen.iter().any(|other| other == rumor) {
                continue;
            }
            room -= size;
            told.push(*rank);
        }
        for rank in told {
            let Some(rumor) = self.queue.remove(&rank) else { continue };
            chosen.push(rumor.clone());
            // What is not urgent is told to fewer: the exchange of state finds whoever it misses.
            let next = (rank.0, rank.1 + if rank.0 { 3 } else { 1 }, rank.2);
            if next.1 >= limit {
                self.unindex(&rumor);
            } else {
                let tag = match &rumor {
                    Rumor::Alive { .. } => Tag::Alive,
                    Rumor::Suspect(accusation) => Tag::Suspect(accusation.accuser),
                    Rumor::Dead(_) => Tag::Dead,
                };
                self.index.insert((rumor.subject(), tag), next);
                self.queue.insert(next, rumor);
            }
        }
    }
}

/// A changed load on its way to all members.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadPush {
    /// Who was told last.
    last: NodeKey,
    /// Who was told first, once somebody was.
    first: Option<NodeKey>,
    /// It is another class: who selects nodes has to know at once.
    urgent: bool,
}

/// How many datagrams with nothing but a load may be sent. One change after a quiet time is told to all at once; where the load goes up
/// and down all the time the others hear of it with the probes, and idle traffic stays what it is.
#[derive(Debug, Default)]
pub(super) struct LoadAllowance {
    left: f64,
    at: Time,
}

impl LoadAllowance {
    /// Periods after which one more may be sent.
    const PERIODS: u32 = 8;

    /// Takes one; when there will be one otherwise.
    fn take(&mut self, now: Time, settings: &Settings, members: usize) -> Option<Time> {
        let each = settings.period() * Self::PERIODS;
        // Nothing is saved up before the first: the moment at which a cluster starts has enough to say.
        let since = if self.at == Time::ZERO { Duration::ZERO } else { now.since(self.at) };
        let fresh = since.as_secs_f64() / each.as_secs_f64();
        self.left = (self.left + fresh).min(members as f64);
        self.at = now;
        if self.left >= 1.0 {
            self.left -= 1.0;
            return None;
        }
        Some(now + each.mul_f64(1.0 - self.left).max(settings.tick()))
    }
}

impl Core {
    /// A node's own claim becomes news.
    pub(super) fn tell_alive(&mut self, record: Arc<SignedRecord>, known_boot: bool, urgent: bool) {
        let rumor = Rumor::Alive { record, bare: known_boot };
        // What does not fit a datagram even alone travels without its certificate; whoever lacks that pulls.
        let rumor = match rumor {
            Rumor::Alive { record, bare: false } if Rumor::size_of(&record, false) > self.settings.payload => {
                Rumor::Alive { record, bare: true }
            }
            other => other,
        };
        self.tell(rumor, urgent);
    }

    /// Queues news, and has it told soon.
    pub(super) fn tell(&mut self, rumor: Rumor, urgent: bool) {
        let fresh = self.rumors.is_empty();
        self.rumors.push(rumor, urgent);
        let soon = self.now + self.settings.batch();
        let tick = self.gossiped + self.settings.tick();
        // What is not urgent keeps to the ticks, so that a storm of joins does not make a storm of datagrams.
        let at = if urgent || fresh { soon.max(self.gossiped + self.settings.batch()) } else { soon.max(tick) };
        self.gossip_at = self.gossip_at.min(at);
    }

    /// News that fits one datagram to `to`, after what it has to be told first.
    pub(super) fn news(&mut self, mut first: Vec<Rumor>) -> Vec<Rumor> {
        let limit = Settings::retransmits(self.table.up() + 1);
        self.rumors.fill(&mut first, self.settings.payload, limit);
        first
    }

    /// One round of gossip, when it is due.
    pub(super) fn gossip(&mut self, out: &mut Vec<Effect>) {
        if self.now < self.gossip_at {
            return;
        }
        self.gossip_at = Time::FAR;
        if !self.rumors.is_empty() && self.table.up() > 0 {
            self.gossiped = self.now;
            let datagrams = if self.rumors.is_long() { 3 } else { 1 };
            for to in self.table.sample(Settings::FAN_OUT, &[], &mut self.rng) {
                for _ in 0..datagrams {
                    let rumors = self.news(Vec::new());
                    if rumors.is_empty() {
                        break;
                    }
                    out.push(Effect::Send { to, message: Message::Gossip { rumors } });
                }
            }
        }
        let loads = self.push_load(out).unwrap_or(Time::FAR);
        let news = if self.rumors.is_empty() { Time::FAR } else { self.now + self.settings.tick() };
        self.gossip_at = loads.min(news);
    }

    /// Sends a changed load to some more members. It goes first-hand and to each once, at a bounded rate: passing it on as
    /// news would cost every node for every change. When the next may go, if any has to.
    fn push_load(&mut self, out: &mut Vec<Effect>) -> Option<Time> {
        for _ in 0..Self::LOADS_PER_TICK {
            let LoadPush { last, first, urgent } = self.load_push?;
            let next = self.table.after(last, super::member::Member::is_up).filter(|next| Some(*next) != first);
            let Some(next) = next else {
                self.load_push = None;
                return None;
            };
            if !urgent && let Some(later) = self.load_allowance.take(self.now, &self.settings, self.table.up()) {
                return Some(later);
            }
            self.load_push = Some(LoadPush { last: next, first: first.or(Some(next)), urgent });
            out.push(Effect::Send { to: next, message: Message::Load { load: self.load } });
        }
        self.load_push.map(|_| self.now + self.settings.tick())
    }

    /// A new load of this node: rides on every ping and ack, and is sent to all when it is another class.
    pub(super) fn set_load(&mut self, mut load: super::record::Load) {
        load.seq = self.load.seq.wrapping_add(1);
        let moved = load.score.abs_diff(self.load_told.score) >= Self::LOAD_STEP;
        if load.score == self.load.score && load.overloaded == self.load.overloaded {
            return;
        }
        self.load = load;
        let urgent = load.overloaded != self.load_told.overloaded;
        if moved || urgent {
            self.load_told = load;
            // Goes on where the last one is, if it is still under way: or the same would always be told first, and others never.
            let under_way = self.load_push.as_ref();
            let (last, urgent) = under_way.map_or((self.me, urgent), |push| (push.last, push.urgent || urgent));
            self.load_push = Some(LoadPush { last, first: None, urgent });
            self.gossip_at = self.gossip_at.min(self.now + self.settings.batch());
        }
    }

    /// 0.05 of the scale.
    const LOAD_STEP: u8 = 10;
    /// Datagrams with a changed load in one round of gossip.
    const LOADS_PER_TICK: usize = 8;

    /// Waits between zero and `span`, so that nodes that started together do not stay together.
    pub(super) fn jitter(&mut self, span: Duration) -> Duration {
        use rand::Rng;
        span.mul_f64(self.rng.random::<f64>())
    }
}
