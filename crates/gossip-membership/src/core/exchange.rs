//! Comparing views, and pulling what differs over the stream.
//!
//! Every ping and ack carries the XOR of the sender's view. When it differs for longer than news needs to spread, the buckets that differ are
//! pulled, and what the other lacks is pushed. As long as it agrees, the periodic exchange of full state has nothing to say and costs
//! nothing.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;

use super::effect::{Effect, Note};
use super::engine::{Core, Engine};
use super::member::{Member, State};
use super::message::{Accusation, Entry, Message, PullAnswer, PullRequest, Request, Rumor};
use super::record::{Load, NodeKey, SignedRecord};
use super::table::{BUCKETS, bucket};
use super::time::Time;

#[derive(Debug)]
pub(super) struct Exchange {
    /// Since when views have differed, without one that agrees in between.
    mismatch: Option<Time>,
    /// The last view seen to agree.
    agreed: Time,
    /// No pull on account of a difference before this.
    not_before: Time,
    /// Differences that pulls did not settle make pulls rarer.
    in_vain: u32,
    /// This node's view at the last pull on account of a difference.
    pulled_as: u64,
    /// Pulls that a node makes soon after it has joined.
    follow_ups: Option<FollowUps>,
    /// A node to pull from at the next occasion.
    soon: Option<(Time, NodeKey)>,
    /// When the full state is to be compared at the latest.
    periodic: Time,
    running: Option<Pull>,
}

/// Whoever joins at the same time is found by asking again: soon while there is news, then less and less often.
#[derive(Debug)]
struct FollowUps {
    /// Who answered last; the connection to it is still there.
    from: NodeKey,
    next: Time,
    pause: Duration,
    end: Time,
}

impl FollowUps {
    /// Up to so many members the same node is asked again; more would press it too hard.
    const FEW: usize = 64;

    /// The shortest pause. In a large cluster each answer is long.
    fn shortest(period: Duration, members: usize) -> Duration {
        period / 25 * u32::try_from(members / 32).unwrap_or(u32::MAX).clamp(1, 6)
    }
}

#[derive(Debug)]
struct Pull {
    id: u32,
    from: NodeKey,
    end: Time,
}

impl Exchange {
    pub(super) fn new(periodic: Time) -> Self {
        Self {
            mismatch: None,
            agreed: Time::ZERO,
            not_before: Time::ZERO,
            in_vain: 0,
            pulled_as: 0,
            follow_ups: None,
            soon: None,
            periodic,
            running: None,
        }
    }

    /// What was seen before a pause of this node says nothing now.
    pub(super) fn calm(&mut self) {
        self.mismatch = None;
    }

    pub(super) fn deadline(&self) -> Time {
        let follow_up = self.follow_ups.as_ref().map_or(Time::FAR, |follow_ups| follow_ups.next);
        let soon = self.soon.map_or(Time::FAR, |(at, _)| at);
        let running = self.running.as_ref().map_or(Time::FAR, |pull| pull.end);
        self.periodic.min(follow_up).min(soon).min(running)
    }
}

impl Core {
    /// Nodes that are asked for a sign of life, at most, after one exchange that showed them in doubt.
    const DOUBTS: usize = 32;

    /// Another node's view, as a number.
    pub(super) fn compare(&mut self, with: NodeKey, digest: u64) {
        if digest == self.digest() {
            self.exchange.mismatch = None;
            self.exchange.agreed = self.now;
            self.exchange.in_vain = 0;
            self.exchange.not_before = Time::ZERO;
            return;
        }
        let since = *self.exchange.mismatch.get_or_insert(self.now);
        let lasted = self.now.since(since) >= self.settings.mismatch_patience();
        let changed = self.exchange.pulled_as != self.digest();
        if lasted && (changed || self.now >= self.exchange.not_before) && self.exchange.running.is_none() {
            if changed {
                // This view has changed since the last pull: another question.
                self.exchange.in_vain = 0;
                self.exchange.pulled_as = self.digest();
            }
            let wait = self.settings.period() * (1 << self.exchange.in_vain.min(3));
            self.exchange.in_vain += 1;
            self.exchange.not_before = self.now + wait + self.jitter(wait / 2);
            self.exchange.soon.get_or_insert((self.now, with));
        }
    }

    /// Pulls from a node a little later, when what it had to say first has been said.
    pub(super) fn pull_soon(&mut self, from: NodeKey) {
        let at = self.now + self.settings.tick() + self.jitter(self.settings.tick());
        self.exchange.soon.get_or_insert((at, from));
    }

    /// Pulls that are due.
    pub(super) fn run_exchange(&mut self, out: &mut Vec<Effect>) {
        if let Some(pull) = &self.exchange.running
            && self.now >= pull.end
        {
            self.exchange.running = None;
        }
        if let Some((at, from)) = self.exchange.soon
            && self.now >= at
        {
            self.exchange.soon = None;
            self.pull(from, out);
        }
        self.follow_up(out);
        if self.now >= self.exchange.periodic {
            let pause = self.settings.push_pull_interval;
            self.exchange.periodic = self.now + pause * 9 / 10 + self.jitter(pause / 5);
            // A digest that agreed is the exchange.
            if self.now.since(self.exchange.agreed) >= pause {
                self.pull_from_any(out);
            }
        }
    }

    fn follow_up(&mut self, out: &mut Vec<Effect>) {
        let up = self.table.up();
        let Some(follow_ups) = self.exchange.follow_ups.as_mut().filter(|follow_ups| self.now >= follow_ups.next)
        else {
            return;
        };
        follow_ups.pause = follow_ups.pause * 3 / 2;
        follow_ups.next = self.now + follow_ups.pause;
        let (from, over) = (follow_ups.from, self.now >= follow_ups.end);
        // The last one asks somebody else: whatever the one who was asked so far does not know.
        if over {
            self.exchange.follow_ups = None;
        }
        if over || up > FollowUps::FEW || !self.table.get(from).is_some_and(Member::is_up) {
            self.pull_from_any(out);
        } else {
            self.pull(from, out);
        }
    }

    /// After an answer: news says that there may be more soon.
    fn expect_more(&mut self, from: NodeKey, news: usize) {
        let shortest = FollowUps::shortest(self.settings.period(), self.table.up());
        if let Some(follow_ups) = &mut self.exchange.follow_ups {
            follow_ups.from = from;
            if news > 0 {
                follow_ups.pause = shortest;
                follow_ups.next = self.now + shortest;
            }
        }
    }

    /// Whether the last view seen differed from this one.
    pub(super) fn is_behind(&self) -> bool {
        self.exchange.mismatch.is_some()
    }

    fn pull_from_any(&mut self, out: &mut Vec<Effect>) {
        if let Some(from) = self.table.sample(1, &[], &mut self.rng).first() {
            self.pull(*from, out);
        }
    }

    /// Asks somebody who is well for his view before a node is given up. A pull that hangs does not stand in the way.
    pub(super) fn pull_before_verdict(&mut self, suspect: NodeKey, out: &mut Vec<Effect>) {
        let some = self.table.sample(4, &[suspect], &mut self.rng);
        let well = |key: &&NodeKey| self.table.get(**key).is_some_and(|member| member.state == State::Alive);
        if let Some(from) = some.iter().find(well) {
            self.exchange.running = None;
            self.pull(*from, out);
        }
    }

    /// Asks a node for what differs, unless such a request is under way.
    pub(super) fn pull(&mut self, from: NodeKey, out: &mut Vec<Effect>) {
        if self.exchange.running.is_some() || self.table.get(from).is_none() {
            return;
        }
        let buckets = Box::new(*self.table.buckets());
        let request = PullRequest { record: Arc::clone(&self.local), buckets };
        let id = self.stream(from, Request::Pull(request), out);
        self.exchange.running = Some(Pull { id, from, end: self.now + self.settings.stream_timeout() });
    }

    /// Answers another node's pull.
    pub(super) fn answer_pull(&mut self, from: NodeKey, request: &PullRequest, out: &mut Vec<Effect>) -> PullAnswer {
        if request.record.key == from {
            self.claim(Arc::clone(&request.record), true, out);
            self.hear(from, out);
        }
        // Whoever is removed here has to know: only a newer claim of its own brings it back.
        let buried = self.table.grave(self.now, from).filter(|grave| !grave.left).map(|grave| {
            let record = Arc::clone(&grave.record);
            Entry { record, state: State::Dead, age_ms: u32::MAX, load: Load::default() }
        });
        let mine = self.table.buckets();
        let differing =
            (0..BUCKETS).filter(|at| mine[*at] != request.buckets[*at]).fold(0_u64, |mask, at| mask | (1 << at));
        // The asker's own entry goes along only if it is another than it says: then it has to know.
        let entries = self
            .table
            .iter()
            .filter(|member| differing & (1 << bucket(member.key())) != 0)
            .filter(|member| {
                member.key() != from || member.version() != request.record.record.version() || !member.is_up()
            })
            .map(|member| self.entry(member))
            .chain(buried)
            .collect();
        PullAnswer { record: Arc::clone(&self.local), differing, entries }
    }

    fn entry(&self, member: &Member) -> Entry {
        let age_ms = u32::try_from(self.now.since(member.since).as_millis()).unwrap_or(u32::MAX);
        Entry { record: Arc::clone(&member.record), state: member.state, age_ms, load: member.load }
    }

    pub(super) fn on_pull_failed(&mut self, id: u32) {
        self.exchange.running.take_if(|pull| pull.id == id);
    }

    pub(super) fn on_pulled(&mut self, id: u32, answer: PullAnswer, out: &mut Vec<Effect>) {
        let Some(pull) = self.exchange.running.take_if(|pull| pull.id == id) else { return };
        let from = pull.from;
        if !self.join.is_done() {
            self.join.finish();
            let period = self.settings.period();
            let pause = FollowUps::shortest(period, 0);
            self.exchange.follow_ups = Some(FollowUps { from, next: self.now + pause, pause, end: self.now + period });
        }
        if answer.record.key == from {
            self.claim(Arc::clone(&answer.record), false, out);
        }
        self.hear(from, out);
        let differing = answer.differing;
        let theirs: std::collections::BTreeMap<NodeKey, ((u64, u32), State)> = answer
            .entries
            .iter()
            .map(|entry| (entry.record.key, (entry.record.record.version(), entry.state)))
            .collect();
        let news = self.take_entries(from, answer.entries, out);
        self.expect_more(from, news);
        out.push(Effect::Note(Note::Exchanged { with: from, news }));
        let lacks = |member: &Member| match theirs.get(&member.key()) {
            None => member.is_up(),
            Some((version, state)) => {
                *version < member.version()
                    || (*version == member.version() && state.is_up() && member.state == State::Dead)
            }
        };
        let push: Vec<Entry> = self
            .table
            .iter()
            .filter(|member| member.key() != from && differing & (1 << bucket(member.key())) != 0 && lacks(member))
            .map(|member| self.entry(member))
            .collect();
        if !push.is_empty() {
            self.stream(from, Request::Push(push), out);
        }
    }

    /// Takes over what another node believes. Says how much of it was news.
    pub(super) fn take_entries(&mut self, from: NodeKey, entries: Vec<Entry>, out: &mut Vec<Effect>) -> usize {
        if self.table.get(from).is_none() {
            return 0;
        }
        // Little news is worth passing on; a whole cluster is not, because everybody else has it.
        let tell = entries.len() <= 16;
        let mut doubts = Vec::new();
        let mut news = 0;
        for entry in entries {
            let key = entry.record.key;
            let version = entry.record.record.version();
            if key == self.me {
                self.claim(Arc::clone(&entry.record), false, out);
                if entry.state == State::Dead {
                    let (boot, incarnation) = version;
                    let accusation = Accusation { key, boot, incarnation, accuser: from, refused: false };
                    self.take_rumors(from, vec![Rumor::Dead(accusation)], out);
                }
                continue;
            }
            if entry.state == State::Dead {
                self.take_verdict(from, &entry, &mut doubts, out);
                continue;
            }
            if self.claim(Arc::clone(&entry.record), tell, out) {
                news += 1;
                if let Some(member) = self.table.get_mut(key) {
                    member.load = entry.load;
                }
            } else if entry.state.is_up() && !self.table.get(key).is_some_and(Member::is_up) {
                doubts.push(entry.record);
            }
        }
        self.settle_doubts(from, doubts, out);
        news
    }

    fn take_verdict(
        &mut self,
        from: NodeKey,
        entry: &Entry,
        doubts: &mut Vec<Arc<SignedRecord>>,
        out: &mut Vec<Effect>,
    ) {
        let key = entry.record.key;
        let (boot, incarnation) = entry.record.record.version();
        let accusation = Accusation { key, boot, incarnation, accuser: from, refused: false };
        let age = std::time::Duration::from_millis(u64::from(entry.age_ms));
        if !self.table.get(key).is_some_and(Member::is_up) {
            return;
        }
        // The claim that was given up may be newer than the one known here.
        self.claim(Arc::clone(&entry.record), false, out);
        if age <= self.settings.fresh_verdict() {
            self.give_up(accusation, out);
        } else if self.table.get(key).is_some_and(|member| member.version() == (boot, incarnation)) {
            doubts.push(Arc::clone(&entry.record));
        }
    }

    /// One side says up, the other not: the node itself settles it. Who is up here is told what is said of it and probed; who
    /// is not gets a hello, after which it is told the same.
    fn settle_doubts(&mut self, from: NodeKey, mut doubts: Vec<Arc<SignedRecord>>, out: &mut Vec<Effect>) {
        while doubts.len() > Self::DOUBTS {
            let at = self.rng.random_range(0..doubts.len());
            doubts.swap_remove(at);
        }
        for record in doubts {
            let key = record.key;
            if self.table.get(key).is_some_and(Member::is_up) {
                let (boot, incarnation) = record.record.version();
                let accusation = Accusation { key, boot, incarnation, accuser: from, refused: false };
                let message = Message::Gossip { rumors: vec![Rumor::Dead(accusation)] };
                out.push(Effect::Send { to: key, message });
                self.probe(key, out);
            } else {
                out.push(Effect::Hello { addr: record.record.addr });
            }
        }
    }
}
